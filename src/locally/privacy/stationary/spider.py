"""Private SpiderBoost, and the noisy gradient descent that it improves on: small gradients of an empirical risk.

For whoever trains a smooth, possibly nonconvex model under central differential privacy. Full noise is paid at
occasional anchor gradients only; in between, gradient differences are released, whose sensitivity shrinks with the
distance moved. Source: arXiv 2206.00846, Algorithm 2 and Theorem B.3; noise from a numerical accountant.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_choice, check_count, check_nonnegative, check_positive
from locally.privacy.stationary.accounting import (
    Accountant,
    Adjacency,
    Composition,
    Mechanism,
    PrivacyStatement,
    Sampling,
    calibrate,
    check_budget,
    sampled,
    sampling_for,
    spent_epsilon,
)
from locally.privacy.stationary.objectives import Batch, Objective, Start
from locally.privacy.stationary.randomness import Randomness, as_randomness
from locally.privacy.stationary.result import PrivateResult, Status, Trace

Callback = Callable[[int, Float[Tensor, " d"], float], None]


class Output(StrEnum):
    """Which iterate is released as the answer; chosen by the caller."""

    UNIFORM = "uniform"  # a step drawn before the run: what the theorems are about
    LAST = "last"  # after the last step; no theorem is about it


@dataclass(frozen=True, kw_only=True)
class PrivateSpiderBoost:
    """Minimise a finite sum by recursive, noisy gradient estimates.

    Each anchor costs sensitivity 2 L0 / b1 (L0 / b1 under add/remove), each variation
    2 min(L1 ||w_t - w_{t-1}||, 2 L0) / b2. One step costs at most two passes over its batch.

    Args:
        epsilon, delta: the budget of the whole run; epsilon > 0, 0 < delta < 1.
        noise_multipliers: instead of epsilon, noise / sensitivity of anchors and of variations, each >= 0.
        steps: T >= 1, number of updates. phase: q >= 1, an anchor every q steps.
        learning_rate: eta > 0; by default 1 / (2 L1).
        anchor_batch, variation_batch: b1 and b2 >= 1, sampled afresh at each release; by default every example.
        split: share of the budget that goes to anchors, in (0, 1).
        weight_decay: gradient of a public term (weight_decay / 2) ||w||^2, added after the noise.
        adjacency, accountant: what is protected and how it is counted. Batches are drawn without replacement under
            (replace, RDP), by Poisson sampling otherwise.
        output: return a uniformly drawn iterate of w_1 ... w_T, or the last.
        keep_trace: return all iterates and estimates as well; they are covered by the same guarantee.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type.

    References:
        arXiv 2206.00846, Algorithm 2. The run stops at w_T: the last release of the published loop, which only serves
        an iterate that is never returned, is not made and not paid for.
    """

    delta: float
    epsilon: float | None = None
    noise_multipliers: tuple[float, float] | None = None
    steps: int
    phase: int
    learning_rate: float | None = None
    anchor_batch: int | None = None
    variation_batch: int | None = None
    split: float = 0.5
    weight_decay: float = 0.0
    adjacency: Adjacency = Adjacency.REPLACE
    accountant: Accountant = Accountant.RDP
    output: Output = Output.UNIFORM
    keep_trace: bool = False

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta, self.noise_multipliers, self.adjacency, self.accountant)
        for multiplier in self.noise_multipliers or ():
            check_nonnegative("noise_multipliers", multiplier)
        check_count("steps", self.steps)
        check_count("phase", self.phase)
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        for name in ("anchor_batch", "variation_batch"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_positive("split", self.split, below=1)
        check_nonnegative("weight_decay", self.weight_decay)
        check_choice("output", self.output, tuple(Output))

    @classmethod
    def for_problem(
        cls, objective: Objective, *, epsilon: float, delta: float, initial_gap: float, **others: object
    ) -> "PrivateSpiderBoost":
        """Sizes of Theorem B.3 for this problem; `initial_gap` is a public bound F0 on F(w_0) - inf F."""
        check_positive("epsilon", epsilon)
        check_positive("delta", delta, below=1)
        check_positive("initial_gap", initial_gap)
        sizes = theorem_sizes(
            objective.size, objective.dimension, epsilon, delta, objective.lipschitz, objective.smoothness, initial_gap
        )
        chosen: dict = {
            "steps": sizes.steps,
            "phase": sizes.phase,
            "variation_batch": sizes.variation_batch,
            "learning_rate": 1 / (2 * objective.smoothness),
        }
        return cls(epsilon=epsilon, delta=delta, **(chosen | others))

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
            objective: the data, seen through bounded sums.
            w0: public start.
            rng: None draws from the operating system's secure source; a seed or generator makes the run repeatable.
            callback: `callback(step, iterate, norm of the released estimate)` after every update.

        Returns:
            The private answer. A run whose estimate stops being finite ends with `Status.DIVERGED` and the last
            finite iterate.

        Raises:
            ValueError: `w0` has the wrong shape or is not finite, or a batch is larger than the data.

        >>> data = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> from locally.privacy.stationary.objectives import PerExampleObjective
        >>> mean = PerExampleObjective(lambda w, x: w - x, data, dimension=3, lipschitz=4.0, smoothness=1.0)
        >>> found = PrivateSpiderBoost(epsilon=1.0, delta=1e-5, steps=16, phase=8).minimize(mean, rng=0)
        >>> print(found.privacy)
        (1, 1e-05)-differentially private, adjacency: replace, adaptive sequential composition, accountant: rdp
          2 x Gaussian on anchor gradient, noise multiplier 8.091
          14 x Gaussian on gradient difference, noise multiplier 21.41
          assumes: per-example gradients clipped to 4, differences clipped to min(1 x distance moved, 8)
        """
        w = objective.check_start(w0)
        n, L0 = objective.size, objective.lipschitz
        b1, b2 = self._batches(n)
        privacy = self.privacy_statement(objective)
        z1, z2 = _multipliers(privacy.mechanisms)
        sampling = sampling_for(self.adjacency, self.accountant)
        randomness = as_randomness(rng)
        eta = 1 / (2 * objective.smoothness) if self.learning_rate is None else self.learning_rate
        # The output index is drawn before anything is seen, so it cannot depend on losses.
        chosen = randomness.integer(1, self.steps + 1) if self.output == Output.UNIFORM else self.steps

        previous = estimate = answer = w
        iterates, estimates, evaluations = [w], [], 0
        status, done = Status.FINISHED, self.steps
        for t in range(self.steps):
            if t % self.phase == 0:
                batch = draw_batch(randomness, n, b1, sampling)
                estimate = noisy_mean(objective.gradient_sum(w, batch), L0, b1, z1, self.adjacency, randomness)
                evaluations += b1
            else:
                # C_t depends on released iterates only, hence is public: the noise may be scaled by it.
                bound = objective.difference_bound(float(torch.linalg.vector_norm(w - previous)))
                batch = draw_batch(randomness, n, b2, sampling)
                difference = objective.difference_sum(w, previous, bound, batch)
                estimate = estimate + noisy_mean(difference, bound, b2, z2, self.adjacency, randomness)
                evaluations += 2 * b2
            following = w - eta * (estimate + self.weight_decay * w)
            if not bool(following.isfinite().all()):
                status, done, chosen, answer = Status.DIVERGED, t, t, w
                break
            previous, w = w, following
            if t + 1 == chosen:
                answer = w
            if self.keep_trace:
                iterates.append(w)
                estimates.append(estimate)
            if callback is not None:
                callback(t + 1, w, float(torch.linalg.vector_norm(estimate)))
        trace = Trace(torch.stack(iterates), stack_rows(estimates, w)) if self.keep_trace else None
        return PrivateResult(answer, status, privacy, done, evaluations, chosen, trace)

    def privacy_statement(self, objective: Objective) -> PrivacyStatement:
        """What a run on this objective will cost, with the noise that it will use; looks at no data."""
        n = objective.size
        b1, b2 = self._batches(n)
        sampling = sampling_for(self.adjacency, self.accountant)
        anchors = -(-self.steps // self.phase)
        variations = self.steps - anchors
        # In zCDP terms a release costs rate^2 / (2 z^2): with these weights anchors take the share `split`.
        z1 = min(b1 / n, 1) * math.sqrt(anchors / (self.split if variations else 1))
        z2 = min(b2 / n, 1) * math.sqrt(variations / (1 - self.split))
        if self.noise_multipliers is not None:
            z1, z2 = self.noise_multipliers
        planned = [sampled("anchor gradient", z1, anchors, b1, n, sampling)]
        if variations:
            planned.append(sampled("gradient difference", z2, variations, b2, n, sampling))
        return sequential_statement(
            tuple(planned), self.epsilon, self.delta, self.adjacency, self.accountant, objective
        )

    def _batches(self, n: int) -> tuple[int, int]:
        batches = []
        for name, batch in (("anchor_batch", self.anchor_batch), ("variation_batch", self.variation_batch)):
            if batch is not None and batch > n:
                raise ValueError(f"{name} must be at most the number of examples {n}, got {batch}")
            batches.append(n if batch is None else batch)
        return batches[0], batches[1]


@dataclass(frozen=True, kw_only=True)
class NoisyGradientDescent:
    """Gradient descent on noisy clipped gradients: DP-GD on all examples, DP-SGD on sampled batches.

    The baseline that Private SpiderBoost improves on, and the same loop with an anchor at every step. With
    `adjacency="add_remove"` and a batch size this is the DP-SGD of the common libraries: Poisson samples, noise on the
    sum, division by the expected batch size.

    Args:
        batch: expected batch size >= 1; by default every example.
        noise_multiplier: instead of epsilon, noise / sensitivity of one release, >= 0.
        learning_rate: by default 1 / (2 L1).
        epsilon, delta, steps, weight_decay, adjacency, accountant, output, keep_trace: as for `PrivateSpiderBoost`.
    """

    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    steps: int
    learning_rate: float | None = None
    batch: int | None = None
    weight_decay: float = 0.0
    adjacency: Adjacency = Adjacency.REPLACE
    accountant: Accountant = Accountant.RDP
    output: Output = Output.UNIFORM
    keep_trace: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None:
            check_count("batch", self.batch)
        if self.noise_multiplier is not None:
            check_nonnegative("noise_multiplier", self.noise_multiplier)
        self._as_spider()  # checks the rest

    def _as_spider(self) -> PrivateSpiderBoost:
        multiplier = self.noise_multiplier
        return PrivateSpiderBoost(
            epsilon=self.epsilon,
            delta=self.delta,
            noise_multipliers=None if multiplier is None else (multiplier, multiplier),
            steps=self.steps,
            phase=1,
            learning_rate=self.learning_rate,
            anchor_batch=self.batch,
            weight_decay=self.weight_decay,
            adjacency=self.adjacency,
            accountant=self.accountant,
            output=self.output,
            keep_trace=self.keep_trace,
        )

    def minimize(
        self,
        objective: Objective,
        w0: Start = None,
        *,
        rng: int | torch.Generator | Randomness | None = None,
        callback: Callback | None = None,
    ) -> PrivateResult:
        """As `PrivateSpiderBoost.minimize`."""
        return self._as_spider().minimize(objective, w0, rng=rng, callback=callback)

    def privacy_statement(self, objective: Objective) -> PrivacyStatement:
        """What a run on this objective will cost; looks at no data."""
        return self._as_spider().privacy_statement(objective)


@dataclass(frozen=True)
class Sizes:
    """Sizes of Private SpiderBoost with anchors on every example."""

    steps: int
    phase: int
    variation_batch: int


def theorem_sizes(
    n: int, d: int, epsilon: float, delta: float, lipschitz: float, smoothness: float, initial_gap: float
) -> Sizes:
    """T, q and b2 of Theorem B.3, clamped to what exists (1 <= q <= T, b2 <= n).

    Warns where n is below what the theorem asks for. The theorem's constants are not tuned: treat the sizes as a
    start. They do not depend on the data, so using them costs nothing.

    >>> theorem_sizes(10_000, 200, 1.0, 1e-5, 1.0, 1.0, 1.0)
    Sizes(steps=1235, phase=35, variation_batch=284)
    """
    abar = math.sqrt(d * math.log(1 / delta)) / (n * epsilon)
    curvature = math.sqrt(initial_gap * smoothness)  # sqrt(F0 L1), in the units of L0
    enough = max(
        (lipschitz * epsilon / curvature) ** 2 / (d * math.log(1 / delta)),
        math.sqrt(d) * max(1.0, curvature / lipschitz) / epsilon,
    )
    if n < enough:
        warnings.warn(f"Theorem B.3 asks for at least {enough:.0f} examples, got {n}", UserWarning, stacklevel=2)
    T = max(1, math.floor(max((math.sqrt(curvature) / (math.sqrt(lipschitz) * abar)) ** (4 / 3), 1 / abar)))
    phase = 1 / (T * abar**2)
    batch = max((lipschitz / (curvature * abar)) ** (2 / 3), n * (lipschitz * abar**2 / curvature) ** (1 / 3))
    return Sizes(T, min(max(1, math.floor(phase)), T), min(max(1, math.floor(batch)), n))


def noisy_mean(
    total: Float[Tensor, " d"],
    bound: float,
    batch: int,
    multiplier: float,
    adjacency: Adjacency,
    randomness: Randomness,
) -> Float[Tensor, " d"]:
    """The Gaussian mechanism on a sum of terms of norm at most `bound`, over the (expected) number of terms."""
    deviation = multiplier * adjacency.bounded_terms * bound
    return (total + deviation * randomness.normal(total)) / batch


def draw_batch(randomness: Randomness, n: int, size: int, sampling: Sampling) -> Batch:
    """Indices of one batch; None, meaning all, where no sampling is needed."""
    if size >= n:
        return None
    if sampling == Sampling.POISSON:
        return randomness.poisson_sample(n, size / n)
    return randomness.subset(n, size)


def sequential_statement(
    planned: tuple[Mechanism, ...],
    epsilon: float | None,
    delta: float,
    adjacency: Adjacency,
    accountant: Accountant,
    objective: Objective,
) -> PrivacyStatement:
    """Calibrate the planned mechanisms to `epsilon`, or keep their noise where it is None, and state the cost."""
    if epsilon is not None:
        planned = calibrate(planned, epsilon, delta, adjacency, accountant)
    spent = spent_epsilon(planned, delta, adjacency, accountant)
    assumptions = objective.assumptions
    if adjacency == Adjacency.ADD_REMOVE:
        assumptions += (f"batch sizes and the nominal number of examples {objective.size} are public constants",)
    return PrivacyStatement(spent, delta, adjacency, accountant, Composition.SEQUENTIAL, planned, assumptions)


def stack_rows(rows: list[Float[Tensor, " d"]], like: Float[Tensor, " d"]) -> Float[Tensor, "m d"]:
    return torch.stack(rows) if rows else like.new_zeros((0, len(like)))


def _multipliers(mechanisms: tuple[Mechanism, ...]) -> tuple[float, float]:
    by_kind = {m.what: m.noise_multiplier for m in mechanisms}
    return by_kind["anchor gradient"], by_kind.get("gradient difference", 0.0)
