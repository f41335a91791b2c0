"""Training under a fixed kernel: reference values, gradient descent itself, limits, and the estimator."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from sklearn.kernel_ridge import KernelRidge
from sklearn.utils.estimator_checks import check_estimator

from locally.tangent.kernel import (
    Activation,
    Conv,
    Dense,
    Flatten,
    FlowStatus,
    InfiniteNetwork,
    KernelFlow,
    LinearizedModule,
    NTKRegressor,
    PrincipalComponents,
    early_stopping,
    empirical_ntk,
    ensemble,
    integrate,
    posterior,
)


@pytest.fixture(scope="module")
def reference():
    path = Path(__file__).parents[1] / "golden/18-neural-tangent-kernel/neural_tangents_kernels.npz"
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def problem(n=8, k=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 3))
    return x, InfiniteNetwork.mlp(2).ntk(x), rng.standard_normal((n, k)), rng.standard_normal((n, k))


def test_flow_has_the_values_of_neural_tangents(reference):
    net = InfiniteNetwork.mlp(2, "erf", w_std=1.5, b_std=0.1)
    train, test = net.kernel(reference["Xtr"]), net.kernel(reference["Xte"], reference["Xtr"])
    np.testing.assert_allclose(train.ntk, reference["dyn_ntk_tt"], rtol=1e-7)
    np.testing.assert_allclose(test.nngp, reference["dyn_nngp_st"], rtol=1e-10)
    flow = KernelFlow(reference["dyn_ntk_tt"], reference["Ytr"], normalization="entries")
    assert flow.max_learning_rate == pytest.approx(float(reference["max_lr"]), rel=1e-6)
    for t in ("0", "0.5", "10", "1000"):
        np.testing.assert_allclose(flow.train(float(t), reference["f0tr"]), reference[f"dyn_gd_t{t}_train"], atol=1e-10)
        found = flow.test(float(t), reference["dyn_ntk_st"], reference["f0te"], reference["f0tr"])
        np.testing.assert_allclose(found, reference[f"dyn_gd_t{t}_test"], atol=1e-10)


def test_ensembles_have_the_values_of_neural_tangents(reference):
    flow = KernelFlow(reference["dyn_ntk_tt"], reference["Ytr"], normalization="entries")
    nngp = [reference[f"dyn_nngp_{part}"] for part in ("tt", "st", "ss")]
    for t in ("0.0", "0.5", "10.0", "None"):
        mean, cov = ensemble(flow, math.inf if t == "None" else float(t), reference["dyn_ntk_st"], *nngp)
        np.testing.assert_allclose(mean, reference[f"dyn_ens_t{t}_mean"], atol=1e-9)
        np.testing.assert_allclose(cov, reference[f"dyn_ens_t{t}_cov"], atol=1e-9)
        assert np.linalg.eigvalsh(cov).min() > -1e-10
    mean, cov = posterior(KernelFlow(nngp[0], reference["Ytr"]), nngp[1], nngp[2])
    np.testing.assert_allclose(mean, reference["dyn_ens_nngp_mean"], atol=1e-9)
    np.testing.assert_allclose(cov, reference["dyn_ens_nngp_cov"], atol=1e-9)
    certain = ensemble(flow, math.inf, reference["dyn_ntk_tt"], nngp[0], nngp[0], nngp[0])[1]
    assert np.abs(certain).max() < 1e-8


@given(t=st.floats(0, 1e6), later=st.floats(1, 10), normalization=st.sampled_from(["samples", "entries", "sum"]))
def test_residuals_only_shrink(t, later, normalization):
    _, K, y, f0 = problem()
    flow = KernelFlow(K, y, normalization=normalization)
    first, second = (np.linalg.norm(flow.train(s, f0) - y) for s in (t, later * t))
    assert second <= first * (1 + 1e-12)
    np.testing.assert_allclose(flow.test(t, K, f0, f0), flow.train(t, f0), atol=1e-7)


def test_flow_begins_at_the_start_and_ends_in_interpolation():
    x, K, y, f0 = problem()
    flow = KernelFlow(K, y)
    np.testing.assert_allclose(flow.train(0.0, f0), f0, atol=1e-12)
    np.testing.assert_allclose(flow.train(math.inf, f0), y, atol=1e-12)
    cross = InfiniteNetwork.mlp(2).ntk(x[:3] + 0.1, x)
    np.testing.assert_allclose(flow.test(math.inf, cross), cross @ np.linalg.solve(K, y), rtol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("normalization", ["samples", "entries"])
def test_gradient_descent_of_the_linearised_network_is_the_closed_form(momentum, normalization):
    torch.manual_seed(0)
    net = InfiniteNetwork.mlp(1, "erf").finite(3, 40, 2, dtype=torch.float64)
    x, _, y, _ = problem()
    X, Y = torch.as_tensor(x), torch.as_tensor(y)
    # with "trace" missing the off-diagonal outputs, train one output alone
    net = torch.nn.Sequential(net, torch.nn.Linear(2, 1, bias=False).double().requires_grad_(False))
    Y = Y[:, :1]
    K = empirical_ntk(net, X).numpy()
    linear = LinearizedModule(net)
    f0 = linear(X).detach().numpy()
    rate = 0.5 * KernelFlow(K, Y.numpy()).max_learning_rate
    optimizer = torch.optim.SGD(linear.theta.parameters(), lr=rate, momentum=momentum)
    for _ in range(20):
        optimizer.zero_grad()
        ((linear(X) - Y).square().sum() / (2 * Y.numel())).backward()
        optimizer.step()
    flow = KernelFlow(K, Y.numpy(), learning_rate=rate, normalization=normalization)
    found = flow.train(flow.after(20, momentum), f0)
    np.testing.assert_allclose(found, linear(X).detach().numpy(), atol=1e-8)
    test = flow.test(flow.after(20, momentum), K, f0, f0)
    np.testing.assert_allclose(test, found, atol=1e-8)


def test_descent_beyond_the_stable_rate_is_refused():
    _, K, y, _ = problem()
    flow = KernelFlow(K, y, learning_rate=1.01 * KernelFlow(K, y).max_learning_rate)
    with pytest.raises(ValueError, match=r"learning_rate .* diverge"):
        flow.after(5)
    assert np.abs(flow.after(400, momentum=0.5).remaining).max() <= 1


def test_integration_meets_the_closed_form_and_other_losses_meet_descent():
    _, K, y, f0 = problem()
    n = len(y)
    flow = KernelFlow(K, y)
    for method in ("RK45", "BDF"):
        found = integrate(
            K, lambda f: (f - y) / n, f0, [0.0, 3.0, 20.0], k_test=K, f0_test=f0, method=method, rtol=1e-8
        )
        assert found.status is FlowStatus.FINISHED
        for row, test, t in zip(found.train, found.test, found.times.tolist()):
            np.testing.assert_allclose(row, flow.train(t, f0), atol=1e-5)
            np.testing.assert_allclose(test, row, atol=1e-5)
    labels = np.where(y > 0, 1.0, -1.0)
    logistic = lambda f: -labels / (1 + np.exp(labels * f)) / n
    f = f0.copy()
    for _ in range(2000):
        f = f - 0.005 * K @ logistic(f)
    np.testing.assert_allclose(integrate(K, logistic, f0, [10.0]).train[-1], f, atol=1e-2)


def test_momentum_flow_is_the_limit_of_small_heavy_ball_steps():
    _, K, y, f0 = problem()
    rate, momentum, steps = 1e-4, 0.99, 400
    found = integrate(K, lambda f: f - y, f0, [float(steps)], learning_rate=rate, momentum=momentum)
    exact = KernelFlow(K, y, learning_rate=rate, normalization="sum")
    np.testing.assert_allclose(found.train[-1], exact.train(exact.after(steps, momentum), f0), atol=0.05)


def test_an_exploding_cost_ends_in_a_status():
    _, K, _, f0 = problem()
    found = integrate(K, lambda f: -np.exp(np.abs(f)) * np.sign(f), f0, [0.1, 50.0])
    assert found.status in (FlowStatus.FAILED, FlowStatus.NOT_FINITE)


def test_components_decay_at_the_rates_of_their_eigenvalues():
    _, K, y, f0 = problem()
    found = PrincipalComponents.of(K)
    flow = KernelFlow(K, y)
    before, after = (found.coefficients(flow.train(t, f0) - y) for t in (0.0, 5.0))
    np.testing.assert_allclose(after, (1 - found.learnt(5.0))[:, None] * before, atol=1e-10)
    assert (found.learnt(5.0) >= found.ridge_equivalent(5.0) - 1e-12).all()


def test_leaving_one_out_is_exact_at_the_end_of_training():
    _, K, y, _ = problem()
    for ridge in (0.0, 0.1):
        flow = KernelFlow(K, y, ridge=ridge)
        added = ridge * np.trace(K) / len(K)
        for i, residual in enumerate(flow.leave_one_out(math.inf)):
            rest = np.delete(np.arange(len(K)), i)
            inner = K[np.ix_(rest, rest)] + added * np.eye(len(rest))
            predicted = K[i, rest] @ np.linalg.solve(inner, y[rest])
            np.testing.assert_allclose(residual, y[i] - predicted, rtol=1e-6)


def test_early_stopping_helps_where_targets_are_noisy():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (60, 1))
    clean = np.sin(3 * x)
    y = clean + 0.5 * rng.standard_normal(x.shape)
    net = InfiniteNetwork.mlp(2)
    flow = KernelFlow(net.ntk(x), y)
    new = np.linspace(-1, 1, 100)[:, None]
    cross = net.ntk(new, x)
    by_validation = early_stopping(flow, k_validation=cross, y_validation=np.sin(3 * new))
    assert by_validation.errors.min() < 0.5 * by_validation.errors[-1]
    chosen = early_stopping(flow).best
    assert math.isfinite(chosen)
    assert np.square(flow.test(chosen, cross) - np.sin(3 * new)).mean() < 0.5 * by_validation.errors[-1]


@pytest.mark.usefixtures("without_shape_checks")
def test_the_estimator_passes_scikit_learns_checks():
    check_estimator(NTKRegressor())
    check_estimator(NTKRegressor(mode="nngp", alpha=1e-3))


def test_nngp_mode_is_the_gaussian_process_of_scikit_learn():
    x, _, y, _ = problem(12, 1)
    linear = InfiniteNetwork(Dense(None, math.sqrt(3.0), 0.5))  # covariance x.x' + 1/4
    noise = 0.01
    mean_diagonal = float((np.square(x).sum(1) + 0.25).mean())
    ours = NTKRegressor(linear, mode="nngp", alpha=noise / mean_diagonal).fit(x, y[:, 0])
    theirs = GaussianProcessRegressor(DotProduct(0.5), alpha=noise, optimizer=None).fit(x, y[:, 0] - y.mean())
    for a, b in zip(ours.predict(x[:4] + 0.3, return_cov=True), theirs.predict(x[:4] + 0.3, return_cov=True)):
        np.testing.assert_allclose(a - (y.mean() if a.ndim == 1 else 0), b, atol=1e-8)
    ridge = KernelRidge(alpha=noise, kernel="precomputed").fit(linear.nngp(x), y[:, 0] - y.mean())
    np.testing.assert_allclose(ours.predict(x), ridge.predict(linear.nngp(x)) + y.mean(), rtol=1e-8)


@pytest.mark.usefixtures("without_shape_checks")
def test_estimator_takes_images_stopping_times_and_spread():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((15, 32)), rng.standard_normal(15)
    cnn = InfiniteNetwork(Conv(), Activation(), Flatten(), Dense())
    model = NTKRegressor(cnn, image_shape=(2, 4, 4), t="loo").fit(X, y)
    mean, std = model.predict(X, return_std=True)
    assert mean.shape == std.shape == (15,)
    assert model.t_ > 0
    early = NTKRegressor(t=0.0).fit(X, y)
    np.testing.assert_allclose(early.predict(X), y.mean())
    for bad, match in [
        ({"t": -1.0}, "t must"),
        ({"mode": "rbf"}, "mode"),
        ({"alpha": -1.0}, "alpha"),
        ({"image_shape": (1, 2, 3)}, "image_shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            NTKRegressor(**bad).fit(X, y)


def test_repeated_rows_do_no_harm():
    x, _, y, _ = problem(6, 1)
    x, y = np.vstack([x, x]), np.vstack([y, y])
    model = NTKRegressor(alpha=0.0).fit(x, y[:, 0])
    np.testing.assert_allclose(model.predict(x), y[:, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_train": np.array([[1.0, 2.0], [0.0, 1.0]])}, "symmetric"),
        ({"k_train": np.array([[1.0, 0.0], [0.0, -1.0]])}, "positive semidefinite"),
        ({"k_train": np.array([[np.nan, 0.0], [0.0, 1.0]])}, "NaN"),
        ({"y": np.array([[1.0], [np.inf]])}, "y holds NaN"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"ridge": -1.0}, "ridge"),
        ({"normalization": "mean"}, "normalization"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_bad_arguments_of_the_flow_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        KernelFlow(**({"k_train": np.eye(2), "y": np.ones((2, 1))} | change))
    flow = KernelFlow(np.eye(2), np.ones((2, 1)))
    for call, match in [
        (lambda: flow.train(-1.0), "t must"),
        (lambda: flow.train(math.nan), "t must"),
        (lambda: flow.test(1.0, np.ones((3, 5))), "k_test"),
        (lambda: flow.after(-1), "steps"),
        (lambda: flow.after(1, 1.0), "momentum"),
        (lambda: early_stopping(flow, k_validation=np.eye(2)), "go together"),
        (lambda: integrate(np.eye(2), lambda f: f, np.ones((2, 1)), [2.0, 1.0]), "times"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
