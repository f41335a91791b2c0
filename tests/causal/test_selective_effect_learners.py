"""Cross-fitting, the debiased estimator in all its forms, contrasts, diagnostics, and what bad data get."""

import sys

import joblib
import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from locally.causal.selective_effect import (
    ContrastIVATE,
    Effect,
    InvalidIVATE,
    Observations,
    PlugInEffect,
    SieveEffect,
    Status,
    efficient_influence,
)
from locally.causal.selective_effect.crossfit import Libraries, cross_fit, split
from locally.causal.selective_effect.learners import fit_predict, name_of, seeded
from tests.causal.test_selective_effect import draw

LOGISTIC, LINEAR = LogisticRegression(), LinearRegression()
QUADRATIC = make_pipeline(PolynomialFeatures(2), LinearRegression())


class Memory(RegressorMixin, ClassifierMixin, BaseEstimator):
    """Knows the rows that it was trained on and says so when it meets one again."""

    def fit(self, X, y):
        self.classes_ = np.array([0, 1])
        self.seen_ = {row.tobytes() for row in X}
        return self

    def predict(self, X):
        return np.array([float(row.tobytes() in self.seen_) for row in X])

    def predict_proba(self, X):
        met = self.predict(X)
        return np.column_stack([1 - met, met])


@pytest.mark.parametrize("outcome", ["cells", "moments"])
def test_no_row_trains_its_own_nuisance(outcome):
    obs = Observations.read(*draw(300, 0))
    memory = Memory()
    fits = cross_fit(obs, Libraries((memory,), (memory,), (memory,), outcome=outcome), 3, seed=0)
    assert not fits.pi.any()
    assert not fits.p.any()


def test_folds_keep_the_shares_of_arm_and_treatment():
    obs = Observations.read(*draw(1000, 1))
    fold = split(obs, 5, seed=3)
    for z in (0, 1):
        for a in (0, 1):
            sizes = np.bincount(fold[(obs.z == z) & (obs.a == a)], minlength=5)
            assert np.ptp(sizes) <= 1


def test_debiased_estimate_is_the_mean_score_at_cross_fitted_values():
    y, a, z, X = draw(1500, 2)
    model = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_folds=3, trim_z=0.0, trim_d=0.0, random_state=0).fit(y, a, z, X)
    fold = cross_fit(model.observations_, Libraries((LOGISTIC,), (LOGISTIC,), (LINEAR,)), 3, model._seeds(1)[0]).fold
    scores = np.empty(1500)
    for s in range(3):
        out, rest = fold == s, fold != s
        pi = LogisticRegression().fit(X[rest], z[rest]).predict_proba(X[out])[:, 1]
        p, mu = np.empty((2, out.sum())), np.empty((2, 2, out.sum()))
        for arm in (0, 1):
            rows = rest & (z == arm)
            p[arm] = LogisticRegression().fit(X[rows], a[rows]).predict_proba(X[out])[:, 1]
            for level in (0, 1):
                cell = rows & (a == level)
                mu[level, arm] = LinearRegression().fit(X[cell], y[cell]).predict(X[out])
        scores[out] = efficient_influence(z[out], a[out], y[out], pi, p, mu)
    assert model.coef_ == pytest.approx(scores.mean(), rel=1e-10)
    assert model.se_ == pytest.approx(scores.std() / np.sqrt(1500), rel=1e-10)


UNION = {"ml_theta": LINEAR, "ml_omega": LINEAR}


@pytest.mark.parametrize(
    "model",
    [
        InvalidIVATE(LOGISTIC, LOGISTIC, QUADRATIC, n_folds=3, random_state=0),
        InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, outcome="moments", n_folds=3, random_state=0),
        InvalidIVATE(LOGISTIC, LOGISTIC, ml_beta=PlugInEffect(LOGISTIC, LINEAR), **UNION, n_folds=3, random_state=0),
        InvalidIVATE(LOGISTIC, LOGISTIC, ml_beta=SieveEffect(), **UNION, n_folds=3, random_state=0),
        ContrastIVATE(LOGISTIC, LOGISTIC, LINEAR, LINEAR, n_folds=3, random_state=0),
    ],
    ids=["cells", "moments", "union, plug-in", "union, sieve", "contrast"],
)
def test_every_parametrisation_finds_the_effect(model):
    model.fit(*draw(30000, 11))
    assert model.effect_.status is Status.IDENTIFIED
    assert 0.02 < model.se_ < 0.15
    assert abs(model.coef_ - 1) < 3 * model.se_


