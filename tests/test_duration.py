"""The estimated duration of a run, from timings of shapes, without reading weights."""

from __future__ import annotations

from itertools import count

import pytest

from llmquant.estimates import duration
from llmquant.estimates.duration import estimate_duration
from llmquant.pipeline.quantize import dry_run
from llmquant.spec import EFFORTS, Options, QuantSpec, Recipe

pytestmark = pytest.mark.slow

GROUP_32 = QuantSpec(group_size=32)


@pytest.fixture
def plan_of(tiny_model, tmp_path, monkeypatch):
    """(recipe, options) -> plan; every timed step takes one second."""
    ticks = count()
    monkeypatch.setattr(duration, "perf_counter", lambda: float(next(ticks)))

    def plan(recipe=None, **options):
        recipe = recipe or Recipe(spec=GROUP_32)
        return dry_run(tiny_model("llama"), tmp_path / "out", recipe, Options(calibration="python-docs", **options))

    return plan


def test_twice_the_samples_double_statistics_and_forward_passes_but_not_solving(plan_of):
    few, many = (estimate_duration(plan_of(num_samples=samples, seq_len=64)).steps for samples in (16, 32))
    for step in ("statistics", "forward"):
        assert many[step] == pytest.approx(2 * few[step]), step
    assert many["solving"] == few["solving"] > 0
    assert many["hashing"] == few["hashing"] > 0


def test_a_run_without_data_has_no_forward_passes_before_its_verification(plan_of):
    steps = estimate_duration(plan_of(Recipe(method="rtn", spec=GROUP_32))).steps
    assert steps["forward"] == 0 and steps["solving"] > 0 and steps["verifying"] > 0
    assert "verifying" not in estimate_duration(plan_of(Recipe(method="rtn", spec=GROUP_32), verify=False)).steps


def test_each_effort_has_the_steps_that_it_runs(plan_of):
    fast, default, best = (
        estimate_duration(plan_of(Recipe(spec=GROUP_32, **EFFORTS[effort]), num_samples=16, seq_len=64)).steps
        for effort in ("fast", "default", "best")
    )
    # The default runs the original model beside the quantized one.
    assert default["forward"] == pytest.approx(2 * fast["forward"])
    assert not {"outputs", "gradients"} & fast.keys()
    assert default["outputs"] > 0 and best["gradients"] > 0
    assert best.keys() & {"outputs"} == set()


def test_a_linear_wider_than_the_timed_width_is_scaled_by_its_width(tiny_model, tmp_path, monkeypatch):
    ticks = count()
    monkeypatch.setattr(duration, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(duration, "MAX_COLUMNS", 64)
    options = Options(calibration="python-docs", num_samples=16, seq_len=64, verify=False)

    def steps(width):
        model = tiny_model("llama", intermediate_size=width)
        skip = ("*.self_attn.*", "*.gate_proj", "*.up_proj")
        return estimate_duration(dry_run(model, tmp_path / "out", Recipe(spec=GROUP_32, skip=skip), options)).steps

    # Only down_proj is left: its inputs are twice as many, its outputs the same.
    narrow, wide = steps(64), steps(128)
    assert wide["statistics"] == pytest.approx(4 * narrow["statistics"])
    assert wide["forward"] == pytest.approx(2 * narrow["forward"])
    assert 2 * narrow["solving"] <= wide["solving"] <= 8 * narrow["solving"]
