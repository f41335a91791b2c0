"""Trees of questions drawn as outlines, an answer a row: for wide screens, and for narrow ones.

An answer leads to a method (an anchor on the page), to another question, or out of the house, where a well-known tool
is the better choice.
"""

from dataclasses import dataclass

from docs.svg import box, link, picture, text, width_of, wrapped

WIDTH, NARROW = 700.0, 350.0  # px
QUESTION = 418.0  # px, where a question stands that an answer leads to
INDENT = 26.0  # px a level
ROW = 44.0  # px
ANSWER = 330.0  # px at most for an answer
LINE = 16.0  # px


@dataclass(frozen=True)
class Use:
    """A method of this wing, by the slug of its paper (a room of `linalg` by its name), and what of it to call."""

    slug: str
    call: str


@dataclass(frozen=True)
class Other:
    """Something from elsewhere."""

    what: str


@dataclass(frozen=True)
class Ask:
    question: str
    answers: "tuple[tuple[str, Use | Other | Ask], ...]"


def draw(tree: Ask, label: str) -> str:
    """The tree drawn twice; a style sheet shows the one that fits."""
    pictures = []
    for rows, width, kind in ((_wide, WIDTH, "wide"), (_narrow, NARROW, "narrow")):
        drawn = [text(0, 16, tree.question, "question")]
        height = rows(tree, 0, 12.0, 28.0, drawn)
        pictures.append(picture(width, height, label, drawn, kind))
    return "\n".join(pictures)


def _wide(tree: Ask, level: int, stem: float, y: float, drawn: list[str]) -> float:
    """Draw the answers from `y` downwards; the y below them. `stem` is the x of the line that they hang on."""
    start = y - 6
    for answer, leads_to in tree.answers:
        middle = y + ROW / 2 - 4
        drawn.append(_branch(stem, start, middle))
        x = stem + INDENT
        lines = wrapped(answer, ANSWER - INDENT * level)
        first = middle + 4 - LINE * (len(lines) - 1) / 2
        drawn += [text(x, first + LINE * j, line) for j, line in enumerate(lines)]
        right = x + max(width_of(line) for line in lines) + 6
        y += ROW
        if isinstance(leads_to, Ask):
            drawn += [_dots(right, QUESTION - 8, middle), text(QUESTION, middle + 4, leads_to.question, "question")]
            y = _wide(leads_to, level + 1, x + 10, y, drawn)
        else:
            left = WIDTH - _pill_width(leads_to)
            drawn += [_dots(right, left - 4, middle), _pill(leads_to, left, middle)]
        start = middle
    return y


def _narrow(tree: Ask, level: int, stem: float, y: float, drawn: list[str]) -> float:
    """As `_wide`, with what an answer leads to below it."""
    start = y - 6
    for answer, leads_to in tree.answers:
        x = stem + INDENT - 6
        lines = wrapped(answer, NARROW - x)
        drawn.append(_branch(stem, start, y + LINE - 4))
        start = y + LINE - 4
        drawn += [text(x, y + LINE * (j + 1), line) for j, line in enumerate(lines)]
        y += LINE * len(lines)
        if isinstance(leads_to, Ask):
            below = wrapped(leads_to.question, NARROW - x)
            drawn += [text(x, y + LINE * (j + 1) + 4, line, "question") for j, line in enumerate(below)]
            y = _narrow(leads_to, level + 1, x + 6, y + LINE * len(below) + 14, drawn)
        else:
            drawn.append(_pill(leads_to, x, y + 22))
            y += 46
    return y


def _branch(stem: float, start: float, middle: float) -> str:
    return f'<path d="M{stem:.0f} {start:.0f}V{middle:.0f}H{stem + INDENT - 10:.0f}" class="line"/>'


def _dots(start: float, end: float, y: float) -> str:
    return f'<path d="M{start:.0f} {y:.0f}H{max(start, end):.0f}" class="line dotted"/>'


def _words(leads_to: Use | Other) -> str:
    return leads_to.call if isinstance(leads_to, Use) else leads_to.what


def _pill_width(leads_to: Use | Other) -> float:
    return 1.08 * width_of(_words(leads_to)) + 24


def _pill(leads_to: Use | Other, left: float, middle: float) -> str:
    kind = "use" if isinstance(leads_to, Use) else "other"
    width = _pill_width(leads_to)
    drawn = box(left, middle - 13, width, 26, kind)
    drawn += text(left + width / 2, middle + 4, _words(leads_to), kind, "middle")
    return link(f"#{leads_to.slug}", drawn) if isinstance(leads_to, Use) else drawn