def test_union_survives_a_wrong_instrument_model_and_a_wrong_treatment_model():
    """pi and p constant, but beta, theta and omega right: the fourth of the sets that suffice."""
    from sklearn.dummy import DummyClassifier

    constant = DummyClassifier(strategy="prior")
    y, a, z, X = draw(30000, 12)
    union = InvalidIVATE(constant, constant, ml_beta=SieveEffect(), **UNION, n_folds=2, random_state=0).fit(y, a, z, X)
    assert abs(union.coef_ - 1) < 3 * union.se_


def test_a_treatment_that_is_not_binary():
    rng = np.random.default_rng(0)
    n = 20000
    X, u = rng.uniform(-1, 1, (n, 2)), rng.normal(size=n)
    z = (rng.random(n) < 0.5).astype(float)
    a = z * X[:, 0] + u + (0.5 + 0.8 * z) * rng.normal(size=n)
    y = (2 + X[:, 1]) * a + 3 * z + u + rng.normal(size=n)
    model = InvalidIVATE(LOGISTIC, LINEAR, LINEAR, outcome="moments", n_folds=3, random_state=0).fit(y, a, z, X)
    assert abs(model.coef_ - 2) < 3 * model.se_
    assert model.overlap().variance_gap.mean() == pytest.approx(1.3**2 - 0.5**2, rel=0.1)
    assert (model.values_[0][0][1].v > 0).all()
    with pytest.raises(ValueError, match="binary"):
        InvalidIVATE(LOGISTIC, LINEAR, LINEAR).fit(y, a, z, X)


def test_contrasts_of_an_instrument_of_three_values_agree():
    rng = np.random.default_rng(1)
    n = 20000
    X, u, z = rng.uniform(-1, 1, (n, 1)), rng.normal(size=n), rng.integers(0, 3, n).astype(float)
    a = z + u + (0.5 + z) * rng.normal(size=n)
    y = 2 * a + z**2 + X[:, 0] + u + rng.normal(size=n)
    learners = LINEAR, QUADRATIC, QUADRATIC, LINEAR
    linear = ContrastIVATE(*learners, n_folds=2, random_state=0).fit(y, a, z, X)
    ends = ContrastIVATE(*learners, contrast=lambda z: (z == 2).astype(float), n_folds=2, random_state=0)
    ends.fit(y, a, z, X)
    for model in (linear, ends):
        assert abs(model.coef_ - 2) < 3 * model.se_
    assert linear.coef_ != ends.coef_
    with pytest.raises(ValueError, match="contrast"):
        ContrastIVATE(*learners, contrast=np.zeros_like).fit(y, a, z, X)


def test_one_sided_compliance_fits_and_says_nothing_of_the_empty_cell():
    y, a, z, X = draw(3000, 4)
    model = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_folds=3, random_state=0).fit(y, a * z, z, X)
    assert np.isfinite(model.coef_)
    values = model.values_[0][0][1]
    assert (values.p[0] == 0).all()
    np.testing.assert_allclose(values.omega, 0, atol=1e-10)


def test_same_variance_in_both_arms_is_called_weak():
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (2000, 1))
    z = (rng.random(2000) < 0.5).astype(float)
    a = (rng.random(2000) < np.where(z == 1, 0.7, 0.3)).astype(float)  # p (1 - p) is the same
    with pytest.warns(UserWarning, match="weakly identified"):
        model = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, random_state=0).fit(a + z, a, z, X)
    assert model.effect_.status is Status.WEAK


def test_full_compliance_has_no_variance_to_compare():
    y, _, z, X = draw(400, 0)
    for trim_d in (0.0, 0.03):
        model = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_folds=2, trim_d=trim_d, random_state=0)
        with pytest.warns(UserWarning, match="weakly identified"):
            model.fit(y, z, z, X)
        assert model.effect_.status is Status.WEAK


def test_estimators_can_be_cloned():
    model = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_folds=3, random_state=0)
    assert clone(model).get_params()["n_folds"] == 3


