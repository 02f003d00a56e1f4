"""`llmquant bench` and `llmquant tune`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command

import llmquant
from llmquant.console.bench import plot_bench, print_bench
from llmquant.kernels.dispatch import BACKENDS
from llmquant.runtime import explain
from llmquant.runtime.bench import BenchmarkResult, BenchmarkRun, Workload, memory_footprint_bytes

SHORT = ("--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def small(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "out"
    recipe = llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=32))
    llmquant.quantize(tiny_model("llama", dtype=torch.bfloat16), out, recipe)
    return out


@pytest.mark.slow
def test_bench_runs_every_usable_kernel_and_the_original(small, tiny_model, tmp_path, monkeypatch, capsys):
    original, plot = tiny_model("llama", dtype=torch.bfloat16), tmp_path / "bench.svg"
    arguments = ["bench", small, "--against", original, "--backend", "all", "--plot", plot, "--json", *SHORT]
    assert command(monkeypatch, *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    choice = next(iter(explain.explain_backends(small, device="cpu").values()))
    usable = [name for name in BACKENDS if name not in choice.refusals]
    assert [run["kernel"] for run in result["runs"]] == [*usable, "dense"]
    assert result["runs"][-1]["decode_speedup"] == result["runs"][-1]["prefill_speedup"] == 1
    first, base = result["runs"][0], result["runs"][-1]
    ratio = first["decode_tokens_per_second"] / base["decode_tokens_per_second"]
    assert first["decode_speedup"] == pytest.approx(ratio)
    assert base["weight_bytes"] == memory_footprint_bytes(llmquant.load(original, device="cpu"))
    assert {run["decoding"] for run in result["runs"]} == {"eager: the model is on the device cpu"}
    assert plot.read_text().startswith("<?xml")


def example_result() -> BenchmarkResult:
    run = BenchmarkRun(
        model="folder/small",
        kernel="cpu",
        load_seconds=1.25,
        weight_bytes=233_000_000,
        peak_bytes=None,
        prefill_tokens_per_second=240.0,
        decode_tokens_per_second=66.0,
    )
    base = BenchmarkRun(
        **vars(run) | {"kernel": "dense", "prefill_tokens_per_second": 160.0, "decode_tokens_per_second": 30.0}
    )
    return BenchmarkResult(
        runs=(run, base), against="original", workload=Workload(), device="a CPU", dtype="bfloat16", torch="2"
    )


@pytest.mark.slow
def test_table_and_plot_show_the_speedup(tmp_path, capsys):
    print_bench(example_result())
    printed = " ".join(capsys.readouterr().out.split())
    assert "66.0 (2.20x)" in printed and "240.0 (1.50x)" in printed and "233 MB" in printed
    for name in ("a.svg", "b.svg"):
        plot_bench(example_result(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_model_on_a_gpu_without_a_graph_is_named(capsys):
    result = example_result()
    reasons = ("the model's cache has no layers", "the model is on the device cpu", "CUDA graphs are switched off")
    for decoding in ("cuda graph", *(f"eager: {reason}" for reason in reasons)):
        print_bench(replace(result, runs=tuple(replace(run, decoding=decoding) for run in result.runs)))
        lines = [line for line in capsys.readouterr().out.splitlines() if "without a CUDA graph" in line]
        expected = [
            f"folder/small ({run.kernel}): decoded without a CUDA graph: {reasons[0]}"
            for run in result.runs
            if reasons[0] in decoding
        ]
        assert lines == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "SMALL", "--plot", "bench.txt"], "bench.txt: a plot is one of .svg, .png, .pdf"),
        (["bench", "SMALL", "--plot", "no/such/bench.svg"], "its folder does not exist"),
        (["bench", "SMALL", "--new-tokens", "1"], "new_tokens 1: must be at least 2; use --new-tokens 2"),
        (["bench", "SMALL", "--prompt-tokens", "999"], "and the model's context is 256"),
        (["bench", "SMALL", "--backend", "nonesuch"], "backend 'nonesuch'"),
        (["tune", "SMALL", "--device", "cpu"], "runs on NVIDIA GPUs, not on cpu"),
        (["tune", "SMALL", "--rows", "1,x"], "--rows 1,x: must be numbers from 1 up"),
        (["tune", "SMALL", "--rows", "0"], "--rows 0: must be numbers from 1 up"),
        (["tune", "SMALL", "--seconds", "0"], "seconds 0.0: must be above 0"),
    ],
)
def test_user_errors_are_reported_in_one_line(
    arguments,
    message,
    small,
    monkeypatch,
    capsys,
):
    assert command(monkeypatch, *[small if word == "SMALL" else word for word in arguments]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("llmquant: "))
    assert message in line


def test_tune_measures_every_shape_once(small, tmp_path, monkeypatch, capsys):
    """The GPU measurement is replaced by a stub."""
    tuned = []

    def tune_tiles(
        shapes: list, dtype: torch.dtype, device: torch.device, *, path: Path | None, report: Any, **limits: Any
    ) -> Path:
        tuned.extend(shapes)
        report(f"a line {limits}")
        return path or tmp_path / "default.json"

    monkeypatch.setattr(explain, "tune_tiles", tune_tiles)
    monkeypatch.setattr(explain, "BACKENDS", {"triton": BACKENDS["torch"]})
    limits = ("--rows", "1,16,60", "--seconds", 90)
    assert command(monkeypatch, "tune", small, "--device", "cpu", "--out", tmp_path / "table.json", *limits) == 0
    streams = capsys.readouterr()
    assert streams.out == f"{tmp_path / 'table.json'}\n" and "a line" in streams.err
    assert "{'buckets': (1, 16, 64), 'max_seconds': 90.0}" in streams.err
    sizes = {(64, 64), (32, 64), (96, 64), (64, 96)}
    assert {(shape.out_features, shape.in_features) for shape in tuned} == sizes and len(tuned) == len(sizes)
