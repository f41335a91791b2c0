"""A large installation to measure: fetched papers and runs as years would leave them, written straight into SQLite.

Words follow Zipf's law, as those of abstracts do, so that an index over them is as large and as uneven as a real one.
"""

import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np

from locally import catalogue
from locally.evidence import Measure, Scale, judge
from locally.page.preprints import Preprint, Preprints
from locally.page.store import Store

PAPERS, RUNS = 50_000, 100_000
A_DAY = 200  # papers
VOCABULARY, ZIPF = 30_000, 1.1
SEEDS = 3
FIGURE = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 400 300'>" + "<path d='M0 0L400 300'/>" * 500 + "</svg>"
CATEGORIES = ("cs.LG", "stat.ML", "cs.CL", "math.OC", "cs.CV", "cs.AI")


class Writer:
    """Draws titles, abstracts and names."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        real = {w for p in catalogue.load() for w in p.summary.lower().split() if w.isalpha()}
        letters = self.rng.integers(ord("a"), ord("z") + 1, (VOCABULARY, 9))
        lengths = self.rng.integers(4, 10, VOCABULARY)
        made = ["".join(map(chr, row[:n])) for row, n in zip(letters, lengths, strict=True)]
        self.words = np.array(sorted(real) + made)[:VOCABULARY]
        weight = 1 / np.arange(1, len(self.words) + 1) ** ZIPF
        self.share = np.cumsum(weight / weight.sum())

    def draw(self, count: int) -> str:
        at = np.searchsorted(self.share, self.rng.random(count))
        return " ".join(self.words[np.minimum(at, len(self.words) - 1)])

    def preprint(self, number: int, day: datetime) -> Preprint:
        when = day.isoformat(timespec="seconds")
        return Preprint(
            key=f"{day:%y%m}.{number % 100_000:05d}",
            title=self.draw(9).capitalize(),
            authors=tuple(self.draw(2).title() for _ in range(int(self.rng.integers(1, 7)))),
            summary=self.draw(160).capitalize() + ".",
            published=when,
            updated=when,
            day=f"{day:%Y-%m-%d}",
            version=1,
            categories=tuple(self.rng.choice(CATEGORIES, 2, replace=False).tolist()),
            upvotes=int(self.rng.poisson(3)),
            sources=("arxiv",),
        )


def fill(store: Store, papers: int = PAPERS, runs: int = RUNS) -> list[Preprint]:
    """Write papers and runs; some of the papers, to look for."""
    writer, end = Writer(), datetime.now(UTC)
    written: list[Preprint] = []
    keep = Preprints(store)
    for start in range(0, papers, 2000):
        days = [end - timedelta(days=(papers - i) // A_DAY) for i in range(start, min(start + 2000, papers))]
        page = [writer.preprint(i, day) for i, day in enumerate(days, start)]
        keep.add(page)
        written += page
    assert store.file is not None
    connection = sqlite3.connect(store.file)
    with connection:
        _fill_runs(connection, runs, end)
    connection.execute("pragma wal_checkpoint(truncate)")
    connection.close()
    return written


def _fill_runs(connection: sqlite3.Connection, runs: int, end: datetime) -> None:
    cards, rng = [p for p in catalogue.load() if p.runnable], np.random.default_rng(1)
    machine = json.dumps({"processor": "x86_64", "cores": 2, "memory_gib": 8, "system": "Linux"})
    versions = json.dumps({"numpy": "2.4", "torch": "2.13"})

    def rows() -> Iterator[tuple]:
        for i in range(runs):
            card = cards[i % len(cards)]
            started = (end - timedelta(minutes=5 * (runs - i))).isoformat(timespec="seconds")
            finding, outcome, reason = judged[card.slug][int(rng.random() < 0.1)]
            values = ("quick", "finished", outcome, reason, finding, json.dumps(list(range(SEEDS))), "cpu", started)
            yield (i + 1, card.slug, *values, 8.0, 300.0, versions, "0.1.0", "", machine, "")

    judged = {card.slug: [_judged(card.claims, value) for value in (0.5, 50.0)] for card in cards}
    marks = ", ".join("?" * 17)
    connection.executemany(f"insert into runs values ({marks})", rows())
    measured = (
        (i + 1, 2 * seed + m, ("ours", "theirs")[m], cards[i % len(cards)].claims[0].metric, 0.5, seed, "{}")
        for i in range(runs)
        for seed in range(SEEDS)
        for m in range(2)
    )
    connection.executemany("insert into measures values (?, ?, ?, ?, ?, ?, ?)", measured)
    drawn = ((runs - i, 0, "figure", "", FIGURE, b"%PDF", b"\x89PNG") for i in range(len(cards)))
    connection.executemany("insert into figures values (?, ?, ?, ?, ?, ?, ?)", drawn)


def _judged(claims: tuple, value: float) -> tuple[str, str, str]:
    measures = [Measure(c.method, c.metric, value, seed) for c in claims for seed in range(SEEDS)]
    verdict = judge(claims, measures, Scale.QUICK)
    return json.dumps([f.to_dict() for f in verdict.findings]), str(verdict.outcome), verdict.reason
