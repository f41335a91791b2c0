"""Newton's method with a ridge proportional to the norm of the gradient, for exact or approximate curvature.

x_{k+1} = x_k - (H_k + lambda_k B)^{-1} g_k with lambda_k = ||g_k||_* / gamma_k, where gamma_k, the radius on which H_k
predicts the change of the gradient, is found by doubling and halving. Source: arXiv 2506.13710.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_between, check_choice, check_count, check_nonnegative, check_positive
from locally.optimize.gradient_normalized.metrics import as_metric
from locally.optimize.gradient_normalized.oracle import Fun, Jac, Oracle, Point, starting_point
from locally.optimize.gradient_normalized.outcome import Callback, Status, Trace, describe_non_finite
from locally.optimize.gradient_normalized.search import ridge, search
from locally.optimize.gradient_normalized.systems import (
    SOLVERS,
    NonFiniteCurvature,
    check_curvature,
    finite_curvature,
    shifted_system,
)

INDEFINITE = ("reject", "project")
BOTTOMLESS = 1e20  # a fall beyond this many times |f_0| + gamma_0 ||g_0||_* has no minimum in sight


@dataclass(frozen=True, kw_only=True)
class GradientNormalizedNewton:
    """Minimise a smooth function with whatever positive semidefinite curvature is at hand; no constants to know.

    Every accepted step satisfies f_k - f_{k+1} >= ||g_{k+1}||_*^2 / (8 lambda_k), so f falls monotonically. Finds a
    stationary point of any smooth function bounded from below, a minimiser of a convex one. An iteration builds the
    curvature once and costs one solve and one value and gradient for each trial; over k iterations there are at most
    2 k + log2(gamma0 / smallest gamma) trials.

    Args:
        gamma0: first gamma, > 0, a length in the metric.
        gamma_min, gamma_max: gamma is kept between these after each success, 0 < gamma_min <= gamma_max.
        rule: a fixed rule ||g||_* -> gamma in place of the search, such as a `SmoothnessBound`; still halved where it
            promises too much.
        max_trials: halvings in one iteration, at least 1.
        tol: stop when ||g||_* <= tol, >= 0.
        f_target: stop when fun is at most this, for a known minimum.
        maxiter: at least 0.
        solver: "cholesky" factorises for each trial; "eigh" once an iteration; "woodbury" for low rank; "krylov" takes
            products only. "auto" goes by the kind of curvature: a matrix gets Cholesky, and the eigendecomposition once
            trials become many.
        indefinite: what to do where H + lambda B is not positive definite. "reject" counts it as a failed trial and
            raises lambda; "project" sets negative eigenvalues of a matrix to zero. The theory asks for H >= 0.
        krylov_rtol: residual of the step relative to ||g||_*, in (0, 1).
        precision: relative accuracy of fun, > 0; differences below it are not believed.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    gamma0: float = 1.0
    gamma_min: float = 1e-9
    gamma_max: float = 1e50
    rule: Callable[[float], float] | None = None
    max_trials: int = 40
    tol: float = 1e-8
    f_target: float | None = None
    maxiter: int = 1000
    solver: str = "auto"
    indefinite: str = "reject"
    krylov_rtol: float = 1e-10
    precision: float = 10 * np.finfo(float).eps

    def __post_init__(self) -> None:
        check_positive("gamma0", self.gamma0)
        check_positive("gamma_max", self.gamma_max)
        check_positive("gamma_min", self.gamma_min)
        if self.gamma_min > self.gamma_max:
            raise ValueError(f"gamma_min must be at most gamma_max, got {self.gamma_min} and {self.gamma_max}")
        if self.rule is not None and not callable(self.rule):
            raise TypeError(f"rule must be callable, got {type(self.rule).__name__}")
        check_count("max_trials", self.max_trials)
        check_nonnegative("tol", self.tol)
        if self.f_target is not None:
            check_between("f_target", self.f_target, -math.inf, math.inf)
        check_count("maxiter", self.maxiter, at_least=0)
        check_choice("solver", self.solver, SOLVERS)
        check_choice("indefinite", self.indefinite, INDEFINITE)
        check_positive("krylov_rtol", self.krylov_rtol, below=1.0)
        check_positive("precision", self.precision, below=1.0)

    def minimize(
        self,
        fun: Fun,
        x0: Any,
        *,
        jac: Jac,
        curvature: Fun | float,
        metric: Any = None,
        args: Sequence[Any] = (),
        callback: Callback | None = None,
    ) -> OptimizeResult:
        """Run from x0.

        Args:
            fun: x -> value, or with jac=True x -> (value, gradient).
            x0: finite vector (n,); left as it is.
            jac: x -> gradient (n,), or True.
            curvature: x -> H, positive semidefinite: a symmetric matrix, a `LowRank`, a SciPy `LinearOperator` or
                sparse array, or a number c for c B. A number in place of the function is constant; 0 is the gradient
                method.
            metric: B. None is the identity, a vector a diagonal, a matrix itself; a pair of `LinearOperator`s is B and
                its inverse.
            args: further arguments of fun, jac and curvature.
            callback: sees an `OptimizeResult` after each iteration; StopIteration ends the run.

        Returns:
            `OptimizeResult` with x, fun, jac, dual_norm, gamma (start a later run from x with gamma0=gamma to go on
            as if nothing had happened), status, success, message, counts nit, nfev, njev, nhev, nsolve, and history: a
            dict of fun, dual_norm, gamma, nfev, njev, nhev and nsolve at every iterate. Whatever the status, x is the
            last point at which fun and jac were finite (x0 where there was none).

        Raises:
            TypeError, ValueError: an argument, or what a callable returns, has the wrong type or shape.
        """
        x = starting_point(x0)
        B = as_metric(metric, x.size)
        oracle, trace = Oracle(fun, jac, curvature, args), Trace()
        here = first = oracle.at(x, B)
        gamma = self.gamma0
        trace.add(here, gamma, oracle)
        if defect := describe_non_finite(here, "at x0"):
            return trace.result(here, gamma, oracle, Status.NOT_FINITE, defect)
        if curvature is None:
            raise TypeError("curvature must be callable or a number, got None")

        while (status := self._finished(here, first, trace)) is None:
            H = oracle.curvature(here.x)
            if not finite_curvature(H):
                message = "curvature holds NaN or infinity at x"
                return trace.result(here, gamma, oracle, Status.NOT_FINITE, message)
            if oracle.nhev == 1:
                check_curvature(H)
            try:
                system = shifted_system(
                    H,
                    B,
                    here.g,
                    solver=self.solver,
                    project=self.indefinite == "project",
                    rtol=self.krylov_rtol,
                )
                step = search(
                    here,
                    gamma if self.rule is None else self.rule(here.norm),
                    system,
                    oracle,
                    B,
                    max_trials=self.max_trials,
                    precision=self.precision,
                    ridge=self.ridge,
                )
            except NonFiniteCurvature as error:
                return trace.result(here, gamma, oracle, Status.NOT_FINITE, f"{error} at x")
            trace.nsolve += step.trials
            if step.point is None:
                return trace.result(here, step.gamma, oracle, *verdict(step))
            here = step.point
            gamma = min(max(2 * step.gamma, self.gamma_min), self.gamma_max)
            trace.add(here, gamma, oracle)
            if trace.stopped_by(callback, here, gamma, oracle):
                status = Status.STOPPED
                break
        return trace.result(here, gamma, oracle, status)

    def ridge(self, norm: float, gamma: float) -> float:
        """lambda from ||g||_* and gamma."""
        return ridge(norm, gamma)

    def _finished(self, here: Point, first: Point, trace: Trace) -> Status | None:
        if here.norm <= self.tol or (self.f_target is not None and here.f <= self.f_target):
            return Status.CONVERGED
        if here.f < first.f - BOTTOMLESS * (abs(first.f) + self.gamma0 * first.norm):
            return Status.UNBOUNDED
        return Status.ITERATION_LIMIT if trace.iterations >= self.maxiter else None


