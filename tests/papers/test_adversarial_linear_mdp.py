"""The experiment at quick scale, that it repeats itself, and what its claims stand on."""

import numpy as np
import pytest

from locally.catalogue import load
from locally.control.adversarial import FixedPolicy, play_side_by_side
from locally.evidence import Outcome, Run, Scale, judge
from locally.papers.adversarial_linear_mdp import (
    AT_COMMON_SCALE,
    COMMON,
    CONTENDERS,
    EXCESS,
    GRID,
    HEDGE,
    SCHEDULES,
    TUNED,
    UNIFORM,
    Study,
    carry_out,
    contend,
    draw_processes,
    experiment,
    tune,
    uniform_regret,
)

SMALL = Study(episodes=(60, 120), tuning_episodes=60, tuning_processes=1, cases=500)


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (paper for paper in load() if paper.slug == "adversarial-linear-mdp")
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == 5
    # two seeds give wide intervals; the estimates themselves must satisfy the claims
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)


def test_every_learner_and_seed_is_recorded(quick):
    totals = {
        (m.method, m.seed, m.setting["scales"], m.setting["episodes"])
        for m in quick.measures
        if m.metric == "total regret"
    }
    expected = {(name, seed, TUNED, K) for name in (*CONTENDERS, UNIFORM) for seed in (0, 1) for K in (200, 800)}
    expected |= {(name, seed, COMMON, K) for name in AT_COMMON_SCALE for seed in (0, 1) for K in (200, 800)}
    assert totals == expected
    assert [f.name for f in quick.figures] == ["stability", "growth", "regret"]


def test_totals_are_sums_and_ratios_are_ratios(quick):
    by = {(m.method, m.metric, m.seed, *sorted(m.setting.items())): m.value for m in quick.measures}
    for method in (*CONTENDERS, UNIFORM):
        total = by[method, "total regret", 0, ("episodes", 800), ("scales", TUNED)]
        parts = [
            by[method, "regret", 0, ("episodes", 800), ("losses", schedule), ("scales", TUNED)]
            for schedule in SCHEDULES
        ]
        assert total == pytest.approx(sum(parts))
        hedge = by[HEDGE, "total regret", 0, ("episodes", 800), ("scales", TUNED)]
        uniform = by[UNIFORM, "total regret", 0, ("episodes", 800), ("scales", TUNED)]
        excess = by[method, EXCESS, 0, ("episodes", 800), ("scales", TUNED)]
        assert excess == pytest.approx((total - 0.7 * hedge) / uniform)


def test_the_small_estimates_are_those_that_the_shift_takes_away(quick):
    below = dict.fromkeys(CONTENDERS, 0.0)
    for m in quick.measures:
        if m.metric == "estimates below the bound":
            below[m.method] += m.value
    assert below["magnitude-reduced"] == 0
    assert below["Hedge, standard estimate, ridge 4 / K"] > 0


def test_same_seeds_same_measures(without_shape_checks):
    names = ("log-barrier", "magnitude-reduced", "log-barrier, no simulator", "LSVI-UCB")

    def measures():
        run = Run(scale="quick", seeds=(3, 4))
        found = [contend(run, (name, run.seeds), study=SMALL)[0] for name in names]
        return run.measures, [{key: regret.tolist() for key, regret in regrets.items()} for regrets in found]

    assert measures() == measures()


def test_seeds_alone_give_processes_of_their_own(without_shape_checks):
    together = draw_processes((5, 6), 30, SMALL)
    alone = draw_processes((6,), 30, SMALL)
    for a, b in zip(together[len(SCHEDULES) :], alone):
        np.testing.assert_array_equal(a.P, b.P)
        np.testing.assert_array_equal(a.thetas, b.thetas)
    several = draw_processes((6,), 30, SMALL, each=2)
    np.testing.assert_array_equal(several[0].P, alone[0].P)
    assert np.abs(several[3].P - alone[0].P).max() > 0.1
    longer = draw_processes((6,), 60, SMALL)
    np.testing.assert_array_equal(longer[0].P, alone[0].P)


def test_uniform_regret_is_exact(without_shape_checks):
    regret = uniform_regret((0,), SMALL)[TUNED, 120, 0]
    for process, found in zip(draw_processes((0,), 120, SMALL), regret[0]):
        played = play_side_by_side(FixedPolicy(np.full((3, 4, 6), 1 / 6), n_episodes=120), [process], rng=0)
        assert found == pytest.approx(played.final[0])


def test_tuning_takes_the_best_of_the_grid(without_shape_checks):
    """With a learner that is worse the larger its scale, and no noise."""

    def make(processes, scale, seed, sampled):
        best = np.stack([np.eye(6)[p.best_fixed().policy] for p in processes])
        weight = 1 / scale
        return FixedPolicy(weight * best + (1 - weight) / 6, n_episodes=processes[0].n_episodes)

    assert tune(make, SMALL) == min(GRID)


def test_the_full_size_study_runs_on_small_sizes(without_shape_checks):
    """Covariances from simulator samples, one seed at a time, another size of process."""
    sizes = {"horizon": 2, "n_states": 5, "n_actions": 3, "dim": 4}
    run = Run(scale="paper", seeds=(0, 1))
    carry_out(run, Study((60, 90), 60, 1, sampled=True, together=1, sizes=sizes, cases=500))
    slopes = [m for m in run.measures if m.metric == "slope of log regret over log episodes"]
    assert {m.seed for m in slopes if m.method == "log-barrier"} == {0, 1}


def test_sampled_covariances_are_the_simulators(without_shape_checks):
    run = Run(scale="paper", seeds=(0,))
    study = Study((30,), 60, 1, processes=2, sampled=True)
    regrets, curves = contend(run, ("log-barrier", (0,)), study=study)
    assert curves.shape == (1, 3, 30)
    assert regrets[TUNED, 30, 0].shape == (2, 3)
    learner = CONTENDERS["log-barrier"](draw_processes((0,), 30, study), 16.0, 0, True)
    assert learner.covariance == "sample"
    assert learner.n_covariance_samples == np.ceil(10 * np.log(2 * 5 * 30) * 30 / 4)


def test_paper_scale_has_the_sizes_of_the_study(monkeypatch):
    handed = []
    monkeypatch.setattr("locally.papers.adversarial_linear_mdp.carry_out", lambda run, study: handed.append(study))
    experiment(Run(scale="paper", seeds=range(10)))
    (study,) = handed
    assert study.sampled
    assert study.episodes == (1000, 10_000, 100_000)
    assert study.sizes == {"horizon": 5, "n_states": 50, "n_actions": 20, "dim": 10}
