"""Text from a model: prompts become tokens, transformers generates, and the clock runs.

Prefill (the prompt, all tokens at once) and decoding (one token after the other) are timed apart: the first is bound by
arithmetic, the second by reading the weights, which is what quantization makes smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from llmquant.chat import chat_text
from llmquant.errors import UserError, first_words
from llmquant.models.skeleton import context_length
from llmquant.runtime.settings import FILE, joined_settings


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 128
    """Tokens after which a text ends, unless it ends itself."""
    greedy: bool = False
    """Always the most likely token. Otherwise, and where nothing else is said, the checkpoint's own settings hold."""
    temperature: float | None = None
    """Divides the logits before the draw; 0 is greedy."""
    top_p: float | None = None
    """Draw from the most likely tokens that together have this probability."""
    top_k: int | None = None
    """Draw from this many most likely tokens."""
    seed: int = 0
    """Of the draw: the same seed gives the same text."""
    max_seconds: float | None = None
    """Time after which a text is cut off; None for none."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1; use --max-new-tokens 128")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: must not be negative or infinite; use --temperature 0.7")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must lie between 0 and 1; use --top-p 0.9")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k}: must be at least 1; use --top-k 50")
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"seed {self.seed}: must fit into 64 bits; use --seed 0")
        if self.greedy and (self.temperature or self.top_p or self.top_k):
            raise UserError("greedy: draws nothing, so --temperature, --top-p and --top-k do not go with --greedy")

    def settings(self) -> dict[str, Any]:
        """What it says of transformers' generation settings, by their names; do_sample if it says how to draw."""
        asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        draw = {name: value for name, value in asked.items() if value is not None}
        if self.greedy or self.temperature == 0:
            draw = {"do_sample": False}
        elif draw:
            draw["do_sample"] = True
        time = {} if self.max_seconds is None else {"max_time": self.max_seconds}
        return {"max_new_tokens": self.max_new_tokens} | time | draw


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The texts of some prompts, and how long they took."""

    texts: tuple[str, ...]
    """What follows each prompt."""
    num_prompt_tokens: int
    """Of all prompts together, without padding."""
    num_new_tokens: int
    """Of all texts together."""
    prefill_seconds: float
    """Until the first new token of each prompt was there."""
    decode_seconds: float
    """From then on."""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.num_prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """None where no text has a second token."""
        later = self.num_new_tokens - len(self.texts)
        return later / max(self.decode_seconds, 1e-9) if later > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
        return asdict(self) | {name: getattr(self, name) for name in rates}


class _Clock(BaseStreamer):
    """Notes when the first and the last new token came, and hands tokens on to a streamer of text."""

    def __init__(self, texts: TextStreamer | None) -> None:
        self._texts = texts
        self._calls = 0
        self.first = self.last = perf_counter()

    def put(self, value: Tensor) -> None:
        # The first call brings the prompt.
        self._calls += 1
        self.last = perf_counter()
        if self._calls <= 2:
            self.first = self.last
        if self._texts is not None:
            self._texts.put(value)

    def end(self) -> None:
        if self._texts is not None:
            self._texts.end()


class _Texts(TextStreamer):
    """Gives text to a function as soon as it is certain."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    chat: bool = False,
    compiled: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue every prompt; several at once are padded on the left and run as one batch.

    chat: each prompt is what a user says, put into the model's chat template. compiled: decode with a cache of fixed
    size through torch.compile and CUDA graphs; the first text waits for the compiler. on_text: gets the text of a
    single prompt piece by piece while it is made. Raises UserError for a prompt that is empty, too long, or has tokens
    that the model does not know, for settings of the checkpoint that cannot be used, and if the model cannot be
    compiled.
    """
    sampling = sampling or Sampling()
    assert prompts and (on_text is None or len(prompts) == 1)
    vocabulary = vocabulary_of(model)
    rows = [_token_ids(tokenizer, prompt, chat, vocabulary) for prompt in prompts]
    longest = max(map(len, rows))
    check_length(model, longest, sampling.max_new_tokens)
    settings = settings_of(model, sampling)
    if compiled:
        _check_compiles(model)
        # For a static cache on a GPU, transformers compiles the decoding step by itself.
        settings.cache_implementation = "static"
    # Tokenizers may have a padding token that the model does not know.
    known = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token in range(vocabulary)]
    pad = known[0] if known else 0
    settings.pad_token_id = pad
    tokens_SL = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    mask_SL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        texts = _Texts(tokenizer, on_text) if on_text is not None else None
        output_SL, prefill_seconds, decode_seconds = run_timed(model, tokens_SL, mask_SL, settings, texts, tokenizer)
    made = [_until_end(row[longest:].tolist(), set(settings.eos_token_id or ())) for row in output_SL]
    if stops := settings.stop_strings:
        made = [_until_stop(row, [stops] if isinstance(stops, str) else stops, tokenizer) for row in made]
    return Generated(
        texts=tuple(tokenizer.decode(row, skip_special_tokens=True) for row in made),
        num_prompt_tokens=sum(map(len, rows)),
        num_new_tokens=sum(map(len, made)),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
    )


def vocabulary_of(model: Any) -> int:
    """How many tokens the model has an embedding for."""
    return model.get_input_embeddings().weight.shape[0]


def settings_of(model: Any, sampling: Sampling) -> Any:
    """A transformers GenerationConfig: the checkpoint's own settings, with those of `sampling` in their place.

    Raises UserError for settings of the checkpoint that cannot be used.
    """
    file = Path(model.name_or_path or "") / FILE
    return joined_settings(model.generation_config, sampling.settings(), vocabulary_of(model), file)


def run_timed(
    model: Any,
    tokens_SL: Tensor,
    mask_SL: Tensor,
    settings: Any,
    texts: TextStreamer | None = None,
    tokenizer: Any = None,
) -> tuple[Tensor, float, float]:
    """Tokens with what follows them [S, L + new], seconds until the first new token was there, and seconds from then.

    settings: a transformers GenerationConfig. texts: gets the tokens as they come. tokenizer: needed for stop strings.
    """
    clock = _Clock(texts)
    more = {"tokenizer": tokenizer} if settings.stop_strings else {}
    start = perf_counter()
    with torch.inference_mode(), _only_these(model, settings):
        try:
            output_SL = model.generate(
                tokens_SL, attention_mask=mask_SL, generation_config=settings, streamer=clock, **more
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(
                f"{model.name_or_path}: no token can be drawn, because the model's predictions are not finite or its "
                f"{FILE} suppresses all tokens; check the checkpoint, and try --dtype float32"
            ) from error
    return output_SL, clock.first - start, clock.last - clock.first


@contextmanager
def _only_these(model: Any, settings: Any) -> Iterator[None]:
    """Make the settings of a call the model's own for its duration: transformers fills open settings from those."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def _token_ids(tokenizer: Any, prompt: str, chat: bool, vocabulary: int) -> list[int]:
    """The tokens of a prompt; UserError if there are none, or some that the model does not know."""
    text = chat_text(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True) if chat else prompt
    try:
        # A chat template has written the special tokens itself.
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    except (TypeError, UnicodeError) as error:  # half a character, as a shell may pass it on
        raise UserError(f"prompt: the tokenizer cannot read it ({first_words(error)}); give valid UTF-8") from error
    if not ids and chat:
        raise UserError("chat: the model's chat template makes an empty text of the prompt; leave out --chat")
    if not ids:
        raise UserError("prompt: is empty, and the model's tokenizer begins a text with nothing; give some words")
    if unknown := [token for token in ids if token not in range(vocabulary)]:
        raise UserError(
            f"prompt: the tokenizer makes token {unknown[0]} ({tokenizer.decode([unknown[0]])!r}), the model has "
            f"{vocabulary}; the tokenizer's files are those of another model"
        )
    return ids


def _check_compiles(model: Any) -> None:
    if model.device.type != "cuda":
        raise UserError("compile: is for GPUs, the model is on the CPU; leave out --compile")
    if not getattr(model, "_can_compile_fullgraph", False):
        raise UserError(f"compile: transformers cannot compile {type(model).__name__}; leave out --compile")


def check_length(model: Any, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """UserError where prompt and text together are longer than the model's context."""
    context = context_length(model.config)
    if num_prompt_tokens >= context:
        raise UserError(f"prompt: {num_prompt_tokens} tokens, and the model's context is {context}; shorten it")
    if num_prompt_tokens + max_new_tokens > context:
        raise UserError(
            f"max_new_tokens {max_new_tokens}: with {num_prompt_tokens} tokens of prompt more than the model's context "
            f"of {context}; use --max-new-tokens {context - num_prompt_tokens} or less"
        )


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and with the first that ends a text; what follows is padding."""
    stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _until_stop(tokens: list[int], stops: Sequence[str], tokenizer: Any) -> list[int]:
    """The tokens up to and with the one that completes a stop string; others of a batch may have gone on."""
    for count in range(1, len(tokens)):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        if any(stop in text for stop in stops):
            return tokens[:count]
    return tokens
