"""Tree-based private SPIDER: small gradients of the population risk in a single pass over the data.

For streams and for large n, where every example may be touched once. Gradient estimates hang on a binary tree that is
walked depth first; a right child corrects its parent's estimate with a fresh batch, halved at every level. Batches are
disjoint, so releases compose in parallel. Source: arXiv 2206.00846, Algorithm 1 and Theorem 3.2.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

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


class VariationNoise(StrEnum):
    """What the noise of a right child is scaled by; both are public, the first is never larger."""

    DISTANCE = "distance"  # L1 times the distance that the walk has really moved since the parent
    PATH = "path"  # the longest possible walk, as in the paper


@dataclass(frozen=True, kw_only=True)
class PrivateTreeSpider:
    """Normalised steps at the leaves of binary trees of gradient estimates, every example used at most once.

    A round uses batch * (1 + depth / 2) examples and makes 2^depth steps. Adjacency is replacement: the assignment of
    examples to batches would have to be fixed by name to protect their number as well.

    Args:
        epsilon, delta: the budget of the whole run; epsilon > 0, 0 < delta < 1.
        noise_multipliers: instead of epsilon, noise / sensitivity of roots and of right children, each >= 0.
        depth: D >= 0. With 0, minibatch normalised descent.
        batch: b >= 2^depth, examples at a root; a right child at depth s takes b / 2^s.
        step: beta > 0; a leaf moves by beta / (2^(D/2) L1), whatever the size of its estimate.
        rounds: trees; by default as many as the data allow.
        stopping_level: return the first leaf whose released estimate is at most twice this; 0 never stops early. (The
            theorem's own level exceeds every gradient at practical sizes, so that the start would be returned.)
        variation_noise: see `VariationNoise`.
        accountant: how the single release is counted.
        keep_trace: return all leaves and their estimates as well; they are covered by the same guarantee.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type.

    References:
        arXiv 2206.00846, Algorithm 1.
    """

    delta: float
    epsilon: float | None = None
    noise_multipliers: tuple[float, float] | None = None
    depth: int
    batch: int
    step: float
    rounds: int | None = None
    stopping_level: float = 0.0
    variation_noise: VariationNoise = VariationNoise.DISTANCE
    accountant: Accountant = Accountant.RDP
    keep_trace: bool = False

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta, self.noise_multipliers, Adjacency.REPLACE, self.accountant)
        for multiplier in self.noise_multipliers or ():
            check_nonnegative("noise_multipliers", multiplier)
        check_count("depth", self.depth, at_least=0)
        check_count("batch", self.batch, at_least=2**self.depth)
        check_positive("step", self.step)
        if self.rounds is not None:
            check_count("rounds", self.rounds)
        check_nonnegative("stopping_level", self.stopping_level)
        check_choice("variation_noise", self.variation_noise, tuple(VariationNoise))

    @classmethod
    def for_problem(
        cls, objective: Objective, *, epsilon: float, delta: float, **others: object
    ) -> "PrivateTreeSpider":
        """Sizes of Theorem 3.2: b = max(n^(2/3), sqrt(n) d^(1/4) / sqrt(epsilon)), D 2^(D+1) <= b, and its step.

        The batch is then stretched so that whole rounds use up the data. `others` overrides.
        """
        check_positive("epsilon", epsilon)
        n, d, L0 = objective.size, objective.dimension, objective.lipschitz
        b = min(n, math.ceil(max(n ** (2 / 3), math.sqrt(n) * d**0.25 / math.sqrt(epsilon))))
        depth = 0
        while (depth + 1) * 2 ** (depth + 2) <= b and b * (1 + (depth + 1) / 2) <= n:
            depth += 1
        rounds = max(1, int(n / (b * (1 + depth / 2))))
        batch = max(2**depth, int(n / (rounds * (1 + depth / 2))))
        alpha = math.sqrt(2) * L0 * max(n ** (-1 / 3), math.sqrt(math.sqrt(d) / (n * epsilon)))
        beta = alpha * min(1.0, math.sqrt(b) * epsilon / math.sqrt(d))
        chosen: dict = {"depth": depth, "batch": batch, "step": beta, "rounds": rounds}
        return cls(epsilon=epsilon, delta=delta, **(chosen | others))

    @property
    def examples_per_round(self) -> int:
        """b for the root and b / 2^s for each of the 2^(s-1) right children at depth s."""
        return self.batch + sum(2 ** (s - 1) * self._batch_at(s) for s in range(1, self.depth + 1))

    def minimize(
        self,
        objective: Objective,
        w0: Start = None,
        *,
        rng: int | torch.Generator | Randomness | None = None,
        callback: Callback | None = None,
    ) -> PrivateResult:
        """Walk the trees from `w0` (default: the objective's own start, which does not depend on the data).

        Args:
            objective: the data, seen through bounded sums.
            w0: public start.
            rng: None draws from the operating system's secure source; a seed or generator makes the run repeatable.
            callback: `callback(leaf, iterate, norm of the leaf's estimate)`, leaves counted from 1.

        Returns:
            A uniformly drawn leaf, or the first one below the stopping level (`Status.STATIONARY`).

        Raises:
            ValueError: fewer examples than one round (or `rounds` rounds) use, or a bad `w0`.
        """
        w = objective.check_start(w0)
        rounds = self._rounds(objective.size)
        privacy = self.privacy_statement(objective)
        z_root, z_child = self._multipliers(privacy.mechanisms)
        randomness = as_randomness(rng)
        batches = self._batches(objective.size, rounds, randomness)
        leaves = 2**self.depth
        chosen = randomness.integer(0, rounds * leaves)
        stride = self.step / (2 ** (self.depth / 2) * objective.smoothness)

        points: list[Float[Tensor, " d"]] = []
        estimates: list[Float[Tensor, " d"]] = []
        answer, evaluations, status, leaf = w, 0, Status.FINISHED, 0
        for leaf, batch in enumerate(batches):
            at = leaf % leaves
            depth, size = self._depth_of(at), len(batch)
            if depth == 0:
                total = objective.gradient_sum(w, batch)
                estimate = noisy_mean(total, objective.lipschitz, size, z_root, Adjacency.REPLACE, randomness)
                path = [(w, estimate)] * (self.depth + 1)
            else:
                parent, parent_estimate = path[depth - 1]
                bound = self._difference_bound(objective, w, parent, depth, stride)
                total = objective.difference_sum(w, parent, bound, batch)
                estimate = parent_estimate + noisy_mean(total, bound, size, z_child, Adjacency.REPLACE, randomness)
                # Left descendants are copies of this node.
                path[depth:] = [(w, estimate)] * (self.depth + 1 - depth)
            evaluations += size if depth == 0 else 2 * size
            norm = float(torch.linalg.vector_norm(estimate))
            if not math.isfinite(norm):
                status, chosen = Status.DIVERGED, leaf
                break
            if self.keep_trace:
                points.append(w)
                estimates.append(estimate)
            if callback is not None:
                callback(leaf + 1, w, norm)
            if leaf == chosen:
                answer = w
            if self.stopping_level > 0 and norm <= 2 * self.stopping_level:
                status, chosen, answer = Status.STATIONARY, leaf, w
                break
            # The next root stands where the last leaf stood: its step has no successor within the tree.
            if at < leaves - 1 and norm > 0:
                w = w - (stride / norm) * estimate
        trace = Trace(stack_rows(points, w), stack_rows(estimates, w)) if self.keep_trace else None
        if status is Status.DIVERGED:
            answer = w
        return PrivateResult(answer, status, privacy, leaf + 1, evaluations, chosen, trace)

    def privacy_statement(self, objective: Objective) -> PrivacyStatement:
        """What a run on this objective will cost, with the noise that it will use; looks at no data."""
        rounds = self._rounds(objective.size)
        z_root, z_child = self.noise_multipliers or (1.0, 1.0)
        planned = [Mechanism("root gradient", z_root, 1, releases=rounds)]
        if self.depth:
            children = rounds * (2**self.depth - 1)
            planned.append(Mechanism("gradient difference to the parent", z_child, 1, releases=children))
        if self.epsilon is not None:
            # One example meets one release, so each is calibrated on its own.
            planned = [
                calibrate((m,), self.epsilon, self.delta, Adjacency.REPLACE, self.accountant)[0] for m in planned
            ]
        mechanisms = tuple(planned)
        composition = Composition.PARALLEL
        spent = spent_epsilon(mechanisms, self.delta, Adjacency.REPLACE, self.accountant, composition)
        return PrivacyStatement(
            spent, self.delta, Adjacency.REPLACE, self.accountant, composition, mechanisms, objective.assumptions
        )

    def _batches(self, n: int, rounds: int, randomness: Randomness) -> list[Int[Tensor, " b"]]:
        """Disjoint batches in the order of use, one for every leaf: that of the node which it ends the walk to."""
        sizes = [self._batch_at(self._depth_of(at)) for at in range(2**self.depth)] * rounds
        return list(randomness.permutation(n)[: sum(sizes)].split(sizes))

    def _depth_of(self, leaf: int) -> int:
        """Of the node whose left-most leaf this is, counted within its tree: the root, or a right child."""
        trailing_zeros = (leaf & -leaf).bit_length() - 1
        return self.depth - trailing_zeros if leaf else 0

    def _batch_at(self, depth: int) -> int:
        return max(1, self.batch // 2**depth)

    def _rounds(self, n: int) -> int:
        possible = n // self.examples_per_round
        wanted = 1 if self.rounds is None else self.rounds
        if possible < wanted:
            raise ValueError(
                f"{wanted} rounds of batch {self.batch} and depth {self.depth} use "
                f"{wanted * self.examples_per_round} examples, got {n}"
            )
        return possible if self.rounds is None else self.rounds

    def _difference_bound(
        self, objective: Objective, w: Float[Tensor, " d"], parent: Float[Tensor, " d"], depth: int, stride: float
    ) -> float:
        if self.variation_noise == VariationNoise.DISTANCE:
            return objective.difference_bound(float(torch.linalg.vector_norm(w - parent)))
        return objective.difference_bound(2 ** (self.depth - depth) * stride)

    def _multipliers(self, mechanisms: tuple[Mechanism, ...]) -> tuple[float, float]:
        return mechanisms[0].noise_multiplier, mechanisms[-1].noise_multiplier
