"""Finite Markov decision processes as arrays: continuing and episodic, with features where they are linear."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_choice, check_count
from locally.control.dynamic_programming import (
    AverageRewardSolution,
    EpisodicSolution,
    occupancy_measures,
    solve_average_reward,
    solve_episodic,
)
from locally.control.validity import TOLERANCE, check_kernel, check_unit_ball, check_unit_interval

RewardNoise = Literal["bernoulli", "none"]


class FiniteProcess:
    """What finite processes share: P[..., s, a, s'] and the distribution of the first state."""

    P: Float[ndarray, "*layers S A S"]
    start: Float[ndarray, " S"]

    @property
    def n_states(self) -> int:
        """S."""
        return self.P.shape[-1]

    @property
    def n_actions(self) -> int:
        """A."""
        return self.P.shape[-2]

    def _check_dynamics(self) -> None:
        """Transitions and start are distributions; a start that was left out is state 0."""
        if self.start is None:
            object.__setattr__(self, "start", np.eye(self.n_states)[0])
        check_kernel("P", self.P)
        check_kernel("start", self.start)


class LayeredProcess(FiniteProcess):
    """P[h, s, a, s'], one kernel a layer."""

    @property
    def horizon(self) -> int:
        """H, steps of an episode."""
        return self.P.shape[0]


@dataclass(frozen=True, eq=False)
class ContinuingMDP(FiniteProcess):
    """Never resets; judged by its average reward.

    Args:
        P: P[s, a, s'], transition probabilities.
        R: mean rewards in [0, 1].
        start: distribution of the first state; state 0 by default.
        features: phi(s, a) with norm at most 1. In a linear process P and R are linear in them.
        mixture: mixture[s, a, s', i] = P_i(s' | s, a), kernels of which P is a convex combination.
        noise: rewards are drawn from Bernoulli(R), or equal R.

    Raises:
        ValueError: an argument is no distribution or lies outside its range.

    >>> P = np.array([[[0.5, 0.5]], [[1.0, 0.0]]])
    >>> round(ContinuingMDP(P, np.array([[0.0], [0.9]])).solve().gain, 6)
    0.3
    """

    P: Float[ndarray, "S A S"]
    R: Float[ndarray, "S A"]
    start: Float[ndarray, " S"] = field(default=None)  # type: ignore[arg-type]
    features: Float[ndarray, "S A d"] | None = None
    mixture: Float[ndarray, "S A S k"] | None = None
    noise: RewardNoise = "bernoulli"

    def __post_init__(self) -> None:
        self._check_dynamics()
        check_unit_interval("R", self.R)
        check_choice("noise", self.noise, ("bernoulli", "none"))
        if self.features is not None:
            check_unit_ball("features", self.features)
        if self.mixture is not None:
            check_kernel("mixture, its last axis moved to the front,", np.moveaxis(self.mixture, -1, 0))

    @cached_property
    def cumulative(self) -> Float[ndarray, "S A S"]:
        """Distribution functions over s', for sampling by one uniform number."""
        return _cumulative(self.P)

    @cached_property
    def _solution(self) -> AverageRewardSolution:
        return solve_average_reward(self.P, self.R)

    def solve(self) -> AverageRewardSolution:
        """Exact gain, bias, span and policy, found once. O(S^3 + S^2 A) a round of policy iteration."""
        return self._solution


@dataclass(frozen=True, eq=False)
class EpisodicMDP(LayeredProcess):
    """H layers, then a new start. Arrays as in `locally.control.dynamic_programming`.

    Args:
        P: P[h, s, a, s']; the last layer's leads to the state that is seen when the episode is over.
        R: mean rewards R[h, s, a] in [0, 1].
        start: distribution of the first state; state 0 by default.
        features: phi[h, s, a] with norm at most 1.
        measures: mu[h, i, s'] with P = features @ measures, in a linear process.
        noise: rewards are drawn from Bernoulli(R), or equal R.

    Raises:
        ValueError: an argument is no distribution or lies outside its range, or P is not features @ measures.

    >>> mdp = EpisodicMDP(np.ones((1, 1, 2, 1)), np.array([[[0.25, 0.75]]]))
    >>> mdp.solve().value
    0.75
    """

    P: Float[ndarray, "H S A S"]
    R: Float[ndarray, "H S A"]
    start: Float[ndarray, " S"] = field(default=None)  # type: ignore[arg-type]
    features: Float[ndarray, "H S A d"] | None = None
    measures: Float[ndarray, "H d S"] | None = None
    noise: RewardNoise = "bernoulli"

    def __post_init__(self) -> None:
        self._check_dynamics()
        check_unit_interval("R", self.R)
        check_choice("noise", self.noise, ("bernoulli", "none"))
        if self.features is not None:
            check_unit_ball("features", self.features)
        if self.features is not None and self.measures is not None:
            gap = np.abs(np.einsum("hsad,hdt->hsat", self.features, self.measures) - self.P).max()
            if gap > TOLERANCE:
                raise ValueError(f"P must be features @ measures, but they differ by up to {gap:.3g}")

    @cached_property
    def cumulative(self) -> Float[ndarray, "H S A S"]:
        """Distribution functions over s', for sampling by one uniform number."""
        return _cumulative(self.P)

    def solve(self) -> EpisodicSolution:
        """Exact optimal values and policy. O(H S^2 A)."""
        return solve_episodic(self.P, self.R, self.start)

    def values(self, policy: Float[ndarray, "*batch H S A"]) -> Float[ndarray, "*batch"]:
        """Expected sum of rewards of stochastic policies, many at once. O(H S^2 A) each."""
        return np.asarray((occupancy_measures(self.P, policy, self.start) * self.R).sum(axis=(-3, -2, -1)))


@dataclass(frozen=True)
class Episodes:
    """n episodes side by side: what was at layer h of each. Rewards are drawn; next_states[:, h] is at layer h + 1."""

    states: Int[ndarray, "n H"]
    actions: Int[ndarray, "n H"]
    rewards: Float[ndarray, "n H"]
    next_states: Int[ndarray, "n H"]


def sample_episodes(mdp: EpisodicMDP, policy: Float[ndarray, "H S A"], n: int, rng: np.random.Generator) -> Episodes:
    """Play a stochastic policy in n episodes at once. O(n H (S + A)).

    Raises:
        ValueError: policy is no distribution over actions, or n < 1.

    >>> mdp = EpisodicMDP(np.ones((2, 1, 2, 1)), np.ones((2, 1, 2)))
    >>> sample_episodes(mdp, np.full((2, 1, 2), 0.5), 3, np.random.default_rng(0)).rewards.sum(axis=1)
    array([2., 2., 2.])
    """
    check_kernel("policy", policy)
    check_count("n", n)
    states, actions, following = (np.empty((n, mdp.horizon), np.int64) for _ in range(3))
    rewards = np.empty((n, mdp.horizon))
    choices = _cumulative(policy)
    s = draw(np.broadcast_to(_cumulative(mdp.start), (n, mdp.n_states)), rng.random(n))
    for h in range(mdp.horizon):
        u = rng.random((3, n))
        a = draw(choices[h, s], u[0])
        states[:, h], actions[:, h] = s, a
        mean = mdp.R[h, s, a]
        rewards[:, h] = u[1] < mean if mdp.noise == "bernoulli" else mean
        s = following[:, h] = draw(mdp.cumulative[h, s, a], u[2])
    return Episodes(states, actions, rewards, following)


def draw(cumulative: Float[ndarray, "n S"], u: Float[ndarray, " n"]) -> Int[ndarray, " n"]:
    """Outcomes of n distributions by inversion: the first s at which the distribution function exceeds u."""
    return (u[:, None] >= cumulative).sum(axis=1)


def one_hot_features(n_states: int, n_actions: int) -> Float[ndarray, "S A d"]:
    """phi(s, a) = e_(s, a): every finite process is linear in these d = S A features.

    >>> one_hot_features(2, 3).shape
    (2, 3, 6)
    """
    check_count("n_states", n_states)
    check_count("n_actions", n_actions)
    return np.eye(n_states * n_actions).reshape(n_states, n_actions, -1)


def _cumulative(P: Float[ndarray, "*batch S"]) -> Float[ndarray, "*batch S"]:
    """The last entry, and those before it that are followed by zeros alone, are 1 whatever the rounding of the sum."""
    total = np.cumsum(P, axis=-1)
    last = total.shape[-1] - 1 - np.argmax(np.flip(P, axis=-1) > 0, axis=-1, keepdims=True)
    return np.where(np.arange(total.shape[-1]) >= last, 1.0, total)
