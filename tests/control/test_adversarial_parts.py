"""The pieces against golden vectors, theorems and libraries: simplex solvers, covariances, estimates, bonuses."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from scipy.special import softmax

from locally.control.adversarial import (
    Parameters,
    covariance,
    dilated_bonus,
    entropy_stability,
    exponential_weights,
    kernels,
    local_bonus,
    log_barrier_simplex,
    log_barrier_stability,
    magnitude_reduced_q,
    matrix_geometric_resampling,
    ridge_inverse,
    sampled_covariances,
    samples_for_resampling,
    samples_for_ridge_inverse,
    standard_q,
)
from locally.control.dynamic_programming import evaluate_policy, occupancy_measures
from locally.control.environments import random_episodic_linear_mdp

COSTS = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 7)), elements=st.floats(-1e6, 1e6))


@pytest.fixture(scope="module")
def small(request):
    path = request.config.rootpath / "tests/golden/19-adversarial-linear-mdp/small_linear_mdp.json"
    vectors = {name: np.array(value) for name, value in json.loads(path.read_text()).items()}
    P = np.einsum("hsad,hdt->hsat", vectors["phi"], vectors["mu"])
    vectors["P"] = P / P.sum(axis=-1, keepdims=True)
    policy = log_barrier_simplex(vectors["cum_cost"], float(vectors["eta"]))
    vectors["occupancy"] = occupancy_measures(vectors["P"], policy, np.eye(3)[0])
    vectors["inverse"] = ridge_inverse(covariance(vectors["phi"], vectors["occupancy"]), float(vectors["gamma"]))
    return vectors


@pytest.fixture(scope="module")
def process():
    """A random linear process, one of its policies and what follows from them, without a ridge worth the name."""
    mdp = random_episodic_linear_mdp(rng=5)
    policy = np.random.default_rng(6).dirichlet(np.ones(6), (3, 4))
    occupancy = occupancy_measures(mdp.P, policy, mdp.start)
    return mdp, policy, occupancy


# The simplex


@given(COSTS, st.floats(1e-3, 1e3))
def test_log_barrier_weights_satisfy_the_optimality_condition(cost, eta):
    p = log_barrier_simplex(cost, eta)
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-12)
    multiplier = eta * cost - 1 / p
    scale = 1 + np.abs(1 / p).max(axis=-1)
    assert (np.ptp(multiplier, axis=-1) <= 1e-9 * scale).all()


@given(COSTS, st.floats(-1e3, 1e3))
def test_a_constant_added_to_all_costs_changes_nothing(cost, shift):
    np.testing.assert_allclose(log_barrier_simplex(cost + shift), log_barrier_simplex(cost), rtol=1e-6)


def test_log_barrier_agrees_with_a_general_solver():
    rng = np.random.default_rng(0)
    for _ in range(5):
        cost = rng.normal(size=5) * 4
        found = minimize(
            lambda p, c=cost: c @ p - np.log(p).sum(),
            np.full(5, 0.2),
            jac=lambda p, c=cost: c - 1 / p,
            bounds=[(1e-6, 1)] * 5,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(log_barrier_simplex(cost), found.x, atol=1e-6)


def test_extremes_stay_on_the_simplex():
    np.testing.assert_array_equal(log_barrier_simplex(np.array([[7.0]])), [[1.0]])
    np.testing.assert_allclose(log_barrier_simplex(np.full(4, -3.0)), 0.25)
    far = log_barrier_simplex(np.array([0.0, 1e12, -1e12]))
    assert (far > 0).all()
    assert far.sum() == pytest.approx(1, abs=1e-12)
    assert far[2] > 1 - 1e-11
    np.testing.assert_array_equal(exponential_weights(np.array([0.0, 1e12])), [1, 0])


@given(COSTS)
def test_exponential_weights_are_a_softmax(cost):
    np.testing.assert_allclose(exponential_weights(cost, 0.01), softmax(-0.01 * cost, axis=-1), atol=1e-12)


def test_stability_of_the_log_barrier_needs_no_bound_on_the_costs():
    rng = np.random.default_rng(1)
    p = 10 ** rng.uniform(-6, 0, (5000, 5))  # into the corners, where it matters
    p /= p.sum(axis=1, keepdims=True)
    cost = rng.uniform(-1, 1, p.shape) * 10 ** rng.uniform(-2, 3, (5000, 1))
    eta = 10 ** rng.uniform(-3, 1, 5000)
    variance = eta * (p * cost**2).sum(axis=1)
    ours = log_barrier_stability(p, cost, eta)
    assert (ours >= -1e-9 * np.abs(cost).max(axis=1)).all()
    assert (ours <= variance).all()
    assert (entropy_stability(p, cost, eta) / variance).max() > 10


def test_stability_is_the_maximum_that_it_says():
    rng = np.random.default_rng(2)
    p, cost, eta = rng.dirichlet(np.ones(4)), rng.normal(size=4) * 5, 0.7
    others = rng.dirichlet(np.ones(4), 4000)
    ratio = others / p
    barrier = ((p - others) * cost).sum(axis=1) - (ratio - 1 - np.log(ratio)).sum(axis=1) / eta
    entropy = ((p - others) * cost).sum(axis=1) - (others * np.log(ratio)).sum(axis=1) / eta
    for found, tried in ((log_barrier_stability(p, cost, eta), barrier), (entropy_stability(p, cost, eta), entropy)):
        assert tried.max() <= found
        assert found == pytest.approx(tried.max(), abs=0.3)


# Golden vectors


def test_every_golden_vector(small):
    eta, gamma, beta = (float(small[name]) for name in ("eta", "gamma", "beta"))
    policy = log_barrier_simplex(small["cum_cost"], eta)
    np.testing.assert_allclose(policy, small["pi_logbarrier"], rtol=1e-9)
    np.testing.assert_allclose(small["occupancy"].sum(axis=-1), small["state_occupancy"], rtol=1e-9)
    np.testing.assert_allclose(covariance(small["phi"], small["occupancy"]), small["Sigma"], rtol=1e-9)
    losses = np.einsum("hsad,hd->hsa", small["phi"], small["theta_loss"])
    V, Q = evaluate_policy(small["P"], losses, policy)
    np.testing.assert_allclose(Q, small["Q"], rtol=1e-9)
    assert V[0, 0] == pytest.approx(float(small["V1"]), rel=1e-9)
    local = local_bonus(small["phi"], small["inverse"], policy, beta)
    np.testing.assert_allclose(local, small["bonus_b"], rtol=1e-8)
    np.testing.assert_allclose(dilated_bonus(small["P"], policy, local), small["dilated_B"], rtol=1e-8)

    s, a = small["trajectory"][:, :2].astype(int).T
    to_go = small["trajectory"][::-1, 2].cumsum()[::-1].copy()
    visited = small["phi"][np.arange(3), s, a]
    arguments = (small["phi"], small["inverse"], visited, to_go)
    np.testing.assert_allclose(standard_q(*arguments), small["Qhat_standard"], rtol=1e-8, atol=1e-9)
    reduced = magnitude_reduced_q(*arguments, small["occupancy"], 3.0)
    np.testing.assert_allclose(reduced, small["Qhat_magnitude_reduced"], rtol=1e-8, atol=1e-9)
    assert gamma == 0.01


def test_both_estimates_have_the_mean_of_the_ridge_regression(small):
    """E Q^ = phi S+ Sigma theta: summed over all pairs that an episode can visit, each with its own mean loss."""
    phi, inverse, occupancy = (small[name] for name in ("phi", "inverse", "occupancy"))
    means = {"standard": np.zeros((3, 3, 4)), "reduced": np.zeros((3, 3, 4))}
    for s in range(3):
        for a in range(4):
            visited, weight = phi[:, s, a], occupancy[:, s, a, None, None]
            to_go = small["Q"][:, s, a]
            means["standard"] += weight * standard_q(phi, inverse, visited, to_go)
            means["reduced"] += weight * magnitude_reduced_q(phi, inverse, visited, to_go, occupancy, 3.0)
    np.testing.assert_allclose(means["standard"], small["E_Qhat"], rtol=1e-8)
    np.testing.assert_allclose(means["reduced"], means["standard"], atol=1e-12)


# Estimates and bonuses


def test_the_shifted_estimate_has_its_lower_bound_and_the_standard_one_has_not(process):
    mdp, _, occupancy = process
    for gamma in (1e-1, 1e-3):
        inverse = ridge_inverse(covariance(mdp.features, occupancy), gamma)
        norms = local_bonus(mdp.features, inverse, np.eye(6)[np.zeros((3, 4), int)], 1.0)
        norms = norms - norms[..., :1] / 2  # policy takes action 0: b = |phi|^2 + |phi(., 0)|^2
        smallest = np.inf
        for s, a in np.ndindex(4, 6):
            for loss in (0.0, 1.7, 3.0):
                arguments = (mdp.features, inverse, mdp.features[:, s, a], np.full(3, loss))
                q = magnitude_reduced_q(*arguments, occupancy, 3.0)
                assert (q >= -3 * np.sqrt(norms) - 1e-9).all()
                assert (q >= -3 / np.sqrt(gamma)).all()
                smallest = min(smallest, standard_q(*arguments).min())
    assert smallest < -3 / np.sqrt(gamma)


def test_second_moments_of_the_shifted_estimate_stay_of_the_order_of_the_norm(process):
    """|Q^| <= H |y| + H E|y|, and E y^2 <= |phi|^2 in the norm of S+: so E Q^2 <= 4 H^2 |phi|^2."""
    mdp, _, occupancy = process
    inverse = ridge_inverse(covariance(mdp.features, occupancy), 1e-2)
    second = np.zeros((3, 4, 6))
    for s, a in np.ndindex(4, 6):
        q = magnitude_reduced_q(mdp.features, inverse, mdp.features[:, s, a], np.full(3, 2.0), occupancy, 3.0)
        second += occupancy[:, s, a, None, None] * q**2
    phi = mdp.features.reshape(3, 24, 5)
    norms = kernels.quadratic_forms(phi, inverse).reshape(3, 4, 6)
    assert (second <= 4 * 9 * norms).all()


def test_one_hot_features_make_no_negative_products():
    phi = np.eye(4).reshape(1, 1, 4, 4)
    p = np.array([[[0.1, 0.2, 0.3, 0.4]]])
    inverse = ridge_inverse(covariance(phi, p), 1e-12)
    arguments = (phi, inverse, phi[:, 0, 2], np.array([0.6]))
    np.testing.assert_allclose(standard_q(*arguments), [[[0, 0, 0.6 / 0.3, 0]]], atol=1e-9)
    np.testing.assert_allclose(magnitude_reduced_q(*arguments, p, 1.0), standard_q(*arguments), atol=1e-9)


def test_the_undilated_bonus_is_the_value_of_the_bonus(process):
    mdp, policy, _ = process
    bonus = np.random.default_rng(3).random((3, 4, 6))
    _, Q = evaluate_policy(mdp.P, bonus, policy)
    np.testing.assert_allclose(dilated_bonus(mdp.P, policy, bonus, factor=1.0), Q, rtol=1e-12)
    assert (dilated_bonus(mdp.P, policy, bonus)[:-1] > Q[:-1]).all()
    np.testing.assert_array_equal(dilated_bonus(mdp.P[:1], policy[:1], bonus[:1]), bonus[:1])
    assert dilated_bonus(mdp.P, policy, np.ones((3, 4, 6))).max() <= 3 * np.e


def test_sampled_paths_have_the_dilated_bonus_as_their_mean(process):
    mdp, policy, _ = process
    bonus = np.random.default_rng(3).random((3, 4, 6))
    n = 20_000
    u = np.random.default_rng(4).random((n, 3, 4, 6, 2))
    many = [np.broadcast_to(x, (n, *x.shape)) for x in (mdp.P, policy, bonus)]
    paths = kernels.sampled_dilation(*(np.ascontiguousarray(x) for x in many), 4 / 3, u)
    error = paths.mean(axis=0) - dilated_bonus(mdp.P, policy, bonus)
    assert np.abs(error).max() < 5 * paths.std(axis=0).max() / np.sqrt(n)


# Covariances


def test_inverse_is_an_inverse(process):
    mdp, _, occupancy = process
    sigma = covariance(mdp.features, occupancy)
    for gamma in (1e-4, 1.0):
        inverse = ridge_inverse(sigma, gamma)
        np.testing.assert_allclose(
            inverse @ (sigma + gamma * np.eye(5)), np.broadcast_to(np.eye(5), (3, 5, 5)), atol=1e-9
        )
        np.testing.assert_array_equal(inverse, inverse.swapaxes(-1, -2))
        assert np.linalg.eigvalsh(inverse).max() <= 1 / gamma * (1 + 1e-9)


def test_expected_norm_is_the_effective_dimension(process):
    mdp, _, occupancy = process
    sigma = covariance(mdp.features, occupancy)
    for gamma in (1e-6, 0.05):
        inverse = ridge_inverse(sigma, gamma)
        norms = kernels.quadratic_forms(mdp.features.reshape(3, 24, 5), inverse)
        expected = (occupancy.reshape(3, 24) * norms).sum(axis=1)
        np.testing.assert_allclose(expected, np.trace(sigma @ inverse, axis1=1, axis2=2), rtol=1e-9)
        assert (expected <= 5 + 1e-9).all()


def test_enough_samples_bound_the_covariance_on_both_sides(process):
    mdp, _, occupancy = process
    gamma, failure = 0.05, 0.05
    n = samples_for_ridge_inverse(gamma, 5, failure)
    G = covariance(mdp.features[1], occupancy[1]) + gamma * np.eye(5)
    root = np.linalg.cholesky(np.linalg.inv(G)).T
    rng = np.random.default_rng(7)
    outside = 0
    for _ in range(300):
        sample = sampled_covariances(mdp.features[1], occupancy[1], n, rng) + gamma * np.eye(5)
        eigenvalues = np.linalg.eigvalsh(root @ sample @ root.T)
        outside += not 0.5 <= eigenvalues[0] <= eigenvalues[-1] <= 1.5
    assert outside < failure * 300


def test_resampling_has_the_expectation_of_its_truncated_series(process):
    mdp, _, occupancy = process
    gamma, N, step = 0.2, 30, 0.5
    sigma = covariance(mdp.features[0], occupancy[0])
    G = sigma + gamma * np.eye(5)
    expected = np.linalg.inv(G) @ (np.eye(5) - np.linalg.matrix_power(np.eye(5) - step * G, N + 1))
    rng = np.random.default_rng(8)
    phi = mdp.features[0].reshape(24, 5)
    drawn = phi[rng.choice(24, (4000, N), p=occupancy[0].ravel())]
    np.testing.assert_allclose(matrix_geometric_resampling(drawn, gamma), expected, atol=0.06)
    M, needed = samples_for_resampling(gamma)
    assert M * needed > 10 * samples_for_ridge_inverse(gamma, 5)


def test_resampling_multiplies_the_matrices_that_it_says():
    rng = np.random.default_rng(9)
    phi = rng.normal(size=(1, 3, 2)) / 4
    factors = [np.eye(2) - 0.5 * (0.1 * np.eye(2) + np.outer(x, x)) for x in phi[0]]
    Y = [np.eye(2), factors[0], factors[0] @ factors[1], factors[0] @ factors[1] @ factors[2]]
    np.testing.assert_allclose(matrix_geometric_resampling(phi, 0.1), 0.5 * sum(Y), rtol=1e-12)


# Parameters and refusals


def test_parameters_meet_the_conditions_of_the_theorems():
    for K in (500, 10**6):
        for method in ("log_barrier", "magnitude_reduced"):
            p = Parameters.of(method, n_actions=6, dim=5, horizon=3, n_episodes=K)
            assert p.beta >= 4 * p.eta * 9 * (1 - 1e-12)
            assert p.gamma >= 12 * p.eta * p.beta * 9 * (1 - 1e-12)
        small, large = (Parameters.of("dilated_hedge", n_actions=6, dim=5, horizon=3, n_episodes=n) for n in (K, 8 * K))
        assert small.eta / large.eta == pytest.approx(4)
        assert small.gamma / large.gamma == pytest.approx(2)


NAMED = [
    ("cost", lambda: log_barrier_simplex(np.array([0.0, np.nan]))),
    ("cost", lambda: log_barrier_simplex(np.zeros((2, 0)))),
    ("eta", lambda: log_barrier_simplex(np.zeros(2), 0.0)),
    ("eta", lambda: exponential_weights(np.zeros((2, 2)), np.array([1.0, -1.0]))),
    ("p ", lambda: log_barrier_stability(np.array([1.0, 0.0]), np.zeros(2), 1.0)),
    ("p ", lambda: entropy_stability(np.array([0.7, 0.7]), np.zeros(2), 1.0)),
    ("features", lambda: covariance(2 * np.eye(2)[None], np.full((1, 2), 0.5))),
    ("weights", lambda: covariance(np.eye(2)[None], np.array([[-0.1, 1.1]]))),
    ("gamma", lambda: ridge_inverse(np.eye(2), 0.0)),
    ("covariances", lambda: ridge_inverse(np.array([[1.0, 2.0], [0.0, 1.0]]), 1.0)),
    ("step", lambda: matrix_geometric_resampling(np.ones((1, 2, 1)), 0.5, step=0.8)),
    ("samples", lambda: matrix_geometric_resampling(2 * np.ones((1, 2, 1)), 0.5)),
    ("failure", lambda: samples_for_ridge_inverse(0.1, 2, 1.5)),
    ("gamma", lambda: samples_for_resampling(2.0)),
    ("policy", lambda: local_bonus(np.eye(2)[None], np.eye(2), np.array([[0.5, 0.6]]), 1.0)),
    ("beta", lambda: local_bonus(np.eye(2)[None], np.eye(2), np.array([[0.5, 0.5]]), -1.0)),
    ("factor", lambda: dilated_bonus(np.ones((1, 1, 1, 1)), np.ones((1, 1, 1)), np.ones((1, 1, 1)), factor=0.0)),
    (
        "bound",
        lambda: magnitude_reduced_q(np.eye(2)[None], np.eye(2), np.zeros(2), np.array(2.0), np.full((1, 2), 0.5), 1.0),
    ),
    ("method", lambda: Parameters.of("sarsa", n_actions=2, dim=2, horizon=1, n_episodes=1)),
    ("n_episodes", lambda: Parameters.of("log_barrier", n_actions=2, dim=2, horizon=1, n_episodes=0)),
    ("eta_scale", lambda: Parameters.of("log_barrier", n_actions=2, dim=2, horizon=1, n_episodes=9, eta_scale=0)),
    ("gamma", lambda: Parameters.of("log_barrier", n_actions=2, dim=2, horizon=1, n_episodes=9, gamma=-1.0)),
]


@pytest.mark.parametrize(("name", "call"), NAMED)
def test_bad_input_is_named(name, call, without_shape_checks):
    with pytest.raises(ValueError, match=name):
        call()
