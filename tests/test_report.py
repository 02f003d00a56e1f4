"""quantize_report.json and report.html: the same numbers, on a page that needs nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import command
from paths import ROOT
from short_text import short_manual

from llmquant.checkpoints.manifest import REPORT_HTML, REPORT_JSON
from llmquant.console.report import COLOURS, rounding_facts, verdict_line, verification_facts
from llmquant.errors import UserError
from llmquant.pipeline import sample_texts as samples_module
from llmquant.pipeline.quantize import checked_plan, quantize
from llmquant.pipeline.sample_texts import PROMPTS, QUESTIONS, generate_sample_texts, repeated_fraction
from llmquant.planning.held_out import FIXED_SOURCE
from llmquant.report.figures import ACCENT, LINE, MUTED, bars, over_depth, trade_off
from llmquant.report.page import depths, kinds, page, percent, position_on_scale, write_page
from llmquant.report.schema import Message, Report, SampleText, SampleTexts, read_report
from llmquant.report.verdict import BANDS, BROKEN, GOOD, SLIGHT, Verification
from llmquant.spec import Options, QuantSpec, Recipe

SPEC = QuantSpec(group_size=32)
FEW = Options(calibration="python-docs", num_samples=4, seq_len=32)


pytestmark = [pytest.mark.html_report, pytest.mark.slow]


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory) -> dict[str, Report]:
    """By name, reports of finished runs; not to be written into."""
    folder, made = tmp_path_factory.mktemp("reports"), {}
    runs = {
        "awq": ("llama", Recipe(method="awq+gptq", spec=SPEC), FEW),
        "rtn": ("gpt2", Recipe(method="rtn", skip=("*.0.*",), spec=QuantSpec(bits=8, group_size=-1)), Options()),
        "not verified": ("llama", Recipe(spec=SPEC), replace(FEW, verify=False)),
    }
    with short_manual():
        for name, (architecture, recipe, options) in runs.items():
            out = folder / name.replace(" ", "-")
            made[name] = quantize(tiny_model(architecture), out, recipe, options, command="llmquant quantize a b")
    return made


RUNS = ("awq", "rtn", "not verified")


@pytest.mark.parametrize("name", RUNS)
def test_file_holds_what_the_function_returns_and_gives_it_back(name, reports):
    report = reports[name]
    stored = json.loads((report.out / REPORT_JSON).read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert stored["schema"] == 4
    again = read_report(report.out)
    assert again == report
    assert again.command == "llmquant quantize a b"
    assert again.out == report.out


def test_report_holds_what_was_measured(reports):
    report = reports["awq"]
    assert report.verification.verdict in BANDS[:3]
    assert [text.source for text in report.verification.texts] == [FIXED_SOURCE, "python-docs"]
    measured = report.verification.texts[report.verification.decided_by]
    assert report.verification.kl_mean == measured.kl_mean > 0
    assert report.verification.perplexity == measured.perplexity != report.verification.original_perplexity
    assert {"forward", "solving", "verifying", "sample texts"} <= report.seconds.keys() == report.memory.keys()
    assert 2**20 < min(report.memory.values()) <= max(report.memory.values()) <= report.peak_bytes
    assert all(linear.outlier_ratio >= 1 for linear in report.linears)
    scaled = [linear for linear in report.linears if linear.unscaled_outlier_ratio is not None]
    assert {linear.kind for linear in scaled} >= {"self_attn.q_proj", "mlp.up_proj"}
    assert any(linear.unscaled_outlier_ratio != linear.outlier_ratio for linear in scaled)
    worst = sorted(report.linears, key=lambda linear: -linear.error)[:3]
    assert [histogram.name for histogram in report.histograms] == [linear.name for linear in worst]
    for histogram, linear in zip(report.histograms, worst, strict=True):
        assert sum(histogram.weights) == sum(histogram.codes) == linear.weights
        assert len(histogram.codes) == 16 and histogram.weights[0] + histogram.weights[-1] > 0
    assert [sample.prompt for sample in report.sample_texts] == list(QUESTIONS), "the tokenizer has a chat template"
    assert all(sample.original and sample.quantized and sample.is_chat for sample in report.sample_texts)
    assert report.original_hashes.keys() == {"config.json", "model.safetensors"}
    assert report.hashes["model.safetensors"] != report.original_hashes["model.safetensors"]
    assert {linear.rows for linear in report.linears if linear.kind == "mlp.up_proj"} == {96}
    assert all(0 <= linear.rtn_rows < linear.rows for linear in report.linears)
    assert all(0 <= linear.correction_shrinkage <= 1 for linear in report.linears if linear.kind == "mlp.down_proj")
    assert [linear.correction_shrinkage is None for linear in report.linears if linear.kind == "mlp.down_proj"] == [
        False
    ] * 2
    # Without AWQ, because a folded scale changes the first block's inputs by rounding errors.
    unscaled = reports["not verified"].linears
    corrected = [linear.kind for linear in unscaled if linear.correction_shrinkage is not None]
    assert corrected.count("mlp.down_proj") == 2 and corrected.count("self_attn.q_proj") == 1, "nothing is lost before"
    assert all(linear.rtn_rows is linear.correction_shrinkage is None for linear in reports["rtn"].linears)
    assert reports["not verified"].sample_texts == () and reports["not verified"].verification.texts == ()


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags are not closed."""

    VOID = ("meta", "br", "wbr", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", RUNS)
def test_page_is_whole_and_needs_nothing_else(name, reports):
    html = (reports[name].out / REPORT_HTML).read_text()
    parsed = Page(html)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object"}
    outside = [value for key, value in parsed.attributes if key in ("src", "href", "xlink:href") and value[:1] != "#"]
    assert not outside
    assert not re.search(r"url\((?!#)|@import|@font-face", html)
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert "nan" not in parsed.text.lower().split() and "None" not in parsed.text.split()


@pytest.mark.parametrize("name", RUNS)
def test_page_tells_everything(name, reports):
    report = reports[name]
    text = " ".join(Page(page(report)).text.split())
    shown = [report.verification.verdict, report.verification.reason[1:], report.command, *report.hashes.values()]
    shown += [*{linear.kind for linear in report.linears}, *{linear.grid for linear in report.linears}, *report.seconds]
    shown += [linear.name for linear in report.linears if linear.name in {h.name for h in report.histograms}]
    shown += [*report.unquantized_linears.values(), *(note.what for note in report.notes), *report.versions.values()]
    shown += [report.sample_texts_note, *(sample.prompt for sample in report.sample_texts)]
    if report.calibration:
        shown.append(f"{report.calibration['num_duplicate_rows']} repeated exactly")
    for part in shown:
        assert " ".join(part.split()) in text, part


def test_fallbacks_are_on_the_page_and_html_in_them_is_escaped(reports):
    fallbacks = (
        Message("<b>layer</b>", "damping raised to 0.4"),
        Message("x.0.y", "same"),
        Message("x.1.y", "same"),
    )
    html = page(replace(reports["rtn"], fallbacks=fallbacks, model="a<script>b"))
    text = Page(html).text
    assert "<b>layer</b>" in text and "damping raised to 0.4" in text and "2 × y" in text
    assert "<script" not in html


def test_shades_stand_under_their_block_and_a_head_under_none(reports):
    linears = list(reports["awq"].linears)
    up = next(linear for linear in linears if linear.kind == "mlp.up_proj")
    mixed = [
        replace(up, name="x.0.up", kind="up", grid="8-bit", rtn_error=0.01),
        replace(up, name="x.2.up", kind="up", rtn_error=0.04),
        replace(up, name="x.1.moe.0.up", kind="moe.*.up", rtn_error=0.01),
        replace(up, name="x.1.moe.1.up", kind="moe.*.up", rtn_error=0.03),
        replace(up, name="lm_head", kind="lm_head"),
    ]
    found = {depth.name: depth.shades for depth in depths(mixed)}
    assert found == {
        "up": ((0.01, pytest.approx(0.5)), None, (0.04, pytest.approx(1.0))),
        "moe.*.up": (None, (0.02, pytest.approx(0.5**0.5)), None),
    }
    rows = [(kind.name, kind.grid, kind.count, kind.worst_block) for kind in kinds(mixed)]
    assert rows == [
        ("up", "8-bit", 1, 0),
        ("up", up.grid, 1, 2),
        ("moe.*.up", up.grid, 2, 1),
        ("lm_head", up.grid, 1, None),
    ]
    Page(page(replace(reports["awq"], linears=tuple(mixed), histograms=())))


def test_corrections_and_rows_rounded_to_nearest_are_shown_if_there_are_any(reports):
    up, down = (
        next(one for one in reports["awq"].linears if one.kind == f"mlp.{kind}_proj") for kind in ("up", "down")
    )
    won = (
        replace(up, rtn_rows=2, correction_shrinkage=0.25),
        replace(up, rtn_rows=3, correction_shrinkage=0.5),
        replace(up, rtn_rows=None, correction_shrinkage=None),
        replace(down, rtn_rows=0, correction_shrinkage=0.9),
    )
    found = {kind.name: (kind.rows, kind.rtn_rows, kind.correction) for kind in kinds(won)}
    assert found == {"mlp.up_proj": (192, 5, pytest.approx(0.375)), "mlp.down_proj": (64, 0, pytest.approx(0.9))}
    text = " ".join(Page(page(replace(reports["awq"], linears=won, histograms=()))).text.split())
    assert "RTN rows: 5 of 256 rows are rounded to nearest from the scaled weight," in text
    assert "38 %" in text and "90 %" in text
    facts = rounding_facts(won)
    assert [name for name, _ in facts] == ["corrections", "RTN rows"]
    assert facts[0][1].endswith("mlp up_proj 38% (2 of 3), down_proj 90%") and facts[1][1].startswith("5 of 256 rows")
    none = tuple(replace(linear, rtn_rows=0, correction_shrinkage=None) for linear in won)
    text = Page(page(replace(reports["awq"], linears=none, histograms=()))).text
    assert "RTN rows" not in text and "orrection" not in text and rounding_facts(none) == []


def test_cost_after_cross_row_compensation_is_shown_if_there_is_any(reports):
    up, down = (
        next(one for one in reports["awq"].linears if one.kind == f"mlp.{kind}_proj") for kind in ("up", "down")
    )
    fed = (
        replace(up, cross_row_cost_ratio=0.25),
        replace(up, cross_row_cost_ratio=0.5),
        up,
        replace(down, cross_row_cost_ratio=0.61),
    )
    assert [(kind.num_cross_row, kind.cross_row_cost_ratio) for kind in kinds(fed)] == [(2, 0.375), (1, 0.61)]
    facts = dict(rounding_facts(fed))
    assert facts["cross-row"].startswith("mean cost with")
    assert facts["cross-row"].endswith(": mlp up_proj 38% (2 of 3), down_proj 61%")
    text = " ".join(Page(page(replace(reports["awq"], linears=fed, histograms=()))).text.split())
    assert "Cross-row: rows compensate the errors" in text and "38 % in 2" in text and "61 %" in text
    assert "Cross-row" not in Page(page(reports["awq"])).text


def test_choice_for_a_budget_is_drawn_and_listed(reports):
    points = [{"bits_per_weight": 3 + step / 10, "loss": 0.5**step} for step in range(20)]
    uniform = [{"bits": 4, "group_size": 64, "symmetric": True, "bits_per_weight": 4.25, "loss": 0.00123}]
    budget = {"target_bits_per_weight": 4.5, "chosen": points[14], "curve": points, "uniform": uniform, "inputs": []}
    parsed = Page(page(replace(reports["awq"], allocation=budget)))
    text = " ".join(parsed.text.split())
    for part in ("4.400 bits per weight are used, of a budget of 4.500", "4-bit g64 sym for all", "4.250", "0.00123"):
        assert part in text, part
    assert "Mixed precision" not in page(reports["awq"])


def test_figures_take_the_colours_and_fonts_of_the_page():
    drawn = [
        over_depth(range(8), [0.01] * 8, [0.1] * 8, (0.005, 0.2), "%"),
        bars([3, 0, 5], "0", "2", logarithmic=True),
    ]
    drawn.append(trade_off([(3, 0.1), (5, 1e-6)], (4, 0.01), [(4.2, 0.02)]))
    drawn += [over_depth([4], [2.0], [], (1, 4), "×"), bars(range(48), "-1", "1", logarithmic=False)]
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.get("viewBox") and not root.get("width")
        assert not any(stand_in in svg for stand_in in (ACCENT, MUTED, LINE))
        assert "var(--accent)" in svg and "font-family" not in svg and "<style" not in svg
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
    assert "<text" in drawn[0] and "10 %" in drawn[0] and "1 %" in drawn[0]


# --- the command -----------------------------------------------------------------------------------------------------


def copied(report: Report, folder: Path) -> Path:
    folder.mkdir()
    for file in report.out.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_report_makes_the_same_page_again(reports, tmp_path, monkeypatch, capsys):
    out = copied(reports["awq"], tmp_path / "out")
    before = (out / REPORT_HTML).read_bytes()
    (out / REPORT_HTML).unlink()
    assert command(monkeypatch, "report", out) == 0
    assert capsys.readouterr().out == f"{out / REPORT_HTML}\n"
    assert (out / REPORT_HTML).read_bytes() == before
    assert command(monkeypatch, "report", out, "--output", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").read_bytes() == before
    assert command(monkeypatch, "verify", out) == 0, "the report is not part of what the manifest holds"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "only `llmquant quantize` writes one"),
        ("{", "JSON"),
        ('{"schema": 1}', "schema 1, and this llmquant reads 2, 3, 4"),
        ('{"schema": 2}', "damaged"),
        ('{"schema": 3}', "damaged"),
    ],
)
def test_report_that_cannot_be_read_is_refused_in_a_line(content, message, tmp_path, monkeypatch, capsys):
    if content is not None:
        (tmp_path / REPORT_JSON).write_text(content)
    assert command(monkeypatch, "report", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_a_value_of_another_type_is_refused_in_a_line_or_does_not_matter(reports, tmp_path, monkeypatch, capsys):
    content = json.loads((reports["awq"].out / REPORT_JSON).read_text())
    refused = set()
    for key in content:
        for value in (None, "x", [], {}, 3):
            (tmp_path / REPORT_JSON).write_text(json.dumps(content | {key: value}))
            code = command(monkeypatch, "report", tmp_path)
            error = capsys.readouterr().err
            assert (code, error.count("\n")) in ((0, 0), (2, 1)), (key, value, error)
            refused |= {key} if code else set()
    assert {"model", "finished", "versions", "recipe", "verification", "linears", "seconds", "hashes"} <= refused
    verification = content["verification"] | {"decided_by": 7}
    (tmp_path / REPORT_JSON).write_text(json.dumps(content | {"verification": verification}))
    assert command(monkeypatch, "report", tmp_path) == 2 and "damaged" in capsys.readouterr().err


def test_numbers_that_went_wrong_are_null_in_the_file(reports, tmp_path):
    report = reports["awq"]
    ruined = replace(report, linears=(replace(report.linears[0], error=float("nan")), *report.linears[1:]))
    ruined.write(tmp_path)
    assert json.loads((tmp_path / REPORT_JSON).read_text())["linears"][0]["error"] is None
    write_page(read_report(tmp_path), tmp_path / REPORT_HTML)


# --- samples ---------------------------------------------------------------------------------------------------------


def test_model_that_is_too_large_says_nothing(reports, tiny_model, tmp_path, monkeypatch):
    out = reports["awq"].out
    plan = checked_plan(tiny_model("llama"), tmp_path / "other", Recipe(spec=SPEC), FEW)
    sizes = sorted([plan.reader.total_bytes, read_report(out).output_bytes])
    assert sizes[0] < sizes[1]
    monkeypatch.setattr(samples_module, "LOADED_SIZE_FACTOR", 10 * 2**30 / sizes[1])
    found = generate_sample_texts(out, plan)
    assert found.texts == () and found.note.startswith("no sample texts") and not found.failure


def test_samples_that_fail_do_not_take_the_checkpoint_with_them(reports, tiny_model, tmp_path, monkeypatch):
    out, answers = reports["awq"].out, samples_module._answers
    plan = checked_plan(tiny_model("llama"), tmp_path / "other", Recipe(spec=SPEC), FEW)

    def failing(*folders):
        def answer(path, *arguments):
            if path in folders:
                raise UserError("prompt: is empty")
            return answers(path, *arguments)

        return answer

    monkeypatch.setattr(samples_module, "_answers", failing(out))
    found = generate_sample_texts(out, plan)
    assert (found.texts, found.failure, found.original_failure) == ((), "prompt: is empty", "")
    assert found.note == "no sample texts: the quantized model does not run here: prompt: is empty"
    monkeypatch.setattr(samples_module, "_answers", failing(plan.path))
    found = generate_sample_texts(out, plan)
    assert (found.failure, found.original_failure) == ("", "prompt: is empty")
    assert all(sample.quantized and sample.original is None for sample in found.texts)
    monkeypatch.setattr(samples_module, "_answers", failing(out, plan.path))
    assert generate_sample_texts(out, plan).failure == "prompt: is empty; nor does the original"


def test_model_without_a_chat_template_continues_prompts_and_one_without_a_tokenizer_is_left_alone(
    reports, tiny_model, tmp_path, monkeypatch
):
    plan = checked_plan(tiny_model("llama"), tmp_path / "other", Recipe(spec=SPEC), FEW)
    tokenizer = samples_module.load_tokenizer(plan.path)
    tokenizer.chat_template = None
    monkeypatch.setattr(samples_module, "load_tokenizer", lambda *_: tokenizer)
    found = generate_sample_texts(reports["awq"].out, plan)
    assert [sample.prompt for sample in found.texts] == list(PROMPTS)
    assert not any(sample.is_chat for sample in found.texts)

    # A template that refuses the questions is a note: the quantized model runs all the same.
    tokenizer.chat_template = "{{ raise_exception('a system message is needed') }}"
    refused = generate_sample_texts(reports["awq"].out, plan)
    assert refused.texts == found.texts and not refused.failure
    assert refused.note.startswith("texts instead of questions: chat: ") and "a system message" in refused.note
    assert "a system message" in refused.template_failure

    def no_tokenizer(*_):
        raise UserError("its tokenizer cannot be loaded")

    monkeypatch.setattr(samples_module, "load_tokenizer", no_tokenizer)
    assert generate_sample_texts(reports["awq"].out, plan) == SampleTexts(
        note="no sample texts: its tokenizer cannot be loaded"
    )


@pytest.mark.parametrize(("context", "has_samples"), [(32, False), (80, True)])
def test_samples_fit_into_a_short_context_or_are_left_out(context, has_samples, tiny_model, tmp_path):
    model = tiny_model("llama", max_position_embeddings=context)
    report = quantize(model, tmp_path / "out", Recipe(method="rtn", spec=SPEC), Options())
    assert bool(report.sample_texts) == has_samples and not report.fallbacks
    assert has_samples or f"a context of {context} tokens has no room" in report.sample_texts_note


def test_repetition_is_noticed_where_only_the_quantized_model_has_it():
    assert repeated_fraction(list(range(40))) == repeated_fraction([]) == repeated_fraction([1, 1, 1, 1]) == 0
    assert repeated_fraction([1] * 40) > 0.9
    assert repeated_fraction([*range(24), *range(8), *range(8), *range(8)]) > 0.3, (
        "three times a phrase of eight tokens"
    )

    def sample(ours, theirs):
        return SampleText(prompt="a", quantized="b", original="c", quantized_repeats=ours, original_repeats=theirs)

    both = SampleTexts(texts=(sample(0.9, 0.9), sample(0.1, 0.0)))
    assert both.repetition == ""
    ours = SampleTexts(texts=(sample(0.9, 0.1), sample(0.9, 0.9), sample(0.9, None)))
    assert ours.repetition == "it repeats itself in 1 of 3 sample texts where the original does not"


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_verdict_line_has_the_colour_of_its_band_and_every_reservation():
    said = Verification(
        verdict="slight loss", reason="because", may_be="clear loss", failure="no kernel", repetition="it loops"
    )
    line = verdict_line(said)
    assert line.plain == (
        "slight loss (may be clear loss), but the quantized model does not run here: no kernel: because; it loops"
    )
    assert {str(verdict_line(replace(said, verdict=band)).style) for band in BANDS} == {
        f"bold {COLOURS[band]}" for band in BANDS
    }


def test_numbers_of_both_texts_stand_in_the_facts_and_on_the_page(reports):
    report = reports["awq"]
    fixed, own = report.verification.texts
    (fact,) = [fact for name, fact in verification_facts(report.verification) if name == "other text"]
    other = own if report.verification.decided_by == 0 else fixed
    assert f"{other.num_tokens:,} tokens of {other.source}" in fact
    text = " ".join(Page(page(report)).text.split())
    for measured in (fixed, own):
        assert f"{measured.ratio:.3f}" in text and measured.source in text and f"{measured.kl_mean:.4f}" in text
    again = replace(report.verification, next_steps=(("--asym", "finer"),), may_be="broken", failure="no kernel")
    text = " ".join(Page(page(replace(report, verification=again))).text.split())
    for words in (*BANDS, "What to try next --asym", "finer", "may be broken", "does not run here: no kernel"):
        assert words in text, words


def test_share_on_the_page_is_none_only_if_it_is_none():
    shown = {0.0: "0.0 %", 5e-7: "< 0.0001 %", 4.11e-5: "0.004 %", 0.0004: "0.04 %", 0.0006: "0.1 %", 1.0: "100.0 %"}
    assert {share: percent(share).replace("\u202f", " ") for share in shown} == shown


def test_scale_gives_every_band_the_same_width():
    assert [position_on_scale(limit) for limit in (0.5, 1, GOOD, SLIGHT, BROKEN, 1e9)] == pytest.approx(
        [0, 0, 25, 50, 75, 100]
    )
    assert 25 < position_on_scale(1.1) < 40 < position_on_scale(1.2) < 50


OLD_REPORT = json.loads((ROOT / "tests" / "reports" / "schema-3.json").read_text())
"""The report of a tiny llama by the last version with schema 3: GPTQ, a skipped kind, and one linear in 8 bits."""


def test_report_of_schema_3_is_read_under_the_names_of_schema_4(tmp_path):
    (tmp_path / REPORT_JSON).write_text(json.dumps(OLD_REPORT))
    report = read_report(tmp_path)
    assert [fallback.what for fallback in report.fallbacks] == [entry["what"] for entry in OLD_REPORT["incidents"]]
    assert [note.what for note in report.notes] == [entry["what"] for entry in OLD_REPORT["remarks"]]
    assert report.unquantized_linears == OLD_REPORT["kept"] and len(report.unquantized_linears) == 2
    ((parameters,), (old,)) = report.unquantized_parameters, OLD_REPORT["unquantized"]
    assert (parameters.kind, parameters.share, parameters.is_intended) == ("mlp.up_proj", old["share"], True)
    assert [text.prompt for text in report.sample_texts] == [text["prompt"] for text in OLD_REPORT["samples"]]
    assert report.sample_texts_note == OLD_REPORT["samples_note"]
    for linear, old in zip(report.linears, OLD_REPORT["linears"], strict=True):
        assert linear.correction_shrinkage == old["correction_share"]
        assert linear.cross_row_cost_ratio == old["feedback_left"]
        assert linear.outlier_ratio == old["input_peak"] is not None
        assert linear.unscaled_outlier_ratio == old["unscaled_input_peak"]
    assert sum(linear.correction_shrinkage is not None for linear in report.linears) > len(report.linears) / 2
    assert report.recipe["output_hessian"] == OLD_REPORT["recipe"]["output_feedback"]
    assert report.recipe["correct_input_error"] and report.recipe["correct_residual_error"]
    assert report.calibration["fallbacks"] == OLD_REPORT["calibration"]["incidents"]
    assert report.calibration["notes"] == OLD_REPORT["calibration"]["remarks"]
    text = Page(page(report)).text
    assert report.verification.verdict == OLD_REPORT["verification"]["verdict"] and report.verification.verdict in text
    again = json.dumps(report.to_dict())
    old_names = ("incidents", "remarks", "kept", "samples_note", "feedback_left", "input_peak", "output_feedback")
    assert not any(f'"{name}"' in again for name in (*old_names, "correction_share", "is_asked_for", "residual_target"))


def test_report_of_schema_2_is_still_read_and_keeps_its_words(tmp_path):
    stored = OLD_REPORT | {"schema": 2}
    stored["verification"] = {
        "verdict": "worth a look",
        "reason": "perplexity 1.20 times the original's on held-out text",
        "source": "c4",
        "num_windows": 4,
        "seq_len": 512,
        "num_tokens": 2044,
        "kl_mean": 0.1,
        "kl_p99": 1.5,
        "top1_agreement": 0.75,
        "perplexity": 12.0,
        "original_perplexity": 10.0,
        "drift": [0.1, 0.2],
    }
    stored["samples"] = [{"prompt": "a", "quantized": "b", "original": None}]
    (tmp_path / REPORT_JSON).write_text(json.dumps(stored))
    report = read_report(tmp_path)
    (text,) = report.verification.texts
    assert report.verification.verdict == "worth a look" and report.verification.drift == (0.1, 0.2)
    assert (text.source, text.ratio, text.changed_share) == ("c4", pytest.approx(1.2), 0.25)
    assert text.ratio_interval is None and text.worst_ratio is None
    words = " ".join(Page(page(report)).text.split())
    assert "worth a look" in words and "1.200" in words and "None" not in words.split()
    assert str(verdict_line(report.verification)).startswith("worth a look: perplexity 1.20")
    assert [text.prompt for text in report.sample_texts] == ["a"]
    stored["verification"] |= {"verdict": "not measured", "kl_mean": None, "source": None}
    (tmp_path / REPORT_JSON).write_text(json.dumps(stored))
    assert read_report(tmp_path).verification.texts == ()