def test_extreme_propensities_are_trimmed_and_counted():
    rng = np.random.default_rng(0)
    n = 4000
    X = rng.uniform(-1, 1, (n, 1))
    z = (rng.random(n) < 1 / (1 + np.exp(-12 * X[:, 0]))).astype(float)
    a = (rng.random(n) < 0.1 + 0.35 * z).astype(float)
    y = a + z + rng.normal(size=n)
    free = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, trim_z=0.0, n_folds=2, random_state=0).fit(y, a, z, X)
    told = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, trim_z=0.05, n_folds=2, random_state=0).fit(y, a, z, X)
    raw = free.overlap().pi
    assert told.overlap().n_trimmed == ((raw < 0.05) | (raw > 0.95)).sum() > 500
    assert told.overlap().pi.min() == 0.05
    assert told.se_ < free.se_
    assert told.overlap().effective_rows > free.overlap().effective_rows


def test_repetitions_report_their_median():
    data = draw(1500, 3)
    model = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_folds=2, n_rep=3, random_state=1).fit(*data)
    estimates = model.effect_.scores.mean(axis=1)
    assert len(set(estimates)) == 3
    assert model.coef_ == np.median(estimates)
    variances = model.effect_.scores.var(axis=1) / 1500 + (estimates - model.coef_) ** 2
    assert model.se_ == pytest.approx(np.sqrt(np.median(variances)))


def test_same_seed_same_figures_in_parallel_too():
    data = draw(1200, 4)
    forest = RandomForestRegressor(5, min_samples_leaf=20)
    with joblib.parallel_config("threading"):
        fitted = [
            InvalidIVATE(LOGISTIC, LOGISTIC, forest, n_folds=2, random_state=7, n_jobs=jobs).fit(*data).coef_
            for jobs in (None, None, 2)
        ]
    assert fitted[0] == fitted[1] == fitted[2]
    assert forest.random_state is None


def test_progress_is_reported_and_can_interrupt():
    calls = []
    InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_rep=2, callback=lambda *c: calls.append(c)).fit(*draw(400, 0))
    assert calls == [(1, 2), (2, 2)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_rep=2, callback=stop).fit(*draw(400, 0))


def test_sensitivity_starts_at_the_estimate_and_widens():
    model = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_folds=2, random_state=0).fit(*draw(4000, 5))
    found = model.sensitivity([-1.0, 0.0, 0.2, 2.0])
    assert found.estimates[1] == pytest.approx(model.coef_, rel=1e-9)
    assert found.standard_errors[1] == pytest.approx(model.se_, rel=1e-9)
    assert (found.low[1], found.high[1]) == pytest.approx(model.confint())
    assert np.isnan(found.estimates[3])  # beyond the pole: nothing identifies the effect
    assert found.table().rows[1][0] == "delta = +0"
    assert model.sensitivity(np.linspace(-0.5, 0.5, 5).tolist()).robustness > 0
    assert found.plot().axes[0].get_xlabel()
    assert len(model.overlap().plot().axes) == 3
    assert len(model.overlap().table().rows) == 5
    with pytest.raises(ValueError, match="deltas"):
        model.sensitivity([3.0])
    with pytest.raises(ValueError, match="level"):
        model.sensitivity(level=1.5)


def test_table_as_text_html_and_frame():
    effect = Effect.from_scores(np.array([[1.0, 2.0, 3.0, 2.0]]), Status.IDENTIFIED, "joined & <paid>")
    text = str(effect.summary(0.9))
    assert "5 %" in text
    assert "95 %" in text
    assert "joined & <paid>" in text
    assert "joined &amp; &lt;paid&gt;" in effect.summary()._repr_html_()
    low, high = effect.confint(0.95)
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(1.959964 * effect.standard_error)
    pandas = pytest.importorskip("pandas")
    frame = effect.summary().to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["joined & <paid>", "coef"] == 2


def test_a_table_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pandas"):
        Effect.from_scores(np.array([[1.0, 2.0]]), Status.IDENTIFIED, "a").summary().to_frame()


# Data in ------------------------------------------------------------------------------------------------------------


def test_named_columns_of_any_kind_give_the_same_figures():
    y, a, z, X = draw(600, 6)
    model = InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_folds=2, random_state=0)
    plain = model.fit(y, a, z, X).coef_
    columns = {"wealth": y, "age": X[:, 0], "joined": a, "income": X[:, 1], "offered": z}
    assert model.fit("wealth", "joined", "offered", columns).coef_ == plain
    assert model.observations_.names == ("wealth", "joined", "offered", "age", "income")
    assert "joined" in str(model.summary())
    structured = np.rec.fromarrays(list(columns.values()), names=list(columns))
    assert model.fit("wealth", "joined", "offered", structured).coef_ == plain
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(columns)
    before = frame.copy()
    assert model.fit("wealth", "joined", "offered", frame).coef_ == plain
    assert model.fit(frame["wealth"], frame["joined"], frame["offered"], frame[["age", "income"]]).coef_ == plain
    pandas.testing.assert_frame_equal(frame, before)


