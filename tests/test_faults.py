"""Whatever goes wrong in the middle of a run: the result is right and the incident counted, or one clear line comes and
nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults import Warm, contents, survive_kills
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.algorithms.statistics import InputStatistics
from llmquant.checkpoints.manifest import verify_files
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.errors import UserError
from llmquant.pipeline import quantize as pipeline
from llmquant.pipeline.quantize import quantize
from llmquant.pipeline.solve import Stored, solve_stage
from llmquant.runtime.load import load
from llmquant.spec import Options, QuantSpec, Recipe

RECIPE = Recipe(spec=QuantSpec(group_size=32))
TEXT = " ".join(f"It was a dark and stormy night, the {number}th in a row." for number in range(60))


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a report take longer than all else about a tiny model."""
    monkeypatch.setattr(pipeline, "write_page", lambda report, file: None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def warm(tiny_model) -> Iterator[Warm]:
    with Warm(tiny_model("llama"), page=False) as process:
        yield process


def few(text: Path, **changes: object) -> Options:
    return Options(**{"calibration": str(text), "num_samples": 4, "seq_len": 32, "verify": False} | changes)


def command(model: Path, out: object, text: Path) -> list[object]:
    """The command line that does what `quantize(model, out, RECIPE, few(text))` does."""
    options = (
        "--calibration",
        text,
        "--samples",
        "4",
        "--seq-len",
        "32",
        "--group-size",
        "32",
        "--no-verify",
        "--quiet",
    )
    return ["quantize", model, out, *options]


def one_line(error: str, *words: str) -> None:
    assert error.count("\n") == 1, error
    assert error.startswith("llmquant: "), error
    assert all(word in error for word in words), error


# --- ends of processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_has_measured_the_whole_network_goes_on_from_there(damaged, warm, tiny_model, text, tmp_path):
    options = ("--effort", "best", "--samples", "16")
    model, out = tiny_model("llama"), tmp_path / "out"
    whole = warm.run(*command(model, tmp_path / "whole", text), *options)
    assert whole.code == 0, whole.error
    died = warm.run(*command(model, out, text), *options, dies_at_stage=5)
    assert died.code == -9, died
    parts = tmp_path / "out.partial" / "parts"
    assert sorted(file.name for file in parts.iterdir()) == [
        "block-00000.safetensors",
        "feedback-00001.safetensors",
        "outside.safetensors",
    ]
    before = (parts / "feedback-00001.safetensors").stat().st_mtime_ns
    if damaged:
        (parts / "feedback-00001.safetensors").write_bytes(b"")
    again = warm.run(*command(model, out, text), *options, dies_at_stage=1)
    assert again.code == -9, again
    assert ((parts / "feedback-00001.safetensors").stat().st_mtime_ns != before) == damaged
    done = warm.run(*command(model, out, text), *options)
    assert done.code == 0, done.error
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_twenty_kills_at_random_moments_are_survived(warm, tiny_model, text, tmp_path):
    model, problems = tiny_model("llama"), []
    survived = survive_kills(
        warm, command(model, "OUT", text), tmp_path, on_kill=lambda number, share, what: problems.append(what)
    )
    assert survived == 20, problems


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.9])
def test_interrupt_ends_a_run_within_seconds_with_one_line(seconds, warm, tiny_model, text, tmp_path):
    done = warm.run(
        *command(tiny_model("llama"), tmp_path / "out", text), stop_after=seconds, signal=int(signal.SIGINT)
    )
    if done.code != 0:  # else it was faster
        assert done.code == 130
        one_line(done.error, "interrupted")
        assert done.seconds < seconds + 3


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_bytes", [300, 20_000, 100_000, 250_000])
def test_a_full_disk_at_any_point_is_one_line_and_the_same_command_continues(
    file_bytes, warm, tiny_model, text, tmp_path
):
    model, out = tiny_model("llama"), tmp_path / "out"
    quantize(model, tmp_path / "whole", RECIPE, few(text))
    full = warm.run(*command(model, out, text), file_bytes=file_bytes)
    assert full.code == 2
    one_line(full.error, "no space left", "make room, then run the same command again to continue")
    assert not out.exists()
    quantize(model, out, RECIPE, few(text))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("how", ["vanishes", "changes"])