def verdict(step: Any) -> tuple[Status, str]:
    """What a search without success means for the run."""
    if step.unbounded:
        return Status.UNBOUNDED, "fun is minus infinity at the next point; x is the last one where it was finite"
    if step.non_finite:
        return Status.NOT_FINITE, f"no trial step led to finite values: {step.reasons}"
    return Status.SEARCH_FAILED, f"no trial step made progress: {step.reasons}"


def gns_minimize(
    fun: Fun,
    x0: Any,
    *,
    jac: Jac,
    curvature: Fun | float,
    metric: Any = None,
    args: Sequence[Any] = (),
    callback: Callback | None = None,
    **options: Any,
) -> OptimizeResult:
    """`GradientNormalizedNewton(**options).minimize(...)` in one call; see there.

    >>> from scipy.optimize import rosen, rosen_der, rosen_hess
    >>> found = gns_minimize(rosen, [-1.2, 1.0], jac=rosen_der, curvature=rosen_hess, tol=1e-10)
    >>> found.x.round(6)
    array([1., 1.])
    >>> found.status.name
    'CONVERGED'
    """
    return GradientNormalizedNewton(**options).minimize(
        fun, x0, jac=jac, curvature=curvature, metric=metric, args=args, callback=callback
    )


def gns_method(
    fun: Fun,
    x0: Any,
    args: Sequence[Any] = (),
    *,
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    callback: Any = None,
    **options: Any,
) -> OptimizeResult:
    """The method for `scipy.optimize.minimize(..., method=gns_method)`; `hess` may be any curvature.

    Raises:
        ValueError: bounds or constraints, which the method does not know, or no jac, or neither hess nor hessp.

    >>> from scipy.optimize import minimize, rosen, rosen_der, rosen_hess
    >>> minimize(rosen, [-1.2, 1.0], method=gns_method, jac=rosen_der, hess=rosen_hess).success
    True
    """
    if bounds is not None or (not isinstance(constraints, tuple | list) or len(constraints)):
        raise ValueError("bounds and constraints are not supported: the problem must be unconstrained")
    if not callable(jac):
        raise ValueError("jac is required: a function, or True where fun returns (value, gradient)")
    if not callable(hess) and not callable(hessp):
        raise ValueError("hess or hessp is required, exact or a positive semidefinite approximation")
    if not callable(hess):
        hess = products(hessp)
    return gns_minimize(fun, x0, jac=jac, curvature=hess, args=args, callback=callback, **options)


def products(hessp: Callable[..., Any]) -> Callable[..., LinearOperator]:
    """SciPy's hessp(x, p, *args) as a curvature."""

    def curvature(x: Any, *args: Any) -> LinearOperator:
        return LinearOperator((x.size, x.size), matvec=lambda p: hessp(x, p, *args), dtype=float)

    return curvature
