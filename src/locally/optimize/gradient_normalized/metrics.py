"""The norms that steps and gradients are measured in: ||h||^2 = <Bh, h> and its dual <s, B^{-1}s>.

`Euclidean` and `Diagonal` work on NumPy arrays and torch tensors alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_finite, check_shape, check_symmetric


@runtime_checkable
class Metric(Protocol):
    """A positive definite B = L L^T."""

    def apply(self, x: Any) -> Any:
        """B x."""

    def solve(self, s: Any) -> Any:
        """B^{-1} s."""

    def norm(self, x: Any) -> float:
        """<Bx, x>^{1/2}."""

    def dual_norm(self, s: Any) -> float:
        """<s, B^{-1} s>^{1/2}."""


@runtime_checkable
class FactoredMetric(Metric, Protocol):
    """One that knows L, so that matrices can be shifted by B and brought to coordinates where it is I."""

    def shift(self, H: Any, by: float) -> Any:
        """H + by B, a new matrix."""

    def whiten(self, s: Any) -> Any:
        """L^{-1} s, for a vector or for the columns of a matrix."""

    def colour(self, z: Any) -> Any:
        """L^{-T} z."""


@dataclass(frozen=True)
class Diagonal:
    """B = diag(d), d > 0."""

    d: Any

    def apply(self, x: Any) -> Any:
        """d x, entry by entry."""
        return self.d * x

    def solve(self, s: Any) -> Any:
        """s / d, entry by entry."""
        return s / self.d

    def norm(self, x: Any) -> float:
        """(sum d x^2)^{1/2}."""
        return float((x * self.apply(x)).sum()) ** 0.5

    def dual_norm(self, s: Any) -> float:
        """(sum s^2 / d)^{1/2}."""
        return float((s * self.solve(s)).sum()) ** 0.5

    def shift(self, H: Any, by: float) -> Any:
        """H + by diag(d), a copy that differs on the diagonal."""
        # row by row in memory, so that the strided view below is a view and not a copy
        shifted = np.array(H, order="C") if isinstance(H, ndarray) else H.contiguous().clone()
        shifted.reshape(-1)[:: len(H) + 1] += by * self.d
        return shifted

    def whiten(self, s: Any) -> Any:
        """s / sqrt(d), for a vector or for the columns of a matrix."""
        root = self.d**0.5
        return s / root if s.ndim == 1 else s / root[:, None]

    def colour(self, z: Any) -> Any:
        """z / sqrt(d): L is its own transpose."""
        return self.whiten(z)


@dataclass(frozen=True)
class Euclidean(Diagonal):
    """B = I."""

    d: Any = 1.0

    def apply(self, x: Any) -> Any:
        return x

    def solve(self, s: Any) -> Any:
        return s

    def whiten(self, s: Any) -> Any:
        return s


class Dense:
    """Any symmetric positive definite matrix; factorised once, n^3 / 3 operations."""

    def __init__(self, B: Float[ndarray, "n n"]) -> None:
        self.B = B
        self._factor = np.tril(cho_factor(B, lower=True)[0])

    def apply(self, x: ndarray) -> ndarray:
        """B x, 2 n^2 operations."""
        return self.B @ x

    def solve(self, s: ndarray) -> ndarray:
        """B^{-1} s by the Cholesky factor, 2 n^2 operations."""
        return cho_solve((self._factor, True), s, check_finite=False)

    def norm(self, x: ndarray) -> float:
        """||L^T x||."""
        return float(np.linalg.norm(self._factor.T @ x))

    def dual_norm(self, s: ndarray) -> float:
        """||L^{-1} s||."""
        return float(np.linalg.norm(self.whiten(s)))

    def shift(self, H: ndarray, by: float) -> ndarray:
        """H + by B, a new matrix."""
        return H + by * self.B

    def whiten(self, s: ndarray) -> ndarray:
        """L^{-1} s by forward substitution, for a vector or for the columns of a matrix."""
        return solve_triangular(self._factor, s, lower=True, check_finite=False)

    def colour(self, z: ndarray) -> ndarray:
        """L^{-T} z by backward substitution."""
        return solve_triangular(self._factor, z, lower=True, trans="T", check_finite=False)


@dataclass(frozen=True)
class Implicit:
    """B and its inverse as functions; serves curvature that is itself implicit, of low rank, or a multiple of B."""

    product: Callable[[ndarray], ndarray]
    inverse: Callable[[ndarray], ndarray]

    def apply(self, x: ndarray) -> ndarray:
        """B x by the function that was given."""
        return self.product(x)

    def solve(self, s: ndarray) -> ndarray:
        """B^{-1} s by the function that was given."""
        return self.inverse(s)

    def norm(self, x: ndarray) -> float:
        """<Bx, x>^{1/2}, one product."""
        return float(x @ self.product(x)) ** 0.5

    def dual_norm(self, s: ndarray) -> float:
        """<s, B^{-1} s>^{1/2}, one solve."""
        return float(s @ self.inverse(s)) ** 0.5


def as_metric(metric: Any, n: int) -> Metric:
    """None (identity), a positive vector (diagonal), a positive definite matrix, (B, B^{-1}) as operators, or a Metric.

    Raises:
        TypeError, ValueError: anything else; a matrix that is not symmetric or not positive definite.
    """
    if metric is None:
        return Euclidean()
    if isinstance(metric, ndarray) and metric.ndim == 1:
        check_shape("metric", metric, (n,))
        check_finite("metric", metric)
        if metric.min() <= 0:
            raise ValueError(f"metric must have positive entries, got {metric.min():g}")
        return Diagonal(metric)
    if isinstance(metric, ndarray):
        check_shape("metric", metric, (n, n))
        check_finite("metric", metric)
        check_symmetric("metric", metric)
        try:
            return Dense(np.asarray(metric, float))
        except np.linalg.LinAlgError:
            raise ValueError("metric must be positive definite, but its Cholesky factorisation fails") from None
    if isinstance(metric, tuple) and len(metric) == 2 and all(isinstance(m, LinearOperator) for m in metric):
        for m in metric:
            check_shape("metric", m, (n, n))
        return Implicit(metric[0].matvec, metric[1].matvec)
    if isinstance(metric, Metric):
        return metric
    raise TypeError(
        "metric must be None, a vector, a matrix, a pair (B, inverse of B) of LinearOperators or a Metric, got "
        f"{type(metric).__name__}"
    )