def test_a_shard_that_goes_away_while_it_is_read_is_one_line_and_a_restored_one_continues(
    how, tiny_model, text, tmp_path
):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), model)
    shard = model / "model.safetensors"
    content = shard.read_bytes()

    def disturb(index: int, total: int, step: str, error: float | None) -> None:
        if index == 1 and shard.exists() and len(content) == shard.stat().st_size:
            if how == "vanishes":
                shard.unlink()
            else:
                shard.write_bytes(content + b"x")

    with pytest.raises(UserError, match=r"model.safetensors: (vanished|changed) while it was used"):
        quantize(model, out, RECIPE, few(text), disturb)
    assert (tmp_path / "out.partial" / "parts" / "block-00000.safetensors").exists()
    shard.write_bytes(content)
    added: list[str] = []
    quantize(model, out, RECIPE, few(text), lambda index, total, step, error: added.append(f"{index} {step}"))
    assert "0 reading back" in added, "the first block is not made again"
    quantize(model, tmp_path / "whole", RECIPE, few(text))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_place_that_cannot_be_written_is_one_line(warm, tiny_model, text):
    done = warm.run(*command(tiny_model("llama"), Path("/proc/out"), text))
    assert done.code == 2
    one_line(done.error, "/proc/out")


def test_a_second_run_on_the_same_out_is_told_who_writes_it(warm, tiny_model, text, tmp_path):
    with PartialCheckpoint.open(tmp_path / "out", {"of": "another"}):
        done = warm.run(*command(tiny_model("llama"), tmp_path / "out", text))
    assert done.code == 2
    one_line(done.error, f"process {os.getpid()} is writing it")


def test_a_torn_journal_is_one_line_and_restart_begins_anew(warm, tiny_model, text, tmp_path):
    model, out = tiny_model("llama"), tmp_path / "out"
    journal = tmp_path / "out.partial" / "journal.json"

    def stop(index: int, total: int, step: str, error: float | None) -> None:
        if index == 1:
            raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        quantize(model, out, RECIPE, few(text), stop)
    journal.write_bytes(journal.read_bytes()[:-100])
    done = warm.run(*command(model, out, text))
    assert done.code == 2
    one_line(done.error, "journal.json: damaged; add --restart to begin anew")
    assert warm.run(*command(model, out, text), "--restart").code == 0
    assert verify_files(out) == []


# --- numbers ---------------------------------------------------------------------------------------------------------

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight"


def edited(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return edit


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


HARD: dict[str, tuple[Callable[[dict[str, Tensor]], object], dict[str, object], str]] = {
    "dead columns": (lambda t: t[NORM][5:9].zero_(), {}, TEXT),
    "constant inputs": (nothing, {}, "a" * 2000),
    "one token": (nothing, {"num_samples": 1, "seq_len": 1}, TEXT),
    "an all-zero weight": (lambda t: t[UP].zero_(), {}, TEXT),
    "an all-zero input": (lambda t: t[NORM].zero_(), {}, TEXT),
    "huge outliers in a weight": (lambda t: t[UP][3, :2].fill_(1e4), {}, TEXT),
    "huge outliers in an input": (lambda t: t[NORM][3].fill_(1e4), {}, TEXT),
    "float16, inputs whose squares overflow": (lambda t: t[NORM].fill_(200.0), {"dtype": "float16"}, TEXT),
}


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("case", HARD)
def test_hard_numbers_end_in_a_correct_result(case, method, tiny_model, text, tmp_path):
    change, options, words = HARD[case]
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), model)
    edited(change)(model)
    text.write_text(words)
    report = quantize(model, out, Recipe(method=method, spec=RECIPE.spec), few(text, **options))
    assert not report.incidents
    assert all(linear.error <= linear.rtn_error * 1.001 for linear in report.linears), report.linears
    assert verify_files(out) == []
    with torch.no_grad():
        assert torch.isfinite(
            load(out, device="cpu", dtype="float32", backend="torch")(torch.arange(3, 40)[None]).logits
        ).all()


def test_nan_in_an_activation_names_block_module_and_sample(tiny_model, text, tmp_path):
    """The inputs of gate and up are too large to be squared; their product is too large to be a number."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    edited(lambda t: t[NORM].fill_(1e25))(model)
    with pytest.raises(
        UserError,
        match=r"block 1: NaN or inf in the input of 'mlp.down_proj' of the quantized network, in .* sample 0",
    ):
        quantize(model, tmp_path / "out", RECIPE, few(text))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("damage", [float("inf"), float("nan")])
def test_a_hessian_that_is_not_finite_is_told_and_the_weight_rounded_to_nearest(damage, method):
    statistics = InputStatistics(64, torch.device("cpu"))
    statistics.add(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)))
    statistics._hessian_KK[3, 3] = damage
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(group_size=32)
    solved = solve_stage({"a": weight}, {"a": spec}, statistics, Recipe(method=method), Stored(torch.float16))["a"]
    assert "rounded to nearest" in solved.incidents[0]
    assert torch.isfinite(solved.weight.dequantize()).all()
    assert (solved.weight.dequantize() - weight).abs().max() < 0.3
    assert solved.error == solved.rtn_error < 0.02
