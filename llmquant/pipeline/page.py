"""`report.html`: the report as one page that needs nothing else, no network and no script.

Everything on it is in `quantize_report.json` too. The page is `page.html` (jinja2) filled with the report's own
numbers, the drawings of `figures.py`, and what is put together here: the errors by kind of linear and by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmquant import words
from llmquant.checkpoints.durable import write_atomically
from llmquant.paths import check_file
from llmquant.pipeline.figures import bars, over_depth, trade_off
from llmquant.pipeline.names import block_of, kind_of
from llmquant.pipeline.report import Incident, LinearReport, Report
from llmquant.pipeline.samples import MAX_NEW_TOKENS, MAX_SECONDS, REPETITIVE, Sample
from llmquant.pipeline.verdict import BANDS, BROKEN, GOOD, SLIGHT, Measurement, Verification, band_of, factor
from llmquant.spec import QuantSpec

TEMPLATE = "page.html"
MORE_BITS = 1.5
"""Bits per weight beyond the choice that the trade-off is drawn for."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All linears that do the same job on the same grid: a row of the table."""

    name: str
    grid: str
    count: int
    error: float
    """Mean."""
    rtn_error: float
    """Mean."""
    worst: float
    worst_block: int | None
    correction: float | None
    """Mean share of the corrections that was taken; None where there were none."""
    fed_back: int
    """How many of them have rows that make up for each other."""
    feedback_left: float | None
    """The mean share of their cost that this leaves; None where there is none."""
    rows: int
    """Of those that were searched."""
    rtn_rows: int
    """Rows among them that are plain rounding's."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """All linears that do the same job, from the first block to the last: a drawing, and a row of shades."""

    name: str
    figure: str
    shades: tuple[tuple[float, float] | None, ...]
    """For each block: its RTN error, and how strongly it is drawn, 0 … 1 (the square root of the error's share of the
    largest one); None where the block has no such linear."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A drawing and what stands above it."""

    title: str
    figure: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The bands side by side, each as wide as the others, and what lies on them; places in per cent of the width."""

    limits: tuple[tuple[float, str], ...]
    """Places and labels of the limits between the bands."""
    mark: float
    """The factor that the verdict rests on."""
    low: float
    high: float
    """The ends of its interval."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What happened in the same words to several modules."""

    what: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A prompt and how both models go on, without the white space around."""

    prompt: str
    shared: str
    """What both say before they part."""
    quantized: str
    """From there on."""
    original: str | None
    """The same; None where the original was left out."""
    quantized_loops: bool
    """Whether the quantized model repeats itself."""
    original_loops: bool
    """The same of the original."""

    @classmethod
    def of(cls, sample: Sample) -> Texts:
        ours = sample.quantized.removeprefix(" ").strip("\n")
        theirs = None if sample.original is None else sample.original.removeprefix(" ").strip("\n")
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs or "", strict=False)))
        return cls(
            prompt=sample.prompt,
            shared=ours[:equal],
            quantized=ours[equal:],
            original=None if theirs is None else theirs[equal:],
            quantized_loops=sample.quantized_repeats >= REPETITIVE,
            original_loops=(sample.original_repeats or 0.0) >= REPETITIVE,
        )


def write_page(report: Report, file: Path) -> None:
    """Write the page of a report. Raises UserError if the disk does not take it."""
    write_atomically(file, [page(report).encode()])


def check_page_path(file: Path) -> None:
    """UserError unless a page can be written to a file, which may be an earlier page."""
    check_file(
        file, "--output", lambda content: content.startswith(b"<!doctype html>") and b"llmquant" in content[:4096]
    )


def page(report: Report) -> str:
    """The HTML of a report."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "size": words.size,
        "short": words.short,
        "clock": words.clock,
        "seconds": lambda seconds: f"{seconds:,.1f} s".replace(",", "\u202f"),
        "percent": percent,
        "percentage": words.percentage,
        "factor": factor,
        "whole_percent": lambda share: percent(share, 0 if share >= 0.01 else 1),
        "thousands": lambda number: f"{number:,}".replace(",", "\u202f"),
    }
    template = environment.from_string(files("llmquant.pipeline").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        r=report,
        v=report.verification,
        name=Path(report.model).name,
        bands=BANDS,
        scale=scale(report.verification),
        rows=measurements(report.verification),
        most_tokens=MAX_NEW_TOKENS,
        most_seconds=f"{MAX_SECONDS:g}",
        is_chat=any(sample.is_chat for sample in report.samples),
        breakable=breakable,
        command=words_together(report.command),
        day=datetime.fromisoformat(report.finished).strftime("%-d %B %Y, %H:%M"),
        grids=list(dict.fromkeys(linear.grid for linear in report.linears)),
        kinds=(by_kind := kinds(report.linears)),
        corrected=any(kind.correction is not None for kind in by_kind),
        fed_back=any(kind.fed_back for kind in by_kind),
        searched_rows=sum(kind.rows for kind in by_kind),
        rtn_rows=sum(kind.rtn_rows for kind in by_kind),
        depths=(by_depth := depths(report.linears)),
        strongest=max((shade[0] for depth in by_depth for shade in depth.shades if shade), default=0.0),
        drift=drift(report),
        budget=report.allocation,
        curve=budget_curve(report),
        uniform=uniform(report),
        peaks=input_peaks(report.linears),
        portraits=portraits(report),
        texts=[Texts.of(sample) for sample in report.samples],
        incidents=told(report.incidents),
        remarks=told(report.remarks),
        kept=told(Incident(name, reason) for name, reason in report.kept.items()),
        total_seconds=sum(report.seconds.values()),
        quantized_weights=sum(linear.weights for linear in report.linears),
        measured_on="outputs on the calibration text" if report.calibration else "weights",
    )


