"""The Triton backend without a GPU: its results in Triton's interpreter, and the machine code of Triton's compiler."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from paths import ROOT
from script_modules import load_script

from llmquant.kernels import gpu
from llmquant.kernels import tiles as tiles_module
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tiles import (
    ROW_BUCKETS,
    Gpu,
    Problem,
    Tiles,
    choose_tiles,
    rule_of_thumb,
    user_table_path,
    write_table,
)
from llmquant.kernels.tune import MAX_CANDIDATES, candidate_tiles, copies_needed
from llmquant.spec import SUPPORTED_BITS, QuantSpec

pytest.importorskip("triton")

SUPPORT = Path(__file__).parent / "support"
H100 = Gpu("NVIDIA H100 80GB HBM3", 132, 90)
SHAPE = LinearShape.of_sizes(4096, 4096, QuantSpec())


@pytest.mark.slow
def test_kernels_agree_with_the_definition_in_the_interpreter():
    """Run `interpreter_cases.py` in its own process, since TRITON_INTERPRET must be set before kernels are imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUPPORT / "interpreter_cases.py")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def sass() -> ModuleType:
    return load_script("dev/sass.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_of_the_quantizer_do_not_spill_registers(sass, capability):
    codes = sass.compile_solver(capability)
    assert len(codes) == 5
    for name, code in codes.items():
        assert code.spills == 0 and 0 < code.registers < 255, (name, code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "rows", "blocks_per_tile", "dtype"),
    [
        (90, 1, 1, "bfloat16"),
        (90, 32, 1, "float16"),
        (90, 16, 4, "bfloat16"),
        (90, 64, 2, "bfloat16"),
        (90, 128, 1, "bfloat16"),
        (80, 1, 1, "bfloat16"),
        (100, 64, 1, "bfloat16"),
        (120, 16, 2, "float16"),
    ],
)
def test_machine_code_has_no_problems(
    sass,
    capability,
    rows,
    blocks_per_tile,
    dtype,
    tmp_path,
    monkeypatch,
):
    """For a sample of configurations; `scripts/dev/sass_check.py` compiles all of them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = rule_of_thumb(Problem(4096, 4096, blocks_per_tile, dtype), rows, Gpu("any", 132, capability))
    code = sass.compile_tiles(tiles, capability, dtype=dtype, blocks_per_tile=blocks_per_tile)
    assert sass.find_problems(code, tiles, capability) == []


@pytest.mark.slow
@pytest.mark.parametrize(("blocks_per_tile", "planes"), [(1, 1), (4, 2)])
def test_dense_kernel_compiles_without_spills(sass, blocks_per_tile, planes, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert sass.compile_dequantize(90, blocks_per_tile=blocks_per_tile, planes=planes).spills == 0


@pytest.mark.slow
def test_weights_that_pass_through_shared_memory_are_a_problem(sass, tmp_path, monkeypatch):
    """With two warps, Triton does not use wgmma."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = Tiles(rows=16, features=64, split_k=1, warps=2, stages=3, post=True)
    code = sass.compile_tiles(tiles, 90)
    assert "no wgmma" in sass.find_problems(code, tiles, 90)


def test_every_code_has_its_nibble():
    """The order of `triton_w4a16.py`, code by code."""
    codes_NS = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    words = gpu.pack_words(codes_NS)
    for n, k in torch.stack([torch.randint(0, 64, (200,)), torch.randint(0, 256, (200,))], dim=1).tolist():
        i, p, thread, e = k % 128 // 32, k % 32 // 8, k % 8 // 2, k % 2
        word = int(words[0, k // 128, n, 4 * thread + i]) & 0xFFFFFFFF
        assert (word >> 4 * (p + 4 * e)) & 15 == codes_NS[n, k]


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_rule_gives_tiles_that_fit(capability):
    some = Gpu("any", 132, capability)
    for features, slots in itertools.product((64, 576, 4096, 151936), (128, 640, 4096, 28672)):
        for blocks_per_tile, rows in itertools.product((1, 2, 4), (*ROW_BUCKETS, 100_000)):
            tiles = rule_of_thumb(Problem(features, slots, blocks_per_tile, "bfloat16"), rows, some)
            assert features % tiles.features == 0 and 1 <= tiles.split_k <= slots // 128
            assert blocks_per_tile == 1 or not tiles.post


def test_a_written_table_is_read_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = Problem(4096, 4096, 1, "bfloat16")
    measured = Tiles(rows=32, features=128, split_k=3, warps=8, stages=2, post=True)
    write_table(user_table_path(H100.name), {"gpu": H100.name, "entries": {problem.key: {"16": measured.as_json()}}})
    assert choose_tiles(problem, 9, H100) == measured
    assert choose_tiles(problem, 40, H100) == rule_of_thumb(problem, 40, H100)


def test_the_users_table_replaces_entries_of_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tiles_module, "SHIPPED_TABLES", tmp_path / "configs")
    problem = Problem(4096, 4096, 1, "bfloat16")
    shipped = Tiles(rows=16, features=64, split_k=3, warps=8, stages=2, post=True)
    measured = replace(shipped, split_k=5)
    sections = {"entries": {problem.key: {"1": shipped.as_json(), "16": shipped.as_json()}}}
    write_table(tmp_path / "configs" / "nvidia-h100-80gb-hbm3.json", sections | {"dense_from_rows": {problem.key: 200}})
    assert [choose_tiles(problem, rows, H100) for rows in (1, 16)] == [shipped, shipped]
    write_table(user_table_path(H100.name), {"entries": {problem.key: {"16": measured.as_json()}}})
    assert [choose_tiles(problem, rows, H100) for rows in (1, 16)] == [shipped, measured]
    assert tiles_module.dense_from_rows(problem, H100) == 200


def test_shipped_tables_can_be_read():
    for path in tiles_module.SHIPPED_TABLES.glob("*.json"):
        assert tiles_module.is_table(path.read_bytes()), path
        table = json.loads(path.read_text())
        assert path.stem == user_table_path(table["gpu"]).stem
        assert all(Tiles.from_json(tiles) for entry in table["entries"].values() for tiles in entry.values())


@pytest.mark.parametrize(("features", "slots"), [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336)])
def test_the_rule_gives_every_processor_work(features, slots):
    for blocks_per_tile, rows in itertools.product((1, 2, 4), (1, 16)):
        tiles = rule_of_thumb(Problem(features, slots, blocks_per_tile, "bfloat16"), rows, H100)
        assert features // tiles.features * tiles.split_k >= 0.9 * H100.processors


