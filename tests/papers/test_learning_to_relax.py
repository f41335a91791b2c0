"""The experiment at quick scale, its set-up against closed forms and a direct solve, the full-size study's wiring."""

import numpy as np
import pytest
from scipy.sparse.linalg import spsolve

from locally.catalogue import load
from locally.evidence import Outcome, Run, Scale, judge
from locally.papers.learning_to_relax import (
    HeatEquation,
    ShiftedLaplacians,
    Study,
    carry_out,
    experiment,
    laplacian,
    ucb1_on_table,
)


def test_quick_scale_bears_out_what_it_can_decide(quick):
    (card,) = (paper for paper in load() if paper.slug == "learning-to-relax")
    verdict = judge(card.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == 4
    # two seeds give wide intervals; the estimates themselves must satisfy the claims
    assert all(f.claim.satisfied_by(f.estimate, f.estimate) for f in decided)


def test_no_method_beats_the_best_omega_for_every_instance(quick):
    by = {(m.method, m.metric, m.seed, m.setting.get("problem")): m.value for m in quick.measures}
    for (method, metric, seed, problem), value in by.items():
        if metric != "iterations per solve" or method == "instance-optimal by Young's formula":
            continue  # Young's omega is not on the grid
        assert value >= by["instance-optimal on the grid", metric, seed, problem]
    heat = {m.method: m.value for m in quick.measures if m.metric == "iterations over the heat run"}
    assert min(heat, key=heat.__getitem__) == "SSOR-CG, instance-optimal"


def test_every_seed_of_every_learner_is_recorded(quick):
    for method in ("Tsallis-INF", "Tsallis-INF, binned", "ChebCB"):
        seeds = {
            m.seed for m in quick.measures if (m.method, m.metric) == (method, "heat: iterations / best fixed omega")
        }
        assert seeds == {0, 1}
    assert [f.name for f in quick.figures] == ["sor-sequences", "heat-omegas", "heat-totals"]


def test_same_seeds_same_iterations(without_shape_checks):
    def measures():
        run = Run(scale="quick", seeds=(3, 4))
        carry_out(run, Study(instances=60, replays=1, steps=40, stride=10, grids=(25,)))
        return [m for m in run.measures if "milliseconds" not in m.metric]

    assert measures() == measures()


def test_the_full_size_study_runs_on_small_sizes(without_shape_checks):
    """Several grids, as at paper scale: growth is plotted over the number of unknowns."""
    run = Run(scale="paper", seeds=(0,))
    carry_out(run, Study(instances=30, replays=1, steps=20, stride=1, grids=(6, 8, 25)))
    assert "heat-growth" in [f.name for f in run.figures]
    grids = {m.setting["nx"] for m in run.measures if m.metric == "heat: iterations / best fixed omega"}
    assert grids == {6, 8, 25}


def test_paper_scale_has_the_papers_sizes(monkeypatch):
    handed = []
    monkeypatch.setattr("locally.papers.learning_to_relax.carry_out", lambda run, study: handed.append(study))
    run = Run(scale="paper", seeds=range(10))
    experiment(run)
    assert handed == [Study(instances=5000, replays=4, steps=5000, stride=1, grids=(25, 50, 100, 200, 400))]
    assert handed[0].replays * len(run.seeds) == 40  # trials of the paper


def test_instances_are_drawn_as_the_set_up_says():
    table = ShiftedLaplacians.draw(400, 0, (2.0, 6.0))
    assert table.contexts.min() >= -0.15
    assert table.contexts.mean() == pytest.approx(-0.15 + 0.6 / 4, abs=0.02)
    norms = np.linalg.norm(table.targets, axis=1)
    assert norms.max() <= 10
    assert norms.mean() == pytest.approx(9.4, abs=0.2)  # a Gaussian in 100 dimensions, cut at its median radius


def test_youngs_omega_is_within_a_few_iterations_of_the_best_on_the_grid():
    table = ShiftedLaplacians.draw(60, 1, (0.5, 1.5))
    assert table.counts_at_optimal_omega().mean() == pytest.approx(table.counts.min(axis=1).mean(), rel=0.1)


def test_ucb1_finds_the_better_arm():
    counts = np.tile([50, 10, 40], (600, 1))
    iterations = ucb1_on_table(counts)
    assert iterations[:3].tolist() == [50, 10, 40]
    assert (iterations[300:] == 10).mean() > 0.6


def test_the_heat_equation_steps_as_crank_nicolson_does():
    heat = HeatEquation(12)
    L = -144 * laplacian(11)
    u = heat.u
    for step in range(3):
        t = (step + 0.5) * 1e-3
        kappa = max(0.1 * np.sin(2 * np.pi * t), -10 * np.sin(2 * np.pi * t))
        centre = 0.5 + np.array([np.cos(16 * np.pi * t), np.sin(16 * np.pi * t)]) / 4
        inner = np.arange(1, 12) / 12
        x, y = np.meshgrid(inner, inner, indexing="ij")
        q = np.minimum(1, ((x - centre[0]) ** 2 + (y - centre[1]) ** 2).ravel() * 64)
        with np.errstate(divide="ignore"):
            f = 32 * np.exp(1 - 1 / (1 - q))
        weight = 0.5e-3 * kappa
        eye = np.eye(121)
        u = np.linalg.solve(eye - weight * L, (eye + weight * L) @ u + 1e-3 * f)
        _, b = heat.system()
        heat.advance(spsolve(heat.A.tocsc(), b))
        np.testing.assert_allclose(heat.u, u, rtol=1e-10, atol=1e-14)
    assert heat.context == heat.diffusion(0.003)
