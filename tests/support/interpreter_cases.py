"""Tests of the Triton kernels on the CPU, in Triton's interpreter. `test_triton.py` runs this file.

It runs in a process of its own, because TRITON_INTERPRET=1 must be set before the kernels are imported.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kernel_cases import CPU, exact_product, random_weight, relative_error
from script_modules import load_script

from llmquant.kernels import gpu, tune
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tiles import Gpu, Problem, Tiles, rule_of_thumb
from llmquant.spec import QuantSpec


def weight_case(**fields: int) -> dict[str, int]:
    """Return the arguments as a dict, for `random_weight`."""
    return fields


SHAPES = {
    "ragged M, N and K": weight_case(out_features=100, in_features=200, group_size=64, symmetric=False),
    "one group": weight_case(out_features=64, in_features=250, group_size=-1, symmetric=False),
    "group 32": weight_case(out_features=64, in_features=128, group_size=32, symmetric=False),
    "group 128": weight_case(out_features=128, in_features=384, group_size=128, symmetric=True),
    "group 48 has no tile": weight_case(out_features=64, in_features=144, group_size=48, symmetric=False),
    "act-order": weight_case(out_features=64, in_features=256, group_size=64, symmetric=False, act_order=True),
    "2 bits": weight_case(out_features=64, in_features=256, group_size=64, bits=2, symmetric=False),
    "3 bits": weight_case(out_features=64, in_features=256, group_size=128, bits=3, symmetric=False),
    "8 bits": weight_case(out_features=64, in_features=200, group_size=64, bits=8, symmetric=False),
    "8 bits, one scale per tile": weight_case(
        out_features=64, in_features=256, group_size=128, bits=8, symmetric=False
    ),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    return load_script("gpu_check.py")


@pytest.fixture(autouse=True)
def _nan_memory_and_seed() -> None:
    """Fill new tensors with NaN, so that memory which a kernel does not write is noticed; and set a seed."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_dense_kernel_writes_the_weight(case: dict, dtype: torch.dtype) -> None:
    weight = random_weight(**case)
    dense = gpu.dequantize(gpu.prepare(weight, dtype, CPU), LinearShape.of(weight), dtype)
    rounded_scale_NK = weight.scale_NG.to(dtype).double()[:, weight.group_of_column_K]
    q_NK = weight.codes_NK.double() - weight.zero_NG.double()[:, weight.group_of_column_K]
    assert torch.equal(dense, (rounded_scale_NK * q_NK).to(dtype))


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_one_hot_rows_return_the_weight(case: dict) -> None:
    weight = random_weight(**case)
    shape = LinearShape.of(weight)
    rows = torch.tensor([0, 7, 63, 64, weight.in_features - 1])
    x = torch.eye(weight.in_features, dtype=torch.float16)[rows]
    y = gpu.matmul(x, gpu.prepare(weight, torch.float16, CPU), None, shape)
    # 8-bit codes are two planes that are rounded separately: each is off by up to half a unit of 240 scales.
    slack = 240 * float(weight.scale_NG.max()) * 2**-10 if weight.spec.bits == 8 else 0.0
    torch.testing.assert_close(y, weight.dequantize(torch.float16)[:, rows].T.contiguous(), rtol=0, atol=slack)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_error_is_at_most_that_of_plain_torch(case: dict, dtype: torch.dtype) -> None:
    weight = random_weight(**case)
    shape = LinearShape.of(weight)
    x = torch.randn(5, weight.in_features, dtype=dtype)
    bias = torch.randn(weight.out_features, dtype=dtype)
    y = gpu.matmul(x, gpu.prepare(weight, dtype, CPU), bias, shape)
    plain = torch.nn.functional.linear(x, weight.dequantize(dtype), bias)
    # 8-bit codes are two planes, whose weights are rounded separately.
    allowed = (1.3 if weight.spec.bits == 8 else 1.05) * relative_error(plain, exact_product(x, weight, bias))
    assert relative_error(y, exact_product(x, weight, bias)) <= allowed


@pytest.mark.parametrize("rows", [1, 16, 17, 40, 70])
def test_every_row_bucket_of_the_rule_is_correct(rows: int) -> None:
    weight = random_weight(out_features=128, in_features=512, group_size=128, symmetric=False)
    shape = LinearShape.of(weight)
    x = torch.randn(rows, 512, dtype=torch.float16)
    tiles = rule_of_thumb(Problem(128, 512, 1, "float16"), rows, Gpu("any", 8, 90))
    y = gpu.launch(x, gpu.prepare(weight, torch.float16, CPU), None, shape, tiles)
    assert relative_error(y, exact_product(x, weight)) < 5e-4


@pytest.mark.parametrize("post", [True, False])
def test_split_k_is_reproducible_and_leaves_its_counters_at_zero(post: bool) -> None:
    weight = random_weight(out_features=128, in_features=640, group_size=128, symmetric=False)
    shape = LinearShape.of(weight)
    x = torch.randn(20, 640, dtype=torch.float16)
    prepared = gpu.prepare(weight, torch.float16, CPU)
    tiles = Tiles(rows=16, features=64, split_k=3, warps=4, stages=2, post=post)
    first, second = (gpu.launch(x, prepared, None, shape, tiles) for _ in range(2))
    assert torch.equal(first, second)
    assert relative_error(first, exact_product(x, weight)) < 5e-4
    assert not prepared[2].any()


