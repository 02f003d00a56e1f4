"""Tokenizers that are missing, damaged or empty, or need packages that are not installed: each works or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmquant.errors import UserError
from llmquant.hub import load_tokenizer


def without_vocabulary(tiny_model: Any, folder: Path, architecture: str) -> Path:
    shutil.copytree(tiny_model(architecture), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "cohere2"])
def test_folder_without_a_vocabulary_is_refused_for_every_family(architecture, tiny_model, tmp_path):
    folder = without_vocabulary(tiny_model, tmp_path / "model", architecture)
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "2.0"}, "Unknown tokenizer version '2.0'"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "no file in the folder holds a vocabulary"),
        ({"model": {"type": "New"}}, "its tokenizer cannot be loaded"),
    ],
)
def test_tokenizer_file_of_another_version_is_refused(change, words, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=words):
        load_tokenizer(folder)


def test_tokenizer_that_fails_when_used_is_refused(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02",
            r"tokenizer\.model: .*; run `pip install sentencepiece protobuf`",
        ),
        (b"IQ== 0\nIg== 1\n", r"tokenizer\.model: .*; run `pip install tiktoken`"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"tokenizer\.model is damaged or not a vocabulary"),
        (b"", "its tokenizer cannot be loaded"),
    ],
)
def test_vocabulary_that_needs_other_packages_names_them(content, words, tiny_model, tmp_path, monkeypatch):
    folder = without_vocabulary(tiny_model, tmp_path / "model", "llama")
    (folder / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr("llmquant.hub._is_installed", lambda module: False)
    with pytest.raises(UserError, match=words):
        load_tokenizer(folder)


def test_a_sentencepiece_model_alone_is_a_tokenizer(tiny_model, tmp_path):
    pytest.importorskip("google.protobuf")
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = without_vocabulary(tiny_model, tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=50,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("the quick dog")["input_ids"], skip_special_tokens=True) == "the quick dog"
