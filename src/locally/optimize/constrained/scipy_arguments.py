"""A problem from the arguments of `scipy.optimize.minimize`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import LinearConstraint, NonlinearConstraint
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_choice
from locally.optimize.constrained.problem import EqualityProblem, Matrix, add, stack


def scipy_problem(
    fun: Callable[..., float],
    x0: Float[ndarray, " n"],
    *,
    args: tuple[Any, ...] = (),
    jac: Callable[..., ndarray] | None = None,
    hess: Callable[..., Matrix] | None = None,
    hessp: Callable[..., ndarray] | None = None,
    constraints: Any = (),
) -> EqualityProblem:
    """Take the arguments of `scipy.optimize.minimize`.

    A Hessian that is not given, of f or of a constraint, is made of central differences of the gradient: 2 n
    gradients each. Gradients and Jacobians have to be given.

    Raises:
        ValueError: a derivative is missing, or a constraint is an inequality.
    """
    if not callable(jac):
        raise ValueError(
            f'jac must be a function that returns the gradient of fun, or derivatives="torch", got {jac!r}'
        )
    parts = [Constraint.of(c, f"constraints[{i}]", x0) for i, c in enumerate(listed(constraints))]
    gradient = jac  # mypy does not carry the test above into the closure
    hessians = _objective_hessian(gradient, hess, hessp, args, x0.size)

    def lagrangian_hessian(x: ndarray, lam: ndarray) -> Matrix:
        total, start = hessians(x), 0
        for part in parts:
            total = add(total, part.hess(x, lam[start : start + part.size]))
            start += part.size
        return total

    return EqualityProblem(
        n=x0.size,
        m=sum(p.size for p in parts),
        fun=lambda x: fun(x, *args),
        grad=lambda x: gradient(x, *args),
        constr=lambda x: np.concatenate([p.fun(x) for p in parts]) if parts else np.zeros(0),
        jac=lambda x: stack([p.jac(x) for p in parts], x0.size),
        hess=lagrangian_hessian,
    )


@dataclass(frozen=True, eq=False)
class Constraint:
    """One of SciPy's three ways to write a constraint, as c(x) = 0."""

    size: int
    fun: Callable[[ndarray], ndarray]
    jac: Callable[[ndarray], Matrix]
    hess: Callable[[ndarray, ndarray], Matrix]

    @classmethod
    def of(cls, constraint: Any, name: str, x0: Float[ndarray, " n"]) -> "Constraint":
        if isinstance(constraint, LinearConstraint):
            return cls._linear(constraint, name, x0.size)
        if isinstance(constraint, NonlinearConstraint):
            fun, jac, hess = constraint.fun, constraint.jac, constraint.hess
            size = np.atleast_1d(fun(x0)).size
            value = equal_bounds(constraint, name, size)
        elif isinstance(constraint, dict):
            fun, extra = equality_function(constraint, name), tuple(constraint.get("args", ()))
            given = constraint.get("jac")
            jac = (lambda x: given(x, *extra)) if callable(given) else None
            hess = constraint.get("hess")
            size = np.atleast_1d(fun(x0)).size
            value = np.zeros(size)
        else:
            raise TypeError(
                f"{name} must be a NonlinearConstraint, a LinearConstraint or a dictionary, "
                f"got {type(constraint).__name__}"
            )
        if not callable(jac):
            raise ValueError(f"{name} needs jac, a function that returns the (m, n) Jacobian, got {jac!r}")
        as_rows = lambda x: _as_rows(jac(x))
        if not callable(hess):
            hess = lambda x, v: central_differences(lambda y: as_rows(y).T @ v, x)
        return cls(size, lambda x: np.atleast_1d(fun(x)) - value, as_rows, hess)

    @classmethod
    def _linear(cls, constraint: LinearConstraint, name: str, n: int) -> "Constraint":
        A = _as_rows(constraint.A)
        value = equal_bounds(constraint, name, A.shape[0])
        zero = sp.csr_array((n, n))
        return cls(A.shape[0], lambda x: A @ x - value, lambda x: A, lambda x, v: zero)


def listed(constraints: Any) -> list[Any]:
    """One constraint or a sequence of them, as SciPy allows."""
    single = isinstance(constraints, dict | LinearConstraint | NonlinearConstraint) or callable(constraints)
    return [constraints] if single else list(constraints)


def equality_function(constraint: dict[str, Any], name: str) -> Callable[[Any], Any]:
    """x -> c(x) of a constraint in dictionary form."""
    check_choice(f"{name}['type']", constraint.get("type"), ("eq", "ineq"))
    if constraint["type"] != "eq":
        raise ValueError(f"{name} must be an equality (type 'eq'), got an inequality: this solver has none")
    extra = tuple(constraint.get("args", ()))
    return lambda x: constraint["fun"](x, *extra)


def equal_bounds(constraint: Any, name: str, size: int) -> Float[ndarray, " size"]:
    low, high = (np.broadcast_to(np.asarray(b, dtype=float), (size,)) for b in (constraint.lb, constraint.ub))
    if not np.array_equal(low, high) or not np.isfinite(low).all():
        raise ValueError(f"{name} must be an equality, lb == ub and finite, got an inequality: this solver has none")
    return low


def _objective_hessian(
    jac: Callable[..., ndarray],
    hess: Callable[..., Matrix] | None,
    hessp: Callable[..., ndarray] | None,
    args: tuple[Any, ...],
    n: int,
) -> Callable[[ndarray], Matrix]:
    if callable(hess):
        return lambda x: hess(x, *args)
    if callable(hessp):

        def operator(x: ndarray) -> LinearOperator:
            along = lambda v: hessp(x, np.ravel(v), *args)
            return LinearOperator((n, n), matvec=along, rmatvec=along, dtype=float)

        return operator
    return lambda x: central_differences(lambda y: np.asarray(jac(y, *args)), x)


def central_differences(grad: Callable[[ndarray], ndarray], x: Float[ndarray, " n"]) -> Float[ndarray, "n n"]:
    """Symmetric part of the Jacobian of `grad`, with steps of eps^(1/3) relative to x."""
    steps = np.cbrt(np.finfo(float).eps) * np.maximum(1.0, np.abs(x))
    rows = []
    for i, h in enumerate(steps):
        e = np.zeros_like(x)
        e[i] = h
        rows.append((grad(x + e) - grad(x - e)) / (2 * h))
    H = np.array(rows)
    return (H + H.T) / 2


def _as_rows(J: Any) -> Matrix:
    return J if sp.issparse(J) or isinstance(J, LinearOperator) else np.atleast_2d(np.asarray(J, dtype=float))
