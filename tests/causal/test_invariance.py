"""Moments, the search against brute force, certificates, reference vectors, and what bad input gets."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.linear_model import LinearRegression

from locally.causal.invariance import (
    ConstantColumn,
    EnvironmentMoments,
    InterventionLaw,
    InvarianceStatus,
    InvariantSubsetRegressor,
    LatentObservation,
    LinearInvariantRepresentation,
    NoInvariantRepresentation,
    ReusedEnvironment,
    SingularCovariance,
    TooFewEnvironments,
    TooFewRows,
    extrapolation_factor,
    moment_rank,
    random_sem,
    search_subsets,
    stack_environments,
)
from locally.causal.invariance.linear import penalised_risk
from locally.causal.invariance.moments import bootstrap_radius
from locally.causal.invariance.search import constrained_head


def world(seed, d=8, sites=2, kind="soft", in_degree=2):
    """A law of interventions, one on a child of the target, and a generator."""
    rng = np.random.default_rng(seed)
    sem = random_sem(d, in_degree, rng)
    child = int(sem.children(sem.target)[0])
    others = [int(j) for j in rng.permutation(sem.covariates) if j != child and len(sem.parents(j)) == in_degree]
    return InterventionLaw(sem, (child, *others[: sites - 1]), kind), rng


def moments_of(law, n, rng, scale=1.0):
    law = InterventionLaw(law.sem, law.sites, law.kind, scale=scale)
    return EnvironmentMoments.from_covariances(law.sem.covariances(law.draw(n, rng)), law.sem.target)


def rows_of(law, n, each, rng, first=0):
    factors = np.linalg.cholesky(law.sem.covariances(law.draw(n, rng)))
    table = np.concatenate([rng.standard_normal((each, len(L))) @ L.T for L in factors])
    return table[:, law.sem.covariates], table[:, law.sem.target], first + np.repeat(np.arange(n), each)


# Moments and gaps -----------------------------------------------------------------------------------------------------


def test_moments_are_the_weighted_averages_they_are_said_to_be():
    rng = np.random.default_rng(0)
    labels = np.array(["b", "a"] * 20 + ["c"] * 7)
    X, y = rng.standard_normal((47, 3)) * [1, 5, 0.1] + 4, rng.standard_normal(47)
    moments = EnvironmentMoments.from_rows(X, y, labels)
    assert moments.labels == ("a", "b", "c")
    np.testing.assert_array_equal(moments.rows, [20, 20, 7])
    Z = np.column_stack([np.ones(47), (X - moments.centre[:-1]) / moments.scale[:-1]])
    t = (y - moments.centre[-1]) / moments.scale[-1]
    for e, name in enumerate("abc"):
        rows = labels == name
        np.testing.assert_allclose(moments.xx[e], Z[rows].T @ Z[rows] / rows.sum(), atol=1e-12)
        np.testing.assert_allclose(moments.xy[e], Z[rows].T @ t[rows] / rows.sum(), atol=1e-12)
        np.testing.assert_allclose(moments.yy[e], t[rows] @ t[rows] / rows.sum(), atol=1e-12)
    np.testing.assert_allclose(np.diagonal(moments.pooled()[0]), 1, atol=1e-12)
    again = moments.like_rows(X[labels != "b"], y[labels != "b"], labels[labels != "b"])
    np.testing.assert_allclose(again.second(), moments.second()[[0, 2]], atol=1e-12)


def test_parents_have_no_gap_and_an_intervened_child_has():
    law, rng = world(3)
    sem, moments = law.sem, moments_of(law, 20, rng, scale=3.0)
    eye = np.eye(8)
    parents = sem.parents(sem.target)
    Phi = eye[np.searchsorted(sem.covariates, parents)]
    assert moments.gaps(Phi, sem.coefficients[sem.target, parents]).max() < 1e-11 * moments.xx.max()
    with_child = eye[np.searchsorted(sem.covariates, [*parents, law.sites[0]])]
    S, s, _ = moments.pooled()
    w = np.linalg.solve(with_child @ S @ with_child.T, with_child @ s)
    assert moments.gaps(with_child, w).max() > 0.1


@given(seed=st.integers(0, 10**6), r=st.integers(1, 4))
def test_gap_gives_the_excess_risk_over_the_best_head(seed, r):
    law, rng = world(seed % 50)
    moments = moments_of(law, 3, rng)
    Phi = np.linalg.qr(rng.standard_normal((8, r)))[0].T
    w = rng.standard_normal(r)
    for e in range(3):
        S, s = Phi @ moments.xx[e] @ Phi.T, Phi @ moments.xy[e]
        best = np.linalg.solve(S, s)
        g = S @ w - s
        excess = moments.risks(Phi.T @ w)[e] - moments.risks(Phi.T @ best)[e]
        np.testing.assert_allclose(excess, g @ np.linalg.solve(S, g), rtol=1e-7)
        np.testing.assert_allclose(moments.gaps(Phi, w)[e], np.linalg.norm(g), rtol=1e-9)
        assert moments.gaps(Phi, best)[e] < 1e-9


def test_sampling_radii_cover_the_population_gap():
    law, rng = world(1)
    sem = law.sem
    population = moments_of(law, 4, rng)
    Phi = np.eye(8)[[0, 3, 5]]
    w = np.array([0.5, -0.3, 0.2])
    truth = population.gradients(Phi.T @ w) @ Phi.T
    factors = np.linalg.cholesky(population.second())
    outside = 0
    for _ in range(500):
        table = np.concatenate([rng.standard_normal((200, 9)) @ L.T for L in factors])
        drawn = EnvironmentMoments.from_rows(
            table[:, :-1], table[:, -1], np.repeat(np.arange(4), 200), intercept=False, standardize=False
        )
        off = np.linalg.norm(drawn.gradients(Phi.T @ w) @ Phi.T - truth, axis=1)
        outside += bool((off > drawn.sampling_radius(Phi, w, eta=0.1)).any())
    assert outside <= 50
    Z = table[:200, :-1] @ Phi.T
    radius = bootstrap_radius(Z, Z @ w - table[:200, -1], 0.1 / 4, rng)
    assert 0.3 < radius / drawn.sampling_radius(Phi, w, eta=0.1)[0] < 1.1  # no union over entries: shorter
    assert sem.nodes == 9


# Search ---------------------------------------------------------------------------------------------------------------


def brute_force(moments, max_size, eps):
    """The definition, one subset after the other."""
    S, s, _ = moments.pooled()
    best = (np.inf, ())
    for size in range(max_size + 1):
        for subset in combinations(range(moments.features), size):
            Phi = np.eye(moments.features)[list(subset)]
            w = np.linalg.solve(Phi @ S @ Phi.T, Phi @ s)
            if moments.gaps(Phi, w).max(initial=0) <= eps:
                best = min(best, (moments.risks(Phi.T @ w).mean(), subset))
    return best


@pytest.mark.parametrize("eps", [0.02, 0.15, 0.6, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_search_finds_what_brute_force_finds(seed, eps):
    law, rng = world(seed)
    moments = moments_of(law, 5, rng)
    found = search_subsets(moments, 3, eps)
    risk, subset = brute_force(moments, 3, eps)
    assert found.support == subset
    np.testing.assert_allclose(found.risk, risk, rtol=1e-10)
    assert found.status is InvarianceStatus.INVARIANT
    assert found.candidates == 1 + 8 + 28 + 56
    wide = search_subsets(moments, 3, eps, search="beam", beam=10_000)
    assert wide.support == subset
    narrow = search_subsets(moments, 3, eps, search="beam", beam=4)
    assert narrow.gaps.max(initial=0) <= eps
    assert narrow.risk >= risk - 1e-12


def test_one_environment_or_an_infinite_eps_is_best_subset_regression():
    law, rng = world(5)
    moments = moments_of(law, 6, rng)
    single = search_subsets(moments.select(np.array([0])), 8, 0.1)
    v = np.zeros(8)
    v[list(single.support)] = single.head
    np.testing.assert_allclose(v, np.linalg.solve(moments.xx[0], moments.xy[0]), atol=1e-10)
    X, y, environments = rows_of(law, 3, 50, rng)
    everything = InvariantSubsetRegressor(eps=1e9).fit(X, y, environments)
    ols = LinearRegression().fit(X, y)  # equal sizes: pooling rows and averaging environments agree
    np.testing.assert_allclose(everything.coef_, ols.coef_, rtol=1e-8)
    np.testing.assert_allclose(everything.intercept_, ols.intercept_, atol=1e-9)
    np.testing.assert_allclose(everything.predict(X), ols.predict(X), rtol=1e-7)
    np.testing.assert_allclose(everything.risk_, np.mean((ols.predict(X) - y) ** 2), rtol=1e-9)


def test_moved_heads_meet_the_constraint_and_lower_the_risk():
    gains = []
    for seed in range(6):
        law, rng = world(seed)
        moments = moments_of(law, 5, rng)
        pooled = search_subsets(moments, 3, 0.15)
        moved = search_subsets(moments, 3, 0.15, move_heads=True)
        assert moved.gaps.max(initial=0) <= 0.15
        assert moved.risk <= pooled.risk + 1e-12
        gains.append(pooled.risk - moved.risk)
    assert max(gains) > 1e-3


def test_constrained_head_is_the_optimum_on_one_covariate():
    # (S_e - s_e)^2 <= eps^2 on a line: the pooled head 1.5 is pulled to the edge of the interval of both environments.
    covariances = np.array([[[1.0, 1.0], [1.0, 9.0]], [[1.0, 2.0], [2.0, 9.0]]])
    moments = EnvironmentMoments.from_covariances(covariances, target=1)
    head = constrained_head(moments, np.array([0]), np.array([1.5]), np.array([0.2, 0.9]))
    np.testing.assert_allclose(head, [1.2], atol=1e-5)


def test_infeasible_search_says_so_and_keeps_the_least_gap():
    rng = np.random.default_rng(0)
    environments = np.repeat(np.arange(3), 400)
    x = rng.standard_normal(1200)
    y = x + 3.0 * environments + rng.standard_normal(1200)  # the level of y moves: the constant itself has a gap
    with pytest.warns(NoInvariantRepresentation, match="largest gap"):
        model = InvariantSubsetRegressor(eps=0.05).fit(x[:, None], y, environments)
    assert not model.feasible_
    assert model.status_ is InvarianceStatus.INFEASIBLE
    assert model.certificate_.uniform == 1.0
    assert model.gaps_.max() > 0.05


# Certificates ---------------------------------------------------------------------------------------------------------


def test_golden_vectors(golden):
    z = np.load(golden / "25-invariant-representations" / "inv_a.npz", allow_pickle=False)
    target = int(z["y"])
    model = InvariantSubsetRegressor(float(z["eps"]), max_size=3, standardize=False)
    model.fit_moments(z["train_cov"], target)
    covariates = np.delete(np.arange(9), target)
    np.testing.assert_array_equal(covariates[list(model.support_)], z["subset"])
    np.testing.assert_allclose(model.head_, z["w"], rtol=1e-8)
    np.testing.assert_allclose(model.risk_, z["pooled_risk"], rtol=1e-10)
    np.testing.assert_allclose(model.gaps_.max(), z["train_max_grad"], atol=1e-12)
    unseen = model.moments_.like_covariances(z["test_cov"], target)
    np.testing.assert_allclose(unseen.gaps(model.representation_, model.head_), z["test_grad"], atol=1e-12)
    certificate = model.certify_moments(z["test_cov"], target)
    assert certificate.holdout_violations == 50 * float(z["test_violation"])
    np.testing.assert_allclose(certificate.holdout, 1 - 0.05 ** (1 / 50))


@pytest.mark.parametrize("seed", range(3))
def test_extrapolation_covers_every_subset_on_strong_interventions(seed):
    law, rng = world(seed)
    training = moments_of(law, 16, rng)
    new = moments_of(law, 10, rng, scale=20.0)
    factors = [extrapolation_factor(training.second(), second) for second in new.second()]
    assert np.isfinite(factors).all()
    for size in (1, 2, 3):
        Phi = np.eye(8)[rng.choice(8, size, replace=False)]
        w = rng.standard_normal(size)
        assert (new.gaps(Phi, w) <= np.array(factors) * training.gaps(Phi, w).max() * (1 + 1e-6)).all()
    assert extrapolation_factor(training.second(), training.second()[3]) == pytest.approx(1, abs=1e-6) or (
        extrapolation_factor(training.second(), training.second()[3]) < 1
    )


def test_as_many_environments_as_dimensions_give_exact_invariance_and_one_fewer_does_not():
    law, rng = world(11, sites=1)
    training, new = moments_of(law, 4, rng), moments_of(law, 50, rng, scale=100.0)
    assert moment_rank(training) == law.family.lift_dimension == 4
    size = np.linalg.norm(new.second(), axis=(1, 2))
    exact = search_subsets(training, 8, 1e-9)
    Phi = np.eye(8)[list(exact.support)]
    assert (new.gaps(Phi, exact.head) / size).max() < 1e-9
    # Three of the four: some v has no gradient along itself on these but has one on the fourth.
    fewer = EnvironmentMoments.from_covariances(training.second()[:3], 8)
    model = LinearInvariantRepresentation(rank=1, eps=1e-5, restarts=2, random_state=0).fit_moments(fewer.second(), 8)
    assert model.feasible_
    assert new.gaps(model.representation_, model.head_).max() > 100 * model.eps_
    assert extrapolation_factor(fewer.second(), training.second()[3]) == np.inf


def test_covariates_alone_certify_an_environment_whose_target_nobody_saw():
    law, rng = world(1)
    target = law.sem.target
    model = InvariantSubsetRegressor(0.15, max_size=3).fit_moments(law.sem.covariances(law.draw(16, rng)), target)
    strong = InterventionLaw(law.sem, law.sites, scale=5.0)
    new = law.sem.covariances(strong.draw(10, rng))
    alone = np.delete(np.delete(new, target, axis=1), target, axis=2)
    factors = model.unlabelled_extrapolation_factors(alone)
    np.testing.assert_allclose(factors, model.extrapolation_factors(new, target), rtol=1e-4)
    gaps = model.moments_.like_covariances(new, target).gaps(model.representation_, model.head_)
    assert (gaps <= factors * model.gaps_.max() + 1e-9).all()
    only_y_moves = np.array([np.diag([1.0, 1.0, v]) for v in (1.0, 2.0)])
    blind = InvariantSubsetRegressor(0.1).fit_moments(only_y_moves, 2)
    with pytest.raises(ValueError, match="without it the training moments span 1"):
        blind.unlabelled_extrapolation_factors(np.eye(2)[None])


def test_held_out_certificate_counts_new_environments_only():
    law, rng = world(2)
    X, y, environments = rows_of(law, 12, 1000, rng)
    model = InvariantSubsetRegressor(max_size=4, family=law.family).fit(X, y, environments)
    assert model.certificate_.lift_dimension == law.family.lift_dimension
    with pytest.raises(ReusedEnvironment, match="11"):
        model.certify(X, y, environments)
    held = rows_of(law, 40, 1000, rng, first=100)
    certificate = model.certify(*held)
    assert certificate.holdout_environments == 40
    assert certificate.holdout_violations == 0
    np.testing.assert_allclose(certificate.holdout, 1 - 0.025 ** (1 / 40))  # half of eta is left to the rows
    assert model.certify(*held, level=0.0).holdout == 1.0
    bootstrap = model.certify(*held, radius="bootstrap", random_state=0)
    assert bootstrap.holdout_violations <= 2
    with pytest.raises(ValueError, match="eta"):
        model.certify(*held, eta=0.0)
    gaps = model.invariance_gap(*held)
    assert gaps.shape == (40,)
    assert (gaps < certificate.holdout_level).all()
    assert model.extrapolation_factor(held[0][:1000], held[1][:1000]) > 0
    population, target = law.sem.covariances(law.draw(5, rng)), law.sem.target
    exact = InvariantSubsetRegressor(0.5).fit_moments(population, target)
    with pytest.raises(ReusedEnvironment):
        exact.certify_moments(population[:2], target)


def test_split_heads_make_the_finite_class_bound():
    law, rng = world(4)
    covariances = law.sem.covariances(law.draw(40, rng))
    model = InvariantSubsetRegressor(0.15, max_size=2, split=True).fit_moments(covariances, law.sem.target)
    assert len(model.gaps_) == model.certificate_.environments == 20
    np.testing.assert_allclose(model.certificate_.finite_class, (np.log(37) + np.log(20)) / 20)
    together = InvariantSubsetRegressor(0.15, max_size=2).fit_moments(covariances, law.sem.target)
    assert np.isnan(together.certificate_.finite_class)


# Linear representations -----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), r=st.integers(1, 3), constant=st.booleans())
def test_gradient_of_the_penalised_risk(seed, r, constant):
    rng = np.random.default_rng(seed)
    X, labels = rng.standard_normal((60, 4)) + 1, np.repeat(np.arange(3), 20)
    moments = EnvironmentMoments.from_rows(X, X[:, 0] + rng.standard_normal(60), labels, intercept=constant)
    M, w = rng.standard_normal((r, 4)), rng.standard_normal(r + constant)
    value, by_M, by_w = penalised_risk(moments, M, w, 0.1, 10.0)
    dM, dw = rng.standard_normal(M.shape), rng.standard_normal(w.shape)
    h = 1e-6
    up, down = (penalised_risk(moments, M + t * dM, w + t * dw, 0.1, 10.0)[0] for t in (h, -h))
    np.testing.assert_allclose((up - down) / (2 * h), (by_M * dM).sum() + by_w @ dw, rtol=1e-4, atol=1e-5 * abs(value))


def test_linear_map_sees_through_a_mixture_and_does_not_depend_on_it():
    law, rng = world(6)
    train, new = (law.sem.covariances(law.draw(n, rng)) for n in (16, 50))
    fits = []
    for _ in range(2):
        seen = LatentObservation(law.sem, rng.standard_normal((8, 8)))
        model = LinearInvariantRepresentation(rank=1, eps=1e-3, restarts=1).fit_moments(seen.observe(train), 8)
        assert model.feasible_
        S = model.moments_.pooled()[0]
        np.testing.assert_allclose(model.representation_ @ S @ model.representation_.T, np.eye(1), atol=1e-7)
        unseen = model.moments_.like_covariances(seen.observe(new), 8)
        assert unseen.gaps(model.representation_, model.head_).max() < 0.05
        fits.append(model.risk_)
    assert fits[0] == pytest.approx(fits[1], rel=0.02)
    latent = moments_of(law, 30, rng)
    observed = EnvironmentMoments.from_covariances(seen.observe(law.sem.covariances(law.draw(30, rng))), 8)
    assert moment_rank(observed) == moment_rank(latent)


def test_linear_map_keeps_the_constant_in_its_first_row():
    law, rng = world(7)
    X, y, environments = rows_of(law, 6, 300, rng)
    model = LinearInvariantRepresentation(rank=2, eps=0.2, restarts=1).fit(X + 5.0, y - 2.0, environments)
    assert model.representation_.shape == (3, 9)
    np.testing.assert_allclose(model.representation_[0], np.eye(9)[0], atol=1e-12)
    v = model.representation_.T @ model.head_
    Z = (X + 5.0 - model.moments_.centre[:-1]) / model.moments_.scale[:-1]
    direct = model.moments_.centre[-1] + model.moments_.scale[-1] * (v[0] + Z @ v[1:])
    np.testing.assert_allclose(model.predict(X + 5.0), direct, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(model.gaps_, model.invariance_gap(X + 5.0, y - 2.0, environments), atol=1e-10)


# Estimator conventions and bad input ----------------------------------------------------------------------------------


def test_estimators_clone_and_take_lists_of_environments():
    law, rng = world(8)
    X, y, environments = rows_of(law, 4, 100, rng)
    model = InvariantSubsetRegressor(eps=0.3, max_size=2)
    assert clone(model).get_params() == model.get_params()
    by_label = clone(model).fit(X, y, environments)
    pairs = [(X[environments == e], y[environments == e]) for e in range(4)]
    by_list = clone(model).fit_environments(pairs)
    np.testing.assert_array_equal(by_label.coef_, by_list.coef_)
    shuffled = rng.permutation(len(y))
    again = clone(model).fit(X[shuffled], y[shuffled], environments[shuffled])
    np.testing.assert_allclose(again.coef_, by_label.coef_, rtol=1e-9)


def test_fit_is_the_same_in_other_units():
    law, rng = world(9)
    X, y, environments = rows_of(law, 5, 200, rng)
    first = InvariantSubsetRegressor(max_size=3).fit(X, y, environments)
    scale = 10.0 ** rng.uniform(-3, 3, 8)
    second = InvariantSubsetRegressor(max_size=3).fit(X * scale + 7.0, 100 * y - 3.0, environments)
    assert first.support_ == second.support_
    np.testing.assert_allclose(second.coef_ * scale, 100 * first.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(second.gaps_, first.gaps_, rtol=1e-5, atol=1e-9)


def table():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 3))
    return X, X[:, 0] + rng.standard_normal(60), np.repeat(np.arange(3), 20)


@pytest.mark.parametrize("kind", [InvariantSubsetRegressor, LinearInvariantRepresentation])
def test_bad_tables_are_named(kind):
    X, y, environments = table()
    holed = X.copy()
    holed[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        kind().fit(holed, y, environments)
    with pytest.raises(ConstantColumn, match=r"columns \[1\]"):
        kind().fit(np.where(np.arange(3) == 1, 2.0, X), y, environments)
    with pytest.raises(ConstantColumn, match="y must vary"):
        kind().fit(X, np.ones(60), environments)
    with pytest.raises(TooFewEnvironments, match="at least 2"):
        kind().fit(X, y, np.zeros(60))
    with pytest.raises(TooFewRows, match=r"environment 2 has 4 rows"):
        kind().fit(X[:44], y[:44], environments[:44])
    with pytest.raises(SingularCovariance, match="depend on each other"):
        kind().fit(np.column_stack([X, X[:, 0] - X[:, 1]]), y, environments)
    with pytest.raises(ValueError, match="environments must have shape"):
        kind().fit(X, y, environments[:-1])
    with pytest.raises(ValueError, match="features"):
        kind(eps=1.0).fit(X, y, environments).predict(X[:, :2])
    with pytest.raises(ValueError, match="eps"):
        kind(eps=-1.0).fit(X, y, environments)
    with pytest.raises(ValueError, match="alpha"):
        kind(alpha=1.0).fit(X, y, environments)


def test_bad_settings_are_named():
    X, y, environments = table()
    with pytest.raises(ValueError, match="search"):
        InvariantSubsetRegressor(search="random").fit(X, y, environments)
    with pytest.raises(ValueError, match="head"):
        InvariantSubsetRegressor(head="best").fit(X, y, environments)
    with pytest.raises(TooFewEnvironments, match="split"):
        InvariantSubsetRegressor(split=True).fit(X, y, environments)
    with pytest.raises(ValueError, match="rank"):
        LinearInvariantRepresentation(rank=4).fit(X, y, environments)
    with pytest.raises(ValueError, match="eps must be given"):
        InvariantSubsetRegressor().fit_moments(np.array([np.eye(3), 2 * np.eye(3)]), 0)
    with pytest.raises(ValueError, match="symmetric"):
        InvariantSubsetRegressor(0.1).fit_moments(np.array([[[1.0, 0.5], [0.0, 1.0]]] * 2), 0)
    with pytest.raises(ValueError, match="environment 1"):
        stack_environments([(X, y), (X, y[:-1])])
    with pytest.raises(TooFewEnvironments):
        stack_environments([])
    with pytest.raises(ValueError, match="intercept"):
        InvariantSubsetRegressor().fit(X, y, environments).extrapolation_factors(np.array([np.eye(4)]), 0)


def test_callback_sees_progress_and_can_interrupt():
    law, rng = world(10)
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_subsets(moments_of(law, 4, rng), 3, 0.1, callback=stop)
    assert seen == [(1, 93), (9, 93), (37, 93)]
