"""The experiment of arXiv 2209.10931: what its card claims is recorded, and the full-size study's wiring."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
import torch

from locally import catalogue
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import monna


def test_quick_scale_bears_out_what_it_can_decide(quick):
    paper = catalogue.find(catalogue.load(), "monna")
    decided = [
        f for f in judge(paper.claims, quick.measures, Scale.QUICK).findings if f.outcome is not Outcome.NEEDS_SCALE
    ]
    assert len(decided) == 2
    # two seeds give wide intervals; the estimates themselves must satisfy the claims
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)


def test_without_liars_the_error_is_the_gradients_noise(quick):
    """Averaged SGD on ||theta||^2 / 2 with unit noise: stationary E ||mean||^2 = D lr / ((2 - lr) H)."""
    floors = [
        m.value
        for m in quick.measures
        if m.metric == "squared error of the mean" and m.setting["faulty"] == "silent" and m.setting["beta"] == 0
    ]
    assert np.mean(floors) == pytest.approx(50 * 0.05 / 1.95 / 13, rel=0.15)


def test_the_figure_is_drawn(quick):
    assert [f.name for f in quick.figures] == ["damage-over-momentum"]


def test_the_larger_scales_record_what_the_card_claims(without_shape_checks):
    """The digits study, shortened; and the MNIST study on a file of the same format."""
    run = Run(scale="default", seeds=[0])
    monna.on_digits(run, 0, steps=6)
    monna.plot_accuracies(run)
    recorded = {(m.method, m.metric) for m in run.measures}
    paper = catalogue.find(catalogue.load(), "monna")
    assert {(c.method, c.metric) for c in paper.claims if c.scale is Scale.DEFAULT} <= recorded


def test_the_full_size_study_reads_mnist_and_runs(tmp_path, without_shape_checks):
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        write_idx(tmp_path / "mnist" / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (260, 28, 28)))
        write_idx(tmp_path / "mnist" / f"{part}-labels-idx1-ubyte.gz", np.arange(260) % 10)
    run = Run(scale="paper", seeds=[0], data=tmp_path)
    train, test = (monna.read_images(monna.mnist_folder(run), part) for part in ("train", "t10k"))
    study = monna.paper_study()
    assert (study.n, study.f, study.steps, len(study.contenders)) == (26, 5, 600, 8)
    assert [study.lr(t) for t in (0, 49, 50, 599)] == [0.75, 0.75, 0.375, 0.75 / 12]
    short = {name: study.contenders[name] for name in (monna.OURS, monna.ABLATED, "LEARN")}
    monna.compare_on_images(run, 0, replace(study, steps=1, contenders=short), 5.0, train, test)
    claims = catalogue.find(catalogue.load(), "monna").claims
    recorded = {(m.method, m.metric) for m in run.measures}
    assert {(c.method, c.metric) for c in claims if c.scale is Scale.PAPER} <= recorded


def write_idx(path, array):
    path.parent.mkdir(exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(s).to_bytes(4, "big") for s in array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def test_damaged_or_missing_files_are_named(tmp_path):
    write_idx(tmp_path / "a.gz", np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(monna.read_idx(tmp_path / "a.gz", 2), np.arange(12).reshape(3, 4))
    (tmp_path / "b.gz").write_bytes(gzip.compress(gzip.decompress((tmp_path / "a.gz").read_bytes())[:-1]))
    for name, dimensions in (("a.gz", 3), ("b.gz", 2)):
        with pytest.raises(ValueError, match=f"{name} is no complete IDX file"):
            monna.read_idx(tmp_path / name, dimensions)
    with pytest.raises(MissingData, match="mnist"):
        monna.experiment(Run(scale="paper", seeds=[0]))


def test_nodes_draw_noise_of_their_own():
    problem = monna.NoisyQuadratic(5, seed=1)
    zero = torch.zeros(2, 50, dtype=torch.float64)
    first, second = problem.gradients(zero, 3, [1, 4])
    assert not torch.equal(first, second)
    torch.testing.assert_close(problem.gradients(zero[:1], 3, [4])[0], second)
