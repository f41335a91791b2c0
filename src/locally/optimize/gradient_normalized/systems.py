"""The step -(H + lambda B)^{-1} g for several lambda at one H: one factorisation, or one Krylov space, serves them all.

H is dense, of low rank, an operator, or a multiple of the metric B. All but the low-rank system take NumPy arrays and
torch tensors alike. Source: arXiv 2506.13710, Section 3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh, solveh_banded
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from locally.checks import check_shape, check_symmetric
from locally.optimize.gradient_normalized.metrics import FactoredMetric, Metric

SOLVERS = ("auto", "cholesky", "eigh", "woodbury", "krylov")
CHOLESKY_FIRST = 3  # one eigendecomposition costs about as much as ten Cholesky factorisations


@dataclass(frozen=True)
class LowRank:
    """H = U diag(c) U^T with c >= 0; c may be one number."""

    U: Float[ndarray, "n r"]
    c: Float[ndarray, " r"] | float = 1.0

    def __post_init__(self) -> None:
        if self.U.ndim != 2:
            raise ValueError(f"U must be a matrix, got shape {self.U.shape}")
        if np.ndim(self.c) and np.shape(self.c) != (self.U.shape[1],):
            raise ValueError(f"c must be a number or have shape ({self.U.shape[1]},), got {np.shape(self.c)}")
        if np.min(self.c, initial=0.0) < 0:
            raise ValueError(f"c must not be negative, got {np.min(self.c):g}")

    @property
    def root(self) -> Float[ndarray, "n r"]:
        """R with H = R R^T."""
        return self.U * np.sqrt(self.c)

    def __matmul__(self, x: ndarray) -> ndarray:
        return self.U @ ((self.c * (self.U.T @ x).T).T)

    def dense(self) -> Float[ndarray, "n n"]:
        """H as a full matrix, n^2 r operations."""
        R = self.root
        return R @ R.T


class NonFiniteCurvature(ArithmeticError):
    """NaN or infinity that only a product with the curvature could show."""


@runtime_checkable
class ShiftedSystem(Protocol):
    def step(self, shift: float) -> Any | None:
        """-(H + shift B)^{-1} g, or None where the matrix is not positive definite."""


class ScaledMetric:
    """H = c B."""

    def __init__(self, c: float, metric: Metric, gradient: Any) -> None:
        self._c, self._direction = c, metric.solve(gradient)

    def step(self, shift: float) -> Any | None:
        return -self._direction / (self._c + shift) if self._c + shift > 0 else None


class Cholesky:
    """A new factorisation for every shift, n^3 / 3 operations each."""

    def __init__(self, H: Any, metric: FactoredMetric, gradient: Any) -> None:
        self._H, self._metric, self._gradient = H, metric, gradient

    def step(self, shift: float) -> Any | None:
        return cholesky_step(self._metric.shift(self._H, shift), self._gradient)


class Eigen:
    """H = L V diag(e) V^T L^T once, about 9 n^3 operations; then n^2 for every shift.

    `project` sets negative eigenvalues to zero, the nearest positive semidefinite H in the metric.
    """

    def __init__(self, H: Any, metric: FactoredMetric, gradient: Any, *, project: bool = False) -> None:
        half = metric.whiten(H)
        self.eigenvalues, self._V = symmetric_eigen(metric.whiten(half.T))
        if project:
            self.eigenvalues = self.eigenvalues.clip(0.0)
        self._metric = metric
        self.coordinates = self._V.T @ metric.whiten(gradient)

    def step(self, shift: float) -> Any | None:
        # the safeguard a Cholesky factorisation has by itself: a pivot at round-off is no pivot
        smallest, largest = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        if smallest + shift <= 1e-16 * abs(largest):
            return None
        return -self._metric.colour(self._V @ (self.coordinates / (self.eigenvalues + shift)))


class CholeskyThenEigen:
    """Cholesky while few shifts are asked for, one eigendecomposition when they become many."""

    def __init__(self, H: Any, metric: FactoredMetric, gradient: Any) -> None:
        self._problem = H, metric, gradient
        self._cholesky = Cholesky(*self._problem)
        self._eigen: Eigen | None = None
        self._solves = 0

    def step(self, shift: float) -> Any | None:
        self._solves += 1
        if self._solves <= CHOLESKY_FIRST:
            return self._cholesky.step(shift)
        if self._eigen is None:
            self._eigen = Eigen(*self._problem)
        return self._eigen.step(shift)


class Woodbury:
    """Low rank: one thin SVD, n r^2 operations; then n r for every shift (Sherman-Morrison where r = 1).

    The part of g inside the range of H and the part outside are scaled separately, which loses no digits where the
    textbook formula subtracts two large terms.
    """

    def __init__(self, H: LowRank, metric: FactoredMetric, gradient: ndarray) -> None:
        self._P, singular, _ = np.linalg.svd(metric.whiten(H.root), full_matrices=False)
        self._eigenvalues = singular**2
        white = metric.whiten(gradient)
        self._inside = self._P.T @ white
        self._outside = white - self._P @ self._inside
        self._metric = metric

    def step(self, shift: float) -> ndarray | None:
        if shift <= 0:
            return None
        inside = self._P @ (self._inside / (self._eigenvalues + shift))
        return -self._metric.colour(inside + self._outside / shift)


class Krylov:
    """Lanczos on B^{-1}H from B^{-1}g, orthonormal in the metric: only products with H.

    The space built for one shift serves the next; a larger shift, which is what follows a rejected step, never needs
    more. The basis is reorthogonalised, 2 m n numbers of memory after m products.

    Args:
        product: v -> H v.
        rtol: of ||g + (H + shift B) step||_* / ||g||_*, in (0, 1).
    """

    def __init__(
        self, product: Callable[[Any], Any], metric: Metric, gradient: Any, *, rtol: float, max_products: int | None
    ) -> None:
        self._product, self._metric, self._rtol = product, metric, rtol
        self._norm = metric.dual_norm(gradient)
        self._limit = min(len(gradient), max_products or len(gradient))
        self._diagonal: list[float] = []
        self._below: list[float] = []  # entry j couples basis vectors j and j + 1
        self._Q = rows_like(gradient, 16)  # basis, orthonormal in the metric
        self._BQ = rows_like(gradient, 16)
        self._BQ[0] = gradient / self._norm
        self._Q[0] = metric.solve(self._BQ[0])
        self._exhausted = False

    @property
    def products(self) -> int:
        return len(self._diagonal)

    def step(self, shift: float) -> Any | None:
        while True:
            m = self.products
            if m:
                y = tridiagonal_solve(self._diagonal, self._below[: m - 1], shift, self._norm)
                if y is None:
                    return None
                if self._exhausted or self._below[-1] * abs(y[-1]) <= self._rtol * self._norm:
                    return -(self._row(y) @ self._Q[:m])
            self._extend()

    def _extend(self) -> None:
        m = self.products
        u = self._product(self._Q[m])
        projection = float(self._Q[m] @ u)
        if not math.isfinite(projection):
            raise NonFiniteCurvature("a product with the curvature holds NaN or infinity")
        self._diagonal.append(projection)
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            u = u - (self._Q[: m + 1] @ u) @ self._BQ[: m + 1]
        w = self._metric.solve(u)
        beta = max(float(w @ u), 0.0) ** 0.5
        self._below.append(beta)
        scale = max(map(abs, [*self._diagonal, *self._below]))
        # the space is invariant under B^{-1}H, or as large as it may become
        self._exhausted = beta <= 1e-14 * scale or m + 1 == self._limit
        if self._exhausted:
            return
        if m + 1 == len(self._Q):
            self._Q, self._BQ = (grown(rows) for rows in (self._Q, self._BQ))
        self._BQ[m + 1], self._Q[m + 1] = u / beta, w / beta

    def _row(self, y: ndarray) -> Any:
        if isinstance(self._Q, ndarray):
            return y
        import torch

        return torch.as_tensor(y, dtype=self._Q.dtype, device=self._Q.device)


def shifted_system(
    H: Any, metric: Metric, gradient: Float[ndarray, " n"], *, solver: str, project: bool, rtol: float
) -> ShiftedSystem:
    """The system that suits H, or the one that `solver` names.

    Raises:
        TypeError, ValueError: H is none of the known kinds, has the wrong shape, or does not go with the solver.
    """
    n = gradient.size
    if issparse(H):
        H = aslinearoperator(H)
    if isinstance(H, LowRank):
        check_shape("curvature.U", H.U, (n, None))
        narrow = H.U.shape[1] < n
        if isinstance(metric, FactoredMetric) and (solver == "woodbury" or (solver == "auto" and narrow)):
            return Woodbury(H, metric, gradient)
        if not isinstance(metric, FactoredMetric) or solver == "krylov":
            return Krylov(H.__matmul__, metric, gradient, rtol=rtol, max_products=None)
        H = H.dense()
    if isinstance(H, LinearOperator):
        check_shape("curvature", H, (n, n))
        if solver not in ("auto", "krylov"):
            raise ValueError(f'solver "{solver}" needs a matrix, but the curvature is a {type(H).__name__}')
        return Krylov(H.matvec, metric, gradient, rtol=rtol, max_products=None)
    if np.ndim(H) == 0 and isinstance(H, float | int | np.number):
        return ScaledMetric(float(H), metric, gradient)
    if not isinstance(H, ndarray):
        raise TypeError(f"curvature must give a number, matrix, LowRank or LinearOperator, got {type(H).__name__}")
    check_shape("curvature", H, (n, n))
    if not isinstance(metric, FactoredMetric) or solver == "krylov":
        return Krylov(H.__matmul__, metric, gradient, rtol=rtol, max_products=None)
    if solver == "woodbury":
        raise ValueError('solver "woodbury" needs LowRank curvature, got a matrix')
    if solver == "eigh" or project:
        return Eigen(H, metric, gradient, project=project)
    return (Cholesky if solver == "cholesky" else CholeskyThenEigen)(H, metric, gradient)


def finite_curvature(H: Any) -> bool:
    """Whether the entries are finite, for what has entries; an operator shows it in its products."""
    if isinstance(H, LowRank):
        return bool(np.isfinite(H.U).all() and np.isfinite(H.c).all())
    return bool(np.isfinite(H).all()) if isinstance(H, ndarray | float | int) else True


def check_curvature(H: Any) -> None:
    """A matrix that is not symmetric is no curvature."""
    if isinstance(H, ndarray) and H.ndim == 2:
        check_symmetric("curvature", H, rtol=1e-8)


# Linear algebra for either kind of array ------------------------------------------------------------------------------


def cholesky_step(A: Any, gradient: Any) -> Any | None:
    """-A^{-1} g; overwrites A."""
    if isinstance(A, ndarray):
        try:
            factor = cho_factor(A.T, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            return None
        return -cho_solve(factor, gradient, check_finite=False)
    import torch

    L, info = torch.linalg.cholesky_ex(A)
    return None if info else -torch.cholesky_solve(gradient[:, None], L)[:, 0]


def symmetric_eigen(A: Any) -> tuple[Any, Any]:
    if isinstance(A, ndarray):
        return eigh(A, check_finite=False)
    import torch

    return torch.linalg.eigh(A)


def tridiagonal_solve(diagonal: list[float], below: list[float], shift: float, first: float) -> ndarray | None:
    """(T + shift I)^{-1} first e_1, or None where the matrix is not positive definite."""
    bands = np.array([np.add(diagonal, shift), [*below, 0.0]])
    if len(diagonal) == 1:
        return first / bands[0] if bands[0, 0] > 0 else None
    right = np.zeros(len(diagonal))
    right[0] = first
    try:
        return solveh_banded(bands, right, lower=True, check_finite=False)
    except LinAlgError:
        return None


def rows_like(vector: Any, rows: int) -> Any:
    if isinstance(vector, ndarray):
        return np.empty((rows, len(vector)), vector.dtype)
    return vector.new_empty((rows, len(vector)))


def grown(rows: Any) -> Any:
    larger = rows_like(rows[0], 2 * len(rows))
    larger[: len(rows)] = rows
    return larger
