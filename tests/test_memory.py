"""A run keeps to the memory that it is given: what does not fit goes to the disk, and changes no byte of the result."""

from __future__ import annotations

import json

import pytest
import torch
from commands import command
from faults import contents

from llmquant.errors import UserError
from llmquant.models.spill import Kept, Spill
from llmquant.pipeline import loop
from llmquant.pipeline import quantize as pipeline
from llmquant.pipeline.footprint import Footprint
from llmquant.spec import Options, QuantSpec, Recipe, parse_size

TEXT = " ".join(f"It was a dark and stormy night, the {number}th in a row." for number in range(60))


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a report take longer than all else about a tiny model."""
    monkeypatch.setattr(pipeline, "write_page", lambda report, file: None)


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
        footprint = Footprint(
            runtime_bytes=1,
            work_bytes=1,
            activation_bytes=10**9,
            moments={},
            past_bytes=0,
            limit_bytes=2 + budget_bytes,
        )
        monkeypatch.setattr(loop, "footprint_of", lambda plan, footprint=footprint: footprint)
        out = tmp_path / f"out-{budget_bytes}"
        report = pipeline.quantize(model, out, recipe, few)
        assert contents(out) == contents(tmp_path / "whole")
        assert any("on the disk" in remark.what for remark in report.remarks)
        assert not report.incidents
    assert spills[0].spilled_bytes > spills[1].spilled_bytes > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out-0", "out-150000", "text.txt", "whole"]


def test_what_waits_is_emptied_and_comes_back_when_it_is_read(tmp_path):
    spill, kept = Spill(tmp_path / "scratch", budget_bytes=10_000), Kept()
    weight = torch.arange(4000.0)
    with spill.running(kept):
        base = weight * 2
        view, of_weight = base.view(40, 100)[3:], weight[10:]
        gone = base + 1
        del gone
    spill.settle(kept)
    assert base.untyped_storage().nbytes() == 0, "and so is the view, which shares it"
    assert of_weight.untyped_storage().nbytes() == 16_000, "a weight is not the sequence's own"
    (file,) = (tmp_path / "scratch").iterdir()
    assert file.stat().st_size == 16_000
    with spill.running(None):
        assert view.sum().item() == (weight * 2).view(40, 100)[3:].sum().item()
    assert torch.equal(base, weight * 2)
    assert not list((tmp_path / "scratch").iterdir())
    spill.settle(kept)
    del base, view
    spill.settle(kept)
    assert not list((tmp_path / "scratch").iterdir()), "what nobody holds any more leaves the disk"
    spill.close()
    assert not (tmp_path / "scratch").exists()


def test_what_fits_stays(tmp_path):
    spill, first, second = Spill(tmp_path / "scratch", budget_bytes=20_000), Kept(), Kept()
    made = {}
    for name, owner in (("first", first), ("second", second)):
        with spill.running(owner):
            made[name] = torch.ones(4000) * 3
        spill.settle(owner)
    assert [tensor.untyped_storage().nbytes() for tensor in made.values()] == [16_000, 0]


def test_what_comes_before_and_after_takes_memory_of_its_own():
    small, large = (
        Footprint(
            runtime_bytes=100,
            work_bytes=50,
            activation_bytes=200,
            moments={"measuring": 90, "comparing": moment_bytes},
            past_bytes=0,
            limit_bytes=300,
        )
        for moment_bytes in (180, 320)
    )
    assert (small.budget_bytes, small.spilled_bytes, small.peak_bytes) == (150, 50, 300)
    small.check()
    assert (large.budget_bytes, large.peak_bytes) == (150, 420)
    with pytest.raises(UserError, match="comparing would take"):
        large.check()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_run_that_cannot_fit_is_refused_with_what_it_needs(dry, tiny_model, tmp_path, monkeypatch, capsys):
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
    capsys.readouterr()  # making a model writes there, too
    assert command(monkeypatch, *arguments, "--max-memory", "100MB") == 2
    error = capsys.readouterr().err
    assert "max_memory 0.10 GB" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert command(monkeypatch, *arguments, "--max-memory", error.split("--max-memory ")[1].strip()) == 0


def test_dry_run_tells_the_memory(tiny_model, tmp_path, monkeypatch, capsys):
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
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(UserError, match=r"max_memory '.*': not a size"):
        parse_size(text, "max_memory")
