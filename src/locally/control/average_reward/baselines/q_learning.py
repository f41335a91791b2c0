"""Q-learning for average reward: optimistic through a discount near 1, and differential with random exploration."""

from typing import Any

import numpy as np

from locally.checks import check_between, check_count, check_positive
from locally.control.average_reward.agents import RandomSource
from locally.control.average_reward.hypotheses import check_step
from locally.control.average_reward.kernels import (
    choose_epsilon_greedy,
    follow_differential,
    follow_optimistic,
    learn_differential,
    learn_optimistic,
)
from locally.control.average_reward.walks import Trace, Walk, check_walk
from locally.control.validity import check_generator_state, check_index, checked_arrays


class OptimisticQLearning:
    """Discounted Q-learning with upper-confidence bonuses; regret of order T^(2/3).

    gamma = 1 - 1/H with H = min(sqrt(sp T / (S A)), (T / (S A log(4 T / delta)))^(1/3)); the bonus of the n-th visit is
    4 sp sqrt(H log(2 T / delta) / n). Source: Wei et al. (ICML 2020), Algorithm 2.

    Args:
        n_states, n_actions: sizes.
        horizon: number of steps T.
        span: bound on sp(V*), positive.
        delta: failure probability, in (0, 1).
        bonus_scale: multiplies the bonus; 1 is the theorem's.

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> OptimisticQLearning(6, 2, horizon=10000, span=6.4).act(0)
    0
    """

    def __init__(
        self,
        n_states: int,
        n_actions: int,
        *,
        horizon: int,
        span: float,
        delta: float = 0.05,
        bonus_scale: float = 1.0,
    ) -> None:
        for name, size in {"n_states": n_states, "n_actions": n_actions, "horizon": horizon}.items():
            check_count(name, size)
        check_positive("span", span)
        check_positive("delta", delta, below=1)
        check_positive("bonus_scale", bonus_scale)
        self.n_states, self.n_actions = n_states, n_actions
        cells = n_states * n_actions
        cubic = (horizon / (cells * np.log(4 * horizon / delta))) ** (1 / 3)
        self.effective_horizon = max(2.0, min(np.sqrt(span * horizon / cells), cubic))
        self.bonus = bonus_scale * 4 * span * np.sqrt(self.effective_horizon * np.log(2 * horizon / delta))
        self.visits = np.zeros((n_states, n_actions))
        self._Q = np.full((n_states, n_actions), self.effective_horizon)
        self._lowest, self._V = self._Q.copy(), np.full(n_states, self.effective_horizon)

    def act(self, observation: Any) -> int:
        """The action of largest upper bound here; ties go to the first."""
        return int(self._lowest[check_index("observation", observation, self.n_states)].argmax())

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
        """Update the bound of one pair; TypeError or ValueError for a step that is none. O(A)."""
        step = check_step(self, observation, action, reward, next_observation)
        learn_optimistic(*step, *self._learnt())

    def advance(self, walk: Walk, trace: Trace) -> None:
        """Walk as many steps as `trace` holds, as `act` and `observe` would."""
        check_walk(walk, self)
        walk.state = follow_optimistic(
            walk.world, walk.state, walk.rng, *self._learnt(), *trace.part(0, trace.rewards.size)
        )

    def _learnt(self) -> tuple[Any, ...]:
        return self.visits, self._Q, self._lowest, self._V, self.effective_horizon, self.bonus

    def state_dict(self) -> dict[str, Any]:
        """Counts, Q, its lowest values so far, and V."""
        return {
            "visits": self.visits.copy(),
            "Q": self._Q.copy(),
            "lowest": self._lowest.copy(),
            "V": self._V.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its agent had other sizes."""
        here = {"visits": self.visits, "Q": self._Q, "lowest": self._lowest, "V": self._V}
        self.visits, self._Q, self._lowest, self._V = checked_arrays(state, here).values()


class DifferentialQLearning:
    """Model-free control that learns the gain beside the values, exploring at random with probability epsilon.

    Source: Wan, Naik & Sutton (ICML 2021), equations 5 and 6.

    Args:
        n_states, n_actions: sizes.
        step_size: of the values, in (0, 1].
        eta: step size of the gain as a multiple of it, positive.
        epsilon: in (0, 1].
        rng: of the exploration.

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> DifferentialQLearning(6, 2, rng=0).act(3) in (0, 1)
    True
    """

    def __init__(
        self,
        n_states: int,
        n_actions: int,
        *,
        step_size: float = 0.1,
        eta: float = 0.1,
        epsilon: float = 0.1,
        rng: RandomSource = None,
    ) -> None:
        check_count("n_states", n_states)
        check_count("n_actions", n_actions)
        check_positive("step_size", step_size, below=1 + 1e-12)
        check_positive("eta", eta)
        check_positive("epsilon", epsilon)
        check_between("epsilon", epsilon, 0, 1)
        self.n_states, self.n_actions = n_states, n_actions
        self.step_size, self.eta, self.epsilon = step_size, eta, epsilon
        self.rng = np.random.default_rng(rng)
        self._Q = np.zeros((n_states, n_actions))
        self.gain_ = 0.0

    def act(self, observation: Any) -> int:
        """The action of largest Q here, or any with probability epsilon."""
        s = check_index("observation", observation, self.n_states)
        return int(choose_epsilon_greedy(self._Q[s], self.epsilon, self.rng))

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
        """Move Q and the gain by one temporal difference; TypeError or ValueError for a step that is none. O(A)."""
        step = check_step(self, observation, action, reward, next_observation)
        self.gain_ = learn_differential(*step, self._Q, self.gain_, self.step_size, self.eta)

    def advance(self, walk: Walk, trace: Trace) -> None:
        """Walk as many steps as `trace` holds, as `act` and `observe` would."""
        check_walk(walk, self)
        walk.state, self.gain_ = follow_differential(
            walk.world, walk.state, walk.rng, self.rng, self._Q, self.gain_, self.step_size, self.eta, self.epsilon,
            *trace.part(0, trace.rewards.size),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Q, the gain, and the generator of the exploration."""
        return {"Q": self._Q.copy(), "gain": self.gain_, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its agent had other sizes."""
        arrays, gain = checked_arrays(state, {"Q": self._Q}), float(state["gain"])
        check_generator_state(self.rng, state["rng"])
        self._Q, self.gain_ = arrays["Q"], gain
        self.rng.bit_generator.state = state["rng"]
