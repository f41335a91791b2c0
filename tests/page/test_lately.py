"""What the page remembers of the database is never older than the last change, whoever made it."""

import sqlite3
import subprocess
import sys

import pytest
import sqlalchemy as sa

from locally.page.lately import Lately
from locally.page.people import Kind, People
from locally.page.schema import marks
from locally.page.store import Store


@pytest.fixture
def counted():
    """A store, and how many marks it has, with the number of times that was asked."""
    store, asked = Store(), []

    def read() -> int:
        asked.append(1)
        return store.query(sa.select(sa.func.count()).select_from(marks))[0][0]

    return store, Lately(store, read), asked


def test_it_is_asked_once_as_long_as_nobody_writes(counted):
    store, lately, asked = counted
    store.query(sa.select(marks))
    assert [lately() for _ in range(5)] == [0] * 5
    assert len(asked) == 1


def test_a_change_through_the_store_is_seen_at_once(counted):
    store, lately, _ = counted
    assert lately() == 0
    ada = People(store).welcome("ada")
    for number, kind in enumerate(Kind, 1):
        People(store).mark(ada, f"paper-{number}", kind, on=True)
        assert lately() == number


def test_a_change_by_another_process_is_seen_at_once(counted):
    _, lately, _ = counted
    assert lately() == 0
    other = "from locally.page.people import *; p = People(Store()); p.mark(p.welcome('ada'), 'x', Kind.SAVE, True)"
    subprocess.run([sys.executable, "-c", other], check=True)
    assert lately() == 1


def test_what_cannot_tell_is_asked_each_time(counted, monkeypatch):
    store, lately, asked = counted
    monkeypatch.setattr(store, "file", None)  # as for a server such as PostgreSQL
    assert [lately(), lately()] == [0, 0]
    assert len(asked) == 2


def test_an_answer_that_fails_is_asked_again(counted):
    store, _, _ = counted
    answers = iter([sqlite3.OperationalError("busy"), 7])

    def read() -> int:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    lately = Lately(store, read)
    with pytest.raises(sqlite3.OperationalError):
        lately()
    assert lately() == 7


def test_a_new_database_in_the_place_of_a_damaged_one_is_another(home):
    store = Store()
    before = store.stamp()
    assert store.stamp() == before
    store._set_aside()
    Store()  # makes a new one
    assert store.stamp() != before
