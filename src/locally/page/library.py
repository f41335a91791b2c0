"""All papers that the page knows, cards and fetched ones, in the orders in which a feed shows them.

Of a fetched paper only its key, day, number of upvotes and revision are held in memory, so that filtering and sorting
fifty thousand costs a few milliseconds; what the page shows of it is read from the store.
"""

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from enum import StrEnum
from typing import overload

import numpy as np
import sqlalchemy as sa
from numpy import ndarray

from locally.evidence import Paper
from locally.page.cards import load
from locally.page.preprints import Preprints
from locally.page.schema import preprints as table
from locally.page.store import Store


class Order(StrEnum):
    NUMBER = "number"
    NEWEST = "newest"
    TRENDING = "trending"
    TOP = "top"
    RAN = "ran"
    LIKE = "like"


class Period(StrEnum):
    ALL = "all"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"


@dataclass(frozen=True)
class Span:
    """The days of a period that holds `day`: from `first` up to, and without, `after`."""

    first: date
    after: date

    @classmethod
    def of(cls, period: Period, day: date) -> "Span | None":
        """None for all days.

        >>> Span.of(Period.WEEK, date(2026, 3, 4))
        Span(first=datetime.date(2026, 3, 2), after=datetime.date(2026, 3, 9))
        """
        if period is Period.ALL:
            return None
        if period is Period.DAY:
            return cls(day, day + timedelta(days=1))
        if period is Period.WEEK:
            first = day - timedelta(days=day.weekday())
            return cls(first, first + timedelta(days=7))
        first = day.replace(day=1)
        return cls(first, (first + timedelta(days=31)).replace(day=1))


class Library:
    """Safe from several threads; `refresh` brings in what was fetched since."""

    def __init__(self, store: Store) -> None:
        self.store, self.preprints = store, Preprints(store)
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, int, int]] = {}  # key: (day, upvotes, revision)
        self._revision = 0
        self._cards: list[Paper] = []
        self._shown = _Shown((), {})

    def refresh(self) -> dict[str, Paper]:
        """Bring everything up to date; the cards by slug."""
        cards = load()
        newest = self.store.query(sa.select(sa.func.max(table.c.revision)))[0][0] or 0
        if newest != self._revision or cards != self._cards:
            with self._lock:
                wanted = sa.select(table.c.revision, table.c.key, table.c.day, table.c.upvotes)
                for revision, key, day, upvotes in self.store.query(wanted.where(table.c.revision > self._revision)):
                    self._known[key] = (day, upvotes, revision)
                    self._revision = max(self._revision, revision)
                self._cards = cards
                self._shown = _Shown(cards, self._known)
        return {p.slug: p for p in cards}

    def has(self, key: str) -> bool:
        return self._shown.has(key)

    def revision_of(self, key: str) -> int:
        """Of the collection, when this fetched paper last changed; 0 for one that it does not have."""
        return self._known.get(key, ("", 0, 0))[2]

    @property
    def twins(self) -> Mapping[str, Paper]:
        """Cards of papers that were fetched as well, by the fetched paper's key."""
        return self._shown.twins

    def newest_day(self) -> date | None:
        return self._shown.newest_day()

    def keys(
        self,
        order: Order,
        span: Span | None = None,
        *,
        among: Iterable[str] | None = None,
        without: Iterable[str] = (),
        scores: Mapping[str, float] | None = None,
    ) -> "Chosen":
        """Papers of these days in this order.

        Args:
            among: only these.
            without: none of these.
            scores: for the orders that go by a score of each paper (top, trending, like): what has none comes after
                all that have one, newest first.
        """
        return self._shown.keys(order, span, among, without, scores or {})


