"""Backend `llvm`: on this processor and on what older ones have; the same bits in any batch and with any threads."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from test_kernels import CPU, SHAPES, random_weight, relative_error, truth
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from llmquant.errors import UserError
from llmquant.kernels import jit, llvm, llvm_attention
from llmquant.kernels.dispatch import DENSE_KERNELS, choose_backend, choose_dense_kernel, explain_choice
from llmquant.kernels.layout import LinearShape
from llmquant.runtime.linear import PackedLinear, QuantizedLinear

pytestmark = pytest.mark.skipif(jit.why_not() is not None, reason=str(jit.why_not()))

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
PROCESSORS = {
    "bfloat16 dot product": lambda features: features,
    "AVX-512": lambda features: features - {"avx512bf16"},
    "AVX2": lambda features: frozenset(name for name in features if not name.startswith("avx512")),
}

COMPILED = {name: cache(llvm._compiled.__wrapped__) for name in PROCESSORS}
"""A second per program: made once for each processor."""


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pretend that the processor has no more than this."""
    features = jit.processor_features()
    kept = PROCESSORS[request.param](features)
    if request.param != "AVX2" and not kept >= AVX512:
        pytest.skip("this processor has no AVX-512")
    if request.param == "bfloat16 dot product" and "avx512bf16" not in features:
        pytest.skip("this processor does not multiply bfloat16")
    monkeypatch.setattr(jit, "processor_features", lambda: kept)
    monkeypatch.setattr(llvm, "_compiled", COMPILED[request.param])
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def head_of() -> Callable[[int, int], PackedLinear]:
    """(in_features, out_features) -> a head in 16 bit; skipped where a processor has no kernel for one."""
    if choose_dense_kernel() is None:
        pytest.skip("this processor has no kernel for a dense bfloat16 weight")
    return lambda in_features, out_features: PackedLinear(nn.Linear(in_features, out_features, dtype=torch.bfloat16))


def linear_of(case: dict, dtype: torch.dtype = torch.bfloat16) -> QuantizedLinear:
    weight = random_weight(**case)
    bias = torch.linspace(-1, 1, weight.out_features).to(dtype)
    return QuantizedLinear(weight, bias, dtype=dtype, device=CPU, backend="llvm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_every_processor_computes_the_definition(case: dict, dtype: torch.dtype, processor: str) -> None:
    linear, weight = linear_of(case, dtype), random_weight(**case)
    assert torch.equal(linear.dequantize(), weight.dequantize(dtype))
    torch.manual_seed(0)
    x = torch.randn(300, weight.in_features).to(dtype)
    exact = truth(x, weight, linear.bias)
    plain = relative_error(torch.nn.functional.linear(x, weight.dequantize(dtype), linear.bias), exact)
    assert relative_error(linear(x), exact) <= 1.01 * plain


def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(
    processor: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llvm, "GRAIN", 1)
    for case in ("ragged M, N and K", "8 bits", "act-order"):
        linear = linear_of(SHAPES[case])
        x = torch.randn(500, linear.in_features).bfloat16()
        threads(1)
        alone = torch.cat([linear(row) for row in x.split(1)])
        for count in (1, 2, 5):
            threads(count)
            for rows in (1, 2, 3, 4, 5, 6, 9, 15, 16, 17, 31, 241, 500):
                assert torch.equal(linear(x[:rows]), alone[:rows]), (case, count, rows)


def test_fewer_threads_than_asked_for_do_all_the_work() -> None:
    """OpenMP may give fewer, by its own limit: what is the work of the missing ones must be done."""
    code = """
import torch
from test_llvm import SHAPES, linear_of
from llmquant.kernels import llvm, llvm_attention
llvm.GRAIN = llvm_attention.GRAIN = 1
linear = linear_of(SHAPES["small model"])
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


def test_nothing_is_written_beyond_the_last_feature(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that the backend allocates ends before a stretch of NaN, which must stay."""
    linear = linear_of(SHAPES["ragged M, N and K"])
    tails: list[torch.Tensor] = []
    empty = torch.empty

    def guarded(*shape: int, **options: torch.dtype) -> torch.Tensor:
        wanted = empty(*shape, **options)
        memory = torch.full((wanted.numel() + 256,), torch.nan, **options)
        tails.append(memory[wanted.numel() :])
        return memory[: wanted.numel()].view(wanted.shape)

    for rows in (1, 7, 40):
        x = torch.randn(rows, linear.in_features).bfloat16()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", guarded)
            y = linear(x)
            weight = linear.dequantize()
        assert y.isfinite().all() and weight.isfinite().all()
    assert len(tails) >= 9 and all(tail.isnan().all() for tail in tails)


def test_padding_of_x_never_meets_what_lies_in_memory(processor: str) -> None:
    """A short last group and empty slots read zeros, whatever stands beside x."""
    linear = linear_of(SHAPES["ragged M, N and K"])
    wide = torch.full((4, 300), torch.nan, dtype=torch.bfloat16)
    wide[:, :200] = torch.randn(4, 200)
    assert torch.equal(linear(wide[:, :200]), linear(wide[:, :200].clone()))
    assert linear(wide[:, :200]).isfinite().all()


def test_sums_stay_in_registers() -> None:
    """The innermost loop over a panel has nothing but loads and products."""
    if not AVX512 | {"avx512bf16"} <= jit.processor_features():
        pytest.skip("this processor does not multiply bfloat16")
    assembly = llvm._compiled(torch.bfloat16, torch.float16)[0].assembly()
    body = assembly.split("\npanel6:")[1].split("\n.Lfunc_end")[0]
    loops = [block for block in re.split(r"\n\.LBB\w+:", body) if block.count("vdpbf16ps") == 96]
    assert len(loops) == 1 and "rsp" not in loops[0]
    moved = set(re.findall(r"\b(v\w+)", loops[0]))
    assert moved <= {"vdpbf16ps", "vbroadcastss", "vpbroadcastd", "vmovaps", "vmovups", "vmovdqa64", "vmovdqu64"}


def test_a_dense_weight_is_multiplied_and_comes_back(
    processor: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llvm, "GRAIN", 1)
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


def test_matrix_units_take_many_rows_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if not jit.multiplies_bfloat16():
        pytest.skip("this processor does not multiply bfloat16")
    linear = linear_of(SHAPES["small model"])
    monkeypatch.setattr(jit, "has_matrix_units", lambda: True)
    x = torch.randn(llvm.MATRIX_UNITS_FROM_ROWS, linear.in_features).bfloat16()
    dense = torch.nn.functional.linear(x, linear.dequantize(), linear.bias)
    assert torch.equal(linear(x), dense)
    assert not torch.equal(linear(x[:-1]), dense[:-1])
    assert not llvm.multiplies_dense()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_defaults_of_torch_do_not_reach_the_buffers(dtype: torch.dtype) -> None:
    linear, x = linear_of(SHAPES["small model"]), torch.randn(30, 576).bfloat16()
    q = torch.randn(1, 4, 50, 64).bfloat16()
    before = torch.get_default_dtype()

    def results() -> list[torch.Tensor]:
        made = [linear(x), linear.dequantize(), llvm_attention.attend_one(q[:, :, :1], q, q, None, 0.1)]
        if llvm_attention.refuses_causal(q, q, q, None) is None:
            made.append(llvm_attention.attend_causal(q, q, q, 0.1))
        return made

    wanted = results()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, results(), wanted))
        with torch.device("meta"):
            assert all(map(torch.equal, results(), wanted))
    finally:
        torch.set_default_dtype(before)


