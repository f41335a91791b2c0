"""UCRL2 and posterior sampling: a new policy whenever the visits of some (s, a) have doubled."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count, check_positive
from locally.control.average_reward.agents import RandomSource
from locally.control.average_reward.hypotheses import check_step
from locally.control.average_reward.kernels import extended_sweeps, follow_counts
from locally.control.average_reward.planning import optimistic_plan
from locally.control.average_reward.walks import Trace, Walk, check_walk
from locally.control.validity import check_generator_state, check_index, checked_arrays, checked_policy

MAX_SWEEPS = 20_000


class _Episodic:
    """Counts, and episodes that end when a count doubles; `_choose` gives the next policy."""

    def __init__(self, n_states: int, n_actions: int, rng: RandomSource) -> None:
        check_count("n_states", n_states)
        check_count("n_actions", n_actions)
        self.n_states, self.n_actions = n_states, n_actions
        cells = n_states, n_actions
        self.visits, self.rewards = np.zeros(cells), np.zeros(cells)
        self.arrivals = np.zeros((*cells, n_states))
        self.rng = np.random.default_rng(rng)
        self.policy_: Int[ndarray, " S"] | None = None
        self.switch_times_: list[int] = []
        self.n_steps_ = 0
        self._before = np.zeros(cells)
        self._episode_start, self._length, self._due = 0, 0, True

    @property
    def n_switches_(self) -> int:
        """Plans after the first, whether or not the policy differs."""
        return len(self.switch_times_)

    def _choose(self) -> Int[ndarray, " S"]:
        raise TypeError("of the agents that follow")

    def _limit(self) -> int:
        """Longest next episode."""
        return np.iinfo(np.int64).max

    def _plan(self) -> Int[ndarray, " S"]:
        if self._due or self.policy_ is None:
            self._length = self.n_steps_ - self._episode_start
            if self.policy_ is not None:
                self.switch_times_.append(self.n_steps_)
            self._before = self.visits.copy()
            self.policy_ = self._choose()
            self._episode_start, self._due = self.n_steps_, False
        return self.policy_

    def act(self, observation: Any) -> int:
        """The action of the current episode's policy, after a new plan where an episode begins."""
        return int(self._plan()[check_index("observation", observation, self.n_states)])

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
        """Count the step; a pair whose count has doubled ends the episode. TypeError or ValueError for no step."""
        s, a, r, following = check_step(self, observation, action, reward, next_observation)
        self.visits[s, a] += 1
        self.arrivals[s, a, following] += 1
        self.rewards[s, a] += r
        self.n_steps_ += 1
        doubled = self.visits[s, a] - self._before[s, a] >= max(1.0, self._before[s, a])
        self._due = bool(doubled) or self.n_steps_ - self._episode_start >= self._limit()

    def advance(self, walk: Walk, trace: Trace) -> None:
        """Walk as many steps as `trace` holds, as `act` and `observe` would; ValueError for a walk of other sizes."""
        check_walk(walk, self)
        done, steps = 0, trace.rewards.size
        while done < steps:
            policy = self._plan()
            left = self._limit() - (self.n_steps_ - self._episode_start)
            taken, walk.state = follow_counts(
                walk.world, policy, walk.state, walk.rng, self.visits, self.arrivals, self.rewards, self._before, left,
                *trace.part(done, steps),
            )  # fmt: skip
            done += taken
            self.n_steps_ += taken
            s, a = trace.states[done - 1], trace.actions[done - 1]
            doubled = self.visits[s, a] - self._before[s, a] >= max(1.0, self._before[s, a])
            self._due = bool(doubled) or self.n_steps_ - self._episode_start >= self._limit()

    _COUNTERS = ("n_steps_", "_episode_start", "_length")
    _ARRAYS = ("visits", "rewards", "arrivals", "_before")

    def state_dict(self) -> dict[str, Any]:
        """Counts, sums of rewards, the episode in progress with its policy, and the generator."""
        state: dict[str, Any] = {name.strip("_"): getattr(self, name) for name in (*self._COUNTERS, "_due")}
        state |= {name.strip("_"): getattr(self, name).copy() for name in self._ARRAYS}
        policy = None if self.policy_ is None else self.policy_.copy()
        return state | {
            "policy": policy,
            "switch_times": list(self.switch_times_),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its agent had other sizes."""
        arrays = checked_arrays(state, {name.strip("_"): getattr(self, name) for name in self._ARRAYS})
        plain = {name: int(state[name.strip("_")]) for name in self._COUNTERS}
        policy = state["policy"]
        if policy is not None:
            policy = checked_policy("policy", policy, self.n_states, self.n_actions)
        switch_times, due = [int(t) for t in state["switch_times"]], bool(state["due"])
        check_generator_state(self.rng, state["rng"])
        for name in self._ARRAYS:
            setattr(self, name, arrays[name.strip("_")])
        for name, value in plain.items():
            setattr(self, name, value)
        self.policy_, self.switch_times_, self._due = policy, switch_times, due
        self.rng.bit_generator.state = state["rng"]


class UCRL2(_Episodic):
    """Optimism over L1 balls around the estimated kernel and intervals around the rewards, by extended value iteration.

    Radii sqrt(14 S log(2 A t / delta) / n) and sqrt(7 log(2 S A t / delta) / (2 n)), both times `scale`; value
    iteration stops at 1 / sqrt(t). Source: Jaksch, Ortner & Auer, JMLR 11 (2010), figures 1 and 2.

    Args:
        n_states, n_actions: sizes.
        delta: failure probability, in (0, 1).
        scale: 1 is the theorem's; smaller ones learn faster, without its guarantee.

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> agent = UCRL2(2, 2)
    >>> agent.act(0) in (0, 1)
    True
    """

    def __init__(
        self, n_states: int, n_actions: int, *, delta: float = 0.05, scale: float = 1.0, rng: RandomSource = None
    ) -> None:
        check_positive("delta", delta, below=1)
        check_positive("scale", scale)
        super().__init__(n_states, n_actions, rng)
        self.delta, self.scale = delta, scale
        self._V = np.zeros(n_states)

    def _choose(self) -> Int[ndarray, " S"]:
        t = max(self.n_steps_, 1)
        n = np.maximum(self.visits, 1)
        S, A = n.shape
        r = self.rewards / n + self.scale * np.sqrt(3.5 * np.log(2 * S * A * t / self.delta) / n)
        radius = self.scale * np.sqrt(14 * S * np.log(2 * A * t / self.delta) / n)
        P = np.where(self.visits[:, :, None] > 0, self.arrivals / n[:, :, None], 1 / S)
        _, policy = extended_sweeps(P, radius, np.minimum(r, 1), self._V, 0.9, 1 / np.sqrt(t), MAX_SWEEPS)
        return policy

    def state_dict(self) -> dict[str, Any]:
        """As for any agent by episodes, and the values from which the next value iteration starts."""
        return super().state_dict() | {"V": self._V.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its agent had other sizes."""
        V = checked_arrays(state, {"V": self._V})["V"]
        super().load_state_dict(state)
        self._V = V


class PSRL(_Episodic):
    """Act optimally for a model drawn from the posterior: Dirichlet kernels, Beta rewards.

    Source: Osband, Russo & Van Roy (NeurIPS 2013), with the doubling episodes of UCRL2.

    Args:
        n_states, n_actions: sizes.
        prior: of each next state; default 1 / n_states.

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> agent = PSRL(2, 2, rng=0)
    >>> agent.act(0) in (0, 1)
    True
    """

    def __init__(self, n_states: int, n_actions: int, *, prior: float | None = None, rng: RandomSource = None) -> None:
        super().__init__(n_states, n_actions, rng)
        self.prior = 1 / n_states if prior is None else prior
        check_positive("prior", self.prior)

    def _choose(self) -> Int[ndarray, " S"]:
        P, r = self._sample()
        return optimistic_plan(P, r, np.ones_like(r), 0.0).policy  # at radius 0: of the drawn model itself

    def _sample(self) -> tuple[Float[ndarray, "S A S"], Float[ndarray, "S A"]]:
        draws = self.rng.standard_gamma(self.prior + self.arrivals) + 1e-300
        r = self.rng.beta(1 + self.rewards, 1 + np.maximum(self.visits - self.rewards, 0))
        return draws / draws.sum(axis=2, keepdims=True), r


class TSDE(PSRL):
    """Posterior sampling whose episodes also end when they are one step longer than the one before.

    Source: Ouyang et al. (NeurIPS 2017). Arguments as for `PSRL`.

    >>> TSDE(2, 2, rng=0).act(1) in (0, 1)
    True
    """

    def _limit(self) -> int:
        return self._length + 1