def test_more_splits_than_tiles_along_k_add_zeros() -> None:
    weight = random_weight(out_features=64, in_features=256, group_size=128, symmetric=False)
    x = torch.randn(3, 256, dtype=torch.float16)
    tiles = Tiles(rows=16, features=64, split_k=5, warps=4, stages=2, post=True)
    y = gpu.launch(x, gpu.prepare(weight, torch.float16, CPU), None, LinearShape.of(weight), tiles)
    assert relative_error(y, exact_product(x, weight)) < 5e-4


def test_many_rows_take_the_dense_path() -> None:
    weight = random_weight(out_features=64, in_features=256, group_size=64, symmetric=False, act_order=True)
    x = torch.randn(400, 256, dtype=torch.bfloat16)
    bias = torch.randn(64, dtype=torch.bfloat16)
    y = gpu.matmul(x, gpu.prepare(weight, torch.bfloat16, CPU), bias, LinearShape.of(weight))
    assert relative_error(y, exact_product(x, weight, bias)) < 4e-3


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    weight = random_weight(out_features=64, in_features=384, group_size=64, symmetric=False)
    shape = LinearShape.of(weight)
    prepared = gpu.prepare(weight, torch.float16, CPU)
    x = torch.randn(70, 384, dtype=torch.float16)
    alone = gpu.matmul_invariant(x[69:], prepared, None, shape)
    assert torch.equal(gpu.matmul_invariant(x, prepared, None, shape)[69:], alone)


def test_wrong_dtype_is_refused() -> None:
    weight = random_weight(out_features=64, in_features=128, group_size=64)
    with pytest.raises(TypeError, match="prepared for"):
        gpu.matmul(torch.randn(1, 128), gpu.prepare(weight, torch.float16, CPU), None, LinearShape.of(weight))


def test_gpu_check_finds_no_problem_in_the_kernels(gpu_check: ModuleType) -> None:
    shape = LinearShape.of_sizes(72, 200, QuantSpec(group_size=64, symmetric=False))
    assert gpu_check.check_case(shape, torch.float16, CPU, (1, 18)) == []


def test_gpu_check_finds_a_wrong_kernel(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda *arguments: right(*arguments) * 1.01)
    shape = LinearShape.of_sizes(64, 128, QuantSpec(group_size=64))
    assert any("error" in line for line in gpu_check.check_case(shape, torch.float16, CPU, (3,)))


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, gpu_check: ModuleType) -> None:
    """Replace the GPU's cache size and clock: calls run, and each takes a microsecond per row."""

    def microseconds(calls: list, **_: int) -> float:
        return float(max(len(call()) for call in calls))

    properties = SimpleNamespace(L2_cache_size=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(tune, "graph_microseconds", microseconds)
    monkeypatch.setattr(gpu_check, "graph_microseconds", microseconds)


def test_gpu_check_times_a_linear_on_a_fake_gpu(gpu_check: ModuleType, fake_gpu: None, tmp_path: Path) -> None:
    shape = LinearShape.of_sizes(64, 128, QuantSpec(group_size=128, symmetric=False))
    records = gpu_check.time_linear(shape, (1, 20, 400), CPU, bandwidth=3e12, flops=8e14, gemlite=True)
    assert [(r["rows"], r["us"], r["speed_up"]) for r in records] == [(1, 1, 1), (20, 20, 1), (400, 400, 1)]
    gpu_check.print_table(records, 3e12)
    gpu_check.draw(records, tmp_path / "plot.png", "dry")


def test_tuning_on_a_fake_gpu_writes_a_table(fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "DENSE_ROWS", (20, 40))
    shape = LinearShape.of_sizes(64, 128, QuantSpec(group_size=128, symmetric=False))
    lines: list[str] = []
    path = tune.tune_tiles(
        [shape], torch.float16, CPU, buckets=(1, 32), path=tmp_path / "gpu.json", report=lines.append
    )
    table = json.loads(path.read_text())
    assert table["gpu"] == "interpreter" and len(lines) == 3
    assert set(table["entries"]["64x128 b128 float16"]) == {"1", "32"}
    assert Tiles(**table["entries"]["64x128 b128 float16"]["32"]).features == 64
    # Both paths take one microsecond per row, so the dense one is never slower.
    assert table["dense_from_rows"]["64x128 b128 float16"] == tune.DENSE_ROWS[0]


def test_tuning_stops_when_its_time_is_up(fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the clock takes a second: 10 seconds are up in the second of three shapes."""
    clock = itertools.count()
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(clock)))
    grid = QuantSpec(group_size=128, symmetric=False)
    shapes = [LinearShape.of_sizes(64 * n, 128, grid) for n in (1, 2, 3)]
    lines: list[str] = []
    path = tune.tune_tiles(
        shapes, torch.float16, CPU, buckets=(1, 16), max_seconds=10, path=tmp_path / "gpu.json", report=lines.append
    )
    timed = [line for line in lines if " timed" in line and "not timed" not in line]
    assert timed and all(" of " in line for line in timed)
    assert lines[-1].endswith("time is up")
    entries = json.loads(path.read_text())["entries"]
    assert "64x128 b128 float16" in entries and "192x128 b128 float16" not in entries
