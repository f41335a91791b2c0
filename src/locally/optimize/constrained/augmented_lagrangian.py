"""The classical augmented Lagrangian method with inexact modified Newton steps, to measure others by.

Source: Bertsekas, Constrained Optimization and Lagrange Multiplier Methods (1982); constants as in arXiv 2305.18379.
"""

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import gmres

from locally.checks import check_count, check_positive
from locally.optimize.constrained.kkt import add_identity, smallest_eigenvalue
from locally.optimize.constrained.outcome import Solution, Status
from locally.optimize.constrained.problem import EqualityProblem, Evaluator, NotFiniteError, Point, add

STEP_LIMIT = 2.0**-40
RUNAWAY = 1e12  # fall of f that no bounded problem shows


@dataclass(frozen=True, kw_only=True)
class AugmentedLagrangian:
    """Minimise f + lam . c + mu/2 ||c||^2 over x, then lam <- lam + mu c, mu <- growth mu, and a tighter tolerance.

    The inner minimisation takes Newton steps by GMRES to a relative residual of 1e-4, on the Hessian moved to a
    smallest eigenvalue of 1 where it is not positive definite, with an Armijo search.

    Args:
        tol: stop when ||(grad_x L; c)||_2 <= tol.
        max_iter: multiplier updates.
        max_inner: Newton steps in all.
        mu, growth: first penalty, at least 1, and its factor.
        tau, shrink: first tolerance of the inner minimisation, and its factor.
        beta: slope fraction of the line search, in (0, 0.5).
        eps_b: smallest eigenvalue that counts as positive definite.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.
    """

    tol: float = 1e-4
    max_iter: int = 100
    max_inner: int = 10_000
    mu: float = 1.0
    growth: float = 1.5
    tau: float = 0.1
    shrink: float = 0.1
    beta: float = 0.1
    eps_b: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("tol", "mu", "tau", "eps_b"):
            check_positive(name, getattr(self, name))
        check_positive("beta", self.beta, below=0.5)
        check_positive("shrink", self.shrink, below=1.0)
        if not self.growth >= 1:
            raise ValueError(f"growth must be at least 1, got {self.growth!r}")
        check_count("max_iter", self.max_iter, at_least=0)
        check_count("max_inner", self.max_inner)

    def solve(
        self, problem: EqualityProblem, x0: Float[ndarray, " n"], lam0: Float[ndarray, " m"] | None = None
    ) -> Solution:
        """Run from (x0, lam0), multipliers 0 unless given; `nit` counts multiplier updates.

        >>> from locally.optimize.constrained import hock_schittkowski
        >>> test = hock_schittkowski("HS28")
        >>> AugmentedLagrangian().solve(test.problem, test.x0).success
        True
        """
        return _Solve(self, problem).run(*problem.checked_start(x0, lam0))


@dataclass(eq=False)
class _Solve:
    options: AugmentedLagrangian
    problem: EqualityProblem
    kkts: list[float] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    products: int = 0
    shifts: int = 0

    def __post_init__(self) -> None:
        self.evaluate = Evaluator(self.problem)

    def run(self, x: Float[ndarray, " n"], lam: Float[ndarray, " m"]) -> Solution:
        o = self.options
        mu, tau = o.mu, o.tau
        try:
            at = start = self.evaluate.point(x, lam)
            self.kkts.append(at.kkt)
            for _ in range(o.max_iter):
                if at.kkt <= o.tol:
                    return self._end(at, Status.CONVERGED)
                while np.linalg.norm(slope(at, mu)) > tau:
                    if at.f < -RUNAWAY * (1 + abs(start.f)):
                        return self._end(at, Status.UNBOUNDED, f"f = {at.f:.3g} under the penalty mu = {mu:.3g}")
                    if len(self.alphas) >= o.max_inner:
                        return self._end(at, Status.INNER_FAILED, f"after {o.max_inner} Newton steps")
                    following = self._newton_step(at, mu)
                    if following is None:
                        return self._end(at, Status.LINE_SEARCH_FAILED)
                    at = following
                at = Point(at.x, at.lam + mu * at.c, at.f, at.g, at.c, at.G)
                self.kkts.append(at.kkt)
                mu, tau = o.growth * mu, o.shrink * tau
        except NotFiniteError as error:
            if not self.kkts:
                raise ValueError(f"{error} is NaN or infinite at x0") from error
            return self._end(at, Status.NOT_FINITE, str(error))
        return self._end(at, Status.CONVERGED if at.kkt <= o.tol else Status.ITERATION_LIMIT)

    def _newton_step(self, at: Point, mu: float) -> Point | None:
        gradient = slope(at, mu)
        G = at.G if not sp.issparse(at.G) else sp.csr_array(at.G)
        H = add(self.evaluate.hessian(at.x, at.lam + mu * at.c), mu * (G.T @ G))
        smallest = smallest_eigenvalue(H)
        if smallest < self.options.eps_b:
            H = add_identity(H, 1 - smallest)
            self.shifts += 1
        steps: list[float] = []
        d, _ = gmres(H, -gradient, rtol=1e-4, callback=steps.append, callback_type="pr_norm")
        self.products += len(steps)

        value, descent = merit(at.f, at.c, at.lam, mu), float(gradient @ d)
        slack = 4 * np.finfo(float).eps * abs(value)
        alpha = 1.0
        while alpha >= STEP_LIMIT:
            x = at.x + alpha * d
            try:
                f, c = self.evaluate.values(x)
            except NotFiniteError:
                f, c = np.inf, at.c
            if merit(f, c, at.lam, mu) <= value + alpha * self.options.beta * descent + slack:
                g, G = self.evaluate.first_order(x)
                self.alphas.append(alpha)
                return Point(x, at.lam, f, g, c, G)
            alpha /= 2
        return None

    def _end(self, at: Point, status: Status, cause: str = "") -> Solution:
        return Solution(
            x=at.x,
            lam=at.lam,
            fun=at.f,
            constr=at.c,
            kkt=at.kkt,
            status=status,
            cause=cause,
            nit=len(self.kkts) - 1,
            nfev=self.evaluate.nfev,
            njev=self.evaluate.njev,
            nhev=self.evaluate.nhev,
            kkt_history=tuple(self.kkts),
            alpha_history=tuple(self.alphas),
            products=self.products,
            shifts=self.shifts,
        )


def merit(f: float, c: Float[ndarray, " m"], lam: Float[ndarray, " m"], mu: float) -> float:
    return f + float(lam @ c) + mu / 2 * float(c @ c)


def slope(at: Point, mu: float) -> Float[ndarray, " n"]:
    """Gradient of the augmented Lagrangian in x."""
    return at.g + at.G.T @ (at.lam + mu * at.c)
