"""Dictionaries: bounds and optimality of their errors, the criterion's identities, hyper-reduction, refusals."""

import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression

from locally.subspaces.local_bases import (
    Budget,
    LocalReducedBases,
    SnapshotSet,
    efficiency_criterion,
    empirical_cubature,
    projection_error_clusters,
    q_deim,
    required_accuracy,
    sine_dissimilarity,
)
from locally.subspaces.local_bases.criterion import coordinates_of
from locally.subspaces.local_bases.problems import simulate

few_members = pytest.mark.filterwarnings("ignore:clusters .* have at most twice:UserWarning")


@pytest.fixture(scope="module")
def poisson():
    return simulate("Poisson", 150, 0)


# Dictionaries


@few_members
def test_two_directions_at_any_amplitude_get_exact_bases_of_one_mode():
    S = np.array([[1.0, 0, 0], [-1, 0, 0], [100, 0, 0], [-100, 0, 0], [0, 1, 0], [0, -1, 0], [0, 100, 0], [0, -100, 0]])
    dictionary = LocalReducedBases(2, 1, random_state=0).fit(S)
    assert dictionary.inertia_ == 0
    assert dictionary.projection_error(S).max() < 1e-14
    euclidean = LocalReducedBases(2, 1, dissimilarity="euclidean", random_state=0).fit(S)
    assert euclidean.projection_error(S, euclidean.labels_).max() > 0.1


@few_members
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_no_error_exceeds_the_distance_to_the_medoid(seed):
    """A basis that contains the medoid does at least as well as the medoid alone: d_1 <= radius of the cluster."""
    rng = np.random.default_rng(seed)
    S = rng.standard_normal((20, 10)) * 10.0 ** rng.uniform(-3, 3, (20, 1))
    D = sine_dissimilarity(S)
    dictionary = LocalReducedBases(3, None, random_state=0).fit(S)
    errors = dictionary.errors(S)
    for k, medoid in enumerate(dictionary.medoid_indices_):
        assert (errors[:, k] <= D[:, medoid] + 1e-9).all()
    assert dictionary.errors(S)[np.arange(20), dictionary.labels_].max() < 1e-7


@few_members
@pytest.mark.parametrize("product", ["none", "weights", "sparse"])
def test_bases_are_orthonormal_and_leave_what_eckart_and_young_say(product):
    rng = np.random.default_rng(0)
    T = sp.csr_array(sp.diags_array([-1.0, 3.0, -1.0], offsets=[-1, 0, 1], shape=(40, 40)))
    given_as = {"none": None, "weights": rng.uniform(1, 3, 40), "sparse": T}[product]
    M = {"none": np.eye(40), "weights": np.diag(given_as) if product == "weights" else None, "sparse": T.toarray()}[
        product
    ]
    S = rng.standard_normal((30, 6)) @ rng.standard_normal((6, 40)) + 0.1 * rng.standard_normal((30, 40))
    dictionary = LocalReducedBases(2, 4, product=given_as, random_state=0).fit(S)
    for k in range(2):
        V, members = dictionary.bases_[k], dictionary.labels_ == k
        np.testing.assert_allclose(V.T @ M @ V, np.eye(4), atol=1e-10)
        unit = S[members] / np.sqrt(np.einsum("ni,ij,nj->n", S[members], M, S[members]))[:, None]
        s = np.linalg.svd(unit @ np.linalg.cholesky(M), compute_uv=False)
        mean_square = (dictionary.errors(S)[members, k] ** 2).mean()
        assert mean_square == pytest.approx((s[4:] ** 2).sum() / members.sum(), rel=1e-8)
        np.testing.assert_allclose(dictionary.singular_values_[k], s[:4], rtol=1e-8)
        u = S[:3].T
        residual = u - dictionary.reconstruct(dictionary.reduce(u, k), k)
        relative = np.sqrt(np.einsum("in,ij,jn->n", residual, M, residual) / np.einsum("in,ij,jn->n", u, M, u))
        np.testing.assert_allclose(relative, dictionary.errors(S[:3])[:, k], rtol=1e-8)


def test_fewer_modes_of_a_basis_are_the_smaller_basis(poisson):
    S = poisson.snapshots
    large, small = (LocalReducedBases(4, N, random_state=0).fit(S) for N in (6, 2))
    np.testing.assert_allclose(large.errors(S, 2), small.errors(S), atol=1e-10)


