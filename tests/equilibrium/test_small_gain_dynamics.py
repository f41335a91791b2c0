"""Gradient play: certified rates hold along runs, every method finds the equilibrium, failures end in a status."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locally.equilibrium.small_gain import (
    Ball,
    Box,
    DifferentiableGame,
    GradientPlay,
    PlayStatus,
    QuadraticGame,
    SmallGainCertifier,
    euler,
    extragradient,
    rk4,
)


def lopsided_game():
    H = np.array([[1.0, 10.0], [0.05, 1.0]])
    return QuadraticGame(H, (1, 1), -H @ np.array([1.0, -2.0]))


def random_certified_game(rng, sizes=(2, 3)):
    d = sum(sizes)
    H = rng.standard_normal((d, d))
    start = np.cumsum((0, *sizes))
    for i, size in enumerate(sizes):
        own = slice(start[i], start[i] + size)
        H[own, own] = H[own, own] @ H[own, own].T + np.eye(size)
    game = QuadraticGame(H, sizes)
    gain = SmallGainCertifier().certify(game).small_gain
    for i, size in enumerate(sizes):
        rows = slice(start[i], start[i] + size)
        own = H[rows, rows].copy()
        H[rows] *= rng.uniform(0.3, 0.95) / gain
        H[rows, rows] = own
    return QuadraticGame(H, sizes)


@given(st.integers(0, 2**32 - 1))
def test_every_certified_rate_holds_between_two_runs_or_towards_the_equilibrium(seed):
    rng = np.random.default_rng(seed)
    game = random_certified_game(rng)
    found = SmallGainCertifier().certify(game)
    x = rng.standard_normal((8, game.dimension))
    y = np.zeros_like(x)  # the equilibrium
    share = rng.uniform(0.1, 0.999)
    for method, step, name in (
        (euler, share * found.euler_step_max, "euler"),
        (rk4, share * found.rk4_step_rigorous, "rk4"),
        (extragradient, share * found.extragradient_step, "extragradient"),
    ):
        shrunk = found.norm(method(game.pseudo_gradient, x, step) - method(game.pseudo_gradient, y, step))
        assert (shrunk <= found.contraction(step, name) * found.norm(x - y) * (1 + 1e-9)).all()


@pytest.mark.parametrize("method", ["euler", "rk4", "extragradient", "optimistic"])
def test_every_method_finds_the_equilibrium_at_its_certified_step(method):
    game = lopsided_game()
    found = SmallGainCertifier().certify(game)
    run = GradientPlay(method=method, record=True).run(game, np.zeros(2), found)
    assert run.status is PlayStatus.CONVERGED
    np.testing.assert_allclose(run.x, [1.0, -2.0], atol=1e-6)
    assert run.trajectory.shape == (run.steps + 1, 2)
    again = GradientPlay(method=method).run(game, np.zeros(2), found)
    np.testing.assert_array_equal(again.residual_norms, run.residual_norms)


def test_weighted_norm_falls_while_the_euclidean_one_grows():
    """2-D example: the Euclidean distance reaches 3.19 times its start, the weighted one stays under exp(-alpha t)."""
    game = QuadraticGame(np.array([[1.0, 10.0], [0.05, 1.0]]), (1, 1))
    found = SmallGainCertifier().certify(game)
    run = GradientPlay(method="rk4", step=5e-4, max_steps=3000, record=True).run(game, np.array([0.15, -0.15]))
    path = run.trajectory
    euclidean = np.linalg.norm(path, axis=1) / np.linalg.norm(path[0])
    weighted = found.norm(path) / found.norm(path[0])
    assert euclidean.max() == pytest.approx(3.19, abs=0.01)
    assert (np.diff(weighted) < 0).all()
    assert weighted[-1] == pytest.approx(0.489, abs=2e-3)
    assert (weighted <= np.exp(-found.margin * 5e-4 * np.arange(3001)) * (1 + 1e-9)).all()


def test_runge_kutta_is_of_fourth_order():
    import torch

    game = DifferentiableGame(lambda z: torch.stack([torch.sin(z[0]) + z[1], z[1] - z[0]]), (1, 1))
    start, exact = np.array([1.0, 0.5]), np.array([1.0, 0.5])
    for _ in range(512):
        exact = rk4(game.pseudo_gradient, exact, 1 / 512)
    errors = []
    for n in (8, 16):
        x = start
        for _ in range(n):
            x = rk4(game.pseudo_gradient, x, 1 / n)
        errors.append(np.linalg.norm(x - exact))
    assert 12 < errors[0] / errors[1] < 20


def test_projected_play_solves_the_variational_inequality():
    """The equilibrium (1, -2) lies outside the box: the answer satisfies <F(x), z - x> >= 0 on all of it."""
    game = lopsided_game()
    box = Box(np.zeros(2), np.array([0.5, 0.5]))
    found = SmallGainCertifier().certify(game)
    for method in ("euler", "extragradient"):
        run = GradientPlay(method=method).run(game, np.zeros(2), found, projection=box.project)
        assert run.status is PlayStatus.CONVERGED
        corners = np.array([[a, b] for a in (-0.5, 0.5) for b in (-0.5, 0.5)])
        assert ((corners - run.x) @ game.pseudo_gradient(run.x) >= -1e-6).all()


def test_projection_onto_a_ball_in_the_weighted_norm():
    game, ball = lopsided_game(), Ball(np.zeros(2), 0.5)
    found = SmallGainCertifier().certify(game)
    project = ball.projection(game.block_sizes, found.weights)
    step = found.euler_step_opt
    x, y = np.random.default_rng(0).standard_normal((2, 50, 2))
    before = found.norm(x - y)
    after = found.norm(euler(game.pseudo_gradient, x, step, project) - euler(game.pseudo_gradient, y, step, project))
    assert (after <= found.contraction(step) * before * (1 + 1e-9)).all()


def test_too_long_a_step_ends_in_a_status_not_in_garbage():
    run = GradientPlay(step=5.0, max_steps=2000).run(lopsided_game(), np.zeros(2))
    assert run.status is PlayStatus.DIVERGED


def test_iteration_limit_and_callback():
    seen = []
    run = GradientPlay(step=1e-4, max_steps=5).run(lopsided_game(), np.zeros(2), callback=lambda k, r: seen.append(k))
    assert run.status is PlayStatus.ITERATION_LIMIT
    assert seen == [0, 1, 2, 3, 4, 5]
    assert run.steps == 5


def test_batch_of_starts_agrees_with_single_starts():
    game = lopsided_game()
    starts = np.random.default_rng(0).standard_normal((3, 2))
    play = GradientPlay(method="optimistic", step=0.05, max_steps=40, tol=1e-30)
    batch = play.run(game, starts).x
    np.testing.assert_allclose(batch, [play.run(game, start).x for start in starts], rtol=1e-12)


def test_refusals(without_shape_checks):
    game = lopsided_game()
    with pytest.raises(ValueError, match="needs a certificate, got None"):
        GradientPlay().run(game, np.zeros(2))
    hopeless = SmallGainCertifier().certify(QuadraticGame(np.array([[1.0, 3.0], [3.0, 1.0]]), (1, 1)))
    with pytest.raises(ValueError, match="small gain"):
        GradientPlay().run(game, np.zeros(2), hopeless)
    with pytest.raises(ValueError, match="x0 must have 2 entries"):
        GradientPlay(step=0.1).run(game, np.zeros(3))
    with pytest.raises(ValueError, match="x0 holds NaN"):
        GradientPlay(step=0.1).run(game, np.array([np.nan, 0.0]))
    with pytest.raises(ValueError, match="method must be one of"):
        GradientPlay(method="adam")
    with pytest.raises(ValueError, match="step must be positive"):
        GradientPlay(step=0.0)
