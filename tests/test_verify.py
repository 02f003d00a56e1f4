"""The verdict: what is measured on held-out text is what whole models say, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from commands import command
from folders import assert_same_bytes
from manual import short_manual
from test_quantize import dequantized
from tiny_models import ARCHITECTURES, MAX_POSITIONS
from transformers import AutoModelForCausalLM

from llmquant.algorithms.affine import round_to_nearest
from llmquant.checkpoints.manifest import REPORT_JSON
from llmquant.eval.divergence import divergence
from llmquant.hub import load_tokenizer
from llmquant.models.walk import Walk
from llmquant.pipeline import loop, solve
from llmquant.pipeline import quantize as pipeline
from llmquant.pipeline.calibration import MAX_HELD_OUT, MIN_HELD_OUT, calibration_tokens, num_held_out
from llmquant.pipeline.quantize import prepare, quantize
from llmquant.pipeline.verify import BROKEN, GOOD, WORDS, HeldOut, held_out, judge, verify_text
from llmquant.spec import Options, QuantSpec, Recipe
from llmquant.textdata import load_rows

RTN = Recipe(method="rtn", spec=QuantSpec(bits=3, group_size=32))
FEW = Options(calibration="python-docs", num_samples=4, seq_len=32)


@pytest.fixture(autouse=True, scope="module")
def manual():
    """Every run here reads it."""
    with short_manual():
        yield


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    """Continuing prompts is tested with the report."""
    monkeypatch.setattr(pipeline, "samples", lambda folder, plan: ((), "not in this test"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_measured_block_by_block_is_what_whole_models_say(architecture, tiny_model, tmp_path):
    path, out = tiny_model(architecture), tmp_path / "out"
    quantize(path, out, RTN, Options(verify=False))
    windows = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    plan = prepare(path, tmp_path / "other", RTN, Options())
    ours = verify_text(out, plan, HeldOut(tokens_WL=windows, source="numbers"))
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    whole = divergence(dequantized(path, out), original, windows)
    assert ours.kl_mean == pytest.approx(whole.kl_mean, rel=1e-3, abs=1e-6)
    assert ours.kl_p99 == pytest.approx(whole.kl_p99, rel=1e-3, abs=1e-6)
    assert ours.top1_agreement == pytest.approx(whole.top1_agreement)
    assert ours.perplexity == pytest.approx(whole.model.perplexity, rel=1e-4)
    assert ours.original_perplexity == pytest.approx(whole.reference.perplexity, rel=1e-4)
    assert (ours.num_windows, ours.seq_len, ours.num_tokens) == (2, 20, 38)
    assert len(ours.drift) == len(plan.block_names) and all(distance > 0 for distance in ours.drift)
    assert all(parameter.is_meta for parameter in plan.skeleton.model.parameters()), "no weight is left behind"


@pytest.mark.parametrize(
    ("kl", "growth", "verdict"),
    [
        (0.0, -0.1, "good"),
        (0.13, 0.13, "good"),
        (0.15, 0.0, "worth a look"),
        (0.0, 0.15, "worth a look"),
        (0.69, 0.5, "worth a look"),
        (0.70, 0.0, "broken"),
        (0.1, 0.70, "broken"),
        (0.1, 1e6, "broken"),
    ],
)
def test_verdict_follows_the_worse_of_both_factors(kl, growth, verdict):
    word, reason = judge(kl, growth)
    assert word == verdict and word in WORDS
    assert "times the original's" in reason


def test_thresholds_are_those_of_the_readme():
    from paths import ROOT

    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"at most {GOOD} times" in text and f"{BROKEN:g} times or more" in text


# --- the text --------------------------------------------------------------------------------------------------------


def test_held_out_windows_are_the_next_of_the_draw(tiny_model):
    tokenizer = load_tokenizer(tiny_model("llama"))
    few = calibration_tokens(tokenizer, "python-docs", 64, 16)
    more = calibration_tokens(tokenizer, "python-docs", 64 + num_held_out(64), 16)
    assert few.held_out_WL.shape == (num_held_out(64), 16)
    assert torch.equal(torch.cat([few.tokens_SL, few.held_out_WL]), more.tokens_SL)
    assert "held_out_WL" not in few.audit()


@pytest.mark.parametrize(("samples", "windows"), [(1, MIN_HELD_OUT), (128, 4), (10_000, MAX_HELD_OUT)])
def test_a_few_windows_are_held_out_whatever_the_number_of_samples(samples, windows):
    assert num_held_out(samples) == windows


def text_of(tokenizer, num_tokens, path):
    """A file of that many tokens and a bit."""
    ids = tokenizer(load_rows("python-docs").text, add_special_tokens=False, verbose=False)["input_ids"]
    path.write_text(tokenizer.decode(ids[:num_tokens]), newline="")
    return path


def test_text_that_calibration_uses_up_is_told_and_another_is_taken(tiny_model, tmp_path):
    path = tiny_model("llama")
    text = text_of(load_tokenizer(path), 4 * 32 + 5, tmp_path / "text.txt")
    report = quantize(path, tmp_path / "out", Recipe(spec=RTN.spec), replace(FEW, calibration=str(text)))
    assert report.verification.source == "python-docs"
    assert report.verification.kl_mean > 0
    assert [remark.what for remark in report.remarks if remark.where != "calibration"] == [
        f"measured on python-docs: calibration leaves no window of {text} over"
    ]
    assert not report.incidents


def test_without_any_text_left_nothing_is_measured_and_that_is_an_incident(tiny_model, tmp_path, monkeypatch):
    path = tiny_model("llama")
    plan = prepare(path, tmp_path / "out", Recipe(), FEW)
    tokens = calibration_tokens(load_tokenizer(path), "python-docs", 4, 32)
    used_up = replace(tokens, held_out_WL=tokens.held_out_WL[:0])
    monkeypatch.setattr(pipeline, "draw_tokens", lambda plan: used_up)
    report = quantize(path, tmp_path / "out", Recipe(spec=RTN.spec), FEW)
    assert report.verification.verdict == "not measured"
    assert [incident.where for incident in report.incidents] == ["verification"]
    assert held_out(plan, tokens).source == "python-docs"


def test_model_that_cannot_be_run_is_still_quantized_and_the_gap_is_told(tiny_model, tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(pipeline, "verify_text", fails)
    report = quantize(tiny_model("llama"), tmp_path / "out", RTN)
    assert (report.verification.verdict, report.verification.reason) == ("not measured", "out of memory")
    assert [incident.what for incident in report.incidents] == ["not measured on text: out of memory"]


def test_rounding_without_data_is_measured_on_pythons_manual(tiny_model, tmp_path):
    path = tiny_model("llama")
    report = quantize(path, tmp_path / "out", RTN)
    measured = report.verification
    assert (measured.source, measured.num_windows, measured.seq_len) == ("python-docs", MIN_HELD_OUT, MAX_POSITIONS)
    assert report.calibration is None


def test_model_without_a_tokenizer_is_still_rounded_and_the_gap_is_told(tiny_model, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model("llama").iterdir():
        if not file.name.startswith("tokenizer"):
            (model / file.name).write_bytes(file.read_bytes())
    report = quantize(model, tmp_path / "out", RTN)
    assert report.verification.verdict == "not measured"
    assert "its tokenizer cannot be loaded" in report.incidents[0].what


# --- what follows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "reason"), [(30.0, "times the original's"), (3e38, "not finite")])
def test_broken_result_is_there_and_ends_with_exit_code_1(factor, reason, tiny_model, tmp_path, monkeypatch, capsys):
    def ruined(weight_NK, spec, scale_dtype, min_zero=0):
        weight = round_to_nearest(weight_NK, spec, torch.float32, min_zero)
        return replace(weight, scale_NG=weight.scale_NG * factor)

    monkeypatch.setattr(solve, "round_to_nearest", ruined)
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--group-size", "32"]
    arguments += ["--format", "compressed-tensors", "--quiet"]
    assert command(monkeypatch, *arguments) == 1
    streams = capsys.readouterr()
    assert streams.out.splitlines()[-1].startswith("broken: ")
    assert streams.err == "llmquant: the result is broken, see the verdict\n"
    stored = json.loads((tmp_path / "out" / REPORT_JSON).read_text())["verification"]
    assert stored["verdict"] == "broken" and reason in stored["reason"]


def test_last_line_is_the_verdict(tiny_model, tmp_path, monkeypatch, capsys):
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--group-size", "32", "--quiet"]
    assert command(monkeypatch, *arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    measured = json.loads((tmp_path / "out" / REPORT_JSON).read_text())["verification"]
    assert last.startswith(f"{measured['verdict']}: perplexity {measured['perplexity']:.2f}, original ")
    assert f"KL {measured['kl_mean']:.4f}" in last
    assert last.endswith(f"on {measured['num_tokens']} held-out tokens of python-docs")


def test_run_that_died_while_it_was_verified_is_continued_and_verification_changes_no_byte(
    tiny_model, tmp_path, monkeypatch
):
    path, recipe = tiny_model("llama"), Recipe(spec=RTN.spec)

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "verify_text", die)
        with pytest.raises(KeyboardInterrupt):
            quantize(path, tmp_path / "out", recipe, FEW)
    assert not (tmp_path / "out").exists()
    solved = []
    monkeypatch.setattr(loop, "quantize_block", lambda *arguments: solved.append(arguments))
    continued = quantize(path, tmp_path / "out", recipe, FEW)
    assert not solved, "no block is made again"
    assert continued.verification.kl_mean > 0
    monkeypatch.undo()

    walks = []
    start = Walk.__init__
    monkeypatch.setattr(Walk, "__init__", lambda self, *a, **k: (walks.append(k), start(self, *a, **k))[1])
    whole = quantize(path, tmp_path / "whole", recipe, replace(FEW, verify=False))
    assert whole.verification.verdict == "not measured"
    assert [walk["with_original"] for walk in walks] == [True], "the text is not read for a verdict that nobody wants"
    assert_same_bytes(tmp_path / "whole", tmp_path / "out")
    assert continued.linears == whole.linears