def test_new_simulations_get_bases_by_classifier_medoid_or_error(poisson):
    S, where = poisson.snapshots, poisson.parameters
    dictionary = LocalReducedBases(6, 4, random_state=0).fit(S[:100], where[:100])
    new = S[100:]
    np.testing.assert_array_equal(dictionary.assign(S[:100]), dictionary.labels_)
    assert (dictionary.predict(where[100:]) == dictionary.assign(new)).mean() > 0.9
    best, assigned, predicted = (
        dictionary.projection_error(new, how, where[100:]) for how in ("best", "assigned", "predicted")
    )
    assert (best <= assigned).all()
    assert (best <= predicted).all()
    np.testing.assert_array_equal(dictionary.projection_error(new, dictionary.oracle(new)), best)
    # amplitudes and signs play no part
    np.testing.assert_array_equal(dictionary.assign(-1e6 * new), dictionary.assign(new))
    whole = LocalReducedBases(1, 4).fit(S[:100])
    assert best.mean() < 0.3 * whole.projection_error(new).mean()


def test_more_labels_can_come_from_cheap_simulations(poisson):
    S, where = poisson.snapshots, poisson.parameters
    dictionary = LocalReducedBases(5, 2, random_state=0).fit(S[:60], where[:60])
    before = (dictionary.predict(where[100:]) == dictionary.assign(S[100:])).mean()
    labels = dictionary.assign(S[:100])
    dictionary.classifier_ = dictionary.train(where[:100], labels)
    assert (dictionary.predict(where[100:]) == dictionary.assign(S[100:])).mean() >= before - 0.04


@few_members
def test_trajectories_stay_whole():
    S = simulate("Burgers", 40, 0).snapshots
    dictionary = LocalReducedBases(3, 5, random_state=0).fit(S[:30])
    assert dictionary.labels_.shape == (30,)
    errors = dictionary.errors(S[30:])
    for i, u in enumerate(S[30:]):
        for k, V in enumerate(dictionary.bases_):
            assert errors[i, k] == pytest.approx(np.linalg.norm(u - V @ (V.T @ u)) / np.linalg.norm(u), rel=1e-9)


@few_members
def test_snapshots_larger_than_memory_give_the_same_dictionary(tmp_path, poisson):
    S = poisson.snapshots
    np.save(tmp_path / "s.npy", S)
    options = {"n_clusters": 3, "n_modes": 3, "random_state": 0}
    memory = LocalReducedBases(**options, svd="svd").fit(S)
    disk = LocalReducedBases(**options, memory_limit=200_000).fit(tmp_path / "s.npy")
    np.testing.assert_array_equal(disk.labels_, memory.labels_)
    np.testing.assert_allclose(disk.errors(tmp_path / "s.npy"), memory.errors(S), rtol=1e-4)


def test_normalisation_keeps_large_amplitudes_from_taking_the_basis():
    rng = np.random.default_rng(1)
    S = np.vstack([1e4 * rng.standard_normal((3, 1)) * np.eye(6)[0], rng.standard_normal((9, 6))])
    unit, raw = (LocalReducedBases(1, 1, normalize=how).fit(S) for how in (True, False))
    assert abs(raw.bases_[0][0, 0]) > 0.999
    assert unit.errors(S[3:]).mean() < raw.errors(S[3:]).mean()


@few_members
def test_overlap_lends_the_nearest_simulations_of_other_clusters(poisson):
    S = poisson.snapshots[:60]
    alone, shared = (LocalReducedBases(4, 3, overlap=q, random_state=0).fit(S) for q in (0.0, 0.2))
    for k in range(4):
        own, more = alone.members(k), shared.members(k)
        assert set(own) < set(more)
        assert len(more) == len(own) + round(0.2 * (60 - len(own)))


def test_classifier_product_and_callbacks_are_the_caller_s(poisson):
    seen = []
    dictionary = LocalReducedBases(
        3,
        2,
        classifier=LogisticRegression(),
        hyper_reduction=lambda basis, rows, k: (k, q_deim(basis), rows.shape),
        callback=lambda stage, fraction: seen.append((stage, fraction)),
        random_state=0,
    )
    copy = clone(dictionary).fit(poisson.snapshots[:50], poisson.parameters[:50])
    assert isinstance(copy.classifier_, LogisticRegression)
    assert [k for k, *_ in copy.hyper_reductions_] == [0, 1, 2]
    for k, interpolation, shape in copy.hyper_reductions_:
        assert shape == ((copy.labels_ == k).sum(), 900)
        V = copy.bases_[k]
        np.testing.assert_allclose(interpolation(V[interpolation.points]), V, atol=1e-10)
    fractions = [f for _, f in seen]
    assert fractions == sorted(fractions)
    assert seen[-1] == ("done", 1.0)


