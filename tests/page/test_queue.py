"""Requests are carried out once, in order, one a paper; a restart loses none; a cancelled one leaves nothing behind."""

import time
from collections.abc import Callable, Iterator

import pytest

from locally import catalogue
from locally.errors import UsageError
from locally.evidence import Outcome, Scale
from locally.page.queue import Queue, State
from locally.page.store import Store
from tests.page.conftest import GOOD

SLOW = """
import time

def experiment(run):
    print("under way", flush=True)
    for _ in run.track(range(600), "turning"):
        time.sleep(0.1)
"""


@pytest.fixture
def queue(home) -> Iterator[Callable[..., Queue]]:
    made: list[Queue] = []

    def make(**options) -> Queue:
        made.append(Queue(Store(), lambda: {p.slug: p for p in catalogue.load()}, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_request_becomes_a_stored_run(queue, add_paper):
    add_paper("good")
    q = queue()
    asked = q.ask("good", Scale.QUICK)
    assert asked.state is State.WAITING
    q.start()
    wait_for(lambda: q.get(asked.id).state is State.DONE)
    evidence = q.store.run(q.get(asked.id).run_id)
    assert evidence.slug == "good"
    assert evidence.verdict.outcome is Outcome.HOLDS
    assert q.open() == []


def test_a_paper_is_queued_once_and_others_wait_in_order(queue, add_paper):
    for slug in ("first", "second"):
        add_paper(slug)
    q = queue()
    first, again = q.ask("first", Scale.QUICK), q.ask("first", Scale.DEFAULT)
    second = q.ask("second", Scale.QUICK)
    assert again == first
    assert second.ahead == 1
    assert [r.slug for r in q.open()] == ["first", "second"]


def test_progress_and_the_end_of_the_log_are_seen_and_cancelling_ends_the_experiment(queue, add_paper):
    add_paper("slow", SLOW)
    q = queue()
    q.start()
    asked = q.ask("slow", Scale.QUICK)
    wait_for(lambda: q.get(asked.id).fraction > 0 and "under way" in q.get(asked.id).log)
    assert q.get(asked.id).label == "turning"
    q.cancel(asked.id)
    wait_for(lambda: q.get(asked.id).state is State.CANCELLED)
    assert q.store.latest("slow") is None
    assert q.cancel(10_000) is None


def test_what_ran_when_the_server_stopped_runs_again_after_it_starts(queue, add_paper):
    add_paper("slow", SLOW)
    card = add_paper("patient", SLOW)
    q = queue()
    q.start()
    running, waiting = q.ask("slow", Scale.QUICK), q.ask("patient", Scale.QUICK)
    wait_for(lambda: q.get(running.id).fraction > 0)
    q.close()
    assert {q.get(r.id).state for r in (running, waiting)} == {State.WAITING}
    for path in (card.parent / "slow.py", card.parent / "patient.py"):
        path.write_text(GOOD)
    after = queue()
    after.start()
    wait_for(lambda: not after.open())
    assert [len(after.store.glance(slug)) for slug in ("slow", "patient")] == [1, 1]


def test_what_cannot_run_is_refused_by_name(queue, add_paper):
    add_paper("unwritten", None)
    q = queue()
    with pytest.raises(UsageError, match="nonsense"):
        q.ask("nonsense", Scale.QUICK)
    with pytest.raises(UsageError, match="unwritten is not yet runnable"):
        q.ask("unwritten", Scale.QUICK)


def test_a_refusal_of_the_experiment_is_told(queue, add_paper):
    add_paper("hungry", "def experiment(run):\n    run.data('a.csv', 'a table')\n")
    q = queue()
    q.start()
    asked = q.ask("hungry", Scale.QUICK)
    wait_for(lambda: q.get(asked.id).state is State.REFUSED)
    assert "a.csv" in q.get(asked.id).reason
