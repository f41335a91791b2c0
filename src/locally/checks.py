"""What every public function says of bad input, said once: argument, what was expected, what came."""

import math
import numbers
from typing import Any

import numpy as np


def check_positive(name: str, value: float, *, below: float = math.inf) -> None:
    """`value` must be a finite number in (0, below)."""
    if not _is_number(value) or not 0 < value < below:
        expected = "positive and finite" if below == math.inf else f"in (0, {below:g})"
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_nonnegative(name: str, value: float) -> None:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be non-negative and finite, got {value!r}")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """`value` must lie in the closed interval [low, high]."""
    if not _is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")


def check_count(name: str, value: int, *, at_least: int = 1) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_finite(name: str, array: Any) -> None:
    """No NaN and no infinity in a NumPy array or torch tensor."""
    entries = array.isfinite() if hasattr(array, "isfinite") else np.isfinite(array)
    if not entries.all():
        raise ValueError(f"{name} holds NaN or infinity")


def check_shape(name: str, array: Any, expected: tuple[int | None, ...]) -> None:
    """`expected` gives each dimension, None where any size will do."""
    shape = tuple(array.shape)
    if len(shape) != len(expected) or any(e not in (None, s) for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape ({wanted}), got {shape}")


def check_square(name: str, matrix: Any) -> None:
    if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(matrix.shape)}")


def check_symmetric(name: str, matrix: Any, *, rtol: float = 1e-10) -> None:
    """Symmetric up to `rtol` times the largest entry; dense NumPy and torch or SciPy sparse."""
    check_square(name, matrix)
    scale = float(abs(matrix).max()) if min(matrix.shape) else 0.0
    gap = float(abs(matrix - matrix.T).max()) if min(matrix.shape) else 0.0
    if gap > rtol * scale:
        raise ValueError(f"{name} must be symmetric, but {name} and its transpose differ by up to {gap:.3g}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
