"""A continuing process in progress, what is kept of it, and the regret of an agent that walks it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count, check_shape
from locally.control.agents import Agent
from locally.control.average_reward.kernels import walk_step
from locally.control.dynamic_programming import evaluate_gain
from locally.control.environments.processes import ContinuingMDP
from locally.control.validity import check_generator_state, check_index, checked_policy

CHUNK = 1 << 16  # steps whose states are held at once


class Walk:
    """The same draws as `ContinuingWorld`: one number for the first state, then two a step.

    Args:
        mdp: the process.
        seed: of the walk.

    >>> from locally.control.environments import riverswim
    >>> walk = Walk(riverswim(), seed=0)
    >>> walk.step(0), walk.state
    ((0, 0.0), 0)
    """

    def __init__(self, mdp: ContinuingMDP, seed: int | None = None) -> None:
        self.mdp = mdp
        self.rng = np.random.default_rng(seed)
        first = np.cumsum(mdp.start).searchsorted(self.rng.random(), side="right")
        self.state = int(min(first, np.flatnonzero(mdp.start)[-1]))
        self.world = (mdp.cumulative, mdp.R, mdp.noise == "bernoulli")

    def step(self, action: int) -> tuple[int, float]:
        """The next state and the reward."""
        action = check_index("action", action, self.mdp.n_actions)
        self.state, reward = walk_step(*self.world, self.state, action, self.rng)
        return self.state, reward

    def state_dict(self) -> dict[str, Any]:
        """The state that the process is in, and the generator of its draws."""
        return {"state": self.state, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on the same process; ValueError for a state that it does not have."""
        at = check_index("state", state["state"], self.mdp.n_states)
        check_generator_state(self.rng, state["rng"])
        self.state = at
        self.rng.bit_generator.state = state["rng"]


@dataclass(frozen=True)
class Trace:
    """States, actions and rewards of a stretch of steps, to be filled; ValueError where their lengths differ."""

    states: Int[ndarray, " steps"]
    actions: Int[ndarray, " steps"]
    rewards: Float[ndarray, " steps"]

    def __post_init__(self) -> None:
        for name in ("states", "actions"):
            check_shape(name, getattr(self, name), (self.rewards.size,))

    @classmethod
    def empty(cls, steps: int) -> "Trace":
        """One with room for `steps` steps, not yet filled."""
        return cls(np.empty(steps, np.int64), np.empty(steps, np.int64), np.empty(steps))

    def part(self, start: int, stop: int) -> tuple[ndarray, ndarray, ndarray]:
        """Views of states, actions and rewards from step `start` up to `stop`: writing to them fills the trace."""
        return self.states[start:stop], self.actions[start:stop], self.rewards[start:stop]


def check_walk(walk: Walk, of: Any, policy: Any = None) -> None:
    """Whether `of` has the walk's states and actions, and `policy`, if any, an action for each: loops do not look.

    Raises:
        TypeError, ValueError: sizes differ, the policy is none, or the walk is in no state.
    """
    for name in ("n_states", "n_actions"):
        if getattr(of, name) != getattr(walk.mdp, name):
            raise ValueError(f"walk must have {name} = {getattr(of, name)}, got {getattr(walk.mdp, name)}")
    check_index("walk.state", walk.state, walk.mdp.n_states)
    if policy is not None:
        checked_policy("policy", policy, of.n_states, of.n_actions)


@runtime_checkable
class FastAgent(Agent, Protocol):
    """An agent that also walks many steps at once, to the same effect as step by step."""

    def advance(self, walk: Walk, trace: Trace) -> None:
        """Walk as many steps as `trace` holds and write them there; the walk moves on."""


@dataclass(frozen=True)
class Regret:
    """Of one run, at `times`.

    Attributes:
        times: steps taken.
        realised: times * J* minus the rewards received.
        expected: sum over the steps of V*(s) - Q*(s, a), how much each action gave away. Its mean differs from that of
            `realised` by at most the span of V*, and it has none of the noise of rewards and transitions.
        switch_times: steps before which a new plan was made, the first left out; see `LOOP.switch_times_`.
        gain_gaps: J* minus the gain of the policy in use at `times`; NaN for agents without a fixed one.
        visits: how often each (s, a) was taken.
        states, actions: of every step, where they were asked for.
    """

    times: Int[ndarray, " n"]
    realised: Float[ndarray, " n"]
    expected: Float[ndarray, " n"]
    switch_times: Int[ndarray, " switches"]
    gain_gaps: Float[ndarray, " n"]
    visits: Int[ndarray, "S A"]
    states: Int[ndarray, " steps"] | None = None
    actions: Int[ndarray, " steps"] | None = None

    @property
    def n_switches(self) -> int:
        """Plans after the first."""
        return len(self.switch_times)

    def at(self, time: int, which: str = "realised") -> float:
        """Regret after `time` steps, which must be one of `times`."""
        return float(getattr(self, which)[np.flatnonzero(self.times == time)[0]])