LIMITS = (1.0, GOOD, SLIGHT, BROKEN, BROKEN**2)
"""Ends of the bands on the drawn scale."""


def scale(verification: Verification) -> Scale | None:
    """The verdict on the scale of the bands; None where nothing was measured, or by other bands."""
    text = verification.measured
    if text is None or text.factor is None or band_of(text.factor) != verification.verdict:
        return None
    low, high = text.factor_interval or (text.factor, text.factor)
    limits = tuple((place(limit), f"{limit:g}") for limit in LIMITS[1:-1])
    return Scale(limits=limits, mark=place(text.factor), low=place(low), high=place(high))


def place(value: float) -> float:
    """Where a factor lies on the scale, 0 … 100: logarithmic within its band."""
    value = min(max(value, LIMITS[0]), LIMITS[-1])
    band = next(index for index in range(len(BANDS)) if value <= LIMITS[index + 1])
    low, high = LIMITS[band : band + 2]
    return 100 * (band + math.log(value / low) / math.log(high / low)) / len(BANDS)


def measurements(verification: Verification) -> list[tuple[Measurement, str]]:
    """Every text that was measured, with its band; that of the deciding text is the verdict."""
    found = []
    for index, text in enumerate(verification.texts):
        if text.factor is not None:
            decides = index == verification.decided_by and verification.verdict in BANDS
            found.append((text, verification.verdict if decides else band_of(text.factor)))
    return found


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent; one that would be rounded to nothing keeps its first digit."""
    vanishes = 0 < 100 * share < 0.5 * 10**-digits
    if vanishes and 100 * share < 0.0001:
        return "<\u202f0.0001\u202f%"
    return f"{100 * share:.1g}\u202f%" if vanishes else f"{100 * share:.{digits}f}\u202f%"


def breakable(name: str) -> Markup:
    """A module's name that may be broken behind its dots."""
    return Markup(".<wbr>").join(name.split("."))


def words_together(command: str) -> Markup:
    """A command line that is broken between its words, not behind the hyphens of an option."""
    return Markup(" ").join(Markup("<span>{}</span>").format(word) if word else "" for word in command.split(" "))


def kinds(linears: Sequence[LinearReport]) -> list[Kind]:
    """The linears by kind and grid, those of a kind together, in the order of the first."""
    found = []
    together = [linear for same in _grouped(linears, lambda linear: linear.kind).values() for linear in same]
    for (name, grid), same in _grouped(together, lambda linear: (linear.kind, linear.grid)).items():
        worst = max(same, key=lambda linear: linear.error)
        shares = [linear.correction_share for linear in same if linear.correction_share is not None]
        lefts = [linear.feedback_left for linear in same if linear.feedback_left is not None]
        found.append(
            Kind(
                name=name,
                grid=grid,
                count=len(same),
                error=_mean(linear.error for linear in same),
                rtn_error=_mean(linear.rtn_error for linear in same),
                worst=worst.error,
                worst_block=block_of(worst.name),
                correction=_mean(shares) if shares else None,
                fed_back=len(lefts),
                feedback_left=_mean(lefts) if lefts else None,
                rows=sum(linear.rows for linear in same if linear.rtn_rows is not None),
                rtn_rows=sum(linear.rtn_rows or 0 for linear in same),
            )
        )
    return found


