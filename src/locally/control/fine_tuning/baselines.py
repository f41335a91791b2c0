"""What one would otherwise do with a log: trust it pessimistically, or go on from it optimistically.

Neither knows when it is good: there is no certificate. Sources: Jin, Yang & Wang, arXiv 2012.15085 (pessimistic value
iteration, VI-LCB where features are one-hot); Jin et al., arXiv 1907.05388 (LSVI-UCB).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_count, check_nonnegative, check_positive, check_shape
from locally.control.environments import EpisodicMDP
from locally.control.fine_tuning.estimation import Fit, Moments, check_features
from locally.control.fine_tuning.exploration import play_episodes
from locally.control.fine_tuning.offline import OfflineDataset
from locally.control.validity import check_generator_state, check_index, checked_arrays


@dataclass(frozen=True)
class PessimisticSolution:
    """Attributes:
    policy: greedy for the lower bounds; ties go to the lowest action.
    value: lower bound of its value from the start states.
    V: lower bounds V[h, s], with a row of zeros past the end.
    """

    policy: Float[ndarray, "H S A"]
    value: float
    V: Float[ndarray, "H_and_1 S"]


def pessimistic_policy(
    features: Float[ndarray, "H S A d"],
    offline: OfflineDataset,
    *,
    penalty: float | int = 1.0,
    ridge: float | int = 1.0,
    start: Float[ndarray, " S"] | None = None,
) -> PessimisticSolution:
    """Value iteration on a log that takes `penalty` ||phi|| in the norm of Lambda^(-1) off every estimate.

    With one-hot features the penalty is penalty / sqrt(n + ridge). Good where the log covers the best policy, which
    nobody can tell from the log. O(rows + H S A d (S + d) + H d^3).

    Args:
        features: phi_h(s, a), norm at most 1, spanning at every layer.
        offline: the log; may be empty.
        penalty: not negative; the theory's is of the order of d H sqrt(log).
        ridge: positive.
        start: distribution of the first state; state 0 by default.

    Raises:
        TypeError, ValueError: sizes do not fit, or a number is out of range.

    >>> log = OfflineDataset([0] * 4, [0] * 4, [1] * 4, [1.0] * 4, [0] * 4, horizon=1, n_states=1, n_actions=2)
    >>> pessimistic_policy(np.eye(2).reshape(1, 1, 2, 2), log).policy.ravel()
    array([0., 1.])
    """
    check_features(features)
    check_nonnegative("penalty", penalty)
    check_positive("ridge", ridge)
    moments = _moments(features, offline)
    start = np.eye(features.shape[1])[0] if start is None else start
    check_shape("start", start, (features.shape[1],))
    Q, V = _iterate(features, moments.fit(ridge), -penalty)
    policy = np.eye(features.shape[2])[Q.argmax(axis=-1)]
    return PessimisticSolution(policy, float(start @ V[0]), V)


class LSVIUCB:
    """Optimistic least-squares value iteration that starts from a log: UCB-VI where features are one-hot.

    An agent for `locally.control.agents.play`; plans anew at the end of an episode once det Lambda_h has grown by
    `growth` at some layer, so that planning costs vanish over time.

    Args:
        features: phi_h(s, a), norm at most 1, spanning at every layer.
        offline: the log; None for none.
        bonus: factor of H ||phi|| in the norm of Lambda^(-1), not negative.
        ridge: positive; at most bonus^2 for values of what was never seen to be as large as they can be.
        growth: above 1.
        rng: seed or generator, of the draws of `advance`.

    Raises:
        TypeError, ValueError: sizes do not fit, or a number is out of range.

    >>> agent = LSVIUCB(np.eye(2).reshape(1, 1, 2, 2))
    >>> agent.observe((0, 0), 1, 1.0, (1, 0), terminated=True)
    >>> agent.greedy_policy().ravel()
    array([0., 1.])
    """

    def __init__(
        self,
        features: Float[ndarray, "H S A d"],
        offline: OfflineDataset | None = None,
        *,
        bonus: float | int = 0.3,
        ridge: float | int = 1e-2,
        growth: float | int = 1.05,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        check_features(features)
        check_nonnegative("bonus", bonus)
        check_positive("ridge", ridge)
        check_positive("growth - 1", growth - 1)
        H, S, A, _ = features.shape
        self.features, self.bonus, self.ridge, self.growth = features, bonus, ridge, growth
        self.rng = np.random.default_rng(rng)
        self.n_episodes = 0
        self._moments = _moments(features, OfflineDataset.empty(H, S, A) if offline is None else offline)
        self._size = np.zeros(H)  # log det Lambda_h when it last planned
        self._actions = np.zeros((H, S), np.int64)
        self._plan()

    def act(self, observation: Any) -> int:
        """The optimistic action at (h, s)."""
        h, s = self._place(observation)
        return int(self._actions[h, s])

    def observe(
        self,
        observation: Any,
        action: Any,
        reward: float | int,
        next_observation: Any,
        *,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        """Learn from one transition; plan when an episode ends and enough is new.

        Raises:
            TypeError, ValueError: the action or a state is out of range, or the reward outside [0, 1].
        """
        h, s = self._place(observation)
        a = check_index("action", action, self.features.shape[2])
        if not 0 <= reward <= 1:
            raise ValueError(f"reward must lie in [0, 1], got {reward!r}")
        phi = self.features[h, s, a]
        self._moments.covariance[h] += np.outer(phi, phi)
        self._moments.following[h, check_index("next state", next_observation[1], self.features.shape[1])] += phi
        self._moments.reward[h] += reward * phi
        if terminated or truncated:
            self._end_episodes(1)

    def advance(
        self, mdp: EpisodicMDP, episodes: int, good_enough: Callable[[Float[ndarray, "H S A"]], bool] | None = None
    ) -> bool:
        """Play `episodes` episodes of `mdp`, one at a time, or until its greedy policy is judged good enough.

        The judge is called before the first episode and whenever the agent has planned; returns whether it agreed. An
        agent of this kind cannot judge itself.
        """
        check_count("episodes", episodes)
        if good_enough is not None and good_enough(self.greedy_policy()):
            return True
        for _ in range(episodes):
            policy = np.eye(self.features.shape[2])[self._actions]
            self._moments.add(self.features, *play_episodes(mdp, policy, 1, self.rng))
            if self._end_episodes(1) and good_enough is not None and good_enough(self.greedy_policy()):
                return True
        return False

    def greedy_policy(self) -> Float[ndarray, "H S A"]:
        """The best policy by its estimates, without optimism."""
        Q, _ = _iterate(self.features, self._moments.fit(self.ridge), 0.0)
        return np.eye(self.features.shape[2])[Q.argmax(axis=-1)]

    def _end_episodes(self, n: int) -> bool:
        self.n_episodes += n
        grown = bool((self._log_det() > self._size + np.log(self.growth)).any())
        if grown:
            self._plan()
        return grown

    def _plan(self) -> None:
        self._size = self._log_det()
        Q, _ = _iterate(self.features, self._moments.fit(self.ridge), self.bonus * self.features.shape[0])
        self._actions = Q.argmax(axis=-1)

    def _log_det(self) -> Float[ndarray, " H"]:
        return np.linalg.slogdet(self._moments.covariance + self.ridge * np.eye(self.features.shape[-1]))[1]

    def _place(self, observation: Any) -> tuple[int, int]:
        if np.shape(observation) != (2,):
            raise ValueError(f"observation must be a pair (layer, state), got {observation!r}")
        h = check_index("layer of observation", observation[0], self.features.shape[0])
        return h, check_index("state of observation", observation[1], self.features.shape[1])

    def state_dict(self) -> dict[str, Any]:
        """Moments, plan and generator."""
        moments = self._moments.copy()
        return {
            "shape": list(self.features.shape),
            "covariance": moments.covariance,
            "following": moments.following,
            "reward": moments.reward,
            "size": self._size.copy(),
            "actions": self._actions.copy(),
            "n_episodes": self.n_episodes,
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the state is of an agent for other features, or damaged; then nothing has changed.
        """
        if state["shape"] != list(self.features.shape):
            raise ValueError(f"state must be of an agent with features of shape {list(self.features.shape)}")
        names = ("covariance", "following", "reward")
        arrays = checked_arrays(state, {name: getattr(self._moments, name) for name in names})
        plan = checked_arrays(state, {"size": self._size, "actions": self._actions})
        n_episodes = int(state["n_episodes"])
        check_generator_state(self.rng, state["rng"])
        self._moments = Moments(**arrays)
        self._size, self._actions = plan["size"], plan["actions"]
        self.n_episodes = n_episodes
        self.rng.bit_generator.state = state["rng"]


