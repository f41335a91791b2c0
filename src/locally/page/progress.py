"""What `locally run` shows while it works: a live table on a terminal, plain lines in a pipe, nothing for --json."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from locally.evidence import Evidence, Status
from locally.page.runner import Progress

TELLING, SETTLING = 0.02, 5.0  # share of the work and seconds from which on the rest can be told
INTERVAL = 300.0  # seconds between lines of an experiment that takes long
COLOURS = {"holds": "green", "fails": "red", "inconclusive": "yellow"}


class QuietBoard:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def progress(self, event: Progress) -> None:
        pass

    def ended(self, evidence: Evidence) -> None:
        if evidence.status is not Status.FINISHED:
            print(f"locally: {evidence.slug}: {evidence.label}: {evidence.verdict.reason}", file=sys.stderr)


def duration(seconds: float) -> str:
    """In the largest unit of which there are two at least.

    >>> duration(100), duration(5000), duration(1e8)
    ('100 s', '83 min', '3 years')
    """
    for unit, length in (("years", 365 * 86400), ("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


class Clock:
    """How long each experiment will still take, from how far it has come in how long."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}

    def left(self, event: Progress) -> str:
        """In words; "" as long as nobody can tell."""
        now = time.monotonic()
        begun = self._began.setdefault(event.slug, now)
        if event.fraction < TELLING or now - begun < SETTLING:
            return ""
        return f"about {duration((now - begun) * (1 - event.fraction) / event.fraction)} left"


class PlainBoard(QuietBoard):
    """One line as each experiment ends; a line now and then from one that takes long."""

    def __init__(self, slugs: Sequence[str]) -> None:
        self.total, self.done = len(slugs), 0
        self._clock, self._said = Clock(), dict[str, float]()

    def progress(self, event: Progress) -> None:
        left, now = self._clock.left(event), time.monotonic()
        if left and now - self._said.setdefault(event.slug, now) > INTERVAL:
            self._said[event.slug] = now
            print(f"{event.slug}: {event.fraction:.0%} {event.label}, {left}", file=sys.stderr, flush=True)

    def ended(self, evidence: Evidence) -> None:
        self.done += 1
        line = f"{evidence.slug}: {evidence.label} ({evidence.seconds:.1f} s) {evidence.verdict.reason}"
        print(f"[{self.done}/{self.total}] {line}", file=sys.stderr, flush=True)


class LiveBoard(QuietBoard):
    """A table with a bar for what runs and a verdict for what ended."""

    def __init__(self, slugs: Sequence[str]) -> None:
        self._running: dict[str, Progress] = {}
        self._clock = Clock()
        self._ended: dict[str, Evidence] = {}
        self._slugs = list(slugs)
        self._live = Live(console=Console(stderr=True), get_renderable=self._table, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.refresh()
        self._live.stop()

    def progress(self, event: Progress) -> None:
        self._running[event.slug] = event

    def ended(self, evidence: Evidence) -> None:
        self._ended[evidence.slug] = evidence

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False, show_header=False)
        table.add_column(no_wrap=True, min_width=max(map(len, self._slugs), default=0))
        table.add_column(min_width=13, max_width=13)
        table.add_column(justify="right", no_wrap=True, min_width=7)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for slug in self._slugs:
            table.add_row(slug, *self._state(slug))
        return table

    def _state(self, slug: str) -> tuple[str | ProgressBar, str, str]:
        ended, running = self._ended.get(slug), self._running.get(slug)
        if ended is not None:
            colour = COLOURS.get(ended.label, "red")
            return f"[{colour}]{ended.label}[/]", f"{ended.seconds:.1f} s", escape(ended.verdict.reason)
        if running is not None:
            doing = " · ".join(filter(None, (running.label, self._clock.left(running))))
            return ProgressBar(1.0, running.fraction), f"{running.fraction:.0%}", escape(doing)
        return "[dim]waiting[/dim]", "", ""
