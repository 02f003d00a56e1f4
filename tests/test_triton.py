"""The Triton backend without a GPU: its arithmetic in Triton's interpreter, its machine code from Triton's compiler."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmquant.kernels import gpu
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
from llmquant.spec import QuantSpec

pytest.importorskip("triton")

TESTS = Path(__file__).parent
H100 = Gpu("NVIDIA H100 80GB HBM3", 132, 90)
LAYER = LinearShape.planned(4096, 4096, QuantSpec())


def test_kernels_agree_with_the_definition_in_the_interpreter() -> None:
    """`interpreter_cases.py` in a process of its own: the interpreter is chosen when the kernels are imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "interpreter_cases.py")]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


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
def test_machine_code_passes_the_gate(
    capability: int, rows: int, blocks_per_tile: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample; `scripts/kernel_gate` compiles every configuration."""
    from llmquant.kernels.gate import compile_tiles, objections

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = rule_of_thumb(Problem(4096, 4096, blocks_per_tile, dtype), rows, Gpu("any", 132, capability))
    code = compile_tiles(tiles, capability, dtype=dtype, blocks_per_tile=blocks_per_tile)
    assert objections(code, tiles, capability) == []


def test_gate_objects_to_weights_that_take_a_detour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two warps make Triton leave wgmma: the gate must see it."""
    from llmquant.kernels.gate import compile_tiles, objections

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = Tiles(rows=16, features=64, parts=1, warps=2, stages=3, post=True)
    code = compile_tiles(tiles, 90)
    assert "no wgmma" in objections(code, tiles, 90)


def test_every_code_has_its_nibble() -> None:
    """The order of `triton_w4a16.py`, code by code."""
    codes_NS = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    words = gpu.pack_words(codes_NS)
    for n, k in torch.stack([torch.randint(0, 64, (200,)), torch.randint(0, 256, (200,))], dim=1).tolist():
        i, p, lane, e = k % 128 // 32, k % 32 // 8, k % 8 // 2, k % 2
        word = int(words[0, k // 128, n, 4 * lane + i]) & 0xFFFFFFFF
        assert (word >> 4 * (p + 4 * e)) & 15 == codes_NS[n, k]


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_rule_gives_tiles_that_fit(capability: int) -> None:
    some = Gpu("any", 132, capability)
    for features, slots in itertools.product((64, 576, 4096, 151936), (128, 640, 4096, 28672)):
        for blocks_per_tile, rows in itertools.product((1, 2, 4), (*ROW_BUCKETS, 100_000)):
            tiles = rule_of_thumb(Problem(features, slots, blocks_per_tile, "bfloat16"), rows, some)
            assert features % tiles.features == 0 and 1 <= tiles.parts <= slots // 128
            assert blocks_per_tile == 1 or not tiles.post


def test_a_written_table_is_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = Problem(4096, 4096, 1, "bfloat16")
    measured = Tiles(rows=32, features=128, parts=3, warps=8, stages=2, post=True)
    write_table(user_table_path(H100.name), {"gpu": H100.name, "entries": {problem.key: {"16": measured.as_json()}}})
    assert choose_tiles(problem, 9, H100) == measured
    assert choose_tiles(problem, 40, H100) == rule_of_thumb(problem, 40, H100)


def test_no_gpu_is_asked_about_at_import() -> None:
    code = (
        "import torch\n"
        "def refuse(*a): raise AssertionError('asked about a GPU')\n"
        "torch.cuda.is_available = torch.cuda.get_device_properties = torch.cuda._lazy_init = refuse\n"
        "import llmquant.kernels.dispatch, llmquant.runtime.linear, llmquant.kernels.triton_w4a16"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TESTS.parent)


def test_refuses_where_there_is_no_gpu() -> None:
    assert "NVIDIA" in (gpu.refuses(LAYER, torch.device("cpu"), torch.bfloat16) or "")
    assert "float32" in (gpu.refuses(LAYER, torch.device("cuda"), torch.float32) or "")
