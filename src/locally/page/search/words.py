"""Search by words: weighted BM25 over stems, with a look at how words begin and how they are spelt.

The words of all papers stand in the index's file, with the stem of each and the number of papers that have it; which
papers have a stem, and how often, is counted for each paper when it comes in and searched in memory. SQLite stems (its
Porter stemmer) and finds similar spellings (by trigrams).
"""

import difflib
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from locally.page.search.documents import COLUMNS, Document, words_of
from locally.page.search.postings import Phrase, Postings

WEIGHTS = (8.0, 6.0, 3.0, 2.0, 1.0)  # of a hit in each column
FOUND = 400  # papers that one question brings at most
SPELLINGS = 3
LIKENESS = 0.7  # least, of a spelling to the word that was typed
CANDIDATES = 200  # words that share trigrams with it and are looked at more closely
BEGINNING = 3  # letters from which on the last word may be only begun
CONTINUED = 1_000  # words that begin like it and are looked for at most
AT_ONCE = 1_000  # papers whose words are held while they are counted

TABLES = (
    f"create table papers (id integer primary key, {', '.join(f'{c} text not null' for c in COLUMNS)})",
    "create table stems (id integer primary key, stem text not null unique)",
    "create table vocabulary (word text primary key, papers integer not null, stem integer not null) without rowid",
    "create virtual table spellings using fts5(word, tokenize = 'trigram')",
)
STEMMER = (  # of each connection, since it is only passed through
    "create virtual table temp.stemming using fts5(word, content = '', tokenize = 'porter unicode61')",
    "create virtual table temp.stemmed using fts5vocab('temp', 'stemming', 'instance')",
)


# Bringing papers in and out ------------------------------------------------------------------------------------------


def add(connection: sqlite3.Connection, documents: Sequence[tuple[int, Document]]) -> None:
    """Keep the words of documents under these numbers, and count them."""
    statement = f"insert into papers(id, {', '.join(COLUMNS)}) values (?, ?, ?, ?, ?, ?)"
    for start in range(0, len(documents), AT_ONCE):
        page = documents[start : start + AT_ONCE]
        connection.executemany(statement, ((number, *document.columns) for number, document in page))
        _count(connection, page)


def _count(connection: sqlite3.Connection, documents: Sequence[tuple[int, Document]]) -> None:
    weighed = [(number, *_weigh(document)) for number, document in documents]
    papers = Counter(word for _, words, _ in weighed for word in words)
    stems = _learn(connection, papers)
    connection.executemany(
        "update documents set stems = ?, weights = ?, length = ? where id = ?",
        [(*_packed(words, stems), length, number) for number, words, length in weighed],
    )


def _weigh(document: Document) -> tuple[dict[str, float], int]:
    """How often each word occurs, by the weight of where it does; and how many words there are."""
    weights: dict[str, float] = {}
    length = 0
    for text, weight in zip(document.columns, WEIGHTS, strict=True):
        words = folded(text)
        length += len(words)
        for word in words:
            weights[word] = weights.get(word, 0.0) + weight
    return weights, length


def _packed(words: Mapping[str, float], stems: Mapping[str, int]) -> tuple[bytes, bytes]:
    by_stem: dict[int, float] = {}
    for word, weight in words.items():
        by_stem[stems[word]] = by_stem.get(stems[word], 0.0) + weight
    ordered = sorted(by_stem)
    return np.array(ordered, dtype=np.int32).tobytes(), np.array([by_stem[s] for s in ordered], np.float32).tobytes()


def _learn(connection: sqlite3.Connection, papers: Mapping[str, int]) -> dict[str, int]:
    """Add to the number of papers that have each word; the stem of each."""
    stems = {word: stem for word in papers if (stem := _stem_of(connection, word)) is not None}
    new = [word for word in papers if word not in stems]
    for word, written in stemmed(connection, new).items():
        connection.execute("insert or ignore into stems (stem) values (?)", (written,))
        stems[word] = connection.execute("select id from stems where stem = ?", (written,)).fetchone()[0]
    connection.executemany("insert into spellings(word) values (?)", [(word,) for word in new])
    connection.executemany(
        "insert into vocabulary values (?, ?, ?) on conflict (word) do update set papers = papers + excluded.papers",
        [(word, count, stems[word]) for word, count in papers.items()],
    )
    return stems


