"""The influence function on exact discrete laws, multiple robustness, the parametric estimator and its sandwich."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from locally.causal.selective_effect import (
    MultiplyRobustIVATE,
    Observations,
    Status,
    WorkingValues,
    efficient_influence,
    genius,
    least_squares,
    lewbel,
    two_stage_least_squares,
)
from locally.causal.selective_effect.baselines import moment_ratio
from locally.causal.selective_effect.equations import EstimatingEquations
from locally.causal.selective_effect.working_models import Logistic, affine, affine_by_arm, arm_means, intercept

# A law of (X, Z, A, Y), X and Z and A binary; [x] or [z, x]
PX = np.array([0.4, 0.6])
LAW = {
    "pi": np.array([0.3, 0.6]),
    "p": np.array([[0.1, 0.2], [0.45, 0.55]]),
    "beta": np.array([1.0, 2.0]),
    "theta": np.array([[0.5, -0.2], [1.5, 0.9]]),
    "omega": np.array([0.03, -0.02]),
}
WRONG = {
    "pi": np.array([0.5, 0.4]),
    "p": np.array([[0.15, 0.12], [0.4, 0.6]]),
    "beta": np.array([1.4, 1.7]),
    "theta": np.array([[0.8, 0.3], [1.1, 1.2]]),
    "omega": np.array([0.05, 0.01]),
}
ROBUST = [{"pi", "p"}, {"pi", "beta", "theta"}, {"p", "beta", "omega"}, {"beta", "theta", "omega"}]


def values_of(law: dict[str, np.ndarray]) -> WorkingValues:
    v = law["p"] * (1 - law["p"])
    return WorkingValues(law["pi"], law["p"], v, v[1] - v[0], law["beta"], law["omega"], law["theta"])


def cells():
    """Every (x, z, a): its probability and E[Y | a, z, x] under LAW."""
    for x, z, a in product((0, 1), repeat=3):
        p = LAW["p"][z, x]
        f = LAW["pi"][x] if z else 1 - LAW["pi"][x]
        mean = LAW["theta"][z, x] + LAW["beta"][x] * a + LAW["omega"][x] * (a - p) / (p * (1 - p))
        yield x, z, a, PX[x] * f * (p if a else 1 - p), mean


def expected_score(working: dict[str, np.ndarray]) -> float:
    """E[score], exactly: the score is linear in Y."""
    total = 0.0
    for x, z, a, probability, mean in cells():
        columns = np.full(2, float(z)), np.full(2, float(a)), np.full(2, mean)
        total += probability * values_of(working).scores(*columns)[x]
    return total


def test_efficient_influence_on_an_exact_law():
    """Mean zero after centring, and the variance bound of the law with residual variance 1/4."""
    assert expected_score(LAW) == pytest.approx(1.6, abs=1e-12)
    variance = 0.0
    for x, z, a, probability, mean in cells():
        scores = [
            values_of(LAW).scores(np.full(2, float(z)), np.full(2, float(a)), np.full(2, mean + e))[x]
            for e in (-0.5, 0.5)
        ]
        variance += probability * np.mean([(s - 1.6) ** 2 for s in scores])
    assert variance == pytest.approx(20.330264921, abs=1e-8)


@pytest.mark.parametrize("right", ROBUST)
def test_one_right_set_suffices(right):
    assert expected_score(WRONG | {k: LAW[k] for k in right}) == pytest.approx(1.6, abs=1e-12)


def test_other_sets_do_not_suffice():
    for right in ({"p", "theta"}, {"pi", "beta"}, {"p", "beta"}, {"beta", "theta"}, {"theta", "omega"}, set()):
        assert abs(expected_score(WRONG | {k: LAW[k] for k in right}) - 1.6) > 1e-3


@pytest.mark.parametrize("name", sorted(LAW))
def test_the_score_is_orthogonal_to_every_nuisance(name):
    rng = np.random.default_rng(0)
    direction = 0.05 * rng.standard_normal(LAW[name].shape)
    moved = [expected_score(LAW | {name: LAW[name] + h * direction}) for h in (1e-3, -1e-3)]
    assert (moved[0] - moved[1]) / 2e-3 == pytest.approx(0, abs=1e-5)


def test_bias_is_a_sum_of_products_of_errors():
    """The exact remainder of the expansion, term by term, for arbitrary working values."""
    v, w = LAW["p"] * (1 - LAW["p"]), WRONG["p"] * (1 - WRONG["p"])
    D = w[1] - w[0]
    sign = np.array([[-1.0], [1.0]])
    f = np.stack([1 - LAW["pi"], LAW["pi"]]) / np.stack([1 - WRONG["pi"], WRONG["pi"]])
    gap = LAW["beta"] - WRONG["beta"]
    tail = (LAW["p"] - WRONG["p"]) * (LAW["theta"] - WRONG["theta"] + gap * LAW["p"])
    bias = (
        gap * ((sign * f * v).sum(axis=0) / D - 1)
        + (LAW["omega"] - WRONG["omega"]) * (sign * f).sum(axis=0) / D
        + (sign * f * tail).sum(axis=0) / D
    )
    assert expected_score(WRONG) - 1.6 == pytest.approx(PX @ bias, abs=1e-12)


def test_golden_scores(golden):
    g = np.load(golden / "21-selective-ate" / "ate_a.npz", allow_pickle=False)
    columns = g["Z"], g["A"], g["Y"]
    np.testing.assert_allclose(efficient_influence(*columns, g["pi"], g["p"], g["mu"]), g["phi"], atol=1e-10)
    np.testing.assert_allclose(WorkingValues.from_cells(g["pi"], g["p"], g["mu"]).beta, g["beta"], atol=1e-12)
    assert g["phi"].mean() == pytest.approx(float(g["est"]), abs=1e-8)


def random_inputs(seed: int, n: int = 30):
    rng = np.random.default_rng(seed)
    z, a = rng.integers(0, 2, n).astype(float), rng.integers(0, 2, n).astype(float)
    p = np.stack([rng.uniform(0.02, 0.2, n), rng.uniform(0.3, 0.7, n)])
    return z, a, rng.normal(size=n), rng.uniform(0.1, 0.9, n), p, rng.normal(size=(2, 2, n))


@given(seed=st.integers(0, 2**32 - 1))
def test_both_algebraic_forms_agree(seed):
    """Residuals of beta and theta, or plain regressions of Y and of the products."""
    z, a, y, pi, p, mu = random_inputs(seed)
    v = p * (1 - p)
    m, c = (1 - p) * mu[0] + p * mu[1], v * (mu[1] - mu[0])
    own = z.astype(int), np.arange(len(z))
    beta = (c[1] - c[0]) / (v[1] - v[0])
    weight = np.where(z == 1, 1 / pi, -1 / (1 - pi)) / (v[1] - v[0])
    plain = beta + weight * ((a - p[own]) * (y - m[own]) - c[own] - beta * ((a - p[own]) ** 2 - v[own]))
    np.testing.assert_allclose(efficient_influence(z, a, y, pi, p, mu), plain, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**32 - 1), shift=st.floats(-5, 5), scale=st.floats(0.1, 5))
def test_units_of_the_outcome_and_coding_of_the_instrument(seed, shift, scale):
    z, a, y, pi, p, mu = random_inputs(seed)
    plain = efficient_influence(z, a, y, pi, p, mu)
    moved = efficient_influence(z, a, shift + scale * y, pi, p, shift + scale * mu)
    np.testing.assert_allclose(moved, scale * plain, rtol=1e-8, atol=1e-8)
    swapped = efficient_influence(1 - z, a, y, 1 - pi, p[::-1].copy(), mu[:, ::-1].copy())
    np.testing.assert_allclose(swapped, plain, rtol=1e-8, atol=1e-8)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_direct_effect_of_the_instrument_leaves_the_scores_alone(seed):
    z, a, y, pi, p, mu = random_inputs(seed)
    direct = np.random.default_rng(seed).normal(size=(2, len(z)))
    moved = efficient_influence(z, a, y + np.where(z == 1, direct[1], direct[0]), pi, p, mu + direct)
    np.testing.assert_allclose(moved, efficient_influence(z, a, y, pi, p, mu), rtol=1e-8, atol=1e-8)


def test_tilted_scores_have_the_tilted_effect_as_their_mean_and_are_orthogonal():
    """Confounding that differs between the arms by a share delta, known: the effect comes back exactly."""
    delta = 0.3
    law = {k: LAW[k] for k in LAW}
    omega = np.stack([1 - delta / 2, np.array(1 + delta / 2)])[:, None] * LAW["omega"]

    def mean_of(working: dict[str, np.ndarray]) -> float:
        total = 0.0
        for x, z, a in product((0, 1), repeat=3):
            p = law["p"][z, x]
            f = law["pi"][x] if z else 1 - law["pi"][x]
            y = law["theta"][z, x] + law["beta"][x] * a + omega[z, x] * (a - p) / (p * (1 - p))
            columns = np.full(2, float(z)), np.full(2, float(a)), np.full(2, y)
            total += PX[x] * f * (p if a else 1 - p) * fitted(working).tilted(*columns, delta, 0.0)[0][x]
        return total

    def fitted(working: dict[str, np.ndarray]) -> WorkingValues:
        """What moments of this law look like to an analyst who takes omega for the same in both arms."""
        p = working["p"]
        v = p * (1 - p)
        return WorkingValues.from_moments(working["pi"], p, v, working["m"], working["c"])

    v = law["p"] * (1 - law["p"])
    truth = {
        "pi": law["pi"],
        "p": law["p"],
        "m": law["theta"] + law["beta"] * law["p"],
        "c": omega + law["beta"] * v,
    }
    assert mean_of(truth) == pytest.approx(1.6, abs=1e-12)
    for name in truth:
        step = 1e-5 * np.random.default_rng(1).standard_normal(truth[name].shape)
        ends = [mean_of(truth | {name: truth[name] + s * step}) for s in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(0, abs=1e-4)


def draw(n: int, seed: int):
    rng = np.random.default_rng(seed)
    X, u = rng.uniform(-1, 1, (n, 2)), rng.uniform(-1, 1, n)
    z = (rng.random(n) < 0.5 + 0.2 * X[:, 0]).astype(float)
    a = (rng.random(n) < 0.12 + 0.35 * z + 0.05 * X[:, 1] * z + 0.06 * u).astype(float)
    y = (1 + 0.5 * X[:, 0]) * a + z + X[:, 1] + 2 * u + rng.normal(0, 0.5, n)
    return y, a, z, X


def test_golden_parametric_estimate(golden):
    g = np.load(golden / "21-selective-ate" / "ate_a.npz", allow_pickle=False)
    columns = g["mr_Y"], g["mr_A"], g["mr_Z"], g["mr_X"]
    model = MultiplyRobustIVATE(trim_z=0.0, cov="influence").fit(*columns)
    assert model.coef_ == pytest.approx(float(g["mr_estimate"]), abs=1e-4)
    assert model.solution_.plug_in == pytest.approx(float(g["mr_plugin"]), abs=1e-4)
    assert model.se_ == pytest.approx(float(g["mr_se"]), abs=1e-4)


@pytest.mark.parametrize(("trim_z", "trim_d", "known"), [(0.0, 0.0, False), (0.4, 0.13, False), (0.0, 0.0, True)])
def test_sandwich_is_the_derivative_in_the_weight_of_a_row(trim_z, trim_d, known):
    """The influence of row i is n times the derivative of the estimate in its weight: found by differences."""
    y, a, z, X = draw(1200, 3)
    obs = Observations.read(y, a, z, X)
    equations = EstimatingEquations.of(obs, intercept, affine_by_arm, affine, affine, affine)
    pi = 0.5 + 0.2 * X[:, 0] if known else None
    equations = replace(equations, known_pi=pi, trim_z=trim_z, trim_d=trim_d)
    influence = equations.influence(equations.solve(np.ones(obs.n)))
    for row in (0, 7, 500):
        ends = []
        for step in (1e-5, -1e-5):
            weight = np.ones(obs.n)
            weight[row] += step
            ends.append(equations.solve(weight).estimate)
        assert influence[row] == pytest.approx(obs.n * (ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-4)


def test_bootstrap_agrees_with_the_sandwich():
    data = draw(4000, 0)
    sandwich = MultiplyRobustIVATE().fit(*data)
    bootstrap = MultiplyRobustIVATE(cov="bootstrap", n_bootstrap=100, random_state=0).fit(*data)
    assert bootstrap.coef_ == sandwich.coef_
    assert bootstrap.n_failed_ == 0
    assert bootstrap.se_ == pytest.approx(sandwich.se_, rel=0.3)
    again = MultiplyRobustIVATE(cov="bootstrap", n_bootstrap=100, random_state=0).fit(*data)
    assert again.se_ == bootstrap.se_


def test_direct_effect_in_the_span_of_theta_changes_nothing():
    y, a, z, X = draw(3000, 1)
    plain = MultiplyRobustIVATE().fit(y, a, z, X).coef_
    moved = MultiplyRobustIVATE().fit(y + 4 * z - 3 * z * X[:, 0] + X[:, 1], a, z, X).coef_
    assert moved == pytest.approx(plain, abs=1e-8)


def test_estimate_recovers_the_effect_that_two_stage_least_squares_misses():
    y, a, z, X = draw(60000, 5)
    model = MultiplyRobustIVATE().fit(y, a, z, X)
    assert model.effect_.status is Status.IDENTIFIED
    assert abs(model.coef_ - 1) < 3 * model.se_
    assert model.overlap().effective_rows > 50000
    assert two_stage_least_squares(y, a, z, X).estimate > 3
    assert least_squares(y, a, z, X).estimate > 1.2


def test_logistic_agrees_with_scikit_learn():
    _, a, _, X = draw(2000, 2)
    ours = Logistic.fit(affine(X), a, np.ones(2000))
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(X, a)
    assert ours.converged
    np.testing.assert_allclose(ours.coef, [*theirs.intercept_, *theirs.coef_[0]], atol=1e-5)


def test_separated_classes_end_in_a_status():
    X = np.linspace(-1, 1, 50)[:, None]
    assert not Logistic.fit(affine(X), (X[:, 0] > 0).astype(float), np.ones(50)).converged
    y, a, z, X = draw(500, 2)
    z = (X[:, 0] > 0).astype(float)
    assert MultiplyRobustIVATE().fit(y, a, z, X).effect_.status is not Status.IDENTIFIED


def test_equations_without_a_solution_end_in_a_status():
    y, a, z, X = draw(500, 2)
    double = MultiplyRobustIVATE(theta_basis=lambda z, X: np.column_stack([arm_means(z, X), z]))
    model = double.fit(y, a, z, X)
    assert model.effect_.status is Status.SINGULAR
    assert np.isnan(model.coef_)


def test_one_sided_compliance_compares_the_eligible():
    """p_0 = 0: beta(X) is the difference between treated and untreated in arm 1, and omega must vanish."""
    y, a, z, X = draw(4000, 4)
    a = a * z
    model = MultiplyRobustIVATE().fit(y, a, z, X)
    assert (model.solution_.values.p[0] == 0).all()
    values = WorkingValues.from_cells(
        np.full(3, 0.5), np.stack([np.zeros(3), np.array([0.2, 0.5, 0.6])]), np.arange(12.0).reshape(2, 2, 3)
    )
    np.testing.assert_allclose(values.beta, 6.0)
    np.testing.assert_allclose(values.omega, 0.0, atol=1e-12)


def test_genius_is_the_moment_with_a_constant_effect_and_lewbel_its_linear_form():
    y, a, z, X = draw(20000, 6)
    B = affine(X)
    pi = LogisticRegression(C=np.inf, tol=1e-10).fit(X, z).predict_proba(X)[:, 1]
    p = np.empty_like(a)
    for arm in (0, 1):
        rows = z == arm
        p[rows] = LogisticRegression(C=np.inf, tol=1e-10).fit(X[rows], a[rows]).predict_proba(X[rows])[:, 1]
    by_hand = ((z - pi) * (a - p) @ y) / ((z - pi) * (a - p) @ a)
    assert genius(y, a, z, X).estimate == pytest.approx(by_hand, abs=1e-4)

    # with a mean instrument and a linear first stage the same moment, Y net of the exogenous, is Lewbel's
    exogenous = np.column_stack([z, B])
    net = [c - exogenous @ np.linalg.lstsq(exogenous, c, rcond=None)[0] for c in (a, y)]
    made = (z - z.mean()) * net[0]
    made = made - exogenous @ np.linalg.lstsq(exogenous, made, rcond=None)[0]
    assert lewbel(y, a, z, X).estimate == pytest.approx(moment_ratio(made, a, y, "").estimate, abs=1e-8)


def test_two_stage_least_squares_by_its_two_stages():
    y, a, z, X = draw(800, 7)
    first = np.column_stack([z, affine(X)])
    fitted = first @ np.linalg.lstsq(first, a, rcond=None)[0]
    second = np.column_stack([fitted, affine(X)])
    expected = np.linalg.lstsq(second, y, rcond=None)[0][0]
    assert two_stage_least_squares(y, a, z, X).estimate == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("options", "known", "message"),
    [
        ({"cov": "robust"}, {}, "cov"),
        ({"n_bootstrap": 1}, {}, "n_bootstrap"),
        ({"trim_z": 0.5}, {}, "trim_z"),
        ({"trim_d": -1.0}, {}, "trim_d"),
        ({}, {"pi": np.full(3, 0.5)}, "pi"),
        ({}, {"pi": np.full(200, 1.0)}, "pi"),
        ({}, {"p": np.full((2, 200), 1.5)}, "p must"),
        ({}, {"p": np.full((2, 200), np.nan)}, "p holds"),
    ],
)
def test_bad_options_are_named(options, known, message):
    with pytest.raises(ValueError, match=message):
        MultiplyRobustIVATE(**options).fit(*draw(200, 0), **known)
