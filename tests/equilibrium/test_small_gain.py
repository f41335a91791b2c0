"""Margins, Perron weights, bands, steps of Small-Gain Nash: reference vectors, closed forms, theorems as invariants."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from locally.equilibrium.small_gain import (
    Ball,
    Box,
    CertificateStatus,
    DifferentiableGame,
    GameBounds,
    QuadraticGame,
    Samples,
    SGNCertificate,
    SmallGainCertifier,
    affine_contraction,
    affine_step_matrix,
    affine_step_max,
    balanced_weights,
    block_bounds,
    euclidean_margin,
    euler_contraction,
    euler_step_max,
    lipschitz,
    lipschitz_from_blocks,
    margin,
    optimal_signed_weights,
    optimal_step_weights,
    optimal_weights,
    project_simplices,
    rk4_contraction,
    rk4_guideline,
    rk4_step_opt,
    rk4_step_rigorous,
    signed_margin,
    small_gain,
    stability_threshold,
    timescale_band,
)
from locally.equilibrium.small_gain.perron import perron_pair

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture
def reference(golden):
    return np.load(golden / "27-small-gain-nash" / "sgn_reference.npz", allow_pickle=False)


def random_bounds(rng, players, strength=1.0):
    mu = rng.uniform(0.3, 2, players)
    coupling = rng.exponential(strength, (players, players)) * np.exp(rng.normal(0, 1, (players, players)))
    return mu, coupling - np.diag(np.diag(coupling))


def random_jacobians(rng, sizes, samples=2):
    d = sum(sizes)
    J = rng.standard_normal((samples, d, d)) * np.exp(rng.normal(0, 0.7, (d, 1))) + 2 * np.eye(d)
    ends = np.cumsum(sizes)
    for size, end in zip(sizes, ends, strict=True):  # own blocks of a pseudo-gradient are symmetric
        own = J[:, end - size : end, end - size : end]
        J[:, end - size : end, end - size : end] = (own + own.swapaxes(1, 2)) / 2
    return J


# --- reference vectors ------------------------------------------------------------------------------------------------


def test_reference_games(reference):
    for k, H in enumerate(reference["lq_H"]):
        J, sizes, w = H[None], (5, 3), reference["lq_w"][k]
        bounds = block_bounds(J, sizes)
        found = [*bounds.mu, bounds.coupling[0, 1], bounds.coupling[1, 0]]
        np.testing.assert_allclose(found, [reference[f"lq_{n}"][k] for n in ("mu1", "mu2", "L12", "L21")], rtol=1e-8)
        assert euclidean_margin(J) == pytest.approx(reference["lq_gamma_euc"][k], rel=1e-8)
        assert margin(bounds.mu, bounds.coupling, w) == pytest.approx(reference["lq_alpha_sgn"][k], rel=1e-8)
        assert signed_margin(J, sizes, w) == pytest.approx(reference["lq_alpha_true"][k], rel=1e-8)
        assert lipschitz(J, sizes, w) == pytest.approx(reference["lq_beta"][k], rel=1e-8)
        ends = (reference["lq_r_minus"][k], reference["lq_r_plus"][k])
        np.testing.assert_allclose(timescale_band(bounds.mu, bounds.coupling), ends, rtol=1e-8)
        for method in ("euler", "rk4"):
            step = affine_step_matrix(H, float(reference["lq_h"][k]), method)
            radius = np.abs(np.linalg.eigvals(step)).max()
            assert radius == pytest.approx(reference[f"lq_rho_{method}"][k], rel=1e-8)


def test_reference_canonical_game(reference):
    R = reference["canon_R"]
    for coupling, rosen, alpha, true, beta, step, guideline in reference["canon_table"]:
        game = QuadraticGame(np.block([[np.eye(32), 10 * coupling * R], [0.05 * coupling * R.T, np.eye(32)]]), (32, 32))
        found = SmallGainCertifier(weights="balanced" if coupling else "optimal").certify(game)
        assert found.euclidean_margin == pytest.approx(rosen, rel=1e-8)
        assert found.margin == pytest.approx(alpha, rel=1e-8)
        assert signed_margin(game.H[None], game.block_sizes, found.weights) == pytest.approx(true, rel=1e-8)
        assert found.lipschitz == pytest.approx(beta, rel=1e-8)
        assert found.euler_step_max == pytest.approx(step, rel=1e-8)
        assert found.rk4_step_guideline == pytest.approx(guideline, rel=1e-8)


# --- the margin -------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 6))
def test_block_margin_never_exceeds_the_signed_margin(seed, players):
    rng = np.random.default_rng(seed)
    sizes = tuple(rng.integers(1, 4, players).tolist())
    J = random_jacobians(rng, sizes)
    bounds, w = block_bounds(J, sizes), np.exp(rng.normal(0, 2, players))
    assert margin(bounds.mu, bounds.coupling, w) <= signed_margin(J, sizes, w) + 1e-9
    assert lipschitz(J, sizes, w) <= lipschitz_from_blocks(bounds, w) * (1 + 1e-9)


@given(seeds, st.floats(1e-6, 1e6))
def test_margin_ignores_a_common_factor_of_the_weights(seed, factor):
    rng = np.random.default_rng(seed)
    mu, L = random_bounds(rng, 4)
    w = np.exp(rng.normal(0, 1, 4))
    assert margin(mu, L, factor * w) == pytest.approx(margin(mu, L, w), rel=1e-9, abs=1e-9)


def test_margin_without_coupling_is_the_smallest_curvature():
    mu = np.array([3.0, 1.5, 2.0])
    assert margin(mu, np.zeros((3, 3)), np.array([1.0, 5.0, 0.1])) == pytest.approx(1.5)


@given(seeds)
def test_margin_agrees_with_the_quadratic_form_of_the_paper(seed):
    """C(w) >= 2 alpha D with equality in some direction."""
    rng = np.random.default_rng(seed)
    mu, L = random_bounds(rng, 3)
    w = np.exp(rng.normal(0, 1, 3))
    C = np.diag(2 * w * mu) - (w[:, None] * L + (w[:, None] * L).T)
    rest = C - 2 * margin(mu, L, w) * np.diag(w)
    assert np.linalg.eigvalsh(rest)[0] == pytest.approx(0, abs=1e-9 * np.abs(C).max())


def test_symmetric_potential_game_has_the_modulus_of_strong_convexity():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((6, 6))
    H = A @ A.T + np.eye(6)
    found = SmallGainCertifier(mode="jacobian", weights=np.ones(3)).certify(QuadraticGame(H, (2, 2, 2)))
    assert found.margin == pytest.approx(np.linalg.eigvalsh(H)[0])


def test_rotation_is_certified_by_rosen_and_by_signs_but_not_by_norms():
    game = QuadraticGame(np.array([[1.0, 5.0], [-5.0, 1.0]]), (1, 1))
    blocks = SmallGainCertifier().certify(game)
    assert not blocks.feasible
    assert blocks.euclidean_margin == pytest.approx(1.0)
    assert SmallGainCertifier(mode="jacobian").certify(game).margin == pytest.approx(1.0)


# --- Perron weights ---------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 5))
def test_perron_weights_beat_a_numerical_search(seed, players):
    rng = np.random.default_rng(seed)
    mu, L = random_bounds(rng, players)
    found = optimal_weights(mu, L)
    cost = lambda z: -margin(mu, L, np.exp(np.append(0, z)))
    start = np.log(found.weights[1:] / found.weights[0]) + rng.normal(0, 0.3, players - 1)
    searched = minimize(cost, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    scale = 1 + np.abs(L).max()
    assert found.margin >= -searched.fun - 1e-9 * scale
    assert found.margin == pytest.approx(found.supremum, abs=1e-9 * scale)


@given(seeds)
def test_two_player_optimum_in_closed_form(seed):
    rng = np.random.default_rng(seed)
    mu, L = random_bounds(rng, 2)
    closed = mu.mean() - np.hypot((mu[0] - mu[1]) / 2, np.sqrt(L[0, 1] * L[1, 0]))
    assert optimal_weights(mu, L).margin == pytest.approx(closed, rel=1e-9, abs=1e-9)


def test_balanced_weights_of_two_players():
    w = balanced_weights(np.array([[0.0, 10.0], [0.05, 0.0]]))
    assert w[0] / w[1] == pytest.approx(0.05 / 10)


@given(seeds, st.integers(2, 6))
def test_margin_is_concave_in_log_weights(seed, players):
    rng = np.random.default_rng(seed)
    sizes = (2,) * players
    J = random_jacobians(rng, sizes)
    y, z = rng.normal(0, 2, (2, players))
    middle = (y + z) / 2
    at = lambda z: signed_margin(J, sizes, np.exp(z))
    assert at(middle) >= (at(y) + at(z)) / 2 - 1e-8 * (1 + abs(at(y)) + abs(at(z)))
    log_beta = lambda z: np.log(lipschitz(J, sizes, np.exp(z)))
    assert log_beta(middle) <= (log_beta(y) + log_beta(z)) / 2 + 1e-9


@pytest.mark.parametrize("players", [2, 5, 40])
@pytest.mark.parametrize(("gain", "feasible"), [(0.999, True), (1.001, False)])
def test_certified_exactly_when_the_small_gain_is_below_one(players, gain, feasible):
    rng = np.random.default_rng(players)
    mu, L = random_bounds(rng, players)
    L *= gain / np.abs(np.linalg.eigvals(L / mu[:, None])).max()
    assert small_gain(mu, L) == pytest.approx(gain)
    found = SmallGainCertifier().certify_bounds(GameBounds(mu, L))
    assert found.feasible is feasible
    assert ("0.999" if feasible else "1.001") in f"{found.small_gain:.3f}"


def test_one_way_coupling_approaches_the_worst_own_curvature():
    mu = np.array([1.0, 2.0, 1.5])
    L = np.array([[0, 3.0, 0], [0, 0, 2.0], [0, 0, 0]])
    for slack in (1e-1, 1e-3, 1e-5):
        found = optimal_weights(mu, L, slack=slack)
        assert found.supremum == 1.0
        assert 1 - slack <= found.margin <= 1.0
    assert found.weights[0] < found.weights[1] < found.weights[2]


def test_reducible_coupling_with_a_component_of_several_players():
    mu = np.array([1.0, 2.0, 1.5])
    L = np.array([[0, 3.0, 0], [0.2, 0, 2.0], [0, 0, 0]])
    pair = mu[:2].mean() - np.hypot(0.5, np.sqrt(0.6))
    found = optimal_weights(mu, L)
    assert found.supremum == pytest.approx(pair)
    assert found.margin >= (1 - 1e-3) * pair - 1e-12
    assert found.weights[1] / found.weights[0] == pytest.approx(3.0 / 0.2)


def test_separate_components_need_no_separation():
    found = optimal_weights(np.array([1.0, 2.0, 0.5]), np.zeros((3, 3)))
    np.testing.assert_array_equal(found.weights, np.ones(3))
    assert found.margin == found.supremum == 0.5


def test_a_long_one_way_chain_stays_in_range():
    n = 600
    L = sp.csr_array(sp.diags_array(np.full(n - 1, 0.3), offsets=1))
    found = optimal_weights(np.ones(n), L)
    assert np.isfinite(found.weights).all()
    assert (found.weights > 0).all()
    assert found.margin > 0.7  # equal weights reach 1 - 0.3 cos(pi / (n + 1))


@pytest.mark.parametrize("cycle", [True, False])
def test_sparse_and_dense_perron_agree_and_enclose_the_root(cycle):
    rng = np.random.default_rng(3)
    n = 60
    L = sp.random_array((n, n), density=0.05, rng=rng, format="csr")
    # a bare cycle is periodic: power steps without a shift would never settle
    L = sp.csr_array((np.ones(n), (np.arange(n), (np.arange(n) + 1) % n)), shape=(n, n)) + (0 * L if cycle else L)
    L = sp.csr_array(L - sp.diags_array(L.diagonal()))
    mu = rng.uniform(0.5, 1.5, n)
    sparse, dense = perron_pair(L, mu), perron_pair(L.toarray(), mu)
    exact = np.linalg.eigvals(L.toarray() - np.diag(mu)).real.max()
    for pair in (sparse, dense):
        assert pair.low - 1e-12 <= exact <= pair.high + 1e-12
        assert pair.high - pair.low <= 1e-10
    both = [optimal_weights(mu, L), optimal_weights(mu, L.toarray())]
    np.testing.assert_allclose(both[0].weights, both[1].weights, rtol=1e-7)
    assert both[0].margin == pytest.approx(both[1].margin, abs=1e-10)


# --- bands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coupling", "band"),
    [((3.0, 0.0), (9 / 8, np.inf)), ((0.0, 3.0), (0.0, 8 / 9)), ((0.0, 0.0), (0.0, np.inf)), ((2.0, 2.0), None)],
)
def test_degenerate_bands(coupling, band):
    L = np.array([[0.0, coupling[0]], [coupling[1], 0.0]])
    assert timescale_band(np.array([1.0, 2.0]), L) == (band if band is None else pytest.approx(band))


@given(seeds, st.integers(2, 4))
def test_margin_vanishes_at_the_ends_of_the_band(seed, players):
    rng = np.random.default_rng(seed)
    mu, L = random_bounds(rng, players)
    L *= 0.7 / small_gain(mu, L)
    w = optimal_weights(mu, L).weights
    low, high = timescale_band(mu, L, 0, 1)
    for end in (low, high):
        moved = w.copy()
        moved[1] = w[0] * end
        assert margin(mu, L, moved) == pytest.approx(0, abs=1e-7)


def test_band_at_a_positive_margin_and_mirrored_pair():
    mu, L = np.array([1.0, 1.0]), np.array([[0.0, 10.0], [0.05, 0.0]])
    low, high = timescale_band(mu, L, at_least=0.1)
    for end in (low, high):
        assert margin(mu, L, np.array([1.0, end])) == pytest.approx(0.1)
    assert timescale_band(mu, L, at_least=0.3) is None
    forward, backward = timescale_band(mu, L), timescale_band(mu, L, 1, 0)
    np.testing.assert_allclose(forward, (1 / backward[1], 1 / backward[0]))


def test_band_of_three_players_with_an_open_end():
    mu = np.array([1.0, 1.0, 1.0])
    L = np.array([[0, 0.3, 0.3], [0, 0, 0], [0.3, 0, 0]], dtype=float)  # nothing couples into player 1's own gradient
    low, high = timescale_band(mu, L, 0, 1, weights=np.ones(3))
    assert 0 < low < 1
    assert high == np.inf


# --- signed weights ---------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 4), st.integers(1, 3))
def test_signed_optimum_is_closed_from_above_and_by_search(seed, players, samples):
    rng = np.random.default_rng(seed)
    sizes = tuple(rng.integers(1, 4, players).tolist())
    J = random_jacobians(rng, sizes, samples)
    found = optimal_signed_weights(J, sizes)
    scale = np.linalg.norm(J, axis=(1, 2)).max()
    assert found.margin == pytest.approx(signed_margin(J, sizes, found.weights))
    assert found.upper_bound >= found.margin - 1e-12
    for _ in range(20):
        other = np.exp(rng.normal(0, 2, players))
        assert signed_margin(J, sizes, other) <= found.upper_bound + 1e-9 * scale
    blocks = block_bounds(J, sizes)
    assert found.margin >= optimal_weights(blocks.mu, blocks.coupling).margin - 1e-9 * scale
    assert found.upper_bound - found.margin <= 1e-6 * scale


def test_signed_optimum_of_two_players_against_a_scalar_search(reference):
    for H in reference["lq_H"]:
        J, sizes = H[None], (5, 3)
        cost = lambda z, J=J, sizes=sizes: -signed_margin(J, sizes, np.exp([0.0, z]))
        search = minimize_scalar(cost, bounds=(-12, 12), options={"xatol": 1e-9})
        found = optimal_signed_weights(J, sizes)
        assert found.converged
        assert found.margin == pytest.approx(-search.fun, abs=1e-7)


@pytest.mark.parametrize("objective", ["euler", "rk4"])
@pytest.mark.parametrize("players", [2, 4])
@pytest.mark.parametrize("mode", ["blocks", "jacobian"])
def test_step_objectives_beat_margin_weights_and_a_search(objective, players, mode):
    rng = np.random.default_rng(players)
    sizes = (2,) * players
    J = 0.3 * random_jacobians(rng, sizes, 1) + 3 * np.eye(2 * players)
    game = QuadraticGame(J[0], sizes)
    power = {"euler": 2, "rk4": 1}[objective]
    found = SmallGainCertifier(objective=objective, mode=mode).certify(game)
    plain = SmallGainCertifier(mode=mode).certify(game)
    bounds = block_bounds(J, sizes)

    def value(w):
        if mode == "blocks":
            alpha, beta = margin(bounds.mu, bounds.coupling, w), lipschitz_from_blocks(bounds, w)
        else:
            alpha, beta = signed_margin(J, sizes, w), lipschitz(J, sizes, w)
        return np.log(max(alpha, 1e-300)) - power * np.log(beta)

    assert value(found.weights) >= value(plain.weights)
    search = minimize(
        lambda z: -value(np.exp(np.append(0, z))),
        np.log(plain.weights[1:] / plain.weights[0]),
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-11, "maxiter": 4000},
    )
    assert value(found.weights) >= -search.fun - 1e-3


def test_step_weights_refuse_a_start_without_margin():
    J = np.array([[[1.0, 4.0], [4.0, 1.0]]])
    with pytest.raises(ValueError, match="start"):
        optimal_step_weights(J, J, (1, 1), np.ones(2), power=2)


# --- step sizes -------------------------------------------------------------------------------------------------------


def test_euler_edge_at_exactly_the_limit():
    limit = euler_step_max(2.0, 2.0)
    assert euler_contraction(2.0, 2.0, limit) == pytest.approx(1)
    assert np.abs(affine_step_matrix(2 * np.eye(1), limit)[0, 0]) == pytest.approx(1)
    assert np.abs(affine_step_matrix(2 * np.eye(1), 1.01 * limit)[0, 0]) > 1


@pytest.mark.parametrize(
    ("alpha", "step"), [(0.8, 0.550), (0.5, 0.366), (0.1716, 0.1487), (0.1, 0.0914), (0.01, 0.0099)]
)
def test_rigorous_runge_kutta_steps(alpha, step):
    assert rk4_step_rigorous(alpha, 1.0) == pytest.approx(step, abs=6e-4 if alpha > 0.05 else 6e-5)
    assert rk4_step_rigorous(3 * alpha, 3.0) == pytest.approx(rk4_step_rigorous(alpha, 1.0) / 3)
    best = rk4_step_opt(alpha, 1.0)
    assert rk4_contraction(alpha, 1.0, best) <= rk4_contraction(alpha, 1.0, 0.9 * best)


@given(seeds, st.integers(1, 5), st.floats(0.05, 0.999))
def test_no_affine_game_contracts_less_than_certified(seed, d, share):
    rng = np.random.default_rng(seed)
    H = rng.standard_normal((d, d))
    H += (rng.uniform(0.01, 1) - np.linalg.eigvalsh((H + H.T) / 2)[0]) * np.eye(d)
    alpha, beta = np.linalg.eigvalsh((H + H.T) / 2)[0], np.linalg.norm(H, 2)
    one = np.ones(1)
    step = share * rk4_step_rigorous(alpha, beta)
    assert affine_contraction(H, (d,), one, step, "rk4") <= rk4_contraction(alpha, beta, step) + 1e-12
    step = share * euler_step_max(alpha, beta)
    assert affine_contraction(H, (d,), one, step) <= euler_contraction(alpha, beta, step) + 1e-12
    for method in ("euler", "rk4"):
        assert affine_step_max(H, (d,), one, method) <= stability_threshold(H, method) * (1 + 1e-6)


def test_runge_kutta_guideline_is_no_guarantee():
    """A field of norm 1 and margin 0.05 that one step of 2.5 expands; the rigorous step contracts it."""
    rng = np.random.default_rng(1)
    H, worst = np.eye(3), 0.0
    for _ in range(2000):
        trial = H + 0.1 * rng.standard_normal((3, 3))
        trial += (0.06 * np.linalg.norm(trial, 2) - np.linalg.eigvalsh((trial + trial.T) / 2)[0]) * np.eye(3)
        trial /= np.linalg.norm(trial, 2)
        factor = np.linalg.norm(affine_step_matrix(trial, 2.5, "rk4"), 2)
        if factor > worst:
            H, worst = trial, factor
    alpha = np.linalg.eigvalsh((H + H.T) / 2)[0]
    assert alpha > 0
    assert rk4_guideline(alpha, 1.0) == 2.5
    assert worst > 1.02
    assert affine_contraction(H, (3,), np.ones(1), 0.99 * rk4_step_rigorous(alpha, 1.0), "rk4") < 1


def test_stability_thresholds_of_the_canonical_game():
    H = np.array([[1.0, 10.0], [0.05, 1.0]])
    assert stability_threshold(H) == pytest.approx(2 / 1.70711, rel=1e-5)
    assert stability_threshold(H, "rk4") == pytest.approx(2.785294 / 1.70711, rel=1e-5)


# --- certificates -----------------------------------------------------------------------------------------------------


def cubic_game():
    import torch

    field = lambda z: torch.stack([z[0] + z[0] ** 3 + 2 * z[1], z[1] + z[1] ** 3 + 0.1 * torch.sin(z[0])])
    return DifferentiableGame(field, (1, 1))


def test_rigorous_bounds_hold_between_the_samples():
    """With a Jacobian-Lipschitz constant every point of the box obeys the bounds; without it the flag says so."""
    game, box = cubic_game(), Box(np.zeros(2), 0.5)
    # second derivatives: 6 x on [-0.5, 0.5] in the own blocks, 0.1 at most in the coupling
    blocks = np.array([[3.0, 0.0], [0.1, 3.0]])
    found = SmallGainCertifier(jacobian_lipschitz=blocks, points_per_dimension=5).certify(game, box)
    assert found.rigorous
    fine = np.random.default_rng(0).uniform(-0.5, 0.5, (4000, 2))
    J = game.jacobian(fine)
    assert (J[:, 0, 0] >= found.mu[0]).all()
    assert (np.abs(J[:, 1, 0]) <= found.coupling[1, 0]).all()
    assert lipschitz(J, (1, 1), found.weights) <= found.lipschitz
    assert signed_margin(J, (1, 1), found.weights) >= found.margin
    sampled = SmallGainCertifier(points_per_dimension=5).certify(game, box)
    assert not sampled.rigorous
    assert sampled.margin > found.margin
    whole = SmallGainCertifier(jacobian_lipschitz=3.0, points_per_dimension=40, mode="jacobian").certify(game, box)
    assert whole.rigorous
    assert signed_margin(J, (1, 1), whole.weights) >= whole.margin


def test_vertices_alone_miss_the_smallest_curvature():
    """1 + 3 x^2 is smallest at the centre: which is why the centre is always sampled."""
    assert SmallGainCertifier().certify(cubic_game(), Box(np.zeros(2), 0.5)).mu[0] == pytest.approx(1.0)


def test_jacobian_mode_over_many_samples_matches_all_at_once():
    game, box = cubic_game(), Box(np.zeros(2), 0.6)
    found = SmallGainCertifier(mode="jacobian", points_per_dimension=9, batch_size=7).certify(game, box)
    points, _ = box.samples(9)
    direct = optimal_signed_weights(game.jacobian(points), (1, 1))
    assert found.margin == pytest.approx(direct.margin, abs=1e-6)
    assert found.n_samples == len(points) == 82
    assert found.margin >= SmallGainCertifier(points_per_dimension=9).certify(game, box).margin - 1e-9


def test_matrix_free_bounds_agree_with_explicit_ones():
    import torch

    A = torch.tensor(np.random.default_rng(2).standard_normal((12, 12)), dtype=torch.float64)
    field = lambda z: 3 * z + 0.2 * torch.tanh(A @ z)
    game = DifferentiableGame(field, (5, 2, 5))
    region = Samples(0.1 * np.random.default_rng(3).standard_normal((3, 12)))
    explicit = SmallGainCertifier().certify(game, region)
    free = SmallGainCertifier(matrix_free=True).certify(game, region)
    assert not free.rigorous
    np.testing.assert_allclose(free.mu, explicit.mu, rtol=1e-4)
    np.testing.assert_allclose(free.coupling, explicit.coupling, rtol=1e-4)
    assert free.lipschitz == pytest.approx(explicit.lipschitz, rel=1e-4)
    assert free.euclidean_margin == pytest.approx(explicit.euclidean_margin, rel=1e-4)


def test_safety_makes_every_bound_worse():
    game, box = cubic_game(), Box(np.zeros(2), 0.5)
    plain, safe = SmallGainCertifier().certify(game, box), SmallGainCertifier(safety=1.1).certify(game, box)
    np.testing.assert_allclose(safe.mu, 0.9 * plain.mu)
    np.testing.assert_allclose(safe.coupling, 1.1 * plain.coupling)
    assert safe.margin < plain.margin
    assert safe.lipschitz > plain.lipschitz


def test_radius_accounts_for_a_centre_off_the_equilibrium():
    H = np.array([[1.0, 10.0], [0.05, 1.0]])
    game = QuadraticGame(H, (1, 1), -H @ np.array([0.001, 0.002]))
    box = Box(np.zeros(2), np.array([1.0, 2.0]))
    found = SmallGainCertifier().certify(game, box)
    star = game.equilibrium()
    assert float(found.norm(star)) <= found.equilibrium_distance
    on_sphere = np.random.default_rng(0).standard_normal((500, 2))
    on_sphere *= found.radius / found.norm(on_sphere)[:, None]
    assert found.radius > 0
    assert box.contains(star + on_sphere)
    far = SmallGainCertifier().certify(QuadraticGame(H, (1, 1), np.array([50.0, 50.0])), box)
    assert far.radius == 0.0
    assert SmallGainCertifier().certify(game).radius == np.inf


def test_nonlinear_game_on_the_whole_plane():
    bounds = GameBounds(np.array([0.7, 0.7]), np.array([[0.0, 8.0], [0.05, 0.0]]), np.array([1.3, 1.3]))
    found = SmallGainCertifier().certify_bounds(bounds)
    assert found.margin == pytest.approx(0.06754, abs=1e-5)
    assert found.lipschitz == pytest.approx(1.93246, abs=1e-5)
    assert found.euler_step_max == pytest.approx(0.03617, abs=1e-5)
    assert found.euclidean_margin == pytest.approx(-3.325)
    assert found.rigorous
    assert found.radius == np.inf


@pytest.mark.parametrize(
    ("bounds", "status", "word"),
    [
        (GameBounds(np.array([1.0, -0.5]), np.zeros((2, 2))), CertificateStatus.NO_CURVATURE, "player 1"),
        (GameBounds(np.ones(2), 3 * (1 - np.eye(2))), CertificateStatus.COUPLING_TOO_STRONG, "small gain"),
    ],
)
def test_infeasible_certificates_say_why_and_give_no_steps(bounds, status, word):
    found = SmallGainCertifier().certify_bounds(bounds)
    assert found.status is status
    assert word in found.reason
    assert not found.feasible
    assert found.euler_step_max == found.rk4_step_rigorous == found.rk4_step_guideline == 0
    assert found.contraction(0.1) == np.inf


def test_unsuitable_weights_are_told_from_an_uncertifiable_game():
    game = QuadraticGame(np.array([[1.0, 10.0], [0.05, 1.0]]), (1, 1))
    found = SmallGainCertifier(weights=np.ones(2)).certify(game)
    assert found.status is CertificateStatus.UNSUITABLE_WEIGHTS
    assert found.supremum == pytest.approx(1 - np.sqrt(0.5))


def test_unknown_lipschitz_constant_gives_a_margin_but_no_step():
    found = SmallGainCertifier().certify_bounds(GameBounds(np.ones(2), 0.1 * np.ones((2, 2))))
    assert found.feasible
    assert found.lipschitz == np.inf
    assert found.euler_step_max == 0
    assert found.flow_contraction(2.0) == pytest.approx(np.exp(-2 * found.margin))


@pytest.mark.parametrize("sparse", [False, True])
def test_json_round_trip_and_metric(sparse):
    coupling = np.array([[0.0, 0.2, 0.0], [0.1, 0.0, 0.3], [0.0, 0.4, 0.0]])
    bounds = GameBounds(np.ones(3), sp.csr_array(coupling) if sparse else coupling, np.ones(3))
    found = SmallGainCertifier().certify_bounds(bounds, block_sizes=(1, 2, 1))
    json.loads(found.to_json(), parse_constant=pytest.fail)  # strict: no NaN, no Infinity
    again = SGNCertificate.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert again.euler_step_max == found.euler_step_max
    assert again.timescale_band(0, 1) == found.timescale_band(0, 1)
    v = np.array([1.0, 2.0, 3.0, 4.0])
    assert v @ (found.metric() @ v) == pytest.approx(float(found.norm(v)) ** 2)


def test_bounds_combine_as_workers_reduce_them():
    rng = np.random.default_rng(0)
    J = random_jacobians(rng, (2, 3), 6)
    whole, first, second = (block_bounds(part, (2, 3)) for part in (J, J[:2], J[2:]))
    both = first.combine(second)
    np.testing.assert_allclose(both.mu, whole.mu)
    np.testing.assert_allclose(both.coupling, whole.coupling)
    np.testing.assert_allclose(both.own_lipschitz, whole.own_lipschitz)


# --- regions ----------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_covering_radius_covers(seed, d, points, cells):
    rng = np.random.default_rng(seed)
    for region in (Box(rng.normal(0, 1, d), rng.uniform(0.1, 2, d)), Ball(rng.normal(0, 1, d), rng.uniform(0.1, 2))):
        samples, covering = region.samples(points, cells=cells)
        assert region.contains(samples)
        inside = region.project(region.centre + rng.uniform(-3, 3, (200, d)))
        distances = np.linalg.norm(inside[:, None] - samples, axis=2).min(axis=1)
        assert distances.max() <= covering * (1 + 1e-9)


def test_above_ten_dimensions_sobol_points():
    points, covering = Box(np.zeros(12), 0.5).samples(2, 100, seed=1)
    assert points.shape == (101, 12)
    assert covering == pytest.approx(0.5 * np.sqrt(12))
    np.testing.assert_array_equal(points, Box(np.zeros(12), 0.5).samples(2, 100, seed=1)[0])


def test_weighted_projection_onto_a_ball_is_the_nearest_point_in_that_norm():
    rng = np.random.default_rng(0)
    ball, w = Ball(np.array([1.0, 0.0, 0.0]), 1.0), np.array([1.0, 50.0])
    project = ball.projection((2, 1), w)
    scale = np.array([1.0, 1.0, 50.0])
    x = 3 * rng.standard_normal((20, 3))
    nearest = project(x)
    assert ball.contains(nearest)
    others = ball.project(3 * rng.standard_normal((2000, 3)))
    for point, found in zip(x, nearest, strict=True):
        least = (scale * (others - point) ** 2).sum(axis=1).min()
        assert (scale * (found - point) ** 2).sum() <= least + 1e-9


@given(seeds)
def test_simplex_projection_is_feasible_and_nearest(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2, (5, 7))
    found = project_simplices([3, 4])(x)
    np.testing.assert_allclose(found[:, :3].sum(axis=1), 1)
    assert (found >= 0).all()
    corners = np.concatenate([rng.dirichlet(np.ones(3), 5), rng.dirichlet(np.ones(4), 5)], axis=1)
    # variational inequality of a projection: <x - P x, z - P x> <= 0
    assert (((x - found) * (corners - found)).sum(axis=1) <= 1e-9).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals_name_the_argument(without_shape_checks):
    mu, L = np.ones(2), np.zeros((2, 2))
    with pytest.raises(ValueError, match="coupling must have shape"):
        optimal_weights(mu, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="coupling must be non-negative"):
        optimal_weights(mu, -np.ones((2, 2)))
    with pytest.raises(ValueError, match="mu holds NaN"):
        optimal_weights(np.array([1.0, np.nan]), L)
    with pytest.raises(ValueError, match="weights must be positive"):
        margin(mu, L, np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="H must be a square"):
        QuadraticGame(np.zeros((2, 3)), (1, 1))
    with pytest.raises(ValueError, match="block_sizes must sum to 2"):
        QuadraticGame(np.eye(2), (1, 2))
    with pytest.raises(ValueError, match="i and j must differ"):
        timescale_band(mu, L, 1, 1)
    with pytest.raises(ValueError, match="own_lipschitz"):
        GameBounds(mu, L, np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="alpha must be finite and at most beta"):
        euler_step_max(2.0, 1.0)


def test_certifier_refusals():
    game = cubic_game()
    with pytest.raises(ValueError, match="region must be given"):
        SmallGainCertifier().certify(game)
    with pytest.raises(ValueError, match="region must have the game's dimension"):
        SmallGainCertifier().certify(game, Box(np.zeros(3), 1.0))
    with pytest.raises(ValueError, match="objective must be one of"):
        SmallGainCertifier(objective="speed")
    with pytest.raises(ValueError, match="safety"):
        SmallGainCertifier(safety=0.5)
    with pytest.raises(ValueError, match="matrix_free"):
        SmallGainCertifier(mode="jacobian", matrix_free=True)
    with pytest.raises(ValueError, match="own_lipschitz"):
        SmallGainCertifier(objective="euler").certify_bounds(GameBounds(np.ones(2), np.zeros((2, 2))))
    with pytest.raises(ValueError, match="half_width must be positive"):
        Box(np.zeros(2), 0.0)
    with pytest.raises(ValueError, match="jacobian"):
        SmallGainCertifier(mode="jacobian").certify_bounds(GameBounds(np.ones(2), np.zeros((2, 2))))


def test_nan_in_a_jacobian_is_refused():
    import torch

    game = DifferentiableGame(lambda z: torch.sqrt(z) + 0 * z, (1, 1))
    with pytest.raises(ValueError, match="jacobians holds NaN"):
        SmallGainCertifier().certify(game, Samples(-np.ones((1, 2))))
