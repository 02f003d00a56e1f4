"""`report.html`: the report as one self-contained page, without network access or scripts.

`quantize_report.json` holds everything that the page shows. The page is the jinja2 template `page.html`, filled with
the numbers of the report, the drawings of `figures.py`, and the errors by kind of linear and by block, which are
computed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.resources import files
from itertools import takewhile
from pathlib import Path

from markupsafe import Markup

from llmquant import humanize
from llmquant.checkpoints.atomic import write_atomically
from llmquant.grouping import grouped, grouped_within
from llmquant.module_names import block_of, kind_of
from llmquant.paths import check_output_file
from llmquant.report.figures import bars, over_depth, trade_off
from llmquant.report.schema import (
    MAX_GENERATION_SECONDS,
    MAX_NEW_TOKENS,
    REPETITIVE,
    LinearReport,
    Message,
    Report,
    SampleText,
)
from llmquant.report.verdict import BANDS, BROKEN, GOOD, SLIGHT, Measurement, Verification, band_of, format_ratio
from llmquant.spec import QuantSpec

TEMPLATE = "page.html"
MORE_BITS = 1.5
"""The trade-off curve ends this many bits per weight beyond the chosen point."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A row of the error table: all linears of one kind on one grid."""

    name: str
    grid: str
    count: int
    error: float
    """Mean relative error over these linears."""
    rtn_error: float
    """Mean relative error of rounding to nearest."""
    worst: float
    worst_block: int | None
    correction: float | None
    """Mean shrinkage factor of the corrections; None if there were none."""
    num_cross_row: int
    """Number of linears with cross-row error compensation."""
    cross_row_cost_ratio: float | None
    """Mean cost after cross-row compensation, relative to the cost before; None if there is none."""
    rows: int
    """Number of rows in the linears whose codes were searched."""
    rtn_rows: int
    """Number of these rows that are rounded to nearest."""


@dataclass(frozen=True, kw_only=True)
class ErrorsOverDepth:
    """The errors of one kind of linear from the first block to the last: a drawing, and a row of shades."""

    name: str
    figure: str
    shades: tuple[tuple[float, float] | None, ...]
    """For each block the RTN error and the strength of its colour, 0 to 1, which is the square root of the error
    relative to the largest error; None for a block without such a linear."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A drawing with its title and caption."""

    title: str
    figure: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The scale of the verdicts, which are equally wide, and the place of the result. Places are in percent."""

    limits: tuple[tuple[float, str], ...]
    """Places and labels of the limits between the verdicts."""
    mark: float
    """Place of the factor that decides the verdict."""
    low: float
    """Place of the lower end of its confidence interval."""
    high: float
    """Place of the upper end of its confidence interval."""


@dataclass(frozen=True, kw_only=True)
class MessageGroup:
    """A message about one or several modules."""

    what: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A prompt and the texts of both models, without surrounding white space."""

    prompt: str
    shared: str
    """The common beginning of both texts."""
    quantized: str
    """The rest of the quantized model's text."""
    original: str | None
    """The rest of the original's text; None if the original was left out."""
    quantized_loops: bool
    """Whether the quantized model's text is repetitive."""
    original_loops: bool
    """Whether the original's text is repetitive."""

    @classmethod
    def of(cls, sample: SampleText) -> Texts:
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
    """Write the page of a report. Raises UserError if it cannot be written."""
    write_atomically(file, [page(report).encode()])


def check_page_path(file: Path) -> None:
    """Raise UserError unless a page may be written to a file. Only an earlier page may be overwritten."""
    check_output_file(
        file, "--output", lambda content: content.startswith(b"<!doctype html>") and b"llmquant" in content[:4096]
    )


