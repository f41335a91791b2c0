"""Gymnasium environments in which world models are compared: walled and windy grids, and a point mass to steer."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count, check_nonnegative
from locally.errors import require

require("gymnasium", "control")
import gymnasium  # noqa: E402 - after the message that names the extra

MOVES = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])  # up, right, down, left
Cell = tuple[int, int]


class Gridworld(gymnasium.Env):
    """Walk on a grid from start to goal; walls and borders stop a move, wind in a column adds to it.

    Observations are the integers (x, y), actions up, right, down, left.

    Args:
        width, height: at least 1.
        start, goal: cells that are no walls.
        walls: cells that cannot be entered.
        wind: upward cells that each column adds to a move out of it; none by default.
        step_reward: of every step that does not reach the goal, whose reward is 1.
        max_steps: after which an episode is truncated.

    Raises:
        ValueError, TypeError: a cell is outside, start or goal is a wall, or a count is out of range.

    >>> env = Gridworld(8, 8, goal=(7, 7))
    >>> env.reset(seed=0)[0]
    array([0, 0])
    >>> env.step(1)[0]
    array([1, 0])
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's name and form

    def __init__(
        self,
        width: int = 8,
        height: int = 8,
        *,
        start: Cell = (0, 0),
        goal: Cell = (0, 7),
        walls: Iterable[Cell] = (),
        wind: Sequence[int] | None = None,
        step_reward: float | int = 0.0,
        max_steps: int = 200,
    ) -> None:
        check_count("width", width)
        check_count("height", height)
        check_count("max_steps", max_steps)
        self.limits = np.array([width - 1, height - 1])
        self.walls = frozenset((int(x), int(y)) for x, y in walls)
        for name, cell in (("start", start), ("goal", goal), *(("walls", wall) for wall in self.walls)):
            if not (0 <= cell[0] < width and 0 <= cell[1] < height):
                raise ValueError(f"{name} must lie on the {width} x {height} grid, got {cell}")
        for name, cell in (("start", start), ("goal", goal)):
            if tuple(cell) in self.walls:
                raise ValueError(f"{name} must not be a wall, got {cell}")
        self.wind = np.zeros(width, np.int64) if wind is None else np.array(wind, np.int64)
        if self.wind.shape != (width,):
            raise ValueError(f"wind must have one entry for each of {width} columns, got {wind}")
        self.start, self.goal = np.array(start), tuple(goal)
        self.step_reward, self.max_steps = float(step_reward), max_steps
        self.observation_space = gymnasium.spaces.Box(0, self.limits, dtype=np.int64)
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))
        self.at = self.start.copy()
        self.n_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.at, self.n_steps = self.start.copy(), 0
        return self.at.copy(), {}

    def step(self, action: Any) -> tuple[ndarray, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise ValueError(f"action must lie in {self.action_space}, got {action!r}")
        self.at = self.after(self.at, int(action))
        self.n_steps += 1
        arrived = tuple(self.at.tolist()) == self.goal
        reward = 1.0 if arrived else self.step_reward
        return self.at.copy(), reward, arrived, self.n_steps >= self.max_steps and not arrived, {}

    def after(self, cell: Int[ndarray, " 2"], action: int) -> Int[ndarray, " 2"]:
        """The cell that follows; a blocked part of a move is left out."""
        moved = np.clip(cell + MOVES[action], 0, self.limits)
        if tuple(moved.tolist()) in self.walls:
            moved = cell.copy()
        for _ in range(abs(self.wind[cell[0]])):
            blown = np.clip(moved + np.sign(self.wind[cell[0]]) * MOVES[0], 0, self.limits)
            if tuple(blown.tolist()) in self.walls:
                break
            moved = blown
        return moved


def walled_gridworld() -> Gridworld:
    """8 x 8, with a wall across it that is open at the far end: the goal is seven cells away and 21 steps.

    >>> walled_gridworld().goal
    (0, 7)
    """
    return Gridworld(8, 8, start=(0, 0), goal=(0, 7), walls=[(x, 4) for x in range(7)])


def windy_gridworld() -> Gridworld:
    """10 x 7, wind in the middle columns (Sutton and Barto, example 6.5); the shortest way takes 15 steps.

    >>> windy_gridworld().wind
    array([0, 0, 0, 1, 1, 1, 2, 2, 1, 0])
    """
    return Gridworld(10, 7, start=(0, 3), goal=(7, 3), wind=(0, 0, 0, 1, 1, 1, 2, 2, 1, 0))


class PointMass(gymnasium.Env):
    """Push a mass on the square [-1, 1]^2 to the origin: a quick problem of continuous control.

    Observations are position and velocity, actions a force in [-1, 1]^2. A step lasts 0.1: v <- (1 - friction) v +
    0.3 a, clipped to [-3, 3]^2, then x <- x + 0.1 v; walls stop the mass. The reward is -|x|^2 - 0.01 |a|^2.

    Args:
        friction: share of the velocity that a step takes away, in [0, 1].
        max_steps: after which an episode is truncated.

    Raises:
        ValueError, TypeError: an argument is out of range.

    >>> env = PointMass()
    >>> observation, _ = env.reset(seed=0)
    >>> observation.shape, env.step(np.zeros(2, np.float32))[1] < 0
    ((4,), True)
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's name and form

    def __init__(self, friction: float | int = 0.1, max_steps: int = 50) -> None:
        check_nonnegative("friction", friction)
        if friction > 1:
            raise ValueError(f"friction must lie in [0, 1], got {friction}")
        check_count("max_steps", max_steps)
        self.friction, self.max_steps = float(friction), max_steps
        limits = np.array([1, 1, 3, 3], np.float32)
        self.observation_space = gymnasium.spaces.Box(-limits, limits)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,))
        self.state = np.zeros(4)
        self.n_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = np.concatenate([self.np_random.uniform(-1, 1, 2), np.zeros(2)])
        self.n_steps = 0
        return self.state.astype(np.float32), {}

    def step(self, action: Any) -> tuple[ndarray, float, bool, bool, dict[str, Any]]:
        force = np.asarray(action, np.float64)
        if force.shape != (2,) or not np.isfinite(force).all():
            raise ValueError(f"action must be two finite numbers, got {action!r}")
        force = force.clip(-1, 1)
        self.state = self.after(self.state, force)
        self.n_steps += 1
        reward = -float(self.state[:2] @ self.state[:2]) - 0.01 * float(force @ force)
        return self.state.astype(np.float32), reward, False, self.n_steps >= self.max_steps, {}

    def after(self, state: Float[ndarray, " 4"], force: Float[ndarray, " 2"]) -> Float[ndarray, " 4"]:
        """Position and velocity one step later; a velocity is at most 3 in each direction."""
        velocity = np.clip((1 - self.friction) * state[2:] + 0.3 * force, -3, 3)
        position = state[:2] + 0.1 * velocity
        stopped = np.abs(position) > 1
        return np.concatenate([position.clip(-1, 1), np.where(stopped, 0.0, velocity)])
