"""What the command line asks of the database, so fast that `locally list` can afford it: sqlite3, no SQLAlchemy."""

import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locally.evidence import Scale, Status
from locally.home import database_url

if TYPE_CHECKING:
    from locally.page.store import Store

SCHEMA_VERSION = "0004"  # the newest migration

# from slug to slug by the index, so that it costs the same after a hundred runs of each paper and after ten thousand
LATEST = """
with recursive slugs(slug) as (
  select min(slug) from runs
  union all
  select (select min(runs.slug) from runs where runs.slug > slugs.slug) from slugs where slugs.slug is not null
)
select runs.slug, runs.scale, runs.status, runs.outcome, runs.reason, runs.started, runs.id
from slugs join runs on runs.id = (select max(last.id) from runs as last where last.slug = slugs.slug)
"""


@dataclass(frozen=True)
class LastRun:
    slug: str
    scale: Scale
    status: Status
    outcome: str
    reason: str
    started: str  # ISO 8601, UTC
    id: int = 0

    @property
    def label(self) -> str:
        """The badge: the verdict of a finished run, otherwise how the run ended."""
        return self.outcome if self.status is Status.FINISHED else str(self.status)


def last_runs(store: "Store | None" = None) -> dict[str, LastRun]:
    """By slug; papers that never ran are absent. Of the store that is open, if one is."""
    rows = _ask(LATEST) if store is None else store.query(_text(LATEST))
    return {row[0]: LastRun(row[0], Scale(row[1]), Status(row[2]), *row[3:]) for row in rows}


def any_fetched() -> bool:
    """Are there papers from elsewhere?"""
    return bool(_ask("select key from preprints limit 1"))


def _ask(statement: str) -> list[tuple[Any, ...]]:
    """Ask the database of this installation.

    One that this short cut cannot read - not SQLite, of another schema version, damaged - goes through the store, which
    migrates it, refuses it or sets it aside.
    """
    url = database_url()
    if url.startswith("sqlite:///"):
        try:
            connection = sqlite3.connect(f"file:{url.removeprefix('sqlite:///')}?mode=ro", uri=True, timeout=30)
            try:
                if connection.execute("select version_num from alembic_version").fetchone() == (SCHEMA_VERSION,):
                    return connection.execute(statement).fetchall()
            finally:
                connection.close()
        except sqlite3.Error:
            pass  # the store finds out what is wrong with it, or makes it
    from locally.page.store import Store

    return Store(url).query(_text(statement))


def _text(statement: str) -> Any:
    from sqlalchemy import text

    return text(statement)
