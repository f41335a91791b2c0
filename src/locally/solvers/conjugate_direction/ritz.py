"""Training residuals: random combinations of the approximate eigenvectors that a long Lanczos run yields.

Source: arXiv 2205.10763, section on data generation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import aslinearoperator

from locally.checks import check_count, check_finite, check_positive, check_square

BREAKDOWN = 1e-10  # an off-diagonal below this, relative to the largest entry of T: the Krylov space is invariant


@dataclass(frozen=True)
class RitzBasis:
    """Ritz pairs of A in ascending order: V' A V = diag(values), V' V = I."""

    values: Float[ndarray, " m"]
    vectors: Float[ndarray, "n m"]

    def sample(
        self, count: int, *, theta: int = 0, boost: float = 9.0, rng: np.random.Generator | int | None = None
    ) -> Float[ndarray, "count n"]:
        """Unit vectors V g / ||V g||, g standard normal with its low-frequency part multiplied by `boost`.

        The first m/2 + theta coefficients are boosted: smooth residuals are the ones that conjugate gradients take
        long for. float32; O(count n m).

        Raises:
            ValueError, TypeError: count or boost is not positive, or theta is outside [-m/2, m/2].
        """
        check_count("count", count)
        check_positive("boost", boost)
        m = self.values.size
        if not -(m // 2) <= theta <= m - m // 2:
            raise ValueError(f"theta must lie in [{-(m // 2)}, {m - m // 2}] for {m} Ritz values, got {theta}")
        g = np.random.default_rng(rng).standard_normal((count, m))
        g[:, : m // 2 + theta] *= boost
        vectors = (g @ self.vectors.T).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def ritz_vectors(
    A: Any,
    m: int,
    *,
    v0: Float[ndarray, " n"] | None = None,
    drop_below: float = 1e-8,
    rng: np.random.Generator | int | None = None,
    callback: Callable[[int], None] | None = None,
) -> RitzBasis:
    """Ritz pairs of m Lanczos steps with full reorthogonalisation, twice a step.

    Without reorthogonalisation, converged eigenvectors would come back as copies. O(n m^2) operations, 2 n m numbers.

    Args:
        A: symmetric positive semidefinite matrix or `LinearOperator`.
        m: steps, 1 <= m <= n; fewer are made where the Krylov space is exhausted.
        v0: start vector; default A w with w standard normal, which has no part in the null space of A.
        drop_below: Ritz values below this times the largest belong to the null space and are left out.
        rng: of the default start vector.
        callback: sees the number of steps made.

    Raises:
        ValueError: A is not square, m out of range, v0 zero or of another size.
    """
    check_square("A", A)
    check_count("m", m)
    A = aslinearoperator(A)
    n = A.shape[0]
    if m > n:
        raise ValueError(f"m must be at most the size of A, {n}, got {m}")
    start = A @ np.random.default_rng(rng).standard_normal(n) if v0 is None else np.asarray(v0, float)
    if start.shape != (n,):
        raise ValueError(f"v0 must have shape ({n},), got {start.shape}")
    check_finite("v0", start)
    if not start.any():
        raise ValueError("v0 must not be zero" if v0 is not None else "A must not be zero")
    Q, alpha, beta = lanczos(A, start, m, callback)
    values, S = eigh_tridiagonal(alpha, beta)
    kept = values > drop_below * values[-1]
    return RitzBasis(values[kept], Q.T @ S[:, kept])


def lanczos(
    A: Any, v: Float[ndarray, " n"], m: int, callback: Callable[[int], None] | None = None
) -> tuple[Float[ndarray, "m n"], Float[ndarray, " m"], Float[ndarray, " offdiagonal"]]:
    """Orthonormal rows Q, diagonal and off-diagonal of T = Q A Q'; stops early in an invariant subspace."""
    Q = np.empty((m, v.size))
    alpha, beta = np.empty(m), np.empty(m)
    Q[0] = v / np.linalg.norm(v)
    scale = 0.0
    for k in range(m):
        w = A @ Q[k]
        alpha[k] = w @ Q[k]
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            w -= (Q[: k + 1] @ w) @ Q[: k + 1]
        beta[k] = np.linalg.norm(w)
        scale = max(scale, abs(alpha[k]), beta[k])
        if callback is not None:
            callback(k + 1)
        if k + 1 == m or beta[k] <= BREAKDOWN * scale:
            break
        Q[k + 1] = w / beta[k]
    return Q[: k + 1], alpha[: k + 1], beta[:k]
