"""The experiment at quick scale, its records, the full-size study on a small file and a small environment."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from locally.catalogue import load
from locally.evidence import MissingData, Outcome, Run, Scale, judge
from locally.papers.losse_ftl import (
    EXACT,
    FORGOTTEN,
    LOSSE,
    ONLINE,
    OTHERS,
    REPLAY,
    Study,
    carry_out,
    control_agent,
    experiment,
)

SEEDS = (0,)

TINY = Study(100, (1e-3, 1e-2), 8, {}, 30, 90, "digits", (), 0)


def card():
    (paper,) = (paper for paper in load() if paper.slug == "losse-ftl")
    return paper


def test_quick_scale_bears_out_what_it_can_decide(quick):
    verdict = judge(card().claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == 2
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)  # one seed has no interval


def test_the_online_network_forgets_what_the_leader_keeps(quick):
    forgotten = {m.method: m.value for m in quick.measures if m.metric == FORGOTTEN}
    assert forgotten[LOSSE] < 0.1
    assert forgotten[ONLINE] > 0.2
    exact = {m.method: m.value for m in quick.measures if m.metric == EXACT}
    assert exact[LOSSE] >= 0.99
    assert [f.name for f in quick.figures] == ["drifting-streams"]


def test_same_seeds_same_measures(without_shape_checks):
    def measures():
        run = Run(scale="quick", seeds=(3,))
        carry_out(run, replace(TINY, code_length=0))
        return run.measures

    assert measures() == measures()


def test_the_full_size_study_runs_on_small_input(tmp_path, without_shape_checks, monkeypatch):
    import locally.papers.losse_ftl as paper

    monkeypatch.setattr(paper, "control_agent", lambda method, env, seed: control_agent(method, env, seed, warm_up=10))
    (tmp_path / "mnist").mkdir()
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 255, (40, 28, 28), np.uint8),
        "x_test": rng.integers(0, 255, (8, 28, 28), np.uint8),
    }
    np.savez(tmp_path / "mnist" / "mnist.npz", **arrays)
    run = Run(scale="paper", seeds=(0,), data=tmp_path)
    carry_out(run, Study(100, (1e-3,), 8, OTHERS, 30, 90, "mnist", ("Pendulum-v1",), 11))
    methods = {m.method for m in run.measures}
    assert {LOSSE, ONLINE, REPLAY, *OTHERS, "hard tile coding", "random ReLU", "random Fourier"} <= methods
    returns = {m.method: m.value for m in run.measures if m.metric == "return"}
    assert set(returns) == {LOSSE, ONLINE, REPLAY}
    assert all(-4000 < value < 0 for value in returns.values())


def test_every_claim_finds_its_records(quick, without_shape_checks):
    run = Run(scale="default", seeds=(0,))
    carry_out(run, TINY)
    recorded = {(m.method, m.metric) for m in quick.measures + run.measures}
    for claim in card().claims:
        assert (claim.method, claim.metric) in recorded or claim.scale is Scale.PAPER


def test_paper_scale_is_the_full_study(monkeypatch):
    handed = []
    monkeypatch.setattr("locally.papers.losse_ftl.carry_out", lambda run, study: handed.append(study))
    experiment(Run(scale="paper", seeds=range(10)))
    (study,) = handed
    assert study.control_steps == 300_000
    assert len(study.rates) == 5
    assert {"HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"} < set(study.control)
    assert study.memories == OTHERS


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(MissingData, match=r"mnist\.npz"):
        experiment(Run(scale="paper", seeds=(0,)))
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"locally\[control\]"):
        experiment(Run(scale="paper", seeds=(0,)))
