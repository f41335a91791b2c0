"""One style for every plot, and the frozen form of a plot for the report.

Colours of text and axes are replaced by `currentColor` in the SVG, so a plot follows the page's light or dark scheme.
"""

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.legend import Legend
from matplotlib.text import Text

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


def freeze(figure: MatplotlibFigure, salt: str) -> tuple[str, bytes, bytes]:
    """SVG (text as text, ink as currentColor), PDF and PNG; the same figure gives the same bytes.

    `salt` keeps apart the marks within the SVGs of one page.
    """
    _ink(figure)
    with rc_context(STYLE | {"svg.hashsalt": salt, "pdf.fonttype": 42}):
        svg, pdf, png = io.StringIO(), io.BytesIO(), io.BytesIO()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not once a format
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None}, facecolor="white")
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text, pdf.getvalue(), png.getvalue()


def _ink(figure: MatplotlibFigure) -> None:
    """Give default black text the page's ink and legends no box, wherever they were made."""
    for text in figure.findobj(Text):
        if to_hex(text.get_color()) == "#000000":
            text.set_color(INK)
    for legend in figure.findobj(Legend):
        legend.set_frame_on(False)
