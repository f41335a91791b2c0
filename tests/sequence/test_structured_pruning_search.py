"""Levels and the search: totals are kept, the best of a small space is found, interruption changes nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locally.sequence.structured_pruning import Batch, Progress, Schedule, Space, SubLayer, search
from locally.sequence.structured_pruning.levels import HEADS, NEURONS, spread, step_sizes, uniform
from locally.sequence.structured_pruning.search import draw, mutants

SCHEDULE = Schedule(generations=25, offspring=12, survivors=(6, 3, 1), tokens_per_stage=(8, 16, 32))


def sublayers(blocks: int, heads: int = 8, neurons: int = 64) -> tuple[SubLayer, ...]:
    return tuple(SubLayer(b, kind, n) for b in range(blocks) for kind, n in ((HEADS, heads), (NEURONS, neurons)))


def space(blocks: int = 3, reach: int = 2, sparsity: float = 0.5) -> Space:
    layers = sublayers(blocks)
    return Space(layers, uniform(layers, sparsity), step_sizes(layers, 0.125, least=(1, 8)), reach)


def convex(layers: Space, seed: int = 0):
    """A separable score with a minimum of its own for each sub-layer."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 3, len(layers.sublayers))
    best = rng.uniform(0, 1, len(layers.sublayers))

    def score(candidates, batch: Batch):
        shares = np.array([[r / s.groups for r, s in zip(c, layers.sublayers)] for c in candidates])
        return (weights * (shares - best) ** 2).sum(1)

    return score


def run(layers: Space, score, seed: int = 0, **options):
    rng = np.random.default_rng(seed)
    return search(layers, score, SCHEDULE, sequences=8, length=8, rng=rng, **options)


@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_of_a_separable_score_is_found(seed):
    layers = space()
    score = convex(layers, seed)
    batch = Batch(np.arange(1), 8)
    every = itertools.product(*(range(low, high + 1) for low, high in map(layers.bounds, range(6))))
    feasible = [c for c in every if sum(c[::2]) == 0 and sum(c[1::2]) == 0]
    optimum = min(score([layers.removed(c) for c in feasible], batch))
    found = run(layers, score, seed)
    assert score([layers.removed(found.parent)], batch)[0] == pytest.approx(optimum)


@given(seed=st.integers(0, 10**6), blocks=st.integers(1, 6), sparsity=st.floats(0, 0.99))
def test_mutants_keep_the_number_of_heads_and_of_neurons(seed, blocks, sparsity):
    layers = space(blocks, reach=4, sparsity=sparsity)
    rng = np.random.default_rng(seed)
    parent = layers.start
    for _ in range(10):
        parent = layers.mutant(parent, rng)
        removed = layers.removed(parent)
        assert sum(removed[::2]) == sum(layers.centres[::2])
        assert sum(removed[1::2]) == sum(layers.centres[1::2])
        assert all(r in layers.choices(i) for i, r in enumerate(removed))


def test_the_parent_is_never_lost_to_something_worse():
    layers = space()
    found = run(layers, convex(layers))
    assert all(record["best"] <= record["parent"] for record in found.history)


def test_same_seed_same_search_and_going_on_is_as_good_as_never_stopping():
    layers = space(4)
    score = convex(layers, 5)
    whole = run(layers, score, 3)
    assert run(layers, score, 3).to_dict() == whole.to_dict()
    stored = []

    class Stopped(Exception):
        pass

    def stop(progress):
        stored.append(progress.to_dict())
        if len(stored) == 7:
            raise Stopped

    with pytest.raises(Stopped):
        run(layers, score, 3, on_generation=stop)
    resumed = run(layers, score, 99, progress=Progress.from_dict(stored[-1]))
    assert resumed.to_dict() == whole.to_dict()


def test_small_spaces_end():
    one = space(1)  # nothing to exchange with
    assert one.mutant(one.start, np.random.default_rng(0)) == one.start
    with pytest.warns(UserWarning, match="only 0 distinct mutants"):
        assert mutants(one, one.start, 4, np.random.default_rng(0)) == []
    with pytest.warns(UserWarning, match="distinct mutants"):
        assert run(one, convex(one)).parent == one.start


def test_patience_ends_a_search_that_stands_still():
    layers = space()
    schedule = Schedule(generations=50, offspring=4, survivors=(1,), tokens_per_stage=(8,), patience=3)
    flat = lambda candidates, batch: np.zeros(len(candidates))
    found = search(layers, flat, schedule, sequences=8, length=8, rng=np.random.default_rng(0))
    assert found.generation == 3
    assert found.parent == layers.start


def test_scores_that_are_not_numbers_lose():
    layers = space()
    broken = lambda candidates, batch: [0.0 if c == layers.centres else np.nan for c in candidates]
    assert run(layers, broken).parent == layers.start


def test_batches_are_distinct_sequences_with_the_tokens_asked_for():
    batch = draw(10, 16, 40, np.random.default_rng(0))
    assert len(set(batch.sequences.tolist())) == 3
    assert batch.tokens == 40


@given(total=st.integers(0, 200), capacities=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_spread_gives_the_total_in_proportion(total, capacities):
    total = min(total, sum(capacities))
    shares = spread(total, capacities)
    assert sum(shares) == total
    assert all(abs(s - total * c / sum(capacities)) <= 1 for s, c in zip(shares, capacities))
    assert all(0 <= s <= c for s, c in zip(shares, capacities))


def test_levels_are_counted_in_groups():
    layers = sublayers(2, heads=8, neurons=1376)
    grid = Space(layers, uniform(layers, 0.625), step_sizes(layers, 0.125), 4)
    assert grid.choices(0) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert grid.choices(1) == [172 * j for j in range(1, 9)]
    assert step_sizes(layers, 0.125 / 64) == (1, 32, 1, 32)
    assert uniform(layers, 0.5, prune=("heads",)) == (4, 0, 4, 0)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"survivors": (3, 2)}, "survivors"),
        ({"survivors": (3, 1)}, "survivors and tokens_per_stage"),
        ({"generations": 0}, "generations"),
        ({"offspring": 0}, "offspring"),
        ({"tokens_per_stage": (0, 1, 1)}, "tokens_per_stage"),
        ({"patience": 0}, "patience"),
    ],
)
def test_bad_schedules_are_named(change, names):
    with pytest.raises(ValueError, match=names):
        Schedule(**change)


def test_more_tokens_than_there_are():
    layers = space()
    with pytest.raises(ValueError, match="tokens_per_stage must be at most the 24"):
        search(layers, convex(layers), SCHEDULE, sequences=3, length=8, rng=np.random.default_rng(0))


def test_spaces_that_cannot_keep_their_total_are_refused():
    layers = sublayers(2)
    with pytest.raises(ValueError, match="steps must be equal"):
        Space(layers, (0,) * 4, (1, 8, 2, 8))
    with pytest.raises(ValueError, match="centres"):
        Space(layers, (9, 0, 0, 0), (1, 8, 1, 8))
