"""Certificates built on the bounds, ONNX files, interruption, memory, and what bad input gets."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from locally.tangent.lipschitz import (
    LocalLipschitz,
    Status,
    jacobian_bounds,
    jvp_bounds,
    monotonicity,
    read_module,
    read_onnx,
    robust_radius,
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()


X = torch.zeros(2, 4, dtype=torch.float64)


# Certificates --------------------------------------------------------------------------------------------------------


def test_monotone_networks_are_proven_so_and_others_are_not():
    torch.manual_seed(0)
    rising = nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 1)).double()
    for p in (rising[0].weight, rising[2].weight):
        p.data.abs_()
    points = torch.rand(5, 3, dtype=torch.float64)
    table = monotonicity(rising, points, [0, 2], target=0)
    assert table.proven == 1.0
    assert table.increasing.all()
    assert not table.decreasing.any()

    bowl = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    bowl[0].weight.data, bowl[2].weight.data = torch.tensor([[1.0], [-1.0]]).double(), torch.ones(1, 2).double()
    both = monotonicity(bowl, torch.zeros(1, 1), [0], target=0, ranges=(-1.0, 1.0))
    assert both.proven == 0.0
    assert monotonicity(bowl, torch.zeros(1, 1), [0], target=0, ranges=(0.5, 1.0)).increasing.item()


def test_monotonicity_holds_on_lines_through_the_instances(net):
    points = torch.rand(4, 4, dtype=torch.float64)
    table = monotonicity(net, points, [0, 1, 2, 3], target=1)
    interval = monotonicity(net, points, [0, 1, 2, 3], target=1, method="interval")
    assert (table.lower >= interval.lower - 1e-12).all()
    for k in range(4):
        line = points.repeat(50, 1, 1)
        line[:, :, k] = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]
        steps = net(line)[..., 1].diff(dim=0)
        assert (steps[:, table.increasing[:, k]] >= -1e-12).all()
        assert (steps[:, table.decreasing[:, k]] <= 1e-12).all()


@pytest.mark.parametrize("ord", [math.inf, 2, 1])
def test_no_sampled_point_within_the_radius_changes_the_class(net, ord):
    x = torch.randn(6, 4, dtype=torch.float64)
    labels = net(x).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    found = robust_radius(net, x, labels, 3.0, estimator=LocalLipschitz(ord=ord, samples=0))
    assert found.radius[0] == 0  # not the network's answer
    assert (found.radius[1:] > 0).all()
    step = torch.randn(2000, 6, 4, dtype=torch.float64)
    step = step / torch.linalg.vector_norm(step, ord, dim=2, keepdim=True) * found.radius[:, None]
    assert (net(x + step).argmax(2)[:, 1:] == labels[1:]).all()


def test_a_radius_is_the_distance_to_the_boundary_where_the_network_is_linear():
    line = nn.Linear(2, 2, bias=False).double()
    line.weight.data = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double()
    x, label = torch.tensor([[0.3, 0.1]]).double(), torch.tensor([0])
    distances = {math.inf: 0.2, 2: 0.4 / math.sqrt(2), 1: 0.4}
    for ord, distance in distances.items():
        found = robust_radius(line, x, label, 1.0, estimator=LocalLipschitz(ord=ord), rtol=1e-4)
        assert found.radius.item() == pytest.approx(distance, rel=1e-3)


# Models --------------------------------------------------------------------------------------------------------------


class Branchy(nn.Module):
    """Concatenation, arithmetic with constants, functions instead of layers, reshaping."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x):
        a, b = torch.relu(self.first(x)), torch.tanh(self.second(x))
        y = torch.cat([a, b], dim=1) * 2.0 + self.shift
        y = nn.functional.leaky_relu(y.view(y.size(0), 2, 3), 0.2)
        return (1.0 - y.mean(dim=1)) / 4 - a


def test_traced_models_of_every_kind_keep_their_values():
    torch.manual_seed(0)
    model = Branchy().double()
    graph = read_module(model, (4,))
    x = torch.randn(50, 4, dtype=torch.float64)
    torch.testing.assert_close(graph(x), model(x))
    J = torch.func.vmap(torch.func.jacrev(lambda z: model(z[None])[0]))(x)
    lower, upper = jacobian_bounds(graph, x_lower=x.amin(0)[None], x_upper=x.amax(0)[None])
    assert ((lower - 1e-12 <= J) & (upper + 1e-12 >= J)).all()


