"""Curvature operators against explicit matrices from autograd, the identities that tie them together, and refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from locally.linalg.curvature import (
    Bernoulli,
    Categorical,
    CurvatureOperator,
    EmpiricalFisher,
    Fisher,
    Gaussian,
    GaussNewton,
    Hessian,
    Likelihood,
)

CROSS_ENTROPY = nn.functional.cross_entropy
KINDS = ["hessian", "ggn", "fisher", "empirical"]


def network(classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes)).double()


def data(n: int = 11, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return X, torch.randint(classes, (n,), generator=generator)


def operator(kind: str, model: nn.Module, batches, **options) -> CurvatureOperator:
    make = {
        "hessian": lambda: Hessian(model, CROSS_ENTROPY, batches, **options),
        "ggn": lambda: GaussNewton(model, CROSS_ENTROPY, batches, **options),
        "fisher": lambda: Fisher(model, Categorical(), batches, **options),
        "empirical": lambda: EmpiricalFisher(model, CROSS_ENTROPY, batches, **options),
    }
    return make[kind]()


def of_parameters(model: nn.Module, function):
    """`function` of the model's outputs, as a function of the flat parameters."""

    def at(theta: Tensor, X: Tensor) -> Tensor:
        sizes = [p.numel() for p in model.parameters()]
        named = zip([n for n, _ in model.named_parameters()], model.parameters(), theta.split(sizes))
        return function(functional_call(model, {name: part.view(p.shape) for name, p, part in named}, (X,)))

    return at, nn.utils.parameters_to_vector(model.parameters()).detach()


