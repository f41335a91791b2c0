"""The front that speaks `scipy.optimize.minimize`'s language."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import OptimizeResult

from locally.checks import check_choice, check_finite
from locally.optimize.constrained.adasketch import AdaSketchNewton, Progress
from locally.optimize.constrained.outcome import Solution
from locally.optimize.constrained.problem import Matrix
from locally.optimize.constrained.scipy_arguments import scipy_problem
from locally.optimize.constrained.torch_functions import torch_problem


def minimize_adasketch(
    fun: Callable[..., Any],
    x0: Float[ndarray, " n"],
    args: tuple[Any, ...] = (),
    *,
    jac: Callable[..., ndarray] | None = None,
    hess: Callable[..., Matrix] | None = None,
    hessp: Callable[..., ndarray] | None = None,
    constraints: Any = (),
    bounds: None = None,
    callback: Callable[..., object] | None = None,
    lam0: Float[ndarray, " m"] | None = None,
    derivatives: str = "given",
    tol: float = 1e-4,
    maxiter: int = 1000,
    disp: bool = False,
    **options: Any,
) -> OptimizeResult:
    """Minimise fun(x, *args) subject to equality constraints; SciPy's arguments, SciPy's result.

    Also `scipy.optimize.minimize(fun, x0, method=minimize_adasketch, constraints=..., options={...})`.

    Args:
        fun: objective.
        x0: start, (n,).
        args: further arguments of fun, jac, hess and hessp.
        jac: gradient of fun.
        hess: Hessian of fun, an array, a SciPy sparse matrix or a LinearOperator; or hessp(x, v), its product with v.
            Central differences of the gradient without either.
        constraints: one or a list of `LinearConstraint`, `NonlinearConstraint` (both with lb == ub), or dictionaries of
            type 'eq', with a `jac` that returns an array, a sparse matrix or an operator, and perhaps a `hess(x, v)`.
        callback: called after every outer iteration as SciPy would, callback(xk) or
            callback(intermediate_result=OptimizeResult); StopIteration ends the solve.
        lam0: first multipliers, 0 unless given.
        derivatives: 'given'; 'torch' when fun and the constraints take and return float64 tensors, which are then
            differentiated (plain functions c(x) are constraints too); 'torch-products' likewise with products of the
            Hessian instead of the full matrix, for Gaussian and sparse sketches.
        tol: stop when ||(grad_x L; c)||_2 <= tol.
        maxiter: most outer iterations.
        disp: print the final message.
        options: hyper-parameters of `AdaSketchNewton`: sketch, block_size, theta, accuracy, fallback, random_state, ...

    Returns:
        x, fun, success, status (0: converged), message, nit, nfev, njev, nhev and, beyond SciPy's: lam, constr, kkt,
        constr_violation, kkt_history, alpha_history, eta1, eta2, delta, n_sketch, n_fallback, n_inexact, `solution`,
        the `Solution` with everything else.

    Raises:
        ValueError: bounds or inequalities, a derivative that is missing, shapes that do not fit, NaN in x0, a
            hyper-parameter out of range.
        TypeError: an unknown hyper-parameter.

    >>> import torch
    >>> found = minimize_adasketch(
    ...     lambda x: (x[0] - 2) ** 2 + x[1] ** 2, np.array([1.0, 1.0]),
    ...     constraints=lambda x: x.square().sum() - 1, derivatives="torch",
    ... )
    >>> found.success, (found.x.round(3) + 0).tolist(), found.lam.round(3)
    (True, [1.0, 0.0], array([1.]))
    """
    if bounds is not None:
        raise ValueError("bounds must be None: this solver knows equality constraints only")
    check_choice("derivatives", derivatives, ("given", "torch", "torch-products"))
    x0 = np.asarray(x0)
    if x0.ndim != 1 or x0.dtype.kind not in "fiu" or x0.size == 0:
        raise ValueError(f"x0 must be a vector of real numbers, got shape {x0.shape} and dtype {x0.dtype}")
    x0 = x0.astype(float)
    check_finite("x0", x0)
    solver = AdaSketchNewton(tol=tol, max_iter=maxiter, **options)
    args = args if isinstance(args, tuple) else (args,)
    if derivatives == "given":
        problem = scipy_problem(fun, x0, args=args, jac=jac, hess=hess, hessp=hessp, constraints=constraints)
    else:
        products = derivatives == "torch-products"
        problem = torch_problem(lambda x: fun(x, *args), x0, constraints, products=products)
    solution = solver.solve(problem, x0, lam0, callback=None if callback is None else _as_scipy_calls(callback))
    if disp:
        print(f"{solution.message} ({solution.nit} iterations, KKT residual {solution.kkt:.3g})")
    return _result(solution)


def _result(s: Solution) -> OptimizeResult:
    last = lambda history: history[-1] if history else np.nan
    return OptimizeResult(
        x=s.x,
        fun=s.fun,
        success=s.success,
        status=s.status.code,
        message=s.message,
        nit=s.nit,
        nfev=s.nfev,
        njev=s.njev,
        nhev=s.nhev,
        lam=s.lam,
        constr=s.constr,
        constr_violation=float(np.abs(s.constr).max(initial=0.0)),
        kkt=s.kkt,
        kkt_history=s.kkt_history,
        alpha_history=s.alpha_history,
        eta1=last(s.eta1_history),
        eta2=last(s.eta2_history),
        delta=last(s.delta_history),
        n_sketch=s.sketches,
        n_fallback=s.fallbacks,
        n_inexact=s.inexact,
        solution=s,
    )


def _as_scipy_calls(callback: Callable[..., object]) -> Callable[[Progress], object]:
    """SciPy tells its two kinds of callback apart by the name of the only parameter."""
    if set(inspect.signature(callback).parameters) == {"intermediate_result"}:
        return lambda now: callback(
            intermediate_result=OptimizeResult(
                x=now.point.x.copy(), fun=now.point.f, lam=now.point.lam.copy(), kkt=now.point.kkt, nit=now.nit
            )
        )
    return lambda now: callback(now.point.x.copy())
