"""Small pieces of Markdown that the generated pages are put together from."""

from collections.abc import Iterable, Sequence

SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]{}"} | {"<": "&lt;", "|": "&#124;"})


def plain(text: object) -> str:
    """Text that Markdown shows as it stands."""
    return str(text).translate(SPECIAL)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Cells are Markdown already; a bar in one would end it."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def details(title: str, body: str, kind: str = "note") -> str:
    """A block that opens on a click."""
    return f'??? {kind} "{title}"\n\n{indented(body)}\n'


def indented(text: str) -> str:
    return "".join(f"    {line}\n" if line.strip() else "\n" for line in text.splitlines())


def amount(value: float) -> str:
    """Three significant digits, grouped by thousands."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{amount(seconds / size)} {unit}"
    return f"{amount(seconds)} s"
