"""The library with its index: what the page shows, and what it finds."""

import hashlib
import sqlite3
import threading
import traceback
from pathlib import Path

import sqlalchemy as sa

from locally.errors import UsageError
from locally.evidence import Paper
from locally.home import home
from locally.page.cards import load
from locally.page.library import Library
from locally.page.links import signer
from locally.page.schema import preprints
from locally.page.search import Index, of_card, of_preprint
from locally.page.store import DAMAGED, Store

LAYOUT = 2  # of the index's file; one of another layout is thrown away
AT_ONCE = 20_000  # papers that are indexed in one transaction
INLINE = 300  # new papers that a reader waits for; more are indexed behind the reader's back


def index_file(store: Store) -> Path:
    """One file for each database and layout, beside whatever else is kept here."""
    return home() / f"search-{_name(store)}-{LAYOUT}.sqlite"


def _name(store: Store) -> str:
    return hashlib.blake2b(str(store.url).encode(), digest_size=6).hexdigest()


def open_index(store: Store) -> Index:
    """The index of this store's papers, which may be some papers behind; a damaged one is made anew."""
    file = index_file(store)
    for former in file.parent.glob(f"search-{_name(store)}*"):
        if not former.name.startswith(file.name):
            former.unlink(missing_ok=True)
    try:
        index = Index(file)
    except sqlite3.DatabaseError as error:
        if not any(sign in str(error) for sign in DAMAGED):
            raise UsageError(f"the search index {file} cannot be used: {error}") from None
        for suffix in ("", "-wal", "-shm"):
            Path(f"{file}{suffix}").unlink(missing_ok=True)
        index = Index(file)
    index.belongs_to(signer(store, "collection").secret.hex())
    return index


def catch_up(index: Index, library: Library, cards: list[Paper]) -> None:
    """Bring in the cards as they are now, and what was fetched since the index looked last."""
    index.update([of_card(p) for p in cards], cards={p.slug for p in cards})
    while pending := _pending(index, library.store):
        upto, total = pending[0]
        for revision, count in pending[1:]:
            if total + count > AT_ONCE:
                break
            upto, total = revision, total + count
        changed = library.preprints.between(index.revision, upto)
        index.update([of_preprint(p) for p in changed], revision=upto)


def _pending(index: Index, store: Store) -> list[tuple[int, int]]:
    """(revision, papers) that the index has not seen."""
    column = preprints.c.revision
    wanted = sa.select(column, sa.func.count()).where(column > index.revision).group_by(column).order_by(column)
    return store.query(wanted)


class Shelf:
    """What the pages read from; safe from several threads."""

    def __init__(self, store: Store) -> None:
        self.library = Library(store)
        self.index = open_index(store)
        self._indexed: list[Paper] = []
        self._seen: tuple[object, list[Paper]] | None = None  # what all is up to date with
        self._lock, self._catching_up = threading.Lock(), threading.Lock()
        self._behind: threading.Thread | None = None

    def papers(self) -> dict[str, Paper]:
        """The cards by slug; read again when one has changed."""
        return {p.slug: p for p in load()}

    def warm(self) -> dict[str, Paper]:
        """As `refresh`, and read what the first question would have to wait for."""
        cards = self.refresh()
        self.index.warm()
        return cards

    def refresh(self) -> dict[str, Paper]:
        """Bring library and index up to date; the cards by slug. A large import is indexed meanwhile."""
        seen = self.library.store.stamp(), load()
        if seen == self._seen:
            return {p.slug: p for p in seen[1]}
        cards = self.library.refresh()
        listed = list(cards.values())
        pending = sum(count for _, count in _pending(self.index, self.library.store))
        if listed == self._indexed and not pending:
            self._seen = seen
            return cards
        if pending > INLINE and self._indexed:
            with self._lock:
                if self._behind is None or not self._behind.is_alive():
                    self._behind = threading.Thread(target=self._catch_up, args=(listed,), daemon=True)
                    self._behind.start()
        else:
            self._catch_up(listed)
        return cards

    def _catch_up(self, cards: list[Paper]) -> None:
        try:
            with self._catching_up:
                catch_up(self.index, self.library, cards)
        except Exception:
            if threading.current_thread() is not self._behind:
                raise
            traceback.print_exc()  # the next reader tries again
        self._indexed = cards
