"""What a reader would use instead: incomplete Cholesky and deflation for conjugate gradients.

Sources: Meijerink and van der Vorst, Math. Comp. 31 (1977), 148-162; Saad, Yeung, Erhel and Guyomarc'h, SIAM J. Sci.
Comput. 21 (2000), 1909-1926. Counts of the solvers here are of products with A, as for the other methods.
"""

from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numba import njit
from numpy import ndarray
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_count, check_finite, check_positive, check_square
from locally.solvers.conjugate_direction.ritz import lanczos


class IncompleteCholesky(LinearOperator):
    """M^-1 = (L L')^-1 with L on the pattern of the lower triangle of A, IC(0): a preconditioner for SciPy's cg.

    Zero rows of A, as solids have, are passed over: M^-1 is zero there. Where a pivot is not positive, which M-matrices
    never meet unless they are singular, it is replaced by the diagonal entry of A. O(nonzeros) to set up and to apply.

    Args:
        A: symmetric SciPy sparse matrix with positive diagonal but for zero rows.

    Raises:
        ValueError: A is not square, has column numbers outside it, or a row that is not zero has a diagonal that is not
            positive.

    >>> import scipy.sparse as sp
    >>> tridiagonal = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(4, 4))
    >>> (IncompleteCholesky(tridiagonal) @ (tridiagonal @ np.ones(4))).round(12)  # no fill-in: exact
    array([1., 1., 1., 1.])
    """

    def __init__(self, A: Any):
        check_square("A", A)
        if hasattr(A, "check_format"):  # of compressed formats, whose indices SciPy takes on trust
            A.check_format(full_check=True)
        lower = sp.tril(sp.csr_array(A, dtype=np.float64), format="csr")
        lower.eliminate_zeros()
        lower.sort_indices()
        filled = np.diff(lower.indptr) > 0
        if not (A.diagonal()[filled] > 0).all():
            raise ValueError("A must have a positive diagonal in every row that is not zero")
        super().__init__(np.float64, A.shape)
        self.factor = (lower.indptr, lower.indices, lower.data.copy())
        self.replaced_pivots = factorise(*self.factor)

    def _matvec(self, r: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        return solve_both(*self.factor, np.ascontiguousarray(r, np.float64).reshape(-1))

    def _adjoint(self) -> "IncompleteCholesky":
        return self


@njit(cache=True, nogil=True)
@no_type_check
def factorise(indptr, indices, data):
    """IC(0) in place, row by row; a zero row stays empty. Returns the number of pivots that were replaced."""
    replaced = 0
    for i in range(indptr.size - 1):
        if indptr[i] == indptr[i + 1]:
            continue
        last = indptr[i + 1] - 1
        for p in range(indptr[i], last):
            j = indices[p]
            a, b = indptr[i], indptr[j]
            value = data[p]
            # scalar product of the finished parts of rows i and j, both ascending
            while a < p and b < indptr[j + 1] - 1:
                if indices[a] == indices[b]:
                    value -= data[a] * data[b]
                    a += 1
                    b += 1
                elif indices[a] < indices[b]:
                    a += 1
                else:
                    b += 1
            data[p] = value / data[indptr[j + 1] - 1]
        pivot = data[last]
        for p in range(indptr[i], last):
            pivot -= data[p] * data[p]
        if pivot <= 1e-12 * data[last]:
            pivot = data[last]
            replaced += 1
        data[last] = np.sqrt(pivot)
    return replaced


@njit(cache=True, nogil=True)
@no_type_check
def solve_both(indptr, indices, data, r):
    z = r.copy()
    n = indptr.size - 1
    for i in range(n):
        last = indptr[i + 1] - 1
        if last < indptr[i]:
            z[i] = 0.0
            continue
        value = z[i]
        for p in range(indptr[i], last):
            value -= data[p] * z[indices[p]]
        z[i] = value / data[last]
    for i in range(n - 1, -1, -1):
        last = indptr[i + 1] - 1
        if last < indptr[i]:
            continue
        z[i] /= data[last]
        for p in range(indptr[i], last):
            z[indices[p]] -= data[p] * z[i]
    return z


@dataclass(frozen=True)
class DeflatedSolution:
    """What deflated conjugate gradients return.

    Attributes:
        x: the last iterate.
        residual_norms: ||b - A x_k||_2 for k = 0, 1, ... as the recurrence knows it.
        converged: ||b - A x||_2, computed from x, is at most 1.01 rtol ||b||_2.
    """

    x: Float[ndarray, " n"]
    residual_norms: Float[ndarray, " steps"]
    converged: bool


@dataclass(frozen=True, kw_only=True)
class DeflatedCG:
    """Jacobi-preconditioned conjugate gradients with `vectors` Ritz vectors of a Lanczos run from b projected out.

    Starts from the Ritz solution x0 = V diag(1/ritz) V' b and keeps every direction A-orthogonal to V. The Lanczos run
    costs `vectors` products of its own.

    Args:
        vectors: at least 1; the paper takes 16.
        rtol: stop when ||b - A x|| <= rtol ||b||, in (0, 1).
        max_iter: at least 1.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.
    """

    vectors: int = 16
    rtol: float = 1e-4
    max_iter: int = 10_000

    def __post_init__(self) -> None:
        check_count("vectors", self.vectors)
        check_positive("rtol", self.rtol, below=1.0)
        check_count("max_iter", self.max_iter)

    def solve(self, A: Any, b: Float[ndarray, " n"]) -> DeflatedSolution:
        """Solve A x = b for a SciPy sparse matrix A; zero rows of A need zeros in b.

        Raises:
            ValueError: shapes do not fit, or b is not finite.
        """
        check_square("A", A)
        if b.shape != (A.shape[0],):
            raise ValueError(f"b must have shape ({A.shape[0]},), got {b.shape}")
        check_finite("b", b)
        norm_b = np.linalg.norm(b)
        if norm_b == 0:
            return DeflatedSolution(np.zeros_like(b), np.zeros(1), True)
        Q, alpha, beta = lanczos(A, b, min(self.vectors, b.size))
        ritz, S = eigh_tridiagonal(alpha, beta)
        kept = ritz > 1e-12 * ritz[-1]
        V, ritz = Q.T @ S[:, kept], ritz[kept]
        diagonal = A.diagonal()
        jacobi = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)

        x = V @ ((V.T @ b) / ritz)
        r = b - A @ x
        z = jacobi * r
        p = z - V @ ((V.T @ (A @ z)) / ritz)
        rz = r @ z
        residual_norms = [np.linalg.norm(r)]
        while residual_norms[-1] > self.rtol * norm_b and len(residual_norms) <= self.max_iter:
            Ap = A @ p
            curvature = p @ Ap
            if not curvature > 0:
                break
            step = rz / curvature
            x += step * p
            r -= step * Ap
            z = jacobi * r
            rz, rz_old = r @ z, rz
            p = z + (rz / rz_old) * p - V @ ((V.T @ (A @ z)) / ritz)
            residual_norms.append(np.linalg.norm(r))
        norm = float(np.linalg.norm(b - A @ x))
        return DeflatedSolution(x, np.array(residual_norms), bool(norm <= 1.01 * self.rtol * norm_b))
