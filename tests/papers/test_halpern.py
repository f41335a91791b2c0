"""The experiment of arXiv 2310.02987 records what its card claims; its problems and its full-size wiring."""

import numpy as np
import pytest

from locally import catalogue
from locally.equilibrium.halpern import Extragradient, SingleLoopHalpern
from locally.evidence import Outcome, Run, Scale, judge
from locally.papers import halpern


def test_every_claim_finds_its_measures(quick):
    paper = catalogue.find(catalogue.load(), "halpern")
    verdict = judge(paper.claims, quick.measures, Scale.QUICK)
    decided = [f for f in verdict.findings if f.outcome is not Outcome.NEEDS_SCALE]
    assert len(decided) == 3
    assert all(f.seeds == 2 for f in decided)
    assert not any(f.outcome is Outcome.FAILS for f in decided)
    known = {(m.method, m.metric) for m in quick.measures}
    later = [c for c in paper.claims if "digits" not in c.metric]
    assert all((c.method, c.metric) in known for c in later)


def test_figures_are_drawn(quick):
    assert len(quick.figures) == 4
    assert all(f.svg.startswith("<svg") and f.png for f in quick.figures)


def test_linear_programming_solves_the_games(quick):
    gaps = {m.method: m.value for m in quick.measures if m.metric == "duality gap, game"}
    assert gaps["linear programming (SciPy, HiGHS)"] < 1e-7
    assert min(gaps.values()) > -1e-9


def test_golden_policeman_matrix(golden):
    values = np.abs(np.random.RandomState(3).randn(8))
    expected = np.load(golden / "22-halpern/halpern.npz")["pb8"]
    np.testing.assert_allclose(halpern.policeman_and_burglar(values), expected, atol=1e-12)


def test_paper_scale_takes_the_papers_street():
    run = Run(scale="paper", seeds=[5])
    np.testing.assert_array_equal(
        halpern.house_values(run, 500, 5), np.abs(np.random.RandomState(1).standard_normal(500))
    )


def test_quadratic_programme_is_the_hard_instance():
    op = halpern.hard_quadratic(4)
    np.testing.assert_array_equal(4 * op.A, [[0, 0, -1, 1], [0, -1, 1, 0], [-1, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(op.H, 2 * op.A.T @ op.A)
    x = np.linalg.solve(op.A, op.b)
    y = np.linalg.solve(op.A.T, op.H @ x - op.h)
    np.testing.assert_allclose(op.full(np.concatenate([x, y])), 0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*not known to be cocoercive")
def test_full_study_runs_on_small_sizes():
    """What the paper scale runs, with the same wiring, on problems that fit into a test."""
    run = Run(scale="paper", seeds=[0])
    halpern.savings(run, [16, 64])
    halpern.bound(run, runs=2, checkpoints=[10, 50])
    halpern.matrix_game(run, 12, 60)
    halpern.quadratic_programme(run, 6, 60)
    metrics = {m.metric for m in run.measures}
    assert "epochs to the final norm of extragradient / its epochs, game" in metrics
    assert "slope of log evaluations saved over log components" in metrics
    assert all(np.isfinite(m.value) for m in run.measures if m.metric.startswith("operator norm"))


def test_digits_are_told_apart_as_even_and_odd():
    X, y = halpern.labelled_data("digits")
    assert X.shape == (1797, 65)
    assert set(y) == {0.0, 1.0}
    assert (X[:, -1] == 1).all()


def test_both_solvers_agree_on_a_street():
    """Not an accident of one method: extragradient and Algorithm 1 approach the same value of the game."""
    game = halpern.MatrixGame(halpern.policeman_and_burglar(np.linspace(0.5, 1.5, 10)))
    with pytest.warns(UserWarning, match="cocoercive"):
        ours = SingleLoopHalpern(eta=2 / np.linalg.norm(game.A), max_epochs=4000, random_state=0).solve(
            game, game.uniform_start()
        )
    theirs = Extragradient(max_epochs=4000).solve(game, game.uniform_start())
    low, high = game.value_bounds(theirs.x)
    assert low - game.gap(ours.x) <= game.value_bounds(ours.x)[1] <= high + game.gap(ours.x)
    assert game.gap(ours.x) < 0.01
