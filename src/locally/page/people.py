"""The people of this installation and what they keep of papers: votes, saves, reading marks, tags and private notes."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from locally.errors import UsageError
from locally.page.preprints import plain
from locally.page.schema import marks, notes, people, tags
from locally.page.store import KEYS, Store

NAME, TAG, NOTE = 40, 40, 20_000  # characters
TAGS = 30  # of one person on one paper
RESERVED = ("and", "or", "not")


class Kind(StrEnum):
    VOTE = "vote"
    SAVE = "save"
    LATER = "later"
    READ = "read"


@dataclass(frozen=True)
class Person:
    id: int
    name: str


@dataclass(frozen=True)
class Kept:
    """What one person keeps of one paper."""

    kinds: frozenset[str] = frozenset()
    tags: tuple[str, ...] = ()


@dataclass
class Belongings:
    """All that one person keeps, by paper."""

    kinds: dict[str, set[str]] = field(default_factory=dict)
    tags: dict[str, set[str]] = field(default_factory=dict)

    def __contains__(self, paper: str) -> bool:
        return paper in self.kinds or paper in self.tags

    def of(self, paper: str) -> Kept:
        return Kept(frozenset(self.kinds.get(paper, ())), tuple(sorted(self.tags.get(paper, ()))))


_VOTES = sa.select(marks.c.paper, sa.func.count()).where(marks.c.kind == str(Kind.VOTE)).group_by(marks.c.paper)
_VOTES_FOR = _VOTES.where(marks.c.paper.in_(KEYS))


class People:
    """`key` is how the page knows a person again; it never leaves the store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def known(self, *, key: str = "", number: int = 0) -> Person | None:
        where = people.c.key == key if key else people.c.id == number
        rows = self.store.query(sa.select(people.c.id, people.c.name).where(where))
        return Person(*rows[0]) if rows else None

    def welcome(self, key: str, name: str = "") -> Person:
        """The person of this key, met now for the first time or again."""
        with self.store.writing() as connection:
            found = connection.execute(sa.select(people.c.id, people.c.name).where(people.c.key == key)).first()
            if found is not None:
                return Person(*found)
            values = {"key": key, "name": plain(name, NAME), "since": now()}
            inserted = connection.execute(people.insert().values(values)).inserted_primary_key
            assert inserted is not None
            return Person(int(inserted[0]), values["name"])

    def rename(self, person: Person, name: str) -> None:
        """Show this name from now on.

        Raises:
            UsageError: there is nothing to read in it.
        """
        shown = plain(name, NAME)
        if not re.search(r"\w", shown):
            raise UsageError("a name needs a letter or a digit")
        with self.store.writing() as connection:
            connection.execute(people.update().where(people.c.id == person.id).values(name=shown))

    def mark(self, person: Person, paper: str, kind: Kind, on: bool) -> int:
        """Set or take back a mark; how many people have it now. What is read is no longer to be read later."""
        own = (marks.c.person == person.id) & (marks.c.paper == paper)
        gone = [str(kind)] + ([str(Kind.LATER)] if on and kind is Kind.READ else [])
        with self.store.writing() as connection:
            connection.execute(marks.delete().where(own & marks.c.kind.in_(gone)))
            if on:
                values = {"person": person.id, "paper": paper, "kind": str(kind), "made": now()}
                connection.execute(marks.insert().values(values))
            return _count(connection, paper, kind)

    def tag(self, person: Person, paper: str, words: str, on: bool = True) -> None:
        """Add tags, which commas separate, or take them away.

        Raises:
            UsageError: one of them cannot be a tag, or there are too many.
        """
        wanted = sorted({tag_of(word) for word in words.split(",") if word.strip()})
        own = (tags.c.person == person.id) & (tags.c.paper == paper)
        with self.store.writing() as connection:
            connection.execute(tags.delete().where(own & tags.c.tag.in_(wanted)))
            if not on or not wanted:
                return
            have = connection.scalar(sa.select(sa.func.count()).where(own)) or 0
            if have + len(wanted) > TAGS:
                raise UsageError(f"a paper takes {TAGS} tags at most")
            connection.execute(tags.insert(), [{"person": person.id, "paper": paper, "tag": t} for t in wanted])

    def note(self, person: Person, paper: str, text: str) -> None:
        """Keep a note that nobody else sees; an empty one goes away."""
        own = (notes.c.person == person.id) & (notes.c.paper == paper)
        text = text.replace("\x00", "").replace("\r\n", "\n").strip()[:NOTE]
        with self.store.writing() as connection:
            connection.execute(notes.delete().where(own))
            if text:
                values = {"person": person.id, "paper": paper, "text": text, "changed": now()}
                connection.execute(notes.insert().values(values))

    def note_of(self, person: Person, paper: str) -> str:
        wanted = sa.select(notes.c.text).where(notes.c.person == person.id, notes.c.paper == paper)
        rows = self.store.query(wanted)
        return str(rows[0][0]) if rows else ""

    def belongings(self, person: Person | None) -> Belongings:
        if person is None:
            return Belongings()
        with self.store.reading() as connection:
            marked = connection.execute(sa.select(marks.c.paper, marks.c.kind).where(marks.c.person == person.id))
            tagged = connection.execute(sa.select(tags.c.paper, tags.c.tag).where(tags.c.person == person.id))
            return Belongings(_grouped(marked), _grouped(tagged))

    def votes(self, papers: Sequence[str] | None = None) -> dict[str, int]:
        """Votes of all people, of these papers or of every one that has any."""
        rows = self.store.query(_VOTES) if papers is None else self.store.query_in(_VOTES_FOR, papers)
        return dict(map(tuple, rows))


def tag_of(text: str) -> str:
    """A tag as it is kept: lower case, words joined by hyphens.

    >>> tag_of(" Optimal Transport ")
    'optimal-transport'

    Raises:
        UsageError: it cannot stand in a filter.
    """
    tag = "-".join(text.lower().split())
    if not re.fullmatch(r"[^\W_][\w.+#-]*", tag) or len(tag) > TAG or tag in RESERVED:
        raise UsageError(f"{plain(text, TAG)!r} cannot be a tag: letters, digits and hyphens, {TAG} at most")
    return tag


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _count(connection: Connection, paper: str, kind: Kind) -> int:
    wanted = sa.select(sa.func.count()).where(marks.c.paper == paper, marks.c.kind == str(kind))
    return connection.scalar(wanted) or 0


def _grouped(rows: Iterable[Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for paper, value in rows:
        found[paper].add(value)
    return dict(found)
