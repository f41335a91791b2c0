"""The user's callables, counted and checked: value, gradient and curvature at a point."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_finite, check_shape
from locally.optimize.gradient_normalized.metrics import Metric

Fun = Callable[..., Any]
Jac = Callable[..., Any] | bool


@dataclass(frozen=True)
class Point:
    """An iterate with its value, gradient and the gradient's dual norm; NumPy arrays or torch tensors."""

    x: Any
    f: float
    g: Any
    norm: float


class Oracle:
    """fun, jac and curvature of a NumPy vector. With jac=True, fun returns (value, gradient)."""

    def __init__(self, fun: Fun, jac: Jac, curvature: Fun | float | None, args: Sequence[Any] = ()) -> None:
        if not callable(fun):
            raise TypeError(f"fun must be callable, got {type(fun).__name__}")
        if jac is not True and not callable(jac):
            raise TypeError(f"jac must be callable, or True where fun returns (value, gradient), got {jac!r}")
        if curvature is not None and not callable(curvature) and not isinstance(curvature, int | float):
            raise TypeError(f"curvature must be callable or a number, got {type(curvature).__name__}")
        self._fun, self._jac, self._curvature, self._args = fun, jac, curvature, tuple(args)
        self.nfev = self.njev = self.nhev = 0

    def __call__(self, x: ndarray) -> tuple[float, Callable[[], ndarray]]:
        """The value at x, and a function that gives the gradient there, evaluated only when asked for."""
        self.nfev += 1
        if self._jac is True:
            pair = self._fun(x.copy(), *self._args)
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"fun must return (value, gradient) with jac=True, got {type(pair).__name__}")
            self.njev += 1
            return as_number(pair[0]), lambda: as_gradient(pair[1], x.size)
        value = as_number(self._fun(x.copy(), *self._args))

        def gradient() -> ndarray:
            self.njev += 1
            return as_gradient(self._jac(x.copy(), *self._args), x.size)  # type: ignore[operator]

        return value, gradient

    def at(self, x: ndarray, metric: Metric) -> Point:
        """Value and gradient together; the norm is infinite where either is not finite."""
        f, gradient = self(x)
        g = gradient()
        finite = np.isfinite(f) and np.isfinite(g).all()
        return Point(x, f, g, metric.dual_norm(g) if finite else np.inf)

    def curvature(self, x: ndarray) -> Any:
        self.nhev += 1
        return self._curvature(x.copy(), *self._args) if callable(self._curvature) else self._curvature


def as_number(value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "fiub":
        raise TypeError(f"fun must return one real number, got {array.dtype} of shape {array.shape}")
    return float(array.reshape(()))


def as_gradient(value: Any, n: int) -> Float[ndarray, " n"]:
    g = np.array(value, dtype=float)  # a copy: the caller may use its buffer again
    if g.shape != (n,):
        raise ValueError(f"jac must return shape ({n},), got {g.shape}")
    return g


def starting_point(x0: Any) -> Float[ndarray, " n"]:
    """A copy of x0 in double precision.

    Raises:
        TypeError, ValueError: not a non-empty vector of finite real numbers.
    """
    x = np.asarray(x0)
    if x.dtype.kind not in "fiub":
        raise TypeError(f"x0 must hold real numbers, got {x.dtype}")
    check_shape("x0", x, (None,))
    if not x.size:
        raise ValueError("x0 is empty")
    check_finite("x0", x)
    return x.astype(float)
