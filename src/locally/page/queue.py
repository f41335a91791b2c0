"""Runs that readers asked for: kept in the store, so that a restart loses none, and carried out a few at a time."""

import os
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from locally.errors import UsageError
from locally.evidence import Paper, Scale, Status
from locally.page.lately import Lately
from locally.page.runner import SEEDS, Progress, execute
from locally.page.schema import requests
from locally.page.store import Store
from locally.page.worker import Job


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # the experiment could not start, for a reason that the reader can mend

    @property
    def open(self) -> bool:
        return self in (State.WAITING, State.RUNNING)


NICE = 10  # readers come before experiments
OPEN = [str(s) for s in State if s.open]


@dataclass(frozen=True)
class Request:
    """One press of a run button.

    `ahead` counts the requests that come before one that waits; `fraction`, `label` and `log` tell of one that runs.
    """

    id: int
    slug: str
    scale: Scale
    state: State
    asked: str  # ISO 8601, UTC
    reason: str = ""
    run_id: int | None = None
    ahead: int = 0
    fraction: float = 0.0
    label: str = ""
    log: str = ""


class Queue:
    """Carries out requests in the order in which they came, `at_once` of them at a time, one a paper.

    Args:
        store: where requests and their evidence are kept.
        papers: reads the catalogue, so that a paper that was added meanwhile can be run.
        at_once: how many experiments run side by side; cores are shared out.
        data: folder with the user's data sets, "" for none.
    """

    def __init__(
        self, store: Store, papers: Callable[[], Mapping[str, Paper]], *, at_once: int = 1, data: str = ""
    ) -> None:
        self.store, self.papers, self.at_once, self.data = store, papers, at_once, data
        self._news = threading.Condition()
        self._open = Lately(store, self._read_open)
        self._live: dict[int, Request] = {}
        self._stops: dict[int, threading.Event] = {}
        self._threads: list[threading.Thread] = []
        self._closing = False

    def start(self) -> None:
        """Take up what an earlier process left waiting or running."""
        self._set(requests.c.state == str(State.RUNNING), state=str(State.WAITING))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.at_once)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop what runs; it waits again for the next start."""
        with self._news:
            self._closing = True
            for stop in self._stops.values():
                stop.set()
            self._news.notify_all()
        for thread in self._threads:
            thread.join()

    def ask(self, slug: str, scale: Scale) -> Request:
        """Queue a run of a paper; where one is waiting or running already, that one.

        Raises:
            UsageError: there is no such paper, or it has no experiment.
        """
        paper = self.papers().get(slug)
        if paper is None:
            raise UsageError(f"there is no paper {slug!r}")
        if not paper.runnable:
            raise UsageError(f"{slug} is not yet runnable: its method has no experiment")
        values = {"slug": slug, "scale": str(scale), "state": str(State.WAITING), "asked": _now(), "reason": ""}
        try:
            with self.store.writing() as connection:
                key = connection.execute(requests.insert().values(values)).inserted_primary_key
        except IntegrityError:
            found = self.of(slug)
            return found if found is not None else self.ask(slug, scale)  # the other one ended in between
        assert key is not None
        with self._news:
            self._news.notify()
        found = self.get(int(key[0]))
        assert found is not None
        return found

    def cancel(self, request_id: int) -> Request | None:
        """End a request that is waiting or running; None if there is no such request."""
        with self._news:
            self._set(
                (requests.c.id == request_id) & (requests.c.state == str(State.WAITING)), state=str(State.CANCELLED)
            )
            if request_id in self._stops:
                self._stops[request_id].set()
        return self.get(request_id)

    def get(self, request_id: int) -> Request | None:
        for request in self.open():
            if request.id == request_id:
                return request
        rows = self.store.query(sa.select(requests).where(requests.c.id == request_id))
        return _request(rows[0]) if rows else None

    def of(self, slug: str) -> Request | None:
        """The request for this paper that is waiting or running, if any."""
        return next((request for request in self.open() if request.slug == slug), None)

    def open(self) -> list[Request]:
        """What is running and waiting, in order."""
        return [self._with_news(request, ahead) for ahead, request in enumerate(self._open())]

    def _read_open(self) -> list[Request]:
        wanted = sa.select(requests).where(requests.c.state.in_(OPEN)).order_by(requests.c.id)
        return [_request(row) for row in self.store.query(wanted)]

    def _with_news(self, request: Request, ahead: int) -> Request:
        if request.state is State.WAITING:
            return replace(request, ahead=ahead)
        live = self._live.get(request.id)
        return request if live is None else replace(request, fraction=live.fraction, label=live.label, log=live.log)

    # Carrying out ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._news:
                request = None
                while not self._closing and (request := self._next()) is None:
                    self._news.wait(timeout=5.0)  # another process may have asked
                if self._closing or request is None:
                    return
                stop = self._stops[request.id] = threading.Event()
                self._live[request.id] = request
            try:
                self._carry_out(request, stop)
            except Exception as problem:  # the next request has a right to its turn
                traceback.print_exc()
                self._end(request, State.REFUSED, f"{type(problem).__name__}: {problem}")
            finally:
                with self._news:
                    del self._stops[request.id], self._live[request.id]

    def _next(self) -> Request | None:
        """Claim the oldest request that waits."""
        oldest = sa.select(sa.func.min(requests.c.id)).where(requests.c.state == str(State.WAITING)).scalar_subquery()
        with self.store.writing() as connection:
            row = connection.execute(sa.select(requests).where(requests.c.id == oldest)).first()
            if row is None:
                return None
            connection.execute(requests.update().where(requests.c.id == row[0]).values(state=str(State.RUNNING)))
        return replace(_request(row), state=State.RUNNING)

    def _carry_out(self, request: Request, stop: threading.Event) -> None:
        paper = self.papers().get(request.slug)
        if paper is None:
            self._end(request, State.REFUSED, f"there is no paper {request.slug!r} any more")
            return

        def progress(seen: Progress) -> None:
            self._live[request.id] = replace(self._live[request.id], fraction=seen.fraction, label=seen.label)

        def log(text: str) -> None:
            self._live[request.id] = replace(self._live[request.id], log=text)

        seeds = tuple(range(SEEDS[request.scale]))
        job = Job(request.slug, request.scale, seeds, data=self.data, threads=_threads(self.at_once), nice=NICE)
        evidence = execute(job, paper.claims, progress, stop, log)
        if evidence.status is Status.CANCELLED:
            self._end(request, State.WAITING if self._closing else State.CANCELLED, "")
        elif evidence.status is Status.REFUSED:
            self._end(request, State.REFUSED, evidence.verdict.reason)
        else:
            self.store.add(evidence, request=request.id)

    def _end(self, request: Request, state: State, reason: str) -> None:
        self._set(requests.c.id == request.id, state=str(state), reason=reason)

    def _set(self, where: Any, **values: str) -> None:
        with self.store.writing() as connection:
            connection.execute(requests.update().where(where).values(values))


def _request(row: Any) -> Request:
    return Request(row[0], row[1], Scale(row[2]), State(row[3]), *row[4:7])


def _threads(at_once: int) -> int:
    return max(1, (os.cpu_count() or 1) // at_once)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
