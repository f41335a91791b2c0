"""How many groups every sub-layer may lose: integer levels around a centre, and moves that keep the total.

A sub-layer is the attention of a block, whose groups are heads, or its feed-forward part, whose groups are neurons. The
number of heads and the number of neurons removed from the whole model never change. Source: arXiv 2503.09657, section
3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from locally.checks import check_count

HEADS, NEURONS = "heads", "neurons"
KINDS = (HEADS, NEURONS)
LARGEST_NUMBER_OF_MOVES = 4

Levels = tuple[int, ...]  # one step count a sub-layer, relative to its centre
Removed = tuple[int, ...]  # groups that go from each sub-layer, in the order of `Space.sublayers`


class SubLayer(NamedTuple):
    """Where, which kind, and of how many groups."""

    block: int
    kind: str
    groups: int

    @property
    def name(self) -> str:
        """As files and tables call it: blocks.<number>.<kind>."""
        return f"blocks.{self.block}.{self.kind}"


@dataclass(frozen=True)
class Space:
    """What the search can choose from.

    Args:
        sublayers: in the order of blocks, heads before neurons.
        centres: groups removed at level 0.
        steps: groups from one level to the next; the same for all sub-layers of a kind.
        reach: levels on each side of the centre, at least 0; fewer where the sub-layer ends.
        prune: kinds that can change at all.
    """

    sublayers: tuple[SubLayer, ...]
    centres: Removed
    steps: tuple[int, ...]
    reach: int = 4
    prune: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        check_count("reach", self.reach, at_least=0)
        if not len(self.sublayers) == len(self.centres) == len(self.steps):
            raise ValueError("sublayers, centres and steps must have the same length")
        for sublayer, centre, step in zip(self.sublayers, self.centres, self.steps):
            check_count("steps", step)
            if not 0 <= centre <= sublayer.groups:
                raise ValueError(f"centres must lie in [0, {sublayer.groups}] for {sublayer.name}, got {centre}")
        for kind in KINDS:
            if len({s for layer, s in zip(self.sublayers, self.steps) if layer.kind == kind}) > 1:
                raise ValueError(f"steps must be equal for all sub-layers of kind {kind}, or the total cannot be kept")

    @property
    def start(self) -> Levels:
        """Level 0 everywhere."""
        return (0,) * len(self.sublayers)

    def bounds(self, i: int) -> tuple[int, int]:
        """Lowest and highest level of sub-layer i."""
        if self.sublayers[i].kind not in self.prune:
            return 0, 0
        down = min(self.centres[i] // self.steps[i], self.reach)
        up = min((self.sublayers[i].groups - self.centres[i]) // self.steps[i], self.reach)
        return -down, up

    def removed(self, levels: Levels) -> Removed:
        """Groups removed from every sub-layer at these levels."""
        return tuple(c + j * s for c, j, s in zip(self.centres, levels, self.steps))

    def choices(self, i: int) -> list[int]:
        """Groups removed at every level of sub-layer i, ascending."""
        low, high = self.bounds(i)
        return [self.centres[i] + j * self.steps[i] for j in range(low, high + 1)]

    def mutant(self, parent: Levels, rng: np.random.Generator) -> Levels:
        """Move min(U{1..4}, U{1..4}) single steps, each from one sub-layer to another of the same kind."""
        child = list(parent)
        for _ in range(min(rng.integers(1, LARGEST_NUMBER_OF_MOVES + 1, 2))):
            pairs = self._movable(child)
            if not pairs:
                break
            donor = list(pairs)[rng.integers(len(pairs))]
            receivers = pairs[donor]
            child[donor] -= 1
            child[receivers[rng.integers(len(receivers))]] += 1
        return tuple(child)

    def _movable(self, levels: Sequence[int]) -> dict[int, list[int]]:
        """For each sub-layer that can become one level denser: those of its kind that can lose one level more."""
        bounds = [self.bounds(i) for i in range(len(levels))]
        loses = [i for i, (_, high) in enumerate(bounds) if levels[i] < high]
        pairs = {}
        for i, (low, _) in enumerate(bounds):
            if levels[i] > low:
                receivers = [j for j in loses if j != i and self.sublayers[j].kind == self.sublayers[i].kind]
                if receivers:
                    pairs[i] = receivers
        return pairs


def spread(total: int, capacities: Sequence[int]) -> list[int]:
    """`total` over layers in proportion to their capacities, in integers, with the rounding carried on.

    >>> spread(7, [4, 4, 4])
    [2, 3, 2]
    """
    whole, given, seen, shares = sum(capacities), 0, 0, []
    for capacity in capacities:
        seen += capacity
        share = (2 * total * seen + whole) // (2 * whole) - given  # round half up, on integers
        given += share
        shares.append(share)
    return shares


def uniform(sublayers: Sequence[SubLayer], sparsity: float, prune: Sequence[str] = KINDS) -> Removed:
    """Groups to remove when every sub-layer of a kind loses the same share, up to one group."""
    removed = dict.fromkeys(range(len(sublayers)), 0)
    for kind in prune:
        of_kind = [i for i, s in enumerate(sublayers) if s.kind == kind]
        capacities = [sublayers[i].groups for i in of_kind]
        removed |= dict(zip(of_kind, spread(round(sparsity * sum(capacities)), capacities)))
    return tuple(removed[i] for i in range(len(sublayers)))


def step_sizes(sublayers: Sequence[SubLayer], interval: float, *, least: tuple[int, int] = (1, 32)) -> tuple[int, ...]:
    """Groups of one step: `interval` of the smallest sub-layer of the kind, at least `least` (heads, neurons)."""
    by_kind = {}
    for kind, floor in zip(KINDS, least):
        groups = [s.groups for s in sublayers if s.kind == kind]
        if groups:
            by_kind[kind] = max(round(interval * min(groups)), floor, 1)
    return tuple(by_kind[s.kind] for s in sublayers)