def test_single_precision_models_are_read_exactly():
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    ours = LocalLipschitz().certify(single, torch.zeros(1, 3), 0.1)
    assert ours.value.dtype == torch.float64
    assert ours.value == LocalLipschitz().certify(single.double(), torch.zeros(1, 3), 0.1).value
    assert single[0].weight.dtype == torch.float64  # the caller's own change, not ours


def test_onnx_files_give_the_bounds_of_the_module(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    torch.manual_seed(0)
    conv, norm, dense = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(8, 3)
    norm.running_mean.normal_()
    module = nn.Sequential(conv, norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), dense, nn.Sigmoid()).eval()
    weights = {
        "w": conv.weight, "b": conv.bias, "scale": norm.weight, "shift": norm.bias, "mean": norm.running_mean,
        "var": norm.running_var, "W": dense.weight, "B": dense.bias,
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["1"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["1", "scale", "shift", "mean", "var"], ["2"]),
        helper.make_node("Relu", ["2"], ["3"]),
        helper.make_node("MaxPool", ["3"], ["4"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["4"], ["5"]),
        helper.make_node("Gemm", ["5", "W", "B"], ["6"], transB=1),
        helper.make_node("Sigmoid", ["6"], ["y"]),
    ]
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    arrays = [numpy_helper.from_array(t.detach().numpy(), name) for name, t in weights.items()]
    graph = helper.make_graph(nodes, "net", [value("x", ["n", 1, 4, 4])], [value("y", ["n", 3])], arrays)
    onnx.save(helper.make_model(graph), tmp_path / "net.onnx")
    network = read_onnx(tmp_path / "net.onnx")
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(network(x.double()), module(x).double(), rtol=1e-5, atol=1e-6)
    ours = LocalLipschitz().certify(network, x, 0.1).value
    torch.testing.assert_close(ours, LocalLipschitz().certify(module, x, 0.1).value, rtol=1e-6, atol=0)

    nodes[-1] = helper.make_node("Sin", ["6"], ["y"], name="wave")
    graph = helper.make_graph(nodes, "net", [value("x", ["n", 1, 4, 4])], [value("y", ["n", 3])], arrays)
    onnx.save(helper.make_model(graph), tmp_path / "sine.onnx")
    with pytest.raises(ValueError, match=r"Sin \(wave\)"):
        read_onnx(tmp_path / "sine.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"this is no model")
    with pytest.raises(ValueError, match=r"noise\.onnx"):
        read_onnx(tmp_path / "noise.onnx")


# Limits --------------------------------------------------------------------------------------------------------------


def test_an_interrupted_search_keeps_its_best_bound(net):
    plain = LocalLipschitz().certify(net, X, 0.8)

    def stop(seconds, bound, domains):
        if domains > 10:
            raise KeyboardInterrupt

    for callback in (stop, lambda seconds, bound, domains: domains > 10):
        estimator = LocalLipschitz(method="bab", batch_size=1)
        found = estimator.certify(net, X, 0.8, callback=callback)
        assert Status.INTERRUPTED in found.status
        assert (found.lower <= found.value).all()
        assert (found.value <= plain.value).all()
        assert found.n_domains < 30


def test_limits_end_in_a_status(net):
    few = LocalLipschitz(method="bab", max_domains=8, batch_size=1).certify(net, X, 0.8)
    assert Status.DOMAIN_LIMIT in few.status
    late = LocalLipschitz(method="bab", timeout=1e-9).certify(net, X, 0.8)
    assert Status.TIME_LIMIT in late.status
    assert (late.value >= late.lower).all()


def test_a_small_memory_budget_only_cuts_the_work(net):
    wide = LocalLipschitz().certify(net, X, 0.3)
    narrow = LocalLipschitz(memory=10 * 8 * 8 * 2 * 3).certify(net, X, 0.3)
    torch.testing.assert_close(wide.value, narrow.value, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="memory: 1000 bytes"):
        LocalLipschitz(memory=1000).certify(net, X, 0.3)


# Refusals ------------------------------------------------------------------------------------------------------------


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.part(x)
        return self.act(y) + y  # y has been changed when it is added


class Forked(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Product(nn.Module):
    def forward(self, x):
        return x * x


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), layer)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wrapped(nn.SiLU()), r"body\.1 \(SiLU\)"),
        (Wrapped(nn.LayerNorm(4, eps=0.0)), r"body\.1 \(LayerNorm\) has eps 0"),
        (Wrapped(nn.Softmax(1)), r"body\.1 \(Softmax\)"),
        (Wrapped(nn.BatchNorm1d(4)), r"body\.1 \(BatchNorm1d\).*eval"),
        (Wrapped(nn.Dropout(0.5)), r"body\.1 \(Dropout\).*eval"),
        (Wrapped(nn.LeakyReLU(2.0)), r"body\.1 \(LeakyReLU\)"),
        (Aliased(), "act changes in place"),
        (Forked(), "control flow"),
        (Product(), "mul .* of squares only"),
        (nn.Linear(5, 1), r"Linear\) does not take an input of shape \(4,\)"),
    ],
)
def test_models_that_cannot_be_bounded_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        LocalLipschitz().certify(model, X, 0.1)


