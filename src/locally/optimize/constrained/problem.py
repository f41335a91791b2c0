"""The problem as the solvers see it, and its evaluation at a point."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_count, check_finite, check_shape

Matrix: TypeAlias = ndarray | sp.sparray | sp.spmatrix | LinearOperator


@dataclass(frozen=True, eq=False, kw_only=True)
class EqualityProblem:
    """min f(x) subject to c(x) = 0 with x in R^n and c(x) in R^m, m <= n; both twice continuously differentiable.

    Attributes:
        n, m: numbers of unknowns and of constraints; m may be 0.
        fun: x -> f(x).
        grad: x -> gradient of f, (n,).
        constr: x -> c(x), (m,).
        jac: x -> Jacobian of c, (m, n): an array, a SciPy sparse matrix or a LinearOperator with `rmatvec`.
        hess: (x, lam) -> Hessian of f + lam . c in x, (n, n) symmetric: array, sparse matrix or LinearOperator.

    Raises:
        ValueError: m > n, or a size is out of range.
    """

    n: int
    m: int
    fun: Callable[[ndarray], float]
    grad: Callable[[ndarray], ndarray]
    constr: Callable[[ndarray], ndarray]
    jac: Callable[[ndarray], Matrix]
    hess: Callable[[ndarray, ndarray], Matrix]

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("m", self.m, at_least=0)
        if self.m > self.n:
            raise ValueError(f"there must be no more constraints than unknowns, got m = {self.m} and n = {self.n}")

    def checked_start(
        self, x0: Float[ndarray, " n"], lam0: Float[ndarray, " m"] | None
    ) -> tuple[Float[ndarray, " n"], Float[ndarray, " m"]]:
        """Copies of a starting point and its multipliers, 0 unless given.

        Raises:
            ValueError: x0 or lam0 has the wrong length or holds NaN or infinity.
        """
        check_shape("x0", x0, (self.n,))
        check_finite("x0", x0)
        lam = np.zeros(self.m) if lam0 is None else np.array(lam0, dtype=float)
        check_shape("lam0", lam, (self.m,))
        check_finite("lam0", lam)
        return np.array(x0, dtype=float), lam


def stack(blocks: list[Matrix], n: int) -> Matrix:
    """Blocks of rows one under the other; sparse as soon as one is, an operator as soon as one is."""
    if not blocks:
        return np.zeros((0, n))
    if len(blocks) == 1:
        return blocks[0]
    if any(isinstance(b, LinearOperator) for b in blocks):
        ends = np.cumsum([b.shape[0] for b in blocks])[:-1]
        return LinearOperator(
            (sum(b.shape[0] for b in blocks), n),
            matvec=lambda v: np.concatenate([b @ np.ravel(v) for b in blocks]),
            rmatvec=lambda v: sum(b.T @ part for b, part in zip(blocks, np.split(np.ravel(v), ends))),
            dtype=float,
        )
    if any(sp.issparse(b) for b in blocks):
        return sp.csr_array(sp.vstack([sp.csr_array(b) for b in blocks]))
    return np.vstack(blocks)


def add(A: Matrix, B: Matrix) -> Matrix:
    """A + B in the richest form that both allow: sparse, dense, operator."""
    if isinstance(A, LinearOperator) or isinstance(B, LinearOperator):
        along = lambda v: A @ np.ravel(v) + B @ np.ravel(v)
        return LinearOperator(A.shape, matvec=along, rmatvec=along, dtype=float)
    total = A + B
    return total if sp.issparse(total) else np.asarray(total)


class NotFiniteError(Exception):
    """A function of the user's returned NaN or infinity; the text names it."""


@dataclass(frozen=True, eq=False)
class Point:
    """Everything of first order at (x, lam)."""

    x: Float[ndarray, " n"]
    lam: Float[ndarray, " m"]
    f: float
    g: Float[ndarray, " n"]
    c: Float[ndarray, " m"]
    G: Matrix

    @cached_property
    def gL(self) -> Float[ndarray, " n"]:
        """Gradient of the Lagrangian in x."""
        return self.g + self.G.T @ self.lam

    @cached_property
    def residual(self) -> Float[ndarray, " d"]:
        """r_KKT = (gL; c)."""
        return np.concatenate([self.gL, self.c])

    @cached_property
    def kkt(self) -> float:
        return float(np.linalg.norm(self.residual))


@dataclass(eq=False)
class Evaluator:
    """Calls the user's functions, counts the calls, and refuses what is not finite or not of the right shape.

    Attributes:
        nfev: evaluations of f and c, counted as one where both are asked for at once.
        njev: evaluations of gradient and Jacobian, likewise.
        nhev: evaluations of the Hessian of the Lagrangian.
    """

    problem: EqualityProblem
    nfev: int = field(default=0, init=False)
    njev: int = field(default=0, init=False)
    nhev: int = field(default=0, init=False)

    def values(self, x: Float[ndarray, " n"]) -> tuple[float, Float[ndarray, " m"]]:
        """f(x) and c(x)."""
        self.nfev += 1
        f = float(np.asarray(self.problem.fun(x.copy())).item())
        c = self._vector("constraints", self.problem.constr(x.copy()), self.problem.m)
        if not np.isfinite(f):
            raise NotFiniteError("fun")
        return f, c

    def first_order(self, x: Float[ndarray, " n"]) -> tuple[Float[ndarray, " n"], Matrix]:
        """Gradient of f and Jacobian of c."""
        self.njev += 1
        g = self._vector("jac of fun", self.problem.grad(x.copy()), self.problem.n)
        return g, self._matrix("jac of the constraints", self.problem.jac(x.copy()), (self.problem.m, self.problem.n))

    def point(self, x: Float[ndarray, " n"], lam: Float[ndarray, " m"]) -> Point:
        f, c = self.values(x)
        g, G = self.first_order(x)
        return Point(x, lam, f, g, c, G)

    def hessian(self, x: Float[ndarray, " n"], lam: Float[ndarray, " m"]) -> Matrix:
        self.nhev += 1
        return self._matrix("hess", self.problem.hess(x.copy(), lam.copy()), (self.problem.n, self.problem.n))

    @staticmethod
    def _vector(name: str, value: Any, size: int) -> Float[ndarray, " size"]:
        vector = np.asarray(value, dtype=float).reshape(-1)
        if vector.size != size:
            raise ValueError(f"{name} must return {size} entries, got {vector.size}")
        if not np.isfinite(vector).all():
            raise NotFiniteError(name)
        return vector

    @staticmethod
    def _matrix(name: str, value: Any, shape: tuple[int, int]) -> Matrix:
        if not isinstance(value, LinearOperator) and not sp.issparse(value):
            value = np.asarray(value, dtype=float)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must return shape {shape}, got {tuple(value.shape)}")
        entries = value.data if sp.issparse(value) else value
        if not isinstance(value, LinearOperator) and not np.isfinite(entries).all():
            raise NotFiniteError(name)
        return sp.csr_array(value) if sp.issparse(value) else value
