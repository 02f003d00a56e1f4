"""Long text is tokenized in small pieces, and the tokens equal those of the whole text."""

from __future__ import annotations

import pytest
from tiny_models import BOS, EOS, tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llmquant.data import tokens
from llmquant.data.tokens import pieces, special_ids, token_ids
from llmquant.eval.data import text_tokens

RUSSIAN = "Однажды, в студёную зимнюю пору я из лесу вышел; был сильный мороз.\nГляжу, поднимается медленно\n\nв гору. "
HINDI = "एक समय की बात है, एक गाँव में एक किसान रहता था। उसके पास बहुत सारी गायें थीं।\n"
CHINESE = "从前有座山，山里有座庙，庙里有个老和尚在讲故事。他讲的是什么呢？从前有座山！"
THAI = "กาลครั้งหนึ่งนานมาแล้วมีชายคนหนึ่งอาศัยอยู่ในหมู่บ้านเล็ก ๆ แห่งหนึ่ง\n"
TEXTS = {
    "raw WikiText": "".join(f" = Title {word} = \n \n It was a dark and stormy night . \n" for word in range(60)),
    "blank rows": "\n\n".join(["A row.", "", "  indented words", "", "", "x = 1\n\ny = 2", "one two\tthree"] * 30),
    "one line": "no line ever ends in this text of many words " * 40,
    "line ends of Windows": "It was dark. \r\nSo it was\r\n\r\nand  is\t\tso. \r\n" * 40,
    "Russian": RUSSIAN * 15,
    "Hindi": HINDI * 20,
    "Chinese": CHINESE * 40,
    "Thai": THAI * 20,
    "many scripts": (RUSSIAN + CHINESE + "def f(x):\n    return x  +  1\n\n\n" + HINDI) * 6,
}
# Llama 3, Qwen 2 and others split text into words with the character before them.
WORD_WITH_MARK = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def like_llama_3() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_WITH_MARK), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def like_sentencepiece(*, by_normalizer: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that adds a space before a text, in its pre-tokenizer or, like Llama 2, in its normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXTS["one line"], TEXTS["raw WikiText"], RUSSIAN], trainer)
    if by_normalizer:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture
def small_pieces(monkeypatch):
    """Set the length of pieces to a number of characters, with a short search for the end of a word."""

    def set_to(characters: int) -> None:
        monkeypatch.setattr(tokens, "PIECE_CHARACTERS", characters)
        monkeypatch.setattr(tokens, "SEARCHED_CHARACTERS", 60)

    return set_to


@pytest.mark.parametrize("make", [tiny_tokenizer, like_llama_3], ids=["like GPT-2", "like Llama 3"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_tokenized_in_pieces_has_the_tokens_of_the_whole(name, make, small_pieces):
    text, tokenizer, calls = TEXTS[name], make(), []

    def counting(*arguments, **options):
        calls.append(arguments)
        return tokenizer(*arguments, **options)

    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for characters in (1, 7, 1000, 10**6):
        calls.clear()
        small_pieces(characters)
        assert token_ids(counting, text).tolist() == whole
        assert (len(calls) > 1) == (characters < len(text))
        assert max(len(piece) for (piece,) in calls) < characters + 62


@pytest.mark.parametrize("by_normalizer", [False, True])
@pytest.mark.parametrize("name", ["one line", "raw WikiText", "Russian"])
def test_tokenizer_that_adds_a_space_before_a_text_adds_it_once(name, by_normalizer, small_pieces):
    tokenizer = like_sentencepiece(by_normalizer=by_normalizer)
    whole = tokenizer(TEXTS[name], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(whole[:1]).startswith(" ") or tokenizer.convert_ids_to_tokens(whole[0]).startswith("▁")
    small_pieces(100)
    assert token_ids(tokenizer, TEXTS[name]).tolist() == whole


@pytest.mark.parametrize(
    "text",
    ["中文" * 1000, "กาลครั้งหนึ่ง" * 200, "QUJD" * 500, "😀👍🏽" * 500, " " * 2000, "एकसमयकीबात" * 200],
    ids=["Chinese", "Thai", "base64", "emoji", "spaces", "Hindi"],
)
def test_text_without_a_good_place_to_cut_is_cut_anyway(text, small_pieces):
    small_pieces(200)
    cut = list(pieces([text]))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 2 * 200 + 60
    assert len(token_ids(tiny_tokenizer(), text)) == pytest.approx(len(tiny_tokenizer()(text)["input_ids"]), abs=20)


@pytest.mark.parametrize("size", [1, 17, 10_000])
def test_segments_of_any_length_give_the_same_tokens(size, small_pieces):
    small_pieces(50)
    text = TEXTS["many scripts"]
    segments = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(pieces(segments)) == text
    assert token_ids(tiny_tokenizer(), segments).tolist() == tiny_tokenizer()(text)["input_ids"]


def test_empty_text_has_no_tokens():
    assert token_ids(tiny_tokenizer(), "").tolist() == []
    assert list(pieces(["", ""])) == []


def test_special_tokens_are_found_before_and_after_the_text():
    tokenizer = tiny_tokenizer()
    assert special_ids(tokenizer) == ([], [])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert special_ids(tokenizer) == ([BOS], [EOS])


@pytest.mark.parametrize("special", [True, False])
def test_evaluated_text_has_the_tokens_of_the_whole_text_and_special_tokens(special, small_pieces):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    small_pieces(50)
    text = TEXTS["Russian"]
    whole = tokenizer(text, add_special_tokens=special)["input_ids"]
    assert text_tokens(tokenizer, text, add_special=special).tolist() == whole
    assert text_tokens(tokenizer, [text[:9], text[9:]], add_special=special).tolist() == whole


@pytest.mark.model
def test_a_real_tokenizer_gives_the_same_tokens_in_pieces(smollm2, small_pieces):
    from llmquant.hub import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    small_pieces(50)
    for text in TEXTS.values():
        assert token_ids(tokenizer, text).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
