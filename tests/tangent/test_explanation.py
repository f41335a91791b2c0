"""What the eight methods recover, the closed forms and limits behind them, and agreement with golden vectors and peers.

Source of the statements: arXiv 2206.01254, Table 1 and sections 4-5; golden attributions are captum's and the exact
Shapley values and LIME weights over all 2^19 masks of a WHO network.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locally.tangent.explanation import (
    LFA,
    BinaryMask,
    Estimator,
    Method,
    Space,
    explain,
)
from locally.tangent.explanation.approximation import draw_seed, take_draws

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_network(d: int, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(d, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1)).double()


@given(seed=st.integers(0, 2**31), d=st.integers(1, 12), method=st.sampled_from(list(Method)))
def test_a_linear_function_is_recovered_as_w_or_as_w_times_x(seed, d, method):
    rng = np.random.default_rng(seed)
    w, c = torch.from_numpy(rng.standard_normal(d)), rng.standard_normal()
    X, baseline = torch.from_numpy(rng.uniform(-1, 1, (3, d))), torch.from_numpy(rng.uniform(-1, 1, d))
    found = explain(lambda x: x @ w + c, X, method, n_samples=200, baseline=baseline, generator=seeded(seed))
    contributions = w * (X - baseline)
    torch.testing.assert_close(found.attributions, w.expand(3, d) if method.additive else contributions)
    assert found.space is (Space.INPUT if method.additive else Space.NOISE)
    truth_at_origin = (X if method.additive else baseline.expand(3, d)) @ w + c
    torch.testing.assert_close(found.intercept, truth_at_origin)


@given(seed=st.integers(0, 2**31), d=st.integers(1, 6))
def test_kernel_shap_over_all_masks_is_the_shapley_value(seed, d):
    rng = np.random.default_rng(seed)
    game = rng.standard_normal(2**d)
    bits = torch.from_numpy(2 ** np.arange(d))
    f = lambda x: torch.from_numpy(game)[(x.round().long() * bits).sum(1)]
    found = explain(f, torch.ones(1, d, dtype=F64), "kernel_shap", n_samples=2**d)
    shapley = np.zeros(d)
    for i in range(d):
        others = [j for j in range(d) if j != i]
        for k in range(d):
            share = math.factorial(k) * math.factorial(d - k - 1) / math.factorial(d)
            for coalition in itertools.combinations(others, k):
                code = sum(2**j for j in coalition)
                shapley[i] += share * (game[code + 2**i] - game[code])
    np.testing.assert_allclose(found.values[0], shapley, atol=1e-9)
    assert found.attributions.sum() + found.intercept == pytest.approx(game[-1])
    assert found.base_values[0] == pytest.approx(game[0])


@pytest.mark.parametrize("importance", [True, False])
def test_sampled_kernel_shap_keeps_efficiency_and_covers_the_exact_values(importance):
    f, X = smooth_network(10), torch.randn(40, 10, dtype=F64, generator=seeded())
    exact = explain(f, X, "kernel_shap", n_samples=1024)
    mask = BinaryMask(kernel="shapley", importance=importance, paired=False)
    found = LFA(neighbourhood=mask, n_samples=600, exact=False).explain(f, X, generator=seeded(1))
    assert exact.estimator is Estimator.ENUMERATED
    assert found.estimator is Estimator.SAMPLED
    torch.testing.assert_close(found.attributions.sum(1) + found.intercept, f(X)[:, 0].detach())
    z = (found.attributions - exact.attributions) / found.std_error
    assert 0.6 < z.square().mean().sqrt() < 1.6  # the standard errors are of the right size


def test_pairing_masks_with_their_complements_more_than_halves_the_variance():
    f, X = smooth_network(12), torch.randn(30, 12, dtype=F64, generator=seeded())
    exact = explain(f, X, "kernel_shap", n_samples=4096).attributions
    error = {}
    for paired in (True, False):
        lfa = LFA(neighbourhood=BinaryMask(kernel="shapley", paired=paired), n_samples=300, exact=False)
        runs = [lfa.explain(f, X, generator=seeded(s)).attributions - exact for s in range(8)]
        error[paired] = torch.stack(runs).square().mean()
    assert error[True] < 0.5 * error[False]


@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize("convention", ["paper", "captum", "lime"])
def test_sampled_lime_covers_the_enumerated_fit(importance, convention):
    f, X = smooth_network(9), 1.5 * torch.randn(40, 9, dtype=F64, generator=seeded())
    options = {"convention": convention, "importance": importance, "width": 2.0}
    exact = explain(f, X, "lime", n_samples=512, exact=True, **options)
    found = explain(f, X, "lime", n_samples=500, exact=False, generator=seeded(1), **options)
    z = (found.attributions - exact.attributions) / found.std_error
    assert 0.6 < z.square().mean().sqrt() < 1.6
    if importance:
        weighted = explain(f, X, "lime", n_samples=500, exact=False, **(options | {"importance": False}))
        assert found.effective_sample_size.mean() >= weighted.effective_sample_size.mean()


@pytest.mark.parametrize(
    ("convention", "weight"),
    [
        ("paper", lambda x, z, width: np.exp(-(((1 - z) * x) ** 2).sum() / width**2)),
        ("captum", lambda x, z, width: np.exp(-(((1 - z) * x) ** 2).sum() / (2 * width**2))),
        ("lime", lambda x, z, width: np.sqrt(np.exp(-((1 - z) ** 2).sum() / width**2))),
    ],
)
def test_the_enumerated_kernel_is_the_one_of_the_convention(convention, weight):
    x = np.array([0.3, -1.2, 0.7])
    draws = BinaryMask(kernel="exponential", convention=convention, width=0.8).enumerate(
        torch.from_numpy(x)[None], torch.zeros(1, 3, dtype=F64), 8
    )
    by_hand = np.array([weight(x, z, 0.8) for z in draws.noise[0].numpy()])
    np.testing.assert_allclose(draws.weights()[0], by_hand / by_hand.sum())


def test_golden_attributions_of_captum(golden):
    data = np.load(golden / "10-local-function-approximation" / "who_ffnnA.npz")
    f, X = who_network(data), torch.from_numpy(data["X"])
    for method, key, atol in [
        ("gradient", "vg", 1e-5),
        ("gradient_x_input", "gxi", 1e-5),
        ("occlusion", "oc", 1e-5),
        ("integrated_gradients", "ig", 1e-4),
    ]:
        np.testing.assert_allclose(explain(f, X, method).values, data[f"captum_{key}"], atol=atol, err_msg=method)
    for method in ("smoothgrad", "c_lime"):
        ours = explain(f, X, method, n_samples=4000, generator=seeded()).values
        size = np.abs(data["captum_sg"]).max()
        np.testing.assert_allclose(ours, data["captum_sg"], atol=0.02 * size, err_msg=method)
    lime = explain(f, X, "lime", convention="captum", n_samples=4000, generator=seeded()).values
    np.testing.assert_allclose(lime, data["captum_lime"], atol=0.01)
    shap = explain(f, X, "kernel_shap", n_samples=4000, generator=seeded()).values
    np.testing.assert_allclose(shap, data["captum_ks"], atol=0.015)
    total = (f(X) - f(torch.zeros_like(X)))[:, 0].detach()
    np.testing.assert_allclose(explain(f, X, "integrated_gradients").values.sum(1), total, atol=1e-6)


def test_golden_exact_values_over_all_masks_of_19_features(golden):
    data = np.load(golden / "10-local-function-approximation" / "who_ffnnA.npz")
    f, X = who_network(data), torch.from_numpy(data["X"][:1]).double()
    shapley = explain(f, X, "kernel_shap", n_samples=2**19).values
    np.testing.assert_allclose(shapley, data["exact_shapley"][:1], atol=1e-6)
    lime = explain(f, X, "lime", n_samples=2**19)
    expected = data["exact_lime_coef_then_intercept"][:1]
    np.testing.assert_allclose(np.c_[lime.values, lime.base_values], expected, atol=1e-6)
    sampled = explain(f, X, "kernel_shap", n_samples=1000, generator=seeded()).values
    ours = np.abs(sampled - data["exact_shapley"][:1]).max()
    assert ours < np.abs(data["captum_ks"][:1] - data["exact_shapley"][:1]).max()


def test_golden_logistic_model(golden):
    data = np.load(golden / "10-local-function-approximation" / "heloc_logistic.npz")
    w, b = torch.from_numpy(data["model.linear.weight"]), torch.from_numpy(data["model.linear.bias"])
    f, X = lambda x: torch.sigmoid(x @ w.T + b), torch.from_numpy(data["X"])
    for method, key, atol in [
        ("gradient", "vg", 1e-5),
        ("gradient_x_input", "gxi", 1e-5),
        ("occlusion", "oc", 1e-5),
        ("integrated_gradients", "ig", 1e-4),
    ]:
        np.testing.assert_allclose(explain(f, X, method).values, data[f"captum_{key}"], atol=atol, err_msg=method)
    on_log_odds = explain(f, X, "c_lime", output="logit", generator=seeded())
    np.testing.assert_allclose(on_log_odds.values, np.tile(data["model.linear.weight"], (20, 1)), atol=1e-4)


def test_steins_lemma_for_a_sine():
    omega, sigma, x0 = 3.0, 0.5, 0.2
    limit = omega * math.exp(-((omega * sigma) ** 2) / 2) * math.cos(omega * x0)
    assert limit == pytest.approx(0.80384, abs=1e-5)
    f, X = lambda x: torch.sin(omega * x[:, 0]), torch.tensor([[x0]], dtype=F64)
    for method in ("c_lime", "smoothgrad"):
        exact = explain(f, X, method, sigma=sigma)
        assert exact.estimator is Estimator.QUADRATURE
        assert exact.values[0, 0] == pytest.approx(limit, abs=1e-9)
        found = explain(f, X, method, sigma=sigma, n_samples=200_000, exact=False, generator=seeded())
        assert abs(found.values[0, 0] - limit) < 4 * found.std_error[0, 0]
        assert found.std_error[0, 0] < 0.01


def test_the_limits_are_reached_at_their_rates():
    f, X = smooth_network(3), torch.randn(5, 3, dtype=F64, generator=seeded())
    gradient, product = (explain(f, X, m).attributions for m in ("gradient", "gradient_x_input"))
    gap = lambda method, limit, **options: (explain(f, X, method, **options).attributions - limit).abs().max()
    assert gap("smoothgrad", gradient, sigma=0.01) / gap("smoothgrad", gradient, sigma=0.02) == pytest.approx(
        1 / 4, rel=0.05
    )
    assert gap("gradient", gradient, sigma=0.02) == gap("smoothgrad", gradient, sigma=0.02)
    ratio = gap("gradient_x_input", product, low=0.99) / gap("gradient_x_input", product, low=0.98)
    assert ratio == pytest.approx(1 / 2, rel=0.05)


def test_completeness_of_integrated_gradients():
    f, X = smooth_network(7), torch.randn(5, 7, dtype=F64, generator=seeded())
    baseline = torch.randn(5, 7, dtype=F64, generator=seeded(1))
    found = explain(f, X, "integrated_gradients", baseline=baseline, n_samples=100)
    torch.testing.assert_close(found.attributions.sum(1), (f(X) - f(baseline))[:, 0].detach())


@pytest.mark.parametrize("method", list(Method))
def test_a_feature_that_f_ignores_gets_nothing(method):
    f = lambda x: torch.tanh(x[:, 0] * x[:, 1])
    X = torch.randn(4, 3, dtype=F64, generator=seeded())
    found = explain(f, X, method, generator=seeded())  # 8 masks or a quadrature: nothing is sampled
    assert found.attributions[:, 2].abs().max() < 1e-12
    if not method.additive:  # and features that f treats alike get alike
        X[:, 1] = X[:, 0]
        alike = explain(f, X, method, generator=seeded()).attributions
        torch.testing.assert_close(alike[:, 0], alike[:, 1])


@pytest.mark.parametrize("method", list(Method))
def test_a_batch_gives_what_a_loop_gives_whatever_the_chunks(method):
    f, X = smooth_network(12), torch.randn(7, 12, dtype=F64, generator=seeded())
    together = explain(f, X, method, n_samples=50, generator=seeded(3))
    again = explain(f, X, method, n_samples=50, batch_size=64, generator=seeded(3))
    loop = [explain(f, X[i : i + 1], method, n_samples=50, generator=seeded(3)) for i in range(7)]
    torch.testing.assert_close(together.attributions, again.attributions)
    torch.testing.assert_close(together.attributions, torch.cat([one.attributions for one in loop]))
    torch.testing.assert_close(together[2:4].attributions, together.attributions[2:4])
    single = smooth_network(12).float()
    rounded = explain(single, X.float(), method, n_samples=50, generator=seeded(3)).attributions
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), together.attributions, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampled", [True, False])
def test_weighted_least_squares_is_scikit_learns(sampled):
    from sklearn.linear_model import Lasso, LinearRegression, Ridge

    f, X = smooth_network(6), torch.randn(3, 6, dtype=F64, generator=seeded())
    z = BinaryMask(kernel="exponential", importance=False)
    n = 60 if sampled else 64
    draws = take_draws(z, X, 0 * X, n, not sampled, draw_seed(seeded(9)))
    values = f(z.perturb(X, 0 * X, draws.noise)).detach()[..., 0].numpy()
    for options, peer in [
        ({}, LinearRegression()),
        ({"fit_intercept": False}, LinearRegression(fit_intercept=False)),
        ({"penalty": "l2", "alpha": 0.1}, Ridge(alpha=0.1)),
        ({"penalty": "l1", "alpha": 0.02}, Lasso(alpha=0.02, tol=1e-12, max_iter=100_000)),
        ({"penalty": "l1", "alpha": 5.0}, Lasso(alpha=5.0)),
    ]:
        lfa = LFA(neighbourhood=z, n_samples=n, exact=not sampled, **options)
        found = lfa.explain(f, X, generator=seeded(9))
        for i in range(3):
            peer.fit(draws.noise[0].numpy(), values[i], sample_weight=draws.weights()[i].numpy())
            np.testing.assert_allclose(found.values[i], peer.coef_, atol=1e-7, err_msg=f"{options}")
            np.testing.assert_allclose(found.base_values[i], peer.intercept_, atol=1e-7)


def who_network(data) -> torch.nn.Module:
    layers = []
    for i in (1, 2, 3):
        weight, bias = (torch.from_numpy(data[f"model.linear{i}.{part}"]) for part in ("weight", "bias"))
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight, bias
        layers += [layer, torch.nn.Tanh()]
    network = torch.nn.Sequential(*layers[:-1])
    return lambda x: network.to(x.dtype)(x)
