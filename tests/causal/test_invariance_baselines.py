"""The rivals on cases whose answer is known: least squares, fixed effects, instruments, causal parents."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression

from locally.causal.invariance import (
    AnchorRegression,
    InvariantCausalPrediction,
    InvariantRiskMinimization,
    SingularCovariance,
    TooFewEnvironments,
)


def shifted(seed=0, environments=4, each=400):
    """Means of the cause move between environments, and a hidden variable confounds it with the target."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(environments), each)
    hidden = rng.standard_normal(labels.size)
    x = 2.0 * rng.standard_normal(environments)[labels] + hidden + rng.standard_normal(labels.size)
    y = 1.5 * x - 2.0 * hidden + 0.5 * rng.standard_normal(labels.size)
    return np.column_stack([x, rng.standard_normal(labels.size)]), y, labels


def test_anchor_regression_is_least_squares_at_one_and_fixed_effects_at_zero():
    X, y, labels = shifted()
    X, y, labels = X[:1300], y[:1300], labels[:1300]  # environments of unequal size
    ols = LinearRegression().fit(X, y)
    model = AnchorRegression(1.0).fit(X, y, labels)
    np.testing.assert_allclose(model.coef_, ols.coef_, rtol=1e-9)
    np.testing.assert_allclose(model.intercept_, ols.intercept_, rtol=1e-9, atol=1e-12)
    dummies = np.eye(4)[labels]
    within = LinearRegression(fit_intercept=False).fit(np.column_stack([X, dummies]), y)
    np.testing.assert_allclose(AnchorRegression(0.0).fit(X, y, labels).coef_, within.coef_[:2], rtol=1e-8)


def test_anchor_regression_tends_to_two_stage_least_squares():
    X, y, labels = shifted()
    dummies = np.eye(4)[labels]
    fitted = dummies @ np.linalg.lstsq(dummies, X, rcond=None)[0]
    two_stage = LinearRegression().fit(fitted, y).coef_
    model = AnchorRegression(1e9).fit(X, y, labels)
    np.testing.assert_allclose(model.coef_, two_stage, rtol=1e-4)
    assert abs(model.coef_[0] - 1.5) < abs(LinearRegression().fit(X, y).coef_[0] - 1.5)


def test_anchor_regression_minimises_its_objective():
    X, y, labels = shifted(1)
    model = AnchorRegression(7.0).fit(X, y, labels)
    P = np.eye(4)[labels]

    def objective(b):
        r = (y - y.mean()) - (X - X.mean(axis=0)) @ b
        explained = P @ np.linalg.lstsq(P, r, rcond=None)[0]
        return ((r - explained) ** 2).sum() + 7 * (explained**2).sum()

    for step in 1e-3 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]):
        assert objective(model.coef_) < objective(model.coef_ + step)


def test_irm_without_penalty_is_pooled_least_squares():
    X, y, labels = shifted()
    model = InvariantRiskMinimization(0.0).fit(X, y, labels)
    ols = LinearRegression().fit(X, y)
    np.testing.assert_allclose(model.coef_, ols.coef_, rtol=1e-9)
    np.testing.assert_allclose(model.predict(X), ols.predict(X), rtol=1e-8, atol=1e-9)


def cause_and_effect(seed=0, environments=6, each=2000):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(environments), each)
    cause = rng.uniform(0.5, 2, environments)[labels] * rng.standard_normal(labels.size)
    y = cause + rng.standard_normal(labels.size)
    effect = y * rng.uniform(-2, 2, environments)[labels] + rng.standard_normal(labels.size)
    return np.column_stack([cause, effect]), y, labels


