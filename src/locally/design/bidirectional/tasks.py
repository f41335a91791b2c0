"""An offline design task, the oracle that only evaluation may ask, and what is reported about designs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.design.bidirectional.sequences import Sequences, SequenceSpace, hamming

Oracle = Callable[[ndarray], ndarray]


@dataclass(frozen=True)
class Evaluation:
    """A set of designs by its true scores, normalised so that 1 is the best known.

    Attributes:
        max, median, mean: of the normalised scores; the best of many is a noisy figure, read the median too.
        unique: different sequences among the designs.
        diversity: mean Hamming distance between two designs, in letters; 0 for a single design.
        novelty: mean Hamming distance to the nearest sequence of the table, in letters.
        scores: normalised, in the order of the designs.
    """

    max: float
    median: float
    mean: float
    unique: int
    diversity: float
    novelty: float
    scores: Float[ndarray, " designs"]

    def figures(self) -> Mapping[str, float]:
        """The figures by the names that tables and claims give them."""
        return {
            "best score": self.max,
            "median score": self.median,
            "unique designs": self.unique,
            "diversity": self.diversity,
            "novelty": self.novelty,
        }


@dataclass(frozen=True)
class OfflineTask:
    """A table of measured sequences, and the truth about all others, for `evaluate` alone.

    Attributes:
        sequences, scores: the table, all that a designer may see.
        oracle: true scores of index arrays (n, length), in the units of the table.
        low, high: scores that become 0 and 1.
    """

    name: str
    space: SequenceSpace
    sequences: Int[ndarray, "n length"]
    scores: Float[ndarray, " n"]
    oracle: Oracle
    low: float
    high: float

    def evaluate(self, designs: Sequences) -> Evaluation:
        """Ask the oracle, once.

        Raises:
            ValueError: a design is not a sequence of the space.
        """
        return evaluate_designs(self.oracle, self.space, designs, self.sequences, self.low, self.high)

    def normalised(self, scores: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        """Scores on the scale on which `low` is 0 and `high` is 1."""
        return (scores - self.low) / (self.high - self.low)


def evaluate_designs(
    oracle: Oracle,
    space: SequenceSpace,
    designs: Sequences,
    table: Int[ndarray, "n length"],
    low: float,
    high: float,
) -> Evaluation:
    """Score, diversity and novelty of designs under a known truth.

    Args:
        oracle: index arrays (n, length) to scores (n,).
        designs: strings or indices.
        table: the offline sequences, for the novelty.
        low, high: scores that become 0 and 1, low < high.

    Raises:
        ValueError: low is not below high, or a design is not a sequence of the space.
    """
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    indices = space.encode(designs, "designs")
    scores = (np.asarray(oracle(indices), np.float64) - low) / (high - low)
    n = len(indices)
    return Evaluation(
        max=float(scores.max()),
        median=float(np.median(scores)),
        mean=float(scores.mean()),
        unique=len(np.unique(indices, axis=0)),
        diversity=float(hamming(indices, indices).sum() / max(1, n * (n - 1))),
        novelty=float(hamming(indices, table).min(1).mean()),
        scores=scores,
    )
