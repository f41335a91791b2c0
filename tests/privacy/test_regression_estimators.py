"""The scikit-learn fronts: conventions, equivalence with scikit-learn where theory gives it, simulation laws."""

import math
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import Lasso, LinearRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from locally.privacy.regression import (
    ElementarySparseRegression,
    GradientProtocol,
    IndefiniteCovariance,
    LDPIterativeHardThresholding,
    MomentProtocol,
    MomentServer,
    NLDPSparseRegression,
    NotPrivateWarning,
    OutOfBounds,
    Population,
    PublicFeatureProtocol,
    Status,
    ThresholdingServer,
    simulate_gradient_aggregate,
    simulate_moment_aggregate,
    soft_threshold,
)

NOT_PRIVATE = pytest.mark.filterwarnings("ignore::locally.privacy.regression.NotPrivateWarning")


@NOT_PRIVATE
@pytest.mark.filterwarnings("ignore::locally.privacy.regression.IndefiniteCovariance")
@parametrize_with_checks(
    [
        NLDPSparseRegression(epsilon=1.0, random_state=0),
        LDPIterativeHardThresholding(epsilon=1.0, random_state=0),
        ElementarySparseRegression(),
    ]
)
def test_scikit_learn_conventions(estimator, check, without_shape_checks):  # the checks pass wrong types on purpose
    check(estimator)


def population(d=4, k=1):
    return Population(np.eye(d), np.where(np.arange(d) < k, 1 / math.sqrt(k), 0.0), 0.3)


