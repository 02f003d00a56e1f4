"""Generation settings: what a checkpoint's generation_config.json says, checked, and joined with the options of a call.

The file may hold anything that transformers' GenerationConfig knows, and anything that somebody wrote by hand. A call
takes from it the settings that change which token comes next or where a text ends (USED). Searches that weigh several
texts against each other (SEARCHES) are refused, unless the options say how to draw. The rest (the layout of the cache,
additional outputs, speculative decoding) does not change the text; transformers' defaults hold for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from llmquant.errors import UserError, first_words

FILE = "generation_config.json"
MIN_TEMPERATURE = 1e-5
"""Below this temperature the most likely token has all of the probability, up to ties, and quotients may overflow."""


@dataclass(frozen=True)
class Rule:
    """The values that a setting may have."""

    is_right: Callable[[Any, int], bool]
    """Takes a value, and the number of tokens that the model knows."""
    words: str
    convert: Callable[[Any], Any] = lambda value: value
    """Makes a right value the one that transformers takes: for some settings it tells 1 from 1.0."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: Any, vocabulary: int) -> bool:
    return _is_whole(value) and 0 <= value < vocabulary


def _is_list_of(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_right, value))


def _are_tokens(value: Any, vocabulary: int) -> bool:
    return _is_list_of(value, lambda token: _is_token(token, vocabulary))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_bias(value: Any, vocabulary: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and _are_tokens(value[0], vocabulary)
        and _is_number(value[1])
    )


def _is_watermark(value: Any, vocabulary: int) -> bool:
    """Whether transformers can make the processor that writes it."""
    try:
        value.construct_processor(vocabulary, "cpu")
    except Exception:  # values of any type
        return False
    return _is_number(getattr(value, "bias", 0.0)) and _is_whole(getattr(value, "context_width", 1))


SWITCH = Rule(lambda value, _: isinstance(value, bool), "true or false")
COUNT = Rule(lambda value, _: _is_whole(value) and value >= 0, "a whole number, 0 or more")
POSITIVE = Rule(lambda value, _: _is_number(value) and value > 0, "a positive number", float)
SHARE = Rule(lambda value, _: _is_number(value) and 0 < value <= 1, "a number above 0, at most 1", float)
CUTOFF = Rule(lambda value, _: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1", float)
ENDS = Rule(
    lambda value, _: _is_whole(value) or _is_list_of(value, _is_whole), "the number of a token, or a list of them"
)
TOKENS = Rule(_are_tokens, "a list of tokens of the model")

DRAW: dict[str, Rule] = {
    "do_sample": SWITCH,
    "temperature": Rule(lambda value, _: _is_number(value) and value >= 0, "0 (greedy) or a positive number", float),
    "top_k": COUNT,
    "top_p": SHARE,
    "min_p": CUTOFF,
    "top_h": SHARE,
    "typical_p": SHARE,
    "epsilon_cutoff": CUTOFF,
    "eta_cutoff": CUTOFF,
}
"""How the next token is drawn; they have no effect if the most likely one is taken."""
USED: dict[str, Rule] = DRAW | {
    "repetition_penalty": POSITIVE,
    "no_repeat_ngram_size": COUNT,
    "renormalize_logits": SWITCH,
    "remove_invalid_values": SWITCH,
    "guidance_scale": Rule(lambda value, _: _is_number(value), "a number", float),
    "suppress_tokens": TOKENS,
    "begin_suppress_tokens": TOKENS,
    "bad_words_ids": Rule(
        lambda value, size: _is_list_of(value, lambda word: _are_tokens(word, size)),
        "a list of lists of tokens of the model",
    ),
    "sequence_bias": Rule(
        lambda value, size: _is_list_of(value, lambda pair: _is_bias(pair, size)),
        "a list of pairs: a list of tokens of the model, and a number",
        lambda pairs: [[tokens, float(bias)] for tokens, bias in pairs],
    ),
    "exponential_decay_length_penalty": Rule(
        lambda value, _: (
            isinstance(value, (list, tuple)) and len(value) == 2 and _is_whole(value[0]) and _is_number(value[1])
        ),
        "a pair of a whole number and a number",
    ),
    "forced_bos_token_id": Rule(_is_token, "a token of the model"),
    "forced_eos_token_id": Rule(
        lambda value, size: _is_token(value, size) or _are_tokens(value, size),
        "a token of the model, or a list of them",
    ),
    "eos_token_id": ENDS,
    "stop_strings": Rule(
        lambda value, _: _is_text(value) or _is_list_of(value, _is_text),
        "a text, or a list of them, none of them empty",
    ),
    "min_length": COUNT,
    "min_new_tokens": COUNT,
    "max_time": POSITIVE,
    "use_cache": SWITCH,
    "watermarking_config": Rule(_is_watermark, "a watermark that transformers can write"),
}
SEARCHES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda value: value != 1, "a beam search"),
    "num_return_sequences": (lambda value: value != 1, "several texts for one prompt"),
    "penalty_alpha": (lambda value: value != 0, "a contrastive search"),
    "dola_layers": (lambda value: True, "a contrast of layers"),
    "constraints": (bool, "a constrained beam search"),
    "force_words_ids": (bool, "a constrained beam search"),
    "token_healing": (bool, "a change of the prompt's last token"),
}
"""Settings that cannot be followed: which values ask for something, and for what."""


