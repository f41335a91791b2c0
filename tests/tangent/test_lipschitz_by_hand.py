"""Normalisations written out as powers, means and roots: the same bounds as the layers', sound, or refused by name."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import jacrev, vmap

from locally.tangent.lipschitz import LocalLipschitz, jacobian_bounds, read_module, read_onnx
from locally.tangent.lipschitz.by_hand import Ref, Spread, Squared
from locally.tangent.lipschitz.network import Network

F64 = {"dtype": torch.float64}
EPS = 3e-3


@pytest.fixture(autouse=True, scope="module")
def fast():
    """Shape checks of every inner step cost more than the bounds."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def llama(x, w):
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    return w * (h * torch.rsqrt(variance + EPS)).to(x.dtype)


ROOT_MEAN_SQUARES = {
    "method calls": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
    "a sum over a size": lambda x, w: w * (x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS)),
    "a reciprocal": lambda x, w: w * (x * (1 / (torch.mean(x**2, dim=-1, keepdim=True) + EPS).sqrt())).type_as(x),
    "a negative power": lambda x, w: w * (x * (x.square().mean((-1,), keepdim=True) + EPS) ** -0.5),
    "a reciprocal root": lambda x, w: torch.reciprocal((EPS + x.square().mean(-1, True)).sqrt()) * x * w,
    "weight on top": lambda x, w: (w * x) / (x.square().mean(-1, keepdim=True) + EPS).pow(0.5),
    "scaled squares": lambda x, w: 2 * w * x / torch.sqrt(4 * (x.square().mean(-1, keepdim=True) + EPS)),
}  # fmt: skip
LAYER_NORMS = {
    "deviations": lambda x, w: w * (x - x.mean(-1, keepdim=True))
    * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + EPS),
    "one name for the deviations": lambda x, w: deviating(x - x.mean(-1, keepdim=True), w),
    "variance": lambda x, w: (x - torch.mean(x, -1, keepdim=True))
    / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * w,
}  # fmt: skip


def deviating(c, w):
    return w * (c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + EPS))


class Norm(nn.Module):
    def __init__(self, form, d):
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.randn(d))

    def forward(self, x):
        return self.form(x, self.weight)


def network(form, seed, layer=None):
    """The same random network around a form, or around torch's layer in its place."""
    torch.manual_seed(seed)
    first, norm, last = nn.Linear(3, 5), Norm(form, 5), nn.Linear(5, 2)
    scale = 0.3 + 3 * float(torch.rand(()))
    for p in (first.weight, first.bias):
        p.data *= scale
    middle = norm
    if layer is not None:
        middle = layer(5, eps=EPS)
        middle.weight.data = norm.weight.data
    return nn.Sequential(first, middle, nn.Tanh(), last).double()


ALL = {
    **{k: (f, nn.RMSNorm) for k, f in ROOT_MEAN_SQUARES.items()},
    **{k: (f, nn.LayerNorm) for k, f in LAYER_NORMS.items()},
}


@pytest.mark.parametrize("name", ALL)
def test_forms_are_bounded_as_the_layer_is(name):
    form, layer = ALL[name]
    for seed, eps in ((0, 0.01), (1, 0.3)):
        by_hand, named = network(form, seed), network(form, seed, layer)
        x = torch.randn(2, 3, **F64)
        torch.testing.assert_close(by_hand(x), named(x))
        ours, theirs = (jacobian_bounds(net, x, eps) for net in (by_hand, named))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        kinds = [type(node.op).__name__ for node in read_module(by_hand, (3,)).nodes]
        assert kinds.count("Normalisation") == 1
        assert "Rearrangement" not in kinds  # what only led to the normalisation is gone


def test_casts_to_single_precision_and_back_are_read():
    net, x = network(llama, 0).float(), torch.randn(2, 3)
    torch.testing.assert_close(read_module(net, (3,))(x.double()), net(x).double(), rtol=1e-5, atol=1e-6)
    same = network(llama, 0, nn.RMSNorm)
    for a, b in zip(jacobian_bounds(net, x.double(), 0.1), jacobian_bounds(same, x.double(), 0.1)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(ALL)))
