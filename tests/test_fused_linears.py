"""Linears that read the same tensor share launches, and everything else about them stays as it was.

The launches of the Triton kernels are replaced by PyTorch on the CPU (`pretend_kernels`), except in the last test.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretend_kernels
import pytest
import torch
from kernel_cases import exact_product, relative_error
from paths import ROOT
from pretend_gpu import pretend_gpu
from quantized_linears import quantized, quantized_model
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES
from torch import Tensor, nn

import llmquant
from llmquant.hub import load_tokenizer
from llmquant.kernels import gpu
from llmquant.runtime import linear as linear_module
from llmquant.runtime.generate import SamplingParams, generate
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.load import load
from llmquant.runtime.shared_launch import MAX_ROWS, MAX_UNUSED, share_launches

SUPPORT = Path(__file__).parent / "support"
BF16 = torch.bfloat16
LAUNCHES = {
    "opt": (6, 4), "phi3": (4, 4), "gpt_neox": (4, 4), "falcon": (4, 3), "gpt2": (4, 4), "cohere2": (7, 3),
}  # fmt: skip
"""Launches of a block for one token without and with sharing, for families that differ from llama's."""
LLAMA_LAUNCHES = (7, 4)


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """Let backend `triton` run on the CPU without Triton. The list receives the out_features of every launch."""
    record: list[int] = []

    def launch(x_MK: Tensor, prepared: Any, bias_N: Tensor | None, shape: Any, *tiles: Any) -> Tensor:
        record.append(shape.out_features)
        return pretend_kernels.launch(x_MK, prepared, bias_N, shape, *tiles)

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the backend refuses the CPU otherwise
    monkeypatch.setattr(gpu, "launch", launch)
    monkeypatch.setattr(gpu, "_dense_weight", pretend_kernels.dense_weight)
    gpu.forget_plans()
    return record


class Readers(nn.Module):
    """A model of linears that read one tensor."""

    device = torch.device("cpu")

    def __init__(self, *linears: QuantizedLinear) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, tokens_SL: Tensor, use_cache: bool = False) -> list[Tensor]:
        x = torch.zeros(*tokens_SL.shape, self.linears[0].in_features, dtype=self.linears[0].dtype)
        return [linear(x) for linear in self.linears]

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.linears]


def shared(*linears: QuantizedLinear) -> Readers:
    """Return a model of linears that share launches."""
    model = Readers(*linears)
    assert [group.size for group in share_launches(model)] == [len(linears)]
    return model


@pytest.fixture
def readers(launches) -> Readers:
    """Three linears that share launches. The middle one has padding."""
    return shared(quantized(128), quantized(100), quantized(64))


def assert_right(linear: QuantizedLinear, y: Tensor, x: Tensor) -> None:
    assert y.shape == (*x.shape[:-1], linear.out_features) and y.dtype == x.dtype
    bias = None if linear.bias is None else linear.bias.detach()
    assert relative_error(y.detach(), exact_product(x.detach(), linear.quantized_weight(), bias)) < 5e-3


def rows(*sizes: int, seed: int = 0, in_features: int = 128) -> Tensor:
    return torch.randn(*sizes, in_features, generator=torch.Generator().manual_seed(seed)).to(BF16)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_model_needs_fewer_launches_and_predicts_the_same(family, launches):
    model = quantized_model(family)
    inputs = [torch.arange(2, 2 + n).view(shape) for n, shape in ((1, (1, 1)), (3, (3, 1)), (10, (2, 5)))]
    with torch.no_grad():
        expected = [model(tokens_SL).logits for tokens_SL in inputs]
        before = len(launches)
        share_launches(model)
        assert len(launches) == before, "finding the groups launched a kernel"
        found = [model(tokens_SL).logits for tokens_SL in inputs]
        with torch.inference_mode():
            found_in_inference_mode = [model(tokens_SL).logits for tokens_SL in inputs]
    num_blocks = model.config.num_hidden_layers
    separate, together = LAUNCHES.get(family, LLAMA_LAUNCHES)
    assert before == len(inputs) * num_blocks * separate
    assert len(launches) - before == 2 * len(inputs) * num_blocks * together
    for one, other, third in zip(expected, found, found_in_inference_mode, strict=True):
        assert (one - other).float().norm() < 0.03 * one.float().norm()
        assert torch.equal(other, third)


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory) -> Path:
    """Return a quantized tiny model, which tests must not write into."""
    out = tmp_path_factory.mktemp("fused") / "out"
    recipe = llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=32))
    llmquant.quantize(tiny_model("qwen2", dtype=BF16), out, recipe, llmquant.Options(verify=False))
    return out


