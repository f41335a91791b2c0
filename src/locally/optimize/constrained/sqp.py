"""Inexact sequential quadratic programming with GMRES and the l1 merit function: what sketched steps are measured by.

Sources: Byrd, Curtis and Nocedal, SIAM J. Optim. 19 (2008), 351-369; its adaptive form as in arXiv 2305.18379.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_count, check_positive
from locally.optimize.constrained.kkt import NewtonSystem, newton_system
from locally.optimize.constrained.outcome import Solution, Status
from locally.optimize.constrained.problem import EqualityProblem, Evaluator, Matrix, NotFiniteError, Point

STEP_LIMIT = 2.0**-40
KRYLOV = 2  # vectors a GMRES cycle


@dataclass(frozen=True, kw_only=True)
class L1SQP:
    """Newton-KKT steps from restarted GMRES, a line search on f + mu ||c||_1.

    A step is good enough when the model of the merit function falls by sigma mu max(||c||_1, ||G dx + c||_1 - ||c||_1)
    and the residual passes a test. The adaptive form raises mu and tightens the test until both hold. The form of Byrd,
    Curtis and Nocedal stops at either of two tests: a small residual with model decrease, or a step towards
    feasibility, after which mu is raised as far as model decrease asks.

    Args:
        adaptive: which form.
        exchanged: swap the two blocks of the residual in the tests of Byrd, Curtis and Nocedal, as the experiments of
            arXiv 2305.18379 do. It takes longer, and may raise mu by a quotient without a sign; only for comparison
            with those figures.
        tol: stop when ||(grad_x L; c)||_2 <= tol.
        max_iter: outer iterations.
        max_cycles: GMRES cycles an outer iteration, after which the solve ends with INNER_FAILED.
        mu, kappa: first penalty and residual tolerance.
        tau, epsilon: sigma = tau (1 - epsilon); epsilon also is the tolerance on feasibility of the second test.
        eta: slope fraction of the line search.
        nu: growth of mu in the adaptive form; kappa falls by nu^2.
        xi_b, eps_b: modification of the Hessian, as in `AdaSketchNewton`.
        xi_g_min: lambda_min(G G^T) below this ends the solve.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.
    """

    adaptive: bool = True
    exchanged: bool = False
    tol: float = 1e-4
    max_iter: int = 5000
    max_cycles: int = 20_000
    mu: float = 1.0
    kappa: float | None = None
    kappa1: float = 0.1
    tau: float = 0.1
    epsilon: float = 0.1
    eta: float = 1e-8
    nu: float = 1.5
    xi_b: float = 0.1
    eps_b: float = 1e-6
    xi_g_min: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("tol", "mu", "kappa1", "xi_b", "eps_b", "xi_g_min"):
            check_positive(name, getattr(self, name))
        for name in ("tau", "epsilon", "eta"):
            check_positive(name, getattr(self, name), below=1.0)
        if self.kappa is not None:
            check_positive("kappa", self.kappa)
        if not self.nu > 1:
            raise ValueError(f"nu must be above 1, got {self.nu!r}")
        check_count("max_iter", self.max_iter, at_least=0)
        check_count("max_cycles", self.max_cycles)

    def solve(
        self, problem: EqualityProblem, x0: Float[ndarray, " n"], lam0: Float[ndarray, " m"] | None = None
    ) -> Solution:
        """Run from (x0, lam0), multipliers 0 unless given; statuses as for `AdaSketchNewton`.

        >>> from locally.optimize.constrained import hock_schittkowski
        >>> test = hock_schittkowski("HS7")
        >>> L1SQP().solve(test.problem, test.x0).nit
        7
        """
        return _Solve(self, problem).run(*problem.checked_start(x0, lam0))


@dataclass(eq=False)
class _Solve:
    options: L1SQP
    problem: EqualityProblem
    kkts: list[float] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    products: int = 0
    shifts: int = 0

    def __post_init__(self) -> None:
        o = self.options
        self.evaluate = Evaluator(self.problem)
        self.mu = o.mu
        self.kappa = (0.1 if o.adaptive else 1.0) if o.kappa is None else o.kappa
        self.sigma = o.tau * (1 - o.epsilon)

    def run(self, x: Float[ndarray, " n"], lam: Float[ndarray, " m"]) -> Solution:
        o = self.options
        try:
            at = self.evaluate.point(x, lam)
            self.beta = max(l1(at.gL) / (l1(at.c) + 1), 1.0)
            self.kkts.append(at.kkt)
            for _ in range(o.max_iter):
                if at.kkt <= o.tol:
                    return self._end(at, Status.CONVERGED)
                H = self.evaluate.hessian(at.x, at.lam)
                system = newton_system(H, at.G, eps_b=o.eps_b, xi_b=o.xi_b)
                self.shifts += system.shifted
                if system.xi_g < o.xi_g_min:
                    return self._end(at, Status.RANK_DEFICIENT, f"lambda_min(G G^T) = {system.xi_g:.3g}")
                step = self._direction(at, system)
                if step is None:
                    return self._end(at, Status.INNER_FAILED, f"after {o.max_cycles} GMRES cycles")
                following = self._search(at, step)
                if following is None:
                    return self._end(at, Status.LINE_SEARCH_FAILED)
                at = following
                self.kkts.append(at.kkt)
        except NotFiniteError as error:
            if not self.kkts:
                raise ValueError(f"{error} is NaN or infinite at x0") from error
            return self._end(at, Status.NOT_FINITE, str(error))
        return self._end(at, Status.CONVERGED if at.kkt <= o.tol else Status.ITERATION_LIMIT)

    def _direction(self, at: Point, system: NewtonSystem) -> "Step | None":
        rhs = -at.residual
        z = np.zeros_like(rhs)
        accepted = self._by_adaptive_test if self.options.adaptive else self._by_either_test
        for _ in range(self.options.max_cycles):
            z, r = gmres_cycle(system.gamma, rhs, z)
            self.products += KRYLOV + 1
            step = accepted(z, r, at, system)
            if step is not None:
                return step
        return None

    def _by_adaptive_test(
        self, z: Float[ndarray, " d"], r: Float[ndarray, " d"], at: Point, system: NewtonSystem
    ) -> "Step | None":
        size, whole = l1(r), l1(at.residual)
        step = Step.of(z, at, system) if size <= self.kappa * whole else None
        while step is not None and size <= self.kappa * whole:
            if self._model_falls(step):
                return step
            self.mu *= self.options.nu
            self.kappa /= self.options.nu**2
        return None

    def _by_either_test(
        self, z: Float[ndarray, " d"], r: Float[ndarray, " d"], at: Point, system: NewtonSystem
    ) -> "Step | None":
        """Termination tests 1 and 2 of Byrd, Curtis and Nocedal."""
        o, n = self.options, self.problem.n
        stationarity, feasibility = l1(r[:n]), l1(r[n:])
        if o.exchanged:
            stationarity, feasibility = feasibility, stationarity
        small = l1(r) <= self.kappa * l1(at.residual)
        balanced = stationarity <= max(o.kappa1 * l1(at.gL), self.beta * l1(at.c))
        feasible = feasibility <= o.epsilon * l1(at.c) and stationarity <= self.beta * l1(at.c)
        if not ((small and balanced) or feasible):
            return None
        step = Step.of(z, at, system)
        if small and balanced and self._model_falls(step):
            return step
        if feasible and not self._model_falls(step):
            needed = (step.slope + step.curvature) / ((1 - o.tau) * (step.infeasible - step.remaining))
            self.mu = max(needed, self.mu) + 1e-4
        return step if feasible else None

    def _model_falls(self, step: "Step") -> bool:
        decrease = -step.slope - step.curvature + self.mu * (step.infeasible - step.remaining)
        return decrease >= self.sigma * self.mu * max(step.infeasible, step.remaining - step.infeasible)

    def _search(self, at: Point, step: "Step") -> Point | None:
        """Armijo on f + mu ||c||_1, which asks for no gradient at the points it rejects."""
        value = at.f + self.mu * step.infeasible
        slope = step.slope - self.mu * (step.infeasible - step.remaining)
        slack = 4 * np.finfo(float).eps * abs(value)
        alpha = 1.0
        while alpha >= STEP_LIMIT:
            x = at.x + alpha * step.z[: self.problem.n]
            try:
                f, c = self.evaluate.values(x)
            except NotFiniteError:
                f, c = np.inf, at.c
            if f + self.mu * l1(c) <= value + alpha * self.options.eta * slope + slack:
                g, G = self.evaluate.first_order(x)
                self.alphas.append(alpha)
                return Point(x, at.lam + alpha * step.z[self.problem.n :], f, g, c, G)
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
            nit=len(self.alphas),
            nfev=self.evaluate.nfev,
            njev=self.evaluate.njev,
            nhev=self.evaluate.nhev,
            kkt_history=tuple(self.kkts),
            alpha_history=tuple(self.alphas),
            products=self.products,
            shifts=self.shifts,
        )


@dataclass(frozen=True, eq=False)
class Step:
    """A direction and what the model of the merit function needs of it.

    Attributes:
        slope: g . dx.
        curvature: max(dx . B dx / 2, 0).
        infeasible, remaining: ||c||_1 and ||G dx + c||_1.
    """

    z: Float[ndarray, " d"]
    slope: float
    curvature: float
    infeasible: float
    remaining: float

    @classmethod
    def of(cls, z: Float[ndarray, " d"], at: Point, system: NewtonSystem) -> "Step":
        dx = z[: at.x.size]
        curvature = max(float(dx @ (system.B @ dx)) / 2, 0.0)
        return cls(z, float(at.g @ dx), curvature, l1(at.c), l1(at.G @ dx + at.c))


def gmres_cycle(
    gamma: Matrix, rhs: Float[ndarray, " d"], z: Float[ndarray, " d"]
) -> tuple[Float[ndarray, " d"], Float[ndarray, " d"]]:
    """One cycle of GMRES(2) from z; returns the new z and its residual Gamma z - rhs."""
    gap = rhs - gamma @ z
    if not gap.any():
        return z, -gap
    first = gap / np.linalg.norm(gap)
    image = gamma @ first
    second = image - (first @ image) * first
    length, size = np.linalg.norm(second), np.linalg.norm(image)
    if length <= 1e-14 * size:  # gap is an eigenvector
        weight = (image @ gap) / size**2 if size > 0 else 0.0
        return z + weight * first, weight * image - gap
    second /= length
    other = gamma @ second
    # least squares on the two images, the second made orthogonal to the first
    overlap = (image @ other) / size**2
    apart = other - overlap * image
    b = (apart @ gap) / (apart @ apart)
    a = (image @ gap) / size**2 - overlap * b
    return z + a * first + b * second, a * image + b * other - gap


def l1(v: Float[ndarray, " n"]) -> float:
    return float(np.abs(v).sum())
