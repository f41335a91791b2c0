"""Papers as the feed shows them: one line for a card or a fetched paper, with what people and runs say of it.

What a line shows is remembered as long as it is the same: the words of a fetched paper until the paper changes, the
drawing of a card until there is a new run, and the markup of a line for as long as nothing in it differs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import sqlalchemy as sa
from markupsafe import Markup

from locally.evidence import Finding, Paper
from locally.page.discussion import Discussion
from locally.page.glance import LastRun, last_runs
from locally.page.lately import Lately
from locally.page.people import Belongings, Kept, People
from locally.page.report import KINDS, short_authors, templates, unrun_label
from locally.page.schema import preprints
from locally.page.shelf import Shelf
from locally.page.sparkline import sparkline
from locally.page.store import KEYS, Store

TO_READ = "to read"  # the badge of what cannot be run
REMEMBERED = 10_000  # lines of fetched papers, and pieces of markup; some 2 KB each
_WORDS = sa.select(
    *preprints.c[("key", "title", "authors", "organisation", "categories", "day", "summary", "upvotes")]
).where(preprints.c.key.in_(KEYS))


@dataclass(frozen=True)
class Line:
    """A paper in the feed; `number` is None for a fetched one."""

    key: str
    title: str
    authors: str
    where: str
    day: str
    summary: str
    label: str
    kind: str
    number: int | None = None
    last: LastRun | None = None
    spark: Markup = field(default_factory=Markup)
    upvotes: int = 0
    votes: int = 0
    comments: int = 0
    kept: Kept = field(default_factory=Kept)


class Lines:
    def __init__(self, store: Store, shelf: Shelf) -> None:
        self.store, self.shelf = store, shelf
        self.people, self.discussion = People(store), Discussion(store)
        self.last_runs = Lately(store, lambda: last_runs(store))
        self._sparks: dict[str, tuple[LastRun, Markup]] = {}
        self._fetched: dict[str, tuple[int, Line]] = {}  # key: (its revision, the line without people's voices)
        shown: Callable[[Line], Markup] = vars(templates().get_template("line.html").module)["shown"]
        self._markup = lru_cache(REMEMBERED)(shown)

    def of(self, keys: Sequence[str], cards: Mapping[str, Paper], kept: Belongings | None = None) -> list[Line]:
        """In this order; a key that names nothing is left out."""
        kept, last = kept or Belongings(), self.last_runs()
        bare = self._fetched_ones([key for key in keys if key not in cards])
        bare |= {key: self._of_card(cards[key], last.get(key)) for key in keys if key in cards}
        votes, comments = self.people.votes(keys), self.discussion.counts(keys)
        return [
            replace(bare[key], votes=votes.get(key, 0), comments=comments.get(key, 0), kept=kept.of(key))
            if key in votes or key in comments or key in kept
            else bare[key]
            for key in keys
            if key in bare
        ]

    def markup(self, lines: Sequence[Line]) -> list[Markup]:
        """As they stand in the list."""
        return [self._markup(line) for line in lines]

    def _fetched_ones(self, keys: Sequence[str]) -> dict[str, Line]:
        """Without people's voices; those that changed since are read from the store."""
        revisions = {key: self.shelf.library.revision_of(key) for key in keys}
        remembered = {key: self._fetched[key] for key in keys if key in self._fetched}
        found = {key: line for key, (revision, line) in remembered.items() if revision == revisions[key]}
        missing = [key for key in keys if key not in found]
        if missing:
            found |= {row.key: _of_preprint(row) for row in self.store.query_in(_WORDS, missing)}
            if len(self._fetched) > REMEMBERED:
                self._fetched = {}
            self._fetched |= {key: (revisions[key], found[key]) for key in missing if key in found}
        return found

    def _of_card(self, paper: Paper, last: LastRun | None) -> Line:
        label = label_of(paper, last)
        return Line(
            key=paper.slug,
            title=paper.title,
            authors=short_authors(paper),
            where=f"{paper.venue} · {paper.wing}",
            day=paper.published,
            summary=paper.summary,
            label=label,
            kind=KINDS[label],
            number=paper.number,
            last=last,
            spark=self.spark(paper, last),
        )

    def spark(self, paper: Paper, last: LastRun | None) -> Markup:
        """The first claim that was measured, over the stored runs; drawn anew when there is a new run."""
        if last is None:
            return Markup("")
        drawn = self._sparks.get(paper.slug)
        if drawn is None or drawn[0] != last:
            drawn = self._sparks[paper.slug] = (last, sparkline(_claimed(paper, self.store.findings(paper.slug))))
        return drawn[1]


def label_of(paper: Paper, last: LastRun | None) -> str:
    return last.label if last else unrun_label(paper)


def _of_preprint(row: sa.Row) -> Line:
    names = ", ".join(row.authors[:3]) + (" and others" if len(row.authors) > 3 else "")
    where = " · ".join(part for part in (row.organisation, ", ".join(row.categories[:3])) if part)
    return Line(
        key=row.key,
        title=row.title,
        authors=names,
        where=where,
        day=row.day,
        summary=row.summary,
        label=TO_READ,
        kind="none",
        upvotes=row.upvotes,
    )


def _claimed(paper: Paper, runs: Sequence[Sequence[Finding]]) -> list[Finding]:
    """What successive runs found of the first claim of the card that at least two of them measured."""
    for claim in paper.claims:
        found = [f for run in runs for f in run if f.claim == claim and f.measured]
        if len(found) > 1:
            return found
    return []
