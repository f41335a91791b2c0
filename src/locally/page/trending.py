"""What people turn to these days: views, saves and runs of a paper, counted with a weight that halves as they age."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from locally.page.people import Kind
from locally.page.schema import marks, runs, views
from locally.page.store import Store

VIEW, SAVE, RUN = 1.0, 5.0, 10.0  # weights
HALF_LIFE = 3.0  # days
HORIZON = 30  # days; what is older counts nothing, less than a thousandth of its weight
FLUSH = 1.0  # seconds that views may wait to be written
FRESH = 10.0  # seconds for which the scores are kept
FORMULA = (
    f"the sum over views (weight {VIEW:g}), saves ({SAVE:g}) and runs ({RUN:g}) "
    f"of weight × 2^(−age in days / {HALF_LIFE:g}), back to {HORIZON} days"
)


class Trending:
    """Counts views and scores papers; one for the whole page, safe from several threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock, self._counting = threading.Lock(), threading.Lock()
        self._flushed = time.monotonic()
        self._scores: tuple[float, dict[str, float]] | None = None

    def view(self, paper: str) -> None:
        """Somebody opened a paper's page. Views are written a second at a time, so that reading costs no writing."""
        with self._lock:
            self._seen[paper, today().isoformat()] += 1
            due = time.monotonic() - self._flushed >= FLUSH
            if due:
                self._flushed = time.monotonic()
        if due:  # the reader does not wait for other writers
            threading.Thread(target=self.flush, daemon=True).start()

    def flush(self) -> None:
        with self._lock:
            seen, self._seen = self._seen, Counter()
            self._flushed = time.monotonic()
        if not seen:
            return
        try:
            with self.store.writing() as connection:
                for (paper, day), count in seen.items():
                    at = (views.c.paper == paper) & (views.c.day == day)
                    more = connection.execute(views.update().where(at).values(count=views.c.count + count))
                    if not more.rowcount:
                        connection.execute(views.insert().values(paper=paper, day=day, count=count))
        except BaseException:
            with self._lock:
                self._seen.update(seen)  # for the next time
            raise

    def scores(self) -> dict[str, float]:
        """By paper, of all that anybody turned to; some seconds old. While one reader counts, others take the last."""
        kept = self._scores
        if (kept is None or _old(kept[0])) and self._counting.acquire(blocking=kept is None):
            try:
                kept = self._scores
                if kept is None or _old(kept[0]):
                    self.flush()
                    kept = self._scores = (time.monotonic(), scores(self.store, today()))
            finally:
                self._counting.release()
        assert kept is not None
        return kept[1]


def _old(when: float) -> bool:
    return time.monotonic() - when >= FRESH


def scores(store: Store, on: date) -> dict[str, float]:
    """Trending scores by paper as of one day, by the formula that the page shows."""
    start = (on - timedelta(days=HORIZON)).isoformat()
    day_of = lambda column: sa.func.substr(column, 1, 10).label("on_day")
    seen = sa.select(views.c.paper, views.c.day, views.c.count).where(views.c.day > start)
    saved = sa.select(marks.c.paper, day_of(marks.c.made), sa.func.count()).where(
        marks.c.kind == str(Kind.SAVE), marks.c.made > start
    )
    ran = sa.select(runs.c.slug, day_of(runs.c.started), sa.func.count()).where(runs.c.started > start)
    total: dict[str, float] = defaultdict(float)
    with store.reading() as connection:
        _add(total, connection.execute(seen), VIEW, on)
        _add(total, connection.execute(saved.group_by("on_day", marks.c.paper)), SAVE, on)
        # the day comes first: by slug SQLite would walk all runs there ever were, along another index
        _add(total, connection.execute(ran.group_by("on_day", runs.c.slug)), RUN, on)
    return dict(total)


def _add(total: dict[str, float], rows: Iterable[Any], weight: float, on: date) -> None:
    for paper, day, count in rows:
        age = max(0, (on - date.fromisoformat(day)).days)
        if age < HORIZON:
            total[paper] += weight * count * 2 ** (-age / HALF_LIFE)


def today() -> date:
    return datetime.now(UTC).date()
