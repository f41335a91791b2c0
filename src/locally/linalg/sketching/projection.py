"""Sketch-and-project: draw a sketch, project the iterate onto the solutions of the sketched system, repeat."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_count, check_finite, check_nonnegative, check_shape
from locally.linalg.sketching import kernels
from locally.linalg.sketching.rows import Rows
from locally.linalg.sketching.sketches import Kaczmarz, Sampling, Sketch

CHUNK = 1 << 16  # row numbers, and entries of sketched rows, that are drawn at a time


class Status(StrEnum):
    """How a solve ended; set by `SketchAndProject`, read from `Solution.status`."""

    CONVERGED = "converged"
    ROUNDING = "at rounding: the residual is as small as float64 lets it be, above the tolerance"
    SKETCH_LIMIT = "sketch limit"
    NOT_FINITE = "not finite: products with A overflowed or returned NaN"


@dataclass(frozen=True, eq=False)
class Solution:
    """Attributes:
    x: the last iterate.
    status: how the solve ended.
    residual_norm: ||A x - b||_2 at x (of the row-normalised system for Kaczmarz with normalised sampling).
    sketches: sketches drawn.
    multiplications: what the sketches cost, counted in multiplications with entries of A; tests of the residual extra.
    """

    x: Float[ndarray, " d"]
    status: Status
    residual_norm: float
    sketches: int
    multiplications: int


@dataclass(frozen=True, kw_only=True)
class SketchAndProject:
    """Solve A x = b by x <- x - A^T S (S^T A A^T S)^+ S^T (A x - b) with a fresh random S a step.

    Memory beyond A is one vector and one block of sketched rows; the error ||x - x*|| never grows, and
    E||x_t - x*||^2 <= (1 - gamma)^t ||x_0 - x*||^2 with gamma = lambda_min(E[A^T S (S^T A A^T S)^+ S^T A]). On a
    consistent system that has many solutions x* is the one nearest to x_0. An inconsistent system ends at the sketch
    limit. Source: Gower and Richtarik, SIAM J. Matrix Anal. Appl. 36 (2015), as used in arXiv 2305.18379.

    Args:
        sketch: `Kaczmarz`, `Gaussian`, `CountSketch`, `SparseSketch`, or anything with their `draw`.
        rtol, atol: stop when ||A x - b|| <= max(rtol ||b||, atol).
        max_sketches: at least 1.
        rounding: the residual is taken for rounding error at or below rounding * eps * ||A||_F ||x||; 0 switches that
            off. ||A||_F of an operator counts as 0 unless `solve` is told.
        random_state: seed or generator; a generator is advanced.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.

    >>> A = np.array([[4.0, 1.0], [1.0, 3.0]])
    >>> found = SketchAndProject(sketch=Kaczmarz(sampling="norm"), rtol=1e-10).solve(A, np.array([1.0, 2.0]))
    >>> found.x.round(6), str(found.status)
    (array([0.090909, 0.636364]), 'converged')
    """

    sketch: Sketch | Kaczmarz = field(default_factory=Kaczmarz)
    rtol: float = 1e-6
    atol: float = 0.0
    max_sketches: int = 1_000_000
    rounding: float = 1.0
    random_state: int | np.random.Generator | None = 0

    def __post_init__(self) -> None:
        if not isinstance(self.sketch, Kaczmarz | Sketch):
            raise TypeError(f"sketch must be a Kaczmarz, Gaussian, CountSketch, ..., got {self.sketch!r}")
        for name in ("rtol", "atol", "rounding"):
            check_nonnegative(name, getattr(self, name))
        check_count("max_sketches", self.max_sketches)

    def solve(
        self,
        A: Any,
        b: Float[ndarray, " n"],
        x0: Float[ndarray, " d"] | None = None,
        callback: Callable[[int, float], None] | None = None,
        *,
        norm: float | None = None,
    ) -> Solution:
        """Run from x0 (default 0).

        Args:
            A: (n, d), an array, a SciPy sparse matrix, `Rows`, or (not for Kaczmarz) a LinearOperator with `rmatmat`.
            b: right-hand side, in the range of A.
            callback: sees (sketches so far, ||A x - b||) after every batch of sketches.
            norm: ||A||_F of an operator, as far as known; that of a matrix is computed.

        Raises:
            ValueError: shapes do not fit, or A, b or x0 hold NaN or infinity.
            TypeError: Kaczmarz was given an operator, or A is not real.
        """
        by_rows = isinstance(self.sketch, Kaczmarz)
        system = A if isinstance(A, LinearOperator) and not by_rows else Rows.of(A)
        check_shape("b", b, (system.shape[0],))
        check_finite("b", b)
        x = np.zeros(system.shape[1]) if x0 is None else np.array(x0, dtype=float)
        check_shape("x0", x, (system.shape[1],))
        check_finite("x0", x)
        b = np.ascontiguousarray(b, dtype=float)
        if isinstance(self.sketch, Kaczmarz) and self.sketch.sampling == Sampling.NORMALISED:
            system, b = system.lengths_to_one(b)

        frobenius = math.sqrt(system.squares.sum()) if isinstance(system, Rows) else norm or 0.0
        goal = Goal(
            target=max(self.rtol * float(np.linalg.norm(b)), self.atol),
            rounding=self.rounding * float(np.finfo(float).eps) * frobenius,
        )
        residual = residual_norm(system, b, x)
        if not goal.open(residual, x):
            return Solution(x, goal.status(residual, x), residual, 0, 0)
        rng = np.random.default_rng(self.random_state)
        if isinstance(self.sketch, Kaczmarz) and self.sketch.block_size == 1:
            return self._by_single_rows(system, b, x, goal, rng, callback)
        return self._by_blocks(system, b, x, goal, rng, callback)

    def _by_single_rows(
        self,
        system: Rows,
        b: Float[ndarray, " n"],
        x: Float[ndarray, " d"],
        goal: "Goal",
        rng: np.random.Generator,
        callback: Callable[[int, float], None] | None,
    ) -> Solution:
        """One row a step; the residual is tested every four passes' worth of steps, a fifth of the whole cost."""
        assert isinstance(self.sketch, Kaczmarz)
        kernel = kernels.kaczmarz_sparse if system.sparse else kernels.kaczmarz_dense
        n, d = system.shape
        entries = np.diff(system.matrix.indptr) if system.sparse else np.full(n, d)
        taken, spent, residual, chunk = 0, 0, math.inf, 1024
        while taken < self.max_sketches:
            rows = self.sketch.rows(min(chunk, self.max_sketches - taken), system.squares, rng, start=taken)
            steps, residual = kernel(
                *system.arrays, b, x, rows, system.inverse_squares, 4 * n, goal.target, goal.rounding
            )
            taken += steps
            spent += 2 * int(entries[rows[:steps]].sum())
            chunk = min(2 * chunk, max(CHUNK, 4 * n))
            if callback is not None:
                callback(taken, residual)
            if not goal.open(residual, x):
                break
        return Solution(x, goal.status(residual, x), residual, taken, spent)

    def _by_blocks(
        self,
        system: Rows | LinearOperator,
        b: Float[ndarray, " n"],
        x: Float[ndarray, " d"],
        goal: "Goal",
        rng: np.random.Generator,
        callback: Callable[[int, float], None] | None,
    ) -> Solution:
        """Sketched rows come in batches, so that forming S^T A is one product of matrices."""
        n, d = system.shape
        size = self.sketch.block_size
        most = max(CHUNK // (size * max(n, d)), 1)
        taken, spent, residual, blocks = 0, 0, math.inf, 1
        while taken < self.max_sketches:
            blocks = min(blocks, most, self.max_sketches - taken)
            if isinstance(self.sketch, Kaczmarz):
                assert isinstance(system, Rows)
                rows = self.sketch.rows(blocks * size, system.squares, rng, start=taken * size)
                V, c = system.matrix[rows], b[rows]
                spent += V.nnz if sp.issparse(V) else V.size
            else:
                S = self.sketch.draw(blocks, n, rng)
                V, c = sketched(S, system), S @ b
                spent += products(S, system)
            V = V.toarray() if sp.issparse(V) else np.ascontiguousarray(V, dtype=float)
            kernels.project_blocks(V, c, x, size)
            taken += blocks
            residual = residual_norm(system, b, x)
            blocks *= 2
            if callback is not None:
                callback(taken, residual)
            if not goal.open(residual, x):
                break
        return Solution(x, goal.status(residual, x), residual, taken, spent)


@dataclass(frozen=True)
class Goal:
    """When to stop: the residual under the target, or under what rounding leaves of it."""

    target: float
    rounding: float

    def open(self, residual: float, x: Float[ndarray, " d"]) -> bool:
        return math.isfinite(residual) and residual > max(self.target, self.rounding * float(np.linalg.norm(x)))

    def status(self, residual: float, x: Float[ndarray, " d"]) -> Status:
        if not math.isfinite(residual):
            return Status.NOT_FINITE
        if residual <= self.target:
            return Status.CONVERGED
        return Status.SKETCH_LIMIT if self.open(residual, x) else Status.ROUNDING


def residual_norm(system: Rows | LinearOperator, b: Float[ndarray, " n"], x: Float[ndarray, " d"]) -> float:
    A = system.matrix if isinstance(system, Rows) else system
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite ends the solve with a status
        return float(np.linalg.norm(A @ x - b))


def sketched(S: Any, system: Rows | LinearOperator) -> Any:
    """S^T A, dense or sparse; S holds the rows of S^T."""
    if isinstance(system, Rows):
        if system.sparse and not sp.issparse(S):
            return (system.matrix.T @ S.T).T
        return S @ system.matrix
    return system.rmatmat(S.toarray().T if sp.issparse(S) else S.T).T


def products(S: Any, system: Rows | LinearOperator) -> int:
    """Multiplications that S^T A takes; a product with an operator counts as one with a full matrix."""
    if isinstance(system, LinearOperator) or not sp.issparse(S):
        entries = system.matrix.nnz if isinstance(system, Rows) and system.sparse else math.prod(system.shape)
        return S.shape[0] * entries
    entries_of = np.diff(system.matrix.indptr) if system.sparse else np.full(system.shape[0], system.shape[1])
    return int(entries_of[S.indices].sum())
