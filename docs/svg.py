"""Pictures as inline SVG: they take the page's colours, so that they follow it from light to dark."""

from html import escape

FONT = 13  # px
ADVANCE = 7.0  # px a character, a little more than any sans serif needs on average


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="6" class="{kind}"/>'


def link(target: str, content: str) -> str:
    return f'<a href="{escape(target)}">{content}</a>'


def picture(width: float, height: float, label: str, content: list[str], kind: str = "") -> str:
    """One line of HTML: Markdown would take an empty one for the end of the block."""
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-label="{escape(label)}">'
    return f'<div class="{f"picture {kind}".strip()}">{head}{"".join(content)}</svg></div>\n'


def width_of(words: str) -> float:
    return ADVANCE * len(words)


def wrapped(words: str, width: float) -> list[str]:
    """Lines that fit."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width_of(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
