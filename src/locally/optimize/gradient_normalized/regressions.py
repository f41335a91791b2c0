"""Logistic and softmax regression with their Hessians, empirical Fisher matrices and products.

For both, the Hessian is the Gauss-Newton matrix and the Fisher matrix as well; the empirical Fisher matrix is a cruder
substitute, good only where the data are nearly separable (arXiv 2506.13710, Section 4).
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator
from scipy.special import expit

from locally.checks import check_count, check_finite, check_nonnegative, check_shape
from locally.optimize.gradient_normalized.designs import Design
from locally.optimize.gradient_normalized.objectives import Objective


class Regression(Objective):
    """sum_i w_i loss(y_i, <theta, x_i>) / sum_i w_i + (l2 / 2) ||coefficients||^2, intercepts free.

    Args:
        X: (n, d), finite, dense or SciPy sparse.
        y: labels.
        l2: ridge, >= 0.
        fit_intercept: whether each row gets a constant feature.
        sample_weight: >= 0, not all zero; default ones.
    """

    def __init__(
        self,
        X: Any,
        y: ndarray,
        *,
        l2: float = 0.0,
        fit_intercept: bool = True,
        sample_weight: Float[ndarray, " n"] | None = None,
    ) -> None:
        check_shape("X", X, (None, None))
        check_finite("X", getattr(X, "data", X) if not isinstance(X, ndarray) else X)
        check_shape("y", y, (X.shape[0],))
        check_nonnegative("l2", l2)
        self.design = Design(X.astype(float, copy=False), fit_intercept)
        self.y, self.l2 = y, l2
        weights = np.ones(self.design.n) if sample_weight is None else np.asarray(sample_weight, float)
        check_shape("sample_weight", weights, (self.design.n,))
        if not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
            raise ValueError("sample_weight must be finite, non-negative and not all zero")
        self.weights = weights / weights.sum()
        self.ridge = np.full(self.design.k, float(l2))
        self.ridge[self.design.d :] = 0.0

    size: int  # of theta
    _formed: tuple[ndarray, ndarray] | None = None
    spread: float  # diagonal entry of the Hessian in the scores, where all are 0

    @abstractmethod
    def _form_hess(self, theta: ndarray) -> ndarray:
        """The Hessian itself, anew."""

    def hess(self, theta: Float[ndarray, " p"]) -> Float[ndarray, "p p"]:
        """The Hessian, positive semidefinite; kept for the last point: the metric at zero is the first curvature."""
        if self._formed is None or not np.array_equal(self._formed[0], theta):
            self._formed = theta.copy(), self._form_hess(theta)
        return self._formed[1]

    @abstractmethod
    def fisher(self, theta: Float[ndarray, " p"]) -> Float[ndarray, "p p"]:
        """Outer products of the examples' gradients, sum_i w_i g_i g_i^T, and the ridge."""

    def gauss_newton(self, theta: Float[ndarray, " p"]) -> Float[ndarray, "p p"]:
        """The Hessian itself: the model is linear in its parameters."""
        return self.hess(theta)

    @abstractmethod
    def fisher_operator(self, theta: Float[ndarray, " p"]) -> LinearOperator:
        """Products with the empirical Fisher matrix, one pass over the data each."""

    def metric_at_zero(self, *, dense: bool, flat: float) -> ndarray:
        """The Hessian at theta = 0, or its diagonal, with `flat` times the mean diagonal added against singularity."""
        if dense:
            B = self.hess(np.zeros(self.size)).copy()
            B.reshape(-1)[:: len(B) + 1] += flat * np.trace(B) / len(B)
            return B
        squares = self.design.squares(self.weights)
        diagonal = np.tile(self.spread * squares + self.ridge, self.size // self.design.k)
        return diagonal + flat * diagonal.mean()

    @abstractmethod
    def hess_operator(self, theta: Float[ndarray, " p"]) -> LinearOperator:
        """Products with the Hessian, one pass over the data each."""


class Logistic(Regression):
    """y in {0, 1}, theta = (coefficients, intercept).

    >>> f = Logistic(np.array([[1.0], [-1.0]]), np.array([1, 0]), fit_intercept=False)
    >>> f.fun(np.zeros(1)), f.jac(np.zeros(1))
    (0.693147..., array([-0.5]))
    """

    def __init__(self, X: Any, y: Int[ndarray, " n"], **options: Any) -> None:
        super().__init__(X, y, **options)
        if not np.isin(y, (0, 1)).all():
            raise ValueError("y must hold 0 and 1 only")
        self.size, self.spread = self.design.k, 0.25

    def _form_hess(self, theta: ndarray) -> ndarray:
        p = self._state(theta)[2]
        return self._ridged(self.design.gram(self.weights * p * (1 - p)))

    def fisher(self, theta: Float[ndarray, " p"]) -> Float[ndarray, "p p"]:
        residual = self._state(theta)[2] - self.y
        return self._ridged(self.design.gram(self.weights * residual**2))

    def hess_operator(self, theta: Float[ndarray, " p"]) -> LinearOperator:
        p = self._state(theta)[2]
        return self._operator(self.weights * p * (1 - p))

    def fisher_operator(self, theta: Float[ndarray, " p"]) -> LinearOperator:
        residual = self._state(theta)[2] - self.y
        return self._operator(self.weights * residual**2)

    def _operator(self, d: ndarray) -> LinearOperator:
        product = lambda v: self.design.adjoint(d * self.design.forward(v)) + self.ridge * v
        return LinearOperator((self.size, self.size), matvec=lambda v: product(v.ravel()), dtype=float)

    def _ridged(self, H: ndarray) -> ndarray:
        H.reshape(-1)[:: len(H) + 1] += self.ridge
        return H

    def _evaluate(self, theta: ndarray) -> Any:
        z = self.design.forward(theta)
        # log(1 + e^z) - y z without cancellation: what is lost on the right side of each row
        losses = np.logaddexp(0.0, np.where(self.y, -z, z))
        p = expit(z)
        f = self.weights @ losses + theta @ (self.ridge * theta) / 2
        g = self.design.adjoint(self.weights * (p - self.y)) + self.ridge * theta
        return float(f), g, p


class Softmax(Regression):
    """y in {0, ..., classes - 1}, theta = one row (coefficients, intercept) for each class, flattened.

    Moving all rows alike changes nothing but the ridge: the Hessian is singular. From theta = 0 every iterate keeps the
    rows' sum at 0, so that curvature added along this direction changes no step, only the conditioning.

    Args:
        classes: at least 2.
        anchored: add (1 1^T / classes^2) kron X^T W X to every curvature matrix, W the sample weights.

    >>> f = Softmax(np.eye(3), np.arange(3), classes=3)
    >>> f.fun(np.zeros(12))
    1.098612...
    """

    def __init__(self, X: Any, y: Int[ndarray, " n"], classes: int, *, anchored: bool = False, **options: Any) -> None:
        super().__init__(X, y, **options)
        check_count("classes", classes, at_least=2)
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(f"y must lie in 0 .. {classes - 1}, got {y.min()} .. {y.max()}")
        self.classes, self.size = classes, classes * self.design.k
        self.anchor = 1 / classes**2 if anchored else 0.0
        self.spread = (1 - 1 / classes) / classes + self.anchor
        self._rows = np.arange(self.design.n)

    def _form_hess(self, theta: ndarray) -> ndarray:
        P = self._state(theta)[2]
        return self._blocks(lambda k, l: P[:, k] * ((k == l) - P[:, l]))

    def fisher(self, theta: Float[ndarray, " p"]) -> Float[ndarray, "p p"]:
        R = self._residual(self._state(theta)[2])
        return self._blocks(lambda k, l: R[:, k] * R[:, l])

    def hess_operator(self, theta: Float[ndarray, " p"]) -> LinearOperator:
        P = self._state(theta)[2]

        def middle(U: ndarray) -> ndarray:
            U = P * U
            return U - P * U.sum(axis=1, keepdims=True)

        return self._operator(middle)

    def fisher_operator(self, theta: Float[ndarray, " p"]) -> LinearOperator:
        R = self._residual(self._state(theta)[2])
        return self._operator(lambda U: R * (R * U).sum(axis=1, keepdims=True))

    def _operator(self, middle: Callable[[ndarray], ndarray]) -> LinearOperator:
        """v -> adjoint of the weighted `middle` of the forward image, and the ridge."""

        def product(v: ndarray) -> ndarray:
            V = v.reshape(self.classes, -1)
            U = self.design.forward(V)
            U = middle(U) + self.anchor * U.sum(axis=1, keepdims=True)
            return (self.design.adjoint(self.weights[:, None] * U) + self.ridge * V).ravel()

        return LinearOperator((self.size, self.size), matvec=product, dtype=float)

    def _blocks(self, weight: Any) -> ndarray:
        """The matrix whose block for classes k and l is the Gram matrix weighted by weight(k, l)."""
        K, k = self.classes, self.design.k
        H = np.empty((K, k, K, k))
        for a in range(K):
            for b in range(a, K):
                block = self.design.gram(self.weights * (weight(a, b) + self.anchor))
                H[a, :, b], H[b, :, a] = block, block  # each block is symmetric
        H = H.reshape(self.size, self.size)
        H.reshape(-1)[:: self.size + 1] += np.tile(self.ridge, K)
        return H

    def _residual(self, P: ndarray) -> ndarray:
        R = P.copy()
        R[self._rows, self.y] -= 1
        return R

    def _evaluate(self, theta: ndarray) -> Any:
        Theta = theta.reshape(self.classes, -1)
        Z = self.design.forward(Theta)
        Z -= Z.max(axis=1, keepdims=True)
        E = np.exp(Z)
        totals = E.sum(axis=1)
        P = E / totals[:, None]
        losses = np.log(totals) - Z[self._rows, self.y]
        f = self.weights @ losses + (Theta**2 @ self.ridge).sum() / 2
        g = self.design.adjoint(self.weights[:, None] * self._residual(P)) + self.ridge * Theta
        return float(f), g.ravel(), P
