"""`locally list | search | show`: what the papers claim and what came out."""

import json
import os
import shutil
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locally import catalogue
from locally.errors import UsageError
from locally.evidence import Paper

if TYPE_CHECKING:
    from locally.page.preprints import Preprint

FETCHED = 20  # papers from elsewhere that a search shows
BADGE = {"holds": "green", "fails": "red", "inconclusive": "yellow"}
ANSI = {"holds": 32, "fails": 31, "inconclusive": 33, "verdict": 0}


def list_papers(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the papers: number, title, year, wing, verdict of the last run and its age."""
    from locally.page.glance import last_runs

    papers, last = catalogue.load(), last_runs()
    if as_json:
        rows = []
        for p in papers:
            run = last.get(p.slug)
            rows.append(
                {
                    "number": p.number,
                    "slug": p.slug,
                    "title": p.title,
                    "year": p.year,
                    "wing": p.wing,
                    "runnable": p.runnable,
                    "verdict": run.label if run else None,
                    "scale": str(run.scale) if run else None,
                    "started": run.started if run else None,
                }
            )
        print(json.dumps(rows, ensure_ascii=False))
        return
    _print_papers(papers, last)


def search(words: Annotated[list[str], typer.Argument(help="Words to look for.")]) -> None:
    """Find papers by words of their title, authors, keywords, summary and claims; fetched ones too."""
    from locally.page.glance import any_fetched, last_runs

    query, last = " ".join(words), last_runs()
    found = catalogue.search(catalogue.load(), query)
    fetched = _fetched(query) if any_fetched() else []
    if not found and not fetched:
        raise UsageError(f"nothing found for {query!r}")
    if found:
        _print_papers(found, last)
    if fetched:
        print("\nto read:" if found else "to read:")
        _print_fetched(fetched)


def _fetched(query: str) -> "list[Preprint]":
    """Papers from elsewhere, as the page finds them."""
    from locally.page.shelf import Shelf
    from locally.page.store import Store

    shelf = Shelf(Store())
    cards = shelf.refresh()
    keys = [key for key in shelf.index.search(query) if key not in cards and key not in shelf.library.twins][:FETCHED]
    papers = shelf.library.preprints.many(keys)
    return [papers[key] for key in keys if key in papers]


def _print_fetched(papers: "list[Preprint]") -> None:
    """Key, day and title, best first; titles are cut to fit a terminal."""
    width = max(len(paper.key) for paper in papers)
    room = shutil.get_terminal_size().columns - width - len("2026-01-31") - 4
    for paper in papers:
        cut = sys.stdout.isatty() and len(paper.title) > max(room, 12)
        title = paper.title[: max(room, 12) - 1] + "…" if cut else paper.title
        print(f"{paper.key.ljust(width)}  {paper.day}  {title}")


def show(slug: Annotated[str, typer.Argument(help="Slug, its beginning, number or arXiv id.")]) -> None:
    """Show a paper's card, its claims, the last evidence and how to call it from Python."""
    from rich.console import Console
    from rich.markup import escape

    from locally.page.store import Store

    paper = catalogue.find(catalogue.load(), slug)
    evidence = Store().latest(paper.slug)
    console = Console(highlight=False)
    console.print(f"[bold]{escape(paper.title)}[/bold]")
    console.print(escape(f"{', '.join(paper.authors)}. {paper.venue}, {paper.published}."))
    console.print(f"number {paper.number} · {paper.slug} · {paper.wing}" + _arxiv_link(paper), style="dim")
    console.print(f"\n{escape(paper.summary)}\n")
    findings = evidence.verdict.findings if evidence else ()
    for i, claim in enumerate(paper.claims):
        console.print(f"[bold]Claim.[/bold] {escape(claim.statement)} ({escape(claim.source)})")
        console.print(escape(f"  claimed:  {claim.metric}, {claim.method} {claim.threshold}"))
        if i < len(findings) and findings[i].claim == claim:
            console.print(f"  measured: {escape(findings[i].measured or '-')}  {_badge(findings[i].label)}")
    if evidence is None:
        console.print("\nnot run yet" if paper.runnable else "\nnot yet runnable: the method has no experiment")
    else:
        console.print(f"\nLast run: {_badge(evidence.label)} {escape(evidence.verdict.reason)}")
        console.print(f"{evidence.started}, {evidence.seconds:.1f} s, {evidence.peak_memory_mib:.0f} MiB", style="dim")
        console.print(f"{evidence.command}", style="dim")
    if paper.example:
        console.print("\n[bold]From Python[/bold]")
        console.print(escape(paper.example))


def _print_papers(papers: list[Paper], last: dict[str, Any]) -> None:
    """Aligned columns: whole in a pipe; on a terminal titles are cut to fit, and slugs make room for them.

    By hand, since a rich table doubles the start-up time.
    """
    rows = [("#", "slug", "title", "year", "wing", "verdict", "age")]
    for paper in papers:
        run = last.get(paper.slug)
        verdict = run.label if run else "-" if paper.runnable else "not yet runnable"
        age = _age(run.started) if run else ""
        rows.append((str(paper.number), paper.slug, paper.title, str(paper.year), paper.wing, verdict, age))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    shown = list(range(len(widths)))
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - sum(widths) + widths[2] - 2 * (len(widths) - 1)
        if room < 24:
            shown.remove(1)
            room += widths[1] + 2
        widths[2] = min(widths[2], max(room, 12))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for row in rows:
        cells = [c if len(c) <= w else c[: w - 1] + "…" for c, w in zip(row, widths, strict=True)]
        padded = [cells[0].rjust(widths[0]), *(c.ljust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        if colour:
            padded[5] = f"\x1b[{ANSI.get(row[5], 2)}m{padded[5]}\x1b[0m"
        print("  ".join(padded[i] for i in shown).rstrip())


def _badge(label: str) -> str:
    return f"[{BADGE.get(label, 'dim')}]{label}[/]"


def _arxiv_link(paper: Paper) -> str:
    return f" · arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""


def _age(started: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return "now"
