"""The feed: which papers, in which order, on which page, as the address says."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from urllib.parse import urlencode

from fastapi import HTTPException, Request, Response

from locally.errors import UsageError
from locally.evidence import Paper
from locally.page.library import Chosen, Order, Period, Span
from locally.page.limits import Allowance
from locally.page.people import Belongings, Kind
from locally.page.queue import Queue
from locally.page.report import KINDS, tally
from locally.page.shelf import Shelf
from locally.page.tags import tag_filter
from locally.page.trending import FORMULA, Trending
from locally.page.web.answers import Answers, enough
from locally.page.web.lines import TO_READ, Lines, label_of

PAGE = 50  # papers
FOUND = 500  # papers that a search brings at most
SEARCHES = (300, 10.0)  # of one sender, in seconds
UNREAD = "unread"
MINE = {"": "all", Kind.SAVE: "saved", Kind.LATER: "to read later", Kind.READ: "read", UNREAD: "not read yet",
        Kind.VOTE: "voted for"}  # fmt: skip
ORDERS = {
    Order.NUMBER: "those that run first",
    Order.NEWEST: "newest",
    Order.TRENDING: "trending",
    Order.TOP: "most votes",
    Order.RAN: "last run",
    Order.LIKE: "like what I tag",
}
TASTES = 64  # remembered


@dataclass(frozen=True)
class Asked:
    """What an address asks for; every field has a default that does not appear in addresses."""

    q: str = ""
    wing: str = ""
    verdict: str = ""
    order: str = Order.NUMBER
    period: str = Period.ALL
    day: str = ""
    tags: str = ""
    mine: str = ""
    page: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("order", self.order, list(Order)),
            ("period", self.period, list(Period)),
            ("mine", self.mine, list(MINE)),
        ):
            if value not in allowed:
                raise HTTPException(422, f"{name} must be one of {', '.join(a for a in allowed if a)}")
        if not 1 <= self.page <= 100_000:
            raise HTTPException(422, "page must be 1 or more")
        try:
            if self.day and not 1900 <= date.fromisoformat(self.day).year <= 2200:
                raise ValueError
        except ValueError:
            raise HTTPException(422, "day must be a date such as 2026-01-31") from None

    def address(self, **changes: Any) -> str:
        """The address of this feed with something changed, on its first page unless that is said."""
        said = vars(self) | {"page": 1} | changes
        query = {name: value for name, value in said.items() if value != getattr(Asked, name)}
        return "/?" + urlencode(query) if query else "/"


@dataclass(frozen=True)
class DateLine:
    """Where the feed stands in time, and the addresses of what lies beside it."""

    words: str
    before: str
    after: str


class Feed:
    def __init__(self, shelf: Shelf, queue: Queue, lines: Lines, trending: Trending, answers: Answers) -> None:
        self.shelf, self.queue, self.lines, self.trending, self.answers = shelf, queue, lines, trending, answers
        self.searches = Allowance(*SEARCHES)
        self._tastes: dict[tuple[tuple[int, int], frozenset[str]], dict[str, float]] = {}

    def feed(
        self,
        request: Request,
        q: str = "",
        wing: str = "",
        verdict: str = "",
        order: str = Order.NUMBER,
        period: str = Period.ALL,
        day: str = "",
        tags: str = "",
        mine: str = "",
        page: int = 1,
    ) -> Response:
        asked = Asked(q, wing, verdict, order, period, day, tags, mine, page)
        if q.strip():
            enough(self.searches, request)
        me = self.answers.identity.of(request)
        kept = self.lines.people.belongings(me)
        cards, last = self.shelf.refresh(), self.lines.last_runs()
        labels = {slug: label_of(paper, last.get(slug)) for slug, paper in cards.items()}
        span = Span.of(Period(period), self._day(day))
        keys = self._keys(asked, cards, kept, span)
        counts = tally((label, KINDS.get(label, "none")) for slug in keys.cards if (label := labels.get(slug)))
        if keys.fetched:
            counts.append((TO_READ, "none", keys.fetched))
        if verdict:
            alike = [slug for slug in keys.cards if labels.get(slug) == verdict]
            keys = keys.only(alike, fetched=verdict == TO_READ)
        pages = max(1, -(-len(keys) // PAGE))
        shown = keys[(page - 1) * PAGE : page * PAGE]
        return self.answers.html(
            request,
            "list.html" if request.headers.get("x-part") == "list" else "feed.html",
            me=me,
            asked=asked,
            lines=self.lines.markup(self.lines.of(shown, cards, kept)),
            tally=counts,
            total=len(keys),
            pages=pages,
            wings=sorted({p.wing for p in cards.values()}),
            orders=ORDERS,
            mines=MINE,
            my_tags=sorted({tag for tags in kept.tags.values() for tag in tags}),
            dateline=_dateline(asked, span),
            periods=list(Period),
            formula=FORMULA if order == Order.TRENDING else "",
            open=self.queue.open(),
            titles={slug: p.title for slug, p in cards.items()},
        )

    def _keys(self, asked: Asked, cards: Mapping[str, Paper], kept: Belongings, span: Span | None) -> Chosen:
        """All papers that the address asks for, whatever their verdict, in order."""
        among: set[str] | None = None
        without: set[str] = set()

        def only(keys: Collection[str]) -> None:
            nonlocal among
            among = set(keys) if among is None else among & set(keys)

        found = self.shelf.index.search(asked.q, FOUND) if asked.q.strip() else None
        by_relevance = found is not None and asked.order == Order.NUMBER  # the order of search itself
        if found is not None and not by_relevance:
            only(found)
        if asked.wing:
            only([slug for slug, paper in cards.items() if paper.wing == asked.wing])
        if asked.tags.strip():
            try:
                wanted = tag_filter(asked.tags)
            except UsageError as error:
                raise HTTPException(422, str(error)) from None
            fitting = {key for key, tags in kept.tags.items() if wanted(tags)}
            if wanted(()):  # what has no tags fits as well
                without |= kept.tags.keys() - fitting
            else:
                only(fitting)
        if asked.mine == UNREAD:
            without |= {key for key, kinds in kept.kinds.items() if Kind.READ in kinds}
        elif asked.mine:
            only([key for key, kinds in kept.kinds.items() if asked.mine in kinds])
        scores: Mapping[str, float] = {}
        if asked.order == Order.LIKE:
            scores = self._taste(kept)
            only(scores)
        elif asked.order == Order.TRENDING:
            scores = self.trending.scores()
        elif asked.order == Order.TOP:
            scores = self.lines.people.votes()
        elif asked.order == Order.RAN:
            order = sorted((run.started, slug) for slug, run in self.lines.last_runs().items())
            scores = {slug: place for place, (_, slug) in enumerate(order, 1)}
        keys = self.shelf.library.keys(Order(asked.order), span, among=among, without=without, scores=scores)
        return keys.ordered(found) if found is not None and by_relevance else keys

    def _taste(self, kept: Belongings) -> dict[str, float]:
        chosen = frozenset(key for key, tags in kept.tags.items() if tags)
        key = self.shelf.index.state, chosen
        if key not in self._tastes:
            if len(self._tastes) >= TASTES:
                self._tastes.pop(next(iter(self._tastes)))
            self._tastes[key] = self.shelf.index.taste(chosen)
        return self._tastes[key]

    def _day(self, text: str) -> date:
        return date.fromisoformat(text) if text else self.shelf.library.newest_day() or date.today()


def _dateline(asked: Asked, span: Span | None) -> DateLine | None:
    if span is None:
        return None
    last = span.after - timedelta(days=1)
    words = {
        Period.DAY: f"{span.first:%A} {span.first.day} {span.first:%B %Y}",
        Period.WEEK: f"Week {span.first:%V}, {span.first.day} {span.first:%B} to {last.day} {last:%B %Y}",
        Period.MONTH: f"{span.first:%B %Y}",
    }[Period(asked.period)]
    before, after = span.first - timedelta(days=1), span.after
    return DateLine(words, asked.address(day=before.isoformat()), asked.address(day=after.isoformat()))
