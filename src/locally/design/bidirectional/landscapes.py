"""A landscape of motifs with a known oracle: 20 letters of DNA, six hidden motifs, half of them harmful.

Small enough for a laptop, and hard where the real tasks are: the table holds only poor sequences, while unlabelled
ones, which show the motifs, abound.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_between, check_count
from locally.design.bidirectional.sequences import SequenceSpace
from locally.design.bidirectional.tasks import OfflineTask

EFFECTS = (1.0, 1.0, 1.0, -1.0, -1.0, -0.5)


@dataclass(frozen=True)
class MotifLandscape:
    """Score of a sequence: over motifs, the effect times the cube of the best match at any position.

    Args:
        seed: of the motifs and of every draw.
        length: of the sequences, at least `width`.
        width: of the motifs.

    >>> land = MotifLandscape(seed=0)
    >>> land.score(np.tile(land.motifs[0], 4)[None, :20]).shape
    (1,)
    """

    seed: int
    length: int = 20
    width: int = 6

    def __post_init__(self) -> None:
        check_count("seed", self.seed, at_least=0)
        check_count("width", self.width)
        check_count("length", self.length, at_least=self.width)

    @property
    def space(self) -> SequenceSpace:
        """DNA of this length."""
        return SequenceSpace("dna", self.length)

    @property
    def motifs(self) -> Int[ndarray, "motifs width"]:
        """Letters of each motif, as indices; they follow from the seed."""
        return np.random.default_rng(self.seed).integers(0, 4, (len(EFFECTS), self.width))

    def draw(self, n: int, mutation: float, rng: np.random.Generator) -> Int[ndarray, "n length"]:
        """Random background with copies of random motifs at random gaps, each letter redrawn with rate `mutation`."""
        check_between("mutation", mutation, 0, 1)
        motifs = self.motifs
        found = rng.integers(0, 4, (n, self.length))
        position = rng.integers(0, 4, n)
        while (alive := position <= self.length - self.width).any():
            rows = np.flatnonzero(alive)
            copies = motifs[rng.integers(0, len(motifs), rows.size)]
            changed = rng.random(copies.shape) < mutation
            copies = np.where(changed, rng.integers(0, 4, copies.shape), copies)
            found[rows[:, None], position[rows, None] + np.arange(self.width)] = copies
            position[rows] += self.width + rng.integers(0, 4, rows.size)
        return found

    def score(self, sequences: Int[ndarray, "n length"]) -> Float[ndarray, " n"]:
        """True scores of index arrays, O(length width) for each sequence and motif."""
        windows = np.lib.stride_tricks.sliding_window_view(sequences, self.width, axis=1)
        matches = np.stack([(windows == motif).mean(2).max(1) for motif in self.motifs], axis=1)
        return matches**3 @ np.array(EFFECTS)

    def task(self, n: int = 1000, corpus: int = 20_000) -> tuple[OfflineTask, Int[ndarray, "corpus length"]]:
        """The lower half of n mutated sequences with their scores, and unlabelled sequences for a language model.

        Scores are normalised by the poorest of the table (0) and the best of `corpus` sequences without mutations (1).
        """
        check_count("n", n, at_least=20)
        check_count("corpus", corpus)
        rng = np.random.default_rng([self.seed, 1])
        unlabelled = self.draw(corpus, 0.05, rng)
        table = self.draw(n, 0.35, rng)
        scores = self.score(table)
        poor = np.argsort(scores, kind="stable")[: n // 2]
        ceiling = float(self.score(self.draw(corpus, 0.0, rng)).max())
        task = OfflineTask(
            name=f"motifs {self.seed}",
            space=self.space,
            sequences=table[poor],
            scores=scores[poor],
            oracle=self.score,
            low=float(scores[poor].min()),
            high=ceiling,
        )
        return task, unlabelled
