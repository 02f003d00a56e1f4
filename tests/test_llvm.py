"""Backend `llvm` on this processor and on simulated older ones; same bits in any batch, with any number of threads."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_cases import CPU, SHAPES, exact_product, llvm_linear, random_weight, relative_error
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from llmquant.errors import UserError
from llmquant.kernels import jit, llvm, llvm_attention
from llmquant.kernels.dispatch import DENSE_KERNELS, choose_backend, choose_dense_kernel, explain_choice
from llmquant.kernels.layout import LinearShape
from llmquant.runtime.linear import PackedDenseLinear

pytest_plugins = ("processors",)
pytestmark = pytest.mark.skipif(jit.unavailable_reason() is not None, reason=str(jit.unavailable_reason()))


@pytest.fixture
def head_of() -> Callable[[int, int], PackedDenseLinear]:
    """(in_features, out_features) -> a 16-bit head. Skips the test if this processor has no kernel for it."""
    if choose_dense_kernel() is None:
        pytest.skip("this processor has no kernel for a dense bfloat16 weight")
    return lambda in_features, out_features: PackedDenseLinear(
        nn.Linear(in_features, out_features, dtype=torch.bfloat16)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_every_processor_computes_the_definition(case, dtype, processor):
    linear, weight = llvm_linear(case, dtype), random_weight(**case)
    assert torch.equal(linear.dequantize(), weight.dequantize(dtype))
    torch.manual_seed(0)
    x = torch.randn(300, weight.in_features).to(dtype)
    exact = exact_product(x, weight, linear.bias)
    plain = relative_error(torch.nn.functional.linear(x, weight.dequantize(dtype), linear.bias), exact)
    assert relative_error(linear(x), exact) <= 1.01 * plain


def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(processor, threads, monkeypatch):
    monkeypatch.setattr(llvm, "PRODUCTS_PER_THREAD", 1)
    for case in ("ragged M, N and K", "8 bits", "act-order"):
        linear = llvm_linear(SHAPES[case])
        x = torch.randn(500, linear.in_features).bfloat16()
        threads(1)
        alone = torch.cat([linear(row) for row in x.split(1)])
        for count in (1, 2, 5):
            threads(count)
            for rows in (1, 2, 3, 4, 5, 6, 9, 15, 16, 17, 31, 241, 500):
                assert torch.equal(linear(x[:rows]), alone[:rows]), (case, count, rows)


@pytest.mark.slow
def test_fewer_threads_than_requested_do_all_the_work():
    """OpenMP may start fewer threads, by its own limit. They must also do the work of the missing ones."""
    code = """