@NOT_PRIVATE
def test_the_same_seed_gives_the_same_coefficients_and_another_does_not():
    X, y = population().sample(2_000, np.random.default_rng(0))
    public_X = X[:100]
    model = NLDPSparseRegression(epsilon=2.0, public_X=public_X, threshold=0.0)
    first, second, third = (clone(model).set_params(random_state=s).fit(X, y).coef_ for s in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert (first != third).all()


def test_noise_is_cryptographic_unless_a_seed_is_given_and_a_seed_warns():
    X, y = population().sample(200, np.random.default_rng(0))
    model = NLDPSparseRegression(epsilon=2.0, public_X=X[:50], threshold=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (clone(model).fit(X, y).coef_ for _ in range(2))
    assert (first != second).all()
    with pytest.warns(NotPrivateWarning, match="never for reports"):
        model.set_params(random_state=0).fit(X, y)


@NOT_PRIVATE
def test_fit_reports_what_was_clipped_and_spent():
    X, y = population().sample(1_000, np.random.default_rng(0))
    X[:7, 0] = 100.0
    model = NLDPSparseRegression(epsilon=2.0, clip_x=50.0, clip_y=50.0, radius=60.0, public_X=None, random_state=0)
    with pytest.warns(IndefiniteCovariance):
        model.fit(X, y)
    assert model.n_clipped_ == 7
    assert model.n_users_ == 1_000
    assert (model.budget_.epsilon, model.budget_.delta, model.budget_.releases) == (2.0, 1e-6, 2)
    assert model.status_ is Status.INDEFINITE
    with pytest.raises(OutOfBounds, match="7 of"):
        model.set_params(beyond="refuse").fit(X, y)


@NOT_PRIVATE
def test_all_calibrations_learn_and_joint_noise_is_the_smallest_gaussian():
    X, y = population().sample(60_000, np.random.default_rng(1))
    options = {"epsilon": 2.0, "radius": 3.0, "clip_x": 2.0, "clip_y": 2.0, "random_state": 0, "on_indefinite": "clip"}
    noise = {}
    for calibration, delta in (("joint", 1e-6), ("analytic", 1e-6), ("classical", 1e-6), ("pure", None)):
        model = NLDPSparseRegression(calibration=calibration, delta=delta, **options).fit(X, y)
        noise[calibration] = model.fit_result_.noise
        assert model.budget_.delta == (delta or 0.0)
    assert noise["joint"] < noise["analytic"] < noise["classical"]
    assert noise["pure"] < noise["classical"]


@NOT_PRIVATE
def test_interactive_estimator_uses_disjoint_groups_and_continues_a_warm_start():
    X, y = population().sample(20_000, np.random.default_rng(0))
    options = {"epsilon": 8.0, "sparsity": 1, "n_rounds": 7, "clip_x": 2.0, "clip_y": 2.0, "random_state": 0}
    model = LDPIterativeHardThresholding(**options).fit(X, y)
    assert model.n_users_ == 7 * (20_000 // 7)
    assert model.path_.shape == (7, 4)
    assert model.support_.tolist() == [0]
    assert model.score(X, y) > 0.6
    warm = LDPIterativeHardThresholding(**options | {"warm_start": True, "n_rounds": 1, "step": 1e-9})
    warm.coef_ = np.array([0.0, 0.5, 0.0, 0.0])
    np.testing.assert_allclose(warm.fit(X, y).coef_, [0.0, 0.5, 0.0, 0.0], atol=1e-6)


@NOT_PRIVATE
def test_partial_fit_is_one_round_of_new_users():
    X, y = population().sample(9_000, np.random.default_rng(0))
    options = {"epsilon": 8.0, "sparsity": 1, "n_rounds": 3, "clip_x": 2.0, "clip_y": 2.0, "random_state": 0}
    whole = LDPIterativeHardThresholding(**options).fit(X, y)
    rounds = LDPIterativeHardThresholding(**options)
    for t in range(3):
        rounds.partial_fit(X[3_000 * t : 3_000 * (t + 1)], y[3_000 * t : 3_000 * (t + 1)])
        assert rounds.path_.shape == (t + 1, 4)
    np.testing.assert_array_equal(rounds.coef_, whole.coef_)
    with pytest.raises(RuntimeError, match="all 3 rounds are over"):
        rounds.partial_fit(X, y)


@pytest.mark.parametrize(
    ("estimator", "named"),
    [
        (NLDPSparseRegression(epsilon=-1.0), "epsilon"),
        (NLDPSparseRegression(epsilon=math.nan), "epsilon"),
        (NLDPSparseRegression(delta=1.0), "delta"),
        (NLDPSparseRegression(delta=0.0), "delta"),
        (NLDPSparseRegression(radius="big"), "radius"),
        (NLDPSparseRegression(calibration="best"), "best"),
        (NLDPSparseRegression(public_X=np.ones((9, 2))), "public_X"),
        (LDPIterativeHardThresholding(epsilon=0.0), "epsilon"),
        (LDPIterativeHardThresholding(sparsity=9), "sparsity"),
        (LDPIterativeHardThresholding(step=-1.0), "step"),
        (LDPIterativeHardThresholding(n_rounds=51), "for each of 51 rounds"),
        (ElementarySparseRegression(threshold="best"), "threshold"),
        (ElementarySparseRegression(threshold=-1.0), "threshold"),
    ],
)
def test_impossible_parameters_are_named(estimator, named, without_shape_checks):
    X, y = population().sample(50, np.random.default_rng(0))
    with pytest.raises(ValueError, match=named):
        estimator.fit(X, y)


def test_fewer_users_than_unknowns_are_refused():
    X, y = population().sample(3, np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least as many rows"):
        NLDPSparseRegression().fit(X, y)


def test_closed_form_is_the_lasso_where_features_are_orthonormal():
    rng = np.random.default_rng(0)
    n, d = 200, 8
    X = np.linalg.qr(rng.standard_normal((n, d)))[0] * math.sqrt(n)
    y = X @ rng.standard_normal(d) + rng.standard_normal(n)
    ours = ElementarySparseRegression(threshold=0.4).fit(X, y).coef_
    theirs = Lasso(alpha=0.4, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(X, y).coef_
    np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_closed_form_without_threshold_is_least_squares():
    X, y = population(d=6).sample(100, np.random.default_rng(0))
    ours = ElementarySparseRegression(threshold=0.0).fit(X, y).coef_
    np.testing.assert_allclose(ours, LinearRegression(fit_intercept=False).fit(X, y).coef_, rtol=1e-8)
    np.testing.assert_allclose(
        ElementarySparseRegression(threshold=0.1).fit(X, y).coef_, soft_threshold(ours, 0.1), rtol=1e-8
    )


def test_closed_form_finds_the_support_with_fewer_rows_than_columns():
    rng = np.random.default_rng(0)
    theta = np.zeros(200)
    theta[[3, 50]] = 3.0, -3.0
    X = rng.standard_normal((120, 200))
    model = ElementarySparseRegression(threshold=1.5).fit(X, X @ theta + 0.1 * rng.standard_normal(120))
    assert set(model.support_) == {3, 50}


# Simulation of averages


def test_mean_gradients_have_the_law_of_individual_ones():
    rng = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.5, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 0.5]])
    people = Population(covariance, np.array([0.5, -0.5, 0.0]), 0.7)
    theta, n, draws = np.array([0.2, 0.0, 0.6]), 12, 20_000
    quick = np.array([people.sample_mean_gradient(theta, n, rng) for _ in range(draws)])
    X, y = people.sample(n * draws, rng)
    slow = (X * (X @ theta - y)[:, None]).reshape(draws, n, 3).mean(1)
    spread = slow.std(0)
    assert np.abs(quick.mean(0) - slow.mean(0)).max() < 6 * spread.max() / math.sqrt(draws)
    np.testing.assert_allclose(np.cov(quick.T), np.cov(slow.T), atol=0.05 * spread.max() ** 2)


@NOT_PRIVATE
def test_simulated_averages_err_like_individual_reports():
    people, n, rng = population(), 20_000, np.random.default_rng(0)
    public_X = 2.0 * np.eye(4)
    wide = PublicFeatureProtocol(n_features=4, epsilon=2.0, clip_x=6.0, clip_y=6.0)
    quick, slow = [], []
    for seed in range(40):
        found = simulate_moment_aggregate(MomentServer(wide, public_X, threshold=0.0), people, n, rng)
        quick.append(found.coef - people.theta)
        X, y = people.sample(n, rng)
        model = NLDPSparseRegression(
            epsilon=2.0, clip_x=6.0, clip_y=6.0, public_X=public_X, threshold=0.0, random_state=seed
        )
        slow.append(model.fit(X, y).coef_ - people.theta)
    assert np.std(quick) == pytest.approx(np.std(slow), rel=0.25)


def test_simulated_rounds_reach_the_right_answer_with_many_users():
    people = population(d=8, k=2)
    protocol = GradientProtocol.for_users(10**12, 8, 1.0, 2)
    found = simulate_gradient_aggregate(ThresholdingServer(protocol), people, 10**12, np.random.default_rng(0))
    assert found.support.tolist() == [0, 1]
    assert np.linalg.norm(found.coef - people.theta) < 1e-2
    moments = MomentProtocol.for_users(10**12, 8, 1.0)
    found = simulate_moment_aggregate(MomentServer(moments), people, 10**12, np.random.default_rng(0))
    assert found.accepted == 10**12
    assert np.linalg.norm(found.coef - people.theta) < 0.05


def test_fewer_simulated_users_than_rounds_are_refused():
    protocol = GradientProtocol(n_features=4, epsilon=1.0, sparsity=1, n_rounds=9, clip_x=1.0, clip_y=1.0)
    with pytest.raises(ValueError, match="n_users // n_rounds"):
        simulate_gradient_aggregate(ThresholdingServer(protocol), population(), 8, np.random.default_rng(0))
