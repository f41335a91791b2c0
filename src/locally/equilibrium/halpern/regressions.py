"""Least-squares and logistic regression as cocoercive finite sums: component i is the gradient at observation i."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import expit

from locally.checks import check_choice, check_nonnegative
from locally.equilibrium.halpern.kernels import LOGISTIC, SQUARE, Bundle, Components
from locally.equilibrium.halpern.operators import (
    IMPORTANCE,
    UNIFORM,
    CompiledOperator,
    Constants,
    draw_with_replacement,
    matrix,
    spectral_norm,
    vector,
)


class RowOperator(CompiledOperator):
    """Gradient of (1/n) sum_i loss(a_i . u, t_i) + ridge ||u||^2 / 2."""

    cocoercive = True

    def __init__(self, A: ndarray, targets: ndarray, link: int, curvature: float, ridge: float, sampling: str) -> None:
        check_nonnegative("ridge", ridge)
        check_choice("sampling", sampling, (UNIFORM, IMPORTANCE))
        squares = np.sum(A**2, axis=1)
        if not squares.any():
            raise ValueError("the data matrix must not be zero")
        self.n, self.dim = A.shape
        self.A, self.targets, self.ridge, self.dtype, self.sampling = A, targets, float(ridge), A.dtype, sampling
        scale = np.ones_like(squares)
        if sampling == IMPORTANCE:  # 1 / (n p_i) for p_i = squares_i / sum(squares)
            scale = np.divide(squares.mean(), squares, out=np.zeros_like(squares), where=squares > 0)
        self._curvature, self._squares = curvature, squares
        empty = Bundle(A[:0], scale[:0], 0, link, 0, targets[:0])
        self._components = Components(Bundle(A, scale, 0, link, 0, targets), empty, self.ridge)

    @abstractmethod
    def _slopes(self, A: ndarray, u: ndarray, targets: ndarray) -> ndarray:
        """Derivative of each row's loss with respect to a_i . u."""

    def full(self, u: Float[ndarray, " dim"]) -> Float[ndarray, " dim"]:
        return self._slopes(self.A, u, self.targets) @ self.A / self.n + self.ridge * u

    def batch(self, u: Float[ndarray, " dim"], idx: Int[ndarray, " b"]) -> Float[ndarray, " dim"]:
        self._in_range(idx)
        rows, scale = self.A[idx], self._components.left.scale[idx]
        return (scale * self._slopes(rows, u, self.targets[idx])) @ rows / len(idx) + self.ridge * u

    def draw(self, rng: np.random.Generator, steps: int, b: int) -> Int[ndarray, "steps b ..."]:
        if self.sampling == UNIFORM:
            return super().draw(rng, steps, b)
        return draw_with_replacement(rng, self._squares, steps, b)

    def constants(self) -> Constants:
        return self._constants

    @cached_property
    def _constants(self) -> Constants:
        # a weighted component is the gradient of a convex function of smoothness curvature * scale_i * ||a_i||^2
        smoothness = float(self._curvature * np.max(self._components.left.scale * self._squares) + self.ridge)
        lipschitz = self._curvature * spectral_norm(self.A) ** 2 / self.n + self.ridge
        return Constants(lipschitz, float(np.sqrt(smoothness * lipschitz)), smoothness)


class LeastSquares(RowOperator):
    """F_i(u) = a_i (a_i . u - b_i) + ridge u, the gradients of a least-squares or ridge regression.

    Args:
        A: (n, dim), one row per observation, not all zero.  b: (n,).
        ridge: >= 0.
        sampling: "uniform" (L = max_i ||a_i||^2 + ridge) or "importance" (L = mean_i ||a_i||^2 + ridge).

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, negative ridge.
    """

    def __init__(self, A: Any, b: Any, *, ridge: float = 0.0, sampling: str = UNIFORM) -> None:
        A = matrix("A", A)
        super().__init__(A, vector("b", b, len(A), A.dtype), SQUARE, 1.0, ridge, sampling)

    def _slopes(self, A: ndarray, u: ndarray, targets: ndarray) -> ndarray:
        return A @ u - targets


class Logistic(RowOperator):
    """F_i(u) = -y_i x_i / (1 + exp(y_i x_i . u)) + ridge u, the gradients of a logistic regression.

    Args:
        X: (n, dim), with a column of ones where an intercept is wanted.
        y: (n,), classes as -1 and 1 or as 0 and 1.
        ridge: >= 0.
        sampling: "uniform" (L = max_i ||x_i||^2 / 4 + ridge) or "importance" (the mean instead of the maximum).

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, other classes, negative ridge.
    """

    def __init__(self, X: Any, y: Any, *, ridge: float = 0.0, sampling: str = UNIFORM) -> None:
        X = matrix("X", X)
        y = vector("y", y, len(X), X.dtype)
        classes = set(np.unique(y))
        if not (classes <= {-1.0, 1.0} or classes <= {0.0, 1.0}):
            raise ValueError(f"y must hold the classes -1 and 1, or 0 and 1, got {sorted(classes)[:5]}")
        super().__init__(X, np.where(y > 0, 1, -1).astype(X.dtype), LOGISTIC, 0.25, ridge, sampling)

    def _slopes(self, A: ndarray, u: ndarray, targets: ndarray) -> ndarray:
        return -targets * expit(-targets * (A @ u))