class Chosen(Sequence[str]):
    """Keys of papers in some order, of which only those that are looked at are written out.

    Args:
        keys: all papers, cards before fetched ones.
        at: where each stands in `keys`.
        chosen: places of the chosen ones, in order.
        cards: how many of `keys` are cards.
    """

    def __init__(self, keys: Sequence[str], at: Mapping[str, int], chosen: ndarray, cards: int) -> None:
        self._keys, self._at, self._chosen, self._cards = keys, at, chosen, cards

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._keys[i] for i in self._chosen[index].tolist()]
        return self._keys[self._chosen[index]]

    @property
    def cards(self) -> list[str]:
        return [self._keys[i] for i in self._chosen[self._chosen < self._cards].tolist()]

    @property
    def fetched(self) -> int:
        return int(np.count_nonzero(self._chosen >= self._cards))

    def only(self, cards: Collection[str], *, fetched: bool) -> "Chosen":
        """These cards of them, and all fetched ones or none."""
        inside = np.zeros(self._cards, dtype=bool)
        inside[[self._at[key] for key in cards]] = True
        keep = np.full(len(self._chosen), fetched)
        are = self._chosen < self._cards
        keep[are] = inside[self._chosen[are]]
        return Chosen(self._keys, self._at, self._chosen[keep], self._cards)

    def ordered(self, keys: Iterable[str]) -> "Chosen":
        """Those of them that are named, in the order in which they are named."""
        inside = np.zeros(len(self._keys), dtype=bool)
        inside[self._chosen] = True
        named = np.array([i for key in keys if (i := self._at.get(key)) is not None], dtype=np.int64)
        return Chosen(self._keys, self._at, named[inside[named]], self._cards)


class _Shown:
    """One state of the library, which never changes."""

    def __init__(self, cards: Sequence[Paper], known: Mapping[str, tuple[str, int, int]]) -> None:
        identifiers = {p.arxiv.replace("/", "_"): p for p in cards if p.arxiv}
        self.twins = {key: card for key, card in identifiers.items() if key in known}
        fetched = {key: value for key, value in known.items() if key not in identifiers}
        self._keys, self._cards = [p.slug for p in cards] + list(fetched), len(cards)
        self._at = {key: i for i, key in enumerate(self._keys)}
        days = [p.published for p in cards] + [day for day, _, _ in fetched.values()]
        self._days = np.array(days, dtype="datetime64[D]")
        upvotes = np.array([0] * len(cards) + [upvotes for _, upvotes, _ in fetched.values()])
        newest = np.argsort(-self._days.astype(np.int64), kind="stable")
        self._orders = {
            Order.NEWEST: newest,
            Order.NUMBER: np.concatenate([np.arange(len(cards)), newest[newest >= len(cards)]]).astype(np.int64),
            Order.TOP: newest[np.argsort(-upvotes[newest], kind="stable")],
        }

    def has(self, key: str) -> bool:
        return key in self._at

    def newest_day(self) -> date | None:
        return self._days.max().item() if len(self._days) else None

    def keys(
        self,
        order: Order,
        span: Span | None,
        among: Iterable[str] | None,
        without: Iterable[str],
        scores: Mapping[str, float],
    ) -> "Chosen":
        chosen: ndarray = self._orders.get(order, self._orders[Order.NEWEST])
        if among is not None:
            chosen = chosen[self._mask(among)[chosen]]
        if out := set(without):
            chosen = chosen[~self._mask(out)[chosen]]
        if span is not None:
            days = self._days[chosen]
            chosen = chosen[(days >= np.datetime64(span.first)) & (days < np.datetime64(span.after))]
        if scores:
            values = np.zeros(len(self._keys))
            for key, score in scores.items():
                if key in self._at:
                    values[self._at[key]] = score
            chosen = chosen[_highest_first(values[chosen])]
        return Chosen(self._keys, self._at, chosen, self._cards)

    def _mask(self, keys: Iterable[str]) -> ndarray:
        inside = np.zeros(len(self._keys), dtype=bool)
        inside[[self._at[key] for key in keys if key in self._at]] = True
        return inside


def _highest_first(values: ndarray) -> ndarray:
    """As a stable sort, but fast where most are zero."""
    above, others = np.flatnonzero(values > 0), np.flatnonzero(values <= 0)
    if values[others].any():
        others = others[np.argsort(-values[others], kind="stable")]
    return np.concatenate([above[np.argsort(-values[above], kind="stable")], others])