def run_continuing(
    process: ContinuingMDP | Walk | Any,
    agent: Agent,
    steps: int,
    *,
    seed: int | None = None,
    times: Sequence[int] | None = None,
    keep: bool = False,
    callback: Callable[[int], bool | None] | None = None,
) -> Regret:
    """Let `agent` walk `process` and measure its regret against the exact optimum.

    Args:
        process: a finite process, a `Walk` to go on with, or a Gymnasium environment whose `unwrapped.mdp` is one; the
            last is stepped through its own interface.
        agent: with `advance`, stretches between policy changes are compiled; the result is the same.
        steps: at least 1.
        seed: of the walk or of the environment's reset; a `Walk` brings its own.
        times: when to look, ascending, up to `steps`; 100 equally spaced by default.
        keep: keep every state and action, 16 bytes a step.
        callback: called with the steps taken at each of `times`; True ends the run there.

    Raises:
        TypeError: actions or observations are not a finite set; agent lacks a method of `Agent`.
        ValueError: agent and process differ in size, steps or times are out of range.

    Complexity: the agent's and O(S A) a look.

    >>> from locally.control.average_reward import LOOP, TabularValue
    >>> from locally.control.environments import riverswim
    >>> agent = LOOP(TabularValue(6, 2), horizon=5000, span=6.4, rng=0)
    >>> regret = run_continuing(riverswim(), agent, 5000, seed=0, times=[1000, 5000])
    >>> bool(regret.expected[1] < 2 * 5000 ** 0.5 * 6.4), regret.n_switches < 30
    (True, True)
    """
    check_count("steps", steps)
    if not isinstance(agent, Agent):
        raise TypeError(f"agent must have act, observe, state_dict and load_state_dict, got {type(agent).__name__}")
    looks = (
        np.unique(np.linspace(0, steps, min(steps, 100) + 1).astype(int))[1:]
        if times is None
        else np.asarray(times, int)
    )
    if looks.size == 0 or looks[0] < 1 or looks[-1] > steps or (np.diff(looks) <= 0).any():
        raise ValueError(f"times must ascend within [1, {steps}], got {list(looks[:5])}...")
    course = _course(process, seed)
    mdp = course.mdp
    for name in ("n_states", "n_actions"):
        of_agent = getattr(agent, name, getattr(mdp, name))
        if of_agent != getattr(mdp, name):
            raise ValueError(f"agent must be made for {name} = {getattr(mdp, name)}, got {of_agent}")
    solution = mdp.solve()
    given_away = np.maximum(solution.bias[:, None] - solution.q, 0)
    first_switch = len(getattr(agent, "switch_times_", ()))
    began = getattr(agent, "n_steps_", 0)

    gain_gap = _GainGap(mdp, agent, solution.gain)
    visits = np.zeros((mdp.n_states, mdp.n_actions), np.int64)
    realised, expected, gaps, done = [], [], [], 0
    reward = lost = 0.0
    kept: list[Trace] = []
    for look in looks:
        while done < look:
            trace = Trace.empty(min(CHUNK, int(look) - done))
            course.walk(agent, trace)
            done += trace.rewards.size
            reward += trace.rewards.sum()
            lost += given_away[trace.states, trace.actions].sum()
            np.add.at(visits, (trace.states, trace.actions), 1)
            if keep:
                kept.append(trace)
        realised.append(done * solution.gain - reward)
        expected.append(lost)
        gaps.append(gain_gap(course.state))
        if callback is not None and callback(done):
            break
    switches = np.array(getattr(agent, "switch_times_", ()), np.int64)[first_switch:] - began
    return Regret(
        looks[: len(realised)],
        np.array(realised),
        np.array(expected),
        switches[switches > 0],
        np.array(gaps),
        visits,
        np.concatenate([t.states for t in kept]) if keep else None,
        np.concatenate([t.actions for t in kept]) if keep else None,
    )


class _GainGap:
    """Of the agent's present policy, evaluated once for each policy."""

    def __init__(self, mdp: ContinuingMDP, agent: Any, best: float) -> None:
        self._mdp, self._agent, self._best = mdp, agent, best
        self._gains: dict[bytes, Float[ndarray, " S"]] = {}

    def __call__(self, state: int) -> float:
        policy = getattr(self._agent, "policy_", None)
        if policy is None:
            return float("nan")
        if (key := policy.tobytes()) not in self._gains:
            self._gains[key] = evaluate_gain(self._mdp.P, self._mdp.R, policy).gain
        return self._best - float(self._gains[key][state])


class _OnWalk:
    def __init__(self, walk: Walk) -> None:
        self._walk, self.mdp = walk, walk.mdp

    @property
    def state(self) -> int:
        return self._walk.state

    def walk(self, agent: Agent, trace: Trace) -> None:
        if isinstance(agent, FastAgent):
            agent.advance(self._walk, trace)
            return
        for t in range(trace.rewards.size):
            s = self._walk.state
            a = agent.act(s)
            following, reward = self._walk.step(a)
            agent.observe(s, a, reward, following)
            trace.states[t], trace.actions[t], trace.rewards[t] = s, a, reward


class _OnEnv:
    def __init__(self, env: Any, seed: int | None) -> None:
        self._env, self.mdp = env, env.unwrapped.mdp
        self.state, _ = env.reset(seed=seed)

    def walk(self, agent: Agent, trace: Trace) -> None:
        for t in range(trace.rewards.size):
            a = agent.act(self.state)
            following, reward, *_ = self._env.step(a)
            agent.observe(self.state, a, float(reward), following)
            trace.states[t], trace.actions[t], trace.rewards[t] = self.state, a, reward
            self.state = following


def _course(process: Any, seed: int | None) -> _OnWalk | _OnEnv:
    if isinstance(process, ContinuingMDP):
        return _OnWalk(Walk(process, seed))
    if isinstance(process, Walk):
        return _OnWalk(process)
    for name in ("observation_space", "action_space"):
        space = getattr(process, name, None)
        if not isinstance(getattr(space, "n", None), int | np.integer) or getattr(space, "start", 0) != 0:
            raise TypeError(
                f"{name} must be Discrete, starting at 0: only finite sets are dealt with here, got {space}"
            )
    if not isinstance(getattr(process.unwrapped, "mdp", None), ContinuingMDP):
        raise TypeError(
            "process must hold a ContinuingMDP as unwrapped.mdp, for its exact gain; use locally.control.agents.play "
            f"for others, got {process}"
        )
    return _OnEnv(process, seed)
