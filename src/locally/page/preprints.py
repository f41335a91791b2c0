"""Papers fetched from elsewhere: one row a paper, whatever sources and versions it was seen in."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from locally.page.schema import preprints, remembered
from locally.page.store import AT_ONCE, KEYS, Store

ARXIV, HUGGING_FACE = "arxiv", "huggingface"
TITLE, SUMMARY, NAME, REMARK = 500, 20_000, 120, 1_000  # characters kept
AUTHORS, LABELS = 500, 30  # names, categories and keywords kept
_ALL_OF = sa.select(preprints).where(preprints.c.key.in_(KEYS))

IDENTIFIER = re.compile(r"(?P<id>\d{4}\.\d{4,5}|[a-z][a-z-]{1,20}(?:\.[A-Z]{2})?/\d{7})(?:v(?P<version>[1-9]\d{0,3}))?")


@dataclass(frozen=True)
class Preprint:
    """What is known of one paper.

    `key` is its arXiv id without the version (with `_` for the slash of old ids), `version` 0 where the source does
    not tell, `day` the date under which the feed shows it, `upvotes` those at the source.
    """

    key: str
    title: str
    authors: tuple[str, ...]
    summary: str
    published: str  # ISO 8601, UTC
    updated: str
    day: str
    version: int = 0
    categories: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    organisation: str = ""
    remark: str = ""
    upvotes: int = 0
    sources: tuple[str, ...] = ()

    @property
    def arxiv(self) -> str:
        return self.key.replace("_", "/")

    @classmethod
    def from_row(cls, row: Any) -> Self:
        values = {name: row[name] for name in cls.__dataclass_fields__}
        return cls(**values | {name: tuple(values[name]) for name in ("authors", "categories", "keywords", "sources")})


@dataclass(frozen=True)
class Remembered:
    """What a server said of an address, and how many entries stood there."""

    address: str
    etag: str = ""
    modified: str = ""
    entries: int = 0


@dataclass(frozen=True)
class Added:
    new: int = 0
    changed: int = 0
    same: int = 0

    def __add__(self, other: "Added") -> "Added":
        return Added(self.new + other.new, self.changed + other.changed, self.same + other.same)


class Preprints:
    def __init__(self, store: Store) -> None:
        self.store = store

    def add(self, found: Sequence[Preprint], page: Remembered | None = None) -> Added:
        """Merge one page of results, and what its server said, in one transaction: all of it or nothing."""
        merged: dict[str, Preprint] = {}
        for one in found:
            merged[one.key] = merge(merged[one.key], one) if one.key in merged else one
        with self.store.writing() as connection:
            known = _read(connection, list(merged))
            new = [p for key, p in merged.items() if key not in known]
            pairs = ((known[key], merge(known[key], p)) for key, p in merged.items() if key in known)
            changed = [after for before, after in pairs if after != before]
            if new or changed:
                revision = (connection.scalar(sa.select(sa.func.max(preprints.c.revision))) or 0) + 1
                if new:
                    connection.execute(preprints.insert(), [asdict(p) | {"revision": revision} for p in new])
                for p in changed:
                    values = asdict(p) | {"revision": revision}
                    connection.execute(preprints.update().where(preprints.c.key == p.key).values(values))
            if page is not None:
                connection.execute(remembered.delete().where(remembered.c.address == page.address))
                now = datetime.now(UTC).isoformat(timespec="seconds")
                connection.execute(remembered.insert().values(asdict(page) | {"checked": now}))
        return Added(len(new), len(changed), len(merged) - len(new) - len(changed))

    def get(self, key: str) -> Preprint | None:
        return self.many([key]).get(key)

    def many(self, keys: Sequence[str]) -> dict[str, Preprint]:
        """By key; those that are not there are left out."""
        with self.store.reading() as connection:
            return _read(connection, keys)

    def between(self, after: int, upto: int) -> list[Preprint]:
        """What changed later than revision `after`, up to `upto`, in that order."""
        changed = (preprints.c.revision > after) & (preprints.c.revision <= upto)
        wanted = sa.select(preprints).where(changed).order_by(preprints.c.revision, preprints.c.id)
        with self.store.reading() as connection:
            return [Preprint.from_row(row) for row in connection.execute(wanted).mappings()]

    def remembered(self, address: str) -> Remembered:
        rows = self.store.query(
            sa.select(remembered.c.etag, remembered.c.modified, remembered.c.entries).where(
                remembered.c.address == address
            )
        )
        return Remembered(address, *rows[0]) if rows else Remembered(address)


def merge(known: Preprint, seen: Preprint) -> Preprint:
    """Both accounts of one paper in one.

    The text is that of the later version, and of the archive itself where versions tell nothing; a day on which the
    paper was featured stands before the day of its publication.
    """
    text, other = (seen, known) if _authority(seen) >= _authority(known) else (known, seen)
    featured = next((p.day for p in (known, seen) if HUGGING_FACE in p.sources), text.day)
    counted = next((p.upvotes for p in (seen, known) if HUGGING_FACE in p.sources), 0)
    return replace(
        text,
        published=min(known.published, seen.published),
        day=featured,
        categories=text.categories or other.categories,
        keywords=text.keywords or other.keywords,
        organisation=text.organisation or other.organisation,
        remark=text.remark or other.remark,
        upvotes=counted,
        sources=tuple(sorted({*known.sources, *seen.sources})),
    )


def _authority(preprint: Preprint) -> tuple[int, bool]:
    return preprint.version, ARXIV in preprint.sources


def _read(connection: Connection, keys: Sequence[str]) -> dict[str, Preprint]:
    found: dict[str, Preprint] = {}
    for start in range(0, len(keys), AT_ONCE):
        rows = connection.execute(_ALL_OF, {"keys": list(keys[start : start + AT_ONCE])})
        found |= {row["key"]: Preprint.from_row(row) for row in rows.mappings()}
    return found


# What a source says, made fit to keep ------------------------------------------------------------------------------


def identify(text: str) -> tuple[str, int] | None:
    """(key, version) of an arXiv id or of an address that ends in one; None for anything else.

    >>> identify("http://arxiv.org/abs/2202.08549v2"), identify("hep-th/9901001"), identify("10.1000/182")
    (('2202.08549', 2), ('hep-th_9901001', 0), None)
    """
    found = IDENTIFIER.fullmatch(text.strip().rpartition("/abs/")[2])
    return None if found is None else (found["id"].replace("/", "_"), int(found["version"] or 0))


def plain(text: str, limit: int) -> str:
    """One line without control characters and halves of surrogate pairs, cut at `limit` characters.

    >>> plain("  Attention\\n  is \\x00all ", 80)
    'Attention is all'
    """
    text = "".join(" " if c.isspace() else c for c in text[: 4 * limit] if c.isspace() or not _unprintable(c))
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _unprintable(character: str) -> bool:
    """Controls, and the marks that turn the direction of what follows: a title must not reorder the page."""
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Cn", "Co") or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def instant(text: str) -> str:
    """ISO 8601 in UTC to the second.

    Raises:
        ValueError: it is no date that a paper can have.
    """
    try:
        read = datetime.fromisoformat(text.strip())
        read = read.astimezone(UTC) if read.tzinfo else read.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError(f"no date: {text[:40]!r}") from None
    if not 1990 <= read.year <= 2100:
        raise ValueError(f"no date that a paper can have: {text[:40]!r}")
    return read.isoformat(timespec="seconds")
