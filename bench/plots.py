"""Plots of the document: small SVG files in docs/plots, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.common import ROOT

FOLDER = ROOT / "docs" / "plots"
MISSING = "(no plot: matplotlib is not installed)"


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one curve; `style` is matplotlib's, such as `o-` or `--`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o-"

    @staticmethod
    def of(name: str, points: Sequence[tuple[float, float]], style: str = "o-") -> Series:
        """A curve through points."""
        return Series(name, [x for x, _ in points], [y for _, y in points], style)


@dataclass(frozen=True)
class Axes:
    """Labels and scales of a plot; `marks` are upright lines by what they stand for."""

    title: str
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    marks: Mapping[str, float] | None = None


def draw(name: str, axes: Axes, series: Sequence[Series], dry: bool = False) -> str:
    """Write docs/plots/NAME.svg unless `dry`; the Markdown that shows it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return MISSING
    if not dry:
        matplotlib.use("svg")
        # Text stays text and identifiers do not change: files are small and diffs are readable.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9})
        FOLDER.mkdir(parents=True, exist_ok=True)
        figure = _figure(axes, series)
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    return f"![{axes.title}](plots/{name}.svg)"


def _figure(axes: Axes, series: Sequence[Series]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    plot = figure.subplots()
    for one in series:
        plot.plot(one.x, one.y, one.style, label=one.name, markersize=4, linewidth=1.2)
    for what, x in (axes.marks or {}).items():
        plot.axvline(x, linestyle=":", linewidth=1, color="gray")
        plot.annotate(what, (x, 0.02), xycoords=("data", "axes fraction"), rotation=90,
                      ha="right", va="bottom", fontsize=7)  # fmt: skip
    if axes.log_x:
        plot.set_xscale("log", base=2)
        # The bounds are those of measured points: a computed curve has one at every number.
        plot.set_xticks(sorted({x for one in series for x in one.x if x > 0 and "o" in one.style}))
        plot.xaxis.set_major_formatter(ScalarFormatter())
        plot.minorticks_off()
    if axes.log_y:
        plot.set_yscale("log")
    else:
        plot.set_ylim(bottom=0)
    plot.set(title=axes.title, xlabel=axes.x, ylabel=axes.y)
    plot.grid(alpha=0.3)
    plot.legend(fontsize=7, frameon=False)
    return figure
