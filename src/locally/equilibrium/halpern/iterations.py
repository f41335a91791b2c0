"""Variance-reduced Halpern iteration for 0 in F(u) + G(u), F = (1/n) sum_i F_i monotone, G with a cheap resolvent.

For games, constrained saddle points and finite-sum equilibria where a small operator norm of the last iterate is the
goal: about n + sqrt(n) L / epsilon component evaluations, against n L / epsilon where each step evaluates all of F.
`SingleLoopHalpern` is for components that are cocoercive on average, `InexactHalpern` for any monotone Lipschitz F; the
latter solves its inner problems by `VRFoRB`. Source: Cai, Alacaoglu and Diakonikolas, arXiv 2310.02987.
"""

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from locally.checks import check_between, check_choice, check_count, check_positive
from locally.equilibrium.halpern.ledger import Callback, Ledger, Solution, Solver, Status
from locally.equilibrium.halpern.operators import FiniteSumOperator
from locally.equilibrium.halpern.resolvents import ResolventLike
from locally.equilibrium.halpern.stepping import Batches

RandomState = int | np.random.Generator | None


@dataclass(frozen=True, kw_only=True)
class SingleLoopHalpern(Solver):
    """Algorithm 1: anchored steps on a PAGE estimate of F, for operators that are cocoercive on average.

    With eta = 1/(4L) the expected norm of F(u_k) + g_k is at most 16 L ||u_0 - u*|| / k. Without cocoercivity there is
    no guarantee (a warning says so), though it often works on compact sets. A step costs ceil(sqrt(n)) component
    differences and one resolvent, and the n components once in about sqrt(n) / 4 steps.

    Args:
        L: cocoercivity constant of the components on average.
        eta: step, default `multiplier` / (4 L).
        multiplier: of the default step, > 0; in practice 4 is usually safe.
        batch_size: of a correction, in [1, n], default ceil(sqrt(n)).
        refresh: probability of a full evaluation at a step, in (0, 1]; 1 gives deterministic Halpern iteration. Default
            4 / (min(k, sqrt(n) + 1) + 4), and 1 where a full evaluation costs no more than a correction. A full
            evaluation is made in any case after 10 times the expected wait.
        restart: move the anchor to the last iterate when the residual has halved since the last restart; gives linear
            convergence where the residual bounds the distance to the solutions.
        random_state: seed or generator.

    >>> from locally.equilibrium.halpern import LeastSquares
    >>> A = np.random.default_rng(0).standard_normal((200, 3))
    >>> solver = SingleLoopHalpern(multiplier=4.0, restart=True, random_state=0)
    >>> found = solver.solve(LeastSquares(A, A @ [1.0, 2.0, 3.0]), np.zeros(3))
    >>> found.x.round(4), str(found.status)
    (array([1., 2., 3.]), 'converged')
    """

    multiplier: float = 1.0
    batch_size: int | None = None
    refresh: float | None = None
    restart: bool = False
    random_state: RandomState = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("multiplier", self.multiplier)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if self.refresh is not None and not 0 < self.refresh <= 1:
            raise ValueError(f"refresh must lie in (0, 1], got {self.refresh}")

    def _run(self, ledger: Ledger, op: FiniteSumOperator, u: Any) -> Solution:
        if not op.cocoercive:
            warnings.warn(
                f"{type(op).__name__} is not known to be cocoercive: the single-loop algorithm has no guarantee there, "
                "InexactHalpern has",
                stacklevel=3,
            )
        eta = self.eta or self.multiplier / (4 * self.constant(op, lambda c: c.cocoercive or c.expected))
        b = self.batch_size or math.ceil(math.sqrt(op.n))
        check_between("batch_size", b, 1, op.n)
        rng = np.random.default_rng(self.random_state)
        waits = self._waits(op.n, b)
        steps = ledger.steps
        anchor, argument, k, stage = u, None, 0, math.inf
        while True:
            # step k with a full evaluation, where the residual is free
            F = ledger.full(u)
            status = ledger.check(u, F, argument, eta)
            if status is None and not ledger.affords(0):
                status = Status.BUDGET_SPENT
            if status is not None:
                return ledger.close(u, status)
            if self.restart and ledger.residual <= stage / 2:
                ledger.restarts += stage < math.inf
                anchor, k, stage = u, 0, ledger.residual
            u_before, estimate = u, F
            u, argument = steps.anchored(anchor, u, estimate, k, eta)
            k += 1
            ledger.iterations += 1

            # steps k, k + 1, ... with corrections of batches, until the coin asks for a full evaluation
            corrected = min(ledger.affordable(waits.next(k, rng), 2 * b), ledger.iterations_left)
            if corrected:
                drawn = op.draw(rng, corrected, b)
                u, _, _, argument = steps.halpern(anchor, u, u_before, estimate, k, eta, drawn)
                k += corrected
                ledger.iterations += corrected
                ledger.evaluations += corrected * 2 * drawn.shape[1]

    def _waits(self, n: int, b: int) -> "_Waits":
        if self.refresh is not None:
            return _Waits(np.array([self.refresh]))
        if 2 * b >= n:
            return _Waits(np.ones(1))
        k = np.arange(math.isqrt(n) + 3)
        return _Waits(np.where(k <= 1, 1.0, 4 / (np.minimum(k, math.sqrt(n) + 1) + 4)))


