"""The experiment at quick scale, its set-up, and the wiring of the full-size study on small files."""

import gzip
import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import local_lipschitz
from locally.papers.local_lipschitz import (
    Study,
    bound_images,
    carry_out,
    convolutional,
    nearest_leader,
    out_of_order,
    read_cifar,
    read_mnist,
)


@pytest.fixture(scope="module")
def small(shapes_unchecked):
    """Every part of the experiment once, on one seed."""
    run = Run(scale="default", seeds=(0,))
    with shapes_unchecked():
        carry_out(run, Study(((3, 32), (6, 32)), 4000, 3, 40, 300, digits=2, instances=3, exact_width=4))
    return run


def test_what_does_not_depend_on_luck_holds(small):
    (card,) = (paper for paper in load() if paper.slug == "local-lipschitz")
    findings = {f.claim.metric: f for f in judge(card.claims, small.measures, Scale.DEFAULT).findings}
    for metric in ("instances out of order", "bound / exact constant"):
        finding = findings[metric]
        assert finding.claim.satisfied_by(finding.estimate, finding.estimate)
    undecidable = [f for f in findings.values() if f.outcome is Outcome.NEEDS_SCALE]
    assert [f.claim.scale for f in undecidable] == [Scale.PAPER]
    assert not any("was recorded" in f.reason for f in findings.values())


def test_every_method_is_recorded_on_every_network(small):
    methods = {}
    for m in small.measures:
        if m.metric == "Lipschitz constant":
            methods.setdefault(str(m.setting), []).append(m.method)
    assert len(methods) == 4  # two perceptrons, digits at two radii
    assert all(len(names) == len(set(names)) == 6 for names in methods.values())
    assert [f.name for f in small.figures] == ["depth"]


def test_points_carry_the_label_of_their_nearest_leader():
    x, y = nearest_leader(500, 4, 0)
    distances = torch.cdist(x, x)
    assert 1 < len(y.unique()) <= 10
    neighbours = distances.fill_diagonal_(9).argmin(1)
    assert (y == y[neighbours]).float().mean() > 0.5  # far above one in ten


def test_disorder_is_counted(small):
    class Fake:
        def __init__(self, value, lower=0.0):
            self.value, self.lower = torch.tensor([value]), torch.tensor([lower])

    names = ("branch and bound", "bound propagation", "RecurJac", "interval bound", "product of layer norms")
    found = {name: Fake(float(k + 2), 1.0) for k, name in enumerate(names)}
    assert out_of_order(found) == 0
    found["RecurJac"] = Fake(2.5)
    assert out_of_order(found) == 1


def write_mnist(folder, n):
    folder.mkdir()
    rng = np.random.default_rng(0)
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(np.array([2051, n, 28, 28], ">i4").tobytes() + rng.integers(0, 256, (n, 28, 28), np.uint8).tobytes())
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(np.array([2049, n], ">i4").tobytes() + rng.integers(0, 10, n, np.uint8).tobytes())


def write_cifar(path, n):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for part in ("train", "test"):
            for k in range(n):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(image, "JPEG")
                archive.writestr(f"{part}/{('cat', 'dog')[k % 2]}/{k:04d}.jpg", image.getvalue())


def test_the_full_size_study_reads_its_files_and_records(tmp_path, monkeypatch, without_shape_checks):
    write_mnist(tmp_path / "mnist", 10)
    (tmp_path / "cifar10").mkdir()
    write_cifar(tmp_path / "cifar10" / "cifar10.zip", 6)
    mnist, cifar = read_mnist(tmp_path / "mnist"), read_cifar(tmp_path / "cifar10" / "cifar10.zip")
    assert mnist.train.shape == (8, 1, 28, 28)
    assert mnist.test.shape == (2, 1, 28, 28)
    assert cifar.train.shape == (6, 3, 32, 32)
    assert sorted(cifar.train_labels.tolist()) == [0, 0, 0, 1, 1, 1]

    strided = lambda: nn.Sequential(nn.AvgPool2d(8), convolutional(3, 4, [(2, 2)], 4))
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    study = Study(((3, 32),), 10, 1, 10, 10, 0, 0, images=1)
    bound_images(run, study, "CIFAR-10, 6-layer CNN", strided, cifar, 0)
    ratios = [m.value for m in run.measures if m.metric == "bound / interval bound, six-layer CIFAR-10 network"]
    assert len(ratios) == 4
    assert max(ratios) <= 1 + 1e-9


def test_missing_files_are_asked_for():
    with pytest.raises(MissingData, match="mnist"):
        local_lipschitz.image_networks(Run(scale="paper"), Study((), 1, 1, 1, 1, 0, 0, images=1))
