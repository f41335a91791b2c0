"""Search by meaning: TF-IDF, and the space of its leading singular vectors (Deerwester et al. 1990).

A basis is fitted once; papers that come later are folded in, which is a product with it. It is fitted anew when the
collection has grown by half.
"""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

GROWTH = 1.5  # of the collection since the basis was fitted, at which it is fitted anew
SAMPLE = 10_000  # papers that the basis is fitted to at most
TERMS = 40_000  # words and pairs of words that are told apart at most
LEAST = 1e-6  # length of what is more than an error of rounding
LEAST_DIMENSIONS, MOST_DIMENSIONS = 24, 128


def dimensions(papers: int, terms: int) -> int:
    """Of the latent space: the square root of the collection's size, within bounds and what the matrix has."""
    wanted = min(max(LEAST_DIMENSIONS, int(papers**0.5)), MOST_DIMENSIONS)
    return max(1, min(wanted, papers - 1, terms - 1))


@dataclass(frozen=True)
class Basis:
    """`fitted` papers gave these terms and directions."""

    fitted: int
    vectorizer: TfidfVectorizer
    components: Float[ndarray, "d terms"]

    @classmethod
    def fit(cls, texts: Sequence[str]) -> Self:
        chosen = texts
        if len(texts) > SAMPLE:
            picked = np.random.default_rng(0).choice(len(texts), SAMPLE, replace=False)
            chosen = [texts[i] for i in np.sort(picked)]
        vectorizer = _vectorizer(max_features=TERMS)
        try:
            matrix = vectorizer.fit_transform(chosen)
            terms = set(vectorizer.vocabulary_)
        except ValueError:  # nothing but stop words
            terms = set()
        if len(terms) < 2:  # too few for a decomposition
            vectorizer = _vectorizer(vocabulary=sorted(terms | {"paper", "papers"}))
            matrix = vectorizer.fit_transform(["paper"])
        svd = TruncatedSVD(dimensions(len(chosen), matrix.shape[1]), random_state=0)
        with np.errstate(invalid="ignore"):  # one paper alone explains none of its own variance
            svd.fit(matrix)
        return cls(len(texts), vectorizer, svd.components_.astype(np.float32))

    @property
    def outgrown(self) -> int:
        """Size of the collection from which on this basis is too small for it."""
        return int(np.ceil(GROWTH * self.fitted))

    def terms(self, texts: Sequence[str]) -> sp.csr_array:
        return sp.csr_array(self.vectorizer.transform(texts), dtype=np.float32)

    def places(self, terms: sp.csr_array) -> Float[ndarray, "papers d"]:
        """Unit vectors, or zero for what has no term of ours."""
        return normalize(np.asarray(terms @ self.components.T, dtype=np.float32))

    def place(self, text: str) -> Float[ndarray, "d"]:
        """As `places` gives it for one text, without what it takes to be fast for many."""
        known = self.vectorizer.vocabulary_
        counts = Counter(known[term] for term in self._analyse(text) if term in known)
        at = np.array(list(counts), dtype=np.int64)
        weights = (1 + np.log(list(counts.values()))) * self.vectorizer.idf_[at]
        place = self.components[:, at] @ (weights / max(float(np.linalg.norm(weights)), LEAST))
        length = float(np.linalg.norm(place))
        return (place / length if length > LEAST else np.zeros_like(place)).astype(np.float32)

    @cached_property
    def _analyse(self) -> Callable[[str], list[str]]:
        return self.vectorizer.build_analyzer()

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        vocabulary = np.array(self.vectorizer.get_feature_names_out(), dtype=str)
        np.savez(file, fitted=self.fitted, vocabulary=vocabulary, idf=self.vectorizer.idf_, components=self.components)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        arrays = np.load(io.BytesIO(data), allow_pickle=False)
        vectorizer = _vectorizer(vocabulary=arrays["vocabulary"].tolist())
        vectorizer.idf_ = arrays["idf"]
        return cls(int(arrays["fitted"]), vectorizer, arrays["components"])


def _vectorizer(**arguments: object) -> TfidfVectorizer:
    return TfidfVectorizer(sublinear_tf=True, stop_words="english", ngram_range=(1, 2), dtype=np.float32, **arguments)