class _Waits:
    """Numbers of steps between full evaluations, for refresh probabilities p_0, p_1, ... (the last one stays)."""

    def __init__(self, probabilities: np.ndarray) -> None:
        self.ramp, self.tail = probabilities[:-1], float(probabilities[-1])
        self.longest = math.ceil(10 / self.tail)  # round-off in the estimate grows until the next refresh

    def next(self, k: int, rng: np.random.Generator) -> int:
        """How many of the steps k, k + 1, ... go without one."""
        ramp = self.ramp[k:]
        if ramp.size and (asked := np.flatnonzero(rng.random(len(ramp)) < ramp)).size:
            return int(asked[0])
        return min(len(ramp) + int(rng.geometric(self.tail)) - 1, self.longest)


@dataclass(frozen=True, kw_only=True)
class VRFoRB:
    """Algorithm 3: variance-reduced forward-reflected-backward steps that approximate a resolvent of F + G.

    Solves the 1-strongly monotone inclusion 0 in eta (F + G)(v) + v - u for v = J_{eta (F + G)}(u), starting from u,
    with tau = step sqrt(p (1 - p)) / (eta L + 1). Two component evaluations and one resolvent of G a step, and n
    evaluations with probability p. Source: Alacaoglu, Malitsky and Cevher, Comput. Optim. Appl. 80 (2021).

    Args:
        step: multiplier s of tau, > 0; 1/2 in theory, 5 in the paper's experiments.
        snapshot: probability p of moving the snapshot, in (0, 1), default min(1/n, 1/2).
    """

    step: float = 0.5
    snapshot: float | None = None

    def __post_init__(self) -> None:
        check_positive("step", self.step)
        if self.snapshot is not None:
            check_positive("snapshot", self.snapshot, below=1)

    def probability(self, n: int) -> float:
        """p for n components: `snapshot`, or min(1/n, 1/2)."""
        return self.snapshot or min(1 / n, 0.5)

    def tau(self, n: int, eta: float, L: float) -> float:
        """The step size for n components with Lipschitz constant L, as above; > 0."""
        p = self.probability(n)
        return self.step * math.sqrt(p * (1 - p)) / (eta * L + 1)

    def approximate(
        self,
        op: FiniteSumOperator,
        u: Any,
        *,
        eta: float,
        steps: int,
        L: float | None = None,
        resolvent: ResolventLike | None = None,
        random_state: RandomState = None,
    ) -> Any:
        """J_{eta (F + G)}(u) after that many steps; its error falls linearly in `steps`.

        Args:
            op, resolvent: F and G (default: the operator's own).
            u: (dim,).
            eta: > 0.
            steps: at least 1; of the order of n log(1 / error).
            L: expected Lipschitz constant of F, by default the operator's.
            random_state: seed or generator.
        """
        check_positive("eta", eta)
        check_count("steps", steps)
        solver = InexactHalpern(L=L, eta=eta, inner=self, max_epochs=math.inf)
        ledger, u = solver.open(op, u, resolvent)
        rng = np.random.default_rng(random_state)
        tau = self.tau(op.n, eta, solver.constant(op, lambda c: c.expected))
        return self.run(ledger, op, u, ledger.full(u), eta, tau, *self.draw(op, rng, steps))[0]

    def draw(self, op: FiniteSumOperator, rng: np.random.Generator, steps: int) -> tuple[Batches, np.ndarray]:
        """One component and one coin a step; heads moves the snapshot."""
        return op.draw(rng, steps, 1), rng.random(steps) < self.probability(op.n)

    def run(
        self,
        ledger: Ledger,
        op: FiniteSumOperator,
        u: Any,
        F_u: Any,
        eta: float,
        tau: float,
        drawn: Batches,
        heads: np.ndarray,
    ) -> tuple[Any, Any]:
        """The steps for given draws, fewer where the budget ends: the last point and its resolvent's argument."""
        alpha = 1 - self.probability(op.n)
        v = w = w_before = argument = u
        F_w, done = F_u, 0
        for stop in [*(np.flatnonzero(heads[:-1]) + 1), len(heads)]:
            count = ledger.affordable(int(stop) - done, 2)
            if count:
                v, argument = ledger.steps.forb(u, v, w, w_before, F_w, eta, tau, alpha, drawn[done : done + count])
                ledger.evaluations += 2 * count
            if done + count < stop or stop == len(heads) or not ledger.affords(op.n):
                break
            # the next step reflects at the old snapshot, the ones after it at the new one
            w_before, w, F_w, done = w, v, ledger.full(v), int(stop)
        return v, argument


