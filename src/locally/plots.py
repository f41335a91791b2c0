"""Plots from measures, in one style, and their frozen form for the report.

Colours of text and axes are replaced by `currentColor` in the SVG, so a plot follows the page's light or dark scheme.
"""

import io
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.legend import Legend
from matplotlib.text import Text

from locally.evidence import Figure, Measure

INK = "#1b1c1d"  # stands for "the page's text colour" and is used for nothing else
PALETTE = ["#2f6fde", "#e0662b", "#159d77", "#a65fd0", "#c9a014", "#d6457a", "#4aa8c8", "#7c8591"]
STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": "#888888",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "svg.fonttype": "none",
    "axes.formatter.useoffset": False,
}


def canvas(width: float = 6.4, height: float = 4.0, **subplots: Any) -> tuple[MatplotlibFigure, Any]:
    """A figure and its axes in the house style; arguments as for `Figure.subplots`."""
    from cycler import cycler

    with rc_context(STYLE | {"axes.prop_cycle": cycler(color=PALETTE)}):
        figure = MatplotlibFigure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(**subplots)


def lines(measures: Sequence[Measure], x: str, y: str, *, log: bool = False, title: str = "") -> MatplotlibFigure:
    """Mean of metric `y` over setting `x` per method, with a band from the lowest to the highest seed."""
    figure, axes = canvas()
    methods: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for m in measures:
        if m.metric == y and x in m.setting:
            methods[m.method][m.setting[x]].append(m.value)
    if not methods:
        raise ValueError(f'nothing to plot: no "{y}" was recorded with a setting "{x}"')
    for method, points in methods.items():
        at = sorted(points)
        mean = [math.fsum(points[p]) / len(points[p]) for p in at]
        (line,) = axes.plot(at, mean, marker="o" if len(at) <= 40 else None, markersize=3.5, label=method)
        axes.fill_between(
            at, [min(points[p]) for p in at], [max(points[p]) for p in at], color=line.get_color(), alpha=0.15, lw=0
        )
    if log:
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.legend()
    return figure


def bars(measures: Sequence[Measure], metric: str, *, log: bool = False, title: str = "") -> MatplotlibFigure:
    """Mean of `metric` per method as a horizontal bar, with a dot for each record."""
    methods: dict[str, list[float]] = defaultdict(list)
    for m in measures:
        if m.metric == metric:
            methods[m.method].append(m.value)
    if not methods:
        raise ValueError(f'nothing to plot: no "{metric}" was recorded')
    figure, axes = canvas(height=1.2 + 0.42 * len(methods))
    for row, (_, values) in enumerate(methods.items()):
        colour = PALETTE[row % len(PALETTE)]
        axes.barh(row, math.fsum(values) / len(values), height=0.6, alpha=0.55, color=colour)
        axes.plot(values, [row] * len(values), "o", markersize=3.5, color=colour)
    if log:
        axes.set_xscale("log")
    axes.set_yticks(range(len(methods)), list(methods))
    axes.invert_yaxis()
    axes.set(xlabel=metric, title=title)
    return figure


def freeze(figure: MatplotlibFigure, name: str, caption: str = "") -> Figure:
    """Render once to SVG (text as text, ink as currentColor), PDF and PNG; the same figure gives the same bytes."""
    _ink(figure)
    with rc_context(STYLE | {"svg.hashsalt": name, "pdf.fonttype": 42}):
        svg, pdf, png = io.StringIO(), io.BytesIO(), io.BytesIO()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not once a format
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None}, facecolor="white")
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return Figure(name, caption, text, pdf.getvalue(), png.getvalue())


def _ink(figure: MatplotlibFigure) -> None:
    """Give default black text the page's ink and legends no box, wherever they were made."""
    for text in figure.findobj(Text):
        if to_hex(text.get_color()) == "#000000":
            text.set_color(INK)
    for legend in figure.findobj(Legend):
        legend.set_frame_on(False)
