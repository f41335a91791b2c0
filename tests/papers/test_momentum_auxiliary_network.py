"""The experiment at quick scale, and the full-size study on small files of the same format."""

import pytest

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import momentum_auxiliary_network as paper
from tests.training.test_local_learning_trainer import write_cifar


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (p for p in load() if p.slug == "momentum-auxiliary-network")
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert [f.claim.metric for f in decided] == ["peak of saved activations / back-propagation's"]
    assert verdict.outcome is Outcome.HOLDS


def test_what_is_recorded(quick):
    ratio = "peak of saved activations / back-propagation's"
    for size in (8, 16):
        ratios = {m.method: m.value for m in quick.measures if m.metric == ratio and m.setting["size"] == size}
        assert ratios.keys() == {paper.BP, paper.PLAIN, paper.BRANCH_ONLY, paper.MAN}
        assert ratios[paper.PLAIN] < ratios[paper.BRANCH_ONLY] < ratios[paper.MAN] < 1
    gaps = {m.seed for m in quick.measures if m.metric == "accuracy minus DGL's, 8 x 8 digits"}
    assert gaps == {0, 1}
    assert [f.name for f in quick.figures] == ["accuracy"]


def test_full_size_studies_on_small_files(tmp_path, without_shape_checks):
    write_cifar(tmp_path / "cifar10" / "cifar10.zip", count=8)
    run = Run(scale="paper", seeds=(0,), data=tmp_path, scratch=tmp_path)
    methods = (paper.PLAIN, paper.MAN, "InfoPro with MAN")
    paper.cifar(run, paper.Recipe(epochs=1, batch=8, networks=((32, 8),), methods=methods))
    scored = {m.method for m in run.measures if m.metric == "test error, CIFAR-10, ResNet-32 in 8 blocks"}
    assert scored == set(methods)
    with pytest.raises(MissingData, match="CIFAR-10"):
        paper.cifar(Run(scale="paper"))


def test_blocks_are_those_of_the_paper():
    assert paper.paper_cuts(16, 8) == 8
    assert paper.paper_cuts(16, 16) == list(range(2, 16))  # 15 blocks, the stem with the first residual block
    assert len(paper.paper_cuts(55, 55)) + 1 == 54


def test_paper_scale_runs_all_of_it(monkeypatch):
    called = []
    for name in ("record_memory", "record_gaps", "figure", "cifar"):
        monkeypatch.setattr(paper, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(Run, "parallel", lambda self, function, items, label: [0.5] * len(items))
    paper.experiment(Run(scale="paper", seeds=(0,)))
    assert called == ["record_memory", "record_gaps", "record_gaps", "figure", "cifar"]
