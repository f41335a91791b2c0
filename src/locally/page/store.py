"""Every run and its evidence, in SQLite by default or in any database that SQLAlchemy speaks.

A run is written in one transaction: it is there whole or not at all. SQLite runs in WAL mode and writers take the
lock when they begin, so several processes write at once and none loses anything.
"""

import math
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import QueuePool

from locally.errors import UsageError
from locally.evidence import Evidence, Figure, Finding, Measure, Outcome, Scale, Status, Verdict
from locally.home import database_url
from locally.page.glance import SCHEMA_VERSION
from locally.page.schema import figures, measures, metadata, requests, runs

BUSY_TIMEOUT = 60.0  # seconds that a writer waits for another
POOL: dict[str, Any] = {"poolclass": QueuePool, "pool_size": 8, "max_overflow": 56}  # asking is cheaper than opening
MIGRATION_LOCK = 0x10CA11  # any number that nobody else locks
AT_ONCE = 500  # keys in one statement
# stands for the keys in statements that are written once: putting one together takes as long as its answer
KEYS: sa.BindParameter[Any] = sa.bindparam("keys", expanding=True)
DAMAGED = ("file is not a database", "malformed", "disk image")


class StoreError(UsageError):
    """The database cannot be used; says why and what became of it."""


@dataclass(frozen=True)
class Glance:
    """One run in a line; `label` is the verdict of a finished run, otherwise how it ended."""

    id: int
    scale: Scale
    label: str
    reason: str
    started: str
    seconds: float


