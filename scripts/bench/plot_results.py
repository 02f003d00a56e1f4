#!/usr/bin/env python3
"""Draw the plot of KL divergence against bits per weight in the README, from the committed eval/results.json.

    scripts/bench/plot_results.py        writes eval/kl_light.svg and eval/kl_dark.svg

A line joins the results of one series at 3 and at 4 bits. AutoRound is in the tables but not in the plot, because it
was measured with 8 of its 200 default iterations. tests/test_readme.py compares the labels with the numbers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "eval" / "results.json"
LEFT_OUT = {"AutoRound"}
OURS = "llmquant"
LABEL_GAP = 0.052
"""Least distance of two labels, as a share of the height of the axes."""


@dataclass(frozen=True)
class Scheme:
    """The colours of one picture, whose background is transparent."""

    text: str
    grid: str
    ours: str
    others: str


SCHEMES = {
    "light": Scheme(text="#1f2328", grid="#d1d9e0", ours="#0969da", others="#818b98"),
    "dark": Scheme(text="#f0f6fc", grid="#3d444d", ours="#58a6ff", others="#8b949e"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS.parent, help="where the two pictures go")
    folder = parser.parse_args().folder
    rows = json.loads(RESULTS.read_text())["rows"]
    for name, scheme in SCHEMES.items():
        path = folder / f"kl_{name}.svg"
        draw(rows, scheme, path)
        print(path)


def series_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return {series: its results, the fewest bits first} for the drawn series."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["series"] not in LEFT_OUT:
            series.setdefault(row["series"], []).append(row)
    for results in series.values():
        results.sort(key=lambda row: row["bits"])
    return series


def draw(rows: list[dict[str, Any]], scheme: Scheme, path: Path) -> None:
    """Write one picture as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "llmquant", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8, 4.4))
        figure.subplots_adjust(left=0.085, right=0.6, top=0.9, bottom=0.12)
        axes.set_yscale("log")
        axes.set_ylim(0.045, 1.6)
        axes.set_xlim(3.15, 4.6)
        series = series_of(rows)
        for name, results in series.items():
            is_ours = name.startswith(OURS)
            axes.plot(
                [row["bits"] for row in results],
                [row["kl"] for row in results],
                color=scheme.ours if is_ours else scheme.others,
                linewidth=2 if is_ours else 1.2,
                marker="o",
                markersize=6 if is_ours else 4.5,
                zorder=3 if is_ours else 2,
            )
        label(axes, series, scheme)
        axes.set_title(
            "KL divergence from the original, nats per token: lower is better",
            color=scheme.text,
            fontsize=11,
            loc="left",
            x=-0.146,
            pad=14,
        )
        axes.set_xlabel("stored bits per weight", color=scheme.text)
        ticks = [0.05, 0.1, 0.2, 0.5, 1]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_xticks([3.25, 3.5, 3.75, 4, 4.25, 4.5])
        axes.grid(axis="y", color=scheme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=scheme.text, length=0)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(scheme.grid)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    # matplotlib ends some lines with a space.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))


def label(axes: Any, series: dict[str, list[dict[str, Any]]], scheme: Scheme) -> None:
    """Write each name and its KL beside the axes, as near to the level of its last point as the other labels allow."""
    to_axes = axes.transAxes.inverted()
    ends = []
    for name, results in series.items():
        x, y = to_axes.transform(axes.transData.transform((results[-1]["bits"], results[-1]["kl"])))
        ends.append((y, x, name, results[-1]["kl"]))
    ends.sort(reverse=True)
    levels = spread([y for y, *_ in ends])
    for (y, x, name, kl), level in zip(ends, levels, strict=True):
        is_ours = name.startswith(OURS)
        leader = {"arrowstyle": "-", "color": scheme.grid, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
        axes.annotate(
            f"{kl:.3f} {name}",
            xy=(x, y),
            xytext=(1.045, level),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=scheme.ours if is_ours else scheme.text,
            fontweight="bold" if is_ours else "normal",
            arrowprops=leader,
            zorder=1,
        )


def spread(levels: list[float]) -> list[float]:
    """Move levels, the highest first, apart to LABEL_GAP. Each overlapping cluster stays centred on its points."""
    clusters: list[list[float]] = []
    for level in levels:
        clusters.append([level])
        while len(clusters) > 1 and bottom(clusters[-2]) - top(clusters[-1]) < LABEL_GAP:
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [top(cluster) - index * LABEL_GAP for cluster in clusters for index in range(len(cluster))]


def top(cluster: list[float]) -> float:
    """Return the level of the first label of a cluster."""
    return sum(cluster) / len(cluster) + (len(cluster) - 1) * LABEL_GAP / 2


def bottom(cluster: list[float]) -> float:
    """Return the level of the last label of a cluster."""
    return top(cluster) - (len(cluster) - 1) * LABEL_GAP


if __name__ == "__main__":
    main()
