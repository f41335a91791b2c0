"""Papers as the feed shows them: one line for a card or a fetched paper, with what people and runs say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from locally.evidence import Finding, Paper
from locally.page.discussion import Discussion
from locally.page.glance import LastRun, last_runs
from locally.page.people import Belongings, Kept, People
from locally.page.preprints import Preprint
from locally.page.report import KINDS, short_authors, unrun_label
from locally.page.shelf import Shelf
from locally.page.sparkline import sparkline
from locally.page.store import Store

TO_READ = "to read"  # the badge of what cannot be run


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
        self._sparks: dict[str, tuple[LastRun, Markup]] = {}

    def of(self, keys: Sequence[str], cards: Mapping[str, Paper], kept: Belongings | None = None) -> list[Line]:
        """In this order; a key that names nothing is left out."""
        kept, last = kept or Belongings(), last_runs()
        fetched = self.shelf.library.preprints.many([key for key in keys if key not in cards])
        votes, comments = self.people.votes(keys), self.discussion.counts(keys)
        lines = []
        for key in keys:
            about = {"votes": votes.get(key, 0), "comments": comments.get(key, 0), "kept": kept.of(key)}
            if key in cards:
                lines.append(self._of_card(cards[key], last.get(key), about))
            elif key in fetched:
                lines.append(_of_preprint(fetched[key], about))
        return lines

    def _of_card(self, paper: Paper, last: LastRun | None, about: dict) -> Line:
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
            **about,
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


def _of_preprint(preprint: Preprint, about: dict) -> Line:
    names = ", ".join(preprint.authors[:3]) + (" and others" if len(preprint.authors) > 3 else "")
    where = " · ".join(part for part in (preprint.organisation, ", ".join(preprint.categories[:3])) if part)
    return Line(
        key=preprint.key,
        title=preprint.title,
        authors=names,
        where=where,
        day=preprint.day,
        summary=preprint.summary,
        label=TO_READ,
        kind="none",
        upvotes=preprint.upvotes,
        **about,
    )


def _claimed(paper: Paper, runs: Sequence[Sequence[Finding]]) -> list[Finding]:
    """What successive runs found of the first claim of the card that at least two of them measured."""
    for claim in paper.claims:
        found = [f for run in runs for f in run if f.claim == claim and f.measured]
        if len(found) > 1:
            return found
    return []
