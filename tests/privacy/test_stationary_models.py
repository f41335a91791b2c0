"""What the private methods run on: linear models and their projection, torch modules, the scikit-learn classifier."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from locally.privacy.stationary import (
    LOGISTIC,
    SIGMOID_SQUARE,
    Adjacency,
    Beyond,
    GlmLoss,
    JohnsonLindenstrauss,
    LinearModel,
    ModuleObjective,
    NoisyGradientDescent,
    Output,
    PerExampleObjective,
    PrivateLinearClassifier,
    PrivateSpiderBoost,
    PrivateTreeSpider,
    Randomness,
    RecursiveRegularization,
    Solver,
    Status,
    fit_module,
    huber,
    projection_dimension,
)

LOSSES = [LOGISTIC, SIGMOID_SQUARE, huber(0.7)]
T64 = torch.float64


def rows(n=40, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=T64))
    return X, (torch.rand(n, generator=generator) < torch.sigmoid(4 * X[:, 0])).double()


# Linear models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_linear_gradients_are_those_of_automatic_differentiation(loss):
    X, y = rows()
    model = LinearModel(X, y, data_norm=1 + 1e-12, loss=loss)
    w = torch.linspace(-2, 2, 5, dtype=T64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss.value(X @ w, y).sum(), w)
    w = w.detach()
    torch.testing.assert_close(model.gradient_sum(w), expected)
    torch.testing.assert_close(model.exact_gradient(w), expected / 40)
    v = w + 0.3
    batch = torch.tensor([0, 7, 30])
    bound = model.difference_bound(float((w - v).norm()))
    expected = model.gradient_sum(v, batch) - model.gradient_sum(w, batch)
    torch.testing.assert_close(model.difference_sum(v, w, bound, batch), expected)
    assert float(loss.value(X @ w, y).mean()) == pytest.approx(model.mean_loss(w))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_declared_constants_bound_the_derivatives_and_are_reached(loss):
    t = torch.linspace(-30, 30, 200_001, dtype=T64)
    y = torch.tensor([0.0, 1.0], dtype=T64)[:, None]
    slopes = loss.derivative(t, y)
    curvature = slopes.diff(dim=1) / (t[1] - t[0])
    assert 0.999 * loss.lipschitz <= float(slopes.abs().max()) <= loss.lipschitz
    assert 0.999 * loss.smoothness <= float(curvature.abs().max()) <= loss.smoothness * (1 + 1e-9)
    assert (float(curvature.min()) >= -1e-9) == loss.convex


def test_a_loss_that_breaks_its_word_cannot_break_the_bound():
    liar = GlmLoss("liar", lambda t, y: 50 * t, lambda t, y: 50 + 9 * t, 1.0, 0.1, convex=True)
    model = LinearModel(*rows(), data_norm=1 + 1e-12, loss=liar)
    w, v = torch.ones(5, dtype=T64), torch.zeros(5, dtype=T64)
    for i in range(40):
        one = torch.tensor([i])
        assert float(model.gradient_sum(w, one).norm()) <= model.lipschitz
        assert float(model.difference_sum(w, v, 0.05, one).norm()) <= 0.05


def test_rows_beyond_the_bound_are_refused_or_clipped_as_declared():
    X, y = rows()
    long = X.clone()
    long[3] *= 7
    with pytest.raises(ValueError, match="norm at most data_norm = 2, got one of 7"):
        LinearModel(long, y, data_norm=2.0)
    clipped = LinearModel(long, y, data_norm=2.0, beyond=Beyond.CLIP)
    torch.testing.assert_close(clipped.X[3], 2 * X[3])
    assert torch.equal(clipped.X[4], X[4])
    assert float(long[3].norm()) == pytest.approx(7)  # the caller's data stay as they were
    assert "clipped to norm 2" in clipped.assumptions[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data_norm": 0.0}, "data_norm"),
        ({"data_norm": math.nan}, "data_norm"),
        ({"X": torch.full((2, 2), torch.nan)}, "X holds NaN"),
        ({"y": torch.tensor([0.0, torch.inf])}, "y holds NaN or infinity"),
        ({"y": torch.tensor([0.0, 2.0])}, "y must lie in"),
        ({"y": torch.zeros(3)}, "y must have shape"),
        ({"X": torch.zeros(2, 0)}, "at least one row and one column"),
    ],
)
def test_bad_tables_are_named(change, named, without_shape_checks):
    good = {"X": torch.eye(2), "y": torch.zeros(2), "data_norm": 1.0}
    with pytest.raises(ValueError, match=named):
        LinearModel(**good | change)


def test_arrays_and_tensors_give_the_same_model():
    X, y = rows()
    for dtype in (np.float32, np.float64):
        a = LinearModel(X.numpy().astype(dtype), y.numpy().astype(dtype), data_norm=1 + 1e-6)
        b = LinearModel(X.to(a.X.dtype), y.to(a.X.dtype), data_norm=1 + 1e-6)
        assert torch.equal(a.gradient_sum(a.initial_point()), b.gradient_sum(b.initial_point()))


@given(data_norm=st.floats(0.1, 10), k=st.integers(1, 5), seed=st.integers(0, 1000))
def test_projected_rows_keep_their_bound_for_every_projection(data_norm, k, seed):
    X, y = rows(seed=seed)
    model = LinearModel(data_norm * X, y, data_norm=data_norm * (1 + 1e-12))
    directions = 10 * torch.randn(k, 5, generator=torch.Generator().manual_seed(seed), dtype=T64)
    assert float(model.projected(directions).X.norm(dim=1).max()) <= math.sqrt(2) * data_norm * (1 + 1e-9)


def test_projection_maps_back_and_states_the_whole_cost():
    X, y = rows(n=200, d=30)
    model = LinearModel(X, y, data_norm=1 + 1e-12)
    base = PrivateSpiderBoost(epsilon=1.0, delta=1e-5, steps=8, phase=4, keep_trace=True)
    method = JohnsonLindenstrauss(base, 6)
    found = method.minimize(model, rng=0)
    assert found.w.shape == (30,)
    assert torch.equal(found.w, found.trace.iterates[found.chosen])
    assert torch.linalg.matrix_rank(found.trace.iterates) <= 6
    assert found.privacy == method.privacy_statement(model)
    assert 0.99 < found.privacy.epsilon <= 1.0
    assert any("projected to 6 dimensions" in a for a in found.privacy.assumptions)
    with pytest.raises(ValueError, match="dimension must be at most"):
        JohnsonLindenstrauss(base, 31).minimize(model)
    one_pass = RecursiveRegularization(epsilon=1.0, delta=1e-5, radius=2.0, solver=Solver.PHASED_SGD)
    convex = JohnsonLindenstrauss(one_pass, 6).minimize(model, rng=0)
    assert any("convex" in a for a in convex.privacy.assumptions)


def test_projection_preserves_norms_on_average():
    X, y = rows(n=50, d=40)
    model, generator = LinearModel(X, y, data_norm=1 + 1e-12), torch.Generator().manual_seed(0)
    squared = []
    for _ in range(300):
        directions = torch.randn(20, 40, generator=generator, dtype=T64) / math.sqrt(20)
        squared.append(float((X @ directions.T).square().sum(1).mean()))
    assert np.mean(squared) == pytest.approx(1.0, abs=0.03)
    assert model.projected(directions).dimension == 20


def test_projection_dimension_follows_the_papers_balance():
    n, rest = 100_000, {"delta": 1e-6, "lipschitz": 1.0, "smoothness": 1.0, "initial_gap": 1e4}
    small, large = (projection_dimension(n, epsilon, **rest) for epsilon in (0.01, 0.08))
    assert large / small == pytest.approx(8 ** (4 / 5), rel=0.05)  # k ~ (n epsilon)^(4/5)
    assert projection_dimension(n, 0.08, **rest, rank=2) == math.ceil(2 * math.log(2 * n / 1e-6))
    assert projection_dimension(n, 0.08, **rest, rank=10**6) == large
    assert projection_dimension(n, 0.01, **rest, convex=True) > small  # noise weighs less on convex losses


# Functions per example ------------------------------------------------------------------------------------------------


def test_noisy_descent_is_dp_sgd_written_as_a_loop():
    """Poisson batches, clipping example by example, noise on the sum, division by the expected batch size."""
    X, y = rows()

    def gradients(w, x, t):
        return (torch.sigmoid(x @ w) - t)[:, None] * x * 3

    objective = PerExampleObjective(gradients, X, y, dimension=5, lipschitz=0.4, smoothness=1.0, chunk=7)
    shared = {"steps": 6, "batch": 10, "learning_rate": 0.3, "adjacency": Adjacency.ADD_REMOVE}
    method = NoisyGradientDescent(delta=1e-5, noise_multiplier=1.3, **shared, output=Output.LAST)
    found = method.minimize(objective, rng=11)

    source = Randomness(torch.Generator().manual_seed(11))
    w = torch.zeros(5, dtype=T64)
    for _ in range(6):
        total = torch.zeros(5, dtype=T64)
        for i in source.poisson_sample(40, 10 / 40):
            leaf = w.clone().requires_grad_()
            loss = 3 * LOGISTIC.value(X[i : i + 1] @ leaf, y[i : i + 1]).sum()
            (g,) = torch.autograd.grad(loss, leaf)
            total += g * min(1.0, 0.4 / float(g.norm()))
        w = w - 0.3 * (total + 1.3 * 0.4 * source.normal(w)) / 10
    torch.testing.assert_close(found.w, w)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lipschitz": 0.0}, "lipschitz"),
        ({"smoothness": math.nan}, "smoothness"),
        ({"dimension": 0}, "dimension"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_impossible_objectives_are_named(change, named):
    good = {"dimension": 2, "lipschitz": 1.0, "smoothness": 1.0}
    with pytest.raises(ValueError, match=named):
        PerExampleObjective(lambda w, x: w - x, torch.zeros(3, 2), **good | change)
    with pytest.raises(ValueError, match="one positive length"):
        PerExampleObjective(lambda w, x, y: w - x, torch.zeros(3, 2), torch.zeros(2), **good)
    with pytest.raises(ValueError, match="data holds NaN"):
        PerExampleObjective(lambda w, x: w - x, torch.full((3, 2), torch.nan), **good)


# Torch modules --------------------------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(3 * 16, 3)).double()


def images(n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 6, 6, generator=generator, dtype=T64), torch.randint(0, 3, (n,), generator=generator)


def example_gradient(net, loss, x, y):
    net.zero_grad()
    loss(net(x[None]), y[None]).backward()
    return torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.requires_grad])


def test_module_sums_are_clipped_example_by_example():
    net, loss, (x, y) = network(), nn.functional.cross_entropy, images()
    objective = ModuleObjective(net, loss, x, y, lipschitz=0.8, smoothness=0.5, chunk=5)
    w = objective.initial_point()
    v = w + 0.05
    batch = torch.tensor([0, 2, 3, 11])
    clipped, plain = torch.zeros_like(w), torch.zeros_like(w)
    for i in batch:
        g = example_gradient(net, loss, x[i], y[i])
        clipped += g * min(1.0, 0.8 / float(g.norm()))
        plain += g
    assert not torch.allclose(clipped, plain)
    torch.testing.assert_close(objective.gradient_sum(w, batch), clipped)

    bound = objective.difference_bound(float((v - w).norm()))
    at_w = [example_gradient(net, loss, x[i], y[i]) for i in batch]
    objective.load(v)
    changes = [example_gradient(net, loss, x[i], y[i]) - g for i, g in zip(batch, at_w)]
    expected = sum(c * min(1.0, bound / float(c.norm())) for c in changes)
    torch.testing.assert_close(objective.difference_sum(v, w, bound, batch), expected)
    torch.testing.assert_close(objective.initial_point(), v)
    torch.testing.assert_close(
        objective.exact_gradient(v), sum(example_gradient(net, loss, a, b) for a, b in zip(x, y)) / len(x)
    )


def test_frozen_parameters_and_buffers_stay():
    net, (x, y) = network(), images()
    for p in net[0].parameters():
        p.requires_grad_(False)
    frozen = [p.clone() for p in net[0].parameters()]
    before = net[4].weight.detach().clone()
    method = PrivateSpiderBoost(epsilon=5.0, delta=1e-3, steps=4, phase=2, adjacency=Adjacency.ADD_REMOVE)
    found = fit_module(net, nn.functional.cross_entropy, x, y, method, lipschitz=1.0, smoothness=1.0, rng=0)
    assert all(torch.equal(a, b) for a, b in zip(frozen, net[0].parameters()))
    assert not torch.equal(before, net[4].weight)
    assert found.w.numel() == sum(p.numel() for p in net.parameters() if p.requires_grad)
    torch.testing.assert_close(
        torch.cat([p.reshape(-1) for p in net.parameters() if p.requires_grad]).detach(), found.w
    )
    assert "clipped to 1" in found.privacy.assumptions[0]


@pytest.mark.parametrize(
    "method",
    [
        PrivateSpiderBoost(epsilon=8.0, delta=1e-5, steps=60, phase=10, learning_rate=1.0, output=Output.LAST),
        PrivateSpiderBoost(
            epsilon=8.0, delta=1e-5, steps=60, phase=10, learning_rate=1.0, variation_batch=100, output=Output.LAST
        ),
        NoisyGradientDescent(epsilon=8.0, delta=1e-5, steps=60, learning_rate=1.0, output=Output.LAST),
        PrivateTreeSpider(epsilon=8.0, delta=1e-5, depth=2, batch=200, step=1.0, rounds=2),
    ],
    ids=["spiderboost", "sampled spiderboost", "descent", "tree"],
)
def test_training_learns_and_reports_its_steps(method):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 4, generator=generator)
    y = (x[:, 0] > 0).float()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    loss = nn.functional.binary_cross_entropy_with_logits
    before, seen = loss(net(x), y).item(), []
    found = fit_module(
        net, loss, x, y, method, lipschitz=1.0, smoothness=1.0, rng=0, callback=lambda *step: seen.append(step)
    )
    assert found.status is Status.FINISHED
    assert found.privacy.epsilon <= 8.0
    assert len(seen) == found.steps
    if not isinstance(method, PrivateTreeSpider):  # whose eight steps do not go far
        assert loss(net(x), y).item() < 0.75 * before


@pytest.mark.parametrize(
    ("layer", "named"),
    [(nn.BatchNorm1d(4), "mixes examples.*BatchNorm1d"), (nn.Dropout(0.5), "random numbers.*Dropout")],
)
def test_layers_that_mix_examples_are_refused(layer, named):
    net = nn.Sequential(nn.Linear(4, 4), layer)
    make = {"lipschitz": 1.0, "smoothness": 1.0}
    with pytest.raises(ValueError, match=named):
        ModuleObjective(net, nn.functional.mse_loss, torch.zeros(3, 4), torch.zeros(3, 4), **make)
    fixed = ModuleObjective(net.eval(), nn.functional.mse_loss, torch.zeros(3, 4), torch.zeros(3, 4), **make)
    assert fixed.gradient_sum(fixed.initial_point()).isfinite().all()
    with pytest.raises(ValueError, match="no trainable"):
        ModuleObjective(nn.Tanh(), nn.functional.mse_loss, torch.zeros(3, 4), torch.zeros(3, 4), **make)


# The classifier -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.parametrize("method", ["spiderboost", "recursive_one_pass"])
def test_classifier_keeps_scikit_learns_conventions(method, without_shape_checks):
    # noise is left in, so epsilon is large enough for the checks that look at accuracy
    check_estimator(
        PrivateLinearClassifier(
            epsilon=1e4, delta=1e-3, data_norm=10.0, beyond="clip", method=method, steps=20, phase=5, random_state=0
        )
    )


@pytest.fixture(scope="module")
def tumours():
    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    return X / np.linalg.norm(X, axis=1)[:, None], np.where(y == 1, "benign", "malignant")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "gradient_descent"},
        {"method": "recursive", "steps": 30},
        {"loss": "sigmoid_square"},
        {"projection_dimension": 10},
        {"fit_intercept": False},
    ],
    ids=str,
)
def test_classifier_learns_under_a_budget(tumours, options):
    X, y = tumours
    model = PrivateLinearClassifier(epsilon=8.0, delta=1e-5, data_norm=1 + 1e-9, random_state=0, **options).fit(X, y)
    assert model.score(X, y) > 0.8
    assert 0.99 * 8 <= model.result_.privacy.epsilon <= 8.0
    assert any("labels" in a for a in model.result_.privacy.assumptions)
    np.testing.assert_allclose(model.predict_proba(X).sum(axis=1), 1.0)
    assert set(model.predict(X)) == {"benign", "malignant"}
    assert ((model.predict_proba(X)[:, 1] > 0.5) == (model.predict(X) == "malignant")).all()


def test_classifier_names_what_it_cannot_take(tumours):
    X, y = tumours
    with pytest.raises(ValueError, match=r"rows of X must have norm at most data_norm = 0\.5"):
        PrivateLinearClassifier(data_norm=0.5).fit(X, y)
    with pytest.raises(ValueError, match="epsilon"):
        PrivateLinearClassifier(epsilon=math.nan, data_norm=2.0).fit(X, y)
    with pytest.raises(ValueError, match="delta"):
        PrivateLinearClassifier(delta=1.0, data_norm=2.0).fit(X, y)
    with pytest.raises(ValueError, match="method"):
        PrivateLinearClassifier(method="magic", data_norm=2.0).fit(X, y)
    with pytest.raises(ValueError, match="convex"):
        PrivateLinearClassifier(method="recursive", loss="sigmoid_square", data_norm=2.0).fit(X, y)
