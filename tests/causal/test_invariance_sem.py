"""Structural equation models, their moments against inverses and samples, and the bounds on what these span."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from locally.causal.invariance import (
    CyclicGraph,
    EnvironmentMoments,
    InterventionFamily,
    InterventionLaw,
    Interventions,
    LatentObservation,
    LinearSEM,
    TargetIntervened,
    agnostic_delta,
    finite_class_delta,
    holdout_delta,
    moment_rank,
    pac_delta,
    pac_environments,
    random_sem,
    unrestricted_lift_dimension,
    vc_dimension,
)


@given(seed=st.integers(0, 10**6), sites=st.integers(1, 4), shifts=st.booleans())
def test_batched_moments_are_those_of_the_intervened_models(seed, sites, shifts):
    rng = np.random.default_rng(seed)
    sem = random_sem(9, 2, rng).with_constant() if shifts else random_sem(9, 2, rng)
    allowed = np.setdiff1d(sem.covariates, [0] if shifts else [])
    chosen = tuple(rng.choice(allowed, sites, replace=False).tolist())
    law = InterventionLaw(sem, chosen, scale=2.0, shift_scale=float(shifts))
    drawn = law.draw(3, rng)
    for e, Sigma in enumerate(sem.covariances(drawn)):
        one = sem
        for i, j in enumerate(drawn.sites):
            one = one.intervene(int(j), drawn.coefficients[e, i], float(drawn.noise_var[e, i]))
        np.testing.assert_allclose(Sigma, one.covariance(), rtol=1e-8, atol=1e-9 * np.abs(Sigma).max())


def test_samples_have_the_moments_of_the_model():
    rng = np.random.default_rng(0)
    sem = random_sem(6, 2, rng).with_constant()
    sem = sem.intervene(3, np.where(np.arange(8) == 0, 2.0, sem.coefficients[3]), 1.0)
    rows = sem.sample(200_000, rng)
    assert (rows[:, 0] == 1).all()
    scale = np.sqrt(np.diagonal(sem.covariance()))
    rows /= scale
    np.testing.assert_allclose(rows.T @ rows / len(rows), sem.covariance() / np.outer(scale, scale), atol=0.02)


def test_hard_intervention_cuts_off_and_keeps_the_rest():
    sem = random_sem(8, 2, np.random.default_rng(1))
    site = int(sem.children(sem.target)[0])
    cut = sem.intervene(site, noise_var=2.0, hard=True)
    assert cut.covariance()[site, site] == pytest.approx(2.0)
    assert cut.covariance()[site, sem.target] == pytest.approx(0.0, abs=1e-12)
    assert (np.delete(cut.coefficients, site, axis=0) == np.delete(sem.coefficients, site, axis=0)).all()


def test_random_models_have_the_shape_that_was_asked_for():
    rng = np.random.default_rng(2)
    for d in (5, 8, 24):
        sem = random_sem(d, 2, rng)
        assert sem.nodes == d + 1
        assert (np.count_nonzero(sem.coefficients, axis=1) <= 2).all()
        assert len(sem.children(sem.target)) >= 3
        assert (np.triu(sem.coefficients) == 0).all()
    assert random_sem(8, 2, rng).target == 4


FAMILIES = [("variance", 1, 2), ("variance", 3, 2), ("hard", 1, 2), ("hard", 2, 3), ("hard", 3, 2), ("soft", 1, 2)]
FAMILIES += [("soft", 1, 3), ("soft", 2, 2), ("soft", 2, 3), ("soft", 3, 2)]


@pytest.mark.parametrize(("kind", "k", "q"), FAMILIES)
def test_moments_span_no_more_than_the_lift_and_reach_it_where_it_is_exact(kind, k, q):
    rng = np.random.default_rng([k, q])
    spans = []
    for d in (10, 20):
        for _ in range(6):
            sem = random_sem(d, q, rng)
            full = [j for j in sem.covariates if len(sem.parents(j)) == q]
            law = InterventionLaw(sem, tuple(rng.choice(full, k, replace=False).tolist()), kind)
            Sigma = sem.covariances(law.draw(80, rng))
            spans.append(moment_rank(EnvironmentMoments.from_covariances(Sigma, sem.target)))
            mixed = LatentObservation(sem, np.linalg.qr(rng.standard_normal((d, d)))[0]).observe(Sigma)
            assert moment_rank(EnvironmentMoments.from_covariances(mixed, d)) == spans[-1]
    lift = law.family.lift_dimension
    assert max(spans) <= lift
    if kind == "variance" or k == 1:
        assert set(spans) == {lift}
    if (kind, k, q) in (("hard", 2, 3), ("soft", 2, 2)):
        assert max(spans) == lift  # attained with two sites, too


def test_mean_shifts_count_as_one_more_coefficient():
    rng = np.random.default_rng(3)
    for kind, lift in (("variance", 3), ("hard", 4), ("soft", 5)):
        sem = random_sem(8, 2, rng).with_constant()
        law = InterventionLaw(sem, (9,), kind, shift_scale=1.0)
        assert law.family.lift_dimension == lift
        moments = EnvironmentMoments.from_covariances(sem.covariances(law.draw(50, rng)), sem.target)
        assert moment_rank(moments) <= lift


def test_lift_dimensions_in_closed_form():
    for k in range(1, 6):
        assert InterventionFamily(sites=k, kind="variance").lift_dimension == 1 + k
        for q in range(2, 5):
            family = InterventionFamily(sites=k, in_degree=q)
            assert family.lift_dimension == 1 + (q + 1) * k * (k + 1) // 2
        assert InterventionFamily(sites=k, kind="hard").lift_dimension == 1 + k * (k + 1)
    assert InterventionFamily(sites=0, in_degree=3).lift_dimension == 1
    assert unrestricted_lift_dimension(8) == 45
    assert vc_dimension(4) == 11


def test_bounds_on_known_values():
    assert pac_environments(1, delta=0.1, eta=0.05) == math.ceil(80 * math.log2(130)) == 562
    assert pac_environments(1, delta=0.5, eta=1e-30) == math.ceil(8 * math.log2(2e30))
    assert finite_class_delta(820, 100, 0.05) == pytest.approx(0.09705, abs=1e-5)
    assert holdout_delta(0, 10, 0.1) == pytest.approx(1 - 0.1**0.1)
    assert holdout_delta(10, 10, 0.1) == 1.0
    p = holdout_delta(3, 40, 0.05)
    assert stats.binom.cdf(3, 40, p) == pytest.approx(0.05)


@given(vc=st.integers(1, 2000), eta=st.floats(1e-6, 0.5), delta=st.floats(1e-3, 0.9))
def test_pac_bound_inverts_and_is_monotone(vc, eta, delta):
    N = pac_environments(vc, delta, eta)
    assert pac_delta(N, vc, eta) <= delta * (1 + 1e-9)
    assert pac_delta(2 * N, vc, eta) < pac_delta(N, vc, eta)
    assert pac_delta(N, vc + 1, eta) >= pac_delta(N, vc, eta) * (1 - 1e-9)  # roots up to rounding
    assert pac_delta(N, vc, eta / 2) >= pac_delta(N, vc, eta) * (1 - 1e-9)
    assert agnostic_delta(0.1, 100 * N, vc, eta) > 0.1
    assert agnostic_delta(0.1, vc, vc, eta) == 1.0


def test_too_few_environments_promise_nothing():
    assert pac_delta(5, 56, 0.05) == 1.0
    assert agnostic_delta(0.0, 5, 56, 0.05) == 1.0
    assert finite_class_delta(100, 3, 0.05) == 1.0


def test_cycles_are_named():
    loop = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    with pytest.raises(CyclicGraph, match=r"nodes \[0, 1, 2\]"):
        LinearSEM(loop, np.ones(3), target=0)
    with pytest.raises(CyclicGraph):
        LinearSEM(np.eye(2), np.ones(2), target=0)
    chain = LinearSEM(np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), np.ones(3), target=1)
    with pytest.raises(CyclicGraph):
        chain.intervene(0, np.array([0.0, 0.0, 1.0]))
    with pytest.raises(CyclicGraph, match=r"node 0 gets parents \[2\]"):
        chain.covariances(Interventions(np.array([0]), np.array([[[0.0, 0.0, 1.0]]]), np.ones((1, 1))))


def test_bad_models_and_interventions_are_named():
    B = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    sem = LinearSEM(B, np.ones(3), target=1)
    with pytest.raises(ValueError, match="target"):
        LinearSEM(B, np.ones(3), target=3)
    with pytest.raises(ValueError, match="noise_var"):
        LinearSEM(B, np.array([1.0, 0.0, 1.0]), target=1)
    with pytest.raises(ValueError, match="coefficients holds NaN"):
        LinearSEM(np.where(B == 1, np.nan, B), np.ones(3), target=1)
    with pytest.raises(TargetIntervened):
        sem.intervene(1, noise_var=2.0)
    with pytest.raises(TargetIntervened):
        InterventionLaw(sem, (1, 2))
    with pytest.raises(ValueError, match="distinct"):
        InterventionLaw(sem, (2, 2))
    with pytest.raises(ValueError, match="hard intervention"):
        sem.intervene(2, np.array([0.0, 1.0, 0.0]), hard=True)
    with pytest.raises(ValueError, match="kind"):
        InterventionLaw(sem, (2,), kind="mild")
    with pytest.raises(ValueError, match="shift_scale"):
        InterventionLaw(sem, (2,), shift_scale=1.0)
    with pytest.raises(ValueError, match="noise_range"):
        InterventionLaw(sem, (2,), noise_range=(2.0, 1.0))
    with pytest.raises(ValueError, match="constant"):
        sem.with_constant().intervene(0, noise_var=1.0)
    with pytest.raises(ValueError, match="mixing"):
        LatentObservation(sem, np.array([[np.inf, 1.0]]))
    with pytest.raises(ValueError, match="in_degree"):
        InterventionFamily(sites=1)
    for bad in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="eta"):
            pac_delta(10, 3, bad)
    with pytest.raises(ValueError, match="violations"):
        holdout_delta(4, 3, 0.05)
    with pytest.raises(ValueError, match="d must be"):
        random_sem(3, 2, np.random.default_rng(0))
