"""The index: words and meaning joined, in memory or in a file that several processes share.

A query finds what contains its words, the last one by its beginning, so that results come while one types; a word that
no paper contains gives way to its nearest spellings. Beside it stands the cosine in the latent space, which also finds
what is said in other words. The two rankings are joined by reciprocal rank (Cormack, Clarke and Buettcher 2009): no
scale of one needs to fit that of the other.

The index is derived from the store and may be thrown away at any time.
"""

import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from sklearn.svm import LinearSVC

from locally.page.search import words as by_words
from locally.page.search.documents import Document
from locally.page.search.meaning import Basis
from locally.page.search.postings import Postings

RANK_CONSTANT = 60  # of the reciprocal-rank fusion
NEAR = 0.3  # least cosine at which a paper that has none of the words is shown
NEAREST = 200  # papers that meaning alone brings at most
WORDS = 32  # of a query that are looked at
BATCH = 2_000  # papers whose terms are counted at once
OTHERS = 5_000  # papers that stand for the rest of the collection when a taste is learnt
PENALTY = 0.01  # C of the support vector machine, small as few examples in many terms want it
SIMILAR = 10_000  # papers whose likes are remembered
MANY = 5_000  # papers that take so long to load that nobody should wait
BUSY = 60.0  # seconds that one process waits for another

TABLES = (
    "create table documents (id integer primary key autoincrement, key text not null unique, stamp text not null, "
    "card integer not null, terms blob, place blob, stems blob, weights blob, length integer)",
    "create table facts (name text primary key, value) without rowid",
    *by_words.TABLES,
)


@dataclass(frozen=True)
class _Loaded:
    """The numbers of all papers, as one state of the file has them."""

    basis: Basis | None = None
    rebuilt: int = -1  # what must be loaded anew when it changes in the file
    last: int = 0  # highest id
    keys: Sequence[str] = ()
    rows: Mapping[str, int] = field(default_factory=dict)  # by key
    places: Float[ndarray, "papers d"] | None = None
    postings: Postings = field(default_factory=Postings)


