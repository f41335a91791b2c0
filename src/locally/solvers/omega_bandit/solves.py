"""The two solvers whose omega the learners set: SOR, and conjugate gradients preconditioned by SSOR."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_choice, check_count, check_finite, check_positive
from locally.linalg.relaxation import Splitting, SweepOrder, kernels
from locally.linalg.relaxation.splitting import SWEEP_ORDERS, check_omega

Callback = Callable[[int, float], None]


class Status(StrEnum):
    """How a solve ended; set by the solvers of this room, read from `Solution.status`."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    STAGNATED = "stagnated: rounding keeps the true residual above the tolerance"
    DIVERGED = "diverged: A is not symmetric positive definite"
    BREAKDOWN = "breakdown: A is not positive definite"


@dataclass(frozen=True)
class Solution:
    """A solve's answer and what vouches for it.

    Attributes:
        x: last iterate.
        status: CONVERGED exactly when relative_residual <= rtol.
        n_iter: iterations done; 0 if x0 was good enough.
        omega: relaxation parameter used.
        relative_residual: ||b - A x|| / ||b||, computed from x at the end and not carried along by a recurrence.
    """

    x: Float[ndarray, " n"]
    status: Status
    n_iter: int
    omega: float
    relative_residual: float

    @property
    def converged(self) -> bool:
        """Whether the status is CONVERGED."""
        return self.status is Status.CONVERGED


@dataclass(frozen=True, kw_only=True)
class SOR:
    """Successive over-relaxation: x <- x + (D/omega + L)^-1 (b - A x).

    Converges for symmetric positive definite A and 0 < omega < 2. The residual is carried along, so that an iteration
    reads A only once: O(nonzeros) an iteration, O(n) memory.

    Args:
        rtol: stop when ||b - A x|| <= rtol ||b||, in (0, 1).
        max_iter: at least 1.

    >>> import scipy.sparse as sp
    >>> A = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(20, 20), format="csr")
    >>> [SOR().solve(A, np.ones(20), omega=omega).n_iter for omega in (1.0, 1.5, 1.75)]
    [818, 263, 73]
    """

    rtol: float = 1e-8
    max_iter: int = 10_000

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol, below=1.0)
        check_count("max_iter", self.max_iter)

    def solve(
        self,
        A: Any,
        b: Float[ndarray, " n"],
        *,
        omega: float = 1.0,
        x0: Float[ndarray, " n"] | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve A x = b.

        Args:
            A: matrix with positive diagonal (see `Splitting.of`), or its `Splitting`, which is then not checked again.
            b: right-hand side; taken to the dtype of A.
            omega: in (0, 2).
            x0: where to start, default 0; left as it is.
            callback: sees (iterations, ||b - A x|| / ||b||) after every iteration.

        Raises:
            ValueError, TypeError: A, b, x0 or omega is not as above.
        """
        problem = _Problem(A, b, x0, omega)
        s, x, r = problem.split, problem.x, problem.r
        d = np.zeros_like(x)
        # residuals of SOR may grow at first, but not beyond all measure
        ceiling = 1e16 * max(problem.residual(), problem.norm_b) ** 2
        target = (self.rtol * problem.norm_b) ** 2

        def advance(steps: int) -> tuple[int, float, Status | None]:
            done, squares = kernels.sor_steps(
                s.indptr, s.indices, s.data, s.diagonal_at, x, r, d, problem.omega, target, ceiling, steps
            )
            return done, squares**0.5, None if squares < ceiling else Status.DIVERGED

        return _iterate(problem, advance, problem.residual, self.rtol, self.max_iter, callback)


@dataclass(frozen=True, kw_only=True)
class SSORConjugateGradients:
    """Conjugate gradients preconditioned by P = X^T D^-1 X / (omega (2 - omega)), X = D + omega L.

    For symmetric positive definite A. An iteration costs about two products with A; O(n) memory. omega = 1 is symmetric
    Gauss-Seidel.

    Args:
        rtol: stop when ||b - A x|| <= rtol ||b||, in (0, 1).
        max_iter: at least 1.
        order: which triangular sweep applies first; "forward first" is P = X D^-1 X^T / (omega (2 - omega)).

    >>> import scipy.sparse as sp
    >>> T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(30, 30))
    >>> A = sp.kronsum(T, T, format="csr")
    >>> [SSORConjugateGradients().solve(A, np.ones(900), omega=omega).n_iter for omega in (1.0, 1.7)]
    [32, 21]
    """

    rtol: float = 1e-8
    max_iter: int = 10_000
    order: SweepOrder = "backward first"

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol, below=1.0)
        check_count("max_iter", self.max_iter)
        check_choice("order", self.order, SWEEP_ORDERS)

    def solve(
        self,
        A: Any,
        b: Float[ndarray, " n"],
        *,
        omega: float = 1.0,
        x0: Float[ndarray, " n"] | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve A x = b; arguments and errors as for `SOR.solve`, and ValueError if A is not symmetric."""
        problem = _Problem(A, b, x0, omega)
        s, x, r = problem.split, problem.x, problem.r
        if not isinstance(A, Splitting) and not s.is_symmetric():
            raise ValueError("A must be symmetric")
        z, p, q = np.empty_like(x), np.empty_like(x), np.empty_like(x)
        backward_first = self.order == "backward first"
        precondition = kernels.ssor_backward_first if backward_first else kernels.ssor_forward_first
        target = (self.rtol * problem.norm_b) ** 2
        rz = 0.0

        def restart() -> float:
            nonlocal rz
            norm = problem.residual()
            rz = precondition(s.indptr, s.indices, s.data, s.diagonal_at, r, z, problem.omega)
            p[:] = z
            return norm

        def advance(steps: int) -> tuple[int, float, Status | None]:
            nonlocal rz
            done, squares, rz, curvature = kernels.ssor_cg_steps(
                s.indptr, s.indices, s.data, s.diagonal_at, x, r, z, p, q, rz, problem.omega, backward_first, target,
                steps,
            )  # fmt: skip
            return done, squares**0.5, None if curvature > 0 else Status.BREAKDOWN

        return _iterate(problem, advance, restart, self.rtol, self.max_iter, callback)


