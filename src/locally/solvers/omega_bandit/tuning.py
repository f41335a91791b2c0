"""Glue: a solver whose omega a learner sets, one solve at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.solvers.omega_bandit.bandit import ParameterBandit, Real
from locally.solvers.omega_bandit.solves import Solution


@runtime_checkable
class RelaxedSolver(Protocol):
    """`SOR`, `SSORConjugateGradients`, or any solver of yours with the same `solve`."""

    @property
    def max_iter(self) -> int:
        """Iterations at which a solve gives up."""

    def solve(self, A: Any, b: ndarray, *, omega: float, x0: ndarray | None = None) -> Solution:
        """Solve A x = b with this omega, from x0 (default 0); the `Solution` says how many iterations it took."""


class TunedSolver:
    """Solve a sequence of related systems, learning omega on the way.

    The learner decides only how fast an answer comes, never how accurate it is: every omega runs to the solver's own
    tolerance.

    Args:
        solver: does the solves.
        bandit: chooses omega; its grid must lie in (0, 2).
        context: computes the learner's context from (A, b), for learners with context; or give it with each solve.
        cost: what a solve cost, from its solution. Default: iterations, and the iteration limit for a solve that did
            not converge, however soon it gave up.

    >>> import scipy.sparse as sp
    >>> from locally.solvers.omega_bandit import SOR, TsallisINF
    >>> A = sp.diags_array([-1.0, 2.1, -1.0], offsets=[-1, 0, 1], shape=(20, 20), format="csr")
    >>> tuned = TunedSolver(SOR(), TsallisINF(np.linspace(1, 1.9, 10), rng=0))
    >>> rng = np.random.default_rng(0)
    >>> found = [tuned.solve(A, rng.standard_normal(20)) for _ in range(200)]
    >>> all(f.converged for f in found)
    True
    >>> bool(sum(f.n_iter for f in found[100:]) < 0.9 * sum(f.n_iter for f in found[:100]))
    True
    """

    def __init__(
        self,
        solver: RelaxedSolver,
        bandit: ParameterBandit,
        *,
        context: Callable[[Any, ndarray], Real] | None = None,
        cost: Callable[[Solution], Real] | None = None,
    ) -> None:
        if not isinstance(bandit, ParameterBandit):
            raise TypeError(f"bandit must offer ask, tell, cancel and distribution, got {type(bandit).__name__}")
        if not ((bandit.grid > 0) & (bandit.grid < 2)).all():
            raise ValueError(f"grid of the bandit must lie in (0, 2), got [{bandit.grid.min()}, {bandit.grid.max()}]")
        self.solver, self.bandit = solver, bandit
        self.context, self.cost = context, cost or self._iterations

    def _iterations(self, solution: Solution) -> Real:
        return solution.n_iter if solution.converged else self.solver.max_iter

    def solve(
        self, A: Any, b: Float[ndarray, " n"], x0: Float[ndarray, " n"] | None = None, *, context: Real | None = None
    ) -> Solution:
        """Solve A x = b with the learner's omega and let it learn from what that cost.

        A solve that raises teaches nothing: its ask is withdrawn and the exception goes on.
        """
        if context is None and self.context is not None:
            context = self.context(A, b)
        choice = self.bandit.ask(context)
        try:
            solution = self.solver.solve(A, b, omega=choice.value, x0=x0)
            cost = self.cost(solution)
            self.bandit.tell(cost, choice)
        except BaseException:
            self.bandit.cancel(choice)
            raise
        return solution


@dataclass(frozen=True)
class TunedSequence:
    """What `tune_sequence` did: parameters, iterations and convergence of every solve, and the last solution."""

    omegas: Float[ndarray, " solves"]
    iterations: Int[ndarray, " solves"]
    converged: ndarray
    last: Solution

    @property
    def total_iterations(self) -> int:
        """Iterations of all solves together."""
        return int(self.iterations.sum())


def tune_sequence(
    problems: Iterable[tuple[Any, ndarray] | tuple[Any, ndarray, Real]],
    tuned: TunedSolver,
    *,
    warm_start: bool = False,
    callback: Callable[[int, Solution], None] | None = None,
) -> TunedSequence:
    """Solve (A, b) or (A, b, context) one after another.

    Args:
        problems: consumed one by one, the next only after the solve of the last; a time stepper is a generator that
            builds the next system from what `callback` handed it.
        tuned: solver and learner.
        warm_start: start each solve from the last solution.
        callback: sees (index, solution) after every solve.

    Raises:
        ValueError: there is no problem.

    >>> import scipy.sparse as sp
    >>> from locally.solvers.omega_bandit import SOR, ChebCB
    >>> T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(9, 9), format="csr")
    >>> problems = ((T + c * sp.eye_array(9, format="csr"), np.ones(9), c) for c in np.linspace(0, 1, 50))
    >>> done = tune_sequence(problems, TunedSolver(SOR(), ChebCB([1.0, 1.3, 1.6], (0, 1), rng=0)))
    >>> done.omegas.shape, bool(done.converged.all())
    ((50,), True)
    """
    solutions: list[tuple[float, int, bool]] = []
    solution: Solution | None = None
    for index, (A, b, *context) in enumerate(problems):
        x0 = solution.x if warm_start and solution is not None else None
        solution = tuned.solve(A, b, x0, context=context[0] if context else None)
        solutions.append((solution.omega, solution.n_iter, solution.converged))
        if callback is not None:
            callback(index, solution)
    if solution is None:
        raise ValueError("problems must hold at least one (A, b)")
    omegas, iterations, converged = zip(*solutions)
    return TunedSequence(np.array(omegas), np.array(iterations), np.array(converged), solution)
