"""Search by words: SQLite's FTS5 over the papers, and over their vocabulary by trigrams for what is misspelt."""

import difflib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence

from locally.page.search.documents import COLUMNS, Document, words_of

WEIGHTS = (8.0, 6.0, 3.0, 2.0, 1.0)  # of a hit in each column
FOUND = 400  # papers that one question brings at most
SPELLINGS = 3
LIKENESS = 0.7  # least, of a spelling to the word that was typed
CANDIDATES = 200  # words that share trigrams with it and are looked at more closely
BEGINNING = 3  # letters from which on the last word may be only begun
COMMON = 5_000  # papers; a word that more of them contain tells none of them from the others

TABLES = (
    f"create virtual table papers using fts5({', '.join(COLUMNS)}, tokenize = 'porter unicode61', prefix = '3')",
    f"insert into papers(papers, rank) values ('rank', 'bm25({', '.join(map(str, WEIGHTS))})')",
    "create table vocabulary (word text primary key, papers integer not null) without rowid",
    "create virtual table spellings using fts5(word, tokenize = 'trigram')",
)


def add(connection: sqlite3.Connection, documents: Iterable[tuple[int, Document]]) -> None:
    """Index documents under these numbers."""
    counts: Counter[str] = Counter()
    statement = f"insert into papers(rowid, {', '.join(COLUMNS)}) values (?, ?, ?, ?, ?, ?)"
    for number, document in documents:
        connection.execute(statement, (number, *document.columns))
        counts.update(set(words_of(document.text)))
    new = [(word,) for word in counts if not _listed(connection, word)]
    connection.executemany("insert into spellings(word) values (?)", new)
    connection.executemany(
        "insert into vocabulary values (?, ?) on conflict (word) do update set papers = papers + excluded.papers",
        counts.items(),
    )


def remove(connection: sqlite3.Connection, numbers: Iterable[int]) -> None:
    for number in numbers:
        columns = connection.execute(f"select {', '.join(COLUMNS)} from papers where rowid = ?", (number,)).fetchone()
        words = [(word,) for word in set(words_of(" ".join(columns)))]
        connection.executemany("update vocabulary set papers = papers - 1 where word = ?", words)
        connection.execute("delete from papers where rowid = ?", (number,))


def texts(connection: sqlite3.Connection, numbers: Iterable[int]) -> Iterable[str]:
    statement = f"select {', '.join(COLUMNS)} from papers where rowid = ?"
    return (" ".join(connection.execute(statement, (number,)).fetchone()) for number in numbers)


def search(connection: sqlite3.Connection, words: Sequence[str]) -> list[int]:
    """Papers that contain every word, the last one as a beginning, then those with some; both by weighted BM25."""
    terms = []
    for position, word in enumerate(words):
        begun = position == len(words) - 1 and len(word) >= BEGINNING
        found = [word] if known(connection, word) else spellings(connection, word) or [word]
        terms.append("(" + " OR ".join(f'"{s}"{"*" if begun else ""}' for s in found) + ")")
    every = _ask(connection, " AND ".join(terms))
    if len(every) >= FOUND or len(words) == 1:
        return every
    telling = [w for w in words if _papers(connection, w) <= COMMON] or words
    some = _ask(connection, " OR ".join(f'"{w}"' for w in telling))  # guesses at a spelling would win here
    seen = set(every)
    return every + [number for number in some if number not in seen]


def knows_any(connection: sqlite3.Connection, words: Iterable[str]) -> bool:
    """Does any paper contain one of these as it stands?"""
    return any(_papers(connection, word) for word in words)


def known(connection: sqlite3.Connection, word: str) -> bool:
    """Does a word of some paper begin like this?"""
    least = "select 1 from vocabulary where word >= ? and word < ? and papers > 0 limit 1"
    return connection.execute(least, (word, word + "\U0010ffff")).fetchone() is not None


def spellings(connection: sqlite3.Connection, word: str) -> list[str]:
    """The words of the vocabulary that look most like this one."""
    trigrams = " OR ".join(f'"{word[i : i + 3]}"' for i in range(len(word) - 2))
    if not trigrams:
        return []
    statement = "select word from spellings where spellings match ? order by rank limit ?"
    near = [row[0] for row in connection.execute(statement, (trigrams, CANDIDATES))]
    alive = sorted(w for w in near if _papers(connection, w))
    return difflib.get_close_matches(word, alive, SPELLINGS, cutoff=LIKENESS)


def _listed(connection: sqlite3.Connection, word: str) -> bool:
    return connection.execute("select 1 from vocabulary where word = ?", (word,)).fetchone() is not None


def _papers(connection: sqlite3.Connection, word: str) -> int:
    row = connection.execute("select papers from vocabulary where word = ?", (word,)).fetchone()
    return row[0] if row else 0


def _ask(connection: sqlite3.Connection, wanted: str) -> list[int]:
    statement = "select rowid from papers where papers match ? order by rank, rowid limit ?"
    return [row[0] for row in connection.execute(statement, (wanted, FOUND))]
