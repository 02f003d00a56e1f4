"""Generate text: tokenize prompts, let transformers generate, and measure the time.

Prefill (all tokens of the prompt at once) and decoding (one token after the other) are timed separately. Arithmetic
limits the speed of prefill. Reading the weights, which quantization makes smaller, limits the speed of decoding.

Letters: S sequences, L tokens of a prompt with its padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

from llmquant.data.chat import chat_text
from llmquant.errors import UserError, one_line
from llmquant.models.skeleton import context_length
from llmquant.runtime.decoding import GraphDecoding, refuses_graph
from llmquant.runtime.generation_settings import GENERATION_CONFIG_FILE, merge_settings

SWITCHED_OFF = "CUDA graphs are switched off"
"""Reason for decoding without a graph if the caller chose that."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of sampling and of the end of a text. None selects the value in generation_config.json."""

    max_new_tokens: int = 128
    """Maximum number of tokens in a generated text."""
    greedy: bool = False
    """Whether the most likely token is always taken."""
    temperature: float | None = None
    """Divisor of the logits before sampling; 0 means greedy."""
    top_p: float | None = None
    """Sample only from the most likely tokens whose probabilities add up to this value."""
    top_k: int | None = None
    """Sample only from this number of most likely tokens."""
    seed: int = 0
    """Seed of the random generator. The same seed gives the same text."""
    max_seconds: float | None = None
    """Time in seconds after which generation stops. It includes the prefill and the capture of a CUDA graph. None means
    no limit, unless the checkpoint sets one."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1; use --max-new-tokens 128")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: must not be negative or infinite; use --temperature 0.7")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1; use --top-p 0.9")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k}: must be at least 1; use --top-k 50")
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"seed {self.seed}: must fit into 64 bits; use --seed 0")
        if self.greedy and (self.temperature or self.top_p or self.top_k):
            raise UserError("greedy: does not sample; omit --greedy, or omit --temperature, --top-p and --top-k")

    def generation_settings(self) -> dict[str, Any]:
        """Return transformers' generation settings for these parameters.

        The settings contain "do_sample" only if the parameters decide between greedy decoding and sampling.
        """
        parameters = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        sampling: dict[str, Any] = {name: value for name, value in parameters.items() if value is not None}
        if self.greedy or self.temperature == 0:
            sampling = {"do_sample": False}
        elif sampling:
            sampling["do_sample"] = True
        limits = {"max_new_tokens": self.max_new_tokens}
        time_limit = {} if self.max_seconds is None else {"max_time": self.max_seconds}
        return limits | time_limit | sampling


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """The generated texts of a batch of prompts, and the time that they took."""

    texts: tuple[str, ...]
    """The continuation of each prompt."""
    num_prompt_tokens: int
    """Number of tokens of all prompts together, without padding."""
    num_new_tokens: int
    """Number of tokens of all generated texts together."""
    prefill_seconds: float
    """Time until the first new token of every prompt."""
    decode_seconds: float
    """Time from the first new token to the last, without `capture_seconds`."""
    decoding: str = "eager"
    """How the tokens after the first were computed: `cuda graph`, or `eager: ` and the reason."""
    fused: tuple[str, ...] = ()
    """The kernels of `kernels.decode` in the graph, and "-name: reason" for those that are not."""
    capture_seconds: float = 0.0
    """Time for capturing the CUDA graph, which later runs reuse, and for filling its cache."""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.num_prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens per second, without the first of each text; None if no text has a second token."""
        num_decoded = self.num_new_tokens - len(self.texts)
        return num_decoded / max(self.decode_seconds, 1e-9) if num_decoded > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the rates as a dict for JSON."""
        rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
        return asdict(self) | {name: getattr(self, name) for name in rates}


class _TokenTimer(BaseStreamer):
    """Records the times of the first and the last new token, and passes tokens on to a text streamer."""

    def __init__(self, text_streamer: TextStreamer | None) -> None:
        self._text_streamer = text_streamer
        self._num_calls = 0
        self.first = self.last = perf_counter()

    def put(self, value: Tensor) -> None:
        # The first call passes the prompt, and the second call the first new token.
        self._num_calls += 1
        self.last = perf_counter()
        if self._num_calls <= 2:
            self.first = self.last
        if self._text_streamer is not None:
            self._text_streamer.put(value)

    def end(self) -> None:
        if self._text_streamer is not None:
            self._text_streamer.end()


class _CallbackStreamer(TextStreamer):
    """Passes text to a function as soon as further tokens cannot change it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: SamplingParams | None = None,
    *,
    chat: bool = False,
    cuda_graph: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Continue every prompt. Several prompts are padded on the left and run as one batch.

    chat: put each prompt, as a message of the user, into the model's chat template. cuda_graph: decode with a CUDA
    graph if the model is on a GPU and supports it; the result's `decoding` says what was done. on_text: called with
    each piece of the text of a single prompt as it is generated.
    Raises UserError if a prompt is empty, too long, or has tokens outside the model's vocabulary, or if the
    checkpoint's generation settings are invalid.
    """
    sampling = sampling or SamplingParams()
    assert prompts and (on_text is None or len(prompts) == 1)
    vocabulary_size = vocabulary_size_of(model)
    prompt_tokens = [_token_ids(tokenizer, prompt, chat, vocabulary_size) for prompt in prompts]
    longest = max(map(len, prompt_tokens))
    check_length(model, longest, sampling.max_new_tokens)
    settings = settings_of(model, sampling)
    # The padding token of a tokenizer may lie outside the model's vocabulary.
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((token for token in candidates if token in range(vocabulary_size)), 0)
    settings.pad_token_id = pad
    tokens_SL = torch.tensor([[pad] * (longest - len(row)) + row for row in prompt_tokens], device=model.device)
    mask_SL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompt_tokens], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        streamer = _CallbackStreamer(tokenizer, on_text) if on_text is not None else None
        run = run_timed(model, tokens_SL, mask_SL, settings, streamer, tokenizer, cuda_graph=cuda_graph)
    new_tokens = [_until_end(row[longest:].tolist(), set(settings.eos_token_id or ())) for row in run.tokens_SL]
    if stops := settings.stop_strings:
        new_tokens = [_until_stop(row, [stops] if isinstance(stops, str) else stops, tokenizer) for row in new_tokens]
    return GenerationResult(
        texts=tuple(tokenizer.decode(row, skip_special_tokens=True) for row in new_tokens),
        num_prompt_tokens=sum(map(len, prompt_tokens)),
        num_new_tokens=sum(map(len, new_tokens)),
        prefill_seconds=run.prefill_seconds,
        decode_seconds=run.decode_seconds,
        decoding=run.decoding,
        fused=run.fused,
        capture_seconds=run.capture_seconds,
    )


def vocabulary_size_of(model: Any) -> int:
    """Return the number of tokens for which the model has an embedding."""
    return model.get_input_embeddings().weight.shape[0]


def settings_of(model: Any, sampling: SamplingParams) -> Any:
    """Return the checkpoint's settings, overridden by those of `sampling`, as a transformers GenerationConfig.

    Raises UserError if the checkpoint's settings are invalid.
    """
    file = Path(model.name_or_path or "") / GENERATION_CONFIG_FILE
    return merge_settings(model.generation_config, sampling.generation_settings(), vocabulary_size_of(model), file)


class TimedRun(NamedTuple):
    """The tokens of a batch of prompts with their continuations, and the time that they took."""

    tokens_SL: Tensor
    """Prompts and new tokens."""
    prefill_seconds: float
    decode_seconds: float
    """Time from the first new token to the last, without `capture_seconds`."""
    decoding: str
    """`cuda graph`, or `eager: ` and the reason."""
    fused: tuple[str, ...]
    """The kernels of `kernels.decode` in the graph, and "-name: reason" for those that are not."""
    capture_seconds: float
    """Time for capturing a CUDA graph and filling its cache."""


def run_timed(
    model: Any,
    tokens_SL: Tensor,
    mask_SL: Tensor,
    settings: Any,
    text_streamer: TextStreamer | None = None,
    tokenizer: Any = None,
    *,
    cuda_graph: bool = True,
) -> TimedRun:
    """Generate, and measure the time of prefill and decoding.

    tokens_SL: int64 prompts. mask_SL: int64, 0 for padding. settings: a transformers GenerationConfig. text_streamer:
    receives the tokens as they are generated. tokenizer: needed for stop strings. cuda_graph: decode with a CUDA graph
    if the model is on a GPU and supports it.
    Raises UserError if sampling fails because the model's predictions are not finite.
    """
    timer = _TokenTimer(text_streamer)
    refusal = refuses_graph(model, settings) if cuda_graph else SWITCHED_OFF
    graph_decoding = GraphDecoding(timer) if refusal is None else None
    options = _generate_options(settings, tokenizer, graph_decoding)
    start = perf_counter()
    with torch.inference_mode(), _exactly_these_settings(model, options["generation_config"]):
        try:
            output_SL = model.generate(tokens_SL, attention_mask=mask_SL, streamer=timer, **options)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(
                f"{model.name_or_path}: no token can be sampled, because the model's predictions are not finite or its "
                f"{GENERATION_CONFIG_FILE} suppresses all tokens; check the checkpoint, and try --dtype float32"
            ) from error
    prefill_seconds, decode_seconds = timer.first - start, timer.last - timer.first
    if graph_decoding is None:
        return TimedRun(output_SL, prefill_seconds, decode_seconds, f"eager: {refusal}", (), 0.0)
    capture_seconds = graph_decoding.setup_seconds
    decode_seconds = max(decode_seconds - capture_seconds, 0.0)  # without a second token, nothing was decoded
    how = graph_decoding.decoding, graph_decoding.fused
    return TimedRun(output_SL, prefill_seconds, decode_seconds, *how, capture_seconds)


def _generate_options(settings: Any, tokenizer: Any, graph_decoding: GraphDecoding | None) -> dict[str, Any]:
    """Return the arguments of transformers' `generate` for the settings and the decoding method.

    `generate` passes no tokenizer on when it calls another decoding method, so the criterion for stop strings is made
    here.
    """
    if graph_decoding is None:
        return {"generation_config": settings} | ({"tokenizer": tokenizer} if settings.stop_strings else {})
    criteria = StoppingCriteriaList()
    if stops := settings.stop_strings:
        criteria.append(StopStringCriteria(stop_strings=stops, tokenizer=tokenizer))
        settings = copy(settings)
        settings.stop_strings = None
    return {"generation_config": settings, "stopping_criteria": criteria, "custom_generate": graph_decoding}


@contextmanager
def _exactly_these_settings(model: Any, settings: Any) -> Iterator[None]:
    """Replace the model's settings during a call. transformers would use them where the call leaves a setting unset."""
    model_settings, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = model_settings


