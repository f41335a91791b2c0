"""The experiment at quick scale, and the full-size study on small files of the same format."""

import numpy as np
import pytest

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import auglocal as paper
from tests.training.test_local_learning_trainer import write_cifar, write_idx


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (p for p in load() if p.slug == "auglocal")
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert [f.claim.metric for f in decided] == ["peak of saved activations / back-propagation's"]
    assert verdict.outcome is Outcome.HOLDS


def test_what_is_recorded(quick):
    ratio = "peak of saved activations / back-propagation's"
    ratios = {m.method: m.value for m in quick.measures if m.metric == ratio}
    assert ratios.keys() == {*paper.COMPARED, "back-propagation, 3 checkpoints"}
    assert ratios[paper.BP] == 1
    assert all(value < 1 for method, value in ratios.items() if method != paper.BP)
    scored = {(m.method, m.seed) for m in quick.measures if m.metric == "accuracy, single digits"}
    assert scored == {(method, seed) for method in (paper.BP, paper.SHALLOW) for seed in (0, 1)}
    assert [f.name for f in quick.figures] == ["accuracy-over-memory"]


def test_same_seed_same_accuracy(without_shape_checks):
    study = paper.Study(paper.PAIRS, (paper.SHALLOW,), pairs=256, epochs=1, batch=64)
    once, again = (paper.train_digits(Run(seeds=(3,)), (study, paper.SHALLOW, 3)) for _ in range(2))
    assert once == again


def test_full_size_studies_on_small_files(tmp_path, without_shape_checks):
    write_cifar(tmp_path / "cifar10" / "cifar10.zip", count=8)
    (tmp_path / "mnist").mkdir()
    rng = np.random.default_rng(0)
    write_idx(tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz", rng.integers(0, 256, (2040, 8, 8)))
    write_idx(tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz", rng.integers(0, 10, 2040))
    run = Run(scale="paper", seeds=(0,), data=tmp_path, scratch=tmp_path)
    paper.mnist(run, epochs=1, depth=8)
    assert {m.method for m in run.measures if m.metric == "test accuracy, MNIST"} == {paper.BP, "DGL", paper.SHALLOW}
    recipe = paper.Recipe(epochs=1, batch=8, depths=(32,))
    paper.cifar(run, recipe, methods=("InfoPro", "AugLocal, depth 2"))
    scored = {m.method for m in run.measures if m.metric == "test accuracy, CIFAR-10, ResNet-32"}
    assert scored == {"InfoPro", "AugLocal, depth 2"}
    kept = {m.method: m.value for m in run.measures if m.metric == "peak of saved activations, CIFAR-10, MiB"}
    assert all(value > 0 for value in kept.values())
    with pytest.raises(MissingData, match="CIFAR-10"):
        paper.cifar(Run(scale="paper"))


def test_paper_scale_runs_all_of_it(monkeypatch):
    called = []
    for name in ("record_memory", "record_gaps", "figure", "mnist", "cifar"):
        monkeypatch.setattr(paper, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(Run, "parallel", lambda self, function, items, label: [0.5] * len(items))
    paper.experiment(Run(scale="paper", seeds=(0,)))
    assert called == ["record_memory", "record_gaps", "record_gaps", "figure", "mnist", "cifar"]
    assert paper.PAPER_RULES[110]["AugLocal, depth 6"].depth == 6