def test_a_loaded_model_shares_launches_and_saves_what_it_loaded(small, tmp_path, launches):
    model = load(small, device="cpu", backend="triton")
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert sum(linear._group is not None for linear in linears) == 5 * model.config.num_hidden_layers
    model.save_pretrained(tmp_path / "copy")
    before, after = (load_file(folder / "model.safetensors") for folder in (small, tmp_path / "copy"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_decoding_on_a_pretend_gpu_shares_launches(small, monkeypatch):
    texts, counts = [], []
    for sharing in (False, True):
        with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
            # The tensors of the pretend GPU are not plain, but they may be multiplied without the operator.
            patch.setattr(linear_module, "is_plain", lambda x: True)
            pretend_launch, number = gpu.launch, [0]

            def launch(*arguments: Any, pretend: Any = pretend_launch, number: Any = number) -> Tensor:
                number[0] += 1
                return pretend(*arguments)

            patch.setattr(gpu, "launch", launch)
            if not sharing:
                patch.setattr("llmquant.runtime.load.share_launches", lambda model: [])
            model, tokenizer = load(small, device="cuda"), load_tokenizer(small)
            params = SamplingParams(max_new_tokens=6, temperature=0.0)
            result = generate(model, tokenizer, ["Hello", "A longer prompt"], params)
            assert result.decoding == "cuda graph", result.decoding
            texts.append(result.texts)
            counts.append(number[0])
    assert texts[0] == texts[1]
    assert counts[1] * 7 == counts[0] * 4


# --- calls in other orders, with other tensors -----------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (3, 1), (2, 5), (MAX_ROWS,)])
def test_one_launch_for_all(sizes, readers, launches):
    x = rows(*sizes)
    for linear, y in zip(readers.linears, readers.outputs(x), strict=True):
        assert_right(linear, y, x)
        assert y.view(*sizes, 2, -1).shape[-1] == linear.out_features // 2
    assert launches == [128 + 128 + 64]


def test_many_rows_and_no_rows_have_single_launches(readers, launches):
    for number in (MAX_ROWS + 1, 0):
        x = rows(number)
        for linear, y in zip(readers.linears, readers.outputs(x), strict=True):
            assert number == 0 or assert_right(linear, y, x) is None
            assert y.shape == (number, linear.out_features)
    assert launches == [128, 100, 64, 128, 100, 64]


def test_outputs_are_independent(readers):
    """A write to one output does not count as one to another, and no output is returned twice."""
    first, second, third = readers.linears
    x = rows(1)
    y = first(x)
    one, other = second(x), second(x)
    version = one._version
    y.zero_()
    one.zero_()
    assert_right(second, other, x)
    assert one._version == version + 1 and other._version == 0
    assert_right(third, third(x), x)


def test_a_write_to_x_between_the_calls_counts(readers, launches):
    first, second, third = readers.linears
    x = rows(2)
    first(x)
    x.mul_(-2)
    assert_right(second, second(x), x)
    assert_right(first, first(x), x)
    assert_right(third, third(x), x)
    assert launches == [320, 100, 320]


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 0, 1, 1, 2), (0, 1), (1, 2)])
def test_any_order_of_calls_is_right(order, readers):
    for seed in range(3):
        x = rows(2, seed=seed)
        for index in order:
            assert_right(readers.linears[index], readers.linears[index](x), x)


def test_alternating_inputs(readers):
    a, b = rows(1, seed=1), rows(1, seed=2)
    for index, x in ((0, a), (0, b), (1, a), (1, b), (2, a), (2, b)):
        assert_right(readers.linears[index], readers.linears[index](x), x)