def test_x_of_another_width_or_dtype_is_an_error(head_of: Callable[[int, int], PackedLinear]) -> None:
    linear = linear_of(SHAPES["small model"])
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
def test_tensors_without_memory_and_watchers_get_the_operator(head_of: Callable[[int, int], PackedLinear]) -> None:
    linear = linear_of(SHAPES["small model"])
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


def test_a_packed_head_is_neither_cast_nor_moved_nor_laid_out_anew(head_of: Callable[[int, int], PackedLinear]) -> None:
    head = head_of(70, 100)
    x = torch.randn(4, 70).bfloat16()
    y = head(x)
    assert torch.equal(head.to(torch.bfloat16).to(memory_format=torch.channels_last)(x), y)
    for change in (torch.nn.Module.half, lambda module: module.to("meta")):
        with pytest.raises(UserError, match="head 100x70"):
            change(head)
    assert torch.equal(head(x), y)


def test_a_bias_with_strides_is_read_along_them() -> None:
    weight, x = random_weight(96, 64), torch.randn(3, 64)
    prepared, layer = llvm.prepare(weight, torch.float32, CPU), LinearShape.of(weight)
    for bias in (torch.arange(192.0)[::2], torch.ones(1).expand(96)):
        assert torch.equal(llvm.matmul(x, prepared, bias, layer), llvm.matmul(x, prepared, bias.clone(), layer))


def test_openmp_is_found_in_folders_with_spaces_and_survives_upgrades(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Path("/proc/self/maps").read_text()
    gone = "7f0-7f1 r-xp 0 fd:00 1 /a user/torch/lib/libgomp.so.1\n7f0-7f1 r-xp 0 0:0 1 /lib/libgomp.so.1 (deleted)\n"
    monkeypatch.setattr(Path, "read_text", lambda path: gone + maps)
    assert jit.openmp.__wrapped__() is not None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda patch: patch.setattr(platform, "machine", lambda: "aarch64"), "x86-64 Linux, not for aarch64"),
        (lambda patch: patch.setitem(sys.modules, "llvmlite", None), "pip install 'llvmlite>=0.45'"),
        (lambda patch: patch.setattr(jit, "OLDEST_LLVM", 99), "99 is needed"),
        (lambda patch: patch.setattr(jit, "processor_features", lambda: frozenset({"avx2", "f16c"})), "has no fma"),
        (lambda patch: patch.setattr(jit, "openmp", lambda: None), "OpenMP"),
    ],
)
def test_where_it_cannot_run_it_says_why_and_another_does(
    change: Callable[[pytest.MonkeyPatch], None], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LinearShape.of(random_weight(16, 64))
    with monkeypatch.context() as patch:
        change(patch)
        jit.why_not.cache_clear()
        choice = explain_choice(layer, CPU, torch.bfloat16)
        assert why in choice.refusals["llvm"] and choice.backend.name != "llvm"
    jit.why_not.cache_clear()
    assert choose_backend(layer, CPU, torch.bfloat16)[0].name == "llvm"