def test_layers_that_change_in_place_are_fine_where_nothing_else_looks(net):
    for i in (1, 3):
        net[i] = nn.ReLU(inplace=True)
    kept = X.clone()
    assert LocalLipschitz().certify(net, X, 0.1).value.isfinite().all()
    assert torch.equal(X, kept)


def test_weights_with_nan_are_named(net):
    net[2].bias.data[0] = math.nan
    with pytest.raises(ValueError, match=r"model: 2\.bias holds NaN"):
        LocalLipschitz().certify(net, X, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -0.1}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"eps": None}, "x and eps"),
        ({"eps": 0.1, "x": X[:, :3]}, "model"),
        ({"eps": 0.1, "x": X * math.nan}, "x holds NaN"),
        ({"eps": 0.1, "clip": (1.0, 2.0)}, "clip"),
        ({"eps": 0.1, "clip": (1.0, -2.0)}, "clip"),
        ({"eps": 0.1, "spec": torch.ones(1, 7)}, "spec"),
        ({"x": None, "x_lower": X + 1, "x_upper": X}, "x_lower must not exceed"),
        ({"x": None, "x_lower": X, "x_upper": X[:1]}, "one shape"),
        ({"x_lower": X, "x_upper": X}, "x and eps"),
    ],
)
def test_bad_boxes_are_named(net, arguments, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        LocalLipschitz().certify(net, **({"x": X} | arguments))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("ord", 3, ValueError),
        ("method", "guess", ValueError),
        ("score", "luck", ValueError),
        ("timeout", 0.0, ValueError),
        ("rtol", -1.0, ValueError),
        ("memory", 0, ValueError),
        ("batch_size", 0, ValueError),
        ("max_domains", 0, ValueError),
        ("candidates", 0, ValueError),
        ("samples", -1, ValueError),
        ("alpha_iters", 1.5, TypeError),
    ],
)
def test_bad_parameters_are_named(name, value, error, without_shape_checks):
    with pytest.raises(error, match=name):
        LocalLipschitz(**{name: value})


def test_the_exact_programme_needs_piecewise_linear_networks_and_the_infinity_norm():
    smooth = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with pytest.raises(ValueError, match=r"piecewise linear.*1 \(Tanh\)"):
        LocalLipschitz(method="exact").certify(smooth, torch.zeros(1, 2), 0.1)
    with pytest.raises(ValueError, match="ord=inf"):
        LocalLipschitz(method="exact", ord=2)


def test_bad_arguments_of_certificates_are_named(net, without_shape_checks):
    with pytest.raises(ValueError, match="features"):
        monotonicity(net, X, [4], target=0)
    with pytest.raises(ValueError, match="target"):
        monotonicity(net, X, [0], target=3)
    with pytest.raises(ValueError, match="ranges"):
        monotonicity(net, X, [0], target=0, ranges=(1.0, 0.0))
    with pytest.raises(ValueError, match="labels"):
        robust_radius(net, X, torch.tensor([0, 3]), 1.0)
    with pytest.raises(ValueError, match="max_radius"):
        robust_radius(net, X, torch.tensor([0, 1]), 0.0)
    with pytest.raises(ValueError, match="v must have the shape"):
        jvp_bounds(net, X, X[:1], 0.1)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        LocalLipschitz().certify(np.zeros(3), X, 0.1)