def test_irm_with_a_large_penalty_leaves_the_unstable_effect():
    rng = np.random.default_rng(0)
    covariances = []
    for c, a in zip(rng.uniform(0.5, 2, 6), rng.uniform(-2, 2, 6)):  # cause, effect = a y + noise, y = cause + noise
        covariances.append([[c, a * c, c], [a * c, a * a * (c + 1) + 1, a * (c + 1)], [c, a * (c + 1), c + 1]])
    fits = [InvariantRiskMinimization(p).fit_moments(np.array(covariances), 2) for p in (0.0, 1.0, 1e5)]
    slopes = [model.penalty_ for model in fits]
    assert slopes == sorted(slopes, reverse=True)
    assert slopes[-1] < 1e-6 * slopes[0]
    np.testing.assert_allclose(fits[-1].coef_, [1.0, 0.0], atol=1e-3)


def test_icp_finds_the_parents_and_accepts_what_it_says():
    X, y, labels = cause_and_effect()
    model = InvariantCausalPrediction().fit(X, y, labels)
    assert model.parents_ == (0,)
    assert model.accepted_ == [(0,)]
    np.testing.assert_allclose(model.coef_[0], LinearRegression().fit(X[:, :1], y).coef_[0], rtol=1e-9)
    assert model.coef_[1] == 0


@pytest.mark.parametrize("subset", [(), (0,), (1,), (0, 1)])
def test_icp_p_values_are_those_of_the_textbook_tests(subset):
    X, y, labels = cause_and_effect(seed=3, environments=3, each=60)
    X, y, labels = X[:170], y[:170], labels[:170]
    model = InvariantCausalPrediction(alpha=1e-6).fit(X, y, labels)
    Z = np.column_stack([np.ones(170), X[:, subset]])
    residual = y - Z @ np.linalg.lstsq(Z, y, rcond=None)[0]
    p_values = []
    for e in range(3):
        own, rest = residual[labels == e], residual[labels != e]
        p_values.append(stats.ttest_ind(own, rest, equal_var=False).pvalue)
        ratio = own.var(ddof=1) / rest.var(ddof=1)
        law = stats.f(len(own) - 1, len(rest) - 1)
        p_values.append(2 * min(law.cdf(ratio), law.sf(ratio)))
    assert model.p_values_[subset] == pytest.approx(min(1.0, 6 * min(p_values)), rel=1e-6, abs=1e-12)


def test_icp_keeps_its_level():
    wrong = 0
    for seed in range(60):
        X, y, labels = cause_and_effect(seed=seed, environments=3, each=100)
        wrong += not set(InvariantCausalPrediction(alpha=0.1).fit(X, y, labels).parents_) <= {0}
    assert wrong <= 12


def test_icp_without_an_accepted_subset_predicts_the_mean():
    X, y, labels = cause_and_effect()
    y = y * (1 + labels)
    model = InvariantCausalPrediction().fit(X, y, labels)
    assert model.accepted_ == []
    assert model.parents_ == ()
    np.testing.assert_allclose(model.predict(X), y.mean(), rtol=1e-9)


@pytest.mark.parametrize("kind", [InvariantRiskMinimization, InvariantCausalPrediction, AnchorRegression])
def test_bad_tables_are_named(kind):
    X, y, labels = cause_and_effect(each=50)
    with pytest.raises(TooFewEnvironments):
        kind().fit(X, y, np.zeros(len(y)))
    with pytest.raises(SingularCovariance):
        kind().fit(np.column_stack([X, X[:, 0]]), y, labels)
    with pytest.raises(ValueError, match="NaN"):
        kind().fit(np.where(X > 2, np.nan, X), y, labels)


def test_bad_settings_are_named():
    X, y, labels = cause_and_effect(each=50)
    with pytest.raises(ValueError, match="penalty"):
        InvariantRiskMinimization(-1.0).fit(X, y, labels)
    with pytest.raises(ValueError, match="gamma"):
        AnchorRegression(np.nan).fit(X, y, labels)
    with pytest.raises(ValueError, match="alpha"):
        InvariantCausalPrediction(alpha=2.0).fit(X, y, labels)
    with pytest.raises(ValueError, match="rows"):
        InvariantCausalPrediction().fit_moments(np.array([np.eye(3), 2 * np.eye(3)]), 0)
    with pytest.raises(ValueError, match="means"):
        AnchorRegression().fit_moments(np.array([np.eye(3), 2 * np.eye(3)]), 0)
