"""What the method is measured against: first-order methods in the metric, and adaptive Newton methods.

All use the same oracle, counts and result as `GradientNormalizedNewton`. Constants are the customary ones: searches
start at 1 and the smoothness constant is halved (quartered) after each success.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult

from locally.checks import check_count, check_nonnegative, check_positive
from locally.optimize.gradient_normalized.metrics import FactoredMetric, Metric, as_metric
from locally.optimize.gradient_normalized.oracle import Fun, Jac, Oracle, Point, starting_point
from locally.optimize.gradient_normalized.outcome import Callback, Status, Trace, describe_non_finite
from locally.optimize.gradient_normalized.systems import Cholesky, Eigen, ShiftedSystem

SMALLEST = 1e-5  # of a smoothness constant after successes


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """An iteration with one smoothness constant, found by a search.

    Args:
        constant0: first value, > 0.
        max_trials: in one iteration, at least 1.
        tol, f_target, maxiter: as for `GradientNormalizedNewton`.
    """

    constant0: float = 1.0
    max_trials: int = 30
    tol: float = 1e-8
    f_target: float | None = None
    maxiter: int = 1000

    def __post_init__(self) -> None:
        check_positive("constant0", self.constant0)
        check_count("max_trials", self.max_trials)
        check_nonnegative("tol", self.tol)
        check_count("maxiter", self.maxiter, at_least=0)

    def minimize(
        self,
        fun: Fun,
        x0: Any,
        *,
        jac: Jac,
        curvature: Fun | None = None,
        metric: Any = None,
        args: Sequence[Any] = (),
        callback: Callback | None = None,
    ) -> OptimizeResult:
        """Run from x0; arguments and result as for `GradientNormalizedNewton.minimize`."""
        x = starting_point(x0)
        run = _Run(Oracle(fun, jac, curvature, args), as_metric(metric, x.size), Trace("constant"))
        here, constant = run.oracle.at(x, run.metric), self.constant0
        run.trace.add(here, constant, run.oracle)
        if defect := describe_non_finite(here, "at x0"):
            return run.trace.result(here, constant, run.oracle, Status.NOT_FINITE, defect)
        memory = self._memory(here)
        while True:
            if here.norm <= self.tol or (self.f_target is not None and here.f <= self.f_target):
                return run.trace.result(here, constant, run.oracle, Status.CONVERGED)
            if run.trace.iterations >= self.maxiter:
                return run.trace.result(here, constant, run.oracle, Status.ITERATION_LIMIT)
            there, constant = self._advance(run, here, constant, memory)
            if there is None:
                return run.trace.result(here, constant, run.oracle, Status.SEARCH_FAILED)
            here = there
            run.trace.add(here, constant, run.oracle)
            if run.trace.stopped_by(callback, here, constant, run.oracle):
                return run.trace.result(here, constant, run.oracle, Status.STOPPED)

    def _memory(self, first: Point) -> Any:
        """What the iteration carries from step to step."""
        return None

    def _advance(self, run: "_Run", here: Point, constant: float, memory: Any) -> tuple[Point | None, float]:
        """The next point, None after too many trials, and the constant to begin the next search with."""
        raise TypeError("Baseline is abstract: use one of its kinds")


@dataclass(frozen=True)
class _Run:
    oracle: Oracle
    metric: Metric
    trace: Trace


@dataclass(frozen=True, kw_only=True)
class GradientMethod(Baseline):
    """x - B^{-1} g / L, with L from the quadratic upper bound."""

    def _advance(self, run: _Run, here: Point, constant: float, memory: Any) -> tuple[Point | None, float]:
        return gradient_step(run, here, constant, self.max_trials)


@dataclass(frozen=True, kw_only=True)
class FastGradient(Baseline):
    """Nesterov's accelerated method with estimating sequences; f need not fall at each step."""

    def _memory(self, first: Point) -> Any:
        return {"v": first.x, "A": 0.0}

    def _advance(self, run: _Run, here: Point, constant: float, memory: Any) -> tuple[Point | None, float]:
        v, A, L = memory["v"], memory["A"], constant
        for _ in range(self.max_trials):
            a = (1 + math.sqrt(1 + 4 * A * L)) / (2 * L)
            y = run.oracle.at((a * v + A * here.x) / (a + A), run.metric)
            if not np.isfinite(y.norm):
                L *= 2
                continue
            T = y.x - run.metric.solve(y.g) / L
            run.trace.nsolve += 1
            f, gradient = run.oracle(T)
            if f <= y.f - y.norm**2 / (2 * L) + rounding(y.f):
                g = gradient()
                memory["v"], memory["A"] = T + (A / a) * (T - here.x), A + a
                return Point(T, f, g, run.metric.dual_norm(g)), max(L / 2, SMALLEST)
            L *= 2
        return None, L


