"""The evolutionary search for a level of every sub-layer.

Mutants of one parent pass through stages: few tokens for all of them, many for the few that are left. Scores are asked
for all candidates of a stage at once, so that whoever computes them can share work. Source: arXiv 2503.09657, algorithm
2.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count
from locally.sequence.structured_pruning.levels import Levels, Removed, Space

ATTEMPTS_PER_MUTANT = 20


class Batch(NamedTuple):
    """Calibration sequences; of the last one only as much as the number of tokens leaves."""

    sequences: Int[ndarray, " count"]
    tokens: int


Score = Callable[[Sequence[Removed], Batch], Sequence[float] | Float[ndarray, " candidates"]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how broadly to search.

    Args:
        generations: at least 1.
        offspring: distinct mutants a generation; fewer, with a warning, where there are not as many.
        survivors: how many each stage leaves; the last leaves 1.
        tokens_per_stage: calibration tokens that each stage scores on.
        patience: stop after so many generations without a change; None for never.
    """

    generations: int = 50
    offspring: int = 128
    survivors: tuple[int, ...] = (16, 4, 1)
    tokens_per_stage: tuple[int, ...] = (2048, 16384, 131072)
    patience: int | None = None

    def __post_init__(self) -> None:
        check_count("generations", self.generations)
        check_count("offspring", self.offspring)
        if not self.survivors or self.survivors[-1] != 1 or len(self.survivors) != len(self.tokens_per_stage):
            raise ValueError(
                "survivors and tokens_per_stage must have one entry a stage, the last of survivors being 1, "
                f"got {self.survivors} and {self.tokens_per_stage}"
            )
        for name in ("survivors", "tokens_per_stage"):
            for value in getattr(self, name):
                check_count(name, value)
        if self.patience is not None:
            check_count("patience", self.patience)


@dataclass
class Progress:
    """Where a search stands; `to_dict` is JSON, and a search that starts from it goes on as if never interrupted."""

    parent: Levels
    generation: int = 0
    unchanged: int = 0
    rng: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float | int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Progress":
        """Where the search stood that wrote `to_dict`."""
        return cls(**{**stored, "parent": tuple(stored["parent"])})


def search(
    space: Space,
    score: Score,
    schedule: Schedule,
    *,
    sequences: int,
    length: int,
    rng: np.random.Generator,
    progress: Progress | None = None,
    on_generation: Callable[[Progress], None] | None = None,
) -> Progress:
    """Find levels with a low score at an unchanged number of heads and of neurons.

    Args:
        score: of each candidate (groups removed, one number a sub-layer) on a batch; lower is better.
        sequences, length: of the calibration set that batches are drawn from.
        rng: its state is part of the progress.
        progress: of an earlier call that was interrupted.
        on_generation: called after every generation, to store the progress.

    Raises:
        ValueError: a stage asks for more tokens than there are.

    Complexity:
        generations * sum over stages of candidates * tokens of that stage, in token evaluations.
    """
    for tokens in schedule.tokens_per_stage:
        if tokens > sequences * length:
            raise ValueError(
                f"tokens_per_stage must be at most the {sequences * length} tokens of the calibration set, got {tokens}"
            )
    progress = progress or Progress(space.start)
    if progress.rng:
        rng.bit_generator.state = progress.rng
    while progress.generation < schedule.generations:
        if schedule.patience is not None and progress.unchanged >= schedule.patience:
            break
        winner, record = one_generation(space, score, schedule, progress.parent, sequences, length, rng)
        progress.unchanged = progress.unchanged + 1 if winner == progress.parent else 0
        progress.generation += 1
        progress.parent = winner
        progress.history.append({"generation": progress.generation, **record})
        progress.rng = rng.bit_generator.state  # type: ignore[assignment]
        if on_generation is not None:
            on_generation(progress)
    return progress


def one_generation(
    space: Space,
    score: Score,
    schedule: Schedule,
    parent: Levels,
    sequences: int,
    length: int,
    rng: np.random.Generator,
) -> tuple[Levels, dict[str, float]]:
    """The best of the parent and its mutants, and what the last stage said of them."""
    candidates = mutants(space, parent, schedule.offspring, rng)
    wanted = {k: sum(r for s, r in zip(space.sublayers, space.centres) if s.kind == k) for k in _kinds(space)}
    scores: Sequence[float] | Float[ndarray, " candidates"] = ()
    for stage, (keep, tokens) in enumerate(zip(schedule.survivors, schedule.tokens_per_stage)):
        if stage == len(schedule.survivors) - 1:
            candidates = [parent, *candidates]  # elitism, judged on the same batch; the parent wins a tie
        if not candidates:  # a space without a mutant: the parent comes with the last stage
            continue
        removed = [space.removed(c) for c in candidates]
        for kind, total in wanted.items():
            assert all(sum(r for s, r in zip(space.sublayers, one) if s.kind == kind) == total for one in removed)
        scores = score(removed, draw(sequences, length, tokens, rng))
        order = np.argsort(np.nan_to_num(np.asarray(scores), nan=math.inf), kind="stable")[:keep]
        before, candidates = candidates, [candidates[i] for i in order]
    of_parent = float(scores[before.index(parent)])
    return candidates[0], {"parent": of_parent, "best": float(min(scores)), "mean": float(np.mean(scores))}


def mutants(space: Space, parent: Levels, count: int, rng: np.random.Generator) -> list[Levels]:
    """Up to `count` distinct mutants, none of them the parent."""
    found: dict[Levels, None] = {}
    for _ in range(ATTEMPTS_PER_MUTANT * count):
        child = space.mutant(parent, rng)
        if child != parent:
            found[child] = None
        if len(found) == count:
            return list(found)
    warnings.warn(f"only {len(found)} distinct mutants found, not {count}: the space is small", stacklevel=4)
    return list(found)


def draw(sequences: int, length: int, tokens: int, rng: np.random.Generator) -> Batch:
    """Distinct random sequences with exactly so many tokens."""
    return Batch(rng.permutation(sequences)[: math.ceil(tokens / length)], tokens)


def _kinds(space: Space) -> set[str]:
    return {s.kind for s in space.sublayers}
