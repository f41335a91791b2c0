"""Plots of measures: one line or one bar a method."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure as MatplotlibFigure

from locally.evidence.claims import Measure
from locally.plots import PALETTE, canvas


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