class _Problem:
    """Checked and copied input of one solve, its iterate x and residual r."""

    def __init__(self, A: Any, b: ndarray, x0: ndarray | None, omega: float) -> None:
        check_omega(omega)
        self.split = A if isinstance(A, Splitting) else Splitting.of(A)
        self.b = self._vector("b", b)
        self.x = np.zeros_like(self.b) if x0 is None else self._vector("x0", x0)
        self.r = np.empty_like(self.b)
        self.omega = self.split.dtype.type(omega)
        self.norm_b = float(np.linalg.norm(self.b))
        if self.norm_b == 0:
            self.x[:] = 0  # no residual is small beside nothing; the solution is known

    def _vector(self, name: str, vector: ndarray) -> ndarray:
        if vector.shape != (self.split.n,):
            raise ValueError(f"{name} must have shape ({self.split.n},), got {vector.shape}")
        if np.issubdtype(vector.dtype, np.complexfloating):
            raise TypeError(f"{name} must be real, got {vector.dtype}")
        check_finite(name, vector)
        return np.array(vector, dtype=self.split.dtype)

    def residual(self) -> float:
        """Put b - A x into r; returns its norm."""
        s = self.split
        return float(kernels.residual(s.indptr, s.indices, s.data, self.x, self.b, self.r)) ** 0.5


def _iterate(
    problem: _Problem,
    advance: Callable[[int], tuple[int, float, Status | None]],
    restart: Callable[[], float],
    rtol: float,
    max_iter: int,
    callback: Callback | None,
) -> Solution:
    """Advance until the true residual meets the tolerance.

    `advance(steps)` iterates on the recurred residual and returns (iterations done, its norm, what went wrong);
    `restart()` replaces that residual by b - A x and returns its norm.
    """
    target = rtol * problem.norm_b
    n_iter, status = 0, None
    norm = restart()
    last_true = np.inf
    while status is None:
        if norm <= target:
            status = Status.CONVERGED
        elif n_iter >= max_iter:
            status = Status.ITERATION_LIMIT
        else:
            done, norm, status = advance(1 if callback else max_iter - n_iter)
            n_iter += done
            if callback and done:
                callback(n_iter, norm / problem.norm_b)
            if status is None and norm <= target:
                norm = restart()
                if target < norm and norm > last_true / 2:
                    status = Status.STAGNATED
                last_true = norm
    relative = problem.residual() / problem.norm_b if problem.norm_b > 0 else 0.0
    return Solution(problem.x, status, n_iter, float(problem.omega), relative)
