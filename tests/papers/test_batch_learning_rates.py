"""The experiment at quick scale, its noise matrices against dense ones, the sweeps and the full-size study in small."""

import numpy as np
import pytest
import torch
from torch import nn

from locally.catalogue import BUILT_IN, read_card
from locally.errors import UsageError
from locally.evidence import Outcome, Run, Scale, judge
from locally.optimize.batch_curvature.images import normalised
from locally.optimize.batch_curvature.networks import WideResNet, perceptron, train_on_all, vgg16
from locally.optimize.batch_curvature.random_matrices import spiked_covariance_top, spiked_wigner_extreme
from locally.papers import batch_learning_rates as paper


@pytest.fixture(scope="module")
def card():
    return read_card(BUILT_IN / "batch_learning_rates.toml")


def values(run: Run, method: str, metric: str, **setting) -> list[float]:
    found = [m for m in run.measures if (m.method, m.metric) == (method, metric)]
    return [m.value for m in found if setting.items() <= m.setting.items()]


def test_quick_scale_bears_out_what_it_can_decide(quick, card):
    findings = judge(card.claims, quick.measures, Scale.QUICK).findings
    decided = [f for f in findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == 5
    assert all(f.seeds == 2 for f in decided)
    # two seeds give wide intervals; the estimates themselves must satisfy the claims
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)
    assert {f.name for f in quick.figures} == {"spectra", "batch-eigenvalues"}


def test_noise_measured_along_the_outliers_predicts_better_than_independent_entries(quick):
    metric = "largest relative error of the top eigenvalue, batch 8 or more"
    for matrix in ("Hessian", "Gauss-Newton"):
        together, alone, iid = (values(quick, m, metric, matrix=matrix) for m in paper.PREDICTIONS)
        assert all(a < b < c for a, b, c in zip(together, alone, iid))


@pytest.mark.parametrize("spike", [3.0, -3.0])
def test_tridiagonal_noise_has_the_distribution_of_the_dense(spike):
    rng = np.random.default_rng(0)
    dense = []
    for _ in range(200):
        noise = rng.standard_normal((40, 40))
        A = (noise + noise.T) / np.sqrt(2 * 20)
        A[0, 0] += spike
        dense.append(np.linalg.eigvalsh(A)[-1 if spike > 0 else 0])
    drawn = [spiked_wigner_extreme(40, 20, spike, rng) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(np.mean(dense), abs=4 * np.std(dense) / np.sqrt(200))
    assert np.std(drawn) == pytest.approx(np.std(dense), rel=0.2)


def test_tridiagonal_covariances_have_the_distribution_of_the_dense():
    rng = np.random.default_rng(0)
    dense = []
    for _ in range(200):
        examples = rng.standard_normal((15, 30))
        examples[:, 0] *= np.sqrt(6.0)
        dense.append(np.linalg.norm(examples, 2) ** 2 / 15)
    drawn = [spiked_covariance_top(30, 15, 6.0, rng) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(np.mean(dense), abs=4 * np.std(dense) / np.sqrt(200))
    assert np.std(drawn) == pytest.approx(np.std(dense), rel=0.2)


def test_sweeps_and_learner_record_every_seed(card, without_shape_checks):
    """On so few steps the sweeps of the default scale decide nothing: here they only have to record."""
    run = Run(scale="default", seeds=(0, 1))
    study = paper.Study(draws=1, examples=1, batch_sizes=(), sgd=(8, 16, 64, 512), adam=(64, 256), width=0)
    original = paper.LearningRateSweep

    def short(**options):
        return original(**{**options, "steps": 3})

    paper.LearningRateSweep = short  # type: ignore[misc, assignment]
    try:
        paper.survivors(run, study)
    finally:
        paper.LearningRateSweep = original  # type: ignore[misc]
    paper.learner(run, 0, epochs=1)
    known = {(m.method, m.metric, tuple(sorted(m.setting.items()))) for m in run.measures}
    wanted = [c for c in card.claims if c.scale == "default"]
    assert len(wanted) == 3
    for claim in wanted:
        assert (claim.method, claim.metric, tuple(sorted(claim.setting.items()))) in known
    assert {m.seed for m in run.measures if m.metric == paper.RATE} == {0, 1}
    assert len(values(run, "learner", "training loss")) == 3
    assert [f.name for f in run.figures] == ["learning-rates"]


def test_adams_numeric_limit_grows_with_the_batch_where_noise_dominates(without_shape_checks):
    """Far below the knee the limit grows; beyond it only the second moments still fall."""
    data = paper.digits()
    model = perceptron(64, 16, 10, seed=0)
    train_on_all(model, data, steps=20)
    small, large = (paper.adam_prediction(model, data, size, seed=0, steps=30) for size in (64, 1797))
    assert 0 < large < small


def test_the_timed_spectrum_counts_its_parameters(without_shape_checks):
    run = Run(scale="default", seeds=(0,))
    paper.timed_spectrum(run, 16)
    (seconds,) = (m for m in run.measures if m.metric == "seconds for a spectrum")
    assert seconds.setting["parameters"] == 64 * 16 + 16 + 16 * 16 + 16 + 160 + 10


# The full-size study --------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (64, 3074), dtype=np.uint8)
    records[:, 1] = np.arange(64) % 4
    records[:, 2:] = 64 * records[:, 1:2]  # classes told apart by their brightness
    records.tofile(folder / "train.bin")
    return tmp_path


def test_loader_reads_the_binary_format(cifar):
    images, labels = paper.cifar100(Run(scale="paper", seeds=(0,), data=cifar), "train")
    assert images.shape == (64, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [i % 4 for i in range(64)]
    assert (images[2] == 128).all()
    assert float(normalised(images).mean()) == pytest.approx(-0.43, abs=0.1)


def test_missing_and_damaged_data_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"cifar-100-binary/train\.bin"):
        paper.cifar100(Run(scale="paper", seeds=(0,)), "train")
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary/train.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="records of 3074 bytes, got 100"):
        paper.cifar100(Run(scale="paper", seeds=(0,), data=tmp_path), "train")


def test_full_study_runs_on_a_small_file_of_the_format(cifar, card, without_shape_checks):
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))

    run = Run(scale="paper", seeds=(0,), data=cifar)
    study = paper.FullSize(
        {"VGG-16": network}, batch_sizes=(16, 32), rates=(1e-2, 3e-2, 1e4), epochs=6, lanczos=5, spectra_after=(0, 1)
    )
    paper.full_size(run, study)
    known = {(m.method, m.metric) for m in run.measures}
    assert all((c.method, c.metric) in known for c in card.claims if c.scale == "paper")
    rates = values(run, "SGD", "largest stable learning rate, VGG-16")
    assert len(rates) == 2
    assert all(rate in (1e-2, 3e-2) for rate in rates)
    assert len(values(run, "network", "largest eigenvalue over all data")) == 4


def test_the_papers_networks_have_their_shapes():
    images = torch.zeros(2, 3, 32, 32)
    vgg = vgg16()
    assert vgg(images).shape == (2, 100)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in vgg) == 16
    wide = WideResNet(28, 10)
    assert sum(p.numel() for p in wide.parameters()) == pytest.approx(36.5e6, rel=0.01)
    with torch.no_grad():
        assert WideResNet(10, 1).eval()(images).shape == (2, 100)
