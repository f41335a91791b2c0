"""Every way to solve (H + shift B) d = -g against a dense solve, for many shifts at one H, and the metrics' norms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator

from locally.optimize.gradient_normalized import Dense, Diagonal, Euclidean, Implicit, LowRank
from locally.optimize.gradient_normalized.systems import (
    CHOLESKY_FIRST,
    Cholesky,
    CholeskyThenEigen,
    Eigen,
    Krylov,
    NonFiniteCurvature,
    ScaledMetric,
    Woodbury,
    shifted_system,
)

SHIFTS = (1e-3, 1e-2, 0.3, 2.0, 50.0)


def problem(seed, n=12, rank=5):
    rng = np.random.default_rng(seed)
    U, c, g = rng.standard_normal((n, rank)), rng.uniform(0.1, 3, rank), rng.standard_normal(n)
    root = rng.standard_normal((n, n))
    metrics = {
        "identity": (Euclidean(), np.eye(n)),
        "diagonal": (Diagonal(d := rng.uniform(0.2, 3, n)), np.diag(d)),
        "dense": (Dense(B := root @ root.T + np.eye(n)), B),
    }
    return LowRank(U, c), g, metrics


@pytest.mark.parametrize("metric", ["identity", "diagonal", "dense"])
@given(seed=st.integers(0, 2**32 - 1))
def test_every_system_gives_the_step_of_a_dense_solve(metric, seed):
    low, g, metrics = problem(seed)
    B, matrix = metrics[metric]
    H = low.dense()
    implicit = Implicit(lambda x: matrix @ x, lambda s: np.linalg.solve(matrix, s))
    systems = {
        "Cholesky": Cholesky(H, B, g),
        "Cholesky, columns first": Cholesky(np.asfortranarray(H), B, g),
        "eigen": Eigen(H, B, g),
        "Cholesky, then eigen": CholeskyThenEigen(H, B, g),
        "Woodbury": Woodbury(low, B, g),
        "Krylov": Krylov(H.__matmul__, B, g, rtol=1e-12, max_products=None),
        "Krylov, implicit metric": Krylov(low.__matmul__, implicit, g, rtol=1e-12, max_products=None),
    }
    for shift in sorted(SHIFTS, reverse=bool(seed % 2)):
        exact = -np.linalg.solve(H + shift * matrix, g)
        for name, system in systems.items():
            found = system.step(shift)
            assert np.linalg.norm(found - exact) <= 1e-8 * np.linalg.norm(exact), (name, shift)


@given(seed=st.integers(0, 2**32 - 1))
def test_low_rank_equals_cholesky_to_ten_digits(seed):
    low, g, metrics = problem(seed, rank=1)
    for B, _ in metrics.values():
        for shift in (0.1, 1.0, 10.0):
            dense, thin = Cholesky(low.dense(), B, g).step(shift), Woodbury(low, B, g).step(shift)
            assert np.linalg.norm(dense - thin) <= 1e-10 * np.linalg.norm(dense)


@given(seed=st.integers(0, 2**32 - 1))
def test_norms_are_dual(seed):
    _, g, metrics = problem(seed)
    x = np.random.default_rng(seed + 1).standard_normal(12)
    for B, matrix in metrics.values():
        assert B.norm(x) == pytest.approx(np.sqrt(x @ matrix @ x))
        assert B.dual_norm(g) == pytest.approx(np.sqrt(g @ np.linalg.solve(matrix, g)))
        assert abs(g @ x) <= B.dual_norm(g) * B.norm(x) * (1 + 1e-12)
        np.testing.assert_allclose(B.apply(B.solve(g)), g, atol=1e-9)
        np.testing.assert_allclose(B.norm(B.colour(x)), np.linalg.norm(x), rtol=1e-10)
        np.testing.assert_allclose(np.linalg.norm(B.whiten(g)), B.dual_norm(g), rtol=1e-10)


def test_one_krylov_space_serves_every_larger_shift():
    rng = np.random.default_rng(0)
    n = 200
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    H = (Q * np.geomspace(1e-4, 10, n)) @ Q.T
    products = 0

    def product(v):
        nonlocal products
        products += 1
        return H @ v

    system = Krylov(product, Euclidean(), rng.standard_normal(n), rtol=1e-8, max_products=None)
    system.step(1e-2)
    first = products
    assert 10 < first < n
    for shift in (1e-1, 1.0, 100.0):
        system.step(shift)
    assert products == first
    system.step(1e-4)
    assert products > first


def test_many_trials_factorise_four_times_in_all(monkeypatch):
    low, g, metrics = problem(0)
    B, _ = metrics["dense"]
    import locally.optimize.gradient_normalized.systems as systems

    calls = {"cholesky": 0, "eigen": 0}

    def counted(name, function):
        def call(*args, **words):
            calls[name] += 1
            return function(*args, **words)

        return call

    monkeypatch.setattr(systems, "cholesky_step", counted("cholesky", systems.cholesky_step))
    monkeypatch.setattr(systems, "symmetric_eigen", counted("eigen", systems.symmetric_eigen))
    system = CholeskyThenEigen(low.dense(), B, g)
    for k in range(20):
        system.step(2.0**k)
    assert calls == {"cholesky": CHOLESKY_FIRST, "eigen": 1}


@pytest.mark.parametrize("kind", [Cholesky, Eigen, CholeskyThenEigen])
def test_an_indefinite_system_has_no_step(kind):
    H, g = np.diag([-1.0, 2.0]), np.ones(2)
    system = kind(H, Euclidean(), g)
    assert system.step(0.5) is None
    np.testing.assert_allclose(system.step(3.0), [-0.5, -0.2])
    assert Krylov(H.__matmul__, Euclidean(), g, rtol=1e-10, max_products=None).step(0.5) is None
    assert ScaledMetric(-1.0, Euclidean(), g).step(0.5) is None


def test_projection_sets_negative_eigenvalues_to_zero():
    system = Eigen(np.diag([-1.0, 2.0]), Euclidean(), np.ones(2), project=True)
    np.testing.assert_allclose(system.step(0.5), [-2.0, -0.4])


def test_products_that_are_not_finite_are_not_mistaken_for_indefinite_ones():
    with pytest.raises(NonFiniteCurvature):
        Krylov(lambda v: v * np.nan, Euclidean(), np.ones(3), rtol=1e-8, max_products=None).step(1.0)


@pytest.mark.parametrize("solver", ["auto", "krylov"])
def test_a_limit_on_products_cuts_the_step_short_and_keeps_it_a_descent_direction(solver):
    rng = np.random.default_rng(0)
    root = rng.standard_normal((40, 40))
    g = rng.standard_normal(40)
    step = Krylov((root @ root.T).__matmul__, Euclidean(), g, rtol=1e-12, max_products=5).step(1e-3)
    assert step @ g < 0


def test_torch_and_numpy_agree():
    low, g, metrics = problem(3)
    H, B = low.dense(), metrics["diagonal"][0]
    H_t, g_t, B_t = torch.tensor(H), torch.tensor(g), Diagonal(torch.tensor(B.d))
    pairs = [
        (Cholesky(H, B, g), Cholesky(H_t, B_t, g_t)),
        (Eigen(H, B, g), Eigen(H_t, B_t, g_t)),
        (
            Krylov(H.__matmul__, B, g, rtol=1e-12, max_products=None),
            Krylov(H_t.__matmul__, B_t, g_t, rtol=1e-12, max_products=None),
        ),
    ]
    for ours, torchs in pairs:
        for shift in SHIFTS:
            np.testing.assert_allclose(torchs.step(shift).numpy(), ours.step(shift), rtol=1e-7, atol=1e-9)
    assert Cholesky(-H_t, B_t, g_t).step(1e-3) is None


def test_the_kind_of_curvature_picks_the_system():
    low, g, metrics = problem(0)
    B, matrix = metrics["dense"]
    pair = Implicit(lambda x: matrix @ x, lambda s: np.linalg.solve(matrix, s))
    pick = lambda H, metric=B, solver="auto", project=False: type(
        shifted_system(H, metric, g, solver=solver, project=project, rtol=1e-8)
    )
    assert pick(low) is Woodbury
    assert pick(LowRank(np.ones((12, 30)))) is CholeskyThenEigen  # wider than n: no rank to exploit
    assert pick(low.dense()) is CholeskyThenEigen
    assert pick(low.dense(), solver="eigh") is Eigen
    assert pick(low.dense(), project=True) is Eigen
    assert pick(low.dense(), metric=pair) is Krylov
    assert pick(low, metric=pair) is Krylov
    assert pick(aslinearoperator(low.dense())) is Krylov
    assert pick(0.5) is ScaledMetric


@pytest.mark.parametrize(
    ("U", "c", "match"),
    [
        (np.ones(3), 1.0, "U"),
        (np.ones((3, 2)), np.ones(3), "c"),
        (np.ones((3, 2)), np.array([1.0, -1.0]), "c"),
    ],
)
def test_low_rank_refuses_what_is_none(U, c, match, without_shape_checks):
    with pytest.raises(ValueError, match=match):
        LowRank(U, c)
