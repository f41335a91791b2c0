"""Recursive regularisation: the optimal rate for small gradients of convex population risks, under privacy.

Each round solves a little more strongly regularised problem on a fresh part of the data, with either of two private
solvers: noisy projected gradient descent (optimal rate) or phased SGD (one pass). Parts are disjoint, so rounds
compose in parallel. Source: arXiv 2206.00846, Algorithm 3 and Theorem 5.1.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.checks import check_choice, check_count, check_nonnegative, check_positive
from locally.privacy.stationary.accounting import (
    Accountant,
    Adjacency,
    Composition,
    Mechanism,
    PrivacyStatement,
    calibrate,
    check_budget,
    spent_epsilon,
)
from locally.privacy.stationary.objectives import Objective, Start
from locally.privacy.stationary.randomness import Randomness, as_randomness
from locally.privacy.stationary.result import PrivateResult, Status, Trace
from locally.privacy.stationary.spider import Callback, noisy_mean, stack_rows


class Solver(StrEnum):
    """The private solver of each regularised problem."""

    NOISY_GD = "noisy_gd"  # every step releases a noisy mean gradient of the part
    PHASED_SGD = "phased_sgd"  # one pass; only the averages of the phases are released


class Plan(NamedTuple):
    """What is known of a round before it runs, and depends on no data."""

    examples: int
    modulus: float  # mu = lambda_0 + ... + lambda_{t-1}: how strongly convex its problem is
    radius: float
    wanted_steps: int  # of noisy gradient descent, by its analysis
    steps: int


@dataclass(frozen=True)
class Round:
    """One regularised problem: min F(w) + sum_k strengths[k]/2 ||w - centres[k]||^2 on one part of the data.

    Attributes:
        modulus: the sum of the strengths.
        pull: sum_k strengths[k] centres[k], so that the regulariser's gradient is modulus * w - pull.
        centre, radius: the ball in which it is solved.
        start: where its solver starts, the answer of the round before.
    """

    part: Int[Tensor, " m"]
    modulus: float
    pull: Float[Tensor, " d"]
    centre: Float[Tensor, " d"]
    radius: float
    start: Float[Tensor, " d"]

    def step(self, w: Float[Tensor, " d"], gradient: Float[Tensor, " d"], eta: float) -> Float[Tensor, " d"]:
        """Projection of w - eta (gradient of the data + gradient of the regulariser)."""
        moved = (1 - eta * self.modulus) * w + eta * (self.pull - gradient)
        away = moved - self.centre
        norm = float(torch.linalg.vector_norm(away))
        return moved if norm <= self.radius else self.centre + (self.radius / norm) * away


@dataclass(frozen=True, kw_only=True)
class RecursiveRegularization:
    """Stationary points of convex population risks.

    Adjacency is replacement. Round t = 1, ..., T works on n / T examples within the ball of radius 2^(t/2) R about
    the start and adds a regulariser of strength 2^t lambda about its own answer.

    Args:
        epsilon, delta: the budget of the whole run; epsilon > 0, 0 < delta < 1.
        noise_multiplier: instead of epsilon, noise / sensitivity of one release, >= 0.
        radius: R > 0, a public bound on the distance from the start to a minimiser.
        solver: see `Solver`. Phased SGD is private only because the steps on a convex, smooth loss do not expand, so
            it refuses objectives that are not convex by construction.
        strength: lambda > 0; by default L0^2 / (L1 R^2) max(1/n, d log(1/delta) / (n epsilon)^2).
        rounds: T >= 1; by default floor(log2(L1 / lambda)), at least 1.
        max_steps: limit on the steps of noisy gradient descent in one round; below what the analysis asks for, the
            result says `Status.STEP_LIMIT`.
        accountant: how releases are counted.
        keep_trace: return the answers of all rounds as well; they are covered by the same guarantee.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type.

    References:
        arXiv 2206.00846, Algorithm 3.
    """

    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    radius: float
    solver: Solver = Solver.NOISY_GD
    strength: float | None = None
    rounds: int | None = None
    max_steps: int = 2000
    accountant: Accountant = Accountant.RDP
    keep_trace: bool = False

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta, self.noise_multiplier, Adjacency.REPLACE, self.accountant)
        if self.noise_multiplier is not None:
            check_nonnegative("noise_multiplier", self.noise_multiplier)
            if self.strength is None:
                raise ValueError("strength must be given together with noise_multiplier: its default needs epsilon")
        check_positive("radius", self.radius)
        check_choice("solver", self.solver, tuple(Solver))
        if self.strength is not None:
            check_positive("strength", self.strength)
        if self.rounds is not None:
            check_count("rounds", self.rounds)
        check_count("max_steps", self.max_steps)

    def minimize(
        self,
        objective: Objective,
        w0: Start = None,
        *,
        rng: int | torch.Generator | Randomness | None = None,
        callback: Callback | None = None,
    ) -> PrivateResult:
        """Run from `w0` (default: the objective's own start, which does not depend on the data).

        Args:
            objective: a sum of convex losses, seen through bounded sums.
            w0: public start and centre of the balls.
            rng: None draws from the operating system's secure source; a seed or generator makes the run repeatable.
            callback: `callback(round, its answer, distance moved by the round)` after every round.

        Raises:
            ValueError: fewer examples than rounds, a bad `w0`, or an objective that is not convex by construction.
        """
        start = objective.check_start(w0)
        if not objective.convex:
            raise ValueError("objective must be convex by construction, got one that is not (or is clipped)")
        randomness = as_randomness(rng)
        strength = self._strength(objective)
        plans = self._plans(objective)
        privacy = self.privacy_statement(objective)
        parts = randomness.permutation(objective.size).split([plan.examples for plan in plans])

        answers, pull = [start], strength * start
        evaluations, steps, status = 0, 0, Status.FINISHED
        for t, (part, plan, mechanism) in enumerate(zip(parts, plans, privacy.mechanisms, strict=True), start=1):
            task = Round(part, plan.modulus, pull, start, plan.radius, answers[-1])
            z = mechanism.noise_multiplier
            if self.solver == Solver.NOISY_GD:
                found, used = noisy_projected_descent(objective, task, plan.steps, z, randomness), plan.steps
                evaluations += used * len(part)
                if plan.steps < plan.wanted_steps:
                    status = Status.STEP_LIMIT
            else:
                found, used = phased_sgd(objective, task, z, randomness)
                evaluations += used
            steps += used
            if not bool(found.isfinite().all()):
                status = Status.DIVERGED
                break
            if callback is not None:
                callback(t, found, float(torch.linalg.vector_norm(found - answers[-1])))
            answers.append(found)
            pull = pull + 2**t * strength * found
        trace = Trace(torch.stack(answers), stack_rows([], start)) if self.keep_trace else None
        return PrivateResult(answers[-1], status, privacy, steps, evaluations, len(answers) - 1, trace)

    def privacy_statement(self, objective: Objective) -> PrivacyStatement:
        """What a run on this objective will cost, with the noise that it will use; looks at no data."""
        planned = []
        for t, plan in enumerate(self._plans(objective), start=1):
            if self.solver == Solver.NOISY_GD:
                count, what = plan.steps, f"mean gradient of part {t}"
            else:
                # An example lies in one phase, so it meets one release however many phases there are.
                count, what = 1, f"average iterates of the phases on part {t}"
            relative = math.sqrt(count) if self.noise_multiplier is None else self.noise_multiplier
            releases = count if self.solver == Solver.NOISY_GD else len(phase_sizes(plan.examples))
            mechanism = Mechanism(what, relative, count, releases=releases)
            if self.epsilon is not None:
                # Parts are disjoint: each has the whole budget.
                (mechanism,) = calibrate((mechanism,), self.epsilon, self.delta, Adjacency.REPLACE, self.accountant)
            planned.append(mechanism)
        mechanisms = tuple(planned)
        composition = Composition.PARALLEL
        spent = spent_epsilon(mechanisms, self.delta, Adjacency.REPLACE, self.accountant, composition)
        assumptions = objective.assumptions
        if self.solver == Solver.PHASED_SGD:
            assumptions += (f"every loss is convex and {objective.smoothness:.4g}-smooth",)
        return PrivacyStatement(
            spent, self.delta, Adjacency.REPLACE, self.accountant, composition, mechanisms, assumptions
        )

    def _strength(self, objective: Objective) -> float:
        if self.strength is not None:
            return self.strength
        assert self.epsilon is not None  # the constructor asks for a strength otherwise
        n, d = objective.size, objective.dimension
        # sqrt(lambda L1) R is then the target rate L0 (1/sqrt(n) + sqrt(d log(1/delta)) / (n epsilon)).
        rate = max(1 / n, d * math.log(1 / self.delta) / (n * self.epsilon) ** 2)
        return objective.lipschitz**2 / (objective.smoothness * self.radius**2) * rate

    def _rounds(self, objective: Objective, strength: float) -> int:
        doublings = math.floor(math.log2(objective.smoothness / strength)) if strength < objective.smoothness else 1
        T = self.rounds if self.rounds is not None else min(max(1, doublings), objective.size)
        if objective.size < T:
            raise ValueError(f"rounds must be at most the number of examples {objective.size}, got {T}")
        return T

    def _plans(self, objective: Objective) -> list[Plan]:
        """K = max(kappa log kappa, (m epsilon)^2 (L0^2 + G^2) / (d L0^2 log(1/delta))); the second needs an epsilon.

        G bounds the gradient of the regulariser on the ball that the round works in.
        """
        strength, L0 = self._strength(objective), objective.lipschitz
        T = self._rounds(objective, strength)
        plans = []
        for t in range(1, T + 1):
            m = objective.size // T + (t <= objective.size % T)
            modulus, radius = (2**t - 1) * strength, 2 ** (t / 2) * self.radius
            kappa = (objective.smoothness + modulus) / modulus
            wanted = kappa * max(1.0, math.log(kappa))
            if self.epsilon is not None:
                G = 2 * modulus * radius
                noise_limit = (m * self.epsilon) ** 2 / (objective.dimension * math.log(1 / self.delta))
                wanted = max(wanted, noise_limit * (1 + (G / L0) ** 2))
            K = max(2, math.ceil(wanted))
            plans.append(Plan(m, modulus, radius, K, min(K, self.max_steps)))
        return plans


def noisy_projected_descent(
    objective: Objective, task: Round, steps: int, multiplier: float, randomness: Randomness
) -> Float[Tensor, " d"]:
    """Projected descent with noisy data gradients, averaged by weights (1 - eta mu)^(-k)."""
    mu = task.modulus
    eta = min(math.log(max(steps, 2)) / (mu * steps), 1 / (objective.smoothness + mu))
    decay = 1 - eta * mu
    w, average, weight = task.start, torch.zeros_like(task.start), 0.0
    for _ in range(steps):
        total = objective.gradient_sum(w, task.part)
        data = noisy_mean(total, objective.lipschitz, len(task.part), multiplier, Adjacency.REPLACE, randomness)
        w = task.step(w, data, eta)
        # average = sum_k decay^(steps-k) w_k / sum_k decay^(steps-k), without the overflow of decay^(-k)
        weight = decay * weight + 1
        average = torch.lerp(average, w, 1 / weight)
    return average


def phased_sgd(
    objective: Objective, task: Round, multiplier: float, randomness: Randomness
) -> tuple[Float[Tensor, " d"], int]:
    """Phases of one-pass projected SGD on halving parts, each average released with noise of its own.

    Replacing one example of a phase moves one step by at most 2 eta L0, and later steps do not expand (eta is at most
    1 / (L1 + mu)), so every average of the phase moves by at most that.

    Returns the last released average and the number of steps.
    """
    mu, m = task.modulus, len(task.part)
    eta_0 = min(math.log(max(m, 2)) / (mu * m), 1 / (objective.smoothness + mu))
    w, used = task.start, 0
    for k, size in enumerate(phase_sizes(m), start=1):
        eta = eta_0 * 4.0**-k
        decay = 1 - eta * mu
        average, weight = torch.zeros_like(w), 0.0
        for i in task.part[used : used + size].split(1):
            w = task.step(w, objective.gradient_sum(w, i), eta)
            weight = decay * weight + 1
            average = torch.lerp(average, w, 1 / weight)
        used += size
        w = average + multiplier * 2 * eta * objective.lipschitz * randomness.normal(average)
    return w, used


def phase_sizes(m: int) -> list[int]:
    """floor(m / 2^k), k = 1, 2, ...: the parts of ceil(log2 m) phases, at least one example each."""
    sizes = [m >> k for k in range(1, m.bit_length())]
    return [s for s in sizes if s > 0] or [m]
