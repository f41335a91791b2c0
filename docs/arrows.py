"""Who imports whom, read from the code: a picture of the floors, and tables of the arrows with their numbers.

The floors are those of the contract in `.importlinter`, which `make check` enforces. Imports inside functions count.
"""

from collections import Counter
from configparser import ConfigParser
from functools import cache
from math import log2
from pathlib import Path

import grimp

from docs.markdown import details, table
from docs.svg import box, picture, text

CONTRACT = Path(__file__).parent.parent / ".importlinter"
WIDTH, HEIGHT, GAP = 77.0, 34.0, 4.0  # px
RISE = 66.0  # px between two floors


@cache
def floors() -> list[list[str]]:
    """Parts of the package from the top down."""
    contract = ConfigParser()
    contract.read(CONTRACT, encoding="utf-8")
    layers = contract["importlinter:contract:staircase"]["layers"].split("\n")
    return [[part.strip() for part in layer.replace(":", "|").split("|")] for layer in layers if layer.strip()]


@cache
def imports() -> Counter[tuple[str, str]]:
    """How many modules import how many: by dotted names of importing and imported module."""
    graph = grimp.build_graph("locally", cache_dir=None)
    return Counter((m, t) for m in graph.modules for t in graph.find_modules_directly_imported_by(m))


def between_parts() -> Counter[tuple[str, str]]:
    """Imports from one part of the package to another."""
    counted: Counter[tuple[str, str]] = Counter()
    for (importer, imported), n in imports().items():
        one, other = (*importer.split("."), "")[1], (*imported.split("."), "")[1]
        if one and other and one != other:
            counted[one, other] += n
    return counted


def between_rooms() -> Counter[tuple[str, str]]:
    """Imports from one room to another, over wings and ground floor."""
    wings = {part for floor in floors()[3:5] for part in floor}
    counted: Counter[tuple[str, str]] = Counter()
    for (importer, imported), n in imports().items():
        one, other = importer.split(".")[1:3], imported.split(".")[1:3]
        if one != other and len(one) == len(other) == 2 and one[0] in wings and other[0] in wings:
            counted[".".join(one), ".".join(other)] += n
    return counted


def diagram() -> str:
    """The staircase, every arrow drawn; as wide as its widest floor."""
    span = max(len(floor) for floor in floors()) * (WIDTH + GAP)
    place: dict[str, tuple[float, float]] = {}
    for level, floor in enumerate(floors()):
        step = span / len(floor)
        for i, part in enumerate(floor):
            place[part] = (step * (i + 0.5), 20 + level * RISE)
    drawn = [_arrow(place[one], place[other], n) for (one, other), n in sorted(between_parts().items())]
    for part, (x, y) in place.items():
        drawn.append(box(x - WIDTH / 2, y, WIDTH, HEIGHT, "part"))
        drawn.append(text(x, y + HEIGHT / 2 + 4, part, "small", "middle"))
    return picture(span, 20 + len(floors()) * RISE, "Which part of the package imports which", drawn)


def _arrow(start: tuple[float, float], end: tuple[float, float], n: int) -> str:
    (x, y), (u, v) = start, end
    if y == v:  # between neighbours of one floor, over the boxes to the right, under them to the left
        level, bend = (y, y - RISE / 2) if u > x else (y + HEIGHT, y + HEIGHT + RISE / 2)
        path = f"M{x:.0f} {level:.0f}C{x:.0f} {bend:.0f} {u:.0f} {bend:.0f} {u:.0f} {level:.0f}"
        return f'<path d="{path}" class="arrow aside" stroke-width="2"><title>{n}</title></path>'
    top, middle = y + HEIGHT, (y + HEIGHT + v) / 2
    path = f"M{x:.0f} {top:.0f}C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {v:.0f}"
    return f'<path d="{path}" class="arrow" stroke-width="{1 + log2(n) / 2:.1f}"><title>{n}</title></path>'


def tables() -> str:
    parts, rooms = (
        table(("From", "To", "Imports"), [(f"`{a}`", f"`{b}`", n) for (a, b), n in sorted(counted.items())])
        for counted in (between_parts(), between_rooms())
    )
    return details("Between the parts", parts) + details("Between rooms of the wings and the ground floor", rooms)
