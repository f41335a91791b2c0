"""The pseudo-risk against its definition, the selective estimator, and its three kinds of inference."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression

from locally.causal.selective_effect import (
    InvalidIVATE,
    Observations,
    PlugInEffect,
    SelectiveIVATE,
    SieveEffect,
    pseudo_risk,
    smooth_weights,
)
from locally.causal.selective_effect.crossfit import Libraries, UnionFits, cross_fit
from locally.causal.selective_effect.selection import effects_by_split, first_minimum
from tests.causal.test_selective_effect import draw

CONSTANT, LOGISTIC = DummyClassifier(strategy="prior"), LogisticRegression()
MEAN, LINEAR = DummyRegressor(), LinearRegression()
CELLS = [(0, 1), (1, 2)]
seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, shape=st.tuples(*[st.integers(1, 3)] * 3), splits=st.integers(1, 4))
def test_mixed_minimax_by_its_definition(seed, shape, splits):
    psi = np.random.default_rng(seed).normal(size=(splits, *shape))
    risk = pseudo_risk(psi, CELLS)
    for k, l, m in product(*map(range, shape)):
        of_outcome = max(
            ((psi[:, k, l, i] - psi[:, k, l, j]) ** 2).mean() for i in range(shape[2]) for j in range(i + 1)
        )
        of_pi = max(((psi[:, i, l, m] - psi[:, j, l, m]) ** 2).mean() for i in range(shape[0]) for j in range(i + 1))
        assert risk[k, l, m] == pytest.approx(of_outcome + of_pi)


@given(seed=seeds, shape=st.tuples(*[st.integers(1, 3)] * 3))
def test_minimax_by_its_definition(seed, shape):
    psi = np.random.default_rng(seed).normal(size=(2, *shape))
    risk = pseudo_risk(psi, CELLS, "minimax")
    for k, l, m in product(*map(range, shape)):
        of_outcome = max(((psi[:, k, l, m] - psi[:, k, l, j]) ** 2).mean() for j in range(shape[2]))
        of_pi = max(((psi[:, k, l, m] - psi[:, j, l, m]) ** 2).mean() for j in range(shape[0]))
        assert risk[k, l, m] == pytest.approx(max(of_outcome, of_pi))


@given(seed=seeds)
def test_four_sufficient_sets_by_definition(seed):
    shape = (2, 1, 2, 2, 1)
    psi = np.random.default_rng(seed).normal(size=(3, *shape))
    risk = pseudo_risk(psi, UnionFits.sufficient)
    everything = list(product(*map(range, shape)))
    for anchor in everything:
        total = 0.0
        for held in UnionFits.sufficient:
            group = [e for e in everything if all(e[j] == anchor[j] for j in held)]
            columns = [psi[(slice(None), *e)] for e in group]
            total += max(((u - v) ** 2).mean() for u in columns for v in columns)
        assert risk[anchor] == pytest.approx(total)


@given(seed=seeds, k=st.integers(0, 1), m=st.integers(0, 2))
def test_duplicates_change_nothing_and_one_candidate_has_no_risk(seed, k, m):
    psi = np.random.default_rng(seed).normal(size=(3, 2, 2, 3))
    double = np.concatenate([psi, psi[:, [k]]], axis=1)
    double = np.concatenate([double, double[..., [m]]], axis=3)
    np.testing.assert_allclose(pseudo_risk(double, CELLS)[:2, :, :3], pseudo_risk(psi, CELLS))
    assert first_minimum(pseudo_risk(double, CELLS)) == first_minimum(pseudo_risk(psi, CELLS))
    assert pseudo_risk(psi[:, :1, :1, :1], CELLS).tolist() == [[[0.0]]]


def test_with_two_nuisances_it_is_the_criterion_for_double_robustness():
    psi = np.random.default_rng(0).normal(size=(4, 3, 2))
    risk = pseudo_risk(psi, [(0,), (1,)])
    assert pseudo_risk(psi[:, :, None], CELLS)[:, 0] == pytest.approx(risk)


def test_right_nuisances_have_no_risk():
    """If everything that suffices is right the others cannot move the effect: the right pair is found."""
    psi = np.random.default_rng(0).normal(size=(1, 3, 3, 3))
    psi[:, :, 1, 2] = 1.0  # p = 1 and mu = 2 right, any pi
    psi[:, 0, 1, :] = 1.0  # p = 1 and pi = 0 right, any mu
    risk = pseudo_risk(psi, CELLS)
    assert risk[0, 1, 2] == 0
    assert (risk > 0).sum() == risk.size - 1


@given(seed=seeds, temperature=st.floats(0.1, 1e4))
def test_smooth_weights_are_a_distribution_that_prefers_little_risk(seed, temperature):
    risk = np.random.default_rng(seed).exponential(size=(2, 3))
    weights = smooth_weights(risk, temperature)
    assert weights.sum() == pytest.approx(1)
    assert weights.argmax() == risk.argmin()
    assert smooth_weights(np.zeros((2, 2)), temperature).tolist() == [[0.25, 0.25], [0.25, 0.25]]


def hidden(n: int, seed: int):
    """Constant and linear learners differ, and the linear ones are right for pi, p and mu."""
    rng = np.random.default_rng(seed)
    X, u = rng.uniform(-1, 1, (n, 2)), rng.uniform(-1, 1, n)
    z = (rng.random(n) < 1 / (1 + np.exp(-2 * X[:, 0]))).astype(float)
    a = (rng.random(n) < 0.12 + z * (0.35 + 0.25 * X[:, 0]) + 0.09 * u).astype(float)
    y = (1 + X[:, 0]) * a + z * (1 + 2 * X[:, 0]) + 3 * X[:, 0] + u + rng.normal(0, 0.5, n)
    return y, a, z, X


LIBRARIES = [CONSTANT, LOGISTIC], [CONSTANT, LOGISTIC], [MEAN, LINEAR]


def test_one_candidate_each_is_the_debiased_estimator():
    data = draw(1500, 0)
    one = SelectiveIVATE([LOGISTIC], [LOGISTIC], [LINEAR], inference="naive", n_folds=3, random_state=4).fit(*data)
    single = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_folds=3, random_state=4).fit(*data)
    assert one.coef_ == single.coef_
    assert one.se_ == single.se_
    assert one.selections_[0].risk.max() == 0


def test_split_effects_are_means_of_scores_over_the_held_out_rows():
    obs = Observations.read(*hidden(900, 1))
    fits = cross_fit(obs, Libraries(*map(tuple, LIBRARIES)), 3, seed=0)
    psi = effects_by_split(fits, obs, 0.01, 0.03)
    assert psi.shape == (3, 2, 2, 2)
    for index in product(range(2), repeat=3):
        scores = fits.values(index, 0.01, 0.03).scores(obs.z, obs.a, obs.y)
        for s in range(3):
            assert psi[(s, *index)] == pytest.approx(scores[fits.fold == s].mean())


def test_selection_leaves_the_wrong_treatment_model_alone():
    y, a, z, X = hidden(20000, 2)
    model = SelectiveIVATE(*LIBRARIES, inference="naive", n_folds=3, random_state=0).fit(y, a, z, X)
    (selection,) = model.selections_
    assert selection.names[1] == "p: LogisticRegression"
    assert selection.risk[selection.index] == selection.risk.min()
    assert abs(model.coef_ - 1) < 3 * model.se_
    table = selection.table(3)
    assert table.rows[0][0] == ", ".join(selection.names)
    assert [row[1][0] for row in table.rows] == sorted(selection.risk.ravel())[:3]
    assert "chosen" in selection.plot().axes[0].get_legend().get_texts()[1].get_text()
    constant = InvalidIVATE(CONSTANT, CONSTANT, MEAN, n_folds=3, random_state=0).fit(y, a, z, X)
    assert abs(constant.coef_ - 1) > 6 * constant.se_


def test_split_and_swap_selects_and_estimates_on_different_rows():
    model = SelectiveIVATE(*LIBRARIES, n_folds=2, n_rep=2, random_state=0)
    calls = []
    model.set_params(callback=lambda *c: calls.append(c)).fit(*hidden(6000, 3))
    assert len(model.selections_) == 2
    assert model.selections_[0].psi.shape == (4, 2, 2, 2)
    assert model.effect_.scores.shape == (2, 6000)
    assert calls == [(i, 8) for i in range(1, 9)]
    assert abs(model.coef_ - 1) < 4 * model.se_
    estimates = model.effect_.scores.mean(axis=1)
    assert model.coef_ == pytest.approx(np.median(estimates))


def test_a_cold_smooth_choice_is_the_naive_one():
    data = hidden(3000, 4)
    naive = SelectiveIVATE(*LIBRARIES, inference="naive", n_folds=2, random_state=0).fit(*data)
    cold = SelectiveIVATE(*LIBRARIES, inference="smooth", temperature=1e9, n_folds=2, random_state=0).fit(*data)
    warm = SelectiveIVATE(*LIBRARIES, inference="smooth", temperature=0.1, n_folds=2, random_state=0).fit(*data)
    assert cold.coef_ == pytest.approx(naive.coef_, rel=1e-9)
    assert len(warm.values_[0]) > 1
    assert sum(weight for weight, _ in warm.values_[0]) == pytest.approx(1)
    assert warm.sensitivity([0.0]).estimates[0] == pytest.approx(warm.coef_, rel=1e-9)


def test_libraries_of_all_five_nuisances():
    model = SelectiveIVATE(
        [CONSTANT, LOGISTIC],
        [CONSTANT, LOGISTIC],
        ml_beta=[SieveEffect(), PlugInEffect(LOGISTIC, LINEAR)],
        ml_theta=[MEAN, LINEAR],
        ml_omega=[MEAN, LINEAR],
        inference="naive",
        n_folds=2,
        random_state=0,
    )
    model.fit(*hidden(12000, 5))
    (selection,) = model.selections_
    assert selection.risk.shape == (2, 2, 2, 2, 2)
    assert [name.split(":")[0] for name in selection.names] == ["pi", "p", "beta", "theta", "omega"]
    assert abs(model.coef_ - 1) < 4 * model.se_


def test_moments_have_candidates_too():
    model = SelectiveIVATE(*LIBRARIES, outcome="moments", n_folds=2, random_state=0, inference="naive")
    model.fit(*hidden(3000, 6))
    assert model.selections_[0].risk.shape == (2, 2, 2)
    assert np.isfinite(model.coef_)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"criterion": "maximin"}, ValueError, "criterion"),
        ({"inference": "bayes"}, ValueError, "inference"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"ml_z": []}, ValueError, "ml_z must hold at least one"),
        ({"ml_a": [LOGISTIC, LINEAR]}, TypeError, r"ml_a\[1\] must have predict_proba"),
        ({"n_folds": 60}, ValueError, "n_folds is 60"),
    ],
)
def test_bad_options_are_named(change, error, message):
    options = {"ml_z": [LOGISTIC], "ml_a": [LOGISTIC], "ml_y": [LINEAR]} | change
    with pytest.raises(error, match=message):
        SelectiveIVATE(**options).fit(*draw(200, 0))


def test_one_learner_in_the_place_of_a_library_is_named(without_shape_checks):
    with pytest.raises(TypeError, match="ml_z must be a sequence"):
        SelectiveIVATE(LOGISTIC, [LOGISTIC], [LINEAR]).fit(*draw(200, 0))
