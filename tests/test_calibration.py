"""The draw of calibration tokens, and its summary."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import BOS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import llmquant.data.calibration as calibration
from llmquant.data.calibration import calibration_tokens, preview_calibration
from llmquant.data.sources import PYTHON_DOCS, TextRows
from llmquant.errors import UserError


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"x{number} = {number} ** 2\n" for number in range(400)) + "\n\nsame\nsame\nsame\n")
    return str(path)


def test_samples_are_distinct_windows_of_the_text(text_file):
    tokenizer = tiny_tokenizer()
    drawn = calibration_tokens(tokenizer, text_file, num_samples=10, seq_len=32, seed=3)
    tokens = tokenizer(Path(text_file).read_text())["input_ids"]
    windows = [tokens[start : start + 32] for start in range(0, len(tokens) - 31, 32)]
    places = [windows.index(sample) for sample in drawn.tokens_SL.tolist()]
    assert len(set(places)) == 10
    assert drawn.tokens_SL.dtype == torch.int64


def test_seed_decides_the_draw(text_file):
    tokenizer = tiny_tokenizer()

    def draw(seed):
        return calibration_tokens(tokenizer, text_file, num_samples=10, seq_len=32, seed=seed).tokens_SL

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_summary_counts_every_token_and_row(text_file):
    tokenizer = tiny_tokenizer()
    summary = calibration_tokens(tokenizer, text_file, num_samples=10, seq_len=32).summary()
    num_tokens = len(tokenizer(Path(text_file).read_text())["input_ids"])
    assert json.loads(json.dumps(summary)) == {
        "source": text_file,
        "seed": 0,
        "num_samples": 10,
        "seq_len": 32,
        "num_rows": 405,
        "num_blank_rows": 2,
        "num_duplicate_rows": 2,
        "num_tokens_available": num_tokens,
        "num_tokens_used": 320,
        "num_windows_available": num_tokens // 32,
        "num_tokens_left_over": num_tokens % 32,
        "fallbacks": [],
        "notes": [],
    }


def test_every_sample_starts_as_the_tokenizer_starts_a_text(text_file):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    drawn = calibration_tokens(tokenizer, text_file, num_samples=10, seq_len=32)
    assert drawn.tokens_SL.shape == (10, 32)
    assert drawn.tokens_SL[:, 0].tolist() == [BOS] * 10
    assert (drawn.tokens_SL[:, 1:] != BOS).all()
    assert drawn.num_tokens_used == 310


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 5000}, r"text\.txt: \d+ tokens make \d+ samples of 32, and 5000 are requested.*--samples \d+"),
        ({"seq_len": 100_000}, "make 0 samples of 100000"),
        ({"num_samples": 0}, "samples 0: at least 1"),
        ({"seq_len": 0}, "seq_len 0: no room for text"),
    ],
)
def test_calibration_that_a_text_cannot_give_is_refused(text_file, options, message):
    with pytest.raises(UserError, match=message):
        calibration_tokens(tiny_tokenizer(), text_file, **{"num_samples": 10, "seq_len": 32} | options)


def test_auto_reads_c4_if_the_hub_can_be_reached(monkeypatch):
    requested = []

    def load_rows(source, split):
        requested.append((source, split))
        return TextRows(source=source, rows=["some words"] * 50, joiner=" ")

    monkeypatch.setattr(calibration, "load_rows", load_rows)
    drawn = calibration_tokens(tiny_tokenizer(), num_samples=2, seq_len=16)
    assert requested == [("c4", "train")]
    assert (drawn.source, drawn.fallbacks) == ("c4", ())


def notes_on(tmp_path, text, tokenizer=None, name="text.txt"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return calibration_tokens(tokenizer or tiny_tokenizer(), str(tmp_path / name), num_samples=2, seq_len=16).notes


def test_text_that_is_unlike_language_gives_a_note(tmp_path):
    assert notes_on(tmp_path, "".join(f"x{number} = {number} ** 2\n" for number in range(100))) == ()
    assert notes_on(tmp_path, "the same words again\n" * 50) == (
        "98% of the text is in rows that repeat an earlier row; a more varied text calibrates better",
    )
    (tokens_per_character,) = notes_on(tmp_path, "従来の言葉" * 50)
    assert tokens_per_character.startswith("3.0 tokens per character: the tokenizer has few tokens for this script")
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(tokenizer("q")["input_ids"][0])
    (unknown,) = notes_on(tmp_path, "qqqx" * 50, tokenizer)
    assert unknown == "75% of the tokens are q: the tokenizer has no tokens for this script"
    lines = "".join(json.dumps({"text": f"row {number}, cut \ud83d"}) + "\n" for number in range(50))
    (replaced,) = notes_on(tmp_path, lines, name="rows.jsonl")
    assert replaced.endswith("read as U+FFFD: 50")


def test_preview_is_the_summary_of_the_draw(text_file):
    summary, tokens_SL = preview_calibration(tiny_tokenizer(), text_file, 10, 32, 3)
    drawn = calibration_tokens(tiny_tokenizer(), text_file, 10, 32, 3)
    assert summary == drawn.summary()
    assert torch.equal(tokens_SL, drawn.tokens_SL)


@pytest.mark.slow
def test_auto_without_a_hub_falls_back_to_the_python_docs():
    drawn = calibration_tokens(tiny_tokenizer(), num_samples=128, seq_len=512)
    assert drawn.source == PYTHON_DOCS
    (fallback,) = drawn.fallbacks
    assert fallback.startswith("calibrated on python-docs, because c4 cannot be read")
    assert drawn.summary()["fallbacks"] == [fallback]
