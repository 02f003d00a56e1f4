"""A run keeps to its memory limit: activations that do not fit go to the disk, and no byte of the result changes."""

from __future__ import annotations

import json

import pytest
import torch
from commands import command
from folders import artifact_bytes

from llmquant.errors import UserError
from llmquant.estimates.memory import MemoryEstimate
from llmquant.models.blockwise_forward import BlockwiseForward
from llmquant.models.spill import OwnedStorages, Spill
from llmquant.pipeline import block_loop as loop
from llmquant.pipeline import quantize as pipeline
from llmquant.planning.plan import make_plan
from llmquant.spec import Options, QuantSpec, Recipe, parse_size

TEXT = " ".join(f"It was a dark and stormy night, the {number}th in a row." for number in range(60))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "method"), [("llama", "gptq"), ("llama", "awq+gptq"), ("gemma2", "gptq"), ("falcon", "awq")]
)
def test_activations_on_the_disk_change_no_byte(architecture, method, tiny_model, tmp_path, monkeypatch):
    model, recipe = tiny_model(architecture), Recipe(method=method, spec=QuantSpec(group_size=32))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    few = Options(calibration=str(text), num_samples=6, seq_len=32, verify=False)
    pipeline.quantize(model, tmp_path / "whole", recipe, few)
    spills = []
    monkeypatch.setattr(loop, "Spill", lambda *arguments: spills.append(Spill(*arguments)) or spills[-1])
    for budget_bytes in (0, 150_000):
        estimate = MemoryEstimate(
            runtime_bytes=1,
            work_bytes=1,
            activation_bytes=10**9,
            other_phases={},
            peak_so_far_bytes=0,
            limit_bytes=2 + budget_bytes,
        )
        monkeypatch.setattr(loop, "estimate_memory", lambda plan, estimate=estimate: estimate)
        out = tmp_path / f"out-{budget_bytes}"
        report = pipeline.quantize(model, out, recipe, few)
        assert artifact_bytes(out) == artifact_bytes(tmp_path / "whole")
        assert any("written to disk" in note.what for note in report.notes)
        assert not report.fallbacks
    assert spills[0].spilled_bytes > spills[1].spilled_bytes > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out-0", "out-150000", "text.txt", "whole"]


def test_inputs_of_the_first_block_are_spilled(tiny_model, tmp_path):
    plan = make_plan(tiny_model("llama"), Recipe(method="rtn", spec=QuantSpec(group_size=32)), Options())
    spill = Spill(tmp_path / "scratch", budget_bytes=0)
    tokens_SL = torch.arange(4 * 32).view(4, 32) % 100
    with torch.no_grad(), BlockwiseForward(plan.skeleton, tokens_SL, with_original=False, spill=spill) as forward:
        forward.enter(0)
        assert spill.spilled_bytes > 0
        forward.leave(0)


def test_spilled_tensors_are_emptied_and_restored_when_they_are_read(tmp_path):
    spill, kept = Spill(tmp_path / "scratch", budget_bytes=10_000), OwnedStorages()
    weight = torch.arange(4000.0)
    with spill.computing_for(kept):
        base = weight * 2
        view, of_weight = base.view(40, 100)[3:], weight[10:]
        gone = base + 1
        del gone
    spill.evict_if_over_budget(kept)
    assert base.untyped_storage().nbytes() == 0, "the view, which shares the storage, is emptied too"
    assert of_weight.untyped_storage().nbytes() == 16_000, "a weight does not belong to the sequence"
    (file,) = (tmp_path / "scratch").iterdir()
    assert file.stat().st_size == 16_000
    with spill.computing_for(None):
        assert view.sum().item() == (weight * 2).view(40, 100)[3:].sum().item()
    assert torch.equal(base, weight * 2)
    assert not list((tmp_path / "scratch").iterdir())
    spill.evict_if_over_budget(kept)
    del base, view
    spill.evict_if_over_budget(kept)
    assert not list((tmp_path / "scratch").iterdir()), "a tensor without references is deleted from the disk"
    spill.close()
    assert not (tmp_path / "scratch").exists()


def test_tensors_within_the_budget_stay_in_memory(tmp_path):
    spill, first, second = Spill(tmp_path / "scratch", budget_bytes=20_000), OwnedStorages(), OwnedStorages()
    made = {}
    for name, owner in (("first", first), ("second", second)):
        with spill.computing_for(owner):
            made[name] = torch.ones(4000) * 3
        spill.evict_if_over_budget(owner)
    assert [tensor.untyped_storage().nbytes() for tensor in made.values()] == [16_000, 0]


def test_other_phases_count_without_the_activations():
    small, large = (
        MemoryEstimate(
            runtime_bytes=100,
            work_bytes=50,
            activation_bytes=200,
            other_phases={"measuring": 90, "comparing": moment_bytes},
            peak_so_far_bytes=0,
            limit_bytes=300,
        )
        for moment_bytes in (180, 320)
    )
    assert (small.budget_bytes, small.spilled_bytes, small.peak_bytes) == (150, 50, 300)
    small.check_limit()
    assert (large.budget_bytes, large.peak_bytes) == (150, 420)
    with pytest.raises(UserError, match="comparing would take"):
        large.check_limit()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_run_that_cannot_fit_is_refused_with_the_limit_it_needs(dry, tiny_model, tmp_path, monkeypatch, capsys):
    arguments = [
        "quantize",
        tiny_model("llama"),
        tmp_path / "out",
        "--method",
        "rtn",
        "--group-size",
        "32",
        "--no-verify",
        *dry,
    ]
    capsys.readouterr()  # creating the model also writes to stderr
    assert command(monkeypatch, *arguments, "--max-memory", "100MB") == 2
    error = capsys.readouterr().err
    assert "max_memory 0.10 GB" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert command(monkeypatch, *arguments, "--max-memory", error.split("--max-memory ")[1].strip()) == 0


def test_dry_run_prints_the_estimated_memory(tiny_model, tmp_path, monkeypatch, capsys):
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--group-size", "32"]
    assert command(monkeypatch, *arguments, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak_bytes"] > 100e6
    assert plan["spilled_bytes"] == 0


@pytest.mark.parametrize(
    ("text", "size"), [("3GB", 3 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8), ("1000", 1000), ("7 B", 7)]
)
def test_sizes_are_numbers_with_a_unit(text, size):
    assert parse_size(text, "max_memory") == size


@pytest.mark.parametrize("text", ["", "GB", "3XB", "-1GB", "nan", "inf GB", "1e999", "1 2 GB"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(UserError, match=r"max_memory '.*': not a size"):
        parse_size(text, "max_memory")