import torch
from kernel_cases import SHAPES, llvm_linear
from llmquant.kernels import llvm, llvm_attention
llvm.PRODUCTS_PER_THREAD = llvm_attention.PRODUCTS_PER_THREAD = 1
linear = llvm_linear(SHAPES["small model"])
x, q = torch.randn(300, 576).bfloat16(), torch.randn(1, 4, 100, 64).bfloat16()
torch.set_num_threads(1)
alone = [linear(x), llvm_attention.attend_one(q[:, :, :1], q, q, None, 0.1)]
torch.set_num_threads(4)
assert torch.get_num_threads() == 4
limited = [linear(x), llvm_attention.attend_one(q[:, :, :1], q, q, None, 0.1)]
assert all(torch.equal(a, b) for a, b in zip(alone, limited))
"""
    environment = os.environ | {"OMP_THREAD_LIMIT": "2", "PYTHONPATH": os.pathsep.join([*sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_written_beyond_the_last_feature(processor, monkeypatch):
    """Every tensor that the backend allocates is followed by NaN values, which must not change."""
    linear = llvm_linear(SHAPES["ragged M, N and K"])
    tails: list[torch.Tensor] = []
    empty = torch.empty

    def guarded(*shape: int, **options: torch.dtype) -> torch.Tensor:
        tensor = empty(*shape, **options)
        memory = torch.full((tensor.numel() + 256,), torch.nan, **options)
        tails.append(memory[tensor.numel() :])
        return memory[: tensor.numel()].view(tensor.shape)

    for rows in (1, 7, 40):
        x = torch.randn(rows, linear.in_features).bfloat16()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", guarded)
            y = linear(x)
            weight = linear.dequantize()
        assert y.isfinite().all() and weight.isfinite().all()
    assert len(tails) >= 9 and all(tail.isnan().all() for tail in tails)


def test_padding_reads_zeros_and_not_the_memory_beside_x(processor):
    """A short last group and padding read zeros, even if the memory beside x contains NaN."""
    linear = llvm_linear(SHAPES["ragged M, N and K"])
    wide = torch.full((4, 300), torch.nan, dtype=torch.bfloat16)
    wide[:, :200] = torch.randn(4, 200)
    assert torch.equal(linear(wide[:, :200]), linear(wide[:, :200].clone()))
    assert linear(wide[:, :200]).isfinite().all()


def test_sums_stay_in_registers():
    """The innermost loop over a panel contains only loads and products."""
    if not {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16"} <= jit.processor_features():
        pytest.skip("this processor has no dot product of bfloat16 pairs")
    assembly = llvm._compiled(torch.bfloat16, torch.float16)[0].assembly()
    body = assembly.split("\npanel6:")[1].split("\n.Lfunc_end")[0]
    loops = [block for block in re.split(r"\n\.LBB\w+:", body) if block.count("vdpbf16ps") == 96]
    assert len(loops) == 1 and "rsp" not in loops[0]
    moved = set(re.findall(r"\b(v\w+)", loops[0]))
    assert moved <= {"vdpbf16ps", "vbroadcastss", "vpbroadcastd", "vmovaps", "vmovups", "vmovdqa64", "vmovdqu64"}


def test_a_dense_weight_is_multiplied_and_can_be_unpacked(processor, threads, monkeypatch):
    monkeypatch.setattr(llvm, "PRODUCTS_PER_THREAD", 1)
    weight = torch.randn(100, 70).bfloat16()
    kernel = DENSE_KERNELS["llvm"]
    packed = kernel.pack(weight)
    assert torch.equal(kernel.unpack(packed, 100, 70), weight)
    bias = torch.randn(100).bfloat16()
    x = torch.randn(2, 7, 70).bfloat16()
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    y = kernel.multiply(x, packed, bias, 100)
    assert y.shape == (2, 7, 100)
    assert relative_error(y, exact) <= 1.01 * relative_error(exact.bfloat16(), exact)
    threads(3)
    for i in range(7):
        assert torch.equal(kernel.multiply(x[0, i], packed, bias, 100), y[0, i])


def test_matrix_units_take_many_rows_of_bfloat16(monkeypatch):
    if not jit.has_bfloat16_dot_product():
        pytest.skip("this processor has no dot product of bfloat16 pairs")
    linear = llvm_linear(SHAPES["small model"])
    monkeypatch.setattr(jit, "has_matrix_units", lambda: True)
    x = torch.randn(llvm.MATRIX_UNITS_FROM_ROWS, linear.in_features).bfloat16()
    dense = torch.nn.functional.linear(x, linear.dequantize(), linear.bias)
    assert torch.equal(linear(x), dense)
    assert not torch.equal(linear(x[:-1]), dense[:-1])
    assert not llvm.multiplies_dense()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_defaults_of_torch_do_not_change_the_buffers(dtype):
    linear, x = llvm_linear(SHAPES["small model"]), torch.randn(30, 576).bfloat16()
    q = torch.randn(1, 4, 50, 64).bfloat16()
    before = torch.get_default_dtype()

    def results() -> list[torch.Tensor]:
        tensors = [linear(x), linear.dequantize(), llvm_attention.attend_one(q[:, :, :1], q, q, None, 0.1)]
        if llvm_attention.refuses_causal(q, q, q, None) is None:
            tensors.append(llvm_attention.attend_causal(q, q, q, 0.1))
        return tensors

    expected = results()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, results(), expected))
        with torch.device("meta"):
            assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_default_dtype(before)


def test_x_of_another_width_or_dtype_is_an_error(head_of):
    linear = llvm_linear(SHAPES["small model"])
    head = head_of(576, 100)
    for width in (8, 575, 584, 1152):
        for module in (linear, head):
            with pytest.raises(RuntimeError, match="has to be 576"):
                module(torch.randn(4, width).bfloat16())
    with pytest.raises(TypeError, match="float32"):
        head(torch.randn(4, 576))


def recorded(module: torch.nn.Module, x: torch.Tensor) -> torch.fx.GraphModule:
    return make_fx(lambda value: module(value))(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated", "ignore::torch.jit.TracerWarning")
def test_fake_tensors_and_tracers_call_the_operator(head_of):
    linear = llvm_linear(SHAPES["small model"])
    head = head_of(576, 100)
    x = torch.randn(4, 576).bfloat16()
    for module, width in ((linear, 192), (head, 100)):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            assert module(torch.empty(4, 576, dtype=torch.bfloat16)).shape == (4, width)
        with torch.no_grad():
            graph = recorded(module, x)
            assert torch.equal(graph(x), module(x)) and "llmquant" in graph.code
            traced = torch.jit.trace(module, x, check_trace=False)
            assert torch.equal(traced(x + 1), module(x + 1))


def test_a_packed_head_is_neither_cast_nor_moved_nor_laid_out_anew(
    head_of,
):
    head = head_of(70, 100)
    x = torch.randn(4, 70).bfloat16()
    y = head(x)
    assert torch.equal(head.to(torch.bfloat16).to(memory_format=torch.channels_last)(x), y)
    for change in (torch.nn.Module.half, lambda module: module.to("meta")):
        with pytest.raises(UserError, match="head 100x70"):
            change(head)
    assert torch.equal(head(x), y)


def test_a_strided_bias_is_read_by_its_strides():
    weight, x = random_weight(96, 64), torch.randn(3, 64)
    prepared, shape = llvm.prepare(weight, torch.float32, CPU), LinearShape.of(weight)
    for bias in (torch.arange(192.0)[::2], torch.ones(1).expand(96)):
        assert torch.equal(llvm.matmul(x, prepared, bias, shape), llvm.matmul(x, prepared, bias.clone(), shape))


def test_openmp_is_found_in_folders_with_spaces_and_survives_upgrades(monkeypatch):
    maps = Path("/proc/self/maps").read_text()
    gone = "7f0-7f1 r-xp 0 fd:00 1 /a user/torch/lib/libgomp.so.1\n7f0-7f1 r-xp 0 0:0 1 /lib/libgomp.so.1 (deleted)\n"
    monkeypatch.setattr(Path, "read_text", lambda path: gone + maps)
    assert jit.openmp.__wrapped__() is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch: patch.setattr(platform, "machine", lambda: "aarch64"), "x86-64 Linux, not for aarch64"),
        (lambda patch: patch.setitem(sys.modules, "llvmlite", None), "pip install 'llvmlite>=0.45'"),
        (lambda patch: patch.setattr(jit, "OLDEST_LLVM", 99), "99 is needed"),
        (lambda patch: patch.setattr(jit, "processor_features", lambda: frozenset({"avx2", "f16c"})), "has no fma"),
        (lambda patch: patch.setattr(jit, "openmp", lambda: None), "OpenMP"),
    ],
)
def test_another_backend_runs_if_llvm_cannot(change, reason, monkeypatch):
    shape = LinearShape.of(random_weight(16, 64))
    with monkeypatch.context() as patch:
        change(patch)
        jit.unavailable_reason.cache_clear()
        choice = explain_choice(shape, CPU, torch.bfloat16)
        assert reason in choice.refusals["llvm"] and choice.backend.name != "llvm"
    jit.unavailable_reason.cache_clear()
    assert choose_backend(shape, CPU, torch.bfloat16)[0].name == "llvm"