class Index:
    """Searching is safe from several threads.

    Args:
        file: where the index is kept; None for memory.

    >>> from locally import catalogue
    >>> from locally.page.search import Index, of_card
    >>> index = Index()
    >>> index.update([of_card(paper) for paper in catalogue.load()])
    >>> index.search("lipschits")[0]  # a spelling that no paper has
    'local-lipschitz'
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._lock = threading.RLock()
        self._mine = threading.local()
        self._memory = None if file else self._connect()
        self._loaded = _Loaded()
        self._terms: tuple[_Loaded, sp.csr_array | None] | None = None
        self._starting = threading.Lock()
        self._behind: threading.Thread | None = None
        self._similar: dict[tuple[str, int], tuple[_Loaded, list[str]]] = {}
        with self._writing() as connection:
            if not connection.execute("select 1 from sqlite_master where name = 'facts'").fetchone():
                for statement in TABLES:
                    connection.execute(statement)

    # Bringing up to date ----------------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """Of the collection that the index has seen."""
        with self._reading() as connection:
            return int(_fact(connection, "revision", 0))

    @property
    def state(self) -> tuple[int, int]:
        """Another one whenever what is found may have changed."""
        loaded = self._load()
        return loaded.rebuilt, loaded.last

    def belongs_to(self, collection: str) -> None:
        """Start anew if the index was made of another collection."""
        with self._writing() as connection:
            if _fact(connection, "collection", collection) != collection:
                numbers = [row[0] for row in connection.execute("select id from documents")]
                self._remove(connection, numbers)
                connection.execute("delete from facts where name in ('revision', 'basis')")
            _state(connection, "collection", collection)

    def update(
        self, documents: Sequence[Document], *, cards: Collection[str] | None = None, revision: int | None = None
    ) -> None:
        """Add these documents, or replace those of the same keys, in one transaction.

        Args:
            cards: keys of all cards there are; others that the index has go away.
            revision: of the collection, once these are in.
        """
        with self._writing() as connection:
            known = {k: (i, s) for i, k, s in connection.execute("select id, key, stamp from documents")}
            new = [d for d in {d.key: d for d in documents}.values() if known.get(d.key, (0, ""))[1] != d.stamp]
            gone = [known[d.key][0] for d in new if d.key in known]
            if cards is not None:
                listed = connection.execute("select id, key from documents where card").fetchall()
                gone += [i for i, key in listed if key not in cards and i not in gone]
            self._remove(connection, gone)
            numbered = [(self._insert(connection, d), d) for d in new]
            by_words.add(connection, numbered)
            self._place(connection, [number for number, _ in numbered])
            if revision is not None:
                _state(connection, "revision", revision)

    def _insert(self, connection: sqlite3.Connection, document: Document) -> int:
        statement = "insert into documents (key, stamp, card) values (?, ?, ?)"
        number = connection.execute(statement, (document.key, document.stamp, document.card)).lastrowid
        assert number is not None
        return number

    def _remove(self, connection: sqlite3.Connection, numbers: Sequence[int]) -> None:
        if numbers:
            by_words.remove(connection, numbers)
            connection.executemany("delete from documents where id = ?", [(n,) for n in numbers])
            _state(connection, "rebuilt", int(_fact(connection, "rebuilt", 0)) + 1)

    def _place(self, connection: sqlite3.Connection, new: Sequence[int]) -> None:
        """Give papers their terms and places: the new ones by folding them in, all of them where the basis is new."""
        total = connection.execute("select count(*) from documents").fetchone()[0]
        stored = _fact(connection, "basis", b"")
        basis = Basis.from_bytes(stored) if stored else None
        if basis is None or total >= basis.outgrown:
            if not total:
                return
            new = [row[0] for row in connection.execute("select id from documents order by id")]
            basis = Basis.fit(list(by_words.texts(connection, new)))
            _state(connection, "basis", basis.to_bytes())
            _state(connection, "rebuilt", int(_fact(connection, "rebuilt", 0)) + 1)
        for start in range(0, len(new), BATCH):
            numbers = new[start : start + BATCH]
            terms = basis.terms(list(by_words.texts(connection, numbers)))
            places = basis.places(terms)
            connection.executemany(
                "update documents set terms = ?, place = ? where id = ?",
                [(_pack(terms, row), places[row].tobytes(), number) for row, number in enumerate(numbers)],
            )

    # Asking -----------------------------------------------------------------------------------------------------

    def warm(self) -> None:
        """Read the file now rather than at the first question."""
        self._load()

    def search(self, query: str, limit: int | None = None) -> list[str]:
        """Keys of papers, best first; an empty query finds nothing."""
        words = by_words.folded(query)[:WORDS]
        if not words:
            return []
        loaded = self._load()
        with self._reading() as connection:
            found = by_words.search(connection, loaded.postings, words)
            misspelt = bool(found) and not by_words.knows_any(connection, words)
        rankings = [found]
        if not misspelt:  # otherwise the latent space has not seen the words
            rankings.append(_nearest(loaded, query))
        score: dict[int, float] = {}
        for ranking in rankings:
            for rank, i in enumerate(ranking, 1):
                score[i] = score.get(i, 0.0) + 1 / (RANK_CONSTANT + rank)
        ranked = sorted(score, key=lambda i: (-score[i], i))
        return [loaded.keys[i] for i in ranked[:limit]]

    def similar(self, key: str, limit: int = 4) -> list[str]:
        """The papers nearest in the latent space, the paper itself left out; none for an unknown key."""
        loaded = self._load()
        at = loaded.rows.get(key)
        if at is None or loaded.places is None:
            return []
        known = self._similar.get((key, limit))
        if known is None or known[0] is not loaded:
            cosines = _cosines(loaded.places, loaded.places[at])
            cosines[at] = -np.inf
            if len(self._similar) >= SIMILAR:
                self._similar.clear()
            known = self._similar[key, limit] = (loaded, [loaded.keys[i] for i in _highest(cosines, limit)])
        return known[1]

    def taste(self, chosen: Collection[str]) -> dict[str, float]:
        """How much each other paper is like the chosen ones: its side of, and distance to, a separating plane.

        The plane is that of a linear support vector machine over TF-IDF, which tells the chosen papers from a sample of
        the rest. Empty where none is chosen, or nothing is left.
        """
        loaded, terms = self._with_terms()
        liked = np.array([loaded.rows[key] for key in sorted(chosen) if key in loaded.rows], dtype=int)
        rest = np.setdiff1d(np.arange(len(loaded.keys)), liked)
        if not len(liked) or not len(rest) or terms is None:
            return {}
        others = np.random.default_rng(0).choice(rest, min(OTHERS, len(rest)), replace=False)
        rows = np.concatenate([liked, others])
        labels = np.arange(len(rows)) < len(liked)
        machine = LinearSVC(C=PENALTY, class_weight="balanced", random_state=0, max_iter=10_000, tol=1e-6)
        machine.fit(terms[rows], labels)
        distances = machine.decision_function(terms[rest])
        return dict(zip((loaded.keys[i] for i in rest.tolist()), distances.tolist(), strict=True))

    # The file ---------------------------------------------------------------------------------------------------

    def _load(self) -> _Loaded:
        """What the file has now; only what is new in it is read, and what takes long behind the reader's back."""
        loaded = self._loaded
        with self._reading() as connection:
            rebuilt = int(_fact(connection, "rebuilt", 0))
            last = connection.execute("select coalesce(max(id), 0) from documents").fetchone()[0]
        if (rebuilt, last) == (loaded.rebuilt, loaded.last):
            return loaded
        if len(loaded.keys) > MANY and (rebuilt != loaded.rebuilt or last - loaded.last > MANY):
            self._load_behind()
            return loaded
        return self._load_now()

    def _load_now(self) -> _Loaded:
        with self._lock, self._snapshot() as connection:
            self._loaded = _read(connection, self._loaded)
            return self._loaded

    def _load_behind(self) -> None:
        with self._starting:
            if self._behind is None or not self._behind.is_alive():
                self._behind = threading.Thread(target=self._load_now, daemon=True)
                self._behind.start()

    def _with_terms(self) -> tuple[_Loaded, sp.csr_array | None]:
        """All papers with their terms, which are many and only needed to learn a taste."""
        loaded = self._load()
        if self._terms is None or self._terms[0] is not loaded:
            with self._lock, self._snapshot() as connection:
                loaded = self._loaded = _read(connection, self._loaded)
                rows = connection.execute("select terms from documents order by id").fetchall()
            basis = loaded.basis
            terms = None if basis is None else _unpack([r[0] for r in rows], len(basis.vectorizer.vocabulary_))
            self._terms = loaded, terms
        return self._terms

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """One state of the file."""
        with self._reading() as connection:
            connection.execute("begin")
            try:
                yield connection
            finally:
                connection.execute("commit")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.file or ":memory:", timeout=BUSY, isolation_level=None, check_same_thread=False
        )
        if self.file:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = normal")
        return connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection of this thread's own, or the one in memory while nobody else has it."""
        if self._memory is not None:
            with self._lock:
                yield self._memory
            return
        if not hasattr(self._mine, "connection"):
            self._mine.connection = self._connect()
        yield self._mine.connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._reading() as connection:
            connection.execute("begin immediate")
            try:
                yield connection
            except BaseException:
                connection.execute("rollback")
                raise
            connection.execute("commit")