@pytest.mark.parametrize(
    ("options", "fit", "message"),
    [
        ({"n_clusters": 9}, {}, "n_clusters=9 must not exceed"),
        ({"n_modes": 0}, {}, "n_modes must be at least 1"),
        ({"tol": 2.0}, {}, "tol must lie in"),
        ({"dissimilarity": "cosine"}, {}, "dissimilarity must be one of"),
        ({"overlap": 1.5}, {}, "overlap must lie in"),
        ({"svd": "fast"}, {}, "svd must be one of"),
        ({}, {"y": np.ones(3)}, r"parameters must have shape \(8, d\)"),
        ({}, {"y": np.full(8, np.nan)}, "parameters holds NaN"),
        ({}, {"labels": np.zeros(8, int)}, r"labels must be 8 integers that use each of 0 .. 1"),
        ({"dissimilarity": "precomputed"}, {}, "D must be given"),
        ({"dissimilarity": "precomputed"}, {"D": np.zeros((3, 3))}, r"D must have shape \(8, 8\)"),
        ({}, {"D": np.zeros((8, 8))}, "D must be given for"),
    ],
)
def test_bad_dictionaries_are_named(options, fit, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        LocalReducedBases(**{"n_clusters": 2, "n_modes": 1} | options).fit(np.eye(8), **fit)


def test_bad_questions_are_named(poisson):
    dictionary = LocalReducedBases(2, 2, random_state=0).fit(poisson.snapshots[:20])
    with pytest.raises(ValueError, match="without parameters there is no classifier"):
        dictionary.predict(np.ones((1, 2)))
    with pytest.raises(ValueError, match="snapshots have 3 unknowns"):
        dictionary.errors(np.ones((2, 3)))
    with pytest.raises(ValueError, match="k must be a cluster, 0 to 1, got 2"):
        dictionary.reduce(np.ones(900), 2)
    with pytest.raises(ValueError, match="labels must have shape"):
        dictionary.projection_error(poisson.snapshots[:2], np.zeros(3, int))
    with pytest.warns(UserWarning, match="at most twice as many simulations as modes"):
        LocalReducedBases(5, 4, random_state=0).fit(poisson.snapshots[:20])


# The criterion


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_at_the_required_accuracy_both_are_equally_good(e_in, e_out, e_global):
    a = required_accuracy(e_in, e_out, e_global)
    if abs(e_out - e_in) < 1e-6:
        return
    assert a * e_in + (1 - a) * e_out == pytest.approx(e_global, abs=1e-9)
    if e_in < e_out:  # up to rounding: in [0, 1] where the global basis lies between, beyond it where it does not
        assert (a > 1 - 1e-9) or e_global >= e_in
        assert (a < 1 + 1e-9) or e_global < e_in
        assert (a < 1e-9) or e_global <= e_out
        assert (a > -1e-9) or e_global > e_out


def test_one_cluster_is_the_global_basis_and_needs_no_accuracy(poisson):
    row = efficiency_criterion(poisson.snapshots[:40], [1], [3], poisson.parameters[:40], random_state=0).rows[0]
    assert row.e_in == pytest.approx(row.e_global, rel=1e-12)
    assert math.isnan(row.required_accuracy)
    assert row.accuracy == 1
    assert not row.relevant


def test_its_errors_are_those_of_dictionaries_built_without_the_simulation(poisson):
    """Leave-one-out by hand, in full dimension, against Gram matrices in coordinates."""
    S, N = poisson.snapshots[:24], 3
    row = efficiency_criterion(S, [2], [N], random_state=0).rows[0]
    whole = [LocalReducedBases(1, N).fit(np.delete(S, i, 0)).errors(S[i : i + 1])[0, 0] for i in range(24)]
    assert row.e_global == pytest.approx(np.mean(whole), rel=1e-6)
    dictionary = LocalReducedBases(2, N, random_state=0).fit(S)
    inside, outside = [], []
    for i, k in enumerate(dictionary.labels_):
        others = np.setdiff1d(np.flatnonzero(dictionary.labels_ == k), [i])
        inside.append(LocalReducedBases(1, N).fit(S[others]).errors(S[i : i + 1])[0, 0])
        outside.append(dictionary.errors(S[i : i + 1])[0, 1 - k])
    assert row.e_in == pytest.approx(np.mean(inside), rel=1e-6)
    assert row.e_out == pytest.approx(np.mean(outside), rel=1e-6)
    assert math.isnan(row.accuracy)


def test_wrong_bases_may_be_any_the_nearest_or_as_the_classifier_confuses(poisson):
    table = efficiency_criterion(poisson.snapshots, [2, 6], [4], poisson.parameters, random_state=0)
    two, six = table.rows
    assert two.e_out_by["nearest"] == pytest.approx(two.e_out_by["uniform"])  # there is one other only
    assert six.e_out_by["nearest"] < six.e_out_by["uniform"]
    assert table.under("nearest").rows[1].e_out == six.e_out_by["nearest"]
    assert six.relevant
    assert six.gain == pytest.approx(1 - six.expected_error() / six.e_global)
    assert six.expected_error(six.required_accuracy) == pytest.approx(six.e_global)
    assert "a*" in str(table)
    assert six.to_dict()["required_accuracy"] == six.required_accuracy


def test_a_budget_and_a_target_choose_from_the_table(poisson):
    budget = Budget(total=90.0, simulation=1.0, reduced_model=lambda N: N**2 / 4, label=0.1, n_labels=50)
    table = efficiency_criterion(
        poisson.snapshots, [1, 3, 6], [2, 4], poisson.parameters, n_simulations=[50, 80], budget=budget, random_state=0
    )
    assert len(table.rows) == 12
    for row in table.rows:
        assert row.offline_cost == pytest.approx(row.n_simulations + row.n_clusters * row.n_modes**2 / 4 + 5)
    best = table.best()
    assert best.offline_cost <= 90
    assert all(best.expected_error() <= r.expected_error() for r in table.rows
               if r.offline_cost <= 90 and r.smallest_cluster > 2 * r.n_modes)  # fmt: skip
    nothing = Budget(total=1.0, simulation=1.0, reduced_model=lambda N: 0.0)
    table = efficiency_criterion(poisson.snapshots, [3], [2, 4, 8], budget=nothing, random_state=0)
    assert table.best() is None
    local, whole = table.dimensions(0.2)[3]
    assert local < (whole or 9)
    assert table.dimensions(1e-9)[3] == (None, None)


@few_members
def test_the_criterion_handles_trajectories_and_disk(tmp_path):
    S = simulate("Burgers", 30, 1)
    rows = efficiency_criterion(S.snapshots, [2], [4, 8], S.parameters, random_state=0).rows
    assert rows[0].e_in > rows[1].e_in > 0
    np.save(tmp_path / "s.npy", S.snapshots)
    disk = efficiency_criterion(
        tmp_path / "s.npy", [2], [4, 8], S.parameters, random_state=0, memory_limit=1_000_000
    ).rows
    for a, b in zip(rows, disk):
        assert (a.e_in, a.e_out, a.e_global) == pytest.approx((b.e_in, b.e_out, b.e_global), rel=1e-5)


def test_coordinates_keep_all_inner_products(poisson):
    S = SnapshotSet(poisson.snapshots[:30])
    for limit in (2**30, 100_000):
        simulations = SnapshotSet(poisson.snapshots[:30], memory_limit=limit)
        C = coordinates_of(simulations)
        np.testing.assert_allclose(C @ C.T, S.unit() @ S.unit().T, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_clusters": [30]}, "n_clusters=30"),
        ({"n_modes": [0]}, "n_modes"),
        ({"n_simulations": [99]}, "n_simulations must not exceed the 20"),
        ({"confusion": "random"}, "confusion must be one of"),
        ({"confusion": "classifier"}, "parameters must be given"),
        ({"folds": 1}, "folds must be at least 2"),
    ],
)
def test_bad_grids_are_named(arguments, message, poisson, without_shape_checks):
    grid = {"n_clusters": [2], "n_modes": [2]} | arguments
    with pytest.raises(ValueError, match=message):
        efficiency_criterion(poisson.snapshots[:20], **grid)


