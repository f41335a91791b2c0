"""The same store, queue and command line on a real PostgreSQL server, through the same migrations."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from locally import catalogue
from locally.evidence import Scale
from locally.page import schema
from locally.page.glance import SCHEMA_VERSION, last_runs
from locally.page.queue import Queue, State
from locally.page.store import Store
from tests.page.test_store import evidence

pytest.importorskip("psycopg", reason="needs the extra postgres")
PROGRAMS = [shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
INITDB = next((Path(p) for p in reversed(PROGRAMS) if p), None)
pytestmark = pytest.mark.skipif(INITDB is None, reason="PostgreSQL is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a server that is thrown away; PostgreSQL does not run as root."""
    assert INITDB is not None
    as_other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postgres-")))
        if as_other:
            shutil.chown(folder, "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def control(*words: str) -> None:
            subprocess.run([*as_other, *words], check=True, cwd=folder, capture_output=True, timeout=60)

        data = str(folder / "data")
        control(str(INITDB), "-D", data, "-U", "locally", "--auth", "trust", "--no-sync")
        pg_ctl = str(INITDB.with_name("pg_ctl"))
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        control(pg_ctl, "-D", data, "-o", settings, "-l", str(folder / "log"), "-w", "start")
        stack.callback(control, pg_ctl, "-D", data, "-m", "immediate", "stop")
        yield f"postgresql+psycopg://locally@127.0.0.1:{port}"


@pytest.fixture
def url(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of its own for each test, which commands use too."""
    name = f"test_{os.getpid()}_{next(NUMBERS)}"
    engine = sa.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    engine.dispose()
    monkeypatch.setenv("LOCALLY_DATABASE", f"{server}/{name}")
    return f"{server}/{name}"


NUMBERS = iter(range(1000))


def test_the_migrations_build_the_same_tables(url):
    store = Store(url)
    with store.engine.connect() as connection:
        assert connection.scalar(sa.text("select version_num from alembic_version")) == SCHEMA_VERSION
        tables = set(sa.inspect(connection).get_table_names())
    assert set(schema.metadata.tables) <= tables


def test_a_run_comes_back_as_it_went_in(url):
    store = Store(url)
    first = store.add(evidence())
    store.add(evidence("second", value=0.25))
    assert store.latest("first") == evidence()
    assert store.run(first) == evidence()
    assert store.has("first", Scale.QUICK, (0, 1), "cpu", "0.1.0+abc")
    assert not store.has("first", Scale.QUICK, (0,), "cpu", "0.1.0+abc")
    assert [g.label for g in store.glance("second")] == ["holds"]
    assert set(last_runs()) == {"first", "second"}


def test_many_writers_and_first_starts_at_once_lose_nothing(url):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: Store(url).add(evidence(f"paper-{i % 2}")), range(16)))
    assert [len(Store(url).history(f"paper-{i}")) for i in range(2)] == [8, 8]


def test_one_request_for_a_paper_at_a_time(url, add_paper):
    add_paper("good")
    queue = Queue(Store(url), lambda: {p.slug: p for p in catalogue.load()})
    with ThreadPoolExecutor(4) as pool:
        asked = list(pool.map(lambda _: queue.ask("good", Scale.QUICK).id, range(8)))
    assert len(set(asked)) == 1
    assert queue.cancel(asked[0]).state is State.CANCELLED
    assert queue.ask("good", Scale.QUICK).id != asked[0]


def test_the_command_line_stores_there(url, add_paper, home):
    add_paper("good")
    command = [sys.executable, "-m", "locally.cli", "run", "good", "--scale", "quick"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    listed = subprocess.run([sys.executable, "-m", "locally.cli", "list", "--json"], capture_output=True, text=True)
    assert {p["slug"]: p["verdict"] for p in json.loads(listed.stdout)}["good"] == "holds"
    assert not (home / "runs.sqlite").exists()


def test_a_server_that_is_gone_is_one_line(monkeypatch):
    monkeypatch.setenv("LOCALLY_DATABASE", "postgresql+psycopg://locally@127.0.0.1:1/none")
    ended = subprocess.run(
        [sys.executable, "-m", "locally.cli", "show", "halpern"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("locally: the database postgresql+psycopg://locally@127.0.0.1:1/none cannot be used")
    assert ended.stderr.count("\n") == 1