def page(report: Report) -> str:
    """Return the HTML of a report."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "size": humanize.format_bytes,
        "short": humanize.format_error,
        "clock": humanize.format_clock,
        "seconds": lambda seconds: f"{seconds:,.1f} s".replace(",", "\u202f"),
        "percent": percent,
        "percentage": humanize.format_percentage,
        "factor": format_ratio,
        "whole_percent": lambda fraction: percent(fraction, 0 if fraction >= 0.01 else 1),
        "thousands": lambda number: f"{number:,}".replace(",", "\u202f"),
    }
    template = environment.from_string(files("llmquant.report").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        r=report,
        v=report.verification,
        name=Path(report.model).name,
        bands=BANDS,
        scale=scale(report.verification),
        rows=measurements(report.verification),
        most_tokens=MAX_NEW_TOKENS,
        most_seconds=f"{MAX_GENERATION_SECONDS:g}",
        is_chat=any(sample.is_chat for sample in report.sample_texts),
        breakable=breakable,
        command=nonbreaking_words(report.command),
        day=datetime.fromisoformat(report.finished).strftime("%-d %B %Y, %H:%M"),
        grids=list(dict.fromkeys(linear.grid for linear in report.linears)),
        kinds=(by_kind := kinds(report.linears)),
        corrected=any(kind.correction is not None for kind in by_kind),
        has_cross_row=any(kind.num_cross_row for kind in by_kind),
        searched_rows=sum(kind.rows for kind in by_kind),
        rtn_rows=sum(kind.rtn_rows for kind in by_kind),
        depths=(by_depth := depths(report.linears)),
        strongest=max((shade[0] for depth in by_depth for shade in depth.shades if shade), default=0.0),
        drift=drift_figure(report),
        budget=report.allocation,
        curve=budget_curve(report),
        uniform=uniform(report),
        outliers=outlier_panels(report.linears),
        worst_linears=worst_linears(report),
        texts=[Texts.of(sample) for sample in report.sample_texts],
        fallbacks=grouped_messages(report.fallbacks),
        notes=grouped_messages(report.notes),
        unquantized_linears=grouped_messages(
            Message(name, reason) for name, reason in report.unquantized_linears.items()
        ),
        total_seconds=sum(report.seconds.values()),
        quantized_weights=sum(linear.weights for linear in report.linears),
        measured_on="outputs on the calibration text" if report.calibration else "weights",
    )


LIMITS = (1.0, GOOD, SLIGHT, BROKEN, BROKEN**2)
"""The limits of the verdicts on the drawn scale."""


def scale(verification: Verification) -> Scale | None:
    """Return the scale of a verdict; None if nothing was measured, or if an older version used other limits."""
    text = verification.measured
    if text is None or text.factor is None or band_of(text.factor) != verification.verdict:
        return None
    low, high = text.factor_interval or (text.factor, text.factor)
    limits = tuple((position_on_scale(limit), f"{limit:g}") for limit in LIMITS[1:-1])
    return Scale(
        limits=limits, mark=position_on_scale(text.factor), low=position_on_scale(low), high=position_on_scale(high)
    )


def position_on_scale(value: float) -> float:
    """Return the place of a factor on the scale, 0 to 100. The scale is logarithmic within each verdict."""
    value = min(max(value, LIMITS[0]), LIMITS[-1])
    band = next(index for index in range(len(BANDS)) if value <= LIMITS[index + 1])
    low, high = LIMITS[band : band + 2]
    return 100 * (band + math.log(value / low) / math.log(high / low)) / len(BANDS)


def measurements(verification: Verification) -> list[tuple[Measurement, str]]:
    """Return every measured text with its verdict."""
    found = []
    for index, text in enumerate(verification.texts):
        if text.factor is not None:
            decides = index == verification.decided_by and verification.verdict in BANDS
            found.append((text, verification.verdict if decides else band_of(text.factor)))
    return found


def percent(fraction: float, digits: int = 1) -> str:
    """Format a fraction as a percentage. A value that would round to zero keeps its first digit."""
    vanishes = 0 < 100 * fraction < 0.5 * 10**-digits
    if vanishes and 100 * fraction < 0.0001:
        return "<\u202f0.0001\u202f%"
    return f"{100 * fraction:.1g}\u202f%" if vanishes else f"{100 * fraction:.{digits}f}\u202f%"


def breakable(name: str) -> Markup:
    """Return a module's name with line break opportunities after its dots."""
    return Markup(".<wbr>").join(name.split("."))


def nonbreaking_words(command: str) -> Markup:
    """Return a command line that breaks only between words, not after the hyphens of an option."""
    return Markup(" ").join(Markup("<span>{}</span>").format(word) if word else "" for word in command.split(" "))


def kinds(linears: Sequence[LinearReport]) -> list[Kind]:
    """Group the linears by kind and grid, in the order of each kind's first linear."""
    found = []
    by_grid = grouped_within(linears, lambda linear: linear.kind, lambda linear: linear.grid)
    for (name, grid), same in by_grid.items():
        worst = max(same, key=lambda linear: linear.error)
        factors = [linear.correction_shrinkage for linear in same if linear.correction_shrinkage is not None]
        ratios = [linear.cross_row_cost_ratio for linear in same if linear.cross_row_cost_ratio is not None]
        found.append(
            Kind(
                name=name,
                grid=grid,
                count=len(same),
                error=_mean(linear.error for linear in same),
                rtn_error=_mean(linear.rtn_error for linear in same),
                worst=worst.error,
                worst_block=block_of(worst.name),
                correction=_mean(factors) if factors else None,
                num_cross_row=len(ratios),
                cross_row_cost_ratio=_mean(ratios) if ratios else None,
                rows=sum(linear.rows for linear in same if linear.rtn_rows is not None),
                rtn_rows=sum(linear.rtn_rows or 0 for linear in same),
            )
        )
    return found


