"""What every solver of this folder shares: when to stop, what was spent, and the residual that is reported.

The residual is the natural one, ||u - J_{rho G}(u - rho F(u))|| / rho, always with the true F; it is zero exactly at
solutions and never exceeds the distance from 0 to F(u) + G(u). Cost is counted in component evaluations: a full
evaluation counts n, a difference of a batch of b counts 2 b, and evaluations for the residual count like all others.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_count, check_nonnegative, check_positive
from locally.equilibrium.halpern.operators import Constants, FiniteSumOperator
from locally.equilibrium.halpern.resolvents import Resolvent, ResolventLike, Unconstrained
from locally.equilibrium.halpern.stepping import Steps, bind, norm, steps_for

DIVERGENCE = 1e3  # residual over the first one at which a run is given up


class Status(StrEnum):
    """How a run ended; set by every solver of this room, read from `Solution.status`."""

    CONVERGED = "converged"
    BUDGET_SPENT = "budget of evaluations or iterations spent before the tolerance was met"
    DIVERGING = "diverging: step too long, or the operator is not what the method needs"
    STOPPED = "stopped by the callback"


@dataclass(frozen=True)
class Progress:
    """What a callback sees, at every point where the true residual is known; returning True ends the run."""

    iteration: int
    evaluations: int
    residual: float
    x: Any  # (dim,), a copy


Callback = Callable[[Progress], bool | None]


@dataclass(frozen=True)
class Solution:
    """Last iterate and what it cost.

    Attributes:
        x: (dim,), of the kind and dtype of the start.
        status: how the run ended.
        residual: natural residual at x, from the true F.
        inclusion_residual: ||F(x) + g|| for the g in G(x) that the last resolvent step yields, which is what the
            theorems bound and is never below `residual`; equal to it where G = 0, NaN where no step was made.
        iterations: anchored (outer) steps.
        evaluations: component evaluations, all counted.
        full_passes: how many full evaluations are among them.
        restarts: how often the anchor was moved.
        history: (evaluations so far, residual) wherever the true residual was known.
    """

    x: Any
    status: Status
    residual: float
    inclusion_residual: float
    iterations: int
    evaluations: int
    full_passes: int
    restarts: int
    history: Float[ndarray, "records 2"]

    @property
    def success(self) -> bool:
        """Whether the status is CONVERGED."""
        return self.status is Status.CONVERGED

    def residual_after(self, evaluations: float | int) -> float:
        """Last known residual at that cost, NaN before the first."""
        known = int(np.searchsorted(self.history[:, 0], evaluations, side="right"))
        return float(self.history[known - 1, 1]) if known else float("nan")

    def evaluations_to(self, residual: float) -> float:
        """Cost at which the residual was first at most this, infinite if it never was."""
        below = np.flatnonzero(self.history[:, 1] <= residual)
        return float(self.history[below[0], 0]) if below.size else float("inf")


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Base of every solver: limits, checks of the problem, `solve`.

    Args:
        L: constant that the default step is computed from, by default from the operator.
        eta: step size; overrides the default.
        tol: residual at which to stop, >= 0 (0: run until the budget is spent).
        max_epochs: budget in full evaluations (n component evaluations each), at least 2, may be infinite.
        max_iterations: budget in steps, None for no limit.
        residual_step: rho of the natural residual, > 0.

    Raises:
        TypeError, ValueError: a parameter is out of range.
    """

    L: float | None = None
    eta: float | None = None
    tol: float = 1e-6
    max_epochs: float | int = 1000
    max_iterations: int | None = None
    residual_step: float = 1.0

    def __post_init__(self) -> None:
        for name in ("L", "eta"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_nonnegative("tol", self.tol)
        if not self.max_epochs >= 2:  # also where it is NaN
            raise ValueError(f"max_epochs must be at least 2, got {self.max_epochs}")
        if self.max_iterations is not None:
            check_count("max_iterations", self.max_iterations)
        check_positive("residual_step", self.residual_step)

    def solve(
        self,
        op: FiniteSumOperator,
        u0: Any,
        *,
        resolvent: ResolventLike | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Find u with 0 in F(u) + G(u).

        Args:
            op: F.
            u0: (dim,), the start (and anchor): array-like for NumPy operators, a torch tensor for torch operators.
            resolvent: (z, eta) -> J_{eta G}(z), by default the operator's own.
            callback: sees a `Progress` wherever the residual is known; returning True ends the run.

        Raises:
            TypeError, ValueError: the start does not fit the operator, or no constant is known and neither L nor eta is
                given.
        """
        ledger, u = self.open(op, u0, resolvent, callback)
        with np.errstate(over="ignore", invalid="ignore"):  # a run that overflows ends as diverging
            return self._run(ledger, op, u)

    @abstractmethod
    def _run(self, ledger: "Ledger", op: FiniteSumOperator, u: Any) -> Solution: ...

    def open(
        self, op: FiniteSumOperator, u0: Any, resolvent: ResolventLike | None = None, callback: Callback | None = None
    ) -> tuple["Ledger", Any]:
        """Check the problem: its ledger and a copy of the start."""
        if not isinstance(op, FiniteSumOperator):
            raise TypeError(f"op must be a FiniteSumOperator, got {type(op).__name__}")
        J = resolvent if resolvent is not None else op.resolvent or Unconstrained()
        if not callable(J):
            raise TypeError(f"resolvent must be callable as (z, eta), got {type(J).__name__}")
        if isinstance(J, Resolvent):
            J.pieces(op.dim)
        return Ledger(self, op, J, callback), op.start(u0)

    def constant(self, op: FiniteSumOperator, which: Callable[[Constants], float]) -> float:
        """L, or what `which` takes from the operator's constants."""
        if self.L is not None:
            return self.L
        known = op.constants()
        if known is None:
            raise ValueError(f"{type(op).__name__} does not know its constants: L (and with it eta) must be given")
        return which(known)


class Ledger:
    """Counts evaluations, keeps the history and decides when a run is over."""

    def __init__(self, limits: Solver, op: FiniteSumOperator, J: ResolventLike, callback: Callback | None) -> None:
        self.limits, self.op, self.callback = limits, op, callback
        self.budget = limits.max_epochs * op.n
        self.evaluations = self.full_passes = self.iterations = self.restarts = 0
        self.history: list[tuple[int, float]] = []
        self.inclusion_residual = float("nan")
        self.J = bind(J, op)
        self.steps: Steps = steps_for(op, J)
        self._free = isinstance(J, Unconstrained)

    @property
    def residual(self) -> float:
        return self.history[-1][1]

    def full(self, u: Any) -> Any:
        self.evaluations += self.op.n
        self.full_passes += 1
        return self.op.full(u)

    @property
    def iterations_left(self) -> int:
        limit = self.limits.max_iterations
        return sys.maxsize if limit is None else limit - self.iterations

    def affords(self, evaluations: int) -> bool:
        """Whether that much can be spent with enough left to know the residual at the end."""
        return self.iterations_left > 0 and self.evaluations + evaluations + self.op.n <= self.budget

    def affordable(self, count: int, cost: int) -> int:
        """As many of `count` steps at that cost as leave enough to know the residual at the end."""
        left = self.budget - self.evaluations - self.op.n
        return count if count * cost <= left else max(int(left // cost), 0)

    def check(self, u: Any, F_u: Any, argument: Any = None, eta: float = 1.0) -> Status | None:
        """Record the residual at u, where F_u = F(u) and u = J_{eta G}(argument); a status ends the run."""
        rho = self.limits.residual_step
        residual = norm(u - self.J(u - rho * F_u, rho)) / rho
        if argument is not None:
            self.inclusion_residual = norm(F_u + (argument - u) / eta)
        self.history.append((self.evaluations, residual))
        asked_to_stop = self.callback is not None and self.callback(
            Progress(self.iterations, self.evaluations, residual, u + 0)
        )
        if residual <= self.limits.tol:
            return Status.CONVERGED
        if not residual <= DIVERGENCE * self.history[0][1]:
            return Status.DIVERGING
        return Status.STOPPED if asked_to_stop else None

    def close(self, u: Any, status: Status) -> Solution:
        inclusion = self.residual if self._free else self.inclusion_residual
        return Solution(
            x=u,
            status=status,
            residual=self.residual,
            inclusion_residual=inclusion,
            iterations=self.iterations,
            evaluations=self.evaluations,
            full_passes=self.full_passes,
            restarts=self.restarts,
            history=np.array(self.history),
        )
