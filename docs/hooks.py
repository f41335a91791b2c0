"""What MkDocs calls: generated pages are added to the written ones, and markers in these are filled.

A line `<!-- generated: NAME ARGUMENT -->` in a page is replaced by what the generator of that name returns.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs import arrows, capacity, decisions, evidence_pages, methods, reference, reproduction

HERE = Path(__file__).parent
SITE = HERE / "site"
ROOT = HERE.parent
MARKER = re.compile(r"^<!-- generated: (\S+) ?(.*?) -->$", re.MULTILINE)


def section_of(words: str) -> str:
    """A section of a file of the repository, by its name and its heading, the heading left out."""
    name, heading = words.split(" ", 1)
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", (ROOT / name).read_text("utf-8"), re.M | re.S)
    if found is None:
        raise ValueError(f"{name} has no section {heading!r}")
    return found.group(2).strip()


GENERATORS: dict[str, Callable[[str], str]] = {
    "arrows": lambda _: arrows.diagram(),
    "arrow-tables": lambda _: arrows.tables(),
    "capacity": lambda _: capacity.per_night(),
    "capacity-basis": lambda _: capacity.basis(),
    "commands": lambda _: reference.commands(),
    "decision": decisions.diagram,
    "evidence": lambda _: evidence_pages.overview(),
    "file": section_of,
    "ground-floor": lambda _: methods.of_ground_floor(),
    "methods": methods.of_wing,
    "reproduction": lambda _: reproduction.sections(),
    "rooms": lambda _: reference.rooms(),
}


def expand(markdown: str) -> str:
    return MARKER.sub(lambda found: GENERATORS[found[1]](found[2]), markdown)


def written() -> dict[str, str]:
    """The pages that stand in the folder, markers filled, by path."""
    return {str(p.relative_to(SITE)): expand(p.read_text(encoding="utf-8")) for p in sorted(SITE.rglob("*.md"))}


def generated() -> dict[str, str]:
    """The pages that no one wrote."""
    return reference.room_pages() | evidence_pages.pages()


def on_config(config: Any) -> Any:
    """The navigation, with a place for every generated page."""
    for title, pages in (("Reference", _reference()), ("Evidence", _evidence())):
        section = next(entry[title] for entry in config.nav if title in entry)
        section.extend(pages)
    return config


def _reference() -> list[dict[str, Any]]:
    by_wing: dict[str, list[str]] = {}
    for path in reference.room_pages():
        parts = path.removesuffix(".md").split("/")
        by_wing.setdefault(parts[1], []).append(path)
    return [
        {wing: [{path.split("/")[-1].removesuffix(".md"): path} for path in paths]} for wing, paths in by_wing.items()
    ]


def _evidence() -> list[dict[str, str]]:
    return [{path.split("/")[-1].removesuffix(".md"): path} for path in evidence_pages.pages()]


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, content in generated().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return expand(markdown)