def test_outputs_that_are_never_used_end_the_sharing(readers, launches):
    for seed in range(MAX_UNUSED + 3):
        x = rows(1, seed=seed)
        assert_right(readers.linears[0], readers.linears[0](x), x)
    assert launches == [320] * MAX_UNUSED + [128] * 3
    assert not readers.linears[0]._group.is_active and readers.linears[0]._group._kept is None


def test_threads_share_one_model(readers):
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            for step in range(60):
                x = rows(1, seed=100 * seed + step)
                with torch.no_grad():
                    for linear, y in zip(readers.linears, readers.outputs(x), strict=True):
                        assert_right(linear, y, x)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_hooks_that_write_to_x_are_seen_in_inference_mode(readers):
    """Inference tensors do not count writes."""
    first, second, third = readers.linears
    first.register_forward_hook(lambda module, args, output: args[0].mul_(3))
    with torch.inference_mode():
        x = rows(1).clone()
        assert x.is_inference()
        first(x)
        assert_right(second, second(x), x)
        assert_right(third, third(x), x)


def test_a_hook_that_replaces_x_is_seen(readers):
    second = readers.linears[1]
    second.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = rows(1)
    readers.linears[0](x)
    assert_right(second, second(x), x + 1)


def test_a_wrapped_linear_still_shares_launches(readers, launches):
    """As an adapter library wraps it."""

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1

    base = readers.linears[1]
    readers.linears[1] = Wrapped(base)  # type: ignore[assignment]
    x = rows(1)
    assert_right(base, readers.outputs(x)[1] - 1, x)
    assert launches == [320]


# --- gradients, compilation, copies, state ---------------------------------------------------------------------------


def test_gradients_are_those_of_single_linears(readers, launches):
    x = rows(2).requires_grad_()
    outputs = readers.outputs(x)
    torch.cat(outputs, dim=-1).float().sum().backward()
    weights = torch.cat([linear.dequantize() for linear in readers.linears])
    torch.testing.assert_close(x.grad, weights.float().sum(0).expand(2, -1).to(BF16), rtol=2e-2, atol=2e-2)
    assert launches == [128, 100, 64]
    with torch.no_grad():
        readers.outputs(x)
    assert launches[3:] == [320]


def test_a_bias_that_is_trained_gets_its_gradient(launches):
    model = shared(quantized(64, bias=True), quantized(128, bias=True))
    model.linears[1].bias.requires_grad_()
    x = rows(2)
    for linear, y in zip(model.linears, model.outputs(x), strict=True):
        assert_right(linear, y, x)
    y.float().sum().backward()
    assert torch.equal(model.linears[1].bias.grad, torch.full((128,), 2.0, dtype=BF16))


def test_biases_may_change(launches):
    model = shared(quantized(64, bias=True), quantized(100, bias=True), quantized(64, bias=True))
    first, second, third = model.linears
    first.bias.data.mul_(-3)
    second.bias.data.fill_(20)
    third.bias = nn.Parameter(torch.full((64,), 20.0, dtype=BF16), requires_grad=False)
    for seed in range(2 * MAX_UNUSED):
        x = rows(2, seed=seed)
        for linear, y in zip(model.linears, model.outputs(x), strict=True):
            assert_right(linear, y, x)
    assert launches[:4] == [64 + 128 + 64, 64] * 2
    assert launches[-3:] == [64, 100, 64]  # the third output is never used


def test_a_compiler_sees_single_linears(readers):
    graphs: list[Any] = []

    def keep(module: Any, inputs: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    x = rows(2)
    with torch.no_grad():
        compiled = torch.compile(readers.outputs, backend=keep, fullgraph=True)
        for linear, y in zip(readers.linears, compiled(x), strict=True):
            assert_right(linear, y, x)
    (graph,) = graphs
    calls = [node for node in graph.nodes if "llmquant" in str(node.target)]
    assert len(calls) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied: Callable, readers):
    twin = copied(readers)
    x = rows(2)
    for linear, original, y in zip(twin.linears, readers.linears, twin.outputs(x), strict=True):
        assert linear._group is None and original._group is not None
        assert torch.equal(linear.quantized_weight().codes_NK, original.quantized_weight().codes_NK)
        assert linear.prepared[0].untyped_storage().data_ptr() != original.prepared[0].untyped_storage().data_ptr()
        assert_right(original, y, x)


