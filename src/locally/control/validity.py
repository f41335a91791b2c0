"""What makes arrays a Markov decision process, and what is said of those that are none."""

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_finite

TOLERANCE = 1e-8  # on sums of probabilities and on norms, for arrays that went through other people's arithmetic


def check_kernel(name: str, P: Float[ndarray, "..."]) -> None:
    """Transition probabilities: the last axis is non-negative and sums to 1."""
    check_finite(name, P)
    if P.min(initial=0.0) < 0:
        raise ValueError(f"{name} must hold probabilities, got the negative entry {P.min():.3g}")
    gap = np.abs(P.sum(axis=-1) - 1).max(initial=0.0)
    if gap > TOLERANCE:
        raise ValueError(f"{name} must sum to 1 over its last axis, but a sum is off by {gap:.3g}")


def check_unit_interval(name: str, values: Float[ndarray, "..."]) -> None:
    """Mean rewards or losses: every entry in [0, 1]."""
    check_finite(name, values)
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    if low < 0 or high > 1 + TOLERANCE:
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.6g} to {high:.6g}")


def check_unit_ball(name: str, features: Float[ndarray, "..."]) -> None:
    """Features: every vector along the last axis has Euclidean norm at most 1."""
    check_finite(name, features)
    longest = np.linalg.norm(features, axis=-1).max(initial=0.0)
    if longest > 1 + TOLERANCE:
        raise ValueError(f"{name} must have Euclidean norm at most 1, got a vector of norm {longest:.6g}")


def check_index(name: str, index: Any, size: int) -> int:
    """A state or action of a finite set, as a plain int.

    >>> check_index("action", np.int64(1), 3)
    1
    """
    if not isinstance(index, int | np.integer) and not (isinstance(index, ndarray) and index.ndim == 0):
        raise TypeError(f"{name} must be an integer below {size}, got {index!r}: only finite sets are dealt with here")
    if not 0 <= index < size:
        raise ValueError(f"{name} must be one of 0, ..., {size - 1}, got {index}")
    return int(index)
