"""Algorithm 3: log-barrier policy optimisation in linear MDPs without a simulator.

Source: Dai, Luo, Wei and Zimmert (ICML 2023, arXiv 2301.12942), on the scheme of Luo, Wei and Lee (NeurIPS 2021).
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from locally.checks import check_count
from locally.control.adversarial import kernels
from locally.control.adversarial.baselines import LSVIUCB
from locally.control.adversarial.epochs import epoch_coefficients, epoch_inverses, epoch_weights
from locally.control.adversarial.learner import checked_episode, checked_features
from locally.control.adversarial.parameters import EpochParameters
from locally.control.validity import check_generator_state, checked_arrays


class LinearMDPOptimizer:
    """First a cover of the reachable features, then epochs of one policy each, whose own episodes stand in for draws.

    Phase 0 explores by optimistic value iteration without losses; the mixture of its policies is the cover. Phase 1
    plays epochs of W episodes. Most play the epoch's policy throughout; with probability `explore` one follows the
    cover up to a random layer and the epoch's policy from there. Half of an epoch's episodes estimate covariances, the
    other half Q and the dilated bonuses, both linear in the features. Regret O~(A^(1/9) d^(2/3) H^(20/9) K^(8/9)).

    Args:
        features: phi[h, s, a] of a linear process, in the unit ball and spanning; runs may lead.
        n_episodes: K.
        epoch: W, ceil(K^(1/3)) by default, at least 2.
        cover_episodes: of phase 0, max(50, ceil(0.05 K)) by default; at most K.
        explore: min(1/2, K^(-1/9)) by default.
        known_up_to: alpha; a state is known if max_a |phi|^2 under the inverse covariance of the cover is at most
            alpha. d by default. At other states the policy is uniform.
        eta_scale: eta = eta_scale sqrt(A W ln K / (d K)) / H^2.
        beta_scale: beta = beta_scale 4 eta H^2.
        gamma: ridge, d ln(d K) / W by default.
        ridge: of the cover's covariance.
        rng: draws episodes of exploration, layers, components of the cover, halves.

    Attributes:
        policies: (R, H, S, A), of the next episode.
        epoch_policies: (R, H, S, A), of the current epoch.
        known: (R, H, S), after phase 0.
        cumulative: (R, H, S, A), sums of Q^ - B^.

    Raises:
        TypeError, ValueError: features outside the unit ball or not spanning, or an argument out of range.

    Complexity: O(H S A d^2) an epoch and O(H (S A + d^2)) an episode; phase 0 as `LSVIUCB`.

    >>> from locally.control.environments import random_adversarial_mdp
    >>> mdp = random_adversarial_mdp(1000, rng=0)
    >>> learner = LinearMDPOptimizer(mdp.features, n_episodes=1000, rng=0)
    >>> learner.epoch, learner.cover_episodes, round(learner.parameters.explore, 3)
    (10, 50, 0.464)
    """

    def __init__(
        self,
        features: Float[ndarray, "*runs H S A d"],
        *,
        n_episodes: int,
        epoch: int | None = None,
        cover_episodes: int | None = None,
        explore: float | None = None,
        known_up_to: float | None = None,
        eta_scale: float = 1.0,
        beta_scale: float = 1.0,
        gamma: float | None = None,
        ridge: float = 1.0,
        rng: np.random.Generator | int,
    ) -> None:
        check_count("n_episodes", n_episodes)
        self.features = checked_features(features)
        R, H, S, A, d = self.features.shape
        self.parameters = EpochParameters.of(
            n_actions=A,
            dim=d,
            horizon=H,
            n_episodes=n_episodes,
            epoch=epoch,
            cover_episodes=cover_episodes,
            explore=explore,
            known_up_to=known_up_to,
            eta_scale=eta_scale,
            beta_scale=beta_scale,
            gamma=gamma,
            ridge=ridge,
        )
        self.epoch, self.cover_episodes = self.parameters.epoch, self.parameters.cover_episodes
        self.n_episodes, self.episode = n_episodes, 0
        self.rng = np.random.default_rng(rng)

        # an exploration bonus of |phi|: there is no loss to be confident about
        self._cover = LSVIUCB(self.features, n_episodes=n_episodes, width=1.0, ridge=ridge, learn_losses=False)
        self.cover_actions = np.zeros((R, self.cover_episodes, H, S), np.int64)
        self._moments = np.zeros((R, H, d, d))
        self.known: Bool[ndarray, "R H S"] = np.zeros((R, H, S), bool)
        self.cumulative = np.zeros((R, H, S, A))
        self.epoch_policies = np.full((R, H, S, A), 1 / A)
        self._weights = np.zeros((R, self.epoch, H))
        self._states, self._actions = (np.zeros((R, self.epoch, H), np.int64) for _ in range(2))
        self._losses = np.zeros((R, self.epoch, H))
        self.policies = self._cover.policies

    @property
    def _filled(self) -> int:
        """Episodes of the current epoch that have been seen."""
        return (self.episode - self.cover_episodes) % self.epoch

    def tell(self, states: Int[ndarray, "R H"], actions: Int[ndarray, "R H"], losses: Float[ndarray, "R H"]) -> None:
        """Learn from the episode that `policies` played.

        Raises:
            ValueError: shapes differ, a state or action does not exist, or a loss lies outside [0, 1].
        """
        checked_episode(states, actions, losses, self.policies.shape)
        if self.episode < self.cover_episodes:
            self._tell_cover(states, actions, losses)
        else:
            i = self._filled
            self._states[:, i], self._actions[:, i], self._losses[:, i] = states, actions, losses
            if i == self.epoch - 1:
                self._end_epoch()
        self.episode += 1
        self._next_policies()

    # Phase 0 ----------------------------------------------------------------------------------------------------------

    def _tell_cover(self, states: ndarray, actions: ndarray, losses: ndarray) -> None:
        R, H, *_ = self.features.shape
        self.cover_actions[:, self.episode] = self._cover.actions
        self._cover.tell(states, actions, losses)
        phi = self.features[np.arange(R)[:, None], np.arange(H), states, actions]
        self._moments += phi[..., :, None] * phi[..., None, :]
        if self.episode == self.cover_episodes - 1:
            self._end_cover()

    def _end_cover(self) -> None:
        R, H, S, A, d = self.features.shape
        moments = (self._moments / self.cover_episodes).reshape(R * H, d, d)
        inverse = kernels.inverses(moments, np.full(R * H, self.parameters.ridge / self.cover_episodes))
        norms = kernels.quadratic_forms(self.features.reshape(R * H, S * A, d), inverse)
        self.known = norms.reshape(R, H, S, A).max(axis=-1) <= self.parameters.known_up_to

    # Phase 1 ----------------------------------------------------------------------------------------------------------

    def _next_policies(self) -> None:
        """Draw who explores, up to which layer h*, and along which policy of the cover; and the weights that follow."""
        if self.episode < self.cover_episodes:
            self.policies = self._cover.policies
            return
        R, H, _, A = self.cumulative.shape
        exploring = self.rng.random(R) < self.parameters.explore
        turn = self.rng.integers(H, size=R)
        component = self.rng.integers(self.cover_episodes, size=R)
        covering = exploring[:, None] & (np.arange(H) < turn[:, None])
        cover = np.eye(A)[self.cover_actions[np.arange(R), component]]
        self.policies = np.where(covering[:, :, None, None], cover, self.epoch_policies)
        self._weights[:, self._filled] = epoch_weights(exploring, turn, H)

    def _end_epoch(self) -> None:
        R, H, S, A, d = self.features.shape
        order = self.rng.permuted(np.broadcast_to(np.arange(self.epoch), (R, self.epoch)), axis=1)
        first, second = np.split(order, [self.epoch // 2], axis=1)
        runs, layers = np.arange(R)[:, None, None], np.arange(H)
        visited = runs, layers, self._states, self._actions
        phi = self.features[visited]
        inverse = epoch_inverses(self._weights, phi, first, self.parameters.gamma)

        norms = kernels.quadratic_forms(self.features.reshape(R * H, S * A, d), inverse.reshape(R * H, d, d))
        beta = np.full(R, self.parameters.beta)
        local = kernels.local_bonuses(norms.reshape(R, H, S, A), self.epoch_policies, beta) * self.known[..., None]
        coefficients = epoch_coefficients(self._weights, phi, self._losses, local[visited], second, inverse)
        self.cumulative += np.einsum("rhsai,rhi->rhsa", self.features, coefficients) - local
        self._follow_the_regularised_leader()

    def _follow_the_regularised_leader(self) -> None:
        shape = self.cumulative.shape
        weights = kernels.log_barrier_weights((self.parameters.eta * self.cumulative).reshape(-1, shape[-1])).reshape(
            shape
        )
        self.epoch_policies = np.where(self.known[..., None], weights, 1 / shape[-1])

    # State ------------------------------------------------------------------------------------------------------------

    SAVED = (
        "cover_actions",
        "_moments",
        "known",
        "cumulative",
        "epoch_policies",
        "policies",
        "_weights",
        "_states",
        "_actions",
        "_losses",
    )

    def state_dict(self) -> dict[str, Any]:
        """Cover, estimates of all epochs, counters and generator."""
        arrays = {name.removeprefix("_"): getattr(self, name).copy() for name in self.SAVED}
        rng = self.rng.bit_generator.state
        return {"episode": self.episode, "rng": rng, "cover": self._cover.state_dict(), "arrays": arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if an array of it has another shape here."""
        arrays = checked_arrays(state["arrays"], {name.removeprefix("_"): getattr(self, name) for name in self.SAVED})
        episode = int(state["episode"])
        check_generator_state(self.rng, state["rng"])
        self._cover.load_state_dict(state["cover"])
        for name in self.SAVED:
            setattr(self, name, arrays[name.removeprefix("_")])
        self.episode = episode
        self.rng.bit_generator.state = state["rng"]
