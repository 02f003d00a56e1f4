"""Generation settings: validate a checkpoint's generation_config.json, and merge it with the options of a call.

The file may hold any setting of transformers' GenerationConfig. Its values may be invalid, because people edit it by
hand. A call uses the settings that change which token comes next or where a text ends (SUPPORTED_SETTINGS). Settings
that select another decoding method (UNSUPPORTED_DECODING) raise a UserError, unless the options of the call decide how
to sample. The remaining settings (layout of the cache, additional outputs, speculative decoding) do not change the
text. They are ignored, and transformers' defaults apply.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from llmquant.errors import UserError, one_line

GENERATION_CONFIG_FILE = "generation_config.json"
MIN_TEMPERATURE = 1e-5
"""Below this temperature, sampling is greedy up to ties, and dividing the logits by the temperature may overflow."""


@dataclass(frozen=True)
class SettingRule:
    """The valid values of one generation setting."""

    is_valid: Callable[[Any, int], bool]
    """Returns whether a value is valid, given the value and the model's vocabulary size."""
    description: str
    """Description of the valid values. It completes the error message "must be ..."."""
    convert: Callable[[Any], Any] = lambda value: value
    """Converts a valid value to the type that transformers requires, for example 1 to 1.0."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: Any, vocabulary_size: int) -> bool:
    return _is_whole(value) and 0 <= value < vocabulary_size


def _is_list_of(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_valid, value))


def _are_tokens(value: Any, vocabulary_size: int) -> bool:
    return _is_list_of(value, lambda token: _is_token(token, vocabulary_size))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_bias(value: Any, vocabulary_size: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and _are_tokens(value[0], vocabulary_size)
        and _is_number(value[1])
    )


def _is_watermark(value: Any, vocabulary_size: int) -> bool:
    """Return whether transformers can build the logits processor that writes this watermark."""
    try:
        value.construct_processor(vocabulary_size, "cpu")
    except Exception:  # the error depends on the type of the value
        return False
    return _is_number(getattr(value, "bias", 0.0)) and _is_whole(getattr(value, "context_width", 1))


SWITCH = SettingRule(lambda value, _: isinstance(value, bool), "true or false")
COUNT = SettingRule(lambda value, _: _is_whole(value) and value >= 0, "a whole number, 0 or more")
POSITIVE = SettingRule(lambda value, _: _is_number(value) and value > 0, "a positive number", float)
FRACTION = SettingRule(lambda value, _: _is_number(value) and 0 < value <= 1, "a number above 0, at most 1", float)
THRESHOLD = SettingRule(lambda value, _: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1", float)
END_TOKENS = SettingRule(
    lambda value, _: _is_whole(value) or _is_list_of(value, _is_whole), "a token id, or a list of token ids"
)
TOKENS = SettingRule(_are_tokens, "a list of token ids of the model")

SAMPLING_SETTINGS: dict[str, SettingRule] = {
    "do_sample": SWITCH,
    "temperature": SettingRule(
        lambda value, _: _is_number(value) and value >= 0, "0 (greedy) or a positive number", float
    ),
    "top_k": COUNT,
    "top_p": FRACTION,
    "min_p": THRESHOLD,
    "top_h": FRACTION,
    "typical_p": FRACTION,
    "epsilon_cutoff": THRESHOLD,
    "eta_cutoff": THRESHOLD,
}
"""Rules of the sampling settings, by name. Greedy decoding ignores these settings."""
SUPPORTED_SETTINGS: dict[str, SettingRule] = SAMPLING_SETTINGS | {
    "repetition_penalty": POSITIVE,
    "no_repeat_ngram_size": COUNT,
    "renormalize_logits": SWITCH,
    "remove_invalid_values": SWITCH,
    "guidance_scale": SettingRule(lambda value, _: _is_number(value), "a number", float),
    "suppress_tokens": TOKENS,
    "begin_suppress_tokens": TOKENS,
    "bad_words_ids": SettingRule(
        lambda value, size: _is_list_of(value, lambda word: _are_tokens(word, size)),
        "a list of lists of token ids of the model",
    ),
    "sequence_bias": SettingRule(
        lambda value, size: _is_list_of(value, lambda pair: _is_bias(pair, size)),
        "a list of pairs of a list of token ids of the model and a number",
        lambda pairs: [[tokens, float(bias)] for tokens, bias in pairs],
    ),
    "exponential_decay_length_penalty": SettingRule(
        lambda value, _: (
            isinstance(value, (list, tuple)) and len(value) == 2 and _is_whole(value[0]) and _is_number(value[1])
        ),
        "a pair of a whole number and a number",
    ),
    "forced_bos_token_id": SettingRule(_is_token, "a token id of the model"),
    "forced_eos_token_id": SettingRule(
        lambda value, size: _is_token(value, size) or _are_tokens(value, size),
        "a token id of the model, or a list of such ids",
    ),
    "eos_token_id": END_TOKENS,
    "stop_strings": SettingRule(
        lambda value, _: _is_text(value) or _is_list_of(value, _is_text),
        "a non-empty text, or a list of non-empty texts",
    ),
    "min_length": COUNT,
    "min_new_tokens": COUNT,
    "max_time": POSITIVE,
    "use_cache": SWITCH,
    "watermarking_config": SettingRule(_is_watermark, "a watermarking configuration that transformers accepts"),
}
UNSUPPORTED_DECODING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda value: value != 1, "beam search"),
    "num_return_sequences": (lambda value: value != 1, "several texts per prompt"),
    "penalty_alpha": (lambda value: value != 0, "contrastive search"),
    "dola_layers": (lambda value: True, "contrastive decoding of layers (DoLa)"),
    "constraints": (bool, "constrained beam search"),
    "force_words_ids": (bool, "constrained beam search"),
    "token_healing": (bool, "token healing"),
}
"""Settings that select an unsupported decoding method. Each maps to a function, which returns whether a value selects
the method, and to the method's name."""


