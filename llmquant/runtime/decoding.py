"""The decoding loop that replays a CUDA graph, as a decoding method for transformers' `generate`.

transformers prepares the settings, the logits processors and the stopping criteria, and `GraphDecoding` calls them as
transformers' own loop does, so the texts are the same. Two things differ. The forward pass of one token is a replayed
graph, and the CPU reads a token only after it has launched the next forward pass, so that the GPU never waits:

```
GPU   | pass k          | choose k | pass k+1        | choose k+1 | ...
CPU   launch pass k, read token k-1, launch choose k, launch pass k+1, read token k, ...
```

When the token that is read ends the texts, the pass after it was computed for nothing.

Letters: S sequences, L tokens so far with padding, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from time import perf_counter
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import GenerationMixin
from transformers.generation.streamers import BaseStreamer

from llmquant.runtime.decode_graph import (
    CUDA_GRAPH,
    Capture,
    DecodeGraph,
    GraphUnavailable,
    capture_cuda_graph,
    describe_failure,
    graphs_of,
    has_graphs,
    release_graphs,
)

CAPTURES: dict[str, Capture] = {"cuda": capture_cuda_graph}
"""The function that captures a decode step, by type of device."""
OLDEST_TRANSFORMERS = (5, 17)
"""Older releases of transformers pass positions to caches and masks in other ways."""
ATTENTIONS = ("sdpa", "eager")
"""Attention implementations that read a cache of fixed size with a mask."""
NOT_ON_GPU = "the model is on the device"
"""Beginning of the reason for decoding without a graph on devices that have none."""
NO_SECOND_TOKEN = "eager: no text has a second token"
"""The decoding of a run that ended with the first token."""
HARMLESS_HOOKS = "transformers.utils.output_capturing"
"""Module of hooks that do nothing unless a call asks for the outputs of inner layers."""
KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
"""Inputs of a forward pass that a graph supports. Others could change from token to token."""


def refuses_graph(model: Any, settings: Any) -> str | None:
    """Return why a model does not decode with a graph under these generation settings, or None if it may.

    Capturing the graph can still fail. settings: a transformers GenerationConfig.
    """
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    unusual = {
        "use_cache": settings.use_cache is False,
        "cache_implementation": settings.cache_implementation is not None,
        "prefill_chunk_size": settings.prefill_chunk_size is not None,
        "return_dict_in_generate": bool(settings.return_dict_in_generate),
        "num_return_sequences": (settings.num_return_sequences or 1) > 1,
        "token_healing": bool(settings.token_healing),
    }
    if model.device.type not in CAPTURES:
        return f"{NOT_ON_GPU} {model.device.type}"
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
        return f"transformers {transformers.__version__} is older than {'.'.join(map(str, OLDEST_TRANSFORMERS))}"
    if not getattr(model, "_can_compile_fullgraph", False) or model.config.is_encoder_decoder:
        return f"the forward pass of {type(model).__name__} depends on data that is not in tensors"
    if _has_own_loop(model):
        return f"{type(model).__name__} has a method of its own for generating"
    if any(map(_has_hooks, model.modules())):
        hooked = next(name for name, module in model.named_modules() if _has_hooks(module))
        return f"the module '{hooked or type(model).__name__}' has hooks, which a replay does not call"
    if len(devices) > 1:
        return f"the model is spread over {len(devices)} devices"
    if implementation not in ATTENTIONS:
        return f"the attention implementation is {implementation}"
    if (mode := settings.get_generation_mode().value) not in ("greedy_search", "sample"):
        return f"the generation settings select {mode}"
    return next((f"the generation settings set {name}" for name, is_set in unusual.items() if is_set), None)


def _has_own_loop(model: Any) -> bool:
    """Return whether a model replaces transformers' `generate` or its decoding loop."""
    return any(
        name in vars(model) or getattr(type(model), name, None) is not getattr(GenerationMixin, name)
        for name in ("generate", "_sample")
    )


def _has_hooks(module: nn.Module) -> bool:
    """Return whether hooks run in the forward pass of a module: PyTorch's, or those of Accelerate."""
    registries = (
        module._forward_hooks,
        module._forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
    )
    hooks = [hook for registry in registries for hook in registry.values()]
    return hasattr(module, "_hf_hook") or any(getattr(hook, "__module__", "") != HARMLESS_HOOKS for hook in hooks)


class _Steps(Protocol):
    """The forward passes after the prompt's."""

    def step(self, token_S: Tensor) -> Tensor:
        """Return the logits [S, V], float32, after one more token of each sequence."""


