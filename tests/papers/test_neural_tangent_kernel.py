"""The experiment at quick scale: its claim holds, its full-size parts run, its figures are there."""

import gzip
import io
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locally.evidence import Claim, MissingData, Outcome, Run, Scale, judge
from locally.papers import neural_tangent_kernel as paper


@pytest.fixture(scope="module")
def card():
    return tomllib.loads(Path(paper.__file__).with_suffix(".toml").read_text())


def test_quick_experiment_bears_out_its_claim(card):
    run = Run(scale="quick", seeds=(100, 101, 102))
    paper.experiment(run)
    verdict = judge([Claim.from_dict(claim) for claim in card["claims"]], run.measures, Scale.QUICK)
    assert verdict.outcome is Outcome.HOLDS, verdict.reason
    assert [figure.name for figure in run.figures] == ["band"]


def test_full_size_parts_record_what_their_claims_read(card, tmp_path):
    """Every study at widths of a laptop, with a file in MNIST's format."""
    pixels = np.random.default_rng(0).integers(0, 256, (520, 28, 28), dtype=np.uint8)
    (tmp_path / "mnist").mkdir()
    header = np.array([2051, 520, 28, 28], ">i4").tobytes()
    (tmp_path / "mnist/t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    paper.carry_out(run, paper.Study((8, 16), 3, (1, 1), (20,), 3, 20, (16, 32), True))
    metrics = {m.metric for m in run.measures}
    assert {"slope of log kernel spread over log width", "slope of log kernel drift over log width"} <= metrics
    assert {"largest deviation from the predicted decay, width 32", "eigenvalue of the kernel over n"} <= metrics
    assert "largest orthogonal deviation at width 32 / at width 16" in metrics
    assert {figure.name for figure in run.figures} == {"band", "spread", "drift", "component"}
    sizes = {m.setting["width"] for m in run.measures if m.metric == "largest orthogonal deviation"}
    assert sizes == {16, 32}


def write_cifar10(folder):
    """Three classes of small striped images in class folders, zipped: in each class stripes of another period."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with zipfile.ZipFile(folder / "cifar10.zip", "w") as file:
        for part, count in (("train", 12), ("test", 6)):
            for k, name in enumerate(("bird", "cat", "dog")):
                for i in range(count):
                    phase, noise = rng.uniform(0, 6), rng.normal(0, 10, (8, 8, 3))
                    wave = 127 + 100 * np.sin((k + 1) * np.arange(8) + phase)
                    pixels = np.clip(wave[None, :, None] + noise, 0, 255).astype(np.uint8)
                    buffer = io.BytesIO()
                    Image.fromarray(pixels).save(buffer, "PNG")
                    file.writestr(f"{part}/{name}/{i:03}.png", buffer.getvalue())


def test_convolutional_kernels_classify_the_users_images(tmp_path):
    write_cifar10(tmp_path / "cifar10")
    run = Run(scale="paper", seeds=(0, 1), data=tmp_path)
    data = paper.cifar10(run)
    for seed in run.seeds:
        paper.classify(run, data, paper.Convolutional(30, 15, (1, 2)), seed)
    accuracy = {}
    for m in run.measures:
        if m.metric == paper.ACCURACY:
            accuracy.setdefault(m.method, []).append(m.value)
    assert {len(v) for k, v in accuracy.items() if "RBF" not in k} == {4}
    assert len(accuracy["kernel ridge, RBF (scikit-learn)"]) == 2
    assert np.mean(accuracy[paper.POOLED]) > 0.8  # stripes of unknown phase are what pooling is for
    gains = [m.value for m in run.measures if "above that without" in m.metric]
    assert gains == pytest.approx(np.subtract(accuracy[paper.POOLED], accuracy[paper.FLAT]))


def test_cifar10_is_asked_for(tmp_path):
    with pytest.raises(MissingData, match="CIFAR-10"):
        paper.experiment(Run(scale="paper", seeds=(0,), data=tmp_path))
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(MissingData, match=r"neither cifar10\.zip nor"):
        paper.experiment(Run(scale="paper", seeds=(0,), data=tmp_path))


def test_mnist_is_asked_for_and_checked(tmp_path):
    with pytest.raises(MissingData, match="mnist"):
        paper.images(Run(scale="paper", seeds=(0,)), True, 0)
    (tmp_path / "labels.gz").write_bytes(gzip.compress(np.array([2049, 1, 1, 1], ">i4").tobytes() + b"0"))
    with pytest.raises(ValueError, match="IDX"):
        paper.read_idx(tmp_path / "labels.gz")


def test_batched_networks_train_as_single_ones_do_by_autograd():
    x = paper.circle([0.3, 1.0, 2.0])
    y = x.prod(1, keepdim=True)
    nets = paper.Networks([2, 6, 6, 6, 1], 3, torch.Generator().manual_seed(0), "cpu")
    single = nets.module(1)
    torch.testing.assert_close(single(x), nets(x)[1])
    optimizer = torch.optim.SGD(single.parameters(), lr=0.7)
    for _ in range(30):
        optimizer.zero_grad()
        ((single(x) - y).square().sum() / (2 * len(x))).backward()
        optimizer.step()
    nets.descend(x, y, 0.7, 30)
    torch.testing.assert_close(single(x), nets(x)[1], atol=1e-4, rtol=1e-3)
    nets.keep(2)
    assert nets(x).shape == (2, 3, 1)


def test_card_example_runs(card, capsys):
    exec(card["example"], {})
    assert "predicted:" in capsys.readouterr().out
