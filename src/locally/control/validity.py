"""What makes arrays a Markov decision process, and what is said of those that are none."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_finite

TOLERANCE = 1e-8  # on sums of probabilities and on norms, for arrays that went through other people's arithmetic


def check_kernel(name: str, P: Float[ndarray, "..."]) -> None:
    """Transition probabilities: the last axis is non-negative and sums to 1."""
    check_finite(name, P)
    if P.min(initial=0.0) < 0:
        raise ValueError(f"{name} must hold probabilities, got the negative entry {P.min():.3g}")
    gap = np.abs(P.sum(axis=-1) - 1).max(initial=0.0)
    if gap > TOLERANCE:
        raise ValueError(f"{name} must sum to 1 over its last axis, but a sum is off by {gap:.3g}")


def check_unit_interval(name: str, values: Float[ndarray, "..."]) -> None:
    """Mean rewards or losses: every entry in [0, 1]."""
    check_finite(name, values)
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    if low < 0 or high > 1 + TOLERANCE:
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.6g} to {high:.6g}")


def check_unit_ball(name: str, features: Float[ndarray, "..."]) -> None:
    """Features: every vector along the last axis has Euclidean norm at most 1."""
    check_finite(name, features)
    longest = np.linalg.norm(features, axis=-1).max(initial=0.0)
    if longest > 1 + TOLERANCE:
        raise ValueError(f"{name} must have Euclidean norm at most 1, got a vector of norm {longest:.6g}")


def check_index(name: str, index: Any, size: int) -> int:
    """A state or action of a finite set, as a plain int.

    >>> check_index("action", np.int64(1), 3)
    1
    """
    if not isinstance(index, int | np.integer) and not (isinstance(index, ndarray) and index.ndim == 0):
        raise TypeError(f"{name} must be an integer below {size}, got {index!r}: only finite sets are dealt with here")
    if not 0 <= index < size:
        raise ValueError(f"{name} must be one of 0, ..., {size - 1}, got {index}")
    return int(index)


def checked_policy(name: str, policy: Any, n_states: int, n_actions: int) -> Int[ndarray, " S"]:
    """One action for each state, as a new array: compiled loops index by it without looking.

    >>> checked_policy("policy", [1, 0], 2, 2)
    array([1, 0])
    """
    array = np.asarray(policy)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.shape != (n_states,):
        raise ValueError(f"{name} must have an action for each of {n_states} states, got shape {array.shape}")
    if array.min() < 0 or array.max() >= n_actions:
        raise ValueError(f"{name} must hold actions 0, ..., {n_actions - 1}, got {array.min()} to {array.max()}")
    return np.array(array, np.int64, order="C")


def checked_arrays(state: Mapping[str, Any], here: Mapping[str, ndarray]) -> dict[str, ndarray]:
    """Copies of a saved state's arrays, all of which must have the shape and the kind of number of those `here`.

    Raises:
        ValueError: one is missing or differs; the message names it.

    >>> checked_arrays({"Q": np.ones((1, 2))}, {"Q": np.zeros((1, 2))})
    {'Q': array([[1., 1.]])}
    """
    found = {}
    for name, own in here.items():
        if name not in state:
            raise ValueError(f"state must hold {name}, got {sorted(state)}")
        array = np.asarray(state[name])
        if array.shape != own.shape:
            raise ValueError(f"state must be of the same sizes: its {name} has shape {array.shape}, not {own.shape}")
        if not np.can_cast(array.dtype, own.dtype, "same_kind"):
            raise ValueError(f"state must hold {name} as {own.dtype}, got {array.dtype}")
        found[name] = np.array(array, own.dtype, order="C")
    return found


def check_generator_state(rng: np.random.Generator, state: Any) -> None:
    """Whether `rng` would take this state of a bit generator; ValueError if not, and `rng` stays as it is."""
    trial = type(rng.bit_generator)()
    try:
        trial.state = state
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"state must hold a state of {type(trial).__name__} as rng: {error}") from error
