"""Infinite-width kernels: reference values of neural-tangents, quadrature, compiled against step by step, refusals."""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge
from torch import nn

from locally.tangent.kernel import (
    GELU,
    ABReLU,
    Activation,
    AvgPool,
    Conv,
    Dense,
    Erf,
    Exponential,
    Flatten,
    Gaussian,
    GlobalAvgPool,
    InfiniteNetwork,
    LayerNorm,
    Quadrature,
    RBFFeature,
    Residual,
    Sign,
    Sine,
    Sum,
    absolute,
    cosine,
    empirical_ntk,
    identity,
    leaky_relu,
    relu,
    residual,
)

BACKENDS = ("reference", "compiled")
FUNCTIONS = {
    "relu": relu(),
    "erf": Erf(),
    "leaky0.2": leaky_relu(0.2),
    "abs": absolute(),
    "sin": Sine(),
    "gelu": GELU(),
    "sign": Sign(),
    "rbf0.7": RBFFeature(0.7),
    "cos": cosine(),
    "exp0.5": Exponential(0.5, 0.5),
}
DENSE, READOUT = Dense(None, 1.3, 0.4), Dense(None, 1.1, 0.2)


@pytest.fixture(scope="module")
def reference():
    path = Path(__file__).parents[1] / "golden/18-neural-tangent-kernel/neural_tangents_kernels.npz"
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


@cache
def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def agree(found, reference, key, rtol=1e-11):
    np.testing.assert_allclose(found.nngp, reference[f"{key}_nngp"], rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(found.ntk, reference[f"{key}_ntk"], rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dense_networks_have_the_values_of_neural_tangents(name, backend, reference):
    for depth in (1,) if name == "exp0.5" else (1, 3):
        net = InfiniteNetwork(*[DENSE, Activation(FUNCTIONS[name])] * depth, READOUT)
        agree(net.kernel(reference["X1"], reference["X2"], backend=backend), reference, f"fc_{name}_d{depth}")
        same = net.kernel(reference["X1"], backend=backend)
        np.testing.assert_allclose(same.nngp, reference[f"fc_{name}_d{depth}_nngp11"], rtol=1e-7)
        np.testing.assert_allclose(same.ntk, reference[f"fc_{name}_d{depth}_ntk11"], rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_standard_residual_and_normalised_networks(backend, reference):
    wide = [Dense(n, 1.3, 0.4, "standard") for n in (50, 30)]
    last = Dense(None, 1.1, 0.2, "standard")
    block = residual(Activation(), DENSE)
    nets = {
        "fcstd_relu_50_30": InfiniteNetwork(wide[0], Activation(), wide[1], Activation(), last),
        "fcres_relu": InfiniteNetwork(DENSE, block, block, Activation(), READOUT),
        "fcln_relu": InfiniteNetwork(DENSE, LayerNorm(), Activation(), READOUT),
    }
    for key, net in nets.items():
        agree(net.kernel(reference["X1"], reference["X2"], backend=backend), reference, key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["same", "valid", "circular"])
def test_convolutional_networks_have_the_values_of_neural_tangents(padding, backend, reference):
    left, right = (np.moveaxis(reference[k], 3, 1).copy() for k in ("I1", "I2"))
    heads = {"flatten": [Flatten()], "gap": [GlobalAvgPool()], "avgpool": [AvgPool(2), Flatten()]}
    found = 0
    for name, head in heads.items():
        for stride in (1, 2):
            key = f"conv_{padding.upper()}_{name}_s{stride}"
            if f"{key}_ntk" in reference:
                second = Conv(None, 3, 1, "circular" if padding == "circular" else "same", 1.2, 0.1)
                first = Conv(None, 3, stride, padding, 1.3, 0.3)
                net = InfiniteNetwork(first, Activation(), second, Activation(), *head, READOUT)
                agree(net.kernel(left, right, backend=backend), reference, key)
                found += 1
    assert found == 5


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), Gaussian(1.2, -0.4), identity()], ids=repr)
def test_closed_forms_are_the_gaussian_integrals(function):
    q = [torch.tensor(v, dtype=torch.float64) for v in (1.3, 0.6, 0.8)]
    smooth = not isinstance(function, ABReLU | Sign) or function == identity()
    integral = Quadrature(function, nodes=100 if smooth else 250).dual(*q)
    for exact, numeric in zip(function.dual(*q)[: 1 if isinstance(function, Sign) else 2], integral):
        assert float(numeric) == pytest.approx(float(exact), abs=1e-8 if smooth else 2e-2)


