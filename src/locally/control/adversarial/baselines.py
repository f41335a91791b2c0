"""What else one could play: a fixed policy, EXP3 at every state, and optimistic value iteration for fixed losses."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count, check_nonnegative, check_positive
from locally.control.adversarial import kernels
from locally.control.adversarial.learner import as_runs, checked_episode, checked_features
from locally.control.validity import check_kernel, checked_arrays


class FixedPolicy:
    """Plays one policy throughout: the uniform one, or the best in hindsight.

    Raises:
        TypeError, ValueError: policy is no distribution over actions, or n_episodes no positive integer.

    >>> FixedPolicy(np.full((1, 1, 2), 0.5), n_episodes=3).policies.shape
    (1, 1, 1, 2)
    """

    def __init__(self, policy: Float[ndarray, "*runs H S A"], *, n_episodes: int) -> None:
        check_count("n_episodes", n_episodes)
        self.policies = as_runs("policy", policy, 3)
        check_kernel("policy", self.policies)
        self.n_episodes, self.episode = n_episodes, 0

    def tell(self, states: Int[ndarray, "R H"], actions: Int[ndarray, "R H"], losses: Float[ndarray, "R H"]) -> None:
        """Check the episode and count it; nothing is learnt."""
        checked_episode(states, actions, losses, self.policies.shape)
        self.episode += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of episodes seen."""
        return {"episode": self.episode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that number of episodes; the policy stays the one given."""
        self.episode = int(state["episode"])


class Exp3:
    """Exponential weights at every state on its own, with importance-weighted losses of the rest of the episode.

    Needs neither features nor transitions, and shares nothing between states (Auer et al., 2002). eta is
    eta_scale sqrt(2 ln A / (A K)) / H.

    Raises:
        TypeError, ValueError: a size or the scale is out of range.

    >>> learner = Exp3(1, 1, 2, n_episodes=8)
    >>> learner.tell(np.array([[0]]), np.array([[1]]), np.array([[1.0]]))
    >>> bool(learner.policies[0, 0, 0, 1] < 0.5)
    True
    """

    def __init__(
        self, horizon: int, n_states: int, n_actions: int, *, n_episodes: int, n_runs: int = 1, eta_scale: float = 1.0
    ) -> None:
        sizes = {"horizon": horizon, "n_states": n_states, "n_actions": n_actions}
        for name, size in (sizes | {"n_episodes": n_episodes, "n_runs": n_runs}).items():
            check_count(name, size)
        check_positive("eta_scale", eta_scale)
        self.eta = eta_scale * math.sqrt(2 * math.log(max(n_actions, 2)) / (n_actions * n_episodes)) / horizon
        self.n_episodes, self.episode = n_episodes, 0
        self.cumulative = np.zeros((n_runs, horizon, n_states, n_actions))
        self.policies = np.full(self.cumulative.shape, 1 / n_actions)

    def tell(self, states: Int[ndarray, "R H"], actions: Int[ndarray, "R H"], losses: Float[ndarray, "R H"]) -> None:
        """Learn from the episode that `policies` played; arguments and errors as for `Learner.tell`. O(R H A)."""
        R, H, S, A = self.policies.shape
        checked_episode(states, actions, losses, (R, H, S, A))
        visited = np.arange(R)[:, None], np.arange(H), states
        to_go = losses[:, ::-1].cumsum(axis=1)[:, ::-1]
        self.cumulative[(*visited, actions)] += to_go / self.policies[(*visited, actions)]
        changed = self.eta * self.cumulative[visited]
        self.policies[visited] = kernels.exponential_weights(changed.reshape(-1, A)).reshape(R, H, A)
        self.episode += 1

    def state_dict(self) -> dict[str, Any]:
        """Cumulative estimated losses and the number of episodes; the policies follow from them."""
        return {"episode": self.episode, "cumulative": self.cumulative.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its learner had another shape."""
        cumulative = checked_arrays(state, {"cumulative": self.cumulative})["cumulative"]
        self.episode, self.cumulative = int(state["episode"]), cumulative
        shape = self.cumulative.shape
        weights = kernels.exponential_weights((self.eta * self.cumulative).reshape(-1, shape[-1]))
        self.policies = weights.reshape(shape)


class LSVIUCB:
    """Optimistic least-squares value iteration (Jin et al., COLT 2020), which takes the losses to be fixed.

    Rewards are 1 - loss. In linear processes with fixed losses its regret is O~(sqrt(d^3 H^4 K)); where losses change,
    it follows averages that no longer hold.

    Args:
        features: as for `PolicyOptimizer`; transitions are learnt.
        n_episodes: K.
        bonus_scale: the width of the confidence ellipsoid is bonus_scale d H sqrt(ln(2 d H K)).
        width: the width itself.
        learn_losses: without, all that is sought are features not seen yet.
        ridge: of the least squares, positive.

    Attributes:
        policies: greedy, (R, H, S, A).
        actions: the same as indices (R, H, S).

    Raises:
        TypeError, ValueError: features outside the unit ball or not spanning, or an option out of range.

    Complexity: O(H S A d^2 + H d S + H d^2) an episode, O(H d (S + d)) memory.

    >>> learner = LSVIUCB(np.eye(2).reshape(1, 1, 2, 2), n_episodes=20, bonus_scale=0.1)
    >>> for _ in range(20):
    ...     a = learner.actions[:, :, 0]
    ...     learner.tell(np.zeros((1, 1), int), a, 1.0 * (a == 0))
    >>> int(learner.actions[0, 0, 0])
    1
    """

    def __init__(
        self,
        features: Float[ndarray, "*runs H S A d"],
        *,
        n_episodes: int,
        bonus_scale: float = 0.05,
        width: float | None = None,
        ridge: float = 1.0,
        learn_losses: bool = True,
    ) -> None:
        check_count("n_episodes", n_episodes)
        check_nonnegative("bonus_scale", bonus_scale)
        check_positive("ridge", ridge)
        self.features = checked_features(features)
        R, H, S, _, d = self.features.shape
        self.n_episodes, self.episode, self.learn_losses = n_episodes, 0, learn_losses
        confidence = bonus_scale * d * H * math.sqrt(math.log(2 * d * H * n_episodes))
        self.width = confidence if width is None else width
        check_nonnegative("width", self.width)
        self.inverse = np.broadcast_to(np.eye(d) / ridge, (R, H, d, d)).copy()
        self._targets = np.zeros((R, H, d, S))
        self._rewards = np.zeros((R, H, d))
        self._plan()

    def tell(self, states: Int[ndarray, "R H"], actions: Int[ndarray, "R H"], losses: Float[ndarray, "R H"]) -> None:
        """Learn from the episode that `policies` played and plan anew; arguments and errors as for `Learner.tell`."""
        R, H, S, A, _ = self.features.shape
        checked_episode(states, actions, losses, (R, H, S, A))
        runs, layers = np.arange(R)[:, None], np.arange(H)
        phi = self.features[runs, layers, states, actions]
        image = (self.inverse @ phi[..., None])[..., 0]  # Sherman and Morrison
        self.inverse -= image[..., :, None] * image[..., None, :] / (1 + (phi * image).sum(axis=-1))[..., None, None]
        self._targets[runs, layers[:-1], :, states[:, 1:]] += phi[:, :-1]
        if self.learn_losses:
            self._rewards += phi * (1 - losses)[..., None]
        self.episode += 1
        self._plan()

    def state_dict(self) -> dict[str, Any]:
        """Inverse Gram matrices, sums of the regression and the number of episodes; the plan follows from them."""
        return {
            "episode": self.episode,
            "inverse": self.inverse.copy(),
            "targets": self._targets.copy(),
            "rewards": self._rewards.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its learner had another shape."""
        here = {"inverse": self.inverse, "targets": self._targets, "rewards": self._rewards}
        arrays, self.episode = checked_arrays(state, here), int(state["episode"])
        self.inverse, self._targets, self._rewards = arrays.values()
        self._plan()

    def _plan(self) -> None:
        H, A = self.features.shape[1], self.features.shape[3]
        self.actions = kernels.optimistic_values(
            self.features, self.inverse, self._targets, self._rewards, self.width, float(H)
        )
        self.policies = np.eye(A)[self.actions]