def test_every_sampled_gradient_lies_within_its_bounds(seed, name):
    net = network(ALL[name][0], seed)
    eps, x = 10 ** float(4 * torch.rand(()) - 3.5), torch.randn(2, 3, **F64)
    unit = 2 * torch.rand(60, 2, 3, **F64) - 1
    unit[:20] = unit[:20].sign()
    J = vmap(jacrev(lambda z: net(z[None])[0]))((x + eps * unit).flatten(0, 1)).view(60, 2, 2, 3)
    lower, upper = jacobian_bounds(net, x, eps)
    slack = 1e-10 * (1 + J.abs().amax())  # autograd rounds, too
    assert (lower - slack <= J).all()
    assert (upper + slack >= J).all()
    ord = (math.inf, 2, 1)[seed % 3]
    found = LocalLipschitz(ord=ord, method="bab", max_domains=8, batch_size=4, samples=4).certify(net, x, eps)
    assert (torch.linalg.matrix_norm(J, ord).amax(0) <= found.value * (1 + 1e-10)).all()


def test_bessels_correction_is_a_factor():
    net = network(lambda x, w: w * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt(), 0)
    x = torch.randn(4, 3, **F64)
    torch.testing.assert_close(read_module(net, (3,))(x), net(x))
    mixed = network(
        lambda x, w: w * (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) + 1) ** -0.5, 0
    )
    torch.testing.assert_close(read_module(mixed, (3,))(x), mixed(x))


def test_deviations_over_more_than_is_squared_are_not_centred_there():
    class Mixed(nn.Module):
        def forward(self, x):
            c = x - x.mean((-2, -1), keepdim=True)
            return (c * torch.rsqrt(c.square().mean(-1, keepdim=True) + EPS)).flatten(1)

    graph, x = read_module(Mixed(), (2, 3)), torch.randn(4, 2, 3, **F64)
    torch.testing.assert_close(graph(x), Mixed()(x))
    (op,) = (node.op for node in graph.nodes if type(node.op).__name__ == "Normalisation")
    assert not op.centred


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x, w: x.pow(2) * w, r"pow .*|mul .* only x / sqrt"),
        (lambda x, w: x.pow(3), r"pow \(in 1\) is not supported"),
        (lambda x, w: x * x * x, r"mul .* is not supported: of squares only"),
        (lambda x, w: x / (x.square().mean(-1, keepdim=True).sqrt() + EPS), r"add .* not supported: of squares only"),
        (lambda x, w: x / x.square().mean(-1, keepdim=True).sqrt(), r"eps 0: its slope has no bound"),
        (lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-300).rsqrt(), "eps 1e-300, below 1e-290"),
        (lambda x, w: x / (x.square().mean(-1, keepdim=True) + EPS), r"truediv .* is not supported: of squares only"),
        (lambda x, w: x / (x.square().mean(-1).unsqueeze(-1) + EPS).sqrt(), "keepdim=True"),
        (lambda x, w: x / (x.square().mean(0, keepdim=True) + EPS).sqrt(), "last dimensions only"),
        (lambda x, w: x.tanh() / (x.square().mean(-1, keepdim=True) + EPS).sqrt(), "root of another's mean square"),
        (lambda x, w: -x.square(), r"neg .* is not supported: of squares only"),
        (lambda x, w: x.square().mean(-1, keepdim=True).exp(), r"exp .* is not supported"),
        (lambda x, w: x.square().mean(-1, keepdim=True) - 1.0, r"sub .* is not supported: of squares only"),
        (lambda x, w: x - x.std(-1, keepdim=True), r"sub .* is not supported: of squares only"),
        (lambda x, w: x - x.flip(1).mean(-1, keepdim=True), r"flip|broadcasts"),
        (lambda x, w: x.square(), r"square \(in 1\) is not supported: of squares only"),
        (lambda x, w: x.sqrt(), r"sqrt \(in 1\) is not supported"),
        (lambda x, w: x.to(torch.float16), r"to \(in 1\) is not supported"),
    ],
)  # fmt: skip
def test_what_is_no_normalisation_is_refused_where_it_leaves_the_pattern(form, message):
    net = nn.Sequential(nn.Linear(3, 5), Norm(form, 5)).double()
    with pytest.raises(ValueError, match=message):
        read_module(net, (3,))


# ONNX ----------------------------------------------------------------------------------------------------------------


def onnx_model(tmp_path, nodes, arrays):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    value = lambda name, sizes: helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
    weights = [numpy_helper.from_array(t.detach().numpy(), name) for name, t in arrays.items()]
    made = [helper.make_node(kind, inputs.split(), [out], name=out, **at) for kind, inputs, out, at in nodes]
    graph = helper.make_graph(made, "net", [value("x", ["n", 3])], [value("y", ["n", 4])], weights)
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