@given(
    v=st.tuples(st.floats(1e-3, 50), st.floats(1e-3, 50)),
    correlation=st.floats(-1, 1),
    name=st.sampled_from(["relu", "erf", "gelu", "sin", "sign", "rbf0.7", "cos", "abs", "leaky0.2"]),
)
def test_duals_stay_within_cauchy_schwarz(v, correlation, name):
    a, b = (torch.tensor(x, dtype=torch.float64) for x in v)
    function = FUNCTIONS[name]
    value, prime = function.dual(a, correlation * (a * b).sqrt(), b)
    for found, own in zip((value, prime), zip(function.diagonal(a), function.diagonal(b))):
        assert abs(float(found)) <= math.sqrt(float(own[0] * own[1])) * (1 + 1e-6) + 1e-7
        assert math.isfinite(float(found))


def test_linear_networks_are_polynomial():
    x = draw(5, 3)
    for layers in (1, 3, 6):
        net = InfiniteNetwork(*[Dense(None, 1.0, 0.0), Activation("identity")] * (layers - 1), Dense(None, 1.0, 0.0))
        K = net.kernel(x)
        np.testing.assert_allclose(K.nngp, x @ x.T / 3, rtol=1e-12)
        np.testing.assert_allclose(K.ntk, layers * x @ x.T / 3, rtol=1e-12)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), n=st.integers(2, 12))
def test_kernels_are_symmetric_and_positive_definite_on_the_sphere(seed, n):
    x = np.random.default_rng(seed).standard_normal((n, 4))
    K = InfiniteNetwork.mlp(2).kernel(x / np.linalg.norm(x, axis=1, keepdims=True))
    for k in (K.nngp, K.ntk):
        np.testing.assert_array_equal(k, k.T)
        assert np.linalg.eigvalsh(k).min() > 0


@pytest.mark.parametrize("n", [3, 700])
def test_compiled_tiles_agree_with_the_reference(n):
    x, y = draw(n, 5), draw(40, 5)
    net = InfiniteNetwork(
        DENSE,
        Sum((Activation("gelu"), DENSE, Activation("erf"), DENSE), (Activation("sin"), DENSE)),
        Activation(),
        READOUT,
    )
    one, other = (net.kernel(x, backend=b) for b in BACKENDS)
    np.testing.assert_allclose(one.ntk, other.ntk, rtol=1e-9)
    one, other = (net.kernel(x, y, backend=b) for b in BACKENDS)
    np.testing.assert_allclose(one.nngp, other.nngp, rtol=1e-9)
    halves = net.kernel(x, y, backend="compiled", threads=2)
    np.testing.assert_array_equal(other.ntk, halves.ntk)


def test_residual_blocks_of_images_agree_with_the_reference():
    conv = Conv(None, 3, 1, "same", 1.1, 0.2)
    strided = (Conv(None, 3, 2, "same", 1.2, 0.1),)
    x = draw(6, 2, 7, 6)
    for head in (Flatten(), GlobalAvgPool()):
        block = Sum((Activation(), *strided), (Activation("erf"), *strided))
        net = InfiniteNetwork(conv, residual(Activation(), conv), block, Activation(), head, READOUT)
        one, other = (net.kernel(x, backend=b) for b in BACKENDS)
        np.testing.assert_allclose(one.ntk, other.ntk, rtol=1e-10)
        np.testing.assert_allclose(one.nngp, other.nngp, rtol=1e-10)


def test_windows_that_grow_one_side_and_shrink_the_other_agree_with_the_reference():
    x = draw(5, 2, 3, 9)
    conv = Conv(None, (2, 5), (1, 2), ((3, 2), (1, 0)), 1.1, 0.2)
    for head in (Flatten(), GlobalAvgPool()):
        net = InfiniteNetwork(conv, Activation(), head, READOUT)
        np.testing.assert_allclose(*(net.ntk(x, backend=b) for b in BACKENDS), rtol=1e-10)


