"""Faults in the middle of a run: either the result is right, or one line names the problem and no work is lost."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import assert_one_line_error
from fault_injection import ForkServer, survive_kills
from folders import artifact_bytes
from safetensors.torch import load_file, save_file
from short_runs import short_command, short_run
from torch import Tensor

from llmquant.algorithms.statistics import InputStatistics
from llmquant.checkpoints.manifest import verify_files
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.errors import UserError
from llmquant.pipeline.quantize import quantize
from llmquant.progress import Phase, Progress
from llmquant.runtime.load import load
from llmquant.solver.quantize_linear import StorageLimits, quantize_linears
from llmquant.spec import QuantSpec, Recipe

pytestmark = pytest.mark.slow

RECIPE = Recipe(spec=QuantSpec(group_size=32))
TEXT = " ".join(f"It was a dark and stormy night, the {number}th in a row." for number in range(60))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def server(tiny_model) -> Iterator[ForkServer]:
    with ForkServer(tiny_model("llama"), html_report=False) as server:
        yield server


# --- killed processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_reuses_the_output_hessians_of_the_whole_model(damaged, server, tiny_model, text, tmp_path):
    options = ("--effort", "best", "--samples", "16")
    model, out = tiny_model("llama"), tmp_path / "out"
    whole = server.run(*short_command(model, tmp_path / "whole", text), *options)
    assert whole.returncode == 0, whole.stderr
    died = server.run(*short_command(model, out, text), *options, dies_at_input_group=5)
    assert died.returncode == -9, died
    parts = tmp_path / "out.partial" / "parts"
    assert sorted(file.name for file in parts.iterdir()) == [
        "block-00000.safetensors",
        "cross-row-00001.safetensors",
        "outside.safetensors",
    ]
    before = (parts / "cross-row-00001.safetensors").stat().st_mtime_ns
    if damaged:
        (parts / "cross-row-00001.safetensors").write_bytes(b"")
    again = server.run(*short_command(model, out, text), *options, dies_at_input_group=1)
    assert again.returncode == -9, again
    assert ((parts / "cross-row-00001.safetensors").stat().st_mtime_ns != before) == damaged
    done = server.run(*short_command(model, out, text), *options)
    assert done.returncode == 0, done.stderr
    assert artifact_bytes(out) == artifact_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_run_killed_at_twenty_random_moments_continues_to_the_same_bytes(server, tiny_model, text, tmp_path):
    model, problems = tiny_model("llama"), []
    survived = survive_kills(
        server,
        short_command(model, "OUT", text),
        tmp_path,
        on_kill=lambda number, fraction, problem: problems.append(problem),
    )
    assert survived == 20, problems


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.9])
def test_interrupt_ends_a_run_within_seconds_with_one_line(seconds, server, tiny_model, text, tmp_path):
    done = server.run(
        *short_command(tiny_model("llama"), tmp_path / "out", text), stop_after=seconds, signal=int(signal.SIGINT)
    )
    if done.returncode != 0:  # else it was faster
        assert done.returncode == 130
        assert_one_line_error(done.stderr, "interrupted")
        assert done.seconds < seconds + 3


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_bytes", [300, 20_000, 100_000, 250_000])
def test_a_full_disk_prints_one_line_and_the_same_command_continues(file_bytes, server, tiny_model, text, tmp_path):
    model, out = tiny_model("llama"), tmp_path / "out"
    quantize(model, tmp_path / "whole", RECIPE, short_run(text))
    full = server.run(*short_command(model, out, text), file_bytes=file_bytes)
    assert full.returncode == 2
    assert_one_line_error(full.stderr, "no space left", "make room, then run the same command again to continue")
    assert not out.exists()
    quantize(model, out, RECIPE, short_run(text))
    assert artifact_bytes(out) == artifact_bytes(tmp_path / "whole")


@pytest.mark.parametrize("event", ["vanishes", "changes"])
def test_a_run_whose_shard_vanishes_or_changes_continues_after_it_is_restored(event, tiny_model, text, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), model)
    shard = model / "model.safetensors"
    content = shard.read_bytes()

    def disturb(progress: Progress) -> None:
        if progress.done == 1 and shard.exists() and len(content) == shard.stat().st_size:
            if event == "vanishes":
                shard.unlink()
            else:
                shard.write_bytes(content + b"x")

    with pytest.raises(UserError, match=r"model.safetensors: (vanished|changed) while it was used"):
        quantize(model, out, RECIPE, short_run(text), disturb)
    assert (tmp_path / "out.partial" / "parts" / "block-00000.safetensors").exists()
    shard.write_bytes(content)
    steps: list[Progress] = []
    quantize(model, out, RECIPE, short_run(text), steps.append)
    assert Phase.READING_BACK in {step.phase for step in steps if step.done == 0}, "block 0 must not be quantized again"
    quantize(model, tmp_path / "whole", RECIPE, short_run(text))
    assert artifact_bytes(out) == artifact_bytes(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_prints_one_line(server, tiny_model, text):
    done = server.run(*short_command(tiny_model("llama"), Path("/proc/out"), text))
    assert done.returncode == 2
    assert_one_line_error(done.stderr, "/proc/out")


def test_a_second_run_on_the_same_out_names_the_process_of_the_first(server, tiny_model, text, tmp_path):
    with PartialCheckpoint.open(tmp_path / "out", {"of": "another"}):
        done = server.run(*short_command(tiny_model("llama"), tmp_path / "out", text))
    assert done.returncode == 2
    assert_one_line_error(done.stderr, f"process {os.getpid()} is writing it")


def test_a_truncated_journal_prints_one_line_and_restart_begins_anew(server, tiny_model, text, tmp_path):
    model, out = tiny_model("llama"), tmp_path / "out"
    journal = tmp_path / "out.partial" / "journal.json"

    def stop(progress: Progress) -> None:
        if progress.done == 1:
            raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        quantize(model, out, RECIPE, short_run(text), stop)
    journal.write_bytes(journal.read_bytes()[:-100])
    done = server.run(*short_command(model, out, text))
    assert done.returncode == 2
    assert_one_line_error(done.stderr, "journal.json: damaged; add --restart to begin anew")
    assert server.run(*short_command(model, out, text), "--restart").returncode == 0
    assert verify_files(out) == []


# --- extreme values --------------------------------------------------------------------------------------------------

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight"


def edit_tensors(model: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a model's only shard in place."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def unchanged(tensors: dict[str, Tensor]) -> None:
    """Change no tensor."""


EXTREME: dict[str, tuple[Callable[[dict[str, Tensor]], object], dict[str, object], str]] = {
    "dead columns": (lambda t: t[NORM][5:9].zero_(), {}, TEXT),
    "constant inputs": (unchanged, {}, "a" * 2000),
    "one token": (unchanged, {"num_samples": 1, "seq_len": 1}, TEXT),
    "an all-zero weight": (lambda t: t[UP].zero_(), {}, TEXT),
    "an all-zero input": (lambda t: t[NORM].zero_(), {}, TEXT),
    "huge outliers in a weight": (lambda t: t[UP][3, :2].fill_(1e4), {}, TEXT),
    "huge outliers in an input": (lambda t: t[NORM][3].fill_(1e4), {}, TEXT),
    "float16, inputs whose squares overflow": (lambda t: t[NORM].fill_(200.0), {"dtype": "float16"}, TEXT),
}


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("case", EXTREME)
def test_extreme_values_give_a_correct_result(case, method, tiny_model, text, tmp_path):
    change, options, words = EXTREME[case]
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), model)
    edit_tensors(model, change)
    text.write_text(words)
    report = quantize(model, out, Recipe(method=method, spec=RECIPE.spec), short_run(text, **options))
    assert not report.fallbacks
    assert all(linear.error <= linear.rtn_error * 1.001 for linear in report.linears), report.linears
    assert verify_files(out) == []
    with torch.no_grad():
        assert torch.isfinite(
            load(out, device="cpu", dtype="float32", backend="torch")(torch.arange(3, 40)[None]).logits
        ).all()


def test_overflow_in_an_activation_names_block_module_and_sample(tiny_model, text, tmp_path):
    """The inputs of gate and up overflow when they are squared; their product, the input of down, is infinite."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    edit_tensors(model, lambda t: t[NORM].fill_(1e25))
    with pytest.raises(
        UserError,
        match=r"block 1: NaN or inf in the input of 'mlp.down_proj' of the quantized model, in .* sample 0",
    ):
        quantize(model, tmp_path / "out", RECIPE, short_run(text))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("damage", [float("inf"), float("nan")])
def test_a_hessian_that_is_not_finite_is_reported_and_the_weight_rounded_to_nearest(damage, method):
    statistics = InputStatistics(64, torch.device("cpu"))
    statistics.add(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)))
    statistics._hessian_KK[3, 3] = damage
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(group_size=32)
    results = quantize_linears(
        {"a": weight}, {"a": spec}, statistics, Recipe(method=method), StorageLimits(torch.float16)
    )["a"]
    assert "rounded to nearest" in results.fallbacks[0]
    assert torch.isfinite(results.weight.dequantize()).all()
    assert (results.weight.dequantize() - weight).abs().max() < 0.3
    assert results.error == results.rtn_error < 0.02
