"""The experiment at quick scale, its logs, and the full-size study of linear processes on small ones."""

import numpy as np
import pytest

from locally.catalogue import load
from locally.control.environments import random_episodic_linear_mdp
from locally.evidence import Outcome, Run, Scale, judge
from locally.papers import ftpedel as paper

SEEDS = (100, 101)


@pytest.fixture(scope="module")
def card():
    (found,) = (paper for paper in load() if paper.slug == "ftpedel")
    return found


def values(run, method, metric, **setting):
    return [
        m.value
        for m in run.measures
        if (m.method, m.metric) == (method, metric) and setting.items() <= m.setting.items()
    ]


def test_quick_scale_bears_out_its_claims(card, quick):
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    assert verdict.outcome is Outcome.HOLDS, verdict.reason
    assert len([f for f in verdict.findings if f.outcome is Outcome.HOLDS]) == 3
    assert [figure.name for figure in quick.figures] == ["episodes over log"]


def test_larger_scales_record_what_their_claims_read(card, quick, without_shape_checks):
    for claim in card.claims:
        if claim.scale is Scale.DEFAULT and claim.setting.get("epsilon") != 0.1:
            measured = [m for m in quick.measures if (m.method, m.metric) == (claim.method, claim.metric)]
            assert [m for m in measured if claim.setting.items() <= m.setting.items()], claim.statement


def test_both_extremes_and_the_exact_need_stand_beside_it(quick):
    log = {"log": paper.MISSING, "epsilon": 0.2}
    ours = values(quick, paper.OURS, paper.EPISODES, samples=20_000, **log)
    uniform = values(quick, paper.UNIFORM, paper.EPISODES, samples=20_000, **log)
    alone = values(quick, paper.OURS, paper.EPISODES, samples=0, **log)
    (least,) = values(quick, paper.FEWEST, paper.EPISODES, samples=20_000, **log)
    assert max(ours) < min(uniform)
    assert max(ours) < min(alone)
    assert 0 < least < min(ours)
    # good with few episodes, without knowing it
    assert max(values(quick, paper.OPTIMISTIC, paper.UNKNOWN, samples=20_000)) < min(ours)


def test_same_seed_same_measures(without_shape_checks):
    def measures():
        run = Run(scale="quick", seeds=(5,))
        paper.one_seed(paper.Study((0, 300), (0.4,), 1), run, 5)
        return run.measures

    assert measures() == measures()


def test_linear_study_runs_on_a_small_process(card, without_shape_checks):
    linear = paper.Linear(horizon=2, n_states=5, n_actions=4, dims=(3,), policies=60, rows=50_000)
    run = Run(scale="paper", seeds=(0,))
    paper.one_linear_seed(linear, run, 0)
    (claim,) = (c for c in card.claims if c.scale is Scale.PAPER)
    (slope,) = values(run, claim.method, claim.metric, dim=3)
    assert 1 < slope < 2.5
    for epsilon in linear.epsilons:
        found = [values(run, m, paper.EPISODES, epsilon=epsilon)[0] for m in (paper.OURS, "Pedel, without the log")]
        assert found[0] < found[1]
        assert values(run, paper.OURS, "suboptimality", epsilon=epsilon)[0] <= epsilon


def test_the_linear_log_leaves_its_direction_out():
    mdp = random_episodic_linear_mdp(2, 20, 6, 4, rng=0)
    n = paper.visits_without_a_direction(mdp.features, 10_000)
    assert (n.sum(axis=(1, 2)) > 9000).all()
    seen = mdp.features[n > 0]
    assert (seen[:, -1] < 0.01).all()
    assert np.linalg.matrix_rank(seen[:, :-1]) == 3


def test_full_study_covers_the_linear_processes(monkeypatch):
    handed = []
    monkeypatch.setattr("locally.papers.ftpedel.carry_out", lambda run, study: handed.append(study))
    paper.experiment(Run(scale="paper", seeds=range(10)))
    assert handed[0].linear == paper.Linear()
    assert {0, 20_000} < set(handed[0].samples)


def test_example_on_the_card_runs(card, capsys):
    exec(card.example, {})
    with_log, without = capsys.readouterr().out.splitlines()
    assert int(with_log.split("log ")[1].split()[0]) < int(without.split()[1])