def test_one_pixel_is_a_vector_and_flatten_takes_the_equal_pixels():
    x = draw(4, 3, 1, 1)
    cnn = InfiniteNetwork(Conv(None, 1), Activation(), Flatten(), Dense())
    mlp = InfiniteNetwork(Dense(), Activation(), Dense())
    np.testing.assert_allclose(cnn.ntk(x), mlp.ntk(x[:, :, 0, 0]), rtol=1e-12)
    images = draw(4, 2, 5, 5)
    layers = [Conv(), Activation(), Conv(), Activation()]
    short = InfiniteNetwork(*layers, Flatten(), Dense()).ntk(images)
    every = InfiniteNetwork(*layers, AvgPool(1), Flatten(), Dense()).ntk(images)  # keeps all pairs of pixels
    np.testing.assert_allclose(short, every, rtol=1e-12)


def test_zero_inputs_and_repeated_ones_are_finite():
    x = np.vstack([np.zeros((1, 3)), draw(2, 3), draw(2, 3)])
    for backend in BACKENDS:
        K = InfiniteNetwork.mlp(3, b_std=0.0).kernel(x, backend=backend)
        assert np.isfinite(K.ntk).all()
        assert np.abs(K.ntk[0]).max() == 0
        np.testing.assert_allclose(K.ntk[1, 3], K.ntk[1, 1], rtol=1e-6)


def test_tensors_keep_their_dtype_and_reference_has_gradients():
    x = torch.as_tensor(draw(4, 3)).float()
    assert InfiniteNetwork.mlp().ntk(x).dtype == torch.float32
    x = torch.as_tensor(draw(3, 2)).requires_grad_()
    y = torch.as_tensor(draw(2, 2))
    assert torch.autograd.gradcheck(lambda x: InfiniteNetwork.mlp(2, "erf").ntk(x, y), (x,))


def test_it_is_a_kernel_for_scikit_learn():
    x, y = draw(12, 3), draw(12, 3)[:, 0]
    net = InfiniteNetwork.mlp()
    ridge = KernelRidge(alpha=0.1, kernel=net).fit(x, y)
    explicit = net.ntk(x) @ np.linalg.solve(net.ntk(x) + 0.1 * np.eye(12), y)
    np.testing.assert_allclose(ridge.predict(x), explicit, rtol=1e-6)
    np.testing.assert_allclose(net.diagonal(x).ntk, np.diag(net.ntk(x)), rtol=1e-12)


def test_wide_networks_approach_their_limit():
    x = draw(4, 3)
    net = InfiniteNetwork(
        Dense(w_std=1.2, b_std=0.3), LayerNorm(), residual(Activation("relu"), Dense()), Activation("erf"), Dense()
    )
    t = torch.as_tensor(x)
    generator = torch.Generator().manual_seed(0)
    width, draws = 512, 12
    nets = [net.finite(3, width, generator=generator, dtype=torch.float64) for _ in range(draws)]
    found = torch.stack([empirical_ntk(n, t) for n in nets])
    error = found.std(0) / math.sqrt(draws)
    assert ((found.mean(0) - net.ntk(t)).abs() <= 4 * error + 4 / width).all()


def test_wide_convolutional_networks_approach_their_limit():
    x = torch.as_tensor(draw(2, 2, 4, 4))
    net = InfiniteNetwork(
        Conv(size=3, padding="circular"),
        Activation(),
        AvgPool(2),
        Conv(size=2, padding="valid"),
        Activation(),
        Flatten(),
        Dense(),
    )
    generator = torch.Generator().manual_seed(1)
    found = torch.stack(
        [empirical_ntk(net.finite((2, 4, 4), 256, generator=generator, dtype=torch.float64), x) for _ in range(12)]
    )
    error = found.std(0) / math.sqrt(12)
    assert ((found.mean(0) - net.ntk(x)).abs() <= 4 * error + 4 / 256).all()


