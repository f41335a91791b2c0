"""`locally fetch`: the day's papers from arXiv and Hugging Face."""

import re
import sys
from datetime import UTC, date, datetime
from typing import Annotated

import typer

from locally.cli.status import EXIT_CRASHED
from locally.errors import UsageError

TOLD = 10  # entries that were left out
SOURCES = ("arxiv", "huggingface")


def fetch(
    source: Annotated[list[str] | None, typer.Option(help="arxiv or huggingface; both unless named.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="arXiv category, such as cs.LG; may be repeated.")] = None,
    day: Annotated[str, typer.Option(help="The last day to fetch, as 2026-01-31; today unless named.")] = "",
    days: Annotated[int, typer.Option(help="How many days up to that one.")] = 2,
    limit: Annotated[int, typer.Option(help="Entries at most, of each source.")] = 2000,
    arxiv_url: Annotated[
        str, typer.Option(envvar="LOCALLY_ARXIV", help="Address of arXiv's query interface or of a mirror.")
    ] = "",
    huggingface_url: Annotated[
        str, typer.Option(envvar="LOCALLY_DAILY_PAPERS", help="Address of Hugging Face's daily papers or of a mirror.")
    ] = "",
    pause: Annotated[float, typer.Option(help="Seconds between two requests; arXiv asks for three.")] = 3.0,
) -> None:
    """Add the day's papers to the page: read, searched and recommended there, without a run button."""
    chosen = tuple(source or SOURCES)
    for name in chosen:
        if name not in SOURCES:
            raise UsageError(f"--source must be one of {', '.join(SOURCES)}, got {name!r}")
    for name in category or ():
        if not re.fullmatch(r"[a-z-]+(\.[A-Za-z-]+)?", name):
            raise UsageError(f"--category must be one of arXiv's, such as cs.LG, got {name!r}")
    for option, value, most in (("--days", days, 366), ("--limit", limit, 100_000)):
        if not 1 <= value <= most:
            raise UsageError(f"{option} must be 1 to {most}, got {value}")
    if not 0 <= pause <= 3600:
        raise UsageError(f"--pause must be 0 to 3600 seconds, got {pause}")
    last = _day(day)

    from locally.page.fetch import CATEGORIES, Wanted, arxiv, huggingface
    from locally.page.fetch import fetch as fetch_papers
    from locally.page.fetch.transport import Client
    from locally.page.shelf import Shelf
    from locally.page.store import Store

    wanted = Wanted(
        last=last,
        days=days,
        categories=tuple(category or CATEGORIES),
        limit=limit,
        arxiv=arxiv_url or arxiv.BASE,
        huggingface=huggingface_url or huggingface.BASE,
    )
    shelf = Shelf(Store())
    reports = fetch_papers(
        shelf.library.preprints, wanted, sources=chosen, client=Client(pause=pause), on_page=_say_page
    )
    shelf.refresh()  # so that search finds them at once
    for report in reports:
        added = report.added
        print(f"{report.source}: {added.new} new, {added.changed} changed, {added.same} known already")
        for reason in report.refused[:TOLD]:
            print(f"locally: {report.source}: left out: {reason}", file=sys.stderr)
        if len(report.refused) > TOLD:
            print(f"locally: {report.source}: left out: {len(report.refused) - TOLD} more", file=sys.stderr)
        if report.problem:
            print(f"locally: {report.source}: {report.problem}", file=sys.stderr)
    if any(report.problem for report in reports):
        raise typer.Exit(EXIT_CRASHED)


def _day(text: str) -> date:
    if not text:
        return datetime.now(UTC).date()
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--day must be a date such as 2026-01-31, got {text!r}") from None


def _say_page(source: str, pages: int) -> None:
    if sys.stderr.isatty():
        print(f"{source}: page {pages}", end="\r", file=sys.stderr, flush=True)
