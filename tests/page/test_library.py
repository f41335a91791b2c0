"""The library orders and filters cards and fetched papers alike, and the shelf keeps the index up to date."""

import sqlite3
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locally.page import shelf as shelf_room
from locally.page.library import Library, Order, Period, Span
from locally.page.preprints import Preprint, Preprints
from locally.page.shelf import Shelf, index_file
from locally.page.store import Store

PAPER = Preprint("2603.00001", "Looms", ("A",), "Weaving.", "2026-03-01", "2026-03-01", "2026-03-01")


def paper(number: int, day: str, upvotes: int = 0, title: str = "Looms") -> Preprint:
    return replace(PAPER, key=f"2603.{number:05d}", day=day, upvotes=upvotes, title=title)


@pytest.fixture
def library() -> Library:
    store = Store()
    Preprints(store).add([paper(1, "2026-03-01", 5), paper(2, "2026-03-03", 1), paper(3, "2026-03-03", 9)])
    library = Library(store)
    library.refresh()
    return library


def fetched(keys) -> list[int]:
    return [int(k.partition(".")[2]) for k in keys if "." in k]


def test_orders(library):
    assert fetched(library.keys(Order.NEWEST)) == [2, 3, 1]
    assert fetched(library.keys(Order.TOP)) == [3, 1, 2]
    assert fetched(library.keys(Order.TOP, scores={"2603.00001": 2.0, "nobody": 9.0})) == [1, 3, 2]
    assert library.keys(Order.TRENDING, scores={"halpern": 0.1})[0] == "halpern"
    keys = list(library.keys(Order.NUMBER))
    assert keys[0] == "adasketch-newton"
    assert fetched(keys[-3:]) == [2, 3, 1]


def test_filters(library):
    keys = library.keys(Order.NEWEST, among=["2603.00001", "halpern", "nobody"])
    assert list(keys) == ["2603.00001", "halpern"]
    assert (keys.cards, keys.fetched, len(keys)) == (["halpern"], 1, 2)
    assert list(keys.only([], fetched=True)) == ["2603.00001"]
    assert list(keys.only(["halpern"], fetched=False)) == ["halpern"]
    assert fetched(library.keys(Order.NEWEST, without=["2603.00002"])) == [3, 1]
    assert fetched(library.keys(Order.NEWEST, Span(date(2026, 3, 1), date(2026, 3, 2)))) == [1]


def test_news_are_noticed(library):
    Preprints(library.store).add([paper(4, "2026-03-04"), paper(1, "2026-03-05", 5, "Changed")])
    library.refresh()
    assert fetched(library.keys(Order.NEWEST)) == [1, 4, 2, 3]
    assert library.newest_day() == date(2026, 3, 5)


@given(st.dates(date(1991, 1, 1), date(2100, 1, 1)), st.sampled_from([p for p in Period if p is not Period.ALL]))
def test_periods_follow_each_other_without_gap(day, period):
    span = Span.of(period, day)
    assert span.first <= day < span.after
    assert Span.of(period, span.first) == span
    assert Span.of(period, span.after).first == span.after
    assert (span.after - span.first).days in {Period.DAY: {1}, Period.WEEK: {7}, Period.MONTH: {28, 29, 30, 31}}[period]


class TestShelf:
    def test_few_new_papers_are_indexed_before_the_answer(self):
        store = Store()
        shelf = Shelf(store)
        shelf.refresh()
        Preprints(store).add([paper(1, "2026-03-01", title="Jacquard looms")])
        shelf.refresh()
        assert shelf.index.search("jacquard") == ["2603.00001"]

    def test_many_are_indexed_meanwhile(self, monkeypatch):
        monkeypatch.setattr(shelf_room, "INLINE", 2)
        store = Store()
        shelf = Shelf(store)
        shelf.refresh()
        for i in range(5):
            Preprints(store).add([paper(i, "2026-03-01", title=f"Jacquard looms {i}")])
        shelf.refresh()
        shelf._behind.join()
        assert len(shelf.index.search("jacquard")) == 5

    def test_revisions_are_taken_in_portions(self, monkeypatch):
        monkeypatch.setattr(shelf_room, "AT_ONCE", 3)
        store = Store()
        for i in range(4):
            Preprints(store).add([paper(10 * i + j, "2026-03-01", title=f"Jacquard {i} {j}") for j in range(2)])
        shelf = Shelf(store)
        shelf.refresh()
        assert len(shelf.index.search("jacquard")) == 8
        assert shelf.index.revision == 4

    def test_a_damaged_index_is_made_anew(self):
        store = Store()
        Preprints(store).add([paper(1, "2026-03-01", title="Jacquard looms")])
        Shelf(store).refresh()
        for part in index_file(store).parent.glob("search-*"):
            part.unlink()
        index_file(store).write_bytes(b"not an index" * 1000)
        shelf = Shelf(store)
        shelf.refresh()
        assert shelf.index.search("jacquard") == ["2603.00001"]

    def test_the_index_of_a_database_that_was_replaced_is_not_used(self, home):
        Preprints(Store()).add([paper(1, "2026-03-01", title="Jacquard looms")])
        Shelf(Store()).refresh()
        for part in home.glob("runs.sqlite*"):
            part.unlink()
        shelf = Shelf(Store())
        shelf.refresh()
        assert shelf.index.search("jacquard") == []
        assert sqlite3.connect(index_file(shelf.library.store)).execute("pragma integrity_check").fetchone() == ("ok",)
