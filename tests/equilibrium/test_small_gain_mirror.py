"""Games over softmax policies: reference vectors, Fisher geometry, natural policy gradient, the global mirror bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.equilibrium.small_gain import (
    Box,
    FisherGeometry,
    GradientPlay,
    NormalFormGame,
    PlayStatus,
    QuadraticGame,
    SmallGainCertifier,
    TabularMarkovGame,
    block_bounds,
    certify_mirror,
    euler,
    mirror_step,
)

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture
def reference(golden):
    return np.load(golden / "27-small-gain-nash" / "sgn_reference.npz", allow_pickle=False)


@pytest.fixture
def markov(reference):
    return TabularMarkovGame(reference["markov_P"], reference["markov_R"], gamma=0.9, tau=1.0)


def random_markov_game(seed, actions=(2, 3), states=2, occupancy=False):
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.ones(states), (states, *actions))
    R = rng.standard_normal((len(actions), states, *actions))
    return TabularMarkovGame(P, R, 0.8, 0.5, start=np.full(states, 1 / states), occupancy_weighted_entropy=occupancy)


def test_reference_markov_game(reference, markov):
    theta = reference["markov_theta"]
    np.testing.assert_allclose(markov.losses(theta), reference["markov_loss"], rtol=1e-8)
    np.testing.assert_allclose(markov.pseudo_gradient(theta), reference["markov_pseudograd"], rtol=1e-8)
    np.testing.assert_allclose(markov.jacobian(theta), reference["markov_jac"], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(markov.fisher(theta), reference["markov_fisher"], rtol=1e-8, atol=1e-12)
    geometry = FisherGeometry(markov)
    for point, expected in zip(theta, reference["markov_mu_L"], strict=True):
        found = block_bounds(geometry.jacobian(point[None]), geometry.tangent_sizes)
        np.testing.assert_allclose([*found.mu, found.coupling[0, 1], found.coupling[1, 0]], expected, rtol=1e-8)


def test_certificate_of_the_reference_markov_game(markov):
    """mu 0.9344, L 0.6009, beta 1.5718, eta_max 0.26992 over the vertices of the box; the best weights are equal."""
    found = SmallGainCertifier().certify(FisherGeometry(markov), Box(np.zeros(8), 0.1))
    np.testing.assert_allclose(found.mu, 0.9344, atol=1e-4)
    np.testing.assert_allclose(found.coupling[[0, 1], [1, 0]], 0.6009, atol=1e-4)
    np.testing.assert_allclose(found.weights, 1, rtol=1e-6)
    assert found.lipschitz == pytest.approx(1.5718, abs=1e-4)
    assert found.euler_step_max == pytest.approx(0.26992, abs=2e-4)
    assert found.local
    assert not found.rigorous
    assert found.radius is None


def test_spectrum_at_the_equilibrium(markov):
    J = FisherGeometry(markov).jacobian(np.zeros((1, 8)))[0]
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(J).real), [0.45, 0.55, 1.45, 1.55], atol=1e-9)


@pytest.mark.parametrize("occupancy", [False, True])
@pytest.mark.parametrize("actions", [(2, 3), (2, 2, 2)])
def test_gradient_and_jacobian_against_finite_differences(actions, occupancy):
    game = random_markov_game(1, actions, occupancy=occupancy)
    rng = np.random.default_rng(2)
    theta, h = rng.standard_normal(game.dimension), 1e-5
    shifts = h * np.eye(game.dimension)
    slopes = (game.losses(theta + shifts) - game.losses(theta - shifts)) / (2 * h)
    owner = np.repeat(np.arange(game.players), game.block_sizes)
    own = slopes[np.arange(game.dimension), owner]
    np.testing.assert_allclose(game.pseudo_gradient(theta), own, atol=1e-8)
    columns = (game.pseudo_gradient(theta + shifts) - game.pseudo_gradient(theta - shifts)) / (2 * h)
    np.testing.assert_allclose(game.jacobian(theta[None])[0], columns.T, atol=1e-8)


@given(seeds)
@settings(max_examples=10)
def test_natural_gradient_is_the_pseudo_inverse_and_ignores_constants(seed):
    game = random_markov_game(seed % 7)
    geometry = FisherGeometry(game)
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal(game.dimension)
    natural = geometry.pseudo_gradient(theta)
    exact = np.linalg.pinv(game.fisher(theta[None])[0], rcond=1e-8) @ game.pseudo_gradient(theta)
    np.testing.assert_allclose(natural, exact, atol=1e-9)
    shifted = theta.copy()
    shifted[:2] += 3.7  # both actions of player 0 in state 0
    np.testing.assert_allclose(geometry.pseudo_gradient(shifted), natural, atol=1e-9)
    np.testing.assert_allclose(geometry.jacobian(shifted[None]), geometry.jacobian(theta[None]), atol=1e-8)


def test_connection_vanishes_at_the_equilibrium_only(markov):
    plain, exact = FisherGeometry(markov), FisherGeometry(markov, connection=True)
    at, off = np.zeros((1, 8)), np.array([[0.5, -0.3, 0.2, 0.1, -0.4, 0.3, 0.0, 0.6]])
    np.testing.assert_allclose(exact.jacobian(at), plain.jacobian(at), atol=1e-10)
    assert np.abs(exact.jacobian(off) - plain.jacobian(off)).max() > 1e-2


def test_connection_predicts_how_the_flow_shrinks_the_metric():
    """d/dt of delta^T F(theta) delta along theta' = -v, delta' = -Dv delta, is -2 times the form of `connection`."""
    game = random_markov_game(3)
    geometry = FisherGeometry(game, connection=True)
    rng = np.random.default_rng(4)
    theta, h = rng.standard_normal(game.dimension), 1e-5
    delta = geometry._basis @ rng.standard_normal(sum(geometry.tangent_sizes))
    field = geometry.pseudo_gradient
    along = (field(theta + h * delta) - field(theta - h * delta)) / (2 * h)
    length = lambda t: (delta - t * along) @ game.fisher((theta - t * field(theta))[None])[0] @ (delta - t * along)
    rate = (length(h) - length(-h)) / (2 * h)
    F = geometry._basis.T @ game.fisher(theta[None])[0] @ geometry._basis
    values, vectors = np.linalg.eigh(F)
    coordinates = vectors @ np.diag(np.sqrt(values)) @ vectors.T @ geometry._basis.T @ delta
    assert rate == pytest.approx(-2 * coordinates @ geometry.jacobian(theta[None])[0] @ coordinates, rel=1e-5)


def test_certified_natural_policy_gradient_reaches_the_equilibrium(markov):
    geometry = FisherGeometry(markov)
    found = SmallGainCertifier().certify(geometry, Box(np.zeros(8), 0.1))
    start = np.random.default_rng(0).uniform(-0.1, 0.1, 8)
    before = markov.kl_to(np.zeros(8), start, found.weights)
    run = GradientPlay(tol=1e-6, max_steps=200).run(geometry, start, found)
    assert run.status is PlayStatus.CONVERGED
    certified = found.contraction(run.step) ** (2 * run.steps) * before
    assert markov.kl_to(np.zeros(8), run.x, found.weights) <= certified
    # reference: 1.47e-4 -> 1.2e-7 in 50 steps and 2.1e-10 in 100, so about 0.873 a step
    theta = start
    for _ in range(50):
        theta = euler(geometry.pseudo_gradient, theta, 0.135)
    rate = (markov.kl_to(np.zeros(8), theta, found.weights) / before) ** (1 / 50)
    assert 0.84 < rate < 0.90


def test_stable_below_the_local_threshold_and_not_above(markov):
    geometry = FisherGeometry(markov)
    for step, stable in ((1.28, True), (1.30, False)):
        theta = np.full(8, 1e-3) * np.array([1, -1, 1, -1, 1, -1, 1, -1])
        theta[[2, 3, 6, 7]] *= -1  # the stiffest mode
        theta = theta + 1e-4 * np.random.default_rng(0).standard_normal(8)
        before = markov.kl_to(np.zeros(8), theta, np.ones(2))
        for _ in range(300):
            theta = euler(geometry.pseudo_gradient, theta, step)
        assert (markov.kl_to(np.zeros(8), theta, np.ones(2)) < before) is np.bool_(stable)


# --- normal-form games and the mirror certificate ---------------------------------------------------------------------


def random_normal_form(rng, actions, tau):
    payoffs = [rng.uniform(-1, 1, actions) for _ in actions]
    return NormalFormGame(payoffs, tau)


@given(seeds)
@settings(max_examples=15)
def test_interaction_norms_bound_every_pair_of_policies(seed):
    rng = np.random.default_rng(seed)
    game = random_normal_form(rng, (3, 2, 3), 1.0)
    norms = game.interaction_norms()
    assert (norms <= max(np.abs(u).max() for u in game.payoffs) + 1e-12).all()
    draw = lambda n: rng.dirichlet(np.full(n, 0.3))
    x, y = [draw(n) for n in game.actions], [draw(n) for n in game.actions]
    # player 0's payoff vector as only player 2's policy moves
    at = lambda third: np.einsum("abc,b,c->a", game.payoffs[0], x[1], third)
    moved = abs((at(x[2]) - at(y[2])) @ (x[0] - y[0]))
    assert moved <= norms[0, 2] * np.abs(x[2] - y[2]).sum() * np.abs(x[0] - y[0]).sum() + 1e-12


def test_interaction_norm_is_attained():
    pennies = np.array([[1.0, -1.0], [-1.0, 1.0]])
    game = NormalFormGame([pennies, -pennies], 1.0)
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert abs((x - y) @ pennies @ (x - y)) == pytest.approx(game.interaction_norms()[0, 1] * 2 * 2)


@given(seeds, st.floats(0.05, 0.98))
@settings(max_examples=10)
def test_mirror_steps_contract_globally_as_certified(seed, share):
    """From any start, far from the equilibrium too, V+ <= V / (1 + eta c)."""
    rng = np.random.default_rng(seed)
    actions = [(2, 2), (3, 4), (2, 2, 3)][seed % 3]
    probe = random_normal_form(rng, actions, 1.0)
    spread = np.abs(np.linalg.eigvals(probe.interaction_norms())).max()
    game = NormalFormGame(list(probe.payoffs), tau=float(spread / share))
    found = certify_mirror(game)
    assert found.feasible
    star = np.zeros(game.dimension)
    for _ in range(150):
        star = mirror_step(game, star, 1 / game.tau)
    assert np.abs(FisherGeometry(game).pseudo_gradient(star)).max() < 1e-10
    theta = rng.normal(0, 3, game.dimension)
    for eta in (0.3 * found.step_max, 0.5 * found.step_max, 0.9 * found.step_max):
        before = game.kl_to(star, theta, found.weights)
        after = game.kl_to(star, mirror_step(game, theta, eta), found.weights)
        assert after <= found.contraction(eta) * before + 1e-12


def test_mirror_certificate_is_feasible_exactly_below_tau():
    pennies = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert certify_mirror(NormalFormGame([pennies, -pennies], 1.001)).feasible
    refused = certify_mirror(NormalFormGame([pennies, -pennies], 0.999))
    assert not refused.feasible
    assert refused.step_max == 0
    assert refused.contraction(0.1) == np.inf


def test_mirror_step_is_natural_policy_gradient():
    rng = np.random.default_rng(0)
    game = random_normal_form(rng, (3, 2), 2.0)
    theta, eta = rng.standard_normal(5), 0.3
    x = game.policies(theta)
    utility = np.concatenate([game.payoffs[0] @ x[1][0], x[0][0] @ game.payoffs[1]])
    direct = (theta + eta * utility) / (1 + eta * game.tau)
    found = mirror_step(game, theta, eta)
    for ours, theirs in zip(game.policies(found), game.policies(direct), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    step = certify_mirror(game).natural_step(eta)
    np.testing.assert_allclose(found, euler(FisherGeometry(game).pseudo_gradient, theta, step), atol=1e-12)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals_name_the_argument(without_shape_checks, reference):
    P, R = reference["markov_P"], reference["markov_R"]
    with pytest.raises(ValueError, match="P must hold a probability"):
        TabularMarkovGame(2 * P, R, 0.9, 1.0)
    with pytest.raises(ValueError, match="R must have shape"):
        TabularMarkovGame(P, R[0], 0.9, 1.0)
    with pytest.raises(ValueError, match="gamma"):
        TabularMarkovGame(P, R, 1.0, 1.0)
    with pytest.raises(ValueError, match="tau"):
        NormalFormGame([np.eye(2), np.eye(2)], 0.0)
    with pytest.raises(ValueError, match="payoffs"):
        NormalFormGame([np.eye(2), np.eye(3)], 1.0)
    with pytest.raises(ValueError, match="at least two actions"):
        FisherGeometry(NormalFormGame([np.ones((1, 2)), np.ones((1, 2))], 1.0))
    with pytest.raises(TypeError, match="TabularMarkovGame"):
        FisherGeometry(QuadraticGame(np.eye(2), (1, 1)))