def test_a_new_weight_ends_the_sharing(readers, launches):
    second = readers.linears[1]
    codes_NK = second.quantized_weight().codes_NK
    state = second.state_dict()
    second.load_state_dict(state | {"weight_packed": ~state["weight_packed"]})
    assert torch.equal(second.quantized_weight().codes_NK, 15 - codes_NK)
    x = rows(1)
    for linear, y in zip(readers.linears, readers.outputs(x), strict=True):
        assert_right(linear, y, x)
    assert launches == [128, 100, 64]


def test_moving_to_the_same_device_changes_nothing(readers, launches):
    readers.to("cpu")
    readers.outputs(rows(1))
    assert launches == [320]
    assert "launched with 2 others" in repr(readers.linears[0])


# --- which linears share launches ------------------------------------------------------------------------------------


def test_weights_are_exact_and_stored_once(launches):
    linears = [quantized(n, 200, group_size=64) for n in (100, 64, 130)]
    originals = [linear.quantized_weight() for linear in linears]
    num_bytes = sum(linear.prepared[i].nbytes for linear in linears for i in (0, 1))
    dense = [linear.dequantize() for linear in linears]
    shared(*linears)
    for linear, original, weight_NK in zip(linears, originals, dense, strict=True):
        found = linear.quantized_weight()
        for name in ("codes_NK", "scale_NG", "zero_NG"):
            assert torch.equal(getattr(found, name), getattr(original, name))
        assert torch.equal(linear.dequantize(), weight_NK)
    storages = {
        linear.prepared[i].untyped_storage().data_ptr(): linear.prepared[i].untyped_storage().nbytes()
        for linear in linears
        for i in (0, 1)
    }
    assert len(storages) == 2 and sum(storages.values()) == num_bytes


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        pytest.param({}, {"bits": 3}, True, id="3 and 4 bits have one layout"),
        pytest.param({"bits": 8}, {"bits": 8}, True, id="8 bits"),
        pytest.param({}, {"bits": 8}, False, id="4 and 8 bits"),
        pytest.param({}, {"group_size": 32}, False, id="groups"),
        pytest.param({"group_size": 128}, {"group_size": -1}, True, id="one scale per tile"),
        pytest.param({}, {"bias": True}, False, id="a bias"),
        pytest.param({"act_order": True}, {"act_order": True}, True, id="the same act-order"),
        pytest.param({"act_order": True}, {}, False, id="one act-order"),
        pytest.param({"backend": "triton-invariant"}, {"backend": "triton-invariant"}, False, id="invariant"),
        pytest.param({"backend": "torch"}, {"backend": "torch"}, False, id="torch"),
    ],
)
def test_which_linears_share_launches(one, other, together, launches):
    model = Readers(quantized(128, **one), quantized(128, **other))
    assert bool(share_launches(model)) == together
    x = rows(2)
    for linear, y in zip(model.linears, model.outputs(x), strict=True):
        assert_right(linear, y, x)


def test_linears_that_are_called_twice_or_fail_do_not_share_launches(launches):
    linear = quantized(128)
    assert share_launches(Readers(linear, quantized(64), linear)) == []

    class Broken(Readers):
        def forward(self, tokens_SL: Tensor, use_cache: bool = False) -> list[Tensor]:
            super().forward(tokens_SL)
            raise ValueError("one token is too short")

    broken = Broken(quantized(64), quantized(64))
    with pytest.warns(UserWarning, match="linears do not share launches, so decoding is slower: the model fails on"):
        assert share_launches(broken) == []
    assert all("forward" not in vars(linear) for linear in broken.linears)


def test_a_group_does_not_keep_its_linears_alive(launches):
    model = shared(quantized(64), quantized(64))
    alive = [weakref.ref(linear) for linear in model.linears]
    model.outputs(rows(1))
    del model
    assert [linear() for linear in alive] == [None, None]  # without a garbage collection


@pytest.mark.slow
def test_shared_launches_in_the_interpreter():
    """Run `shared_launch_cases.py` in its own process: TRITON_INTERPRET must be set before kernels are imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SUPPORT)}
    cases = SUPPORT / "shared_launch_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
