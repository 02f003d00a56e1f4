"""The drawings of the report: small inline SVGs that use the colours and fonts of the HTML page.

matplotlib draws with placeholder colours, which are replaced by CSS variables, so that one drawing serves the light and
the dark scheme. Text remains text in the font of the page. Each figure scales with its container.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

WIDTH, HEIGHT = 2.6, 1.45
"""Size of a figure in inches. The page scales it, including its text."""
ACCENT, MUTED, LINE = "#030303", "#020202", "#040404"
COLOURS = {ACCENT: "var(--accent)", MUTED: "var(--muted)", LINE: "var(--line)"}
"""Placeholder colour -> CSS variable of the page."""
FONT_POINTS = 8.0
MAX_SEPARATE_BARS = 16
"""Histograms with more bars are drawn as one outline."""


def over_depth(
    blocks: Sequence[int], ours: Sequence[float], reference: Sequence[float], limits: tuple[float, float], unit: str
) -> str:
    """Draw a value per block on a logarithmic axis.

    ours: values in the accent colour. reference: values in grey, may be empty. unit: "%" for fractions, "×" for ratios.
    """
    figure, axes = _figure()
    axes.set_yscale("log")
    axes.set_ylim(limits)
    _ticks(axes, limits, unit)
    single = len(blocks) == 1
    if len(reference):
        axes.plot(blocks, reference, color=MUTED, linewidth=1, marker="o" if single else None, markersize=3)
    axes.plot(blocks, ours, color=ACCENT, linewidth=1.6, marker="o" if single else None, markersize=3)
    first, last = min(blocks), max(blocks)
    axes.set_xlim(first - 0.5, last + 0.5) if single else axes.set_xlim(first, last)
    axes.set_xticks(sorted({first, (first + last) // 2, last}))
    if not single:
        axes.get_xticklabels()[-1].set_horizontalalignment("right")
    return _svg(figure)


def bars(counts: Sequence[int], left: str, right: str, *, logarithmic: bool) -> str:
    """Draw a histogram. left, right: labels of the ends of its axis."""
    figure, axes = _figure(height=0.95)
    # Many bars touch and form one shape; a few bars are separate.
    if len(counts) > MAX_SEPARATE_BARS:
        axes.stairs(counts, [index - 0.5 for index in range(len(counts) + 1)], fill=True, color=ACCENT, linewidth=0)
    else:
        axes.bar(range(len(counts)), counts, width=0.86, color=ACCENT, linewidth=0)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(0.6, max(counts) * 1.6)
    axes.set_yticks([], minor=False)
    axes.yaxis.set_minor_locator(_no_ticks())
    axes.grid(visible=False)
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.set_xticks([0, len(counts) - 1], labels=[left, right])
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.set_position((0.02, 0.2, 0.96, 0.78))
    return _svg(figure)


def trade_off(
    curve: Sequence[tuple[float, float]], chosen: tuple[float, float], others: Sequence[tuple[float, float]]
) -> str:
    """Draw loss over bits: a curve, the chosen point on it, and other points in grey. The loss axis is logarithmic."""
    figure, axes = _figure()
    losses = [loss for _, loss in (*curve, chosen, *others) if loss > 0]
    limits = min(losses, default=1) / 1.5, max(losses, default=1) * 1.5
    axes.set_yscale("log")
    axes.set_ylim(limits)
    _ticks(axes, limits, "")
    axes.plot(*zip(*curve, strict=True), color=ACCENT, linewidth=1.6)
    if others:
        axes.plot(*zip(*others, strict=True), color=MUTED, linestyle="", marker="o", markersize=4, clip_on=False)
    axes.plot(*chosen, color=ACCENT, marker="o", markersize=6, clip_on=False)
    low, high = axes.get_xlim()
    step = 1 if high - low > 3 else 0.5
    places = [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    axes.set_xticks(places, labels=[f"{place:g}" for place in places])
    return _svg(figure)


def _figure(height: float = HEIGHT) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    figure.patch.set_visible(False)
    axes = figure.add_axes((0.215, 0.155, 0.775, 0.8))
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)
    axes.tick_params(length=0, pad=4, colors=MUTED, labelsize=FONT_POINTS)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", color=LINE, linewidth=0.6)
    return figure, axes


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _ticks(axes: Any, limits: tuple[float, float], unit: str) -> None:
    """Set about four ticks at round values: 1, 10, 100, or 1, 3, 10, …, or finer ones on a short axis."""
    low, high = limits
    for steps, enough in (((1,), 3), ((1, 3), 3), ((1, 2, 5), 2), ((1, 1.5, 2, 3, 5, 7), 1)):
        values = [step * 10.0**power for power in range(-12, 13) for step in steps]
        inside = [value for value in values if low <= value <= high]
        if len(inside) >= enough:
            break
    while len(inside) > 5:
        inside = inside[::2]
    labels = [f"{_short(value * 100)} %" if unit == "%" else f"{_short(value)}{unit}" for value in inside]
    axes.set_yticks(inside, labels=labels)
    axes.yaxis.set_minor_locator(_no_ticks())


def _short(value: float) -> str:
    """Format a round value, with a power of ten if it would have many zeros."""
    if 0.0009 < value < 1e5:
        return f"{value:.4g}"
    digit, power = f"{value:.0e}".split("e")
    return f"{digit}e{int(power)}".replace("-", "−")


def _svg(figure: Any) -> str:
    """Return the figure as an inline SVG element."""
    from matplotlib import rc_context

    out = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmquant", "text.usetex": False}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # A style sheet inside the SVG would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[^"]*pt"| height="[^"]*pt"| xmlns:xlink="[^"]*"| version="1.1"', "", svg)
    svg = svg.replace("xlink:href", "href")
    # Unused ids are removed, because every figure of the page would repeat them.
    used = set(re.findall(r"(?:#|url\(#)([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)
