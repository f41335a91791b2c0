"""The experiment at quick scale, the wiring of the full-size study, and that the same seeds give the same figures."""

import numpy as np
import pytest

from locally.catalogue import load
from locally.evidence import Outcome, Run, Scale, judge
from locally.papers.loop import Study, carry_out, experiment


def test_quick_scale_decides_every_claim_but_the_full_size_one(quick):
    (card,) = (paper for paper in load() if paper.slug == "loop")
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    waiting = [f for f in verdict.findings if f.outcome is Outcome.NEEDS_SCALE]
    assert [f.claim.metric for f in waiting] == ["slope of log regret over log steps, 1e6 to 1e7"]
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == len(card.claims) - 1
    # two seeds give wide intervals; the estimates themselves must satisfy the claims
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)


def test_expected_regret_is_close_to_what_was_received(quick):
    """They differ by the span and by noise of the order of span times the root of the steps."""
    by_metric = {
        metric: [m for m in quick.measures if m.metric == metric and m.setting]
        for metric in ("regret", "expected regret")
    }
    assert len(by_metric["regret"]) == 2 * (4 * 6 + 4 + 3 + 3)
    for received, expected in zip(*by_metric.values(), strict=True):
        assert (received.method, received.setting) == (expected.method, expected.setting)
        assert received.value == pytest.approx(expected.value, abs=6 * 6.4 * np.sqrt(80_000))
        assert expected.value >= 0


def test_figures_and_seeds_are_complete(quick):
    assert [f.name for f in quick.figures] == ["regret", "switches"]
    for method in ("LOOP", "UCRL2", "PSRL", "MLE-LOOP", "LOOP, linear", "LOOP, mixture"):
        assert {m.seed for m in quick.measures if m.method == method} == {0, 1}


SMALL = Study(150, 60, replays=1, everyone=True, rivers=(4,), everywhere=30, large=True)


def test_the_full_size_study_runs_on_small_sizes(without_shape_checks):
    run = Run(scale="paper", seeds=(0,))
    carry_out(run, SMALL)
    processes = {m.setting["process"] for m in run.measures if m.metric == "regret"}
    assert {"RiverSwim, 4 states", "access-control queue", "Garnet"} <= processes
    ablation = [m.method for m in run.measures if m.metric == "changes of policy, lazy or not"]
    assert ablation == ["LOOP", "LOOP, a new plan every step"]


def test_paper_scale_reaches_ten_million_steps(monkeypatch):
    handed = []
    monkeypatch.setattr("locally.papers.loop.carry_out", lambda run, study: handed.append(study))
    experiment(Run(scale="paper", seeds=range(20)))
    assert handed[0].steps == 10_000_000
    assert handed[0].rivers == (12, 20, 40)


def test_same_seeds_same_measures(without_shape_checks):
    def measures():
        run = Run(scale="quick", seeds=(5,))
        carry_out(run, Study(100, 60, replays=1, everyone=False))
        return run.measures

    assert measures() == measures()
