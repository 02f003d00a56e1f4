"""Decoding with CUDA graphs: one forward pass of one token per sequence, captured once and replayed for every token.

Eager decoding of one token by a Llama of 32 layers executes about 1300 PyTorch operations that launch kernels (counted
with transformers 5.23; views are not counted). The CPU needs longer to launch the kernels than the GPU needs to run
them. A CUDA graph launches all of them with one call. Its kernels always read and write the same addresses, so
everything that changes from token to token lives in tensors of fixed shape:

```
token_S1, position_S1   the newest token of each sequence, and its position without padding
length                  number of cache places in use: the same for all sequences, because padding is on the left
mask_ST                 0 for padding, 1 elsewhere; the model's causal mask hides the places at and after `length`
key, value [S, G, T, D] of every layer: a cache of T places, of which the first `length` hold the tokens so far
logits_SV               the result, float32
```

T is the sum of prompt and new tokens, rounded up (`cache_places`), so prompts of many lengths share one graph. The
prompt itself runs without a graph. Layers with sliding windows also keep T places; the model's mask hides old ones.

A graph serves one call at a time, because its tensors hold the texts of that call. Captures take place one after the
other in the whole process, because `FusedStep.active` replaces functions of modules during a capture.

Letters: S sequences, T places of the cache, G key and value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from llmquant.errors import one_line
from llmquant.runtime.fused_step import FusedStep

CUDA_GRAPH = "cuda graph"
"""The decoding of a run whose steps were replays of a CUDA graph."""
MAX_GRAPHS = 4
"""Number of graphs that are kept for a model. Each holds a cache and the memory of one step's activations."""
MIN_PLACES = 512
"""Smallest number of places of a cache."""

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None], torch.device], Replay]


class GraphUnavailable(Exception):
    """A decode step cannot be captured. The message says why."""


