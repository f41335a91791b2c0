"""Gymnasium spaces as numbers: what a model or a learner makes of observations and actions, checked before any step."""

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.errors import require


def check_box(name: str, space: Any, *, bounded: bool = False) -> None:
    """`space` must be a one-dimensional Box, `bounded` with finite limits.

    Raises:
        TypeError: it is another space.
        ValueError: it has several dimensions, or infinite limits where they must be finite.
    """
    spaces = require("gymnasium", "control").spaces
    if not isinstance(space, spaces.Box):
        raise TypeError(f"{name} must be a Box, got {space}: flatten other spaces first")
    if len(space.shape) != 1 or space.shape[0] == 0:
        raise ValueError(f"{name} must have one dimension, got shape {space.shape}")
    if bounded and not space.is_bounded():
        raise ValueError(f"{name} must have finite limits, got low {space.low} and high {space.high}")


def check_discrete(name: str, space: Any) -> None:
    """`space` must be Discrete.

    Raises:
        TypeError: it is another space.
    """
    if not isinstance(space, require("gymnasium", "control").spaces.Discrete):
        raise TypeError(f"{name} must be Discrete, got {space}")


def check_vector(name: str, value: Any, width: int) -> Float[ndarray, " width"]:
    """`value` as float64 vector of that width.

    Raises:
        ValueError: another shape, NaN or infinity.
    """
    vector = np.asarray(value, np.float64)
    if vector.shape != (width,):
        raise ValueError(f"{name} must have shape ({width},), got {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return vector


class ActionCode:
    """Actions as model inputs: one-hot for Discrete, scaled to [-1, 1] for Box.

    Raises:
        TypeError: the space is neither.
        ValueError: a Box with several dimensions or infinite limits.

    >>> from gymnasium.spaces import Discrete
    >>> ActionCode(Discrete(3)).encode(np.array([2, 0]))
    array([[0., 0., 1.],
           [1., 0., 0.]])
    """

    def __init__(self, space: Any) -> None:
        spaces = require("gymnasium", "control").spaces
        self.n_discrete = 0
        if isinstance(space, spaces.Discrete):
            self.n_discrete, self.start, self.width = int(space.n), int(space.start), int(space.n)
        elif isinstance(space, spaces.Box):
            check_box("action_space", space, bounded=True)
            self.width = space.shape[0]
            self.centre = (space.high.astype(np.float64) + space.low) / 2
            self.radius = np.maximum((space.high.astype(np.float64) - space.low) / 2, np.finfo(np.float64).tiny)
        else:
            raise TypeError(f"action_space must be Box or Discrete, got {space}")

    def check(self, action: Any) -> Any:
        """The action as an index or a vector.

        Raises:
            ValueError: it is outside a Discrete space, or of another shape than a Box, NaN or infinite.
        """
        if not self.n_discrete:
            return check_vector("action", action, self.width)
        if not np.ndim(action) == 0 or not self.start <= int(action) < self.start + self.n_discrete:
            raise ValueError(f"action must lie in {self.start} ... {self.start + self.n_discrete - 1}, got {action!r}")
        return int(action)

    def encode(self, actions: ndarray) -> Float[ndarray, "n width"]:
        """Model inputs for a batch of actions: (n,) indices or (n, width) vectors."""
        if self.n_discrete:
            return np.eye(self.n_discrete)[np.asarray(actions, np.int64) - self.start]
        return (actions - self.centre) / self.radius