@dataclass(frozen=True, kw_only=True)
class SuperUniversalNewton(Baseline):
    """lambda = H ||g||_*^alpha, accepted where <g_{k+1}, x_k - x_{k+1}> >= ||g_{k+1}||_*^2 / (4 lambda).

    Source: Doikov, Mishchenko and Nesterov (SIAM J. Optim. 2024).

    Args:
        alpha: degree of the ridge, in [0, 1].
    """

    alpha: float = 1.0
    max_trials: int = 40

    def _advance(self, run: _Run, here: Point, constant: float, memory: Any) -> tuple[Point | None, float]:
        system, H = exact_system(run, here), constant
        for _ in range(self.max_trials):
            shift = H * here.norm**self.alpha
            step = system.step(shift)
            run.trace.nsolve += 1
            if step is not None:
                there = run.oracle.at(here.x + step, run.metric)
                if np.isfinite(there.norm) and -(there.g @ step) >= there.norm**2 / (4 * shift):
                    return there, max(H / 4, SMALLEST)
            H *= 4
        return None, H


@dataclass(frozen=True, kw_only=True)
class CubicNewton(Baseline):
    """Minimises <g, h> + <H h, h> / 2 + M ||h||^3 / 6 over h, with M found by a search.

    Source: Nesterov and Polyak (Math. Program. 2006). One eigendecomposition an iteration, then O(n^2) for each M.
    """

    def _advance(self, run: _Run, here: Point, constant: float, memory: Any) -> tuple[Point | None, float]:
        if not isinstance(run.metric, FactoredMetric):
            raise TypeError("metric must be a vector or a matrix for the cubic model")
        H, M = run.oracle.curvature(here.x), constant
        system = Eigen(H, run.metric, here.g)
        for _ in range(self.max_trials):
            r = cubic_radius(system, M)
            step = system.step(M * r / 2)
            run.trace.nsolve += 1
            if step is not None:
                f, gradient = run.oracle(here.x + step)
                model = here.g @ step + step @ (H @ step) / 2 + M * r**3 / 6
                if f <= here.f + model + rounding(here.f):
                    g = gradient()
                    return Point(here.x + step, f, g, run.metric.dual_norm(g)), max(M / 2, SMALLEST)
            M *= 2
        return None, M


def gradient_step(run: _Run, here: Point, L: float, max_trials: int) -> tuple[Point | None, float]:
    direction = run.metric.solve(here.g)
    for _ in range(max_trials):
        T = here.x - direction / L
        run.trace.nsolve += 1
        f, gradient = run.oracle(T)
        if f <= here.f - here.norm**2 / (2 * L) + rounding(here.f):
            g = gradient()
            return Point(T, f, g, run.metric.dual_norm(g)), max(L / 2, SMALLEST)
        L *= 2
    return None, L


def exact_system(run: _Run, here: Point) -> ShiftedSystem:
    if not isinstance(run.metric, FactoredMetric):
        raise TypeError("metric must be a vector or a matrix for a dense Hessian")
    return Cholesky(run.oracle.curvature(here.x), run.metric, here.g)


def cubic_radius(system: Eigen, M: float) -> float:
    """The root of r = ||(H + M r / 2 B)^{-1} g||, safeguarded Newton on 1 / r; coordinates are orthonormal in B."""
    e, c = system.eigenvalues, system.coordinates
    length = lambda shift: float(np.linalg.norm(c / (e + shift)))
    low = max(0.0, -float(e[0])) * (1 + 1e-12) + 1e-300  # the shift must make the matrix positive definite
    high = max(low, 1.0)
    while 2 * high / M < length(high):
        high *= 4
    s = high
    for _ in range(200):
        r = length(s)
        gap = 2 * s / M - r
        if gap > 0:
            high = s
        else:
            low = s
        if abs(gap) <= 1e-13 * r or high - low <= 1e-15 * high:
            break
        slope = 2 / M + float(np.sum(c**2 / (e + s) ** 3)) / r
        s = s - gap / slope
        if not low < s < high:
            s = (low + high) / 2 if low > 1e-3 * high else math.sqrt(max(low, 1e-16 * high) * high)
    return 2 * s / M


def rounding(f: float) -> float:
    return 4 * np.finfo(float).eps * abs(f)