# Clustering by projection error


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_lloyd_iterations_never_raise_the_cost_and_keep_all_clusters(seed):
    S = np.random.default_rng(seed).standard_normal((25, 8))
    found = projection_error_clusters(S, 4, 2, n_init=2, random_state=0)
    assert (np.diff(found.costs) <= 1e-9).all()
    assert set(found.labels) == {0, 1, 2, 3}


def test_it_starts_from_given_labels_and_improves_on_them(poisson):
    S = poisson.snapshots[:80]
    sine = LocalReducedBases(4, 3, random_state=0).fit(S)
    own = (sine.errors(S)[np.arange(80), sine.labels_] ** 2).sum()
    found = projection_error_clusters(S, 4, 3, start=sine.labels_, n_init=0)
    assert found.costs[-1] <= own + 1e-9
    with pytest.raises(ValueError, match="start must hold 80 labels"):
        projection_error_clusters(S, 4, 3, start=np.full(80, 7))


# Hyper-reduction


def test_interpolation_is_exact_on_its_span_and_bounded_elsewhere():
    rng = np.random.default_rng(2)
    V = np.linalg.qr(rng.standard_normal((60, 5)))[0]
    f = rng.standard_normal(60)
    best = np.linalg.norm(f - V @ (V.T @ f))
    for p in (5, 12, 60):
        rule = q_deim(V, p)
        assert len(set(rule.points)) == p
        np.testing.assert_allclose(rule(V[rule.points] @ np.arange(5.0)), V @ np.arange(5.0), atol=1e-10)
        assert np.linalg.norm(f - rule(f[rule.points])) <= rule.amplification * best * (1 + 1e-9)
    assert q_deim(V, 60).amplification == pytest.approx(1)
    assert q_deim(V, 12).amplification < q_deim(V, 5).amplification
    with pytest.raises(ValueError, match="full column rank"):
        q_deim(np.column_stack([V[:, 0], V[:, 0]]))
    with pytest.raises(ValueError, match="n_points must be at least 5"):
        q_deim(V, 4)


