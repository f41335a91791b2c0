"""The experiment at quick scale, what it records, the full-size study's wiring on small files."""

import numpy as np
import pytest
import scipy.sparse as sp

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers import deep_conjugate_direction as paper
from locally.papers.deep_conjugate_direction import Grid, Study, carry_out, compressed, full_size, systems
from locally.solvers.conjugate_direction import (
    CheckpointError,
    DirectionNetwork,
    NetworkConfig,
    load_pretrained,
    save_network,
)
from locally.solvers.conjugate_direction.checkpoint import pretrained_path


def values(run, method, metric, **setting):
    return [
        m.value
        for m in run.measures
        if (m.method, m.metric) == (method, metric) and setting.items() <= dict(m.setting).items()
    ]


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (card for card in load() if card.slug == "deep-conjugate-direction")
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == 4
    # two seeds give wide intervals; the estimates themselves must satisfy the claims
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)


def test_every_baseline_is_recorded_in_iterations_and_seconds(quick):
    methods = {"DCDM", paper.CG, paper.IC, "deflated CG (16 vectors)"}
    if paper.HAVE_PYAMG:
        methods |= {"smoothed-aggregation CG (pyamg)", "Ruge-Stuben CG (pyamg)"}
    for method in methods:
        for metric in ("iterations", "seconds, set-up included", "failed solves"):
            assert len(values(quick, method, metric)) == 14  # seven systems, two seeds
        assert not any(values(quick, method, "failed solves"))
    assert [f.name for f in quick.figures] == ["residuals", "seconds"]


def test_the_card_is_honest_about_multigrid(quick):
    (card,) = (card for card in load() if card.slug == "deep-conjugate-direction")
    assert "multigrid" in card.summary
    if paper.HAVE_PYAMG:
        ours, theirs = (np.mean(values(quick, m, "iterations")) for m in ("DCDM", "Ruge-Stuben CG (pyamg)"))
        assert theirs < ours


def test_without_pyamg_the_experiment_runs_and_says_so(monkeypatch, without_shape_checks):
    monkeypatch.setattr(paper, "HAVE_PYAMG", False)
    monkeypatch.setattr(paper, "MISSING_PYAMG", " Without algebraic multigrid: pyamg (extra bench) is not installed.")
    seen = []
    run = Run(scale="quick", seeds=(0,), on_progress=lambda fraction, label: seen.append(label))
    carry_out(run, Study((Grid(2, 12),), {2: load_pretrained(2)}))
    assert {m.method for m in run.measures} >= {"DCDM", paper.CG, paper.IC}
    assert not any("pyamg" in m.method for m in run.measures)
    assert any("pyamg is not installed" in label for label in seen)
    assert all("pyamg" in figure.caption for figure in run.figures)


def test_the_same_seed_gives_the_same_systems():
    for ndim in (2, 3):
        first, second = (list(systems(10, ndim, np.random.default_rng(3))) for _ in range(2))
        assert len(first) == 7
        for a, b in zip(first, second):
            np.testing.assert_array_equal(a.b, b.b)
            assert not a.b[~a.domain.fluid].any()
            assert not a.domain.enclosed  # every one has an answer


def test_compressed_systems_hold_the_fluid_alone():
    *_, chimney = systems(10, 2, np.random.default_rng(0))
    A, b = compressed(chimney)
    assert A.shape == (int(chimney.domain.fluid.sum()),) * 2
    assert (A.diagonal() > 0).all()
    x = np.zeros(chimney.domain.n)
    x[chimney.domain.fluid.reshape(-1)] = sp.linalg.spsolve(A.tocsc(), b)
    np.testing.assert_allclose(chimney.domain.matrix() @ x, chimney.b.reshape(-1), atol=1e-9)


def test_the_full_size_study_reads_a_network_and_saved_systems(tmp_path, without_shape_checks):
    folder = tmp_path / "deep-conjugate-direction"
    (folder / "systems").mkdir(parents=True)
    run = Run(scale="paper", seeds=(0, 1), data=tmp_path)
    with pytest.raises(MissingData, match="network"):
        paper.experiment(run)
    path = folder / "network.safetensors"
    save_network(path, DirectionNetwork(NetworkConfig(ndim=3)), steps=0)
    with pytest.raises(CheckpointError, match="never trained"):
        paper.experiment(run)

    path.write_bytes(pretrained_path(3).read_bytes())
    frame = next(iter(systems(8, 3, np.random.default_rng(0))))
    np.savez(folder / "systems" / "plume.npz", cells=frame.domain.cells, rhs=frame.b, closed=np.array(False))
    carry_out(run, full_size(run, (Grid(3, 5), Grid(3, 6))))
    assert values(run, "DCDM", "iterations", case="plume")
    assert values(run, "DCDM", "failed solves", case="plume") == [0]
    assert len(values(run, "DCDM", "iterations on the finest grid / on the grid before", ndim=3)) == 2

    np.savez(folder / "systems" / "plume.npz", cells=frame.domain.cells)
    with pytest.raises(MissingData, match="lacks closed, rhs"):
        carry_out(run, full_size(run, (Grid(3, 5),)))


def test_paper_scale_has_the_papers_grids(monkeypatch, tmp_path):
    handed = []
    monkeypatch.setattr(paper, "full_size", lambda run, grids: Study(grids, {}))
    monkeypatch.setattr(paper, "carry_out", lambda run, study: handed.append(study))
    paper.experiment(Run(scale="paper", seeds=(0,), data=tmp_path))
    assert [grid.name for grid in handed[0].grids] == ["64^3", "128^3", "256^3"]
