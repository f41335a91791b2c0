"""The store keeps runs whole: under many writers, across versions, and beside a damaged file."""

import math
import multiprocessing
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from locally.evidence import Claim, Evidence, Figure, Measure, Relation, Scale, Status, judge
from locally.page import schema
from locally.page.glance import SCHEMA_VERSION, last_runs
from locally.page.store import Store, StoreError

CLAIM = Claim("s", "error", "ours", Relation.AT_MOST, 1.0, "Theorem 1")


def evidence(slug: str = "first", value: float = 0.5, **other) -> Evidence:
    measures = (
        Measure("ours", "error", value, 0, {"n": 3, "norm": "l2", "warm": True}),
        Measure("ours", "error", value, 1),
        Measure("ours", "seconds", math.inf, None),
    )
    made = Evidence(
        slug=slug,
        scale=Scale.QUICK,
        status=Status.FINISHED,
        verdict=judge([CLAIM], measures, Scale.QUICK),
        measures=measures,
        seeds=(0, 1),
        started="2026-01-02T03:04:05+00:00",
        seconds=1.5,
        peak_memory_mib=99.0,
        figures=(Figure("error", "", "<svg/>", b"%PDF", b"\x89PNG"),),
        versions={"numpy": "2.0"},
        code_version="0.1.0+abc",
        git_revision="f00",
        machine={"cores": 2},
        log="hello\n",
    )
    return replace(made, **other)


def test_a_run_comes_back_as_it_went_in():
    store = Store()
    store.add(evidence())
    assert store.latest("first") == evidence()


def test_not_a_number_comes_back():
    store = Store()
    store.add(evidence(value=math.nan))
    found = store.latest("first")
    assert found is not None
    assert math.isnan(found.measures[0].value)
    assert found.measures[2].value == math.inf


def test_latest_is_the_newest_and_history_is_in_order():
    store = Store()
    for i in range(3):
        store.add(evidence(seconds=float(i)))
    store.add(evidence("second"))
    assert [e.seconds for e in store.history("first")] == [0.0, 1.0, 2.0]
    assert store.latest("first").seconds == 2.0
    assert store.latest("first", Scale.PAPER) is None
    assert store.latest("never") is None


def test_resume_asks_for_the_same_code_scale_seeds_and_device():
    store = Store()
    store.add(evidence())
    assert store.has("first", Scale.QUICK, (0, 1), "cpu", "0.1.0+abc")
    assert not store.has("first", Scale.DEFAULT, (0, 1), "cpu", "0.1.0+abc")
    assert not store.has("first", Scale.QUICK, (0, 1, 2), "cpu", "0.1.0+abc")
    assert not store.has("first", Scale.QUICK, (0, 1), "cuda", "0.1.0+abc")
    assert not store.has("first", Scale.QUICK, (0, 1), "cpu", "0.1.0+xyz")
    store.add(evidence("second", status=Status.CRASHED))
    assert not store.has("second", Scale.QUICK, (0, 1), "cpu", "0.1.0+abc")


def test_a_run_that_cannot_be_written_whole_is_not_written_at_all():
    store = Store()
    broken = evidence(figures=(Figure("error", "", "<svg/>", "not bytes", b""),))  # type: ignore[arg-type]
    with pytest.raises(sa.exc.SQLAlchemyError):
        store.add(broken)
    assert store.query(sa.select(sa.func.count()).select_from(schema.runs)) == [(0,)]
    assert store.query(sa.select(sa.func.count()).select_from(schema.measures)) == [(0,)]


def _write_many(writer: int, count: int) -> None:
    store = Store()
    for i in range(count):
        store.add(evidence(f"writer-{writer}", value=float(i)))


def test_eight_writers_at_once_lose_nothing():
    """Each opens the store for itself, on a database that is not there yet."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(w, 200)) for w in range(8)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    assert [w.exitcode for w in writers] == [0] * 8
    store = Store()
    assert store.query(sa.select(sa.func.count()).select_from(schema.runs)) == [(1600,)]
    assert store.query(sa.select(sa.func.count()).select_from(schema.measures)) == [(4800,)]
    assert [e.measures[0].value for e in store.history("writer-7")] == [float(i) for i in range(200)]


def test_the_migrations_make_the_schema_that_the_code_expects():
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    store = Store()
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() == SCHEMA_VERSION


def test_the_short_cut_reads_what_the_store_wrote():
    assert last_runs() == {}
    store = Store()
    store.add(evidence())
    store.add(evidence("second", status=Status.TIMED_OUT))
    found = last_runs()
    assert {slug: run.label for slug, run in found.items()} == {"first": "holds", "second": "timed out"}


def test_a_database_from_a_newer_version_is_refused_and_left_alone(home: Path):
    store = Store()
    store.add(evidence())
    with sqlite3.connect(home / "runs.sqlite") as connection:
        connection.execute("update alembic_version set version_num = '9999'")
    connection.close()
    before = (home / "runs.sqlite").read_bytes()
    for read in (Store, last_runs):
        with pytest.raises(StoreError, match=r"newer version of Locally \(schema 9999"):
            read()
    assert (home / "runs.sqlite").read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "torn"])
def test_a_damaged_database_is_set_aside_under_a_name_that_is_told(home: Path, damage):
    file = home / "runs.sqlite"
    store = Store()
    store.add(evidence())
    with sqlite3.connect(file) as connection:
        connection.execute("pragma wal_checkpoint(truncate)")
    connection.close()
    content = file.read_bytes()
    damaged = b"this is not a database" * 400 if damage == "garbage" else content[:4096] + b"\0" * (len(content) - 4096)
    file.write_bytes(damaged)
    with pytest.raises(StoreError, match="damaged") as caught:
        last_runs()
    aside = next(home.glob("runs-damaged-*.sqlite"))
    assert str(aside) in str(caught.value)
    assert aside.read_bytes() == damaged
    assert Store().latest("first") is None  # a new one


@pytest.mark.parametrize("url", ["nonsense", "nodialect://x", "sqlite:////proc/nowhere/runs.sqlite"])
def test_an_unusable_url_is_named(url, monkeypatch):
    monkeypatch.setenv("LOCALLY_DATABASE", url)
    with pytest.raises(StoreError, match=r"database"):
        Store()
