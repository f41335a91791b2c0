"""The experiment of arXiv 2206.00846 at quick scale, and its full-size wiring on small files of the same format."""

import gzip

import numpy as np
import pytest
import torch

from locally.catalogue import BUILT_IN, read_card
from locally.errors import UsageError
from locally.evidence import Outcome, Run, judge
from locally.papers import dp_stationary_points as paper


@pytest.fixture(scope="module")
def card():
    return read_card(BUILT_IN / "dp_stationary_points.toml")


def values(run, method, metric):
    return [m.value for m in run.measures if (m.method, m.metric) == (method, metric)]


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def test_card_can_be_judged_on_what_the_experiment_records(quick, card):
    verdict = judge(card.claims, quick.measures, quick.scale)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == 2
    assert all(f.seeds == 2 and f.outcome is Outcome.HOLDS for f in decided)
    recorded = {(m.method, m.metric) for m in quick.measures}
    assert all((c.method, c.metric) in recorded for c in card.claims if "MNIST" not in c.metric)


def test_theory_stands_beside_what_was_measured(quick):
    metric = "exponent of the gradient norm in epsilon"
    assert values(quick, "Private SpiderBoost, theory", metric) == [pytest.approx(-2 / 3)]
    assert values(quick, "noisy gradient descent, theory", metric) == [pytest.approx(-1 / 2)]
    assert max(values(quick, paper.SPIDER, metric)) < min(values(quick, paper.DESCENT, metric)) < 0


def test_figures_are_drawn(quick):
    assert len(quick.figures) == 3
    assert all(f.svg.startswith("<svg") and f.png for f in quick.figures)


def test_the_same_seed_gives_the_same_records():
    first, second = (Run(scale="quick", seeds=[3]) for _ in range(2))
    for run in (first, second):
        paper.together(run, [paper.low_rank(run)])
    assert first.measures == second.measures


def test_sweeps_vary_what_they_say():
    assert paper.Problem(epsilon=2.0).abar == pytest.approx(paper.Problem().abar / 2)
    assert paper.Problem(n=40_000).abar == pytest.approx(paper.Problem().abar / 4)
    assert paper.Problem(d=800).abar == pytest.approx(paper.Problem().abar * 2)


def test_population_is_stationary_at_the_model_that_labels_it():
    population, (sample, _) = paper.logistic_population(3000, 5, seed=4, samples=2)
    direction = torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    truth = 5 * direction / direction.norm()
    assert population.exact_gradient(truth).norm() < 1e-12
    assert sample.exact_gradient(truth).norm() < 0.05
    assert set(sample.y.tolist()) == {0.0, 1.0}


def test_tables_have_unit_rows_and_two_labels():
    for load in paper.TABLES.values():
        X, y = load()
        np.testing.assert_allclose(np.linalg.norm(X, axis=1), 1.0)
        assert set(y) == {0.0, 1.0}


def test_mnist_study_runs_on_small_files(tmp_path, card):
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(idx(rng.integers(0, 256, (60, 28, 28))))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(idx(rng.integers(0, 10, 60)))
    run = Run(scale="paper", seeds=[0], data=tmp_path)
    paper.mnist(run, cycles=1)
    claim = next(c for c in card.claims if "MNIST" in c.metric)
    (ratio,) = values(run, claim.method, claim.metric)
    assert np.isfinite(ratio)
    assert ratio > 0
    assert len(values(run, paper.SGD, "training accuracy, MNIST")) == 3


def test_idx_files_are_read_and_damaged_ones_refused(tmp_path):
    file, array = tmp_path / "x.gz", np.arange(24).reshape(2, 3, 4)
    file.write_bytes(idx(array))
    np.testing.assert_array_equal(paper.read_idx(file), array)
    file.write_bytes(gzip.compress(b"\x00\x00\x09\x01"))
    with pytest.raises(ValueError, match="not an IDX file"):
        paper.read_idx(file)
    file.write_bytes(gzip.compress(gzip.decompress(idx(array))[:-1]))
    with pytest.raises(ValueError, match="announces 24 entries and holds 23"):
        paper.read_idx(file)


def test_missing_images_are_a_message_not_a_crash():
    with pytest.raises(UsageError, match="train-images"):
        paper.experiment(Run(scale="paper", seeds=[0]))