def _read(connection: sqlite3.Connection, before: _Loaded) -> _Loaded:
    rebuilt = int(_fact(connection, "rebuilt", 0))
    stored = _fact(connection, "basis", b"")
    if not stored:
        return _Loaded(rebuilt=rebuilt)
    if rebuilt != before.rebuilt or before.basis is None:
        before = _Loaded(Basis.from_bytes(stored), rebuilt)
    assert before.basis is not None
    statement = "select id, key, place, stems, weights, length from documents where id > ? order by id"
    rows = connection.execute(statement, (before.last,)).fetchall()
    if not rows:
        return before
    places = np.frombuffer(b"".join(row[2] for row in rows), dtype=np.float32).reshape(len(rows), -1)
    stems, weights, lengths = zip(*(row[3:] for row in rows), strict=True)
    if before.places is not None:
        places = np.concatenate([before.places, places])
    fresh = enumerate((row[1] for row in rows), len(before.keys))
    keys = [*before.keys, *(row[1] for row in rows)]
    at = {**before.rows, **{key: i for i, key in fresh}}
    postings = before.postings.extended(stems, weights, lengths)
    return _Loaded(before.basis, rebuilt, rows[-1][0], keys, at, places, postings)


def _nearest(loaded: _Loaded, query: str) -> list[int]:
    if loaded.basis is None or loaded.places is None:
        return []
    cosines = _cosines(loaded.places, loaded.basis.place(query))
    return [i for i in _highest(cosines, NEAREST) if cosines[i] >= NEAR]


def _cosines(places: Float[ndarray, "papers d"], place: Float[ndarray, "d"]) -> Float[ndarray, "papers"]:
    return (places @ place[:, None])[:, 0]  # as a product of matrices, for which BLAS has the faster kernel


def _highest(values: Float[ndarray, "papers"], count: int) -> list[int]:
    """Places of the largest, largest first, without sorting all of them."""
    count = min(count, len(values))
    top = np.sort(np.argpartition(-values, count - 1)[:count]) if count < len(values) else np.arange(len(values))
    return top[np.argsort(-values[top], kind="stable")].tolist()


def _pack(terms: sp.csr_array, row: int) -> bytes:
    inside = slice(terms.indptr[row], terms.indptr[row + 1])
    return terms.indices[inside].astype(np.int32).tobytes() + terms.data[inside].astype(np.float32).tobytes()


def _unpack(blobs: Sequence[bytes], width: int) -> sp.csr_array:
    counts = [len(blob) // 8 for blob in blobs]
    indices = np.frombuffer(b"".join(b[: len(b) // 2] for b in blobs), dtype=np.int32)
    data = np.frombuffer(b"".join(b[len(b) // 2 :] for b in blobs), dtype=np.float32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)  # liblinear reads no wider ones
    return sp.csr_array((data, indices, starts), shape=(len(blobs), width))


def _fact(connection: sqlite3.Connection, name: str, default: Any) -> Any:
    row = connection.execute("select value from facts where name = ?", (name,)).fetchone()
    return default if row is None else row[0]


def _state(connection: sqlite3.Connection, name: str, value: object) -> None:
    connection.execute("insert or replace into facts values (?, ?)", (name, value))