def read_settings(file: Path) -> GenerationConfig:
    """The settings of a generation_config.json; UserError if transformers cannot take them."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, f"cannot be read as JSON ({first_words(error)})") from error
    if not isinstance(content, dict):
        raise _damaged(file, f"holds {_shown(content)}, and no JSON object")
    # A setting with the name of a method would hide it; it means nothing to transformers either.
    content = {key: value for key, value in content.items() if not callable(getattr(GenerationConfig, key, None))}
    try:
        settings = GenerationConfig.from_dict(content)
        # What `from_pretrained` notes too: `save_pretrained` writes settings as they were read without judging them.
        settings._original_object_hash = hash(settings)
        return settings
    except Exception as error:  # values of any type, and combinations that transformers refuses
        for key, value in content.items():
            _check_alone(key, value, file)
        raise _damaged(file, f"transformers refuses it ({type(error).__name__}: {first_words(error)})") from error


def _check_alone(key: str, value: Any, file: Path) -> None:
    """UserError if transformers refuses a setting whatever the others are."""
    try:
        GenerationConfig(**{key: value})
    except Exception as error:
        raise UserError(
            f"{file}: {key} {_shown(value)}: transformers refuses it ({first_words(error)}); correct it, or remove it"
        ) from error


def joined_settings(own: Any, asked: Mapping[str, Any], vocabulary: int, file: str | Path = FILE) -> GenerationConfig:
    """The settings of one call.

    own: the model's GenerationConfig. asked: settings that the call names, which count more; "do_sample" among them
    means that the call says how tokens are drawn. vocabulary: how many tokens the model knows. file: where the own
    settings come from, for the error. Raises UserError for a value that cannot be used and for a search.
    """
    settings = {key: value for key in USED if (value := getattr(own, key, None)) not in (None, [], {})} | dict(asked)
    if "do_sample" not in asked:
        _refuse_searches(own, file)
    if settings.get("do_sample", False) is False:
        settings = _without_draw(settings)
    _check(settings, file, vocabulary)
    if settings.get("temperature", 1.0) < MIN_TEMPERATURE:
        settings = _without_draw(settings)
    settings["eos_token_id"] = _known(settings.get("eos_token_id"), vocabulary)
    if settings["eos_token_id"] is None:
        settings.pop("exponential_decay_length_penalty", None)  # it favours a token that there is not
    return GenerationConfig(
        **{key: USED[key].convert(value) if key in USED else value for key, value in settings.items()}
    )


def _without_draw(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in DRAW}


def _known(ends: Any, vocabulary: int) -> list[int] | None:
    """The tokens of eos_token_id that the model can produce."""
    numbers = ends if isinstance(ends, (list, tuple)) else [ends]
    return [number for number in numbers if _is_token(number, vocabulary)] or None


def _refuse_searches(own: Any, file: str | Path) -> None:
    for key, (asks, search) in SEARCHES.items():
        value = getattr(own, key, None)
        # A contrastive search draws nothing: transformers ignores its penalty where tokens are drawn.
        if value is not None and asks(value) and not (key == "penalty_alpha" and own.do_sample):
            raise UserError(
                f"{file}: {key} {_shown(value)} asks for {search}, which is not supported; use --greedy, or "
                "--temperature 0.7"
            )


def _check(settings: Mapping[str, Any], file: str | Path, vocabulary: int) -> None:
    """UserError for the first setting whose value cannot be used."""
    for key, rule in USED.items():
        value = settings.get(key)
        if value is not None and not rule.is_right(value, vocabulary):
            remedy = "correct it, or use --greedy" if key in DRAW else "correct it, or remove it"
            raise UserError(f"{file}: {key} {_shown(value)}: must be {rule.words}; {remedy}")


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: {reason}; copy it from the original model, or remove it, and the defaults hold")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:60] + " …"