class Store:
    """Runs by SQLAlchemy URL; the default is `locally.home.database_url()`.

    Raises:
        StoreError: the database cannot be opened, was written by a newer version (refused), or is damaged (the file
            is set aside under another name, which the message gives; nothing is ever deleted).
    """

    def __init__(self, url: str | None = None) -> None:
        try:
            self.url = sa.make_url(url or database_url())
            self.engine = sa.create_engine(self.url, hide_parameters=True, **POOL)
        except (sa.exc.ArgumentError, ModuleNotFoundError) as error:
            raise StoreError(f"cannot open the database {url!r}: {error}") from None
        self.file = Path(self.url.database) if self._is_sqlite and self.url.database else None
        self._watching: sqlite3.Connection | None = None
        self._watched = threading.Lock()
        if self._is_sqlite:
            _prepare_sqlite(self.engine)
        with self._explained():
            if self.file is None:
                self._migrate()
            else:
                with FileLock(f"{self.file}.lock", timeout=BUSY_TIMEOUT):
                    self._migrate()

    def add(self, evidence: Evidence, request: int | None = None) -> int:
        """Store one run, whole or not at all; its id. With it goes the news that a request for it is done."""
        e = evidence
        with self.writing() as connection:
            inserted = connection.execute(
                runs.insert().values(
                    slug=e.slug,
                    scale=str(e.scale),
                    status=str(e.status),
                    outcome=str(e.verdict.outcome),
                    reason=e.verdict.reason,
                    findings=[f.to_dict() for f in e.verdict.findings],
                    seeds=list(e.seeds),
                    device=e.device,
                    started=e.started,
                    seconds=e.seconds,
                    peak_memory_mib=e.peak_memory_mib,
                    versions=dict(e.versions),
                    code_version=e.code_version,
                    git_revision=e.git_revision,
                    machine=dict(e.machine),
                    log=e.log,
                )
            )
            assert inserted.inserted_primary_key is not None
            run_id = int(inserted.inserted_primary_key[0])
            if e.measures:
                connection.execute(
                    measures.insert(),
                    [
                        {
                            "run_id": run_id,
                            "position": i,
                            "method": m.method,
                            "metric": m.metric,
                            "value": None if math.isnan(m.value) else m.value,
                            "seed": m.seed,
                            "setting": dict(m.setting),
                        }
                        for i, m in enumerate(e.measures)
                    ],
                )
            if e.figures:
                connection.execute(
                    figures.insert(),
                    [
                        {
                            "run_id": run_id,
                            "position": i,
                            "name": f.name,
                            "caption": f.caption,
                            "svg": f.svg,
                            "pdf": f.pdf,
                            "png": f.png,
                        }
                        for i, f in enumerate(e.figures)
                    ],
                )
            if request is not None:
                done = {"state": "done", "run_id": run_id}
                connection.execute(requests.update().where(requests.c.id == request).values(done))
        return run_id

    def latest(self, slug: str, scale: Scale | None = None) -> Evidence | None:
        """The newest run of a paper, whatever became of it."""
        wanted = sa.select(runs).where(runs.c.slug == slug).order_by(runs.c.id.desc()).limit(1)
        if scale is not None:
            wanted = wanted.where(runs.c.scale == str(scale))
        with self._explained(), self.engine.connect() as connection:
            row = connection.execute(wanted).mappings().first()
            return None if row is None else _evidence(connection, row)

    def history(self, slug: str) -> Sequence[Evidence]:
        """All runs of a paper, oldest first."""
        wanted = sa.select(runs).where(runs.c.slug == slug).order_by(runs.c.id)
        with self._explained(), self.engine.connect() as connection:
            return [_evidence(connection, row) for row in connection.execute(wanted).mappings().all()]

    def glance(self, slug: str, limit: int = 30) -> Sequence[Glance]:
        """The last runs of a paper without their records, newest first."""
        columns = (
            runs.c.id,
            runs.c.scale,
            runs.c.status,
            runs.c.outcome,
            runs.c.reason,
            runs.c.started,
            runs.c.seconds,
        )
        wanted = sa.select(*columns).where(runs.c.slug == slug).order_by(runs.c.id.desc()).limit(limit)
        return [
            Glance(i, Scale(scale), outcome if status == Status.FINISHED else status, reason, started, seconds)
            for i, scale, status, outcome, reason, started, seconds in self.query(wanted)
        ]

    def findings(self, slug: str, limit: int = 20) -> list[Sequence[Finding]]:
        """What the last finished runs of a paper found of its claims, oldest run first."""
        finished = (runs.c.slug == slug) & (runs.c.status == str(Status.FINISHED))
        wanted = sa.select(runs.c.findings).where(finished).order_by(runs.c.id.desc()).limit(limit)
        return [tuple(map(Finding.from_dict, row[0])) for row in reversed(self.query(wanted))]

    def run(self, run_id: int) -> Evidence | None:
        with self._explained(), self.engine.connect() as connection:
            row = connection.execute(sa.select(runs).where(runs.c.id == run_id)).mappings().first()
            return None if row is None else _evidence(connection, row)

    def has(self, slug: str, scale: Scale, seeds: Sequence[int], device: str, code_version: str) -> bool:
        """Is a finished run of just this stored already?"""
        wanted = sa.select(runs.c.seeds).where(
            runs.c.slug == slug,
            runs.c.scale == str(scale),
            runs.c.device == device,
            runs.c.code_version == code_version,
            runs.c.status == str(Status.FINISHED),
        )
        return any(row[0] == list(seeds) for row in self.query(wanted))

    def query(self, statement: Any) -> list[Any]:
        with self._explained(), self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(statement)]

    def query_in(self, statement: Any, keys: Sequence[str]) -> list[sa.Row[Any]]:
        """The rows of a statement for these `KEYS`, however many there are."""
        with self.reading() as connection:
            return [
                row
                for start in range(0, len(keys), AT_ONCE)
                for row in connection.execute(statement, {"keys": list(keys[start : start + AT_ONCE])})
            ]

    def stamp(self) -> object:
        """Equals an earlier one only if nobody, in whatever process, has written since; costs some microseconds.

        Where the database cannot tell (all but SQLite) no two are equal.
        """
        if self.file is None:
            return object()
        with self._explained(), self._watched:
            if self._watching is None:  # a connection that never writes, so that it hears of every change
                self._watching = sqlite3.connect(self.file, check_same_thread=False, isolation_level=None)
            return self._watching, self._watching.execute("pragma data_version").fetchone()[0]

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction that sees one state of the database."""
        with self._explained(), self.engine.connect() as connection:
            yield connection

    @property
    def _is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction, which takes the lock of writers when it begins."""
        with self._explained(), self.engine.execution_options(locally_write=True).begin() as connection:
            yield connection

    def _migrate(self) -> None:
        """Bring the schema to this version; refuse one that is newer."""
        with self.writing() as connection:
            if not self._is_sqlite:  # whose file is locked already
                self._queue_up(connection)
            known = sa.inspect(connection).has_table("alembic_version")
            found = connection.scalar(sa.text("select version_num from alembic_version")) if known else None
            if found == SCHEMA_VERSION:
                return
            if found is not None and found > SCHEMA_VERSION:
                raise StoreError(
                    f"the database {self.url} was written by a newer version of Locally (schema {found}; this one "
                    f"knows {SCHEMA_VERSION}): upgrade Locally, or name another with LOCALLY_DATABASE"
                )
            from alembic import command
            from alembic.config import Config

            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
            config.attributes |= {"connection": connection, "metadata": metadata}
            command.upgrade(config, "head")

    def _queue_up(self, connection: Connection) -> None:
        """One process at a time from here to the end of the transaction, on a server that has such locks."""
        if self.url.get_backend_name() == "postgresql":
            connection.execute(sa.text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the driver's errors into one line that says what happened and what to do."""
        try:
            yield
        except DatabaseError as error:
            text = str(error.orig)
            if self.file is not None and any(sign in text for sign in DAMAGED):
                aside = self._set_aside()
                raise StoreError(
                    f"the database {self.file} is damaged ({text}); it was set aside as {aside}, "
                    "and the next command starts a new one"
                ) from None
            if isinstance(error, OperationalError):
                raise StoreError(f"the database {self.url} cannot be used: {text}") from None
            raise
        except OSError as error:
            raise StoreError(f"the database {self.url} cannot be used: {error}") from None

    def _set_aside(self) -> Path:
        assert self.file is not None
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        self.engine.dispose()  # what is still open would go on in the file that is set aside
        self._watching = None
        aside = self.file.with_name(f"{self.file.stem}-damaged-{stamp}{self.file.suffix}")
        for suffix in ("", "-wal", "-shm"):
            part = Path(f"{self.file}{suffix}")
            if part.exists():
                part.rename(f"{aside}{suffix}")
        return aside


def _prepare_sqlite(engine: Engine) -> None:
    """WAL, foreign keys, patience with other writers, and transactions that begin when SQLAlchemy says so."""

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver's own habit of beginning late would lose the write lock
        cursor = connection.cursor()
        cursor.execute(f"pragma busy_timeout = {int(1000 * BUSY_TIMEOUT)}")
        if cursor.execute("pragma journal_mode").fetchone()[0] != "wal":
            cursor.execute("pragma journal_mode = wal")
        cursor.execute("pragma synchronous = normal")
        cursor.execute("pragma foreign_keys = on")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("locally_write", False)
        connection.exec_driver_sql("begin immediate" if writes else "begin")


def _evidence(connection: Connection, row: Any) -> Evidence:
    recorded = connection.execute(sa.select(measures).where(measures.c.run_id == row["id"]).order_by("position"))
    drawn = connection.execute(sa.select(figures).where(figures.c.run_id == row["id"]).order_by("position"))
    return Evidence(
        slug=row["slug"],
        scale=Scale(row["scale"]),
        status=Status(row["status"]),
        verdict=Verdict(Outcome(row["outcome"]), row["reason"], tuple(map(Finding.from_dict, row["findings"]))),
        measures=tuple(
            Measure(m.method, m.metric, math.nan if m.value is None else m.value, m.seed, m.setting) for m in recorded
        ),
        seeds=tuple(row["seeds"]),
        started=row["started"],
        seconds=row["seconds"],
        peak_memory_mib=row["peak_memory_mib"],
        device=row["device"],
        figures=tuple(Figure(f.name, f.caption, f.svg, f.pdf, f.png) for f in drawn),
        versions=row["versions"],
        code_version=row["code_version"],
        git_revision=row["git_revision"],
        machine=row["machine"],
        log=row["log"],
    )
