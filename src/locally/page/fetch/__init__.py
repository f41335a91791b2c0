"""The day's papers from arXiv's query interface and from Hugging Face's daily papers.

A page of results is fetched, parsed and merged in one transaction together with what its server said of it, so that an
import that breaks off has lost nothing and repeats nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta

from locally.page.fetch import arxiv, huggingface
from locally.page.fetch.parsed import Malformed, Parsed
from locally.page.fetch.transport import Client, FetchError
from locally.page.preprints import ARXIV, HUGGING_FACE, Added, Preprints, Remembered

CATEGORIES = ("cs.LG", "stat.ML", "cs.CL", "math.OC")
LIMIT = 2000  # entries of one source
PATIENT = 3  # times that arXiv is asked again for a page that it left empty though more is promised


@dataclass(frozen=True)
class Wanted:
    """What to fetch: the `days` days up to `last`, of arXiv's only these categories."""

    last: date
    days: int = 1
    categories: tuple[str, ...] = CATEGORIES
    limit: int = LIMIT
    arxiv: str = arxiv.BASE
    huggingface: str = huggingface.BASE

    @property
    def first(self) -> date:
        return self.last - timedelta(days=self.days - 1)


@dataclass
class Report:
    """What came of one source."""

    source: str
    added: Added = field(default_factory=Added)
    pages: int = 0
    unchanged: int = 0  # pages
    refused: list[str] = field(default_factory=list)
    problem: str = ""  # why it ended early


@dataclass(frozen=True)
class _Source:
    name: str
    lists: list[Iterator[str]]  # addresses of the pages of each list
    parse: Callable[[bytes], Parsed]
    size: int  # entries of a full page


def fetch(
    preprints: Preprints,
    wanted: Wanted,
    *,
    sources: tuple[str, ...] = (ARXIV, HUGGING_FACE),
    client: Client | None = None,
    on_page: Callable[[str, int], None] = lambda source, pages: None,
) -> list[Report]:
    """Fetch and keep; a source that fails does not keep the other from being read.

    Args:
        on_page: called with the source and the number of its pages read so far.
    """
    client = client or Client()
    return [_read(preprints, source, client, on_page) for source in _sources(wanted) if source.name in sources]


def _sources(wanted: Wanted) -> list[_Source]:
    days = [wanted.last - timedelta(days=i) for i in range(wanted.days)]
    pages = arxiv.addresses(wanted.arxiv, wanted.first, wanted.last, wanted.categories, wanted.limit)
    daily = [huggingface.addresses(wanted.huggingface, day, wanted.limit) for day in days]
    return [
        _Source(ARXIV, [pages], arxiv.parse, arxiv.PAGE),
        _Source(HUGGING_FACE, daily, huggingface.parse, huggingface.PAGE),
    ]


def _read(preprints: Preprints, source: _Source, client: Client, on_page: Callable[[str, int], None]) -> Report:
    report = Report(source.name)
    try:
        for pages in source.lists:
            seen = 0
            for address in pages:
                entries, total = _read_page(preprints, source, client, address, seen, report)
                seen += entries
                report.pages += 1
                on_page(source.name, report.pages)
                if entries < source.size and (total is None or seen >= total):
                    break
    except FetchError as problem:
        report.problem = str(problem)
    return report


def _read_page(
    preprints: Preprints, source: _Source, client: Client, address: str, seen: int, report: Report
) -> tuple[int, int | None]:
    """(entries on the page, entries in all where the source tells)."""
    known = preprints.remembered(address)
    for _ in range(PATIENT):
        answer = client.get(known)
        if answer.body is None:
            report.unchanged += 1
            return known.entries, None
        try:
            parsed = source.parse(answer.body)
        except Malformed as problem:
            raise FetchError(f"{address}: {problem}") from None
        if parsed.entries or parsed.total is None or seen >= parsed.total:
            break
    else:
        raise FetchError(f"{address}: empty, though {parsed.total} entries are promised")
    page = answer.page
    report.added += preprints.add(parsed.found, Remembered(address, page.etag, page.modified, parsed.entries))
    report.refused += parsed.refused
    return parsed.entries, parsed.total