def test_few_weighted_elements_integrate_as_all_do():
    rng = np.random.default_rng(3)
    x = (np.arange(400) + 0.5) / 400
    integrands = np.column_stack([np.sin(k * x) for k in rng.uniform(0, 6, 30)])
    weights = rng.uniform(0.5, 1.5, 400) / 400
    rule = empirical_cubature(integrands, weights, tol=1e-7)
    assert len(rule.elements) < 20
    assert (rule.weights > 0).all()
    np.testing.assert_allclose(rule(integrands[rule.elements]), weights @ integrands, atol=1e-5)
    assert rule(np.ones(len(rule.elements))) == pytest.approx(weights.sum(), rel=1e-5)
    with pytest.raises(ValueError, match="weights must be positive"):
        empirical_cubature(integrands, -weights)


@few_members
def test_a_hyper_reduced_local_model_solves_the_nonlinear_problem():
    """-(k (1 + u^2) u')' = q on one local basis, its flux term interpolated at a few points: Newton in 6 unknowns."""
    found = simulate("nonlinear diffusion", 120, 0)
    keep = (found.parameters[:, 0] > 0.3) & (found.parameters[:, 0] < 0.4)
    u = found.snapshots[keep]
    nodes, h = u.shape[1], 1 / (u.shape[1] + 1)
    faces = h * (np.arange(nodes + 1) + 0.5)
    train, (c, load) = u[1:], found.parameters[keep][0]
    V = LocalReducedBases(1, 6, tol=0.0).fit(train).bases_[0]
    k = 1 - 0.98 * np.exp(-(((faces - c) / 0.03) ** 2))
    A = (np.diag(k[1:] + k[:-1]) - np.diag(k[1:-1], 1) - np.diag(k[1:-1], -1)) / h**2
    cubic = q_deim(np.linalg.svd((train**3).T, full_matrices=False)[0][:, :6], 9)
    z, projected = np.zeros(6), V.T @ A @ V
    for _ in range(30):
        at = V[cubic.points] @ z
        residual = projected @ z + V.T @ A @ cubic(at**3) / 3 - V.T @ np.full(nodes, 10**load)
        z = z - np.linalg.solve(projected + V.T @ A @ cubic(np.diag(at**2) @ V[cubic.points]), residual)
    assert np.linalg.norm(V @ z - u[0]) < 0.1 * np.linalg.norm(u[0])
