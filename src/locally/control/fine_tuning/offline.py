"""Logged transitions: what they must look like, and the counts that everything else is computed from."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count, check_shape
from locally.control.environments import EpisodicMDP
from locally.control.validity import check_unit_interval


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """Transitions (h, s, a, r, s') in any order, from any policies; whole trajectories are not needed.

    Given (h, s, a), reward and next state must be fresh draws from the process: rows may be chosen by what other rows
    show, but not by their own outcome.

    Args:
        layers: h in 0, ..., horizon - 1.
        states, actions, next_states: indices below n_states and n_actions.
        rewards: in [0, 1].
        horizon, n_states, n_actions: sizes of the process.

    Raises:
        TypeError: an index array holds something other than integers, or a size is no integer.
        ValueError: arrays differ in length, an index is out of range, or a reward outside [0, 1]; the message names the
            first such row.

    >>> log = OfflineDataset([0, 0, 1], [0, 0, 1], [1, 1, 0], [0.0, 1.0, 0.5], [1, 1, 0],
    ...                      horizon=2, n_states=2, n_actions=2)
    >>> len(log), log.visits()[0].tolist()
    (3, [[0.0, 2.0], [0.0, 0.0]])
    """

    layers: Int[ndarray, " n"]
    states: Int[ndarray, " n"]
    actions: Int[ndarray, " n"]
    rewards: Float[ndarray, " n"]
    next_states: Int[ndarray, " n"]
    horizon: int
    n_states: int
    n_actions: int

    def __init__(
        self,
        layers: Any,
        states: Any,
        actions: Any,
        rewards: Any,
        next_states: Any,
        *,
        horizon: int,
        n_states: int,
        n_actions: int,
    ) -> None:
        for name, size in {"horizon": horizon, "n_states": n_states, "n_actions": n_actions}.items():
            check_count(name, size)
            object.__setattr__(self, name, int(size))
        limits = {"layers": horizon, "states": n_states, "actions": n_actions, "next_states": n_states}
        given = {"layers": layers, "states": states, "actions": actions, "next_states": next_states}
        n = np.asarray(layers).size
        for name, limit in limits.items():
            object.__setattr__(self, name, _indices(name, given[name], n, limit))
        paid = np.array(rewards, dtype=np.float64)
        check_shape("rewards", paid, (n,))
        check_unit_interval("rewards", paid)
        object.__setattr__(self, "rewards", paid)

    @classmethod
    def empty(cls, horizon: int, n_states: int, n_actions: int) -> "OfflineDataset":
        """A log of nothing."""
        none: list[int] = []
        return cls(none, none, none, none, none, horizon=horizon, n_states=n_states, n_actions=n_actions)

    @classmethod
    def from_minari(cls, dataset: Any, *, horizon: int, n_states: int, n_actions: int) -> "OfflineDataset":
        """Episodes as Minari stores them, observed as (h, s) pairs like those of `EpisodicWorld`.

        Args:
            dataset: a `minari.MinariDataset`, or any iterable of episodes with `observations` (one more than
                actions), `actions` and `rewards`.

        Raises:
            TypeError, ValueError: as the constructor does; or observations are no (h, s) pairs.
        """
        episodes: Iterable[Any] = dataset.iterate_episodes() if hasattr(dataset, "iterate_episodes") else dataset
        rows: list[list[ndarray]] = [[], [], [], [], []]
        for episode in episodes:
            seen = np.asarray(episode.observations)
            check_shape("observations of an episode", seen, (len(episode.actions) + 1, 2))
            columns = (seen[:-1, 0], seen[:-1, 1], episode.actions, episode.rewards, seen[1:, 1])
            for column, values in zip(rows, columns, strict=True):
                column.append(np.asarray(values))
        if not rows[0]:
            return cls.empty(horizon, n_states, n_actions)
        return cls(*map(np.concatenate, rows), horizon=horizon, n_states=n_states, n_actions=n_actions)

    def __len__(self) -> int:
        return self.layers.size

    def counts(self, rows: Any = slice(None)) -> tuple[Float[ndarray, "H S A S"], Float[ndarray, "H S A"]]:
        """How often (h, s, a) led to s', and the sum of rewards there; over `rows` (an index, all by default).

        O(n + H S^2 A).
        """
        shape = (self.horizon, self.n_states, self.n_actions, self.n_states)
        cells = np.ravel_multi_index((self.layers[rows], self.states[rows], self.actions[rows]), shape[:3])
        full = cells * self.n_states + self.next_states[rows]
        counts = np.bincount(full, minlength=int(np.prod(shape))).astype(np.float64).reshape(shape)
        sums = np.bincount(cells, self.rewards[rows], minlength=int(np.prod(shape[:3])))
        return counts, sums.astype(np.float64).reshape(shape[:3])

    def visits(self) -> Float[ndarray, "H S A"]:
        """How often each (h, s, a) occurs."""
        return self.counts()[0].sum(axis=-1)

    def covariance(self, features: Float[ndarray, "H S A d"]) -> Float[ndarray, "H d d"]:
        """Lambda_off,h, the sum of phi phi^T over the rows of layer h. O(n + H S A d^2)."""
        check_shape("features", features, (self.horizon, self.n_states, self.n_actions, None))
        return np.einsum("hsa,hsai,hsaj->hij", self.visits(), features, features, optimize=True)

    def shares(self, parts: int, rng: np.random.Generator) -> list[Int[ndarray, " rows"]]:
        """Row numbers dealt out at random into `parts` piles of nearly equal size."""
        check_count("parts", parts)
        return np.array_split(rng.permutation(len(self)), parts)

    def check_possible(self, mdp: EpisodicMDP) -> None:
        """Refuse a log that this process cannot have produced.

        Raises:
            ValueError: sizes differ, a transition has probability zero, or a Bernoulli reward is neither 0 nor 1.
        """
        for name in ("horizon", "n_states", "n_actions"):
            if getattr(self, name) != getattr(mdp, name):
                raise ValueError(f"offline data have {name} {getattr(self, name)}, the process {getattr(mdp, name)}")
        chance = mdp.P[self.layers, self.states, self.actions, self.next_states]
        if (impossible := chance <= 0).any():
            i = int(impossible.argmax())
            what = f"(h, s, a, s') = ({self.layers[i]}, {self.states[i]}, {self.actions[i]}, {self.next_states[i]})"
            raise ValueError(f"offline data hold an impossible transition: row {i}, {what}, has probability 0")
        if mdp.noise == "bernoulli" and (odd := (self.rewards != 0) & (self.rewards != 1)).any():
            i = int(odd.argmax())
            raise ValueError(f"rewards of offline data must be 0 or 1 in this process, row {i} holds {self.rewards[i]}")


def _indices(name: str, values: Any, n: int, limit: int) -> Int[ndarray, " n"]:
    given = np.asarray(values)
    check_shape(name, given, (n,))
    if given.size and not np.issubdtype(given.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {given.dtype}")
    if (outside := (given < 0) | (given >= limit)).any():
        row = int(outside.argmax())
        raise ValueError(f"{name} must lie in 0, ..., {limit - 1}, but row {row} holds {given[row]}")
    return given.astype(np.int64)
