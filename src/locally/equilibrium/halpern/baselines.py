"""The methods that variance-reduced Halpern iteration is measured against, on the same operators and with one count.

All are written with the same care: compiled steps where the operator allows, a residual that costs nothing extra.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from locally.equilibrium.halpern.iterations import RandomState
from locally.equilibrium.halpern.ledger import Ledger, Solution, Solver, Status
from locally.equilibrium.halpern.operators import FiniteSumOperator


@dataclass(frozen=True, kw_only=True)
class Halpern(Solver):
    """Deterministic Halpern iteration u <- J(lambda u0 + (1 - lambda) u - eta F(u)), lambda = 2 / (k + 4).

    For cocoercive F; default eta = 1 / L_F. One full evaluation a step.
    """

    def _run(self, ledger: Ledger, op: FiniteSumOperator, u: Any) -> Solution:
        eta = self.eta or 1 / self.constant(op, lambda c: c.lipschitz)
        anchor, argument = u, None
        while True:
            F = ledger.full(u)
            status = ledger.check(u, F, argument, eta)
            if status is not None or not ledger.affords(0):
                return ledger.close(u, status or Status.BUDGET_SPENT)
            u, argument = ledger.steps.anchored(anchor, u, F, ledger.iterations, eta)
            ledger.iterations += 1


@dataclass(frozen=True, kw_only=True)
class Extragradient(Solver):
    """Korpelevich's extragradient method; default eta = 1 / (sqrt(2) L_F). Two full evaluations a step.

    The limit of the theory, 1 / L_F, leaves the fastest component of the error as it is; this step shrinks it most on
    skew-symmetric operators and well on symmetric ones.
    """

    def _run(self, ledger: Ledger, op: FiniteSumOperator, u: Any) -> Solution:
        return _extragradient(self, ledger, op, u, anchored=False)


@dataclass(frozen=True, kw_only=True)
class AnchoredExtragradient(Solver):
    """Extra anchored gradient (Yoon and Ryu, ICML 2021), lambda = 1 / (k + 2); default eta = 1 / (8 L_F).

    Two full evaluations a step. The theory asks for eta <= 1 / (8 L_F); longer steps usually work and are faster.
    """

    def _run(self, ledger: Ledger, op: FiniteSumOperator, u: Any) -> Solution:
        return _extragradient(self, ledger, op, u, anchored=True)


@dataclass(frozen=True, kw_only=True)
class VarianceReducedExtragradient(Solver):
    """Loopless variance-reduced extragradient (Alacaoglu and Malitsky, COLT 2022), snapshot probability 1 / n.

    Default eta = 0.99 sqrt(p) / L_Q with p = min(1/n, 1/2). Two component evaluations a step, n with probability p.

    Args:
        random_state: seed or generator.
    """

    random_state: RandomState = None

    def _run(self, ledger: Ledger, op: FiniteSumOperator, u: Any) -> Solution:
        p = min(1 / op.n, 0.5)
        gamma = self.eta or 0.99 * math.sqrt(p) / self.constant(op, lambda c: c.expected)
        rng = np.random.default_rng(self.random_state)
        argument = None
        while True:
            # here u is the new snapshot, where the residual is free
            F_w = ledger.full(u)
            status = ledger.check(u, F_w, argument, gamma)
            if status is not None or not ledger.affords(2):
                return ledger.close(u, status or Status.BUDGET_SPENT)
            count = min(ledger.affordable(int(rng.geometric(p)), 2), ledger.iterations_left)
            u, argument = ledger.steps.extragradient(u, u, F_w, gamma, 1 - p, op.draw(rng, count, 1))
            ledger.iterations += count
            ledger.evaluations += 2 * count


def _extragradient(solver: Solver, ledger: Ledger, op: FiniteSumOperator, u: Any, anchored: bool) -> Solution:
    eta = solver.eta or 1 / ((8 if anchored else math.sqrt(2)) * solver.constant(op, lambda c: c.lipschitz))
    anchor, argument = u, None
    while True:
        F = ledger.full(u)
        status = ledger.check(u, F, argument, eta)
        if status is not None or not ledger.affords(op.n):
            return ledger.close(u, status or Status.BUDGET_SPENT)
        pull = 1 / (ledger.iterations + 2) if anchored else 0.0
        base = pull * anchor + (1 - pull) * u
        half = ledger.J(base - eta * F, eta)
        argument = base - eta * ledger.full(half)
        u = ledger.J(argument, eta)
        ledger.iterations += 1
