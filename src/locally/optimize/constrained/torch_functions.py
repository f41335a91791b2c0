"""A problem from torch functions, differentiated by autograd."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import LinearConstraint, NonlinearConstraint
from scipy.sparse.linalg import LinearOperator

from locally.optimize.constrained.problem import EqualityProblem, Matrix
from locally.optimize.constrained.scipy_arguments import equal_bounds, equality_function, listed


def torch_problem(
    fun: Callable[[torch.Tensor], torch.Tensor],
    x0: Float[ndarray, " n"] | torch.Tensor,
    constraints: Any = (),
    *,
    products: bool = False,
) -> EqualityProblem:
    """Differentiate torch functions of one float64 tensor on the device of x0.

    Args:
        fun: x -> scalar.
        constraints: one or a sequence of functions x -> scalar or vector that must vanish, or SciPy's constraints with
            torch functions; their derivatives are not asked for.
        products: return the Hessian as an operator, one backward pass a product, instead of a full matrix.

    Raises:
        ValueError: a constraint is an inequality.

    >>> problem = torch_problem(lambda x: x.square().sum(), np.ones(2), lambda x: x.prod() - 1)
    >>> problem.hess(np.ones(2), np.array([3.0]))
    array([[2., 3.],
           [3., 2.]])
    """
    device = x0.device if isinstance(x0, torch.Tensor) else torch.device("cpu")
    start = torch.as_tensor(x0, dtype=torch.float64, device=device)
    n = start.numel()
    parts = [vanishing(c, f"constraints[{i}]", start) for i, c in enumerate(listed(constraints))]

    def tensor(x: ndarray, *, tracked: bool = False) -> torch.Tensor:
        return torch.as_tensor(x, dtype=torch.float64, device=device).requires_grad_(tracked)

    def constr(x: torch.Tensor) -> torch.Tensor:
        values = [part(x).reshape(-1) for part in parts]
        return torch.cat(values) if values else x.new_zeros(0)

    def lagrangian_gradient(x: torch.Tensor, lam: ndarray) -> torch.Tensor:
        return gradient(fun(x) + (constr(x) * tensor(lam)).sum(), x, create_graph=True)

    def hess(x: ndarray, lam: ndarray) -> Matrix:
        at = tensor(x, tracked=True)
        g = lagrangian_gradient(at, lam)
        if products:
            along = lambda v: gradient(g, at, tensor(np.ravel(v)), retain_graph=True).numpy(force=True)
            return LinearOperator((n, n), matvec=along, rmatvec=along, dtype=float)
        return jacobian(g, at).numpy(force=True)

    def jac(x: ndarray) -> ndarray:
        at = tensor(x, tracked=True)
        return jacobian(constr(at), at).numpy(force=True)

    def grad(x: ndarray) -> ndarray:
        at = tensor(x, tracked=True)
        return gradient(fun(at), at).numpy(force=True)

    with torch.no_grad():
        m = constr(start).numel()
    return EqualityProblem(
        n=n,
        m=m,
        fun=torch.no_grad()(lambda x: fun(tensor(x)).item()),
        grad=grad,
        constr=torch.no_grad()(lambda x: constr(tensor(x)).numpy(force=True)),
        jac=jac,
        hess=hess,
    )


def vanishing(constraint: Any, name: str, x0: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> c(x) - value."""
    if isinstance(constraint, LinearConstraint):
        dense = constraint.A.toarray() if sp.issparse(constraint.A) else np.atleast_2d(constraint.A)
        A, b = x0.new_tensor(dense), x0.new_tensor(equal_bounds(constraint, name, len(dense)))
        return lambda x: A @ x - b
    if isinstance(constraint, NonlinearConstraint):
        with torch.no_grad():
            size = constraint.fun(x0).numel()
        value = x0.new_tensor(equal_bounds(constraint, name, size))
        return lambda x: constraint.fun(x).reshape(-1) - value
    if isinstance(constraint, dict):
        return equality_function(constraint, name)
    if not callable(constraint):
        raise TypeError(f"{name} must be a function or one of SciPy's constraints, got {type(constraint).__name__}")
    return constraint


def gradient(
    y: torch.Tensor,
    x: torch.Tensor,
    direction: torch.Tensor | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> torch.Tensor:
    """d(y . direction)/dx, zero where y does not depend on x."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    keep = create_graph or retain_graph
    (g,) = torch.autograd.grad(y, x, direction, create_graph=create_graph, retain_graph=keep, allow_unused=True)
    return torch.zeros_like(x) if g is None else g


def jacobian(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dy/dx row by row; one backward pass each costs less than vectorising them while there are few."""
    rows = [gradient(entry, x, retain_graph=True) for entry in y]
    return torch.stack(rows).detach() if rows else x.new_zeros(0, x.numel()).detach()
