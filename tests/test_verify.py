"""The verdict: what is measured on held-out text is what whole models say, and what follows from it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from commands import command
from dequantized_models import dequantized
from folders import assert_same_bytes
from short_text import short_manual
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from llmquant.algorithms.grid import round_to_nearest
from llmquant.checkpoints.manifest import REPORT_JSON
from llmquant.data.calibration import MAX_HELD_OUT, MIN_HELD_OUT, calibration_tokens, num_held_out
from llmquant.data.sources import load_rows
from llmquant.data.tokens import token_ids
from llmquant.errors import UserError
from llmquant.eval.divergence import divergence
from llmquant.hub import load_tokenizer
from llmquant.models.blockwise_forward import BlockwiseForward
from llmquant.pipeline import block_loop as loop
from llmquant.pipeline import finish
from llmquant.pipeline import verify as verify_module
from llmquant.pipeline.next_steps import next_steps
from llmquant.pipeline.quantize import checked_plan, quantize
from llmquant.pipeline.verify import verify_texts, within_time_limit
from llmquant.planning.held_out import (
    FIXED_SOURCE,
    MIN_TOKENS,
    WINDOW_TOKENS,
    HeldOutText,
    evenly_spaced,
    fixed_text,
    held_out_texts,
    num_windows,
    read_fixed_text,
)
from llmquant.report.schema import SampleTexts
from llmquant.report.verdict import (
    BANDS,
    BROKEN,
    GOOD,
    NOT_MEASURED,
    SLIGHT,
    Measurement,
    Verification,
    band_of,
    judge,
)
from llmquant.solver import quantize_linear
from llmquant.spec import EFFORTS, Options, QuantSpec, Recipe

RTN = Recipe(method="rtn", spec=QuantSpec(bits=3, group_size=32))
FEW = Options(calibration="python-docs", num_samples=4, seq_len=32)
TINY_WINDOW = 192
"""Of the tiny models, whose context is 256: the largest multiple of 64 that leaves 8 positions free."""

pytestmark = pytest.mark.full_held_out_text


@pytest.fixture(autouse=True, scope="module")
def manual():
    """Every run here reads it."""
    with short_manual():
        yield


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    """Continuing prompts is tested with the report."""
    monkeypatch.setattr(finish, "generate_sample_texts", lambda folder, plan: SampleTexts(note="not in this test"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_measured_block_by_block_is_what_whole_models_say(architecture, tiny_model, tmp_path):
    path, out = tiny_model(architecture), tmp_path / "out"
    quantize(path, out, RTN, Options(verify=False))
    windows = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    other = torch.randint(3, 500, (3, 9), generator=torch.Generator().manual_seed(1))
    plan = checked_plan(path, tmp_path / "other", RTN, Options())
    texts = [
        HeldOutText(tokens_WL=windows, source="numbers"),
        HeldOutText(tokens_WL=other, source="more", openings=tuple("abc")),
    ]
    found = verify_texts(out, plan, texts)
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    quantized = dequantized(path, out)
    for ours, text in zip(found.texts, texts, strict=True):
        whole = divergence(quantized, original, text.tokens_WL)
        assert ours.kl_mean == pytest.approx(whole.kl_mean, rel=1e-3, abs=1e-6)
        assert ours.kl_p99 == pytest.approx(whole.kl_p99, rel=1e-3, abs=1e-6)
        assert ours.changed_share == pytest.approx(1 - whole.top1_agreement)
        assert ours.perplexity == pytest.approx(whole.model.perplexity, rel=1e-4)
        assert ours.original_perplexity == pytest.approx(whole.reference.perplexity, rel=1e-4)
        assert ours.ratio == pytest.approx(whole.model.perplexity / whole.reference.perplexity, rel=1e-4)
        by_window = [divergence(quantized, original, window_L[None]) for window_L in text.tokens_WL]
        growth = [each.model.perplexity / each.reference.perplexity for each in by_window]
        assert ours.worst_ratio == pytest.approx(max(growth), rel=1e-4)
        assert growth[ours.worst_window] == max(growth)
    assert (found.texts[0].num_windows, found.texts[0].seq_len, found.texts[0].num_tokens) == (2, 20, 38)
    assert (found.texts[0].worst_opening, found.texts[1].worst_opening) == ("", "abc"[found.texts[1].worst_window])
    assert len(found.drift) == len(plan.block_names) and all(distance > 0 for distance in found.drift)
    assert all(parameter.is_meta for parameter in plan.skeleton.model.parameters()), "no weight is left behind"


# --- the verdict -----------------------------------------------------------------------------------------------------


def measurement(ratio, kl=0.0, spread=0.0, source=FIXED_SOURCE):
    """A text where perplexity grew by that factor, give or take `spread`, at that divergence."""
    return Measurement(
        source=source,
        num_windows=9,
        seq_len=512,
        num_tokens=4599,
        perplexity=10.0 * ratio,
        original_perplexity=10.0,
        ratio=ratio,
        ratio_interval=(ratio - spread, ratio + spread),
        kl_mean=kl,
        kl_interval=(kl, kl),
        kl_p99=kl,
        changed_share=0.125,
        worst_window=1,
        worst_ratio=2 * ratio,
        worst_opening="Der Bahnhof",
    )


@pytest.mark.parametrize(
    ("ratio", "kl", "verdict"),
    [
        (0.9, 0.0, "good"),
        (GOOD, 0.0, "good"),
        (1.0, math.log(GOOD) + 1e-6, "slight loss"),
        (GOOD + 1e-6, 0.0, "slight loss"),
        (SLIGHT, math.log(SLIGHT) - 1e-6, "slight loss"),
        (SLIGHT + 1e-6, 0.0, "clear loss"),
        (1.0, math.log(BROKEN) - 1e-6, "clear loss"),
        (1.0, math.log(BROKEN) + 1e-6, "broken"),
        (BROKEN, 0.0, "broken"),
        (1e9, 1e6, "broken"),
    ],
)
def test_verdict_follows_the_worse_of_both_factors(ratio, kl, verdict):
    found = judge([measurement(ratio, kl)])
    assert found.verdict == verdict and found.verdict in BANDS and found.may_be == ""
    assert "times the original's" in found.reason


def test_verdict_says_which_worse_band_the_interval_reaches_into():
    assert judge([measurement(GOOD - 0.01, spread=0.005)]).may_be == ""
    assert judge([measurement(GOOD - 0.01, spread=0.02)]).may_be == "slight loss"
    assert judge([measurement(GOOD - 0.01, spread=0.5)]).may_be == "clear loss"
    assert judge([measurement(SLIGHT + 0.01, spread=0.1)]).may_be == "", "a better band is not promised"


def test_calibration_text_makes_a_verdict_worse_only_where_it_is_certain():
    fixed = measurement(1.02)
    for other, verdict, decided_by in [
        (measurement(1.5, spread=0.1, source="a.txt"), "clear loss", 1),
        (measurement(1.5, spread=0.3, source="a.txt"), "clear loss", 1),
        (measurement(1.5, spread=0.48, source="a.txt"), "good", 0),
        (replace(measurement(9.0, source="a.txt"), ratio_interval=None, kl_interval=None), "good", 0),
        (measurement(0.9, source="a.txt"), "good", 0),
    ]:
        found = judge([fixed, other])
        assert (found.verdict, found.decided_by) == (verdict, decided_by)
        assert f"tokens of {(fixed, other)[decided_by].source}" in found.reason
    better = judge([measurement(5.0), measurement(1.0, source="a.txt")])
    assert (better.verdict, better.decided_by) == ("broken", 0)


def test_reason_has_every_number_in_plain_words():
    assert judge([measurement(1.2, kl=0.1, spread=0.04)]).reason == (
        "perplexity 1.200 times the original's (95 % interval 1.160 to 1.240), "
        "KL divergence 0.1000 (a factor of 1.105), top-1 token changed at 12.5% of tokens, "
        "worst of 9 windows 2.400 times (“Der Bahnhof …”); on 4,599 tokens of llmquant's held-out text"
    )


def test_thresholds_are_those_of_the_guide():
    from paths import ROOT

    text = " ".join((ROOT / "llmquant" / "pipeline" / "README.md").read_text().split())
    for words in (
        f"| good | at most {GOOD} |",
        f"at most {SLIGHT} |",
        f"less than {BROKEN:g} |",
        f"{BROKEN:g} or more",
    ):
        assert words in text, words
    assert [band_of(factor) for factor in (1, 1.2, 1.5, 5)] == list(BANDS)


# --- the text --------------------------------------------------------------------------------------------------------


def test_held_out_windows_are_the_next_of_the_draw(tiny_model):
    tokenizer = load_tokenizer(tiny_model("llama"))
    few = calibration_tokens(tokenizer, "python-docs", 64, 16)
    more = calibration_tokens(tokenizer, "python-docs", 64 + num_held_out(64), 16)
    assert few.held_out_WL.shape == (num_held_out(64), 16)
    assert torch.equal(torch.cat([few.tokens_SL, few.held_out_WL]), more.tokens_SL)
    assert "held_out_WL" not in few.summary()


@pytest.mark.parametrize(("samples", "windows"), [(1, MIN_HELD_OUT), (128, 4), (10_000, MAX_HELD_OUT)])
def test_a_few_windows_are_held_out_whatever_the_number_of_samples(samples, windows):
    assert num_held_out(samples) == windows


def text_of(tokenizer, num_tokens, path):
    """A file of that many tokens and a bit."""
    ids = tokenizer(load_rows("python-docs").text, add_special_tokens=False, verbose=False)["input_ids"]
    path.write_text(tokenizer.decode(ids[:num_tokens]), newline="")
    return path


@pytest.mark.slow
def test_without_windows_left_the_fixed_text_alone_is_measured(tiny_model, tmp_path):
    path = tiny_model("llama")
    text = text_of(load_tokenizer(path), 4 * 32 + 5, tmp_path / "text.txt")
    report = quantize(path, tmp_path / "out", Recipe(spec=RTN.spec), replace(FEW, calibration=str(text)))
    assert [measured.source for measured in report.verification.texts] == [FIXED_SOURCE]
    assert report.verification.texts[0].kl_mean > 0
    assert not report.fallbacks


@pytest.mark.slow
def test_windows_that_calibration_left_are_measured_beside_the_fixed_text(tiny_model, tmp_path):
    report = quantize(tiny_model("llama"), tmp_path / "out", Recipe(spec=RTN.spec), FEW)
    fixed, own = report.verification.texts
    assert (fixed.source, own.source) == (FIXED_SOURCE, "python-docs")
    assert (own.num_windows, own.seq_len, own.num_tokens) == (MIN_HELD_OUT, 32, MIN_HELD_OUT * 31)
    assert fixed.num_tokens >= MIN_TOKENS
    assert fixed.worst_opening and not own.worst_opening, "the user's text is not quoted"


@pytest.mark.slow
def test_fixed_text_is_the_same_for_every_recipe_and_seed(tiny_model, tmp_path):
    path = tiny_model("llama")
    one = fixed_text(checked_plan(path, tmp_path / "out", RTN, Options()))
    other = fixed_text(checked_plan(path, tmp_path / "out", Recipe(), replace(FEW, seed=7, seq_len=64)))
    assert torch.equal(one.tokens_WL, other.tokens_WL) and one.openings == other.openings
    num, seq_len = one.tokens_WL.shape
    assert seq_len == TINY_WINDOW and num == num_windows(seq_len) == len(set(one.openings))
    assert num * (seq_len - 1) >= MIN_TOKENS > (num - 1) * (seq_len - 1)
    tokenizer = load_tokenizer(path)
    words = " ".join(read_fixed_text().split())
    assert all(
        " ".join(tokenizer.decode(window_L[2:-2]).strip("\ufffd").split())[:200] in words for window_L in one.tokens_WL
    )


def test_fixed_text_is_long_enough_for_a_tokenizer_with_a_large_vocabulary():
    """A model of one: a token is a word with the space in front of it, up to three digits, a run of signs, or two
    characters of Chinese or Japanese. Real ones make more."""
    text = read_fixed_text()
    pattern = r" ?[^\W\d_\u3000-\u9fff]+|\d{1,3}|[\u3000-\u9fff]{1,2}|[ \t]*[^\w\s]+\n*|\s+"
    num_tokens = len(re.findall(pattern, text))
    assert num_tokens >= num_windows(WINDOW_TOKENS) * WINDOW_TOKENS


def test_windows_are_spread_evenly():
    assert evenly_spaced(9, 9) == evenly_spaced(9, 20) == list(range(9))
    assert evenly_spaced(9, 3) == [0, 3, 6] and evenly_spaced(15, 9)[-1] == 13 and evenly_spaced(5, 1) == [0]


@pytest.mark.slow
def test_windows_are_left_out_only_where_all_would_take_long_and_that_is_said(tiny_model, tmp_path, monkeypatch):
    path = tiny_model("llama")
    plan = checked_plan(path, tmp_path / "out", Recipe(), FEW)
    texts = held_out_texts(plan, calibration_tokens(load_tokenizer(path), "python-docs", 128, 32))
    num_tokens = sum(text.tokens_WL.numel() for text in texts)
    for seconds, run_seconds, share in [(119, 0, 1), (400, 4000, 1), (480, 0, 0.25), (1000, 2500, 0.25), (1e9, 0, 0)]:
        monkeypatch.setattr(verify_module, "_seconds_per_token", lambda *_, s=seconds: s / num_tokens)
        kept = within_time_limit(plan, texts, run_seconds)
        for text, few in zip(texts, kept, strict=True):
            available = len(text.tokens_WL)
            assert len(few.tokens_WL) == (available if share == 1 else max(int(share * available), 2))
            assert bool(few.note) == (len(few.tokens_WL) < available)
            assert len(few.openings) in (0, len(few.tokens_WL))
    monkeypatch.undo()
    assert 0 < verify_module._seconds_per_token(plan, texts[0].tokens_WL[0]) < 1
    assert all(parameter.is_meta for parameter in plan.skeleton.model.parameters()), "no weight is left behind"
    monkeypatch.setattr(verify_module, "_seconds_per_token", lambda *_: 1e9)
    monkeypatch.setattr(finish, "generate_sample_texts", lambda folder, plan: SampleTexts())
    report = quantize(path, tmp_path / "few", Recipe(spec=RTN.spec), FEW)
    assert [text.num_windows for text in report.verification.texts] == [2, MIN_HELD_OUT]
    available = num_windows(TINY_WINDOW)
    assert f"2 of {available} windows, because all would take about" in report.verification.reason


@pytest.mark.slow
def test_model_that_cannot_be_run_is_still_quantized_with_a_fallback(tiny_model, tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(finish, "verify_texts", fails)
    report = quantize(tiny_model("llama"), tmp_path / "out", RTN)
    assert (report.verification.verdict, report.verification.reason) == ("not measured", "out of memory")
    assert [fallback.what for fallback in report.fallbacks] == ["not measured on text: out of memory"]
    without = Verification(verdict=NOT_MEASURED, reason="the original's own predictions are not finite")
    monkeypatch.setattr(finish, "verify_texts", lambda *_: without)
    report = quantize(tiny_model("llama"), tmp_path / "other", RTN)
    assert [fallback.what for fallback in report.fallbacks] == [f"not measured on text: {without.reason}"]


@pytest.mark.slow
def test_forward_pass_that_ends_before_the_last_block_is_one_line(tiny_model, tmp_path, monkeypatch):
    path = tiny_model("llama")
    forward = modeling_llama.LlamaModel.forward

    def shortened(self, *arguments, **more):
        self.config.num_hidden_layers = 1  # the network has two
        return forward(self, *arguments, **more)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", shortened)
    for recipe in (Recipe(**EFFORTS["fast"], spec=RTN.spec), Recipe(spec=RTN.spec)):
        with pytest.raises(UserError, match="does not reach this decoder block after block 0"):
            quantize(path, tmp_path / "out", recipe, replace(FEW, restart=True))


@pytest.mark.slow
@pytest.mark.parametrize(("known", "said"), [(0.2, None), (0.9, "of them unknown to the tokenizer")])
def test_text_that_the_tokenizer_does_not_know_is_noted_or_not_measured(known, said, tiny_model, tmp_path, monkeypatch):
    path = tiny_model("llama")
    tokenizer = load_tokenizer(path)
    ids = token_ids(tokenizer, read_fixed_text())
    ids[torch.rand(len(ids), generator=torch.Generator().manual_seed(0)) > known] = 7
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(7)
    monkeypatch.setattr("llmquant.planning.held_out.load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr("llmquant.planning.held_out.token_ids", lambda *_: ids)
    report = quantize(path, tmp_path / "out", RTN)
    if said is None:
        assert report.verification.verdict == NOT_MEASURED and "has no tokens for" in report.fallbacks[0].what
    else:
        assert said in report.verification.reason


@pytest.mark.slow
def test_rounding_without_data_is_measured_on_the_fixed_text(tiny_model, tmp_path):
    report = quantize(tiny_model("llama"), tmp_path / "out", RTN)
    (measured,) = report.verification.texts
    assert (measured.source, measured.seq_len) == (FIXED_SOURCE, TINY_WINDOW)
    assert report.calibration is None


@pytest.mark.slow
def test_model_without_a_tokenizer_is_still_rounded_with_a_fallback(tiny_model, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model("llama").iterdir():
        if not file.name.startswith("tokenizer"):
            (model / file.name).write_bytes(file.read_bytes())
    report = quantize(model, tmp_path / "out", RTN)
    assert report.verification.verdict == "not measured"
    assert "its tokenizer cannot be loaded" in report.fallbacks[0].what


# --- what follows ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "reason"), [(30.0, "times the original's"), (3e38, "not finite")])
def test_broken_result_is_there_and_ends_with_exit_code_1(factor, reason, tiny_model, tmp_path, monkeypatch, capsys):
    def ruined(weight_NK, spec, scale_dtype, min_zero=0):
        weight = round_to_nearest(weight_NK, spec, torch.float32, min_zero)
        return replace(weight, scale_NG=weight.scale_NG * factor)

    monkeypatch.setattr(quantize_linear, "round_to_nearest", ruined)
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--group-size", "32"]
    arguments += ["--format", "compressed-tensors", "--override", "lm_head:bits=4", "--quiet"]
    assert command(monkeypatch, *arguments) == 1
    streams = capsys.readouterr()
    assert streams.out.splitlines()[-1].startswith("broken: ")
    assert streams.err == "llmquant: the result is broken, see the verdict\n"
    stored = json.loads((tmp_path / "out" / REPORT_JSON).read_text())["verification"]
    assert stored["verdict"] == "broken" and reason in stored["reason"]


@pytest.mark.slow
def test_last_line_is_the_verdict(tiny_model, tmp_path, monkeypatch, capsys):
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--group-size", "32", "--quiet"]
    assert command(monkeypatch, *arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    verification = json.loads((tmp_path / "out" / REPORT_JSON).read_text())["verification"]
    (measured,) = verification["texts"]
    assert last.startswith(
        f"{verification['verdict']}: perplexity {measured['ratio']:.3f} times the original's (95 % inter"
    )
    assert f"KL divergence {measured['kl_mean']:.4f}" in last
    assert (
        f"top-1 token changed at {measured['changed_share']:.1%} of tokens, "
        f"worst of {num_windows(TINY_WINDOW)} windows " in last
    )
    assert last.endswith(f"on {measured['num_tokens']:,} tokens of llmquant's held-out text")


@pytest.mark.slow
def test_verdict_that_is_not_good_comes_with_options_to_try(tiny_model, tmp_path, monkeypatch, capsys):
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--seq-len", "32"]
    arguments += ["--group-size", "-1"]
    assert command(monkeypatch, *arguments, "--bits", "2", "--quiet") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert " try next --method gptq: " in text and " --bits 4: " in text
    assert command(monkeypatch, *arguments[:2], tmp_path / "eight", *arguments[3:], "--bits", "8", "--quiet") == 0
    last = capsys.readouterr().out
    assert "try next" not in last and last.splitlines()[-1].startswith("good: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        (Recipe(method="rtn"), Options(), ["--method gptq", "--asym", "--group-size 64"]),
        (Recipe(method="awq"), FEW, ["--method awq+gptq", "--asym", "--samples 128"]),
        (Recipe(spec=QuantSpec(bits=3), **EFFORTS["fast"]), FEW, ["--effort default", "--bits 4", "--asym"]),
        # What the format, or an engine that was named, would refuse is not suggested.
        (Recipe(), Options(format="gptq", num_samples=128), ["--asym", "--group-size 64", "--effort best"]),
        (
            Recipe(spec=QuantSpec(symmetric=False, group_size=32), **EFFORTS["best"]),
            Options(format="awq", num_samples=128),
            [],
        ),
        (
            Recipe(spec=QuantSpec(symmetric=False, group_size=32), **EFFORTS["best"]),
            Options(num_samples=128),
            ["--target-bpw", "--override '*.down_proj:bits=8'", "--bits 8"],
        ),
    ],
)
def test_options_to_try_are_those_that_the_run_did_not_use_and_would_take(
    recipe, options, expected, tiny_model, tmp_path
):
    model = tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    plan = checked_plan(model, tmp_path / "out", recipe, replace(options, seq_len=32))
    found = next_steps(plan, [("mlp.down_proj", 0.2), ("mlp.up_proj", 0.1), ("mlp.down_proj", 0.1)])
    names = [name if not name.startswith("--target-bpw") else "--target-bpw" for name, _ in found]
    assert names == expected
    assert all(effect for _, effect in found)


@pytest.mark.slow
def test_no_more_samples_are_suggested_than_the_text_has(tiny_model, tmp_path):
    plan = checked_plan(tiny_model("llama"), tmp_path / "out", Recipe(method="awq", spec=QuantSpec(group_size=32)), FEW)
    assert "--samples 67" in dict(next_steps(plan, [], 67)) and "--samples 128" in dict(next_steps(plan, []))
    assert not any("--samples" in options for options, _ in next_steps(plan, [], FEW.num_samples))


@pytest.mark.slow
def test_model_that_does_not_run_is_a_fallback_and_stands_in_the_verdict(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        finish, "generate_sample_texts", lambda folder, plan: SampleTexts(failure="no kernel", note="no sample texts")
    )
    arguments = [
        "quantize",
        tiny_model("llama"),
        tmp_path / "out",
        "--method",
        "rtn",
        "--group-size",
        "32",
        "--bits",
        "8",
    ]
    assert command(monkeypatch, *arguments, "--quiet") == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith("good, but the quantized model does not run here: no kernel: perplexity ")
    assert " fallbacks    sample texts: the quantized model does not run here: no kernel" in text
    assert command(monkeypatch, *arguments[:2], tmp_path / "strict", *arguments[3:], "--quiet", "--strict") == 1


@pytest.mark.slow
def test_run_that_died_while_it_was_verified_is_continued_and_verification_changes_no_byte(
    tiny_model, tmp_path, monkeypatch
):
    path, recipe = tiny_model("llama"), Recipe(spec=RTN.spec)

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "verify_texts", die)
        with pytest.raises(KeyboardInterrupt):
            quantize(path, tmp_path / "out", recipe, FEW)
    assert not (tmp_path / "out").exists()
    results = []
    monkeypatch.setattr(loop, "quantize_block", lambda *arguments: results.append(arguments))
    continued = quantize(path, tmp_path / "out", recipe, FEW)
    assert not results, "no block is made again"
    assert continued.verification.texts[0].kl_mean > 0
    monkeypatch.undo()

    walks = []
    start = BlockwiseForward.__init__
    monkeypatch.setattr(BlockwiseForward, "__init__", lambda self, *a, **k: (walks.append(k), start(self, *a, **k))[1])
    whole = quantize(path, tmp_path / "whole", recipe, replace(FEW, verify=False))
    assert whole.verification.verdict == "not measured"
    assert [walk["with_original"] for walk in walks] == [True], "the text is not read for a verdict that nobody wants"
    assert_same_bytes(tmp_path / "whole", tmp_path / "out")
    assert continued.linears == whole.linears
