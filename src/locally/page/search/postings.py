"""Which papers have which stems, in memory: a question of any words costs well under a millisecond for each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float
from numpy import ndarray

Phrase = frozenset[int]  # stems that stand for one another
K1, B = 1.2, 0.75  # of BM25, as in SQLite's
LEAST = 1e-6  # what a word is worth that more than half of the papers have
SEGMENTS = 16  # parts in which new papers come, before all are joined


@dataclass(frozen=True)
class _Segment:
    """Papers from row `first` on; weighted counts by stem."""

    first: int
    counts: sp.csc_array

    def column(self, stem: int) -> tuple[ndarray, ndarray]:
        """Rows that have a stem, and how often by weight."""
        if stem >= self.counts.shape[1]:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        inside = slice(self.counts.indptr[stem], self.counts.indptr[stem + 1])
        return self.first + self.counts.indices[inside], self.counts.data[inside]


@dataclass(frozen=True)
class Postings:
    """An inverted index that only grows: `extended` gives a larger one and shares what both have."""

    lengths: Float[ndarray, "papers"] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    segments: tuple[_Segment, ...] = ()

    def extended(self, stems: Sequence[bytes], weights: Sequence[bytes], lengths: Sequence[int]) -> "Postings":
        """With more papers: of each its stems, how often each occurs by weight, and how many words it has."""
        starts = np.concatenate([[0], np.cumsum([len(s) // 4 for s in stems])])
        indices = np.frombuffer(b"".join(stems), dtype=np.int32)
        data = np.frombuffer(b"".join(weights), dtype=np.float32)
        shape = len(stems), int(indices.max(initial=-1)) + 1
        new = _Segment(len(self.lengths), sp.csr_array((data, indices, starts), shape=shape).tocsc())
        segments = (*self.segments, new)
        return Postings(
            np.concatenate([self.lengths, np.array(lengths, dtype=np.float32)]),
            segments if len(segments) <= SEGMENTS else (_joined(segments),),
        )

    def ranked(self, groups: Sequence[Sequence[Phrase]], count: int, *, every: bool) -> list[int]:
        """Rows of papers, best first.

        Args:
            groups: for each word that is asked for, the phrases of which any will do.
            count: papers at most.
            every: only papers that have all words; otherwise those that have any.
        """
        total = np.zeros(len(self.lengths), dtype=np.float32)
        having = np.full(len(total), every)
        for group in groups:
            seen = np.zeros(len(total), dtype=bool)
            for phrase in group:
                rows, scores = self._scored(phrase)
                seen[rows] = True
                total[rows] += scores
            having = having & seen if every else having | seen
        return _best(total, having, count)

    def _scored(self, phrase: Phrase) -> tuple[ndarray, Float[ndarray, "rows"]]:
        """Papers that have a phrase, and what it adds to the score of each."""
        columns = [segment.column(stem) for segment in self.segments for stem in phrase]
        if not columns:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        rows, often = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        if len(phrase) > 1:  # a paper may have several of its stems
            summed = np.bincount(rows, often, minlength=1)
            rows = np.flatnonzero(summed)
            often = summed[rows].astype(np.float32)
        long = B * self.lengths[rows] / self.lengths.mean() if len(rows) else often
        return rows, self._worth(len(rows)) * often * (K1 + 1) / (often + K1 * (1 - B + long))

    def _worth(self, papers: int) -> float:
        """Of a phrase that so many papers have (its inverse document frequency)."""
        return max(LEAST, float(np.log((len(self.lengths) - papers + 0.5) / (papers + 0.5))))


def _best(total: Float[ndarray, "papers"], having: Bool[ndarray, "papers"], count: int) -> list[int]:
    rows = np.flatnonzero(having)
    if len(rows) > count:
        rows = np.sort(rows[np.argpartition(-total[rows], count - 1)[:count]])
    return rows[np.argsort(-total[rows], kind="stable")].tolist()


def _joined(segments: Sequence[_Segment]) -> _Segment:
    width = max(segment.counts.shape[1] for segment in segments)
    wide = [sp.csc_array((s.counts.data, s.counts.indices, _padded(s, width)), shape=(s.counts.shape[0], width))
            for s in segments]  # fmt: skip
    return _Segment(0, sp.vstack(wide, format="csc"))


def _padded(segment: _Segment, width: int) -> ndarray:
    pointers = segment.counts.indptr
    return np.concatenate([pointers, np.full(width + 1 - len(pointers), pointers[-1])])