def test_large_linears_take_wide_tiles():
    for blocks_per_tile in (1, 2, 4):
        assert rule_of_thumb(Problem(14336, 4096, blocks_per_tile, "bfloat16"), 1, H100).features == 128


def test_a_table_with_the_old_name_of_split_k_is_read(tmp_path, monkeypatch):
    """Tables once called it `parts`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = Problem(4096, 4096, 1, "bfloat16")
    measured = Tiles(rows=32, features=128, split_k=3, warps=8, stages=2, post=True)
    entry = measured.as_json()
    entry["parts"] = entry.pop("split_k")
    write_table(user_table_path(H100.name), {"gpu": H100.name, "entries": {problem.key: {"16": entry}}})
    assert choose_tiles(problem, 9, H100) == measured


@pytest.mark.slow
def test_imports_do_not_query_the_gpu():
    code = (
        "import torch\n"
        "def refuse(*a): raise AssertionError('queried the GPU')\n"
        "torch.cuda.is_available = torch.cuda.get_device_properties = torch.cuda._lazy_init = refuse\n"
        "import llmquant.kernels.dispatch, llmquant.runtime.linear, llmquant.kernels.triton_w4a16"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_refuses_without_a_gpu():
    assert "NVIDIA" in (gpu.refuses(SHAPE, torch.device("cpu"), torch.bfloat16) or "")
    assert "float32" in (gpu.refuses(SHAPE, torch.device("cuda"), torch.float32) or "")


def test_refuses_without_a_c_compiler(tmp_path, monkeypatch):
    """Triton compiles a launcher in C at the first run of a kernel."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" in (gpu.refuses(SHAPE, torch.device("cuda"), torch.bfloat16) or "")
    monkeypatch.setenv("CC", "any-compiler")
    assert gpu.refuses(SHAPE, torch.device("cuda"), torch.bfloat16) is None
    monkeypatch.delenv("CC")
    (tmp_path / "gcc").touch(mode=0o755)
    assert gpu.refuses(SHAPE, torch.device("cuda"), torch.bfloat16) is None


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    return load_script("gpu_check.py")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_check_reports_a_missing_gpu_in_one_line():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "gpu_check.py"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr


def test_gpu_check_computes_the_physical_limit(gpu_check):
    """8.9 MB at 3 TB/s; 2 * 1024 * 4096 * 4096 operations at 800 TFLOP/s."""
    assert gpu_check.speed_limit_microseconds(1, SHAPE, 8_912_896, 3e12, 8e14) == pytest.approx(2.976, abs=0.01)
    assert gpu_check.speed_limit_microseconds(1024, SHAPE, 8_912_896, 3e12, 8e14) == pytest.approx(42.95, abs=0.01)


def test_gpu_check_prints_and_draws_its_records(gpu_check, tmp_path, capsys):
    shape = {"in_features": 4096, "out_features": 4096}
    numbers = {"us": 4.0, "dense_us": 11.2, "speed_up": 2.8, "limit_us": 3.0, "limit_speed_up": 3.73}
    record = shape | numbers | {"rows": 1, "bandwidth_share": 0.74, "goal": 2.4, "tinygemm_us": 5.0}
    slow = record | {"rows": 16, "speed_up": 2.0, "goal": 2.2}
    gpu_check.print_table([record, slow], 3e12)
    lines = capsys.readouterr().out.splitlines()
    assert "below goal" not in lines[-2] and lines[-1].endswith("below goal") and "74%" in lines[-1]
    gpu_check.draw([record, slow], tmp_path / "plot.png", "a title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_gpu_check_covers_every_width_dtype_and_order(gpu_check):
    cases = gpu_check.correctness_cases()
    assert {shape.bits for shape, _ in cases} == set(SUPPORTED_BITS)
    assert {dtype for _, dtype in cases} == {torch.bfloat16, torch.float16}
    assert {shape.act_order_groups for shape, _ in cases} == {True, False}


def test_tuning_times_the_tiles_of_the_rule_and_others_that_fit():
    problem = Problem(4096, 4096, 1, "bfloat16")
    for rows in ROW_BUCKETS:
        tried = candidate_tiles(problem, rows, H100)
        assert tried[0] == rule_of_thumb(problem, rows, H100) and 10 <= len(set(tried)) == len(tried) <= MAX_CANDIDATES
        assert len({(tiles.rows, tiles.features, tiles.warps, tiles.stages) for tiles in tried}) >= 5
    assert not any(tiles.post for tiles in candidate_tiles(Problem(4096, 4096, 2, "bfloat16"), 1, H100))


def test_rotated_copies_exceed_the_cache():
    assert copies_needed(8 << 20, 50 << 20) * (8 << 20) >= 4 * (50 << 20)
    assert copies_needed(1 << 30, 50 << 20) == 2