def bad(**changes):
    y, a, z, X = draw(200, 0)
    data = {"y": y, "a": a, "z": z, "X": X}
    data.update({k: change(data[k].copy()) for k, change in changes.items()})
    return data


def put(value):
    def change(column):
        column[(3, *(0,) * (column.ndim - 1))] = value
        return column

    return change


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (bad(y=put(np.nan)), ValueError, "y holds NaN"),
        (bad(X=put(np.inf)), ValueError, r"X\['X1'\] holds NaN or infinity"),
        (bad(X=lambda X: np.column_stack([X, np.ones(200)])), ValueError, r"X\['X3'\] is constant"),
        (bad(z=np.zeros_like), ValueError, r"z is constant \(0\)"),
        (bad(a=np.ones_like), ValueError, "a is constant"),
        (bad(z=put(2.0)), ValueError, "z must be binary"),
        (bad(a=put(0.5)), ValueError, "must be binary"),
        (bad(a=lambda a: a[:-1]), ValueError, "a has 199 entries"),
        (bad(X=lambda X: X[:-1]), ValueError, "X has 199 rows"),
        (bad(y=lambda y: y.astype(str)), TypeError, "y must be numeric"),
        (bad(X=lambda X: X[:, :0]), ValueError, "at least one covariate"),
        (bad(y=lambda y: "wealth"), TypeError, "no named columns"),
        (bad(y=lambda y: "wealth", X=lambda X: {"age": X[:, 0]}), ValueError, "names the column 'wealth'"),
        (bad(y=lambda y: "u", a=lambda a: "u", X=lambda X: {"u": X[:, 0], "v": X[:, 1]}), ValueError, "second time"),
    ],
)
def test_bad_data_are_named(data, error, message):
    with pytest.raises(error, match=message):
        InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR).fit(**data)


def test_fewer_rows_than_folds_are_named():
    y, a, z, X = draw(200, 0)
    with pytest.raises(ValueError, match="n_folds is 300, but there are only 200 rows"):
        InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR, n_folds=300).fit(y, a, z, X)
    rare = a.copy()
    rare[z == 0] = 0
    rare[np.flatnonzero(z == 0)[:2]] = 1
    with pytest.raises(ValueError, match="only 2 rows have z = 0, a = 1"):
        InvalidIVATE(LOGISTIC, LOGISTIC, LINEAR).fit(y, rare, z, X)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_folds": 1}, ValueError, "n_folds"),
        ({"n_rep": 0}, ValueError, "n_rep"),
        ({"trim_z": 0.6}, ValueError, "trim_z"),
        ({"trim_d": -0.1}, ValueError, "trim_d"),
        ({"outcome": "arms"}, ValueError, "outcome"),
        ({"ml_y": None}, ValueError, "ml_y must be given"),
        ({"ml_theta": LINEAR}, ValueError, "ml_theta must be left out"),
        ({"ml_z": LINEAR}, TypeError, "ml_z must have predict_proba"),
        ({"ml_a": LogisticRegression}, TypeError, "ml_a must be an instance"),
        ({"ml_y": StandardScaler()}, TypeError, "ml_y must have predict"),
    ],
)
def test_bad_options_are_named(change, error, message):
    options = {"ml_z": LOGISTIC, "ml_a": LOGISTIC, "ml_y": LINEAR} | change
    with pytest.raises(error, match=message):
        InvalidIVATE(**options).fit(*draw(200, 0))


def test_learners_are_cloned_and_seeded():
    forest = make_pipeline(StandardScaler(), RandomForestRegressor(3))
    assert name_of(forest) == "RandomForestRegressor"
    X, y = np.random.default_rng(0).normal(size=(2, 50, 2))
    first, second = (seeded(forest, 5).fit(X, y[:, 0]).predict(X) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert seeded(RandomForestRegressor(random_state=3), 5).random_state == 3
    assert fit_predict(LINEAR, X[:0], y[:0, 0], X, 0).tolist() == [0.0] * 50
    assert fit_predict(LOGISTIC, X, np.ones(50), X, 0).tolist() == [1.0] * 50