class _EagerSteps:
    """Forward passes without a graph, in the cache that holds the prompt, for a model whose step cannot be captured."""

    def __init__(self, model: Any, tokens_SL: Tensor, model_inputs: dict[str, Any]) -> None:
        self._model = model
        self._tokens_SL = tokens_SL
        self._inputs = model_inputs

    def step(self, token_S: Tensor) -> Tensor:
        self._tokens_SL = torch.cat([self._tokens_SL, token_S[:, None]], dim=1)
        inputs = self._model.prepare_inputs_for_generation(self._tokens_SL, next_sequence_length=1, **self._inputs)
        outputs = self._model(**inputs, return_dict=True)
        self._inputs = self._model._update_model_kwargs_for_generation(outputs, self._inputs)
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32)


class GraphDecoding:
    """A decoding method for `generate(custom_generate=...)`: greedy search or sampling. One object serves one call."""

    def __init__(self, streamer: BaseStreamer | None = None) -> None:
        """streamer: receives each new token; transformers passes the prompt to it."""
        self._streamer = streamer
        self.decoding = NO_SECOND_TOKEN
        """How the tokens after the first were decoded: `CUDA_GRAPH`, or "eager: " and the reason."""
        self.fused: tuple[str, ...] = ()
        """The kernels of `kernels.decode` in the graph, and "-name: reason" for those that are not."""
        self.setup_seconds = 0.0
        """Time between the first token and the second in which the graph was captured and its cache filled."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Return the prompts and their continuations, int64 [S, L]. transformers chooses the names of the arguments.

        Raises RuntimeError if the predictions for a token that is sampled are not finite.
        """
        tokens_SL = input_ids
        logits_SV, model_kwargs = _prefill_or_make_room(model, tokens_SL, model_kwargs)
        chooser = _Chooser(logits_processor, stopping_criteria, generation_config, tokens_SL)
        token_S = chooser.choose(logits_SV)
        must_stop = self._read(chooser)
        if not must_stop:
            optimize = getattr(model, "_optimize_model_for_decode", nullcontext)
            steps = self._prepare_steps(model, tokens_SL, model_kwargs, stopping_criteria.max_length)
            try:
                with optimize() if isinstance(steps, _EagerSteps) else nullcontext():
                    self._decode(steps, token_S, chooser)
            finally:
                if isinstance(steps, DecodeGraph):
                    steps.in_use = False
        if self._streamer is not None:
            self._streamer.end()
        return chooser.tokens_SL

    def _decode(self, steps: _Steps, token_S: Tensor, chooser: _Chooser) -> None:
        """Generate the tokens after the first."""
        while True:
            is_last = chooser.is_full  # the newest token needs no forward pass
            logits_SV = None if is_last else steps.step(token_S)
            if chooser.has_unread and self._read(chooser):
                return
            if logits_SV is None:
                return
            token_S = chooser.choose(logits_SV)

    def _read(self, chooser: _Chooser) -> bool:
        """Wait for the newest token, pass it to the streamer, and return whether the texts have ended."""
        token_S, must_stop = chooser.read()
        if self._streamer is not None:
            self._streamer.put(token_S)
        return must_stop

    def _prepare_steps(
        self, model: Any, tokens_SL: Tensor, model_inputs: dict[str, Any], max_length: int
    ) -> DecodeGraph | _EagerSteps:
        start = perf_counter()
        try:
            graph = _start_graph(model, tokens_SL, model_inputs, max_length)
            self.decoding, self.fused = CUDA_GRAPH, graph.fused.describe()
            return graph
        except Exception as error:  # also those of unknown caches and tensors: the model may run without a graph
            self.decoding = f"eager: {describe_failure(error)}"
            return _EagerSteps(model, tokens_SL, model_inputs)
        finally:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            self.setup_seconds = perf_counter() - start


