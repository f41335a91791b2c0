"""Episodic processes whose losses change from episode to episode while the transitions stay.

Loss sequences are arrays theta[k, h, :] with mean loss phi_h(s, a) . theta_(k, h): fixed beforehand (oblivious), so
that the best fixed policy in hindsight and every regret is exact.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_between, check_choice, check_count
from locally.control.dynamic_programming import EpisodicSolution, occupancy_measures, solve_episodic
from locally.control.environments.episodic import random_episodic_linear_mdp
from locally.control.environments.processes import EpisodicMDP, LayeredProcess
from locally.control.validity import check_unit_ball, check_unit_interval


@dataclass(frozen=True, eq=False)
class AdversarialMDP(LayeredProcess):
    """K episodes of H layers with losses in [0, 1]; smaller is better.

    Args:
        P: P[h, s, a, s'].
        features: phi[h, s, a], norm at most 1.
        thetas: thetas[k, h], with phi . theta in [0, 1].
        start: distribution of the first state; state 0 by default.

    Raises:
        ValueError: an argument is no distribution or lies outside its range.

    >>> mdp = random_adversarial_mdp(40, "decoy", rng=0)
    >>> uniform = np.full((40, 3, 4, 6), 1 / 6)
    >>> bool(mdp.regret(uniform)[-1] > 0)
    True
    """

    P: Float[ndarray, "H S A S"]
    features: Float[ndarray, "H S A d"]
    thetas: Float[ndarray, "K H d"]
    start: Float[ndarray, " S"] = field(default=None)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        self._check_dynamics()
        check_unit_ball("features", self.features)
        for block in np.array_split(self.thetas, max(1, len(self.thetas) // 4096)):
            check_unit_interval("losses features . thetas", np.einsum("hsad,khd->khsa", self.features, block))

    @property
    def n_episodes(self) -> int:
        """Episodes for which losses are laid down."""
        return self.thetas.shape[0]

    def losses(self, k: int) -> Float[ndarray, "H S A"]:
        """Mean losses of episode k."""
        return np.einsum("hsad,hd->hsa", self.features, self.thetas[k])

    def mean_losses(self) -> Float[ndarray, "H S A"]:
        """Averaged over all episodes: what the best fixed policy minimises."""
        return np.einsum("hsad,hd->hsa", self.features, self.thetas.mean(axis=0))

    def values(self, policies: Float[ndarray, "n H S A"], episodes: slice = slice(None)) -> Float[ndarray, " n"]:
        """Expected loss of policies[j] in the j-th of `episodes`, exactly. O(H S A (S + d)) each."""
        occupancy = occupancy_measures(self.P, policies, self.start)
        expected = np.einsum("khsa,hsad->khd", occupancy, self.features)
        return (expected * self.thetas[episodes]).sum(axis=(-2, -1))

    def best_fixed(self) -> EpisodicSolution:
        """The best policy in hindsight, by dynamic programming on minus the mean loss: `-value` is its loss."""
        return solve_episodic(self.P, -self.mean_losses(), self.start)

    def comparator(self) -> Float[ndarray, " K"]:
        """Expected loss of the best fixed policy in every episode."""
        policy = np.eye(self.n_actions)[self.best_fixed().policy]
        visited = np.einsum("hsa,hsad->hd", occupancy_measures(self.P, policy, self.start), self.features)
        return np.einsum("khd,hd->k", self.thetas, visited)

    def regret(self, policies: Float[ndarray, "K H S A"]) -> Float[ndarray, " K"]:
        """Cumulative regret of the policies that were played, against the policy best over all K episodes."""
        return np.cumsum(self.values(policies) - self.comparator())


def random_adversarial_mdp(
    n_episodes: int,
    schedule: str = "stationary",
    *,
    rng: np.random.Generator | int,
    horizon: int = 3,
    n_states: int = 4,
    n_actions: int = 6,
    dim: int = 5,
) -> AdversarialMDP:
    """`random_episodic_linear_mdp` with losses around thetas uniform on [0.2, 0.8]^(H x d).

    Args:
        n_episodes: K, at least 1.
        schedule: "stationary", "drifting", "decoy" or "switching", as in the functions of those names.

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> random_adversarial_mdp(100, "drifting", rng=0).thetas.shape
    (100, 3, 5)
    """
    check_choice("schedule", schedule, tuple(SCHEDULES))
    rng = np.random.default_rng(rng)
    mdp: EpisodicMDP = random_episodic_linear_mdp(horizon, n_states, n_actions, dim, rng=rng)
    base = rng.uniform(0.2, 0.8, (horizon, dim))
    assert mdp.features is not None
    return AdversarialMDP(mdp.P, mdp.features, SCHEDULES[schedule](base, n_episodes))


def stationary_losses(base: Float[ndarray, "H d"], n_episodes: int) -> Float[ndarray, "K H d"]:
    """The same means in every episode.

    >>> stationary_losses(np.ones((1, 2)), 3).shape
    (3, 1, 2)
    """
    check_count("n_episodes", n_episodes)
    check_unit_interval("base", base)
    return np.broadcast_to(base, (n_episodes, *base.shape)).copy()


def drifting_losses(
    base: Float[ndarray, "H d"], n_episodes: int, *, amplitude: float = 0.35, cycles: float = 1.5
) -> Float[ndarray, "K H d"]:
    """Sine waves around the base, a phase of 2.1 apart from one feature to the next, cut to [0, 1].

    >>> float(np.ptp(drifting_losses(np.full((1, 1), 0.5), 1000)).round(3))
    0.7
    """
    check_count("n_episodes", n_episodes)
    check_unit_interval("base", base)
    check_between("amplitude", amplitude, 0, 1)
    phase = 2 * np.pi * cycles * np.arange(n_episodes)[:, None] / n_episodes + 2.1 * np.arange(base.shape[1])
    return np.clip(base + amplitude * np.sin(phase)[:, None, :], 0, 1)


def decoy_losses(base: Float[ndarray, "H d"], n_episodes: int, *, fraction: float = 0.25) -> Float[ndarray, "K H d"]:
    """1 - base for the first `fraction` of the episodes, then base: what looked best early is what is worst later.

    >>> decoy_losses(np.full((1, 1), 0.2), 4).ravel()
    array([0.8, 0.2, 0.2, 0.2])
    """
    check_count("n_episodes", n_episodes)
    check_unit_interval("base", base)
    check_between("fraction", fraction, 0, 1)
    early = np.arange(n_episodes) < fraction * n_episodes
    return np.where(early[:, None, None], 1 - base, base)


def switching_losses(base: Float[ndarray, "H d"], n_episodes: int, *, pieces: int = 8) -> Float[ndarray, "K H d"]:
    """base and 1 - base in turn, in `pieces` stretches of equal length.

    >>> switching_losses(np.full((1, 1), 0.2), 4, pieces=4).ravel()
    array([0.2, 0.8, 0.2, 0.8])
    """
    check_count("n_episodes", n_episodes)
    check_count("pieces", pieces)
    check_unit_interval("base", base)
    odd = (np.arange(n_episodes) * pieces // n_episodes) % 2 == 1
    return np.where(odd[:, None, None], 1 - base, base)


SCHEDULES = {
    "stationary": stationary_losses,
    "drifting": drifting_losses,
    "decoy": decoy_losses,
    "switching": switching_losses,
}
