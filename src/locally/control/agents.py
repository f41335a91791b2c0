"""What every agent of this wing can do, and the loop that lets one act in a Gymnasium environment."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from locally.checks import check_count

__all__ = ["Agent", "play"]


@runtime_checkable
class Agent(Protocol):
    """Acts, learns from what it sees, and can be put away and taken up again.

    `observe` is told each step exactly once, in order; an agent that learns by episodes learns when one ends.
    `state_dict` holds plain numbers, strings, arrays and tensors in dictionaries and lists, random generators
    included, so that an agent that loads it goes on as if nothing had happened.
    """

    def act(self, observation: Any) -> Any:
        """The action to take here; may draw random numbers, and changes nothing else that learning depends on."""

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
        """Learn from the step (observation, action, reward, next_observation).

        Args:
            terminated: the process ended here, and nothing follows.
            truncated: the episode was cut off, though the process would go on.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the agent must have been constructed with the same arguments."""


def play(
    agent: Agent,
    env: Any,
    steps: int,
    *,
    seed: int | None = None,
    callback: Callable[[int, float], bool | None] | None = None,
) -> Float[np.ndarray, " steps"]:
    """Let `agent` act for `steps` steps, with a new episode whenever one ends, and return the rewards.

    Args:
        agent: acts and learns.
        env: a `gymnasium.Env`.
        steps: at least 1.
        seed: of the environment's first reset; the agent brings its own.
        callback: called with (steps taken, reward) after every step; True ends the play early.

    Raises:
        TypeError, ValueError: `agent` lacks a method, or `steps` is no positive integer.

    Complexity: that of the agent and of the environment.

    >>> class Still:
    ...     def act(self, observation): return 0
    ...     def observe(self, *step, **ending): pass
    ...     def state_dict(self): return {}
    ...     def load_state_dict(self, state): pass
    >>> class Bell:
    ...     def reset(self, seed=None): return 0, {}
    ...     def step(self, action): return 0, 1.0, True, False, {}
    >>> play(Still(), Bell(), 3)
    array([1., 1., 1.])
    """
    check_count("steps", steps)
    if not isinstance(agent, Agent):
        raise TypeError(f"agent must have act, observe, state_dict and load_state_dict, got {type(agent).__name__}")
    rewards = np.empty(steps)
    observation, _ = env.reset(seed=seed)
    for t in range(steps):
        action = agent.act(observation)
        following, reward, terminated, truncated, _ = env.step(action)
        agent.observe(observation, action, float(reward), following, terminated=terminated, truncated=truncated)
        rewards[t] = reward
        observation = env.reset()[0] if terminated or truncated else following
        if callback is not None and callback(t + 1, float(reward)):
            return rewards[: t + 1]
    return rewards