def read_generation_config(file: Path) -> GenerationConfig:
    """Return the settings of a generation_config.json. Raises UserError if transformers refuses them."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, f"cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise _damaged(file, f"holds {_shorten(content)} instead of a JSON object")
    # A setting with the name of a method would hide the method. It has no meaning in transformers anyway.
    content = {key: value for key, value in content.items() if not callable(getattr(GenerationConfig, key, None))}
    try:
        settings = GenerationConfig.from_dict(content)
        # `from_pretrained` stores this hash too. `save_pretrained` then writes unchanged settings without validation.
        settings._original_object_hash = hash(settings)
        return settings
    except Exception as error:  # the error depends on the types and the combination of values
        for key, value in content.items():
            _check_alone(key, value, file)
        raise _damaged(file, f"transformers refuses it ({type(error).__name__}: {one_line(error)})") from error


def _check_alone(key: str, value: Any, file: Path) -> None:
    """Raise UserError if transformers refuses a setting even without the other settings."""
    try:
        GenerationConfig(**{key: value})
    except Exception as error:
        raise UserError(
            f"{file}: {key} {_shorten(value)}: transformers refuses it ({one_line(error)}); correct it, or remove it"
        ) from error


def merge_settings(
    model_settings: Any,
    requested: Mapping[str, Any],
    vocabulary_size: int,
    file: str | Path = GENERATION_CONFIG_FILE,
) -> GenerationConfig:
    """Return the settings of one call: the model's settings, overridden by the settings that the call requests.

    model_settings: the model's GenerationConfig. requested: settings of the call; if "do_sample" is among them, the
    call decides how to sample. file: the origin of the model's settings, for error messages.
    Raises UserError for an invalid value, and for a decoding method that is not supported.
    """
    settings = {
        key: value for key in SUPPORTED_SETTINGS if (value := getattr(model_settings, key, None)) not in (None, [], {})
    } | dict(requested)
    if "do_sample" not in requested:
        _refuse_searches(model_settings, file)
    if settings.get("do_sample", False) is False:
        settings = _without_sampling(settings)
    _check(settings, file, vocabulary_size)
    if settings.get("temperature", 1.0) < MIN_TEMPERATURE:
        settings = _without_sampling(settings)
    settings["eos_token_id"] = _known_tokens(settings.get("eos_token_id"), vocabulary_size)
    if settings["eos_token_id"] is None:
        settings.pop("exponential_decay_length_penalty", None)  # it favours the end token, which does not exist
    return GenerationConfig(
        **{
            key: SUPPORTED_SETTINGS[key].convert(value) if key in SUPPORTED_SETTINGS else value
            for key, value in settings.items()
        }
    )


def _without_sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in SAMPLING_SETTINGS}


def _known_tokens(end_tokens: Any, vocabulary_size: int) -> list[int] | None:
    """Return the ids in an eos_token_id that the model can produce, or None if there are none."""
    ids = end_tokens if isinstance(end_tokens, (list, tuple)) else [end_tokens]
    return [token for token in ids if _is_token(token, vocabulary_size)] or None


def _refuse_searches(model_settings: Any, file: str | Path) -> None:
    """Raise UserError if a setting of the model selects a decoding method that is not supported."""
    for key, (selects, method) in UNSUPPORTED_DECODING.items():
        value = getattr(model_settings, key, None)
        # Contrastive search does not sample: transformers ignores its penalty if tokens are sampled.
        if value is not None and selects(value) and not (key == "penalty_alpha" and model_settings.do_sample):
            raise UserError(
                f"{file}: {key} {_shorten(value)} selects {method}, which is not supported; use --greedy, or "
                "--temperature 0.7"
            )


def _check(settings: Mapping[str, Any], file: str | Path, vocabulary_size: int) -> None:
    """Raise UserError for the first setting that has an invalid value."""
    for key, rule in SUPPORTED_SETTINGS.items():
        value = settings.get(key)
        if value is not None and not rule.is_valid(value, vocabulary_size):
            remedy = "correct it, or use --greedy" if key in SAMPLING_SETTINGS else "correct it, or remove it"
            raise UserError(f"{file}: {key} {_shorten(value)}: must be {rule.description}; {remedy}")


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: {reason}; copy it from the original model, or remove it to use the defaults")


def _shorten(value: Any) -> str:
    """Return a value as JSON, cut after 60 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:60] + " …"
