"""The experiment at quick scale, its measures against their definitions, the full-size study's wiring."""

import numpy as np
import pytest
import torch

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers.convergent_graph_solver import (
    OURS,
    PUBLISHED_PORES,
    PUBLISHED_VALUES,
    Study,
    Training,
    carry_out,
    classify_proteins,
    compare_networks,
    experiment,
    percolation,
    pore_networks,
    shortest_paths,
    value_iteration_graphs,
)
from locally.solvers.convergent_graph import CGS

SHORT = Training(updates=2, graphs=2, fresh=1, lr=1e-3, cycle=2)


def values(run, **wanted):
    return [m for m in run.measures if all(m.setting.get(k, getattr(m, k, None)) == v for k, v in wanted.items())]


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (paper for paper in load() if paper.slug == "convergent-graph-solver")
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == 2
    # two seeds give wide intervals; the estimates themselves must satisfy the claims
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)


def test_every_network_meets_every_size_on_every_seed(quick):
    for method in (OURS, "five-layer stack", "encoder alone", "SSE", "constant"):
        found = values(quick, method=method, metric="test error", task="pore network")
        assert {(m.seed, m.setting["nodes"]) for m in found} == {(s, n) for s in (0, 1) for n in (100, 200, 400)}
    assert [f.name for f in quick.figures] == ["products", "growth"]


def test_ratios_are_those_of_the_recorded_errors(quick):
    for seed in (0, 1):
        (ours,) = values(quick, method=OURS, metric="test error", nodes=400, seed=seed)
        (theirs,) = values(quick, method="SSE", metric="test error", nodes=400, seed=seed)
        (ratio,) = values(quick, method=OURS, metric="test error / that of SSE, 400 nodes", seed=seed)
        assert ratio.value == pytest.approx(ours.value / theirs.value)


def test_krylov_methods_overtake_the_sweeps_as_gamma_nears_one(quick):
    products = {
        name: values(quick, method=name, one_minus_gamma=0.003)[0].value
        for name in ("sweeps", "Anderson mixing", "BiCGSTAB", "conjugate gradients")
    }
    assert all(20 * n < products["sweeps"] for name, n in products.items() if name != "sweeps")


def test_the_constant_answer_has_the_variance_of_the_targets():
    study = Study(SHORT, SHORT, SHORT, SHORT, baselines=False, tests=1)
    for make in (pore_networks, shortest_paths, value_iteration_graphs):
        task = make(study)
        graph, targets = task.draw_test(60, np.random.default_rng(0))
        marks = task.judge(graph, task.constant(graph, targets), targets)
        if "test error" in marks:
            assert marks["test error"] == pytest.approx(float(targets.var(correction=0)), rel=1e-5)
        else:
            assert 0.4 < marks["policy accuracy"] < 0.9  # the edge with the largest reward
    task = percolation(study)
    drawn = [task.draw_test(40, np.random.default_rng(k)) for k in range(40)]
    right = [task.judge(g, task.constant(g, t), t)["accuracy"] for g, t in drawn]
    assert 0.2 < np.mean(right) < 0.8


def test_same_seeds_same_errors(without_shape_checks):
    def measures():
        run = Run(scale="quick", seeds=(3,))
        study = Study(SHORT, SHORT, None, None, baselines=False, tests=1)
        compare_networks(run, {value_iteration_graphs(study): SHORT}, tests=1)
        return run.measures

    first = measures()
    assert len(first) == 3 * 2 * 2  # networks and the constant, sizes, marks
    assert measures() == first


def write_tu(folder):
    """24 graphs of the collection's format: rings and paths with a node label."""
    folder.mkdir()
    edges, owner, labels, nodes = [], [], [], 0
    for g in range(24):
        n = 3 + g % 4
        pairs = [(i, i + 1) for i in range(n - 1)] + ([(n - 1, 0)] if g % 2 else [])
        edges += [f"{nodes + a + 1}, {nodes + b + 1}" for i, j in pairs for a, b in ((i, j), (j, i))]
        owner += [str(g + 1)] * n
        labels.append(str(g % 2 + 1))
        nodes += n
    for part, lines in (("A", edges), ("graph_indicator", owner), ("graph_labels", labels)):
        (folder / f"{folder.name}_{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / f"{folder.name}_node_labels.txt").write_text("".join(f"{i % 3}\n" for i in range(nodes)))


def test_the_full_size_study_runs_on_small_sizes(tmp_path, monkeypatch, without_shape_checks):
    write_tu(tmp_path / "PROTEINS")
    original = classify_proteins.__globals__["classify"]
    epochs = []

    def short(*arguments, epochs: int, batch: int, seen=epochs):
        seen.append((epochs, batch))
        original(*arguments, epochs=2, batch=8)

    monkeypatch.setitem(classify_proteins.__globals__, "classify", short)
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    carry_out(run, Study(SHORT, SHORT, SHORT, SHORT, baselines=True, tests=1, proteins=True))
    assert epochs == [(500, 128)]
    folds = values(run, method="CGS", metric="test accuracy, PROTEINS, ten folds")
    assert len(folds) == 10
    assert all(0 <= m.value <= 1 for m in folds)
    tasks = {m.setting["task"] for m in run.measures if "task" in m.setting}
    assert tasks == {"pore network", "value iteration", "shortest paths", "percolation"}
    for method in ("IGNN", "SSE", "CGS"):
        assert values(run, method=method, task="value iteration", metric="policy accuracy", nodes=200)
    assert values(run, method="CGS", metric="policy accuracy minus that of a five-layer stack, 100 states")


def test_the_full_size_study_asks_for_its_data_before_any_work():
    run = Run(scale="paper", seeds=(0,))
    with pytest.raises(MissingData, match="PROTEINS"):
        experiment(run)
    assert not run.measures


def test_paper_scale_has_the_papers_sizes(monkeypatch):
    handed = []
    monkeypatch.setattr("locally.papers.convergent_graph_solver.carry_out", lambda run, study: handed.append(study))
    experiment(Run(scale="paper", seeds=(0,)))
    (study,) = handed
    assert study.pores == PUBLISHED_PORES == Training(updates=1000, graphs=32, fresh=32, lr=1e-3, cycle=32)
    assert study.values == PUBLISHED_VALUES == Training(updates=5000, graphs=64, fresh=32, lr=1e-3, cycle=32)
    model = value_iteration_graphs(study).models["CGS"]()
    assert isinstance(model, CGS)
    assert (model.decoder[0].in_features, len(model.encoder.layers)) == (64, 4)
    assert model.fixed_point.gamma == 0.5
    assert torch.get_num_threads() >= 1
