"""The table that a designer learns from: what it must hold, and its scores in standard deviations."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from locally.checks import check_finite
from locally.design.bidirectional.sequences import Sequences, SequenceSpace

LEAST = 10  # rows of a table


@dataclass(frozen=True)
class Standardisation:
    """Scores in standard deviations above the table's mean, and back."""

    mean: float
    std: float

    @classmethod
    def of(cls, scores: Float[ndarray, " n"]) -> "Standardisation":
        return cls(float(scores.mean()), float(scores.std(ddof=1)))

    def forth(self, scores: Float[ndarray, " n"]) -> Tensor:
        return torch.as_tensor((scores - self.mean) / (self.std + 1e-9), dtype=torch.float64)

    def back(self, scores: Tensor) -> ndarray:
        return scores.detach().cpu().double().numpy() * (self.std + 1e-9) + self.mean


def check_table(
    space: SequenceSpace, sequences: Sequences, scores: Float[ndarray, " n"]
) -> tuple[Int[ndarray, "n length"], Float[ndarray, " n"]]:
    """The table as indices and float64, or a refusal that names what is wrong with it."""
    table = space.encode(sequences)
    y = np.array(scores, np.float64)
    if y.shape != (len(table),):
        raise ValueError(f"scores must have shape ({len(table)},), one for each sequence, got {y.shape}")
    if len(table) < LEAST:
        raise ValueError(f"sequences must hold at least {LEAST} for a proxy to be fitted, got {len(table)}")
    check_finite("scores", y)
    if np.ptp(y) == 0:
        raise ValueError(f"scores must not be constant, all are {y[0]:g}: there is nothing to learn from")
    return table, y
