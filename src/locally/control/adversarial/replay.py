"""Runs of a learner against known processes, side by side, with the exact value of every policy that it played."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.control.adversarial import kernels
from locally.control.adversarial.learner import Learner
from locally.control.environments import AdversarialMDP


@dataclass(frozen=True)
class Regret:
    """Of R runs over the episodes that were played.

    expected: cumulative sum of V_k^(pi_k) - V_k^(pi*), exactly, pi* the best policy over all K episodes.
    realised: the same with the losses that were drawn in place of V_k^(pi_k).
    """

    expected: Float[ndarray, "R K"]
    realised: Float[ndarray, "R K"]

    @property
    def final(self) -> Float[ndarray, " R"]:
        """Expected regret after the last episode."""
        return self.expected[:, -1]


def play_side_by_side(
    learner: Learner,
    processes: Sequence[AdversarialMDP],
    *,
    rng: np.random.Generator | int,
    episodes: int | None = None,
    callback: Callable[[int], bool | None] | None = None,
) -> Regret:
    """Let run r of `learner` play `processes[r]` with Bernoulli losses; goes on where the learner stands.

    Args:
        learner: with as many runs as there are processes, of the processes' sizes.
        processes: all with the same sizes and number of episodes, the learner's.
        rng: draws states, actions and losses.
        episodes: how many to play now, all that are left by default.
        callback: called with the number of episodes played; True ends the play early.

    Raises:
        ValueError: sizes differ, or no episode is left.

    Complexity: that of the learner plus O(R H S A (S + d)) an episode.

    >>> from locally.control.adversarial import PolicyOptimizer
    >>> from locally.control.environments import random_adversarial_mdp
    >>> mdp = random_adversarial_mdp(200, "decoy", rng=0)
    >>> learner = PolicyOptimizer(mdp.features, mdp.P, n_episodes=200, eta_scale=48.0, beta_scale=5e-4, rng=0)
    >>> play_side_by_side(learner, [mdp], rng=0).expected.shape
    (1, 200)
    """
    R, H, S, A = learner.policies.shape
    for r, mdp in enumerate(processes):
        if (mdp.horizon, mdp.n_states, mdp.n_actions, mdp.n_episodes) != (H, S, A, learner.n_episodes):
            raise ValueError(f"processes[{r}] must have the learner's layers, states, actions and episodes")
    if len(processes) != R:
        raise ValueError(f"processes must be as many as the learner's {R} runs, got {len(processes)}")
    first = learner.episode
    left = learner.n_episodes - first
    if not 1 <= (left if episodes is None else episodes) <= left:
        raise ValueError(f"episodes must be between 1 and the {left} that are left, got {episodes}")
    rng = np.random.default_rng(rng)
    P, start = np.stack([m.P for m in processes]), np.stack([m.start for m in processes])
    phi = np.stack([m.features for m in processes])
    thetas = np.stack([m.thetas[first:] for m in processes], axis=1)  # (K, R, H, d)
    runs, layers = np.arange(R)[:, None], np.arange(H)
    states, actions = np.empty((R, H), np.int64), np.empty((R, H), np.int64)
    values, drawn = np.empty((R, left)), np.empty((R, left))

    played = 0
    for theta in thetas[:episodes]:
        occupancy = kernels.occupancies(P, learner.policies, start)
        values[:, played] = kernels.expected_losses(phi, occupancy, theta)
        kernels.rollouts(P, learner.policies, start, rng.random((R, H + 1, 2)), states, actions)
        means = (phi[runs, layers, states, actions] * theta).sum(axis=-1)
        losses = (rng.random((R, H)) < means).astype(np.float64)
        drawn[:, played] = losses.sum(axis=1)
        learner.tell(states, actions, losses)
        played += 1
        if callback is not None and callback(played):
            break
    reference = np.stack([m.comparator() for m in processes])[:, first : first + played]
    return Regret(np.cumsum(values[:, :played] - reference, axis=1), np.cumsum(drawn[:, :played] - reference, axis=1))
