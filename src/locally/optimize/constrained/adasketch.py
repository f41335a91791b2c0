"""AdaSketch-Newton: sketched inexact Newton steps on an exact augmented Lagrangian, for equality constraints.

For optimal control, PDE-constrained and constrained learning problems whose KKT systems are too large to factorise.
Source: Hong, Na, Mahoney and Kolar, ICML 2023 (arXiv 2305.18379).
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_between, check_choice, check_count, check_positive
from locally.linalg.sketching import Kaczmarz, Sketch
from locally.optimize.constrained.inner import SKETCHES, Accuracy, InnerSolve, named_sketch
from locally.optimize.constrained.kkt import NewtonSystem, newton_system
from locally.optimize.constrained.merit import ExactAugmentedLagrangian
from locally.optimize.constrained.outcome import Solution, Status
from locally.optimize.constrained.problem import EqualityProblem, Evaluator, Matrix, NotFiniteError, Point

ETA1_LIMIT, ETA2_LIMIT = 1e8, 1e-8
STEP_LIMIT = 2.0**-40
RUNAWAY = 1e12  # growth of |f| or ||x|| that no bounded problem shows

Schedule = Callable[[int, float], float]


@dataclass(frozen=True)
class Progress:
    """What a callback sees after each outer iteration."""

    nit: int
    point: Point
    alpha: float
    eta1: float
    eta2: float
    delta: float
    sketches: int


@dataclass(frozen=True, kw_only=True)
class AdaSketchNewton:
    """Minimise f(x) subject to c(x) = 0.

    Each outer iteration solves the Newton-KKT system Gamma z = -r_KKT by random projections until two tests hold: an
    accuracy test, and sufficient descent of the exact augmented Lagrangian along z; where descent fails, the penalties
    eta1, eta2 and the accuracy delta are tightened. A backtracking search on that merit function moves x and the
    multipliers together. Converges from any start to a KKT point if the Jacobian keeps full rank, superlinearly if
    theta_k -> 0.

    Cost of an outer iteration: one Hessian, one gradient and Jacobian a trial step, a bound on lambda_min(G G^T) and a
    convexity test (O(n^3) for dense derivatives; a sparse factorisation of G G^T and Lanczos for sparse ones), and the
    sketches: O(n + m) a Kaczmarz step, one product with Gamma a Gaussian one. Memory beyond the derivatives is O(n + m)
    for single-row sketches.

    Args:
        sketch: 'kaczmarz', 'gaussian', 'block-gaussian', 'count', 'sparse', or an object of `locally.linalg.sketching`.
            Kaczmarz reads rows, the others also take operators.
        block_size: columns of a named sketch; blocks of 16 to 64 take far fewer and dearer sketches.
        tol: stop at ||(grad_x L; c)||_2 <= tol.
        max_iter: outer iterations.
        max_sketches: sketches an outer iteration.
        eta1, eta2, delta: first penalties and accuracy, positive.
        xi_b, eps_b: convexity that B must have on the null space of G; shift of H where the eigenvalue is below eps_b.
        beta: sufficient decrease, in (0, 0.5).
        nu: factor of the updates, above 1.
        theta: forcing terms: 'constant' (1), 'superlinear' (min(1, ||r_KKT||)), or a function of (k, ||r_KKT||) with
            values in (0, 1].
        accuracy: the test of the inner solve, on ||r|| / ||r_KKT|| against theta delta: 'a-priori' multiplies with
            ||Gamma||_F Psi, Psi a bound on ||Gamma^-1|| from norms; 'tight' takes ||Gamma^-1|| from the spectrum where
            that is cheap (n + m <= 1000, no operators) and the bound elsewhere; 'plain' leaves both out.
        delta_min: delta is never taken below.
        fallback: what to do when the sketches are used up: 'minres' finishes with MINRES from where they ended,
            'accept' takes the step as it is (what the published experiments do), None ends the solve. The first two are
            counted in the result.
        equilibrate: scale the KKT matrix to rows of equal length first; operators stay as they are.
        xi_g_min: lambda_min(G G^T) below this ends the solve as rank-deficient.
        xi_g: a lower bound on lambda_min(G G^T), if known; saves its computation.
        convex: the Hessian of the Lagrangian is known to need no shift; saves the test.
        rounding: a residual within rounding * eps * (||Gamma||_F ||z|| + ||rhs||) counts as zero.
        random_state: seed or generator.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.

    >>> from locally.optimize.constrained import hock_schittkowski
    >>> test = hock_schittkowski("HS7")
    >>> found = AdaSketchNewton().solve(test.problem, test.x0)
    >>> found.x.round(4) + 0.0, found.nit, str(found.status)
    (array([0.    , 1.7321]), 10, 'converged')
    """

    sketch: str | Sketch | Kaczmarz = "kaczmarz"
    block_size: int = 1
    tol: float = 1e-4
    max_iter: int = 1000
    max_sketches: int = 100_000
    eta1: float = 1.0
    eta2: float = 0.1
    delta: float = 0.1
    xi_b: float = 0.1
    eps_b: float = 1e-6
    beta: float = 0.1
    nu: float = 1.5
    theta: str | Schedule = "constant"
    accuracy: str = "a-priori"
    delta_min: float = 1e-6
    fallback: str | None = "minres"
    equilibrate: bool = True
    xi_g_min: float = 1e-8
    xi_g: float | None = None
    convex: bool = False
    rounding: float = 4.0
    random_state: int | np.random.Generator | None = 0

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)
        if isinstance(self.sketch, str):
            check_choice("sketch", self.sketch, tuple(SKETCHES))
        elif not isinstance(self.sketch, Sketch | Kaczmarz):
            raise TypeError(f"sketch must be a name or a sketch, got {self.sketch!r}")
        for name in ("tol", "eta1", "eta2", "delta", "xi_b", "eps_b", "delta_min", "xi_g_min", "rounding"):
            check_positive(name, getattr(self, name))
        check_positive("beta", self.beta, below=0.5)
        if not 1 < self.nu < math.inf:
            raise ValueError(f"nu must be above 1 and finite, got {self.nu!r}")
        check_count("max_iter", self.max_iter, at_least=0)
        check_count("max_sketches", self.max_sketches)
        if not callable(self.theta):
            check_choice("theta", self.theta, ("constant", "superlinear"))
        check_choice("accuracy", self.accuracy, ("a-priori", "tight", "plain"))
        check_choice("fallback", self.fallback, ("minres", "accept", None))
        if self.xi_g is not None:
            check_positive("xi_g", self.xi_g)

    def solve(
        self,
        problem: EqualityProblem,
        x0: Float[ndarray, " n"],
        lam0: Float[ndarray, " m"] | None = None,
        callback: Callable[[Progress], object] | None = None,
    ) -> Solution:
        """Run from (x0, lam0), multipliers 0 unless given.

        What the problem does wrong ends in a status with the last good iterate: NaN, a rank-deficient Jacobian, an
        objective without bound. An exception that a function of the problem raises passes through.

        Args:
            callback: sees a `Progress` after every outer iteration; raises StopIteration to end the solve.

        Raises:
            ValueError: x0 or lam0 has the wrong length or holds NaN or infinity, or a function returns a wrong shape.
            TypeError: Kaczmarz was chosen for derivatives that are operators.
        """
        return _Solve(self, problem, callback).run(*problem.checked_start(x0, lam0))

    def forcing(self, k: int, kkt: float) -> float:
        """theta_k."""
        if callable(self.theta):
            theta = self.theta(k, kkt)
            check_between("theta(k, kkt)", theta, np.finfo(float).tiny, 1.0)
            return theta
        return 1.0 if self.theta == "constant" else min(1.0, kkt)


@dataclass(eq=False)
class _Solve:
    """State of one run; the outer iteration is `run`, its steps 2 to 4 are the methods below it."""

    options: AdaSketchNewton
    problem: EqualityProblem
    callback: Callable[[Progress], object] | None
    kkts: list[float] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    etas1: list[float] = field(default_factory=list)
    etas2: list[float] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)
    work: Counter[str] = field(default_factory=Counter)
    measured: str = ""

    def __post_init__(self) -> None:
        o = self.options
        self.evaluate = Evaluator(self.problem)
        self.rng = np.random.default_rng(o.random_state)
        self.sketch = named_sketch(o.sketch, o.block_size) if isinstance(o.sketch, str) else o.sketch
        self.merit = ExactAugmentedLagrangian(o.eta1, o.eta2)
        self.delta = o.delta

    def run(self, x: Float[ndarray, " n"], lam: Float[ndarray, " m"]) -> Solution:
        o = self.options
        try:
            at = self.evaluate.point(x, lam)
        except NotFiniteError as error:
            return self._nothing(x, lam, f"{error} at the start")
        f0, size0 = at.f, float(np.linalg.norm(x))
        self.kkts.append(at.kkt)
        for k in range(o.max_iter):
            if at.kkt <= o.tol:
                return self._end(at, Status.CONVERGED)
            if at.f < -RUNAWAY * (1 + abs(f0)) or np.linalg.norm(at.x) > RUNAWAY * (1 + size0):
                return self._end(at, Status.UNBOUNDED, f"f = {at.f:.3g} and ||x|| = {np.linalg.norm(at.x):.3g}")
            try:
                H = self.evaluate.hessian(at.x, at.lam)
            except NotFiniteError as error:
                return self._end(at, Status.NOT_FINITE, f"{error}, in outer iteration {k}")
            system = newton_system(H, at.G, eps_b=o.eps_b, xi_b=o.xi_b, convex=o.convex, xi_g=o.xi_g)
            self._refuse_operators(system)
            self.work["shifts"] += system.shifted
            self.measured = str(system.measured)
            if system.xi_g < o.xi_g_min:
                cause = f"lambda_min(G G^T) = {system.xi_g:.3g} at the last iterate ({system.measured})"
                return self._end(at, Status.RANK_DEFICIENT, cause)
            z, slope, failure = self._direction(k, at, H, system)
            self._remember()
            if failure is not None:
                return self._end(at, failure, f"in outer iteration {k}, slope of the merit function {slope:.3g}")
            try:
                following, alpha = self._search(at, z, slope)
            except NotFiniteError as error:
                return self._end(at, Status.NOT_FINITE, f"{error}, at every trial step of outer iteration {k}")
            if following is None:
                cause = f"in outer iteration {k}, down to a step of {alpha:.2g}"
                return self._end(at, Status.LINE_SEARCH_FAILED, cause)
            at = following
            self.kkts.append(at.kkt)
            self.alphas.append(alpha)
            if self.callback is not None:
                now = Progress(k + 1, at, alpha, self.merit.eta1, self.merit.eta2, self.delta, self.work["sketches"])
                try:
                    self.callback(now)
                except StopIteration:
                    return self._end(at, Status.CONVERGED if at.kkt <= o.tol else Status.STOPPED)
        if at.kkt <= o.tol:
            return self._end(at, Status.CONVERGED)
        if at.f < f0 - 1 and np.linalg.norm(at.x) > 100 * (1 + size0) and np.linalg.norm(at.c) <= o.tol:
            return self._end(at, Status.UNBOUNDED, f"f fell from {f0:.3g} to {at.f:.3g} while x ran away")
        return self._end(at, Status.ITERATION_LIMIT)

    def _direction(
        self, k: int, at: Point, H: Matrix, system: NewtonSystem
    ) -> tuple[Float[ndarray, " d"], float, Status | None]:
        """Steps 2 and 3: sketch until accuracy and descent hold, updating eta1, eta2 and delta in between."""
        o = self.options
        inverse, weight = self._conditioning(system)
        self.delta = max(min(self.delta, self._delta_trial(system, inverse)), o.delta_min)
        theta = o.forcing(k, at.kkt)
        inner = InnerSolve(
            system=system,
            rhs=-at.residual,
            sketch=self.sketch,
            max_sketches=o.max_sketches,
            minres=o.fallback == "minres",
            rounding=o.rounding,
            rng=self.rng,
            equilibrate=o.equilibrate,
        )
        inexact, failure = 0, None
        while True:
            accuracy = inner.reach(theta * self.delta * at.kkt / weight)
            slope = float(self.merit.gradient(at, H) @ inner.z)
            descends = slope <= -self.merit.eta2 / 2 * at.kkt**2
            short = accuracy is Accuracy.SHORT
            # sketches and MINRES are at their end: no worse than the plain test asks may still do, and is counted
            useless = o.fallback is None or inner.residual > theta * self.delta * at.kkt
            if short and useless and o.fallback != "accept":
                failure = Status.INNER_FAILED
                break
            inexact = int(short)
            if descends:
                break
            if self.merit.eta1 > ETA1_LIMIT or self.merit.eta2 < ETA2_LIMIT:
                failure = None if slope < 0 else Status.NOT_DESCENT
                break
            self.merit = ExactAugmentedLagrangian(o.nu**2 * self.merit.eta1, self.merit.eta2 / o.nu)
            self.delta = max(min(self.delta / o.nu**4, self._delta_trial(system, inverse)), o.delta_min)
        for name, spent in (
            ("sketches", inner.sketches),
            ("multiplications", inner.multiplications),
            ("fallbacks", int(inner.fallbacks > 0)),
            ("products", inner.products),
            ("inexact", inexact),
        ):
            self.work[name] += spent
        return inner.z, slope, failure

    def _conditioning(self, system: NewtonSystem) -> tuple[float, float]:
        """(bound on ||Gamma^-1||, what the accuracy test multiplies ||r|| with)."""
        a_priori = system.a_priori_inverse(self.options.xi_b)
        match self.options.accuracy:
            case "plain":
                return a_priori, 1.0
            case "tight":
                tight = system.tight_inverse()
                inverse = a_priori if tight is None else min(tight, a_priori)
                return inverse, max(system.norm * inverse, 1.0)
        return a_priori, max(system.norm * a_priori, 1.0)

    def _delta_trial(self, system: NewtonSystem, inverse: float) -> float:
        if self.options.accuracy == "plain":
            return self.options.delta
        eta1, eta2 = self.merit.eta1, self.merit.eta2
        return (0.5 - self.options.beta) * eta2 / ((1 + eta1 + eta2) * (system.upsilon * inverse) ** 2)

    def _search(self, at: Point, z: Float[ndarray, " d"], slope: float) -> tuple[Point | None, float]:
        """Step 4: Armijo on the merit function. A trial point with NaN counts as one without decrease.

        Raises:
            NotFiniteError: no trial point at all could be evaluated.
        """
        value = self.merit.value(at)
        slack = 4 * np.finfo(float).eps * abs(value)  # near the solution the decrease is below rounding of M
        alpha, seen, error = 1.0, False, NotFiniteError("fun")
        while alpha >= STEP_LIMIT:
            try:
                trial = self.evaluate.point(at.x + alpha * z[: self.problem.n], at.lam + alpha * z[self.problem.n :])
                seen = True
                if self.merit.value(trial) <= value + alpha * self.options.beta * slope + slack:
                    return trial, alpha
            except NotFiniteError as problem:
                error = problem
            alpha /= 2
        if not seen:
            raise error
        return None, alpha

    def _refuse_operators(self, system: NewtonSystem) -> None:
        if isinstance(system.gamma, LinearOperator) and isinstance(self.sketch, Kaczmarz):
            raise TypeError(
                "sketch 'kaczmarz' reads rows, but the Hessian or a Jacobian is an operator: "
                "choose 'gaussian', 'block-gaussian', 'count' or 'sparse'"
            )

    def _remember(self) -> None:
        self.etas1.append(self.merit.eta1)
        self.etas2.append(self.merit.eta2)
        self.deltas.append(self.delta)

    def _end(self, at: Point, status: Status, cause: str = "") -> Solution:
        return Solution(
            x=at.x, lam=at.lam, fun=at.f, constr=at.c, kkt=at.kkt, status=status, cause=cause, **self._history()
        )

    def _nothing(self, x: Float[ndarray, " n"], lam: Float[ndarray, " m"], cause: str) -> Solution:
        nan = np.full(self.problem.m, np.nan)
        known: dict[str, Any] = {"x": x, "lam": lam, "fun": math.nan, "constr": nan, "kkt": math.nan}
        return Solution(**known, status=Status.NOT_FINITE, cause=cause, **self._history())

    def _history(self) -> dict[str, Any]:
        return {
            "nit": len(self.alphas),
            "nfev": self.evaluate.nfev,
            "njev": self.evaluate.njev,
            "nhev": self.evaluate.nhev,
            "kkt_history": tuple(self.kkts),
            "alpha_history": tuple(self.alphas),
            "eta1_history": tuple(self.etas1),
            "eta2_history": tuple(self.etas2),
            "delta_history": tuple(self.deltas),
            "measured": self.measured,
            **self.work,
        }
