"""Search over the catalogue, and papers like one: words (SQLite's FTS5) joined with meaning (latent semantics).

A query finds what contains its words, the last one by its beginning, so that results come while one types; a word
that no paper contains gives way to its nearest spellings. Beside it stands the cosine in the space of the leading
singular vectors of TF-IDF (Deerwester et al. 1990), which also finds what is said in other words. The two rankings are
joined by reciprocal rank (Cormack, Clarke and Buettcher 2009): no scale of one needs to fit that of the other.
"""

import difflib
import re
import sqlite3
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from locally.evidence import Paper

COLUMNS = ("title", "keywords", "people", "summary", "claims")
WEIGHTS = (8.0, 6.0, 3.0, 2.0, 1.0)  # of a hit in each column
DIMENSIONS = 24  # of the latent space, fewer where there are fewer papers
RANK_CONSTANT = 60  # of the reciprocal-rank fusion
NEAR = 0.3  # least cosine at which a paper that has none of the words is shown
SPELLINGS = 3


class Index:
    """All papers, indexed once; searching is safe from several threads.

    >>> from locally import catalogue
    >>> index = Index(catalogue.load())
    >>> index.search("lipschits")[0].slug  # a spelling that no paper has
    'local-lipschitz'
    """

    def __init__(self, papers: Sequence[Paper]) -> None:
        self.papers = list(papers)
        texts = [_columns(paper) for paper in papers]
        self._lock = threading.Lock()
        self._words = sqlite3.connect(":memory:", check_same_thread=False)
        self._words.execute(
            f"create virtual table papers using fts5({', '.join(COLUMNS)}, tokenize = 'porter unicode61')"
        )
        self._words.executemany("insert into papers values (?, ?, ?, ?, ?)", texts)
        self.vocabulary = sorted({word for columns in texts for text in columns for word in words_of(text)})
        self._tfidf = TfidfVectorizer(sublinear_tf=True, stop_words="english", ngram_range=(1, 2))
        matrix = self._tfidf.fit_transform([" ".join(columns) for columns in texts])
        rank = min(DIMENSIONS, len(papers) - 1, matrix.shape[1] - 1)
        with np.errstate(invalid="ignore"):  # one paper alone explains none of its own variance
            self._svd = TruncatedSVD(max(rank, 1), random_state=0).fit(matrix)
        self._places: Float[ndarray, "papers d"] = normalize(self._svd.transform(matrix))

    def search(self, query: str, limit: int | None = None) -> list[Paper]:
        """Best first; an empty query finds nothing."""
        words = words_of(query)
        if not words:
            return []
        by_words = self.by_words(words)
        near = self._tfidf.transform([query])
        cosines = self._places @ normalize(self._svd.transform(near))[0]
        by_meaning = [i for i in np.argsort(-cosines, kind="stable").tolist() if cosines[i] >= NEAR]
        if by_words and not any(word in self.vocabulary for word in words):
            by_meaning = []  # misspelt: the latent space has not seen the words
        score: dict[int, float] = {}
        for ranking in (by_words, by_meaning):
            for rank, i in enumerate(ranking, 1):
                score[i] = score.get(i, 0.0) + 1 / (RANK_CONSTANT + rank)
        ranked = sorted(score, key=lambda i: (-score[i], i))
        return [self.papers[i] for i in ranked[:limit]]

    def similar(self, slug: str, limit: int = 4) -> list[Paper]:
        """The papers nearest in the latent space, the paper itself left out; none for an unknown slug."""
        at = next((i for i, paper in enumerate(self.papers) if paper.slug == slug), None)
        if at is None:
            return []
        cosines = self._places @ self._places[at]
        order = [i for i in np.argsort(-cosines, kind="stable").tolist() if i != at]
        return [self.papers[i] for i in order[:limit]]

    def by_words(self, words: Sequence[str]) -> list[int]:
        """Papers that contain every word, the last one as a beginning, then those with some; both by weighted BM25."""
        terms = []
        for position, word in enumerate(words):
            spellings = [word]
            if not any(known.startswith(word) for known in self.vocabulary):
                spellings = difflib.get_close_matches(word, self.vocabulary, SPELLINGS, cutoff=0.7) or [word]
            star = "*" if position == len(words) - 1 else ""
            terms.append("(" + " OR ".join(f'"{s}"{star}' for s in spellings) + ")")
        weights = ", ".join(map(str, WEIGHTS))
        statement = f"select rowid from papers where papers match ? order by bm25(papers, {weights}), rowid"
        exact = [f'"{word}"' for word in words]  # where few words must do, guesses at their spelling would win
        with self._lock:
            every, some = (
                [row[0] - 1 for row in self._words.execute(statement, (wanted,))]
                for wanted in (" AND ".join(terms), " OR ".join(exact))
            )
        return every + [i for i in some if i not in every]


def _columns(paper: Paper) -> tuple[str, ...]:
    return (
        f"{paper.title} {paper.slug.replace('-', ' ')}",
        " ".join(paper.keywords),
        " ".join((*paper.authors, paper.venue, paper.wing, paper.arxiv)),
        paper.summary,
        " ".join(claim.statement for claim in paper.claims),
    )


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