BEGIN = [("Gemm", "x W b", "h", {"transB": 1})]
SQUARE = [("Pow", "h two", "s", {}), ("ReduceMean", "s", "m", {"axes": [-1]}), ("Add", "m e", "v", {})]
FILES = {
    "reciprocal": [*BEGIN, *SQUARE, ("Sqrt", "v", "r", {}), ("Reciprocal", "r", "i", {}), ("Mul", "h i", "n", {})],
    "one over": [*BEGIN, *SQUARE, ("Sqrt", "v", "r", {}), ("Div", "one r", "i", {}), ("Mul", "i h", "n", {})],
    "quotient": [*BEGIN, *SQUARE, ("Pow", "v half", "r", {}), ("Div", "h r", "n", {})],
    "product": [
        *BEGIN, ("Mul", "h h", "s", {}), ("ReduceSum", "s last", "t", {}), ("Div", "t four", "m", {}),
        ("Add", "e m", "v", {}), ("Cast", "v", "w", {"to": 1}), ("Sqrt", "w", "r", {}), ("Div", "h r", "n", {}),
    ],
    "layer norm": [
        *BEGIN, ("ReduceMean", "h", "mu", {"axes": [1]}), ("Sub", "h mu", "c", {}), ("Pow", "c two", "s", {}),
        ("ReduceMean", "s", "m", {"axes": [-1]}), ("Add", "m e", "v", {}), ("Sqrt", "v", "r", {}),
        ("Div", "c r", "n", {}),
    ],
}  # fmt: skip


def written(tmp_path, name, change=lambda nodes: nodes):
    torch.manual_seed(0)
    dense, weight = nn.Linear(3, 4), torch.randn(4)
    scalars = {"two": 2.0, "one": 1.0, "half": 0.5, "four": 4.0, "e": EPS}
    arrays = {"W": dense.weight, "b": dense.bias, "g": weight, "last": torch.tensor([-1])}
    arrays |= {k: torch.tensor(v) for k, v in scalars.items()}
    nodes = change([*FILES[name], ("Mul", "n g", "y", {})])
    norm = (nn.LayerNorm if name == "layer norm" else nn.RMSNorm)(4, eps=EPS)
    norm.weight.data = weight
    return read_onnx(onnx_model(tmp_path, nodes, arrays)), nn.Sequential(dense, norm).double()


@pytest.mark.parametrize("name", FILES)
def test_onnx_files_give_the_bounds_of_the_layer(tmp_path, name):
    read, module = written(tmp_path, name)
    assert isinstance(read, Network)
    x = torch.randn(3, 3, **F64)
    torch.testing.assert_close(read(x), module(x), rtol=1e-6, atol=1e-7)  # eps is in single precision in the file
    for a, b in zip(jacobian_bounds(read, x, 0.05), jacobian_bounds(module, x, 0.05)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_onnx_files_with_other_squares_are_refused(tmp_path):
    for change, message in (
        (lambda nodes: [*nodes[:2], ("Mul", "s g", "y", {})], r"Mul \(y\) is not supported: of squares only"),
        (lambda nodes: [*nodes[:3], ("Exp", "m", "v", {}), *nodes[4:]], r"Exp \(v\) is not supported"),
        (lambda nodes: [*nodes[:1], ("Sqrt", "h", "s", {}), ("Mul", "s g", "y", {})], r"Sqrt \(s\) is not supported"),
        (lambda nodes: [*nodes[:2], ("ReduceMean", "s", "m", {"axes": [0]}), *nodes[3:]], "last dimensions only"),
        (lambda nodes: [*nodes[:1], ("Mul", "h h", "y", {})], r"Mul \(y\) is not supported: of squares only"),
        (lambda nodes: [*nodes[:2], ("Gemm", "x s b", "y", {})], r"Gemm \(y\) is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            written(tmp_path, "reciprocal", change)


def test_steps_of_the_formula():
    """(factor mean(c^2) + shift)^power through every operation that keeps it."""
    hand = read_builder()
    spread = hand.reduce(hand.power(Ref(0), 2, ""), -1, True, total=True, where="")
    assert spread == Spread(0, 1, 5.0)
    step = hand.arithmetic("div", hand.arithmetic("add", spread, 10.0, ""), torch.tensor([5.0]), "")
    assert step == Spread(0, 1, 1.0, 2.0)
    assert hand.power(step, -0.5, "") == hand.arithmetic("div", 1, hand.power(step, 0.5, ""), "")
    assert hand.arithmetic("mul", Ref(0), Ref(0), "") == Squared(0)
    assert hand.arithmetic("sub", Ref(0), Ref(0), "") is None
    assert hand.arithmetic("mul", Ref(0), 3.0, "") is None


def read_builder():
    from locally.tangent.lipschitz.by_hand import ByHand
    from locally.tangent.lipschitz.layers import Builder

    return ByHand(Builder((5,)))
