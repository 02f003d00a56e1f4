"""Decoding with a captured step: the same texts as transformers' own loop, and one capture for many prompts.

There is no CUDA graph on a CPU. A stand-in for the capture keeps the step itself, and its replay calls the step again.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from decoding_cases import assert_same_tokens, call_again, run
from tiny_models import ARCHITECTURES, random_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import llmquant
from llmquant.errors import UserError
from llmquant.pipeline import sample_texts
from llmquant.runtime import decode_graph, decoding
from llmquant.runtime.decode_graph import MAX_GRAPHS, DecodeGraph, cache_places, graphs_of, release_graphs
from llmquant.runtime.decoding import refuses_graph, sample
from llmquant.runtime.generate import GenerationResult, SamplingParams, TimedRun, generate, settings_of

GRAPH_FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "falcon", "cohere2")


@pytest.fixture(autouse=True)
def captured_on_cpu(monkeypatch):
    monkeypatch.setitem(decoding.CAPTURES, "cpu", call_again)


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_model(ARCHITECTURES["llama"]())


@pytest.fixture
def fresh_llama(llama):
    """The model without graphs of other tests."""
    release_graphs(llama)
    return llama


@pytest.mark.parametrize("family", GRAPH_FAMILIES)
def test_replayed_steps_give_the_tokens_of_transformers(family):
    """Also past the sliding window of 64 tokens that three of the families have."""
    model = random_model(ARCHITECTURES[family]())
    # The random models repeat themselves under greedy decoding, which would hide wrong positions.
    different: dict[str, Any] = {"eos_token_id": None, "repetition_penalty": 1.3}
    for lengths in ((9,), (70,), (50, 60)):
        assert_same_tokens(model, lengths, 15, **different)
    assert graphs_of(model).num_captures == 2


def test_prompts_of_many_lengths_share_one_graph(fresh_llama):
    for length in (1, 2, 50, 120, 7):
        assert_same_tokens(fresh_llama, (length,))
    assert graphs_of(fresh_llama).num_captures == 1


def test_sampling_with_a_seed_gives_the_tokens_of_transformers(fresh_llama):
    changes: dict[str, Any] = {"do_sample": True, "temperature": 1.1, "top_k": 40, "top_p": 0.9}
    first = assert_same_tokens(fresh_llama, (8, 5), 30, **changes)
    again = run(fresh_llama, (8, 5), 30, **changes)
    assert torch.equal(first.tokens_SL, again.tokens_SL)
    assert not torch.equal(first.tokens_SL, run(fresh_llama, (8, 5), 30).tokens_SL)


def test_sample_draws_the_tokens_of_multinomial():
    scores_SV = torch.randn(5, 300)
    scores_SV[:, 7] = float("-inf")
    torch.manual_seed(1)
    expected_S = torch.multinomial(scores_SV.softmax(dim=-1), 1)[:, 0]
    torch.manual_seed(1)
    token_S, is_invalid_S = sample(scores_SV)
    assert torch.equal(token_S, expected_S) and not is_invalid_S.any()
    scores_SV[2] = float("-inf")
    assert sample(scores_SV)[1].tolist() == [0, 0, 1, 0, 0]


def test_predictions_that_are_not_finite_are_a_user_error(fresh_llama, monkeypatch):
    original = fresh_llama.forward

    def broken_after_the_prompt(*args: Any, **options: Any) -> Any:
        outputs = original(*args, **options)
        if options["input_ids"].shape[1] == 1:
            outputs.logits.fill_(float("nan"))
        return outputs

    broken_after_the_prompt.__signature__ = signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(fresh_llama, "forward", broken_after_the_prompt)
    with pytest.raises(UserError, match="predictions are not finite"):
        run(fresh_llama, do_sample=True)


def test_texts_end_as_in_transformers(fresh_llama):
    tokens = run(fresh_llama, (9, 4), 30, eos_token_id=None, repetition_penalty=1.3).tokens_SL
    # The texts end at different tokens; the shorter is padded.
    ends = [tokens[0, 12].item(), tokens[1, 20].item()]
    stopped = assert_same_tokens(fresh_llama, (9, 4), 30, eos_token_id=ends, repetition_penalty=1.3)
    assert stopped.tokens_SL.shape[1] < tokens.shape[1]
    later = assert_same_tokens(fresh_llama, (9, 4), 30, eos_token_id=ends, repetition_penalty=1.3, min_new_tokens=25)
    assert later.tokens_SL.shape[1] >= 9 + 25
    unpadded = assert_same_tokens(fresh_llama, (9, 4), 30, eos_token_id=ends, repetition_penalty=1.3, pad_token_id=None)
    assert unpadded.tokens_SL[0, -1] == ends[0] and unpadded.tokens_SL.shape == stopped.tokens_SL.shape


def test_one_token_is_not_decoded_by_a_graph(fresh_llama):
    result = run(fresh_llama, (9,), 1)
    assert result.tokens_SL.shape[1] == 10 and result.decoding == "eager: no text has a second token"
    assert graphs_of(fresh_llama).num_captures == 0


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return llmquant.load(tiny_model("llama"), device="cpu")


@pytest.mark.parametrize("sampling", [SamplingParams(max_new_tokens=20, greedy=True), SamplingParams(temperature=1.0)])
def test_streams_and_stop_strings_work_with_a_graph(sampling, loaded, monkeypatch):
    monkeypatch.setattr(loaded, "generation_config", GenerationConfig(repetition_penalty=1.2))
    results, pieces = {}, {}
    for cuda_graph in (True, False):
        streamed: list[str] = []
        arguments = (loaded, tiny_tokenizer(), ["x = 1"], sampling)
        results[cuda_graph] = generate(*arguments, cuda_graph=cuda_graph, on_text=streamed.append)
        pieces[cuda_graph] = streamed
    assert results[True].texts == results[False].texts and pieces[True] == pieces[False]
    assert results[True].num_new_tokens == results[False].num_new_tokens > 10
    assert "".join(pieces[True]) == results[True].texts[0]
    stop = results[True].texts[0][4:7]
    monkeypatch.setattr(loaded, "generation_config", GenerationConfig(repetition_penalty=1.2, stop_strings=[stop]))
    texts = [generate(*arguments, cuda_graph=cuda_graph).texts[0] for cuda_graph in (True, False)]
    assert texts[0] == texts[1] and stop in texts[0] and len(texts[0]) < len(results[True].texts[0])


def test_a_quantized_model_decodes_with_a_graph(tiny_model, tmp_path):
    recipe = llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=32))
    llmquant.quantize(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "small", recipe)
    model = llmquant.load(tmp_path / "small", device="cpu", backend="torch")
    model.set_attn_implementation("sdpa")  # instead of the attention function for CPUs
    assert_same_tokens(model, (9,), 30)


class OutsideTensors(TorchDispatchMode):
    """Records the memory that operations read or write although no operation under this mode allocated it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()
        self._inside: set[int] = set()
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [tensor for tensor in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(tensor)]
        outputs = func(*args, **(kwargs or {}))
        self.addresses |= {tensor.untyped_storage().data_ptr() for tensor in inputs} - self._inside
        results = [tensor for tensor in torch.utils._pytree.tree_leaves(outputs) if torch.is_tensor(tensor)]
        self._kept += results  # so that no memory is freed and allocated again
        self._inside |= {tensor.untyped_storage().data_ptr() for tensor in results} - self.addresses
        return outputs


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_every_step_uses_the_same_memory(family, monkeypatch):
    """A CUDA graph reads and writes the addresses of the capture, also after Python assigns other tensors."""
    steps: list[set[int]] = []

    def watch(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        step()

        def replay() -> None:
            with OutsideTensors() as outside:
                step()
            steps.append(outside.addresses)

        return replay

    monkeypatch.setitem(decoding.CAPTURES, "cpu", watch)
    model = random_model(ARCHITECTURES[family]())
    run(model, (9, 6), 5, eos_token_id=None)
    run(model, (20, 30), 5, eos_token_id=None)
    assert len(steps) == 8 and all(step == steps[0] for step in steps)


def test_a_step_that_cannot_be_captured_decodes_without_a_graph(fresh_llama, monkeypatch):
    calls: list[torch.device] = []

    def refuse(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        step()
        calls.append(device)
        raise RuntimeError("operation not permitted when\nstream is capturing")

    expected = run(fresh_llama, (9, 4), 30, cuda_graph=False)
    monkeypatch.setitem(decoding.CAPTURES, "cpu", refuse)
    for _ in range(2):
        result = run(fresh_llama, (9, 4), 30)
        assert result.decoding == "eager: RuntimeError: operation not permitted when stream is capturing"
        assert torch.equal(result.tokens_SL, expected.tokens_SL)
    assert len(calls) == 1 and graphs_of(fresh_llama).num_captures == 0
    release_graphs(fresh_llama)
    monkeypatch.setitem(decoding.CAPTURES, "cpu", call_again)
    assert run(fresh_llama, (9, 4), 30).decoding == "cuda graph"


def test_reasons_for_decoding_without_a_graph(llama, monkeypatch):
    settings = settings_of(llama, SamplingParams())
    assert refuses_graph(llama, settings) is None
    settings.prefill_chunk_size = 4
    assert refuses_graph(llama, settings) == "the generation settings set prefill_chunk_size"
    settings.num_beams = 2
    assert refuses_graph(llama, settings) == "the generation settings select beam_search"
    monkeypatch.setattr(llama.config, "_attn_implementation_internal", "flash_attention_2")
    assert refuses_graph(llama, settings) == "the attention implementation is flash_attention_2"
    monkeypatch.setattr(type(llama), "_can_compile_fullgraph", False)
    assert "LlamaForCausalLM depends on data" in str(refuses_graph(llama, settings))
    monkeypatch.setattr(decoding.transformers, "__version__", "5.9.1")
    assert refuses_graph(llama, settings) == "transformers 5.9.1 is older than 5.17"
    monkeypatch.delitem(decoding.CAPTURES, "cpu")
    assert refuses_graph(llama, settings) == "the model is on the device cpu"


@pytest.mark.parametrize(
    ("name", "value"), [("num_return_sequences", 2), ("return_dict_in_generate", True), ("use_cache", False)]
)
def test_settings_that_need_transformers_loop(name, value, llama):
    settings = settings_of(llama, SamplingParams(temperature=1.0))
    setattr(settings, name, value)
    assert refuses_graph(llama, settings) == f"the generation settings set {name}"


def test_models_whose_python_code_runs_for_every_token_decode_without_a_graph(llama, monkeypatch):
    settings = settings_of(llama, SamplingParams())
    for register in (llama.lm_head.register_forward_hook, llama.lm_head.register_forward_pre_hook):
        with register(lambda *arguments: None):
            assert refuses_graph(llama, settings) == "the module 'lm_head' has hooks, which a replay does not call"
    with torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None):
        assert "has hooks" in str(refuses_graph(llama, settings))
    with torch.no_grad():
        llama(torch.tensor([[3]]), output_hidden_states=True)  # leaves hooks of transformers behind
    assert refuses_graph(llama, settings) is None
    for name in ("generate", "_sample"):
        with monkeypatch.context() as patch:
            patch.setattr(llama, name, getattr(llama, name), raising=False)
            assert refuses_graph(llama, settings) == "LlamaForCausalLM has a method of its own for generating"
        own = type("Own", (type(llama),), {name: lambda self: None})
        with monkeypatch.context() as patch:
            patch.setattr(llama, "__class__", own)
            assert refuses_graph(llama, settings) == "Own has a method of its own for generating"
    monkeypatch.setattr(llama, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    assert refuses_graph(llama, settings) == "the model is spread over 2 devices"


def test_a_cache_without_a_fixed_size_decodes_without_a_graph(tiny_model):
    """Mamba's cache holds states instead of keys and values."""
    pytest.importorskip("transformers.models.mamba")
    from transformers import AutoConfig

    fields = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    model = random_model(AutoConfig.for_model("mamba", **fields))
    result = run(model, (9,), 5, eos_token_id=None)
    assert result.decoding.startswith("eager: ")
    assert torch.equal(result.tokens_SL, run(model, (9,), 5, eos_token_id=None, cuda_graph=False).tokens_SL)


def test_a_graph_of_replaced_weights_is_not_used(fresh_llama):
    before = run(fresh_llama).tokens_SL
    head = fresh_llama.lm_head.weight
    try:
        fresh_llama.lm_head.weight = torch.nn.Parameter(-head.detach())
        assert not torch.equal(assert_same_tokens(fresh_llama).tokens_SL, before)
    finally:
        fresh_llama.lm_head.weight = head
    assert graphs_of(fresh_llama).num_captures == 2


def test_a_changed_model_is_captured_anew(fresh_llama, monkeypatch):
    assert_same_tokens(fresh_llama)
    monkeypatch.setattr(fresh_llama.config, "num_hidden_layers", 1)
    assert_same_tokens(fresh_llama)
    monkeypatch.setattr(fresh_llama.config, "_attn_implementation_internal", "eager")
    assert_same_tokens(fresh_llama)
    assert_same_tokens(fresh_llama)
    monkeypatch.setattr(fresh_llama.lm_head, "active_adapters", ["one"], raising=False)
    assert_same_tokens(fresh_llama)
    assert graphs_of(fresh_llama).num_captures == 4


def test_failures_are_kept_until_the_model_changes_unless_memory_was_missing(fresh_llama, monkeypatch):
    errors = [torch.OutOfMemoryError("CUDA out of memory"), ValueError("a step that cannot be captured")]

    def refuse(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        raise errors[0]

    monkeypatch.setitem(decoding.CAPTURES, "cpu", refuse)
    assert run(fresh_llama).decoding == "eager: OutOfMemoryError: CUDA out of memory"
    assert not graphs_of(fresh_llama).failures
    del errors[0]
    assert run(fresh_llama).decoding == "eager: ValueError: a step that cannot be captured"
    monkeypatch.setitem(decoding.CAPTURES, "cpu", call_again)
    assert run(fresh_llama).decoding == "eager: ValueError: a step that cannot be captured"
    monkeypatch.setattr(fresh_llama.config, "_attn_implementation_internal", "eager")
    assert_same_tokens(fresh_llama)


def test_a_prompt_without_memory_runs_again_without_the_graphs(fresh_llama, monkeypatch):
    expected = run(fresh_llama, (7,), cuda_graph=False).tokens_SL
    original, failures = fresh_llama.forward, []

    def short_of_memory(*args: Any, **options: Any) -> Any:
        outputs = original(*args, **options)  # the cache holds keys and values when the error is raised
        if options["input_ids"].shape[1] == 7 and len(failures) < most:
            failures.append(len(graphs_of(fresh_llama).graphs))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outputs

    short_of_memory.__signature__ = signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(fresh_llama, "forward", short_of_memory)
    most = 1
    with pytest.raises(torch.OutOfMemoryError):
        run(fresh_llama, (7,))  # there are no graphs to free
    most = 2
    run(fresh_llama, (9,))
    result = run(fresh_llama, (7,))
    assert failures == [0, 1] and torch.equal(result.tokens_SL, expected)
    most = 4
    with pytest.raises(torch.OutOfMemoryError):
        run(fresh_llama, (7,))
    assert failures == [0, 1, 1, 0]


def test_the_cache_of_the_prompt_is_freed_before_decoding(fresh_llama, monkeypatch):
    alive: list[bool] = []
    start = DecodeGraph.start

    def watch(graph: DecodeGraph, cache: Any, *arguments: Any) -> None:
        keys = ref(cache.layers[0].keys)
        start(graph, cache, *arguments)
        step = graph.step
        graph.step = lambda token_S: (alive.append(keys() is not None), step(token_S))[1]  # type: ignore[method-assign]

    monkeypatch.setattr(DecodeGraph, "start", watch)
    run(fresh_llama, (9,), 3)
    assert alive == [False, False]


@pytest.mark.parametrize("broken", ["layers", "no layers", "address", "start"])
def test_an_unknown_cache_or_tensor_decodes_without_a_graph(broken, fresh_llama, monkeypatch):
    expected = run(fresh_llama, cuda_graph=False).tokens_SL

    def fail(*arguments: Any) -> None:
        raise NotImplementedError("of another library")

    if broken == "address":
        monkeypatch.setattr(decode_graph, "fingerprint", fail)
    elif broken == "start":
        monkeypatch.setattr(DecodeGraph, "start", fail)
    else:
        graph_for = decode_graph.ModelGraphs.graph_for
        other = SimpleNamespace(**({"layers": []} if broken == "no layers" else {}))
        monkeypatch.setattr(
            decode_graph.ModelGraphs,
            "graph_for",
            lambda graphs, model, cache, *rest: graph_for(graphs, model, other, *rest),
        )
    for _ in range(2):
        result = run(fresh_llama)
        assert result.decoding.startswith("eager: ") and "in use" not in result.decoding
        assert torch.equal(result.tokens_SL, expected)


def test_a_streamer_may_generate_with_the_same_model(fresh_llama):
    inner: list[TimedRun] = []

    class Streamer(BaseStreamer):
        num_calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.num_calls += 1
            if self.num_calls in (4, 7):
                inner.append(run(fresh_llama, (5,)))

        def end(self) -> None: ...

    expected = [run(fresh_llama, lengths, cuda_graph=False).tokens_SL for lengths in ((9,), (5,), (5,))]
    outer = run(fresh_llama, (9,), streamer=Streamer())
    assert outer.decoding == "cuda graph"
    assert [each.decoding for each in inner] == ["eager: its graph is in use"] * 2
    for each, tokens_SL in zip((outer, *inner), expected, strict=True):
        assert torch.equal(each.tokens_SL, tokens_SL)
    assert_same_tokens(fresh_llama, (5,))
    assert graphs_of(fresh_llama).num_captures == 1


def test_a_second_thread_decodes_without_the_graph(fresh_llama):
    started, may_go_on = threading.Event(), threading.Event()

    class Streamer(BaseStreamer):
        num_calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.num_calls += 1
            if self.num_calls == 5:
                started.set()
                assert may_go_on.wait(60)

        def end(self) -> None: ...

    expected = [run(fresh_llama, lengths, cuda_graph=False).tokens_SL for lengths in ((9,), (5,))]
    results: list[TimedRun] = []
    thread = threading.Thread(target=lambda: results.append(run(fresh_llama, (9,), streamer=Streamer())))
    thread.start()
    assert started.wait(60)
    results.append(run(fresh_llama, (5,)))
    may_go_on.set()
    thread.join()
    assert [each.decoding for each in results] == ["eager: its graph is in use", "cuda graph"]
    assert torch.equal(results[0].tokens_SL, expected[1]) and torch.equal(results[1].tokens_SL, expected[0])


def test_a_graph_is_free_again_after_an_exception(fresh_llama):
    class Streamer(BaseStreamer):
        num_calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.num_calls += 1
            if self.num_calls == 5:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        run(fresh_llama, streamer=Streamer())
    assert_same_tokens(fresh_llama)


def test_tokens_are_awaited_on_the_stream_of_the_model(monkeypatch):
    """The model may be on another GPU than the current one."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    tokens_SL = torch.ones(1, 3, dtype=torch.int64)
    criteria = StoppingCriteriaList([MaxLengthCriteria(9)])
    chooser = decoding._Chooser(lambda tokens, scores: scores, criteria, GenerationConfig(), tokens_SL)
    streams: list[Any] = []
    chooser._copied = SimpleNamespace(record=lambda stream=None: streams.append(stream))  # type: ignore[assignment]
    chooser.choose(torch.randn(1, 20))
    assert streams == [("stream of", tokens_SL.device)]


def test_sample_texts_are_cut_when_the_capture_took_the_time(monkeypatch):
    made = GenerationResult(
        texts=("a",), num_prompt_tokens=1, num_new_tokens=1, prefill_seconds=0.1, decode_seconds=0.1,
        capture_seconds=sample_texts.MAX_GENERATION_SECONDS,
    )  # fmt: skip
    monkeypatch.setattr("llmquant.runtime.load.load", lambda *arguments, **options: None)
    monkeypatch.setattr("llmquant.runtime.generate.generate", lambda *arguments, **options: made)
    plan: Any = SimpleNamespace(
        skeleton=SimpleNamespace(device="cpu"), options=SimpleNamespace(trust_remote_code=False)
    )
    assert sample_texts._answers(Path("a"), plan, None, ("a",), False, 8).was_cut
    made = replace(made, capture_seconds=0.0)
    assert not sample_texts._answers(Path("a"), plan, None, ("a",), False, 8).was_cut


def test_old_graphs_are_freed(fresh_llama):
    for num_sequences in range(1, MAX_GRAPHS + 3):
        run(fresh_llama, (5,) * num_sequences, 3)
    graphs = graphs_of(fresh_llama).graphs
    assert list(graphs) == [(num_sequences, 512) for num_sequences in range(3, MAX_GRAPHS + 3)]
    keys = ref(next(iter(graphs.values())).cache.layers[0])
    release_graphs(fresh_llama)
    del graphs
    gc.collect()
    assert keys() is None


def test_graphs_do_not_keep_a_model_alive():
    model = random_model(ARCHITECTURES["llama"]())
    run(model)
    alive = ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("num_tokens", [1, 511, 512, 513, 1500, 4096, 5000, 40_000, 131_072])
def test_a_cache_has_enough_places_and_few_more(num_tokens):
    places = cache_places(num_tokens)
    assert num_tokens <= places <= max(512, num_tokens + 512, 1.25 * num_tokens) and places % 512 == 0
    assert cache_places(places) == places
