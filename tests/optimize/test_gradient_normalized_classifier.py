"""The classifier against scikit-learn's own, its conventions, and what bad data get."""

import numpy as np
import pytest
from scipy.sparse import csc_array, csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import scale
from sklearn.utils.estimator_checks import parametrize_with_checks

from locally.optimize.gradient_normalized import GNSLogisticRegression, Status
from locally.optimize.gradient_normalized import classifier as module


@parametrize_with_checks([GNSLogisticRegression()])
def test_scikit_learns_conventions(estimator, check, without_shape_checks):
    check(estimator)


def table(n, seed, classes=2):
    X, y = make_classification(
        n, 12, n_informative=6, n_redundant=0, n_classes=classes, flip_y=0.2, class_sep=0.7, random_state=seed
    )
    return X, y


def peer(**words):
    return LogisticRegression(solver="newton-cholesky", tol=1e-11, max_iter=200, **words)


CASES = {
    "plain": {},
    "weak penalty": {"C": 1e3},
    "strong penalty": {"C": 1e-3},
    "no intercept": {"fit_intercept": False},
    "balanced": {"class_weight": "balanced"},
    "weighted classes": {"class_weight": {0: 3.0, 1: 0.5}},
}


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_coefficients_are_those_of_newton_cholesky(case, classes):
    X, y = table(300, 0, classes)
    weights = np.random.default_rng(0).uniform(0, 2, 300)
    ours, theirs = GNSLogisticRegression(**CASES[case]), peer(**CASES[case])
    for words in ({}, {"sample_weight": weights}):
        ours.fit(X, y, **words)
        theirs.fit(X, y, **words)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-8)
        np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-8)
        np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-8)
        np.testing.assert_allclose(ours.predict_log_proba(X), theirs.predict_log_proba(X), atol=1e-7)
        np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


@pytest.mark.parametrize("load", [load_breast_cancer, load_digits])
def test_real_tables_dense_and_sparse(load, without_shape_checks):
    X, y = load(return_X_y=True)
    X = X / 16 if load is load_digits else scale(X)
    theirs = peer().fit(X, y)
    for data in (X, csr_matrix(X), csc_array(X)):
        ours = GNSLogisticRegression().fit(data, y)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-8)
        np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-8)
    assert ours.n_iter_ <= 15


@pytest.mark.parametrize("classes", [2, 3])
def test_curvature_that_is_applied_and_not_formed_gives_the_same(monkeypatch, classes):
    X, y = table(200, 1, classes)
    formed = GNSLogisticRegression().fit(X, y)
    monkeypatch.setattr(module, "DENSE_LIMIT", 5)
    applied = GNSLogisticRegression().fit(X, y)
    np.testing.assert_allclose(applied.coef_, formed.coef_, atol=1e-7)
    np.testing.assert_allclose(applied.intercept_, formed.intercept_, atol=1e-7)


def test_recoding_the_features_changes_neither_path_nor_scores():
    X, y = table(300, 2)
    S = np.random.default_rng(0).standard_normal((12, 12)) + 3 * np.eye(12)
    plain, recoded = (GNSLogisticRegression(C=np.inf).fit(Z, y) for Z in (X, X @ S))
    np.testing.assert_array_equal(plain.result_.history["gamma"], recoded.result_.history["gamma"])
    np.testing.assert_allclose(plain.decision_function(X), recoded.decision_function(X @ S), atol=1e-6)


def test_constant_and_repeated_features_without_a_penalty():
    X, y = table(200, 3)
    doubled = np.column_stack([X, X[:, 0], np.ones(200)])
    plain, ours = GNSLogisticRegression(C=np.inf).fit(X, y), GNSLogisticRegression(C=np.inf).fit(doubled, y)
    assert ours.result_.success
    np.testing.assert_allclose(ours.decision_function(doubled), plain.decision_function(X), atol=1e-5)


def test_empirical_fisher_reaches_the_same_answer_more_slowly():
    X, y = table(200, 4)
    exact = GNSLogisticRegression().fit(X, y)
    fisher = GNSLogisticRegression(curvature="empirical_fisher", max_iter=2000, tol=1e-8).fit(X, y)
    np.testing.assert_allclose(fisher.coef_, exact.coef_, atol=1e-6)
    assert fisher.n_iter_ > exact.n_iter_


def test_separable_classes_without_a_penalty_end_in_a_status():
    X, y = np.array([[-2.0], [-1.0], [1.0], [2.0]]), np.array([0, 0, 1, 1])
    model = GNSLogisticRegression(C=np.inf, tol=1e-6).fit(X, y)
    assert model.result_.status is Status.CONVERGED
    assert (model.predict(X) == y).all()
    with pytest.warns(ConvergenceWarning, match="iteration limit"):
        GNSLogisticRegression(C=np.inf, tol=0.0, max_iter=3).fit(X, y)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"C": 0.0}, "C"),
        ({"C": "1"}, "C"),
        ({"C": np.nan}, "C"),
        ({"tol": -1.0}, "tol"),
        ({"max_iter": 0}, "max_iter"),
        ({"curvature": "diagonal"}, "curvature"),
    ],
)
def test_bad_parameters_are_named(words, match):
    X, y = table(50, 0)
    with pytest.raises(ValueError, match=match):
        clone(GNSLogisticRegression()).set_params(**words).fit(X, y)


def test_bad_data_are_named():
    X, y = table(50, 0)
    with pytest.raises(ValueError, match="NaN"):
        GNSLogisticRegression().fit(np.where(X > 1, np.nan, X), y)
    with pytest.raises(ValueError, match="one class"):
        GNSLogisticRegression().fit(X, np.zeros(50))
    with pytest.raises(ValueError, match="Sample weights"):
        GNSLogisticRegression().fit(X, y, sample_weight=np.zeros(50))
    with pytest.raises(ValueError, match="features"):
        GNSLogisticRegression().fit(X, y).predict(X[:, :3])