def explicit(kind: str, model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """The matrix from its definition, example by example, without the module under test."""
    loss, theta = of_parameters(model, lambda out: CROSS_ENTROPY(out, y))
    if kind == "hessian":
        return torch.autograd.functional.hessian(lambda t: loss(t, X), theta)
    matrix = torch.zeros(len(theta), len(theta), dtype=theta.dtype)
    outputs, _ = of_parameters(model, lambda out: out[0])
    for x, label in zip(X, y):
        J = torch.autograd.functional.jacobian(lambda t, x=x: outputs(t, x[None]), theta)
        p = model(x).softmax(0).detach()
        if kind == "ggn":
            middle = torch.diag(p) - torch.outer(p, p)
        else:
            scores = p - torch.eye(len(p), dtype=p.dtype)  # row c: the score if the label were c
            weights = p if kind == "fisher" else nn.functional.one_hot(label, len(p)).double()
            middle = (scores.T * weights) @ scores
        matrix += J.T @ middle @ J
    return matrix / len(X)


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_dense_matrix_equal_the_explicit_matrix(kind):
    model, (X, y) = network(), data()
    exact = explicit(kind, model, X, y)
    op = operator(kind, model, (X, y))
    v = torch.randn(3, len(exact), dtype=torch.float64)
    torch.testing.assert_close(op(v), v @ exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(op(v[0]), exact @ v[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(op.dense(), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_how_the_data_are_cut_does_not_matter(kind):
    model, (X, y) = network(), data()
    whole = operator(kind, model, (X, y)).dense()
    batches = [(X[:2], y[:2]), (X[2:9], y[2:9]), (X[9:], y[9:])]
    loader = DataLoader(TensorDataset(X, y), batch_size=4)
    tight = operator(kind, model, (X, y), memory=2000)
    assert tight.chunk < len(X)
    for op in (operator(kind, model, (X, y), chunk=3), operator(kind, model, batches), tight):
        torch.testing.assert_close(op.dense(), whole, rtol=1e-12, atol=1e-14)
    v = torch.ones(len(whole), dtype=torch.float64)
    torch.testing.assert_close(operator(kind, model, loader)(v), whole @ v, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(tight(torch.stack([v, 2 * v])), torch.stack([whole @ v, 2 * whole @ v]))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_n_times_means(kind):
    model, (X, y) = network(), data()
    summed = {"hessian": Hessian, "ggn": GaussNewton, "empirical": EmpiricalFisher}
    if kind == "fisher":
        total = Fisher(model, Categorical(), (X, y), reduction="sum")
    else:
        total = summed[kind](model, nn.CrossEntropyLoss(reduction="sum"), (X, y), reduction="sum", chunk=4)
    torch.testing.assert_close(total.dense(), len(X) * operator(kind, model, (X, y)).dense())


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_is_the_mean_of_the_examples_own(kind):
    model, (X, y) = network(), data()
    op = operator(kind, model, (X, y), chunk=4)
    v = torch.randn(op.shape[0], dtype=torch.float64)
    each = op.per_example(v)
    torch.testing.assert_close(each.mean(0), op(v), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(each[5], operator(kind, model, (X[5:6], y[5:6]))(v), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_batches_are_multiplied_one_by_one(kind):
    model, (X, y) = network(), data()
    op = operator(kind, model, (X, y))
    rows = torch.tensor([[0, 1, 2], [3, 4, 5], [8, 9, 10]])
    V = torch.randn(3, op.shape[0], dtype=torch.float64)
    product = op.stacked((X[rows], y[rows]))
    expected = torch.stack([operator(kind, model, (X[r], y[r]))(v) for r, v in zip(rows, V)])
    torch.testing.assert_close(product(V), expected, rtol=1e-10, atol=1e-13)
    alone = op.stacked((X[rows[:1]], y[rows[:1]]))
    torch.testing.assert_close(alone(V[0]), expected[0], rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match="two leading dimensions"):
        op.stacked((X[rows], y))


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), chunk=st.integers(1, 12))
def test_symmetric_linear_and_semidefinite(seed, kind, chunk):
    model = network(seed=seed)
    op = operator(kind, model, data(seed=seed), chunk=chunk)
    u, v = torch.randn(2, op.shape[0], dtype=torch.float64)
    torch.testing.assert_close(u @ op(v), v @ op(u), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(op(2 * u - v), 2 * op(u) - op(v), rtol=1e-9, atol=1e-12)
    if kind != "hessian":
        assert v @ op(v) >= -1e-13


def test_fisher_is_gauss_newton_where_the_loss_is_the_likelihood():
    X, y = data()
    model = network()
    v = torch.randn(5, Hessian(model, CROSS_ENTROPY, (X, y)).shape[0], dtype=torch.float64)
    torch.testing.assert_close(Fisher(model, Categorical(), (X, y))(v), GaussNewton(model, CROSS_ENTROPY, (X, y))(v))
    targets = torch.randn(11, 3, dtype=torch.float64)
    square = lambda outputs, targets: ((outputs - targets) ** 2).sum(1).mean() / (2 * 0.5)
    torch.testing.assert_close(
        Fisher(model, Gaussian(variance=0.5), (X, targets))(v), GaussNewton(model, square, (X, targets))(v)
    )
    coins = (targets > 0).double()
    logistic = lambda outputs, targets: (
        nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1).mean()
    )
    torch.testing.assert_close(Fisher(model, Bernoulli(), (X, coins))(v), GaussNewton(model, logistic, (X, coins))(v))


def test_gauss_newton_is_the_hessian_of_a_model_linear_in_its_parameters():
    model, (X, y) = nn.Linear(5, 3).double(), data()
    torch.testing.assert_close(
        GaussNewton(model, CROSS_ENTROPY, (X, y)).dense(), Hessian(model, CROSS_ENTROPY, (X, y)).dense()
    )


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(variance=4.0)])
def test_sampled_fisher_tends_to_the_exact_one_and_repeats_with_its_seed(likelihood: Likelihood):
    model, (X, y) = network(), data()
    exact = Fisher(model, likelihood, (X, y)).dense()
    error = {
        k: (Fisher(model, likelihood, (X, y), samples=k).dense() - exact).norm() / exact.norm() for k in (50, 20_000)
    }
    assert error[20_000] < 0.02
    assert error[20_000] < error[50] / 5  # the rate is 1/20
    first = Fisher(model, likelihood, (X, y), samples=3, seed=7, chunk=4)
    again = Fisher(model, likelihood, (X, y), samples=3, seed=7, chunk=4, memory=1)  # nothing is kept between products
    other = Fisher(model, likelihood, (X, y), samples=3, seed=8, chunk=4)
    v = torch.ones(first.shape[0], dtype=torch.float64)
    assert torch.equal(first(v), first(v))
    assert torch.equal(again(v), first(v))
    assert torch.equal(again(v), again(v))
    assert not torch.allclose(other(v), first(v))


def test_sampled_scores_of_classes_in_the_second_of_three_dimensions():
    outputs = torch.randn(2, 4, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    scores = Categorical().sample_scores(outputs, 40_000, generator)
    assert scores.shape == (40_000, 2, 4, 3)
    torch.testing.assert_close(scores.sum(2), torch.zeros(40_000, 2, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    tangent = torch.randn_like(outputs)
    mean = ((scores * tangent).sum(2, keepdim=True) * scores).mean(0)
    torch.testing.assert_close(mean, Categorical().information(outputs, tangent), atol=0.02, rtol=0)


@pytest.mark.parametrize("change", ["in place", "through data", "replaced"])
def test_products_follow_the_parameters(change):
    """A kept linearisation must not outlive the parameters that it was taken at, however they are changed."""
    model, (X, y) = network(), data()
    op = Hessian(model, CROSS_ENTROPY, (X, y))
    v = torch.ones(op.shape[0], dtype=torch.float64)
    before = op(v)
    weight = model[0].weight
    if change == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif change == "through data":
        weight.data.mul_(2)
    else:
        model[0].weight = nn.Parameter(2 * weight.detach())
    assert not torch.allclose(op(v), before)
    torch.testing.assert_close(op(v), explicit("hessian", model, X, y) @ v)


def test_products_follow_a_frozen_parameter():
    model, (X, y) = network(), data()
    op = Hessian(model, CROSS_ENTROPY, (X, y), parameters=["2.weight"])
    v = torch.arange(op.shape[0], dtype=torch.float64)
    before = op(v)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.allclose(op(v), before)
    torch.testing.assert_close(op(v), Hessian(model, CROSS_ENTROPY, (X, y), parameters=["2.weight"])(v))


def test_a_subset_of_the_parameters_gives_the_principal_submatrix():
    model, (X, y) = network(), data()
    whole = Hessian(model, CROSS_ENTROPY, (X, y)).dense()
    part = Hessian(model, CROSS_ENTROPY, (X, y), parameters=["2.weight", "2.bias"])
    torch.testing.assert_close(part.dense(), whole[24:, 24:])
    model[0].requires_grad_(False)
    torch.testing.assert_close(Hessian(model, CROSS_ENTROPY, (X, y)).dense(), whole[24:, 24:])


class Attention(nn.Module):
    """Several inputs, tied weights and scaled dot products, whose fused kernel has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        x = self.embed(tokens) + shift[:, None, None]
        return self.out(nn.functional.scaled_dot_product_attention(x, x, x)).transpose(1, 2)


@pytest.mark.parametrize("form", [tuple, lambda pair: dict(zip(("tokens", "shift"), pair))])
def test_attention_with_several_inputs_and_tied_weights(form):
    torch.manual_seed(0)
    model = Attention().double()
    tokens, shift = torch.randint(6, (5, 3)), torch.randn(5, dtype=torch.float64)
    op = Hessian(model, CROSS_ENTROPY, (form((tokens, shift)), tokens), chunk=2)
    weight = model.embed.weight.detach()

    def loss(w: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return CROSS_ENTROPY(functional_call(model, {"embed.weight": w.view(6, 4)}, (tokens, shift)), tokens)

    exact = torch.autograd.functional.hessian(loss, weight.flatten())
    assert op.shape == (24, 24)
    torch.testing.assert_close(op.dense(), exact)
    ggn = GaussNewton(model, CROSS_ENTROPY, (form((tokens, shift)), tokens), chunk=2)
    torch.testing.assert_close(ggn.dense(), CurvatureOperator.dense(ggn))


def test_scipy_finds_the_same_eigenvalues():
    model, (X, y) = network(), data()
    op = Hessian(model, CROSS_ENTROPY, (X, y))
    as_scipy = op.scipy()
    assert isinstance(as_scipy, LinearOperator)
    exact = np.linalg.eigvalsh(explicit("hessian", model, X, y).numpy())
    largest = eigsh(as_scipy, k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(largest), exact[-2:], rtol=1e-6)
    np.testing.assert_allclose(as_scipy @ np.eye(op.shape[0]), op.dense().numpy(), atol=1e-14)
    np.testing.assert_allclose(as_scipy.T @ np.eye(op.shape[0])[0], op.dense().numpy()[0], atol=1e-14)


def test_single_precision_stays_single():
    model, (X, y) = network().float(), data()
    op = GaussNewton(model, CROSS_ENTROPY, (X.float(), y))
    assert op(torch.ones(op.shape[0])).dtype == torch.float32
    assert op.scipy().dtype == np.float32


# Batch norm and randomness --------------------------------------------------------------------------------------------


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()


def test_batch_norm_in_training_mode_is_refused_by_name():
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\).*eval"):
        Hessian(normalised(), CROSS_ENTROPY, data())


def test_a_model_put_back_into_training_mode_is_refused_at_the_product():
    model = normalised().eval()
    op = Hessian(model, CROSS_ENTROPY, data())
    model.train()
    with pytest.raises(ValueError, match="BatchNorm1d"):
        op(torch.ones(op.shape[0], dtype=torch.float64))


def test_batch_statistics_on_request_and_running_statistics_stay():
    model, (X, y) = normalised(), data()
    before = {n: b.clone() for n, b in model.named_buffers()}
    op = Hessian(model, CROSS_ENTROPY, [(X[:6], y[:6]), (X[6:], y[6:])], batch_statistics=True)
    v = torch.randn(op.shape[0], dtype=torch.float64)

    def loss(theta: Tensor, part: slice) -> Tensor:
        at, _ = of_parameters(model, lambda out: CROSS_ENTROPY(out, y[part], reduction="sum"))
        return at(theta, X[part]) / len(X)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    exact = sum(
        torch.autograd.functional.hessian(lambda t, p=part: loss(t, p), theta) for part in (slice(6), slice(6, None))
    )
    model.load_state_dict(model.state_dict() | before)  # the explicit computation moved them
    torch.testing.assert_close(op(v), exact @ v)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    ggn = GaussNewton(model, CROSS_ENTROPY, (X, y), batch_statistics=True)
    torch.testing.assert_close(ggn.dense() @ v, ggn(v))


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(input, 0.5))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Dropout(0.1), nn.Linear(5, 3)).double(), r"0 \(Dropout\) drops at random"),
        (Noisy(5, 3).double(), "two calls on the same inputs differ"),
    ],
)
def test_random_models_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        Hessian(model, CROSS_ENTROPY, data())


# Bad input ------------------------------------------------------------------------------------------------------------


X, Y = data()


class Forgetful:
    """A loader that has less to say the second time."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield X, Y
        if self.passes < 4:  # two peeks at construction, one product
            yield X, Y


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "no batches"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), ValueError, "no batches"),
        ([(X, Y), (X[:0], Y[:0])], ValueError, "batch 1 of data holds no examples"),
        (iter([(X, Y)]), TypeError, "only once"),
        (DataLoader(TensorDataset(X, Y), shuffle=True), ValueError, "shuffle=False"),
        (DataLoader(TensorDataset(X, Y), sampler=SubsetRandomSampler(range(4))), ValueError, "shuffle=False"),
        (((X, Y), (X, Y)), TypeError, "go into a list"),
        ([X, Y], TypeError, "pair"),
        ((X, Y[:3]), ValueError, "differ in length"),
        ((X.to("meta"), Y), ValueError, "lies on meta"),
    ],
)
def test_unusable_data_are_named(bad, error, message, without_shape_checks):
    with pytest.raises(error, match=message):
        Hessian(network(), CROSS_ENTROPY, bad).dense()


def test_a_loader_that_changes_between_passes_is_noticed():
    op = Hessian(network(), CROSS_ENTROPY, Forgetful(), memory=1)
    op(torch.ones(op.shape[0], dtype=torch.float64))
    with pytest.raises(RuntimeError, match="22 examples in an earlier pass and 11"):
        op(torch.ones(op.shape[0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction must be one of"),
        ({"reduction": "sum"}, "loss is not the sum over examples"),
        ({"memory": 0}, "memory"),
        ({"chunk": 0}, "chunk"),
        ({"chunk": 2, "batch_statistics": True}, "chunk would change"),
        ({"parameters": ["nothing"]}, "none called nothing"),
        ({"parameters": []}, "require a gradient"),
        ({"parameters": ["0.bias", "0.bias"]}, "twice"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Hessian(network(), CROSS_ENTROPY, (X, Y), **options)


def test_a_loss_per_example_or_with_class_weights_is_refused():
    with pytest.raises(ValueError, match="one number"):
        Hessian(network(), nn.CrossEntropyLoss(reduction="none"), (X, Y))
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 20.0]).double())  # divides by the sum of weights
    with pytest.raises(ValueError, match="mean over examples"):
        Hessian(network(), weighted, (X, Y))


def test_models_and_losses_that_return_no_tensor_are_refused(without_shape_checks):
    class Pair(nn.Linear):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(input), input

    with pytest.raises(TypeError, match="model must return a tensor, got tuple"):
        Hessian(Pair(5, 3).double(), CROSS_ENTROPY, (X, Y))
    with pytest.raises(TypeError, match="loss must return a tensor, got float"):
        Hessian(network(), lambda outputs, targets: 1.0, (X, Y))


def test_an_example_that_is_not_finite_is_an_error():
    spoilt = X.clone()
    spoilt[3, 0] = torch.nan
    op = Hessian(network(), CROSS_ENTROPY, (spoilt, Y))
    with pytest.raises(ArithmeticError, match="data hold NaN"):
        op.per_example(torch.ones(op.shape[0], dtype=torch.float64))


def test_refused_vectors(without_shape_checks):
    op = Hessian(network(), CROSS_ENTROPY, (X, Y))
    with pytest.raises(ValueError, match=r"v must have shape \(39,\) or \(k, 39\), got \(38,\)"):
        op(torch.ones(38, dtype=torch.float64))
    with pytest.raises(ValueError, match="v must have shape"):
        op(torch.ones(0, 39, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"float64.*float32"):
        op(torch.ones(39))


def test_a_product_that_is_not_finite_is_an_error():
    model = network()
    op = Hessian(model, CROSS_ENTROPY, (X, Y))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="not finite"):
        op(torch.ones(op.shape[0], dtype=torch.float64))
    with pytest.raises(ArithmeticError, match="not finite"):
        GaussNewton(model, CROSS_ENTROPY, (X, Y)).dense()


def test_operations_that_need_separate_examples_say_so():
    model = normalised()
    op = Hessian(model, CROSS_ENTROPY, (X, Y), batch_statistics=True)
    with pytest.raises(ValueError, match="no sum over examples"):
        op.per_example(torch.ones(op.shape[0], dtype=torch.float64))
    with pytest.raises(ValueError, match="single examples"):
        EmpiricalFisher(model, CROSS_ENTROPY, (X, Y), batch_statistics=True)
    sampled = Fisher(network(), Categorical(), (X, Y), samples=1)
    with pytest.raises(ValueError, match="samples=None"):
        sampled.per_example(torch.ones(sampled.shape[0], dtype=torch.float64))