def remove(connection: sqlite3.Connection, numbers: Iterable[int]) -> None:
    for number in numbers:
        words = {word for text in texts(connection, [number]) for word in folded(text)}
        connection.executemany("update vocabulary set papers = papers - 1 where word = ?", [(w,) for w in words])
        connection.execute("delete from papers where id = ?", (number,))


def texts(connection: sqlite3.Connection, numbers: Iterable[int]) -> Iterable[str]:
    statement = f"select {', '.join(COLUMNS)} from papers where id = ?"
    return (" ".join(connection.execute(statement, (number,)).fetchone()) for number in numbers)


# Asking --------------------------------------------------------------------------------------------------------------


def search(connection: sqlite3.Connection, postings: Postings, words: Sequence[str]) -> list[int]:
    """Rows of papers that contain every word, the last one as a beginning, then those with some; both by BM25."""
    wanted = []
    for position, word in enumerate(words):
        begun = position == len(words) - 1 and len(word) >= BEGINNING
        looked_for = [word] if known(connection, word) else spellings(connection, word) or [word]
        wanted.append([_phrase(connection, w, begun) for w in looked_for])
    every = postings.ranked(wanted, FOUND, every=True)
    if len(every) >= FOUND or len(words) == 1:
        return every
    # as they stand: guesses at a spelling would win here
    some = postings.ranked([[_phrase(connection, word, begun=False)] for word in words], FOUND, every=False)
    seen = set(every)
    return every + [row for row in some if row not in seen]


def _phrase(connection: sqlite3.Connection, word: str, begun: bool) -> Phrase:
    """The stems by which a word is found."""
    own = _stem_of(connection, word)
    if own is None:
        (stem,) = stemmed(connection, [word]).values()
        row = connection.execute("select id from stems where stem = ?", (stem,)).fetchone()
        own = row[0] if row else None
    stems = set() if own is None else {own}
    if begun:
        alike = "select stem from vocabulary where word >= ? and word < ? and papers > 0 order by papers desc limit ?"
        stems |= {row[0] for row in connection.execute(alike, (word, word + LAST, CONTINUED))}
    return frozenset(stems)


def knows_any(connection: sqlite3.Connection, words: Iterable[str]) -> bool:
    """Does any paper contain one of these as it stands?"""
    return any(_papers(connection, word) for word in words)


def known(connection: sqlite3.Connection, word: str) -> bool:
    """Does a word of some paper begin like this?"""
    least = "select 1 from vocabulary where word >= ? and word < ? and papers > 0 limit 1"
    return connection.execute(least, (word, word + LAST)).fetchone() is not None


def spellings(connection: sqlite3.Connection, word: str) -> list[str]:
    """The words of the vocabulary that look most like this one."""
    trigrams = " OR ".join(f'"{word[i : i + 3]}"' for i in range(len(word) - 2))
    if not trigrams:
        return []
    statement = "select word from spellings where spellings match ? order by rank limit ?"
    near = [row[0] for row in connection.execute(statement, (trigrams, CANDIDATES))]
    alive = sorted(w for w in near if _papers(connection, w))
    return difflib.get_close_matches(word, alive, SPELLINGS, cutoff=LIKENESS)


# Words ---------------------------------------------------------------------------------------------------------------

LAST = "\U0010ffff"  # after all that begins alike


def folded(text: str) -> list[str]:
    """Words without case and accents.

    >>> folded("Évariste's groups")
    ['evariste', 's', 'groups']
    """
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return words_of(text)


def stemmed(connection: sqlite3.Connection, words: Sequence[str]) -> dict[str, str]:
    """Stem of each word; what SQLite takes for no word is its own."""
    for statement in STEMMER if not _can_stem(connection) else ():
        connection.execute(statement)
    stems = {word: word for word in words}
    connection.executemany("insert into temp.stemming(rowid, word) values (?, ?)", enumerate(words))
    for stem, at in connection.execute("select term, doc from temp.stemmed where offset = 0"):
        stems[words[at]] = stem
    connection.execute("insert into temp.stemming(stemming) values ('delete-all')")
    return stems


def _can_stem(connection: sqlite3.Connection) -> bool:
    return connection.execute("select 1 from temp.sqlite_master where name = 'stemmed'").fetchone() is not None


def _stem_of(connection: sqlite3.Connection, word: str) -> int | None:
    row = connection.execute("select stem from vocabulary where word = ?", (word,)).fetchone()
    return row[0] if row else None


def _papers(connection: sqlite3.Connection, word: str) -> int:
    row = connection.execute("select papers from vocabulary where word = ?", (word,)).fetchone()
    return row[0] if row else 0
