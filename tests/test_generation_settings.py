"""Generation settings, chat templates and tokens of a checkpoint work, or are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command
from tiny_models import VOCAB_SIZE, tiny_tokenizer
from transformers import GenerationConfig

import llmquant
from llmquant.data.chat import chat_text
from llmquant.errors import UserError
from llmquant.runtime.generate import SamplingParams, generate
from llmquant.runtime.generation_settings import (
    GENERATION_CONFIG_FILE,
    SUPPORTED_SETTINGS,
    merge_settings,
    read_generation_config,
)

SAMPLED = {"do_sample": True}


def merged(content: dict[str, Any], **requested: Any) -> GenerationConfig:
    return merge_settings(GenerationConfig(**content), {"max_new_tokens": 4, **requested}, VOCAB_SIZE)


@pytest.fixture(scope="module")
def model(tiny_model):
    return llmquant.load(tiny_model("llama"), device="cpu")


@pytest.fixture
def with_settings(model, monkeypatch):
    """`with_settings(**content)` -> the model, with these generation settings until the test ends."""

    def set_settings(**content: Any) -> Any:
        monkeypatch.setattr(model, "generation_config", GenerationConfig(**content))
        return model

    return set_settings


def texts_of(model: Any, *prompts: str, **sampling: Any) -> tuple[str, ...]:
    return generate(model, tiny_tokenizer(), prompts or ("x = 1",), SamplingParams(max_new_tokens=12, **sampling)).texts


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"top_k": ', "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", r"holds \[1\] instead of a JSON object"),
        (b"null", "holds null"),
        (b'{"cache_implementation": "odd"}', 'cache_implementation "odd": transformers refuses it'),
        (b'{"pad_token_id": "x"}', 'pad_token_id "x": transformers refuses it'),
        (b'{"max_new_tokens": 0}', "max_new_tokens 0: transformers refuses it"),
        (b'{"suppress_tokens": [1], "forced_eos_token_id": 1}', "transformers refuses it .*forced_eos_token_id"),
    ],
)
def test_the_error_for_a_damaged_file_names_the_file(content, reason, tmp_path):
    file = tmp_path / GENERATION_CONFIG_FILE
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_generation_config(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_unknown_settings_in_the_file_are_ignored(tmp_path):
    file = tmp_path / GENERATION_CONFIG_FILE
    file.write_text(json.dumps({"top_k": 3, "update": 1, "to_dict": {}, "own_key": [1], "transformers_version": 7}))
    assert read_generation_config(file).top_k == 3


def test_generate_refuses_an_invalid_file_in_one_line(tiny_model, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    arguments = ["generate", folder, "--prompt", "x", "--max-new-tokens", "2"]
    capsys.readouterr()
    for content, words in {"": "cannot be read as JSON", '{"do_sample": true, "top_p": 2}': "top_p 2: must be"}.items():
        (folder / GENERATION_CONFIG_FILE).write_text(content)
        assert command(monkeypatch, *arguments) == 2
        assert capsys.readouterr().err.startswith(f"llmquant: {folder / GENERATION_CONFIG_FILE}: {words}")
    assert command(monkeypatch, *arguments, "--greedy") == 0
    (folder / GENERATION_CONFIG_FILE).write_text('{"do_sample": true, "temperature": 0.0}')
    assert command(monkeypatch, *arguments) == 0


# --- merged with the options -----------------------------------------------------------------------------------------

WRONG = ["x", [], {}, float("nan"), True]


@pytest.mark.parametrize(
    "key", [key for key in SUPPORTED_SETTINGS if key not in ("do_sample", "stop_strings", "watermarking_config")]
)
def test_every_setting_refuses_values_of_another_type(key):
    for value in WRONG:
        if isinstance(value, bool) and SUPPORTED_SETTINGS[key].description == "true or false":
            continue
        own = GenerationConfig(**SAMPLED)
        setattr(own, key, value)
        if value in ([], {}):
            assert getattr(merge_settings(own, {}, VOCAB_SIZE), key) is None, "an empty list counts as None"
            continue
        with pytest.raises(UserError, match=f"^{GENERATION_CONFIG_FILE}: {key} .*: must be .*; correct it, or "):
            merge_settings(own, {}, VOCAB_SIZE)


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-9, 1e-300])
def test_a_temperature_of_zero_is_greedy(temperature):
    settings = merged(SAMPLED | {"temperature": temperature, "top_p": 0.9})
    assert not settings.do_sample and settings.temperature is None and settings.top_p is None


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "0.7", None])
def test_an_invalid_temperature_is_refused_unless_nothing_is_sampled(value):
    if value is None:
        assert merged(SAMPLED | {"temperature": value}).do_sample
        return
    with pytest.raises(UserError, match=r"temperature .*: must be 0 \(greedy\) or a positive number.* --greedy"):
        merged(SAMPLED | {"temperature": value})
    assert merged(SAMPLED | {"temperature": value}, do_sample=False).do_sample is None
    assert merged(SAMPLED | {"temperature": value}, do_sample=True, temperature=0.5).temperature == 0.5
    assert merged({"temperature": value}).do_sample is None, "nothing is sampled, so the temperature is ignored"


def test_whole_numbers_are_converted_to_the_floats_that_transformers_requires():
    own = GenerationConfig(do_sample=True, temperature=2, repetition_penalty=2)
    own.sequence_bias = [[[5], 1]]
    settings = merge_settings(own, {}, VOCAB_SIZE)
    for value in (settings.temperature, settings.repetition_penalty, settings.sequence_bias[0][1]):
        assert isinstance(value, float)


@pytest.mark.parametrize(
    "content",
    [
        {"num_beams": 4},
        {"num_return_sequences": 2, "do_sample": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"force_words_ids": [[1]]},
        {"token_healing": True},
    ],
)
def test_searches_are_refused_unless_the_options_say_how_to_sample(content, with_settings):
    expected = texts_of(with_settings(), greedy=True)
    model = with_settings(**content)
    key = next(iter(content))
    with pytest.raises(
        UserError, match=f"{GENERATION_CONFIG_FILE}: {key} .* selects .*; use --greedy, or --temperature"
    ):
        texts_of(model)
    assert texts_of(model, greedy=True) == expected
    assert texts_of(model, temperature=1.0)


@pytest.mark.parametrize(
    "content",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"max_length": 1},
        {"num_beams": 1, "num_return_sequences": 1, "penalty_alpha": 0.0},
        {"eos_token_id": [-1, 10**6]},
        {"pad_token_id": 10**6},
        {"exponential_decay_length_penalty": (1, 1.5)},
        {"own_key": 3},
    ],
)
def test_settings_that_do_not_change_the_text_are_ignored(content, with_settings):
    expected = texts_of(with_settings())
    own = with_settings(**content)
    assert texts_of(own) == expected
    assert own.generation_config.to_dict().items() >= content.items(), "the model keeps its own settings"


def test_settings_that_change_the_text_are_applied(model, with_settings):
    tokens = tiny_tokenizer()("x = 1", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        first, second = model(tokens).logits[0, -1].topk(2).indices.tolist()
    assert tiny_tokenizer().decode([first]) != tiny_tokenizer().decode([second])
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        own = with_settings(**{key: [first]})
        (text,) = generate(own, tiny_tokenizer(), ("x = 1",), SamplingParams(max_new_tokens=1)).texts
        assert text == tiny_tokenizer().decode([second])
    biased = with_settings(sequence_bias=[[[9], 1e6]])
    assert set(tiny_tokenizer()(texts_of(biased)[0])["input_ids"]) == {9}


def test_every_text_of_a_batch_ends_with_its_stop_string(with_settings):
    prompts = ("x = 1", "for every name in the list:")
    whole = texts_of(with_settings(), *prompts)
    stop = whole[0].strip()[2]
    texts = texts_of(with_settings(stop_strings=[stop]), *prompts)
    assert texts[0].count(stop) >= 1 and len(texts[0]) < len(whole[0])
    assert whole[0].startswith(texts[0]) and whole[1].startswith(texts[1])
    assert texts_of(with_settings(stop_strings=stop), prompts[0]) == texts[:1]


def test_predictions_that_are_not_finite_are_reported(model, monkeypatch):
    monkeypatch.setitem(model.model.norm._parameters, "weight", torch.nn.Parameter(torch.full((64,), float("nan"))))
    with pytest.raises(UserError, match="no token can be sampled"):
        texts_of(model, temperature=1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": float("nan")}, "temperature nan: must not be negative or infinite"),
        ({"temperature": float("inf")}, "temperature inf: must not be negative or infinite"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"seed": 2**64}, "seed .*: must fit into 64 bits"),
    ],
)
def test_invalid_sampling_params_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "watermark", [{"bias": "x"}, {"hashing_key": 2**70}, {"context_width": 2.5}, {"greenlist_ratio": True}]
)
def test_an_invalid_watermark_is_refused(watermark, tmp_path):
    (tmp_path / GENERATION_CONFIG_FILE).write_text(json.dumps({"watermarking_config": watermark}))
    with pytest.raises(UserError, match="watermarking_config"):
        merge_settings(read_generation_config(tmp_path / GENERATION_CONFIG_FILE), {}, 512)


# --- prompts and chat ------------------------------------------------------------------------------------------------


def test_a_token_without_an_embedding_is_refused(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    with pytest.raises(
        UserError, match=r"prompt: the tokenizer makes token 512 \('<\|im_start\|>'\), but the model has only 512;"
    ):
        generate(model, tokenizer, ["<|im_start|>x"])
    tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}"
    with pytest.raises(UserError, match="makes token 512"):
        generate(model, tokenizer, ["x"], chat=True)


def test_padding_without_an_embedding_is_not_used(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    prompts = ["x", "x = 1 + 2"]
    sampling = SamplingParams(max_new_tokens=4, greedy=True)
    assert (
        generate(model, tokenizer, prompts, sampling).texts
        == generate(model, tiny_tokenizer(), prompts, sampling).texts
    )


def test_a_prompt_that_is_not_utf8_is_refused(model):
    with pytest.raises(UserError, match=r"prompt: the tokenizer cannot read it .*; give valid UTF-8"):
        generate(model, tiny_tokenizer(), ["x\udcff"])


TALK = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template; leave out --chat"),
        ("", "has no chat template; leave out --chat"),
        ({}, "has no chat template; leave out --chat"),
        ({"rag": "a", "tool_use": "b"}, r"none of the model's chat templates \(rag, tool_use\) is called 'default'"),
        ("{{ broken ", "TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ tools | length }}", "TypeError"),
        ("{{ documents[0].text }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        (5, "TypeError"),
    ],
)
def test_a_broken_chat_template_is_refused_in_one_line(template, words):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"^chat: .*{words}") as error:
        chat_text(tokenizer, TALK)
    assert "\n" not in str(error.value)


def test_a_chat_template_that_produces_no_text_is_refused(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if false %}{% endif %}"
    with pytest.raises(UserError, match="chat: the model's chat template turns the prompt into an empty text"):
        generate(model, tokenizer, ["x"], chat=True)


def test_eval_of_conversations_refuses_the_same_templates(tiny_model, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": TALK}))
    assert command(monkeypatch, "eval", folder, "--chat", "--dataset", tmp_path / "talks.jsonl", "-q") == 2
    assert "chat template does not take conversation 1 (no system role)" in capsys.readouterr().err