@dataclass(frozen=True, kw_only=True)
class InexactHalpern(Solver):
    """Algorithm 2: Halpern iteration on the resolvent of F + G, each one approximated by VR-FoRB.

    For any monotone Lipschitz F. With eta = sqrt(n) / L and accurate inner solves the expected distance between u_k and
    its resolvent is at most 7 ||u_0 - u*|| / k, so ||F + g|| falls like L / (sqrt(n) k) at O(n log k) evaluations a
    step. A weakly nonmonotone (co-hypomonotone) F is covered where eta exceeds twice the deficit and eta F + Id stays
    strongly monotone.

    Args:
        L: expected Lipschitz constant L_Q.
        eta: step of the outer resolvent, default `multiplier` sqrt(n) / L.
        multiplier: of the default step, > 0.
        inner: the inner solver.
        inner_length: outer step k makes max(1, floor(inner_length n log(k + 2))) inner steps, > 0. The theory needs a
            multiple of n log(k + 2); the paper's experiments take 0.05.
        check_every: outer steps between evaluations of F for the residual alone, n component evaluations each.
        restart: move the anchor to the last iterate when the residual has halved since the last restart.
        random_state: seed or generator.

    >>> from locally.equilibrium.halpern import MatrixGame
    >>> game = MatrixGame([[0.0, -1.0, 2.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    >>> found = InexactHalpern(restart=True, tol=1e-3, random_state=0).solve(game, game.uniform_start())
    >>> found.x.round(2), str(found.status)
    (array([0.33, 0.42, 0.25, 0.25, 0.42, 0.33]), 'converged')
    """

    multiplier: float = 1.0
    inner: VRFoRB = VRFoRB()
    inner_length: float = 1.0
    check_every: int = 1
    restart: bool = False
    random_state: RandomState = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("multiplier", self.multiplier)
        check_positive("inner_length", self.inner_length)
        check_count("check_every", self.check_every)

    def _run(self, ledger: Ledger, op: FiniteSumOperator, u: Any) -> Solution:
        L = self.constant(op, lambda c: c.expected)
        eta = self.eta or self.multiplier * math.sqrt(op.n) / L
        tau = self.inner.tau(op.n, eta, L)
        rng = np.random.default_rng(self.random_state)
        F = ledger.full(u)
        status = ledger.check(u, F)
        anchor, k, stage, Ju = u, 0, ledger.residual, u
        while status is None and ledger.affords(2):
            inner_steps = max(1, int(self.inner_length * op.n * math.log(k + 2)))
            Ju, argument = self.inner.run(ledger, op, u, F, eta, tau, *self.inner.draw(op, rng, inner_steps))
            ledger.iterations += 1
            pull = 1 / (k + 2)
            u, k = pull * anchor + (1 - pull) * Ju, k + 1
            if ledger.iterations % self.check_every == 0 or not ledger.affords(op.n + 2):
                F_Ju = ledger.full(Ju)
                status = ledger.check(Ju, F_Ju, argument, tau * eta)
                if self.restart and ledger.residual <= stage / 2:
                    ledger.restarts += 1
                    anchor, u, k, stage, F = Ju, Ju, 0, ledger.residual, F_Ju
                    continue
            if status is None and ledger.affords(2):
                F = ledger.full(u)
        return ledger.close(Ju, status or Status.BUDGET_SPENT)


def vr_halpern(
    op: FiniteSumOperator,
    u0: Any,
    *,
    method: str = "auto",
    resolvent: ResolventLike | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Solution:
    """Solve 0 in F(u) + G(u) by the algorithm that suits the operator.

    Args:
        op, u0, resolvent, callback: as for `Solver.solve`.
        method: "single" (`SingleLoopHalpern`), "inexact" (`InexactHalpern`), or "auto": the former where the operator
            is cocoercive, the latter elsewhere.
        options: what the chosen class takes, such as tol, max_epochs, restart, random_state, L and eta.

    Raises:
        ValueError, TypeError: an unknown method, an option that is out of range or belongs to the other algorithm, a
            start that does not fit.

    >>> from locally.equilibrium.halpern import MatrixGame
    >>> game = MatrixGame([[3, -1], [-2, 4]])
    >>> found = vr_halpern(game, game.uniform_start(), tol=1e-7, restart=True, random_state=0)
    >>> game.players(found.x)[0].round(4)
    array([0.5, 0.5])
    """
    check_choice("method", method, ("auto", "single", "inexact"))
    if method == "auto":
        method = "single" if getattr(op, "cocoercive", False) else "inexact"
    solver = SingleLoopHalpern if method == "single" else InexactHalpern
    unknown = sorted(set(options) - {f.name for f in fields(solver)})
    if unknown:
        raise TypeError(f"{solver.__name__} takes no {', '.join(unknown)}")
    return solver(**options).solve(op, u0, resolvent=resolvent, callback=callback)
