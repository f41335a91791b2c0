"""Trending by its formula: every kind of attention has its weight, and all of it fades."""

import math
from datetime import date, timedelta

import pytest
import sqlalchemy as sa

from locally.page import trending as room
from locally.page.people import Kind, People
from locally.page.schema import marks, views
from locally.page.store import Store
from locally.page.trending import HALF_LIFE, HORIZON, RUN, SAVE, VIEW, Trending, scores
from tests.page.test_store import evidence

DAY = date(2026, 3, 10)


@pytest.fixture
def store() -> Store:
    return Store()


def seen(store: Store, paper: str, count: int, age: int) -> None:
    with store.writing() as connection:
        day = (DAY - timedelta(days=age)).isoformat()
        connection.execute(views.insert().values(paper=paper, day=day, count=count))


def test_the_formula(store):
    seen(store, "p", 4, age=0)
    seen(store, "p", 8, age=3)
    seen(store, "q", 1, age=HORIZON)
    people = People(store)
    for i in range(2):
        people.mark(people.welcome(f"cookie:{i}"), "p", Kind.SAVE, True)
    people.mark(people.welcome("cookie:1"), "q", Kind.VOTE, True)  # votes have an order of their own
    with store.writing() as connection:
        connection.execute(marks.update().values(made="2026-03-07T12:00:00+00:00"))
    store.add(evidence("p", started="2026-03-09T01:00:00+00:00"))
    store.add(evidence("old", started="2020-01-01T00:00:00+00:00"))
    half = 2 ** (-1 / HALF_LIFE)
    found = scores(store, DAY)
    assert found.keys() == {"p"}
    assert math.isclose(found["p"], VIEW * (4 + 8 / 2) + SAVE * 2 / 2 + RUN * half)


def test_attention_halves_in_its_half_life(store):
    seen(store, "p", 16, age=0)
    then, later = scores(store, DAY), scores(store, DAY + timedelta(days=int(HALF_LIFE)))
    assert math.isclose(later["p"], then["p"] / 2)


def test_views_are_written_together_and_none_is_lost(store, monkeypatch):
    monkeypatch.setattr(room, "FLUSH", 3600.0)
    trending = Trending(store)
    for _ in range(5):
        trending.view("p")
    assert store.query(sa.select(views.c.count)) == []
    assert trending.scores() == {"p": 5 * VIEW}
    trending.view("p")
    trending.flush()
    trending.flush()
    assert store.query(sa.select(views.c.count)) == [(6,)]


def test_views_that_cannot_be_written_now_are_written_later(store, monkeypatch):
    trending = Trending(store)
    trending.view("p")
    with monkeypatch.context() as broken:
        broken.setattr(store, "writing", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trending.flush()
    trending.flush()
    assert store.query(sa.select(views.c.count)) == [(1,)]


def test_scores_are_kept_for_a_while(store, monkeypatch):
    trending = Trending(store)
    assert trending.scores() == {}
    store.add(evidence("p", started=room.today().isoformat() + "T00:00:00+00:00"))
    assert trending.scores() == {}
    monkeypatch.setattr(room, "FRESH", 0.0)
    assert trending.scores() == {"p": RUN}