def test_a_torch_sequential_becomes_its_limit():
    module = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.LeakyReLU(0.2)),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.LayerNorm(4, elementwise_affine=False),
        Residual(nn.Sequential(nn.GELU(), nn.Linear(4, 4))),
        nn.Tanh(),
        nn.Linear(4, 3),
    )
    net = InfiniteNetwork.from_module(module, w_std=1.2, b_std=0.3)
    by_hand = InfiniteNetwork(
        Conv(None, 3, 1, 1, 1.2, 0.3),
        Activation(),
        Conv(None, 3, 2, 0, 1.2, 0.0),
        Activation(leaky_relu(0.2)),
        AvgPool(2),
        Flatten(),
        Dense(None, 1.2, 0.3),
        LayerNorm(1e-5),
        residual(Activation("gelu"), Dense(None, 1.2, 0.3)),
        Activation("tanh"),
        Dense(None, 1.2, 0.3),
    )
    x = draw(3, 2, 6, 6)
    np.testing.assert_allclose(net.ntk(x), by_hand.ntk(x), rtol=1e-12)
    again = InfiniteNetwork.from_module(by_hand.finite((2, 6, 6), 5))
    np.testing.assert_allclose(again.ntk(x), by_hand.ntk(x), rtol=1e-12)


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        (nn.BatchNorm2d(4), "1.0"),
        (nn.MaxPool2d(2), "1.0"),
        (nn.Dropout(0.5), "1.0"),
        (nn.Conv2d(4, 4, 3, groups=2), "1.0"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), "1.0"),
        (nn.LayerNorm([4, 5, 5]), "1.0"),
        (nn.Flatten(2), "1.0"),
        (nn.AvgPool2d(2, padding=1), "1.0"),
        (nn.AdaptiveAvgPool2d(2), "1.0"),
        (nn.MultiheadAttention(4, 1), "1.0"),
    ],
)
def test_unsupported_modules_are_named_with_their_path(bad, path):
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(bad), nn.Flatten(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=rf"module: {path} \({type(bad).__name__}\)"):
        InfiniteNetwork.from_module(module)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((Activation(), Dense()), "0 .Activation. must follow an affine layer"),
        ((Dense(), Activation(), Activation(), Dense()), "2 .Activation. must follow"),
        ((Dense(), Activation()), "end in an affine layer"),
        ((Dense(), Activation(), LayerNorm(), Dense()), "2 .LayerNorm. must follow"),
        ((Conv(), Flatten(), Dense()), "0 .Conv. needs images"),
        ((Dense(), residual(Dense(), Activation()), Dense()), "1 .Sum.: a branch must end"),
        ((Dense(4), Sum((Dense(5),), ()), Dense()), "4 and 5|5 and 4"),
        ((Dense(), Activation(), Dense(None, 1.0, 0.1, "standard")), "2 .Dense. has the standard"),
        ((Dense(), GlobalAvgPool(), Dense()), "1 .GlobalAvgPool. needs images"),
    ],
)
def test_compositions_without_a_limit_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        InfiniteNetwork(*layers).kernel(draw(3, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_progress_ends_at_one_and_an_interruption_comes_through(backend):
    seen = []
    InfiniteNetwork.mlp(1).kernel(draw(30, 3), backend=backend, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1

    def stop(_share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InfiniteNetwork.mlp(1).kernel(draw(30, 3), backend=backend, progress=stop)


def test_bad_arguments_are_named():
    net = InfiniteNetwork.mlp()
    for call, match in [
        (lambda: net.kernel(np.array([[np.nan, 1.0]])), "x1 holds NaN"),
        (lambda: net.kernel(draw(3, 2), draw(3, 4)), "x1 and x2 differ"),
        (lambda: net.kernel(np.zeros((0, 2))), "x1 must have shape"),
        (lambda: net.kernel(draw(3, 2), backend="gpu"), "backend"),
        (lambda: InfiniteNetwork.mlp(1, "tanh").kernel(draw(3, 2), backend="compiled"), "compiled"),
        (lambda: Dense(w_std=0.0), "w_std"),
        (lambda: Conv(padding="full"), "padding"),
        (lambda: Activation("swish") and InfiniteNetwork.mlp(1, "swish").kernel(draw(3, 2)), "activation must be"),
        (lambda: InfiniteNetwork(), "at least one"),
        (lambda: Gaussian(1.0, 1.0), "-b"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            call()