def _prefill(model: Any, tokens_SL: Tensor, model_inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Run the prompts, and return (logits [S, V] in float32, inputs with the prompts' cache for the next token)."""
    inputs = model.prepare_inputs_for_generation(tokens_SL, is_first_iteration=True, **model_inputs)
    outputs = model(**inputs, return_dict=True)
    logits_SV = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    return logits_SV, model._update_model_kwargs_for_generation(outputs, model_inputs)


def _prefill_or_make_room(model: Any, tokens_SL: Tensor, model_inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Do what `_prefill` does. If the GPU has too little memory, free the model's graphs and try once more.

    Raises torch.OutOfMemoryError if there are no graphs, or if the memory does not suffice without them either.
    """
    cache = model_inputs.get("past_key_values")
    if not has_graphs(model) or cache is None or cache.get_seq_length() > 0:
        return _prefill(model, tokens_SL, model_inputs)
    empty_cache = deepcopy(cache)
    try:
        return _prefill(model, tokens_SL, model_inputs)
    except torch.OutOfMemoryError:
        cache.layers.clear()
    # Here the exception, which refers to the tensors of the failed pass, no longer exists.
    release_graphs(model)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return _prefill(model, tokens_SL, model_inputs | {"past_key_values": empty_cache})


def _start_graph(model: Any, tokens_SL: Tensor, model_inputs: dict[str, Any], max_length: int) -> DecodeGraph:
    """Return a graph that continues the prompts, and empty the cache of the prompts.

    Raises GraphUnavailable if the step cannot be captured.
    """
    cache, mask_SL = model_inputs.get("past_key_values"), model_inputs.get("attention_mask")
    positions_SL = model_inputs.get("position_ids")
    if unknown := [name for name, value in model_inputs.items() if name not in KNOWN_INPUTS and value is not None]:
        raise GraphUnavailable(f"the model has the input {unknown[0]}")
    if cache is None or (positions_SL is not None and positions_SL.ndim != 2):
        raise GraphUnavailable("the model has no cache, or positions with several dimensions")
    inputs: dict[str, Any] = {
        name: model_inputs[name] for name in ("use_cache", "logits_to_keep") if name in model_inputs
    }
    graph = graphs_of(model).graph_for(model, cache, max_length, inputs, CAPTURES[model.device.type])
    # The mask and the positions already cover the first new token. transformers omits them if nothing is padded.
    num_tokens = tokens_SL.shape[1]
    mask_SL = torch.ones_like(tokens_SL) if mask_SL is None else mask_SL[:, :num_tokens]
    position_S1 = torch.full_like(tokens_SL[:, :1], num_tokens) if positions_SL is None else positions_SL[:, -1:]
    try:
        graph.start(cache, mask_SL, position_S1)
    except BaseException:
        graph.in_use = False
        raise
    # The graph has its own copy of the keys and values. transformers refers to the cache until `generate` returns, so
    # only removing its layers frees their memory.
    cache.layers.clear()
    return graph


class _Chooser:
    """Chooses tokens from logits as transformers does, and keeps all tokens. Only `read` waits for the GPU."""

    def __init__(self, process: Callable, criteria: Any, settings: Any, tokens_SL: Tensor) -> None:
        self._process, self._criteria = process, criteria
        self._samples = bool(settings.do_sample)
        # transformers pads with the first end token if the settings have no padding token.
        pad = getattr(settings, "_pad_token_tensor", None)
        self._pad = 0 if pad is None else pad.to(tokens_SL.device)
        self._has_ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._unfinished_S = torch.ones_like(tokens_SL[:, 0])
        on_gpu = tokens_SL.device.type == "cuda"
        self._state_3S = torch.empty(3, tokens_SL.shape[0], dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self.tokens_SL = tokens_SL
        self.has_unread = False

    @property
    def is_full(self) -> bool:
        """Whether the texts have their largest length."""
        return self._criteria.max_length is not None and self.tokens_SL.shape[1] >= self._criteria.max_length

    def choose(self, logits_SV: Tensor) -> Tensor:
        """Append and return the next token [S] of each sequence. Finished sequences get the padding token."""
        scores_SV = self._process(self.tokens_SL, logits_SV)
        if self._samples:
            token_S, is_invalid_S = sample(scores_SV)
        else:
            token_S, is_invalid_S = scores_SV.argmax(dim=-1), torch.zeros_like(self._unfinished_S)
        if self._has_ends:
            token_S = token_S * self._unfinished_S + self._pad * (1 - self._unfinished_S)
        self.tokens_SL = torch.cat([self.tokens_SL, token_S[:, None]], dim=1)
        self._unfinished_S = self._unfinished_S & ~self._criteria(self.tokens_SL, None)
        state_3S = torch.stack([token_S, self._unfinished_S, is_invalid_S])
        self._state_3S.copy_(state_3S, non_blocking=True)
        if self._copied is not None:
            # Without a stream, `record` takes that of the current device, which may not be the model's.
            self._copied.record(torch.cuda.current_stream(self.tokens_SL.device))
        self.has_unread = True
        return token_S

    def read(self) -> tuple[Tensor, bool]:
        """Wait for the newest token, and return (token [S] on the CPU, whether all texts have ended).

        Raises RuntimeError if the token was sampled from predictions that are not finite.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self.has_unread = False
        token_S, unfinished_S, is_invalid_S = self._state_3S.clone()
        if bool(is_invalid_S.any()):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")  # as torch.multinomial
        return token_S, not bool(unfinished_S.any())


def sample(scores_SV: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a token [S] sampled by softmax(scores), 1 where a row is not a distribution, both int64).

    The tokens are those of `torch.multinomial`, which makes the CPU wait for its check of the probabilities.
    """
    probabilities_SV = nn.functional.softmax(scores_SV, dim=-1)
    noise_SV = torch.empty_like(probabilities_SV).exponential_(1)
    is_invalid_S = probabilities_SV.isnan().any(dim=-1).long()
    return (probabilities_SV / noise_SV).argmax(dim=-1), is_invalid_S
