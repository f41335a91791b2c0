"""Gradients and Hessians against finite differences, approximations against their formulas, smoothness bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, issparse

from locally.optimize.gradient_normalized import (
    Logistic,
    LogSumExp,
    LowRank,
    PowerResidual,
    SmoothnessBound,
    Softmax,
    chebyshev_chain,
    probe_smoothness,
    rosenbrock,
)

seeds = st.integers(0, 2**32 - 1)


def matrix(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def curved(p, G=None):
    """u with every second derivative: u_i = x_i^2 + x_{i+1} x_i - 1."""

    def u(x):
        return x**2 + np.roll(x, -1) * x - 1

    def jacobian(x):
        n = len(x)
        J = np.diag(2 * x + np.roll(x, -1))
        J[np.arange(n), (np.arange(n) + 1) % n] += x
        return J

    def second(x, w):
        n = len(x)
        S = np.diag(2 * w)
        for i in range(n):
            j = (i + 1) % n
            S[i, j] += w[i]
            S[j, i] += w[i]
        return S

    return PowerResidual(u, jacobian, p, target_metric=G, second=second)


def labels(seed, n, classes):
    return np.random.default_rng(seed).integers(0, classes, n)


ROOT = matrix(5, 5, 5)
OBJECTIVES = {
    "log-sum-exp": (lambda: LogSumExp(matrix(0, 20, 6), matrix(1, 20), 0.7), 6),
    "linear, p = 2": (lambda: PowerResidual.linear(matrix(0, 9, 6), matrix(1, 9)), 6),
    "linear, p = 4": (lambda: PowerResidual.linear(matrix(0, 9, 6), matrix(1, 9), 4.0), 6),
    "curved, p = 3": (lambda: curved(3.0), 5),
    "curved, p = 2.5, weighted": (lambda: curved(2.5, np.linspace(0.5, 2, 5)), 5),
    "curved, p = 4, metric": (lambda: curved(4.0, ROOT @ ROOT.T + np.eye(5)), 5),
    "rosenbrock": (lambda: rosenbrock(), 2),
    "rosenbrock, p = 5": (lambda: rosenbrock(5.0), 2),
    "chebyshev chain": (lambda: chebyshev_chain(7), 7),
    "logistic": (lambda: Logistic(matrix(0, 30, 5), labels(1, 30, 2), l2=0.1), 6),
    "logistic, sparse": (
        lambda: Logistic(csr_array(np.maximum(matrix(0, 30, 5), 0)), labels(1, 30, 2), fit_intercept=False),
        5,
    ),
    "softmax": (lambda: Softmax(matrix(0, 30, 4), labels(1, 30, 3), 3, l2=0.1), 15),
    "softmax, weighted": (
        lambda: Softmax(matrix(0, 30, 4), labels(1, 30, 3), 3, sample_weight=np.arange(30.0)),
        15,
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_derivatives_match_finite_differences(name):
    make, n = OBJECTIVES[name]
    f, x, h = make(), 0.5 * matrix(7, n), 1e-5
    steps = h * np.eye(n)
    slopes = np.array([(f.fun(x + e) - f.fun(x - e)) / (2 * h) for e in steps])
    np.testing.assert_allclose(f.jac(x), slopes, rtol=2e-6, atol=1e-6 * np.abs(slopes).max())
    curves = np.array([(f.jac(x + e) - f.jac(x - e)) / (2 * h) for e in steps])
    np.testing.assert_allclose(f.hess(x), curves, rtol=2e-6, atol=1e-7 * np.abs(curves).max())
    value, g = f.fun_and_jac(x)
    assert value == f.fun(x)
    np.testing.assert_array_equal(g, f.jac(x))


@pytest.mark.parametrize("name", OBJECTIVES)
@given(seed=seeds)
def test_approximate_curvature_is_positive_semidefinite(name, seed):
    make, n = OBJECTIVES[name]
    f, x = make(), 2 * matrix(seed, n)
    kinds = [f.gauss_newton] + ([f.fisher] if hasattr(f, "fisher") else [])
    for kind in kinds:
        H = kind(x)
        H = H.dense() if isinstance(H, LowRank) else H
        eigenvalues = np.linalg.eigvalsh(H)
        assert eigenvalues[0] >= -1e-12 * max(abs(eigenvalues).max(), 1e-300)


@given(seed=seeds, mu=st.floats(0.1, 10))
def test_weighted_gauss_newton_lies_above_the_hessian_by_the_outer_product_of_the_gradient(seed, mu):
    f = LogSumExp(matrix(seed, 15, 5), matrix(seed + 1, 15), mu)
    x = matrix(seed + 2, 5)
    g = f.jac(x)
    gap = f.gauss_newton(x) - f.hess(x)
    np.testing.assert_allclose(gap, np.outer(g, g) / mu, atol=1e-10 / mu)
    wide = LogSumExp(matrix(seed, 4, 5), matrix(seed + 1, 4), mu)
    low = wide.gauss_newton(x)
    assert isinstance(low, LowRank)
    np.testing.assert_allclose(low.dense() - wide.hess(x), np.outer(wide.jac(x), wide.jac(x)) / mu, atol=1e-9)


def test_centred_soft_maximum_has_its_minimum_at_zero():
    f = LogSumExp.centred(matrix(0, 15, 5), matrix(1, 15), 0.5)
    assert np.abs(f.jac(np.zeros(5))).max() < 1e-15


def test_soft_maximum_neither_overflows_nor_leaves_its_bounds():
    A, b = matrix(0, 15, 5), matrix(1, 15)
    x = 1e6 * matrix(2, 5)
    top = (A @ x - b).max()
    value = LogSumExp(A, b, 0.5).fun(x)
    assert top <= value <= top + 0.5 * np.log(15)


@given(seed=seeds, p=st.floats(2, 6))
def test_powers_of_residuals_drop_only_the_curvature_of_u(seed, p):
    f, x = curved(p), matrix(seed, 5)
    u, J = f.u(x), f.jacobian(x)
    size = np.linalg.norm(u)
    dropped = size ** (p - 2) * f.second(x, u)
    np.testing.assert_allclose(f.hess(x) - f.gauss_newton(x), dropped, atol=1e-9 * (1 + np.abs(dropped).max()))
    inexact = size ** (p - 2) * J.T @ J + (p - 2) / size**p * np.outer(f.jac(x), f.jac(x))
    np.testing.assert_allclose(f.gauss_newton(x), inexact, rtol=1e-8, atol=1e-8 * np.abs(inexact).max())
    fisher = f.fisher(x).dense()
    np.testing.assert_allclose(f.gauss_newton(x) - fisher, size ** (p - 2) * J.T @ J, atol=1e-7 * np.abs(inexact).max())


def test_a_vanishing_residual_has_finite_curvature():
    A = np.eye(3)
    for p, expected in ((2.0, np.eye(3)), (2.5, np.zeros((3, 3))), (4.0, np.zeros((3, 3)))):
        f = PowerResidual.linear(A, np.ones(3), p)
        np.testing.assert_array_equal(f.gauss_newton(np.ones(3)), expected)
        np.testing.assert_array_equal(f.fisher(np.ones(3)).dense(), np.zeros((3, 3)))
        assert f.fun(np.ones(3)) == 0


def test_the_chain_has_a_sparse_jacobian_and_its_minimum_at_ones():
    f = chebyshev_chain(9)
    assert issparse(f.jacobian(np.ones(9)))
    assert f.jacobian(np.ones(9)).nnz == 17
    assert f.fun(np.ones(9)) == 0
    assert rosenbrock(5.0).fun(np.ones(2)) == 0


def test_values_are_remembered_for_one_point_and_the_caller_may_change_his():
    calls = []
    f = PowerResidual(lambda x: calls.append(1) or x - 1, lambda x: np.eye(2))
    x = np.zeros(2)
    f.fun(x), f.jac(x), f.hess(x)
    assert len(calls) == 1
    x[0] = 1.0
    assert f.fun(x) == 0.5


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("sparse", [False, True])
def test_regressions_agree_with_their_definition(classes, sparse):
    n, d = 25, 5
    X = np.maximum(matrix(0, n, d), -0.2)
    y, w, theta = labels(1, n, classes), np.random.default_rng(2).uniform(0, 2, n), None
    data = csr_array(X) if sparse else X
    if classes == 2:
        f = Logistic(data, y, l2=0.3, sample_weight=w)
        theta = matrix(3, d + 1)
        scores = np.column_stack([np.zeros(n), X @ theta[:d] + theta[d]])
    else:
        f = Softmax(data, y, classes, l2=0.3, sample_weight=w)
        theta = matrix(3, classes * (d + 1))
        Theta = theta.reshape(classes, -1)
        scores = X @ Theta[:, :d].T + Theta[:, d]
    P = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    w = w / w.sum()
    coefficients = theta.reshape(-1, d + 1)[:, :d]
    assert f.fun(theta) == pytest.approx(-w @ np.log(P[np.arange(n), y]) + 0.15 * (coefficients**2).sum())
    R = P - np.eye(classes)[y]
    rows = np.column_stack([X, np.ones(n)])
    G = np.array([np.kron(r[1:] if classes == 2 else r, a) for r, a in zip(R, rows)])
    ridge = np.tile(np.r_[np.full(d, 0.3), 0.0], classes if classes > 2 else 1)
    np.testing.assert_allclose(f.fisher(theta), (w * G.T) @ G + np.diag(ridge), atol=1e-12)
    v = matrix(4, f.size)
    for formed, applied in ((f.hess, f.hess_operator), (f.fisher, f.fisher_operator)):
        np.testing.assert_allclose(applied(theta) @ v, formed(theta) @ v, atol=1e-10)


def test_anchoring_adds_curvature_only_where_every_class_moves_alike():
    X, y = matrix(0, 25, 3), labels(1, 25, 4)
    free, held = (Softmax(X, y, 4, l2=0.1, anchored=anchored) for anchored in (False, True))
    theta = matrix(2, free.size)
    rows = np.column_stack([X, np.ones(25)])
    anchor = np.kron(np.ones((4, 4)) / 16, rows.T @ rows / 25)
    np.testing.assert_allclose(held.hess(theta) - free.hess(theta), anchor, atol=1e-12)
    np.testing.assert_allclose(held.hess_operator(theta) @ theta, held.hess(theta) @ theta, atol=1e-11)
    spread = Softmax(X, y, 4, l2=0.1, anchored=True)
    at_zero = spread.metric_at_zero(dense=True, flat=0.0)
    np.testing.assert_allclose(spread.metric_at_zero(dense=False, flat=0.0), np.diag(at_zero), atol=1e-12)
    assert np.linalg.eigvalsh(at_zero)[0] > 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LogSumExp(np.ones((2, 2)), np.ones(3)), "b"),
        (lambda: LogSumExp(np.full((2, 2), np.nan), np.ones(2)), "A"),
        (lambda: LogSumExp(np.ones((2, 2)), np.ones(2), 0.0), "mu"),
        (lambda: rosenbrock(1.5), "p must"),
        (lambda: rosenbrock(np.nan), "p must"),
        (lambda: curved(2.0, np.array([1.0, -1.0])), "target_metric"),
        (lambda: Logistic(np.ones((2, 2)), np.array([0, 2])), "y"),
        (lambda: Logistic(np.ones((2, 2)), np.array([0, 1, 1])), "y"),
        (lambda: Logistic(np.full((2, 2), np.inf), np.array([0, 1])), "X"),
        (lambda: Logistic(np.ones((2, 2)), np.array([0, 1]), l2=-1.0), "l2"),
        (lambda: Logistic(np.ones((2, 2)), np.array([0, 1]), sample_weight=np.zeros(2)), "sample_weight"),
        (lambda: Softmax(np.ones((2, 2)), np.array([0, 3]), 3), "y"),
        (lambda: Softmax(np.ones((2, 2)), np.array([0, 0]), 1), "classes"),
        (lambda: SmoothnessBound(((1.0, 2.0),)), "alpha"),
        (lambda: SmoothnessBound(((0.0, 1.0),)), "terms"),
        (lambda: SmoothnessBound.hoelder_hessian(1.0, 2.0), "nu"),
        (lambda: SmoothnessBound.inexact(c1=-1.0, c2=1.0, beta=0.0), "M"),
    ],
)
def test_bad_input_is_named(make, match, without_shape_checks):
    with pytest.raises(ValueError, match=match):
        make()


# Smoothness -----------------------------------------------------------------------------------------------------------


def test_class_bounds_have_their_closed_forms():
    assert SmoothnessBound.lipschitz_gradient(4.0)(2.0) == pytest.approx(0.5)
    assert SmoothnessBound.lipschitz_hessian(4.0)(2.0) == pytest.approx(1.0)  # sqrt(2 g / L)
    assert SmoothnessBound.hoelder_hessian(3.0, 0.0)(6.0) == pytest.approx(2.0)
    assert SmoothnessBound.quasi_self_concordant(5.0)(1e9) == pytest.approx(0.2)
    both = SmoothnessBound.lipschitz_gradient(4.0) + SmoothnessBound.quasi_self_concordant(5.0)
    assert both(2.0) == pytest.approx(1 / (1 / 0.5 + 1 / 0.2))


@settings(max_examples=10)
@given(x=st.floats(0.1, 10), scale=st.floats(0.01, 100))
def test_probed_smoothness_is_scale_invariant_and_above_the_class_bound(x, scale):
    point = np.array([x, -x / 2])
    jac = lambda z, c=1.0: c * z * abs(z) / 2
    found = [
        probe_smoothness(lambda z, c=c: jac(z, c), point, c * np.diag(abs(point)), directions=3, rng=0)
        for c in (1.0, scale)
    ]
    assert found[0] == pytest.approx(found[1], rel=0.021)  # the grid's ratio
    assert found[0] >= 0.98 * SmoothnessBound.lipschitz_hessian(1.0)(np.linalg.norm(jac(point)))


@pytest.mark.parametrize("seed", range(3))
def test_probed_smoothness_with_a_perturbed_hessian_is_above_the_harmonic_mean(seed):
    f = LogSumExp.centred(matrix(seed, 30, 3), matrix(seed + 9, 30), 1.0)
    x = matrix(seed + 20, 3)
    H1, H2 = f.hess(x), f.gauss_newton(x)
    apart = np.linalg.norm(f.jac(x)) / np.linalg.norm(H1 - H2, 2)
    gammas = [probe_smoothness(f.jac, x, H, hess=H1, directions=20, rng=0) for H in (H1, H2)]
    assert gammas[1] >= 0.97 / (1 / gammas[0] + 1 / apart)


def test_a_linear_gradient_is_trusted_everywhere_and_no_curvature_up_to_one_over_the_lipschitz_constant():
    A = np.diag([1.0, 4.0])
    x = np.array([0.0, 1.0])
    jac = lambda z: A @ z
    assert probe_smoothness(jac, x, A, directions=5, rng=0) == pytest.approx(1e3)
    # H = 0: ||A h|| <= ||g|| ||h|| / gamma, worst along the second axis, which is the gradient's: gamma = 4 / 4
    assert probe_smoothness(jac, x, np.zeros((2, 2)), hess=A, directions=50, rng=0) == pytest.approx(1.0, rel=0.03)