def depths(linears: Sequence[LinearReport]) -> list[Depth]:
    """The linears of the blocks by kind, means of those that a block has several of; all drawings on one scale."""
    inside = [linear for linear in linears if block_of(linear.name) is not None]
    errors = {
        kind: {
            block: (_mean(linear.error for linear in there), _mean(linear.rtn_error for linear in there))
            for block, there in _grouped(same, lambda linear: block_of(linear.name)).items()
        }
        for kind, same in _grouped(inside, lambda linear: linear.kind).items()
    }
    limits = _limits([error for by_block in errors.values() for pair in by_block.values() for error in pair])
    strongest = max((rtn for by_block in errors.values() for _, rtn in by_block.values()), default=0.0) or 1.0
    num_blocks = max((block for by_block in errors.values() for block in by_block), default=0) + 1
    found = []
    for kind, by_block in errors.items():
        ours, rtn = ([pair[place] for pair in by_block.values()] for place in (0, 1))
        shades = {block: (error, (error / strongest) ** 0.5) for block, (_, error) in by_block.items()}
        found.append(
            Depth(
                name=kind,
                figure=over_depth(list(by_block), ours, [] if ours == rtn else rtn, limits, "%"),
                shades=tuple(shades.get(block) for block in range(num_blocks)),
            )
        )
    return found


def budget_curve(report: Report) -> str:
    """Estimated loss over bits, where grids were chosen to a budget; else empty. It ends MORE_BITS behind the choice:
    further on a loss is so small that nothing could be told apart where it matters."""
    if report.allocation is None:
        return ""
    curve, others = ([_point(each) for each in report.allocation[key]] for key in ("curve", "uniform"))
    chosen = _point(report.allocation["chosen"])
    shown = [[point for point in points if point[0] <= chosen[0] + MORE_BITS] for points in (curve, others)]
    return trade_off(shown[0], chosen, shown[1])


def uniform(report: Report) -> list[tuple[str, float, float]]:
    """What one grid for all would have been: (grid, bits per weight, estimated loss)."""
    others = (report.allocation or {}).get("uniform", [])
    names = [field.name for field in fields(QuantSpec)]
    return [(QuantSpec(**{name: each[name] for name in names}).describe(), *_point(each)) for each in others]


def _point(values: dict[str, float]) -> tuple[float, float]:
    return values["bits_per_weight"], values["loss"]


def drift(report: Report) -> str:
    """How far the hidden states are from the original's behind each block; empty where that was not measured."""
    values = report.verification.drift
    if not values or not any(values):
        return ""
    return over_depth(range(len(values)), values, [], _limits(values), "%")


def input_peaks(linears: Sequence[LinearReport]) -> list[Panel]:
    """The loudest input channel against the middle one over depth, before and after AWQ; linears that read the same
    input stand in one panel."""
    series: dict[tuple[tuple[int, float, float], ...], list[str]] = {}
    for kind, same in _grouped(linears, lambda linear: linear.kind).items():
        points: dict[int, tuple[float, float]] = {}
        for linear in same:
            index = block_of(linear.name)
            if linear.input_peak is not None and index is not None:
                # Of experts side by side, the one with the loudest channel.
                point = (linear.input_peak, linear.unscaled_input_peak or linear.input_peak)
                points[index] = max(points.get(index, point), point)
        if points:
            series.setdefault(tuple((index, *point) for index, point in points.items()), []).append(kind)
    limits = _limits([value for curve in series for point in curve for value in point[1:]])
    panels = []
    for curve, names in series.items():
        blocks, after, before = (list(values) for values in zip(*curve, strict=True))
        figure = over_depth(blocks, after, [] if before == after else before, limits, "×")
        panels.append(Panel(title=_together(names), figure=figure))
    return panels


def _together(names: Sequence[str]) -> str:
    """Several kinds in one line; those of one parent name it once: `self_attn.q_proj, k_proj`."""
    told, parent = [], ""
    for name in names:
        told.append(name.removeprefix(parent) if parent else name)
        parent = name[: name.rfind(".") + 1]
    return ", ".join(told)


def portraits(report: Report) -> list[tuple[LinearReport, Panel, Panel]]:
    """The worst linears: their weights and their codes."""
    by_name = {linear.name: linear for linear in report.linears}
    drawn = []
    for histogram in report.histograms:
        end = f"{histogram.largest:.3g}"
        weights = bars(histogram.weights, f"−{end}", end, logarithmic=True)
        codes = bars(histogram.codes, "0", str(len(histogram.codes) - 1), logarithmic=False)
        drawn.append(
            (
                by_name[histogram.name],
                Panel(title="weights", figure=weights, caption="logarithmic"),
                Panel(title="codes", figure=codes),
            )
        )
    return drawn


def told(happened: Iterable[Incident]) -> list[Told]:
    """One entry for what reads the same: the module, or how many there are of which kinds."""
    entries = []
    for what, same in _grouped(happened, lambda incident: incident.what).items():
        names = [incident.where for incident in same]
        if len(names) > 1:
            names = [f"{count} × {kind}" for kind, count in _counts(kind_of(name) or name for name in names)]
        entries.append(Told(what=what, where=", ".join(names)))
    return entries


def _counts(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, len(same)) for name, same in _grouped(names, lambda name: name).items()]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis that shows all values above zero, and spans at least a factor of four."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.25, max(positive) * 1.25
    widen = max(4 / (high / low), 1.0) ** 0.5
    return low / widen, high * widen


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