def depths(linears: Sequence[LinearReport]) -> list[ErrorsOverDepth]:
    """Return the errors by kind, averaged if a block has several linears of a kind. All drawings have one scale."""
    inside = [linear for linear in linears if block_of(linear.name) is not None]
    errors = {
        kind: {
            block: (_mean(linear.error for linear in of_block), _mean(linear.rtn_error for linear in of_block))
            for block, of_block in grouped(same, lambda linear: block_of(linear.name)).items()
        }
        for kind, same in grouped(inside, lambda linear: linear.kind).items()
    }
    limits = _limits([error for by_block in errors.values() for pair in by_block.values() for error in pair])
    strongest = max((rtn for by_block in errors.values() for _, rtn in by_block.values()), default=0.0) or 1.0
    num_blocks = max((block for by_block in errors.values() for block in by_block), default=0) + 1
    found = []
    for kind, by_block in errors.items():
        ours, rtn = ([pair[place] for pair in by_block.values()] for place in (0, 1))
        shades = {block: (error, (error / strongest) ** 0.5) for block, (_, error) in by_block.items()}
        found.append(
            ErrorsOverDepth(
                name=kind,
                figure=over_depth(list(by_block), ours, [] if ours == rtn else rtn, limits, "%"),
                shades=tuple(shades.get(block) for block in range(num_blocks)),
            )
        )
    return found


def budget_curve(report: Report) -> str:
    """Draw the estimated loss over bits if grids were chosen for a budget; else return "".

    The curve ends MORE_BITS after the choice: losses beyond are so small that the scale would hide the relevant range.
    """
    if report.allocation is None:
        return ""
    curve, others = ([_point(each) for each in report.allocation[key]] for key in ("curve", "uniform"))
    chosen = _point(report.allocation["chosen"])
    shown = [[point for point in points if point[0] <= chosen[0] + MORE_BITS] for points in (curve, others)]
    return trade_off(shown[0], chosen, shown[1])


def uniform(report: Report) -> list[tuple[str, float, float]]:
    """Return (grid, bits per weight, estimated loss) for each grid that all linears could share."""
    others = (report.allocation or {}).get("uniform", [])
    names = [field.name for field in fields(QuantSpec)]
    return [(QuantSpec(**{name: each[name] for name in names}).describe(), *_point(each)) for each in others]


def _point(values: dict[str, float]) -> tuple[float, float]:
    return values["bits_per_weight"], values["loss"]


def drift_figure(report: Report) -> str:
    """Draw the hidden states' distance from the original after each block; return "" if it was not measured."""
    values = [math.nan if value is None else value for value in report.verification.drift]
    if not values or not any(values):
        return ""
    return over_depth(range(len(values)), values, [], _limits(values), "%")


def outlier_panels(linears: Sequence[LinearReport]) -> list[Panel]:
    """Draw the outlier ratio over depth, before and after AWQ. Kinds of linear with equal ratios share a panel."""
    series: dict[tuple[tuple[int, float, float], ...], list[str]] = {}
    for kind, same in grouped(linears, lambda linear: linear.kind).items():
        points: dict[int, tuple[float, float]] = {}
        for linear in same:
            index = block_of(linear.name)
            if linear.outlier_ratio is not None and index is not None:
                # Among experts of one block, the largest ratio counts.
                point = (linear.outlier_ratio, linear.unscaled_outlier_ratio or linear.outlier_ratio)
                points[index] = max(points.get(index, point), point)
        if points:
            series.setdefault(tuple((index, *point) for index, point in points.items()), []).append(kind)
    limits = _limits([value for curve in series for point in curve for value in point[1:]])
    panels = []
    for curve, names in series.items():
        blocks, after, before = (list(values) for values in zip(*curve, strict=True))
        figure = over_depth(blocks, after, [] if before == after else before, limits, "×")
        panels.append(Panel(title=_joined_kinds(names), figure=figure))
    return panels


def _joined_kinds(names: Sequence[str]) -> str:
    """Join the names of kinds, and name a common parent only once: `self_attn.q_proj, k_proj`."""
    shortened, parent = [], ""
    for name in names:
        shortened.append(name.removeprefix(parent) if parent else name)
        parent = name[: name.rfind(".") + 1]
    return ", ".join(shortened)


def worst_linears(report: Report) -> list[tuple[LinearReport, Panel, Panel]]:
    """Return the linears with the largest errors, with drawings of their weights and codes."""
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


def grouped_messages(messages: Iterable[Message]) -> list[MessageGroup]:
    """Group messages with the same text. A group names its module, or the number of modules of each kind."""
    entries = []
    for what, same in grouped(messages, lambda message: message.what).items():
        names = [message.where for message in same]
        if len(names) > 1:
            names = [f"{count} × {kind}" for kind, count in _counts(kind_of(name) or name for name in names)]
        entries.append(MessageGroup(what=what, where=", ".join(names)))
    return entries


def _counts(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, len(same)) for name, same in grouped(names, lambda name: name).items()]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a logarithmic axis that shows all positive values and spans at least a factor of four."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.25, max(positive) * 1.25
    widen = max(4 / (high / low), 1.0) ** 0.5
    return low / widen, high * widen


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