def _moments(features: Float[ndarray, "H S A d"], offline: OfflineDataset) -> Moments:
    H, S, A, d = features.shape
    if (offline.horizon, offline.n_states, offline.n_actions) != (H, S, A):
        sizes = (offline.horizon, offline.n_states, offline.n_actions)
        raise ValueError(f"offline must have (horizon, n_states, n_actions) {(H, S, A)} like features, got {sizes}")
    moments = Moments.zeros(H, S, d)
    moments.add(features, *offline.counts())
    return moments


def _iterate(
    features: Float[ndarray, "H S A d"], fit: Fit, bonus: float | int
) -> tuple[Float[ndarray, "H S A"], Float[ndarray, "H_and_1 S"]]:
    """Q = <phi, theta + T^T V'> + bonus ||phi||, within [0, H - h]."""
    H, S, A, d = features.shape
    Q, V = np.empty((H, S, A)), np.zeros((H + 1, S))
    flat = features.reshape(H, S * A, d)
    norms = np.sqrt(np.maximum(((flat @ fit.inverse) * flat).sum(axis=-1), 0)).reshape(H, S, A)
    for h in reversed(range(H)):
        estimate = features[h] @ (fit.theta[h] + fit.transition[h].T @ V[h + 1])
        Q[h] = np.clip(estimate + bonus * norms[h], 0, H - h)
        V[h] = Q[h].max(axis=-1)
    return Q, V