def cache_places(num_tokens: int) -> int:
    """Return the number of places of the cache for a sequence of this many tokens.

    It is a multiple of 512, and for long sequences at most a quarter more than needed. Attention reads all places.
    """
    step = max(MIN_PLACES, 1 << max(num_tokens.bit_length() - 3, 0))
    return -(-num_tokens // step) * step


def capture_cuda_graph(step: Callable[[], None], device: torch.device) -> Replay:
    """Capture the kernels that `step` launches on a CUDA device, and return a function that launches them again.

    `step` runs three times, or four, before the capture: kernels are compiled, libraries allocate their workspaces, and
    a step that waits for the GPU raises here, because a failure during a capture can leave errors behind. During that
    one run, PyTorch's check holds for all threads: another thread that waits for a GPU in it gets a RuntimeError.
    Raises RuntimeError if the step cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(2):
            step()
        stream.synchronize()
        with _synchronization_raises():
            step()
        stream.synchronize()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


@contextmanager
def _synchronization_raises() -> Iterator[None]:
    """Let operations that wait for the GPU raise RuntimeError."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it does not detect all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class FixedLayer(StaticLayer):
    """The keys and values of one layer, in tensors of fixed size. All layers of a cache share one `length`."""

    def __init__(self, like: Any, num_places: int, length: Tensor, fused: FusedStep) -> None:
        """like: a DynamicLayer that holds at least one token, which gives the shapes. length: int64 [1]."""
        super().__init__(max_cache_len=num_places)
        self._fused = fused
        self.is_sliding = isinstance(like, DynamicSlidingWindowLayer)
        self.length = length
        self.dtype, self.device = like.keys.dtype, like.keys.device
        self.keys = _zeros_like_places(like.keys, num_places)
        self.values = _zeros_like_places(like.values, num_places)
        self.is_initialized = True
        fused.add_cache(self.keys)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the key and the value [S, G, 1, D] of one token, and return those of all places [S, G, T, D]."""
        assert self.keys is not None and self.values is not None
        if not self._fused.store(key_states, value_states, self.keys, self.values, self.length):
            self.keys.index_copy_(2, self.length, key_states)
            self.values.index_copy_(2, self.length, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Return the number of tokens so far, as a tensor without dimensions."""
        return self.length[0]

    def fill(self, like: Any, num_tokens: int) -> None:
        """Copy the keys and values of `num_tokens` tokens from a DynamicLayer, which may hold only the last ones."""
        assert self.keys is not None and self.values is not None
        for fixed, given in ((self.keys, like.keys), (self.values, like.values)):
            fixed.zero_()
            fixed[:, :, num_tokens - given.shape[2] : num_tokens] = given


def _zeros_like_places(states: Tensor, num_places: int) -> Tensor:
    num_sequences, num_heads, _, head_dim = states.shape
    return states.new_zeros((num_sequences, num_heads, num_places, head_dim))


class DecodeGraph:
    """One decode step of a model for a number of sequences and places, and the tensors that it reads and writes."""

    def __init__(self, model: Any, cache: Cache, num_places: int, inputs: dict[str, Any], capture: Capture) -> None:
        """Capture the step.

        cache: a DynamicCache that holds at least one token. inputs: the constant inputs of the model's forward pass,
        in addition to tokens, mask, positions and cache. Raises GraphUnavailable if the step cannot be captured.
        """
        layers = [_checked(layer) for layer in cache.layers]
        num_sequences, device = layers[0].keys.shape[0], layers[0].keys.device
        self._model = ref(model)
        self.num_places = num_places
        self.in_use = False
        """Whether a call of `generate` decodes with this graph."""
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.token_S1 = torch.zeros(num_sequences, 1, dtype=torch.int64, device=device)
        self.position_S1 = torch.zeros_like(self.token_S1)
        has_positions = "position_ids" in signature(model.forward).parameters
        self._inputs = inputs | ({"position_ids": self.position_S1} if has_positions else {})
        self.mask_ST = torch.ones(num_sequences, num_places, dtype=torch.int64, device=device)
        self.logits_SV = torch.zeros(0, device=device)
        self.fused = FusedStep(model, device)
        self.fingerprint = fingerprint(model)
        # Mixtures of experts have another implementation for few tokens, which transformers uses in decoding too.
        prepare = getattr(model, "_optimize_model_for_decode", nullcontext)
        try:
            self._layers = [FixedLayer(layer, num_places, self.length, self.fused) for layer in layers]
            self.cache = Cache(layers=list(self._layers))
            with prepare():
                self.replay = capture(self._step, device)
        except Exception as error:  # too little memory, or any exception of the model's code
            raise GraphUnavailable(describe_failure(error)) from error

    def _step(self) -> None:
        """Compute `logits_SV` for `token_S1`, store the keys and values of the token, and advance by one place."""
        model = self._model()
        assert model is not None
        inputs = model.prepare_inputs_for_generation(
            self.token_S1, past_key_values=self.cache, attention_mask=self.mask_ST, **self._inputs
        )
        with self.fused.active(self.length):
            logits_SV = model(**inputs, return_dict=True).logits[:, -1]
        if self.logits_SV.shape != logits_SV.shape:
            self.logits_SV = torch.empty_like(logits_SV, dtype=torch.float32)
        self.logits_SV.copy_(logits_SV)
        self.length += 1
        self.position_S1 += 1

    def start(self, cache: Cache, mask_SL: Tensor, position_S1: Tensor) -> None:
        """Continue a prompt of L tokens: copy its keys, values and mask. position_S1: positions of the next tokens."""
        num_tokens = mask_SL.shape[1]
        for fixed, layer in zip(self._layers, cache.layers, strict=True):
            fixed.fill(_checked(layer), num_tokens)
        self.mask_ST.fill_(1)
        self.mask_ST[:, :num_tokens] = mask_SL
        self.length.fill_(num_tokens)
        self.position_S1.copy_(position_S1)

    def step(self, token_S: Tensor) -> Tensor:
        """Return the logits [S, V] after one more token of each sequence. The next step overwrites them."""
        self.token_S1.copy_(token_S[:, None])
        self.replay()
        return self.logits_SV


def describe_failure(error: BaseException) -> str:
    """Return why a graph failed. An error inside a capture makes the end of the capture fail too, which hides it."""
    if isinstance(error, GraphUnavailable):
        return str(error)
    reason = f"{type(error).__name__}: {one_line(error)}"
    first = error.__context__
    return reason if first is None else f"{reason} (after {type(first).__name__}: {one_line(first)})"


def _checked(layer: Any) -> Any:
    """Return a layer of a prompt's cache. Raises GraphUnavailable if a graph cannot continue it."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
        raise GraphUnavailable(f"the model's cache has a layer of type {type(layer).__name__}")
    return layer


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Return what a graph has captured of a model. A graph is used only while this does not change.

    It consists of the addresses of all tensors, the attention implementation, the number of layers, and the adapters.
    """
    config = model.config.get_text_config(decoder=True)
    adapters = tuple(
        (*names, bool(module.disable_adapters), bool(module.merged), str(module.scaling))
        if all(hasattr(module, name) for name in ("disable_adapters", "merged", "scaling"))
        else tuple(names)
        for module in model.modules()
        if isinstance(names := getattr(module, "active_adapters", None), list)
    )
    addresses = tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
    return config._attn_implementation, getattr(config, "num_hidden_layers", None), adapters, addresses


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one that led to it, says that the GPU has too little memory."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


class ModelGraphs:
    """The graphs of one model, by number of sequences and of places, and the reasons for which others failed."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[int, int], DecodeGraph] = {}
        self.failures: dict[tuple[int, int], tuple[tuple[Any, ...], str]] = {}
        """`fingerprint` of the model whose step could not be captured, and the reason."""
        self.num_captures = 0
        """Number of graphs captured so far."""

    def graph_for(
        self, model: Any, cache: Cache, num_tokens: int, inputs: dict[str, Any], capture: Capture
    ) -> DecodeGraph:
        """Return a graph for sequences of `num_tokens` tokens. A new one is captured if there is none.

        The graph's `in_use` is set. The caller clears it when the texts are complete.
        Raises GraphUnavailable if the step cannot be captured, now or before, or if another call uses the graph.
        """
        if not cache.layers:
            raise GraphUnavailable("the model's cache has no layers")
        key = (_checked(cache.layers[0]).keys.shape[0], cache_places(num_tokens))
        with _LOCK:
            now = fingerprint(model)
            if key in self.failures and self.failures[key][0] == now:
                raise GraphUnavailable(self.failures[key][1])
            graph = self.graphs.get(key)
            if graph is not None and graph.fingerprint == now and graph.in_use:
                raise GraphUnavailable("its graph is in use")
            self.graphs.pop(key, None)
            if graph is None or graph.fingerprint != now:
                del graph
                graph = self._capture(key, (model, cache, key[1], inputs, capture), now)
            self.graphs[key] = graph  # the newest last
            graph.in_use = True
            return graph

    def _capture(
        self, key: tuple[int, int], arguments: tuple[Any, Cache, int, dict[str, Any], Capture], now: tuple[Any, ...]
    ) -> DecodeGraph:
        """Capture a graph, and remember the reason if that fails for another reason than too little memory."""
        while len(self.graphs) >= MAX_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        if arguments[0].device.type == "cuda":
            gc.collect()  # the memory of graphs that are no longer used: each refers to itself
        try:
            graph = DecodeGraph(*arguments)
        except GraphUnavailable as error:
            if not _ran_out_of_memory(error):
                self.failures[key] = (now, str(error))
            raise
        self.failures.pop(key, None)
        self.num_captures += 1
        return graph


_GRAPHS: WeakKeyDictionary[Any, ModelGraphs] = WeakKeyDictionary()
_LOCK = threading.RLock()
"""Is held while a graph is looked up or captured."""


def graphs_of(model: Any) -> ModelGraphs:
    """Return the graphs of a model. They live as long as the model, or until `release_graphs`."""
    with _LOCK:
        return _GRAPHS.setdefault(model, ModelGraphs())


def has_graphs(model: Any) -> bool:
    """Return whether graphs of a model take memory."""
    with _LOCK:
        return model in _GRAPHS and bool(_GRAPHS[model].graphs)


def release_graphs(model: Any) -> None:
    """Free the memory of a model's graphs and their caches, and forget failures.

    The memory of a graph that another call uses is freed at the end of that call.
    """
    with _LOCK:
        _GRAPHS.pop(model, None)
