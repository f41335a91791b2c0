"""The experiment at quick scale, its set-ups, and the full-size study on small files of the same format."""

import gzip
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import manifold_linearizing as paper

SEEDS = (0, 1, 2)


def values(run: Run, method: str, metric: str) -> list[float]:
    return [m.value for m in run.measures if (m.method, m.metric) == (method, metric)]


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (p for p in load() if p.slug == "manifold-linearizing")
    findings = judge(card.claims, quick.measures, Scale.QUICK).findings
    decided = [f for f in findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert [f.outcome for f in decided] == [Outcome.HOLDS, Outcome.HOLDS]


def test_every_claim_of_digits_is_recorded_for_every_seed(quick):
    (card,) = (p for p in load() if p.slug == "manifold-linearizing")
    for claim in card.claims:
        if claim.scale is not Scale.PAPER:
            assert len(values(quick, claim.method, claim.metric)) == 3, claim.metric
    assert [f.name for f in quick.figures] == ["accuracy", "spectra", "cosines", "plane"]
    accuracy, start = values(quick, paper.METHOD, "accuracy"), values(quick, paper.START, "accuracy")
    difference = values(quick, paper.METHOD, "accuracy minus that of spectral clustering at initialisation")
    assert difference == pytest.approx([a - b for a, b in zip(accuracy, start)])


def test_the_default_study_runs_every_baseline(without_shape_checks):
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    rows = np.arange(0, len(X), 6)
    study = paper.Study(tcr=3, mlc=3, batch=100, nmce=3, pursuit=True)
    first, second = (paper.train_on_digits(study, 7, X[rows] / 16, y[rows], "cpu") for _ in range(2))
    assert first.scores == second.scores
    methods = {method for method, _, _ in first.scores}
    assert {"NMCE", "SSC-OMP at initialisation", "SSC-OMP on MLC's embedding", paper.KMEANS, paper.START} <= methods


def test_the_curve_surrounds_the_blob():
    X, y = paper.curve_and_blob(np.random.default_rng(0))
    radius = np.linalg.norm(X[y == 0], axis=1)
    assert abs(radius - 2).max() < 0.3
    assert np.linalg.norm(X[y == 1] - [0.3, 0], axis=1).max() < 0.6


# The user's data ------------------------------------------------------------------------------------------------------


def write_cifar(folder: Path, count: int = 30) -> None:
    rng = np.random.default_rng(0)
    (folder / "cifar10").mkdir()
    with zipfile.ZipFile(folder / "cifar10" / "cifar10.zip", "w") as file:
        for label in range(10):
            for i in range(count):
                pixels = rng.normal(25 * label, 20, (8, 8, 3)).clip(0, 255).astype(np.uint8)
                data = io.BytesIO()
                Image.fromarray(pixels).save(data, "png")
                file.writestr(f"train/class{label}/{i:04}.png", data.getvalue())


def write_idx(path: Path, array: np.ndarray) -> None:
    header = np.array([2048 + array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_mnist(folder: Path, count: int = 60) -> np.ndarray:
    rng = np.random.default_rng(1)
    (folder / "mnist").mkdir()
    images = rng.integers(256, size=(count, 6, 6))
    write_idx(folder / "mnist" / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "mnist" / "t10k-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return images


def test_the_full_size_study_on_small_files(tmp_path, monkeypatch, without_shape_checks):
    write_cifar(tmp_path, count=6)
    write_mnist(tmp_path, count=40)
    small = paper.Full(tcr_epochs=1, mlc_epochs=1, warmup_epochs=1, batch=50, width=4, hidden=16, z_dim=12)
    monkeypatch.setattr(paper, "Full", lambda: small)
    original = paper.mnist_study
    monkeypatch.setattr(paper, "mnist_study", lambda run, images, steps: original(run, images, 2))
    run = Run(scale="paper", seeds=(0,), data=tmp_path, scratch=tmp_path)
    paper.full_size(run)
    (accuracy,) = values(run, paper.METHOD, "clustering accuracy, CIFAR-10")
    assert 0.1 <= accuracy <= 1
    recorded = {(m.method, m.setting["data"]) for m in run.measures if "data" in m.setting}
    assert ("EnSC on MLC's embedding", "CIFAR-10") in recorded
    assert (paper.METHOD, "MNIST") in recorded
    with pytest.raises(MissingData, match="CIFAR-10"):
        paper.full_size(Run(scale="paper", seeds=(0,)))


def test_images_come_back_as_they_were_written(tmp_path):
    write_cifar(tmp_path, count=2)
    cifar = paper.read_cifar(tmp_path / "cifar10" / "cifar10.zip")
    assert cifar.shape == (3, 8, 8)
    assert cifar.labels.tolist() == np.repeat(np.arange(10), 2).tolist()
    assert cifar.pixels.dtype == np.float32
    assert (np.diff([cifar.pixels[cifar.labels == k].mean() for k in range(10)]) > 0).all()
    with pytest.raises(ValueError, match="no images under test"):
        paper.read_cifar(tmp_path / "cifar10" / "cifar10.zip", "test")
    images = write_mnist(tmp_path)
    mnist = paper.read_mnist(tmp_path / "mnist")
    np.testing.assert_allclose(mnist.pixels * 255, images.reshape(60, 36), atol=1e-4)
    assert mnist.shape == (1, 6, 6)
    write_idx(tmp_path / "mnist" / "train-images-idx3-ubyte.gz", images[:3])
    write_idx(tmp_path / "mnist" / "train-labels-idx1-ubyte.gz", np.arange(2))
    with pytest.raises(ValueError, match="3 images, but 2 labels"):
        paper.read_mnist(tmp_path / "mnist")
    with pytest.raises(ValueError, match="IDX"):
        paper.read_idx(tmp_path / "mnist" / "train-images-idx3-ubyte.gz", 1)


@pytest.mark.slow
@pytest.mark.skipif("LOCALLY_DATA" not in os.environ, reason="LOCALLY_DATA names no folder with mnist/")
def test_real_mnist_is_read():
    folder = Path(os.environ["LOCALLY_DATA"]) / "mnist"
    if not folder.exists():
        pytest.skip(f"{folder} does not exist")
    mnist = paper.read_mnist(folder)
    assert mnist.shape == (1, 28, 28)
    assert set(mnist.labels.tolist()) == set(range(10))
