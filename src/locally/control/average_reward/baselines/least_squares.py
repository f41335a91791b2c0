"""Finite-horizon least-squares value iteration on a process that never resets."""

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_count, check_positive, check_shape
from locally.control.average_reward.hypotheses import check_step
from locally.control.validity import check_index, check_unit_ball, checked_arrays, checked_policy


class OLSVI:
    """OLSVI.FH: cut the walk into episodes of H steps and run optimistic least-squares value iteration on them.

    In each episode Q_h = min(phi . w_h + bonus ||phi|| in the inverse Gram matrix, H), backwards over the layers, each
    layer with the data of its own. H = ceil(sqrt(sp) T^(1/4) / d^(3/4)); bonus = scale d H sqrt(log(2 d T / delta)).
    Source: Wei et al. (AISTATS 2021), Algorithm 2; constants are ours where the paper leaves them open.

    Args:
        features: phi(s, a), norm at most 1.
        horizon: number of steps T.
        span: bound on sp(V*), positive.
        delta: failure probability, in (0, 1).
        scale: of the bonus; 1 is of the theorem's order.
        episode: H, instead of the above.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Complexity: O(H (S A d^2 + d^3)) an episode.

    >>> OLSVI(np.eye(4).reshape(2, 2, 4), horizon=1000, span=1.0).act(0) in (0, 1)
    True
    """

    def __init__(
        self,
        features: Float[ndarray, "S A d"],
        *,
        horizon: int,
        span: float,
        delta: float = 0.05,
        scale: float = 1.0,
        episode: int | None = None,
    ) -> None:
        check_shape("features", features, (None, None, None))
        check_unit_ball("features", features)
        check_count("horizon", horizon)
        check_positive("span", span)
        check_positive("delta", delta, below=1)
        check_positive("scale", scale)
        self.features = features
        self.n_states, self.n_actions, d = features.shape
        default = int(np.ceil(np.sqrt(span) * horizon**0.25 / d**0.75))
        self.episode = max(default, 1) if episode is None else episode
        check_count("episode", self.episode)
        H = self.episode
        self.bonus = scale * d * H * np.sqrt(np.log(2 * d * horizon / delta))
        self.gram = np.tile(np.eye(d), (H, 1, 1))
        self.arrivals, self.sums = np.zeros((H, d, self.n_states)), np.zeros((H, d))
        self._policy = np.zeros((H, self.n_states), np.int64)
        self.n_steps_ = 0
        self._planned = -1  # episode that the policy was made for

    def act(self, observation: Any) -> int:
        """The greedy action of the layer that the walk is in; the first step of an episode makes the plan."""
        s = check_index("observation", observation, self.n_states)
        episode, h = divmod(self.n_steps_, self.episode)
        if episode != self._planned:
            self._plan()
            self._planned = episode
        return int(self._policy[h, s])

    def _plan(self) -> None:
        inverse = np.linalg.inv(self.gram)
        V = np.zeros(self.n_states)
        for h in reversed(range(self.episode)):
            w = inverse[h] @ (self.sums[h] + self.arrivals[h] @ V)
            width = np.sqrt(np.maximum(((self.features @ inverse[h]) * self.features).sum(axis=2), 0))
            Q = np.minimum(self.features @ w + self.bonus * width, self.episode - h)
            self._policy[h], V = Q.argmax(axis=1), Q.max(axis=1)

    def observe(
        self,
        observation: Any,
        action: Any,
        reward: float,
        next_observation: Any,
        *,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        """Add the step to the sums of its layer; TypeError or ValueError for a step that is none."""
        s, a, r, following = check_step(self, observation, action, reward, next_observation)
        h, phi = self.n_steps_ % self.episode, self.features[s, a]
        self.gram[h] += np.outer(phi, phi)
        self.arrivals[h, :, following] += phi
        self.sums[h] += phi * r
        self.n_steps_ += 1

    def state_dict(self) -> dict[str, Any]:
        """Sums of every layer, the plan, and the number of steps."""
        arrays = {name: getattr(self, name).copy() for name in ("gram", "arrivals", "sums")}
        return arrays | {"policy": self._policy.copy(), "n_steps": self.n_steps_, "planned": self._planned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its agent had other sizes or episodes."""
        here = {"gram": self.gram, "arrivals": self.arrivals, "sums": self.sums, "policy": self._policy}
        arrays = checked_arrays(state, here)
        for policy in arrays["policy"]:
            checked_policy("policy", policy, self.n_states, self.n_actions)
        n_steps, planned = int(state["n_steps"]), int(state["planned"])
        self.gram, self.arrivals, self.sums, self._policy = arrays.values()
        self.n_steps_, self._planned = n_steps, planned