def _token_ids(tokenizer: Any, prompt: str, chat: bool, vocabulary_size: int) -> list[int]:
    """Return the token ids of a prompt. Raises UserError if there are none, or one lies outside the vocabulary."""
    text = chat_text(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True) if chat else prompt
    try:
        # The chat template has already added the special tokens.
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    except (TypeError, UnicodeError) as error:  # bytes that are not UTF-8 become lone surrogates on the command line
        raise UserError(f"prompt: the tokenizer cannot read it ({one_line(error)}); give valid UTF-8") from error
    if not ids and chat:
        raise UserError("chat: the model's chat template turns the prompt into an empty text; leave out --chat")
    if not ids:
        raise UserError("prompt: is empty, and the model's tokenizer adds no start token; give at least one word")
    if unknown := [token for token in ids if token not in range(vocabulary_size)]:
        raise UserError(
            f"prompt: the tokenizer makes token {unknown[0]} ({tokenizer.decode([unknown[0]])!r}), but the model has "
            f"only {vocabulary_size}; replace the tokenizer's files, which belong to another model"
        )
    return ids


def check_length(model: Any, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise UserError if a prompt and its continuation do not fit into the model's context."""
    context = context_length(model.config)
    if num_prompt_tokens >= context:
        raise UserError(f"prompt: has {num_prompt_tokens} tokens, and the model's context is {context}; shorten it")
    if num_prompt_tokens + max_new_tokens > context:
        raise UserError(
            f"max_new_tokens {max_new_tokens}: together with {num_prompt_tokens} tokens of prompt exceeds the model's "
            f"context of {context}; use --max-new-tokens {context - num_prompt_tokens} or less"
        )


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Return the tokens up to and including the first end token. Padding follows it."""
    stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _until_stop(tokens: list[int], stops: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the tokens up to and including the token that completes a stop string.

    More tokens may follow because the other texts of a batch were not finished.
    """
    for count in range(1, len(tokens)):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        if any(stop in text for stop in stops):
            return tokens[:count]
    return tokens
