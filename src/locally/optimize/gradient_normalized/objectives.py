"""Objectives with cheap positive semidefinite curvature: soft maxima and powers of residual norms.

Each has `fun`, `jac`, `fun_and_jac`, the exact `hess` and the approximations of arXiv 2506.13710, Section 4; values at
the last point are kept, so that curvature after gradient costs no second evaluation.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse import csr_array, issparse, sparray

from locally.checks import check_finite, check_positive, check_shape, check_symmetric
from locally.optimize.gradient_normalized.systems import LowRank

Matrix = Any  # an array or a SciPy sparse array


class Objective:
    """Value and gradient from `_evaluate`, remembered for the last point."""

    _at: ndarray | None = None
    _held: Any = None

    def fun(self, x: Float[ndarray, " n"]) -> float:
        """f(x); what was computed at the last point is remembered, gradient included."""
        return self._state(x)[0]

    def jac(self, x: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        """The gradient; free where `fun` was asked for at the same x just before."""
        return self._state(x)[1]

    def fun_and_jac(self, x: Float[ndarray, " n"]) -> tuple[float, Float[ndarray, " n"]]:
        """(f, gradient), what solvers with jac=True want."""
        return self._state(x)[:2]

    def _state(self, x: ndarray) -> Any:
        if self._at is None or not np.array_equal(self._at, x):
            with np.errstate(over="ignore", invalid="ignore"):  # far trial points: the solver refuses infinite values
                self._held, self._at = self._evaluate(x), x.copy()
        return self._held

    def _evaluate(self, x: ndarray) -> Any:
        """(f, gradient, whatever the curvature needs)."""
        raise TypeError(f"{type(self).__name__} is abstract")


class LogSumExp(Objective):
    """f(x) = mu log sum_i exp((<a_i, x> - b_i) / mu), a smooth maximum of m affine functions.

    Args:
        A: rows a_i, (m, n).
        b: offsets.
        mu: smoothing, > 0; f exceeds the maximum by at most mu log m.

    O(m n) for value and gradient, O(m n^2) for a matrix.

    >>> f = LogSumExp(np.array([[1.0], [-1.0]]), np.zeros(2))
    >>> f.hess(np.zeros(1))
    array([[1.]])
    """

    def __init__(self, A: Float[ndarray, "m n"], b: Float[ndarray, " m"], mu: float = 1.0) -> None:
        check_shape("A", A, (None, None))
        check_shape("b", b, (len(A),))
        check_finite("A", A)
        check_finite("b", b)
        check_positive("mu", mu)
        self.A, self.b, self.mu = A, b, mu

    @classmethod
    def centred(cls, A: Float[ndarray, "m n"], b: Float[ndarray, " m"], mu: float = 1.0) -> "LogSumExp":
        """Rows shifted by the gradient at 0, which makes 0 the minimiser."""
        return cls(A - cls(A, b, mu).jac(np.zeros(A.shape[1])), b, mu)

    def hess(self, x: Float[ndarray, " n"]) -> Float[ndarray, "n n"]:
        """(A^T diag(p) A - g g^T) / mu with p the softmax weights and g the gradient."""
        g = self.jac(x)
        return self._weighted_gram(x) - np.outer(g, g) / self.mu

    def gauss_newton(self, x: Float[ndarray, " n"]) -> Float[ndarray, "n n"] | LowRank:
        """A^T diag(pi) A / mu, above the Hessian by g g^T / mu; of low rank where there are fewer functions than n."""
        if len(self.A) < self.A.shape[1]:
            return LowRank(self.A.T, self._state(x)[2] / self.mu)
        return self._weighted_gram(x)

    def _weighted_gram(self, x: ndarray) -> ndarray:
        root = np.sqrt(self._state(x)[2] / self.mu)[:, None] * self.A
        return root.T @ root  # NumPy sees the transpose and computes one half only

    def _evaluate(self, x: ndarray) -> Any:
        z = (self.A @ x - self.b) / self.mu
        top = z.max()
        e = np.exp(z - top)
        total = e.sum()
        pi = e / total
        return float(self.mu * (top + np.log(total))), self.A.T @ pi, pi


class PowerResidual(Objective):
    """f(x) = ||u(x)||^p / p for a smooth map u and p >= 2, with ||u||^2 = <G u, u>.

    Args:
        u: x -> residuals (r,).
        jacobian: x -> Jacobian (r, n), a matrix or a SciPy sparse array.
        p: power, >= 2.
        target_metric: G, None (identity), a positive vector or a positive definite matrix.
        second: (x, w) -> sum_i w_i Hess u_i(x), for `hess` alone; None says that u is affine.

    >>> f = PowerResidual(lambda x: x - 1, lambda x: np.eye(2), p=4.0)
    >>> f.jac(np.zeros(2))
    array([-2., -2.])
    """

    def __init__(
        self,
        u: Callable[[ndarray], ndarray],
        jacobian: Callable[[ndarray], Matrix],
        p: float = 2.0,
        *,
        target_metric: ndarray | None = None,
        second: Callable[[ndarray, ndarray], Matrix] | None = None,
    ) -> None:
        if not 2 <= p < np.inf:
            raise ValueError(f"p must be finite and at least 2, got {p}")
        if target_metric is not None:
            check_finite("target_metric", target_metric)
            if target_metric.ndim == 2:
                check_symmetric("target_metric", target_metric)
            elif target_metric.min() <= 0:
                raise ValueError(f"target_metric must have positive entries, got {target_metric.min():g}")
        self.u, self.jacobian, self.p, self.second = u, jacobian, p, second
        self.target_metric = target_metric
        self._constant_gram: ndarray | None = None

    @classmethod
    def linear(cls, A: Float[ndarray, "r n"], b: Float[ndarray, " r"], p: float = 2.0) -> "PowerResidual":
        """u(x) = A x - b; A^T A is computed once."""
        check_shape("A", A, (None, None))
        check_shape("b", b, (len(A),))
        made = cls(lambda x: A @ x - b, lambda x: A, p)
        made._constant_gram = A.T @ A
        return made

    def hess(self, x: Float[ndarray, " n"]) -> Float[ndarray, "n n"]:
        """The exact Hessian; indefinite in general where u is not affine."""
        _, _, size, weighted, _, _ = self._state(x)
        H = self.gauss_newton(x)
        if self.second is not None:
            H += size ** (self.p - 2) * as_dense(self.second(x, weighted))
        return H

    def gauss_newton(self, x: Float[ndarray, " n"]) -> Float[ndarray, "n n"]:
        """||u||^{p-2} J^T G J + (p-2) ||u||^{p-4} (J^T G u)(J^T G u)^T: all but the curvature of u itself."""
        _, _, size, _, J, v = self._state(x)
        H = size ** (self.p - 2) * self._gram(J)
        if self.p > 2 and size:
            H += self._fisher_weight(size) * np.outer(v, v)
        return H

    def fisher(self, x: Float[ndarray, " n"]) -> LowRank:
        """The rank-one term alone; enough where the metric is A^T A of an affine u, whose multiple is all it leaves."""
        _, _, size, _, _, v = self._state(x)
        return LowRank(v[:, None], np.array([self._fisher_weight(size)]))

    def _fisher_weight(self, size: float) -> float:
        """(p-2) ||u||^{p-4}; 0 where u = 0, since v vanishes as fast as u."""
        return (self.p - 2) * size ** (self.p - 4) if size and self.p > 2 else 0.0

    def _gram(self, J: Matrix) -> ndarray:
        if self._constant_gram is not None:
            return self._constant_gram
        return as_dense(J.T @ self._weigh(J))

    def _weigh(self, u: Any) -> Any:
        G = self.target_metric
        if G is None:
            return u
        if G.ndim == 2:
            return G @ u
        return G * u if u.ndim == 1 else (u.T * G).T

    def _evaluate(self, x: ndarray) -> Any:
        u, J = np.asarray(self.u(x), float), self.jacobian(x)
        weighted = self._weigh(u)
        size = np.sqrt(u @ weighted)
        v = J.T @ weighted
        return float(size**self.p / self.p), size ** (self.p - 2) * v, size, weighted, J, v


def rosenbrock(p: float = 2.0) -> PowerResidual:
    """||(1 - x, 10 (y - x^2))||^p / p, a curved valley with its minimum 0 at (1, 1).

    >>> rosenbrock().fun(np.array([-2.0, 2.0]))  # half of the usual function
    204.5
    """
    return PowerResidual(
        lambda x: np.array([1 - x[0], 10 * (x[1] - x[0] ** 2)]),
        lambda x: np.array([[-1.0, 0.0], [-20 * x[0], 10.0]]),
        p,
        second=lambda x, w: np.array([[-20 * w[1], 0.0], [0.0, 0.0]]),
    )


def chebyshev_chain(n: int, p: float = 4.0) -> PowerResidual:
    """Nesterov's chain u_1 = (1 - x_1) / 2, u_i = x_i - (2 x_{i-1}^2 - 1), with its minimum 0 at (1, ..., 1).

    The Jacobian is sparse, two entries a row.
    """
    row = np.r_[0, np.repeat(np.arange(1, n), 2)]
    column = np.r_[0, np.c_[np.arange(n - 1), np.arange(1, n)].ravel()]
    starts = np.r_[0, np.cumsum(np.bincount(row, minlength=n))]

    def u(x: ndarray) -> ndarray:
        out = x - 1.0
        out[0] /= -2
        out[1:] += 2 * (1 - x[:-1] ** 2)
        return out

    def jacobian(x: ndarray) -> sparray:
        entries = np.ones(row.size)
        entries[0] = -0.5
        entries[1::2] = -4 * x[:-1]
        return csr_array((entries, column, starts), shape=(n, n))

    def second(x: ndarray, w: ndarray) -> ndarray:
        return np.diag(np.r_[-4 * w[1:], 0.0])

    return PowerResidual(u, jacobian, p, second=second)


def as_dense(M: Any) -> ndarray:
    return M.toarray() if issparse(M) else np.asarray(M)
