"""Layer, root-mean-square, group and instance normalisation: soundness of every part, tightness, readers, refusals."""

import itertools
import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import jacrev, vmap

from locally.tangent.lipschitz import LocalLipschitz, Status, jacobian_bounds, jvp_bounds, read_module, read_onnx
from locally.tangent.lipschitz.budget import Budget
from locally.tangent.lipschitz.estimator import make_box
from locally.tangent.lipschitz.normalisation import Normalisation
from locally.tangent.lipschitz.normalised_gradients import mean_product, normalised_product, projection
from locally.tangent.lipschitz.operations import Centring
from locally.tangent.lipschitz.propagation import Forward
from locally.tangent.lipschitz.relaxations import Relaxation

INF = math.inf
F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True, scope="module")
def fast():
    """Shape checks of every inner step cost more than the bounds."""
    jaxtyping.config.update("jaxtyping_disable", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    jaxtyping.config.update("jaxtyping_disable", False)


class Residual(nn.Module):
    """A transformer's block without attention: x + W2 gelu(W1 norm(x))."""

    def __init__(self, norm, n):
        super().__init__()
        self.norm, self.inner, self.outer = norm, nn.Linear(n, 2 * n), nn.Linear(2 * n, n)

    def forward(self, x):
        return x + self.outer(nn.functional.gelu(self.inner(self.norm(x))))


NETWORKS = {
    "after": (lambda: nn.Sequential(
        nn.Linear(4, 9), nn.LayerNorm(9, eps=1e-3), nn.ReLU(), nn.Linear(9, 6), nn.RMSNorm(6, eps=1e-2), nn.Tanh(),
        nn.Linear(6, 3)), (4,)),
    "first": (lambda: nn.Sequential(
        nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 7), nn.LeakyReLU(0.1), nn.LayerNorm(7, bias=False),
        nn.Linear(7, 2)), (5,)),
    "tokens": (lambda: nn.Sequential(
        Residual(nn.LayerNorm(4), 4), Residual(nn.RMSNorm(4, eps=1e-4), 4), nn.LayerNorm(4), nn.Flatten(),
        nn.Linear(12, 2)), (3, 4)),
    "image": (lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 2), nn.LayerNorm([2, 2, 2]), nn.Softplus(),
        nn.InstanceNorm2d(2, eps=0.1), nn.Flatten(), nn.Linear(8, 2)), (1, 5, 5)),
    "pair": (lambda: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.RMSNorm(2, eps=1e-3)), (2,)),
}  # fmt: skip


def draw(name, seed):
    """A random network in double precision, its weights scaled so that all regimes occur."""
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    net = make().double()
    scale = 0.3 + 3 * float(torch.rand(()))
    for p in net.parameters():
        p.data = torch.where(p.data == p.data.flatten()[0], torch.randn_like(p), p.data) * scale
    return net.eval(), shape


def sampled(net, x, eps, n=30):
    """Points of the boxes, a third of them corners, and the Jacobians there: (n, batch, k, *shape)."""
    unit = 2 * torch.rand(n, *x.shape, **F64) - 1
    unit[: n // 3] = unit[: n // 3].sign()
    points = x + eps * unit
    jacobians = vmap(jacrev(lambda z: net(z[None])[0]))(points.flatten(0, 1))
    return points, jacobians.view(n, len(x), *jacobians.shape[1:])


# Soundness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_every_sampled_value_and_gradient_lies_within_its_bounds(name, seed):
    net, shape = draw(name, seed)
    eps = 10 ** float(4 * torch.rand(()) - 3.5)
    x = torch.randn(2, *shape, **F64)
    lower, upper = jacobian_bounds(net, x, eps, alpha_iters=seed % 3)
    points, J = sampled(net, x, eps)
    slack = 1e-10 * (1 + J.abs().amax())  # autograd rounds, too
    assert (lower - slack <= J).all()
    assert (upper + slack >= J).all()

    graph = read_module(net, shape)
    bounds = Forward(graph, make_box(x, eps, None, None), Budget(2**28, graph.widest)).bounds
    for v, value in enumerate(graph.values(points.flatten(0, 1))):
        value = value.view(len(points), 2, *bounds.lower[v].shape[1:])
        assert (bounds.lower[v] - 1e-11 * (1 + value.abs()) <= value).all()
        assert (bounds.upper[v] + 1e-11 * (1 + value.abs()) >= value).all()

    for ord in (INF, 2, 1):
        norms = torch.linalg.matrix_norm(J.flatten(3), ord).amax(0)
        for method in ("bound", "interval", "global") if ord == INF else ("bound",):
            found = LocalLipschitz(ord=ord, method=method, samples=4).certify(net, x, eps)
            assert (norms <= found.value * (1 + 1e-10)).all()
            assert (found.lower <= found.value * (1 + 1e-10)).all()


@pytest.mark.parametrize("name", ["after", "first", "tokens"])
def test_no_finite_difference_exceeds_the_constant(name):
    for seed in range(3):
        net, shape = draw(name, seed)
        eps = 10 ** float(3 * torch.rand(()) - 3)
        x = torch.randn(1, *shape, **F64)
        a, b = (x + eps * (2 * torch.rand(2, 300, *shape, **F64) - 1)).unbind(0)
        b = torch.where(torch.rand(300, *[1] * len(shape)) < 0.5, b, a + 1e-4 * (b - a))
        for ord in (INF, 2, 1):
            bound = LocalLipschitz(ord=ord, samples=1).certify(net, x, eps).value.item()
            size = lambda t, ord=ord: torch.linalg.vector_norm(t.flatten(1), ord, dim=1)
            assert (size(net(a) - net(b)) <= bound * size(a - b) * (1 + 1e-7)).all()


@st.composite
def boxes(draw):
    """A normalisation and boxes of every kind: tiny, wide, on one side of 0, degenerate, of one or two entries."""
    seed, d = draw(st.integers(0, 2**31)), draw(st.sampled_from([1, 2, 3, 8, 33]))
    g = torch.Generator().manual_seed(seed)
    op = Normalisation(1, 10 ** draw(st.floats(-12, 1)), draw(st.booleans()) and d > 1, "norm")
    c = torch.randn(40, 2, d, generator=g, **F64) * 10 ** draw(st.floats(-3, 3))
    radius = torch.rand(40, 2, d, generator=g, **F64) * 10 ** draw(st.floats(-6, 3))
    radius *= torch.rand(40, 2, d, generator=g) < 0.8
    return op, g, c, radius


def points_of(op, g, c, radius, n=40):
    """Points of the boxes that the normalisation can meet there: sums of 0 where it is centred."""
    unit = 2 * torch.rand(n, *c.shape, generator=g, **F64) - 1
    unit[: n // 2] = unit[: n // 2].sign()
    if not op.centred:
        return c + radius * unit, c - radius, c + radius
    c = c - op.mean(c)
    wide = op.mean(radius) * 2 + radius
    points = c + radius * unit - op.mean(radius * unit)
    return points, c - wide, c + wide


@settings(max_examples=60)
@given(case=boxes())
def test_values_lines_and_scales_hold_everywhere(case):
    op, g, c, radius = case
    points, l, u = points_of(op, g, c, radius)
    q = op.mean(points.square())
    for mean_square in (None, (q.amin(0), q.amax(0))):
        known = op.within(l, u, mean_square)
        y, scale = op(points), op.scale(points)
        assert (known.values[0] <= y + 1e-13 * y.abs()).all()
        assert (known.values[1] >= y - 1e-13 * y.abs()).all()
        assert (known.scale[0] <= scale * (1 + 1e-13)).all()
        assert (known.scale[1] >= scale * (1 - 1e-13)).all()
        lines = known.lines()
        along = op.sum(lines.direction * points)
        under = lines.lower_slope * points + lines.lower_cross * along + lines.lower_intercept
        over = lines.upper_slope * points + lines.upper_cross * along + lines.upper_intercept
        slack = 1e-13 * (1 + lines.reach(torch.maximum(l.abs(), u.abs())))  # of this evaluation
        assert (under <= y + slack).all()
        assert (over >= y - slack).all()


@settings(max_examples=50)
@given(case=boxes(), relaxation=st.sampled_from([Relaxation.CHORD, Relaxation.RECURJAC]))
def test_the_chain_of_products_encloses_the_backward_pass(case, relaxation):
    op, generator, c, radius = case
    points, l, u = points_of(op, generator, c, radius)
    known = op.within(l, u)
    middle = torch.randn(c.shape, generator=generator, **F64)
    width = torch.rand(c.shape, generator=generator, **F64)
    unit = (2 * torch.rand(points.shape, generator=generator, **F64) - 1) * 1.5
    gradient = middle + width * unit.clamp(-1, 1)
    gl, gu, gamma = middle - width, middle + width, 1e-13
    y, scale = known.values, tuple(s.expand_as(l) for s in known.scale)
    mean, *t = mean_product(op, (gl, gu), y, gamma, relaxation)
    inner, *z = projection(mean, (gl, gu), t, y, gamma, relaxation)
    product, *h = normalised_product(inner, (gl, gu), t, z, y, scale, relaxation)

    value, rate = op(points), op.scale(points)
    true_t = op.mean(value * gradient)
    true_z = gradient - value * true_t
    true_h = rate * true_z
    for (low, high), true in ((t, true_t), (z, true_z), (h, true_h)):
        size = 1e-12 * (1 + torch.maximum(low.abs(), high.abs()))
        assert (low <= true + size).all()
        assert (high >= true - size).all()
    for push, true in ((mean.push, true_t), (inner.push, true_z), (product.push, true_h)):
        A = torch.randn(len(c), 3, *true.shape[2:], generator=generator, **F64)
        rows, shift = push(A, gamma)
        bound = (rows * gradient[:, :, None]).flatten(3).sum(3) + shift
        exact = (A * true[:, :, None]).flatten(3).sum(3)
        assert (bound >= exact - 1e-11 * (1 + exact.abs() + shift.abs())).all()


def test_huge_and_tiny_boxes_stay_sound():
    op = Normalisation(1, 1e-5, False, "norm")
    ends = torch.tensor([-1e300, -1e160, -1.0, -1e-200, 0.0, 1e-200, 1.0, 1e160, 1e300], **F64)
    l, u = torch.cartesian_prod(ends, ends).sort(1).values.unbind(1)
    l, u = torch.stack([l, l.flip(0)], 1), torch.stack([u, u.flip(0)], 1)
    known = op.within(l, u)
    t = torch.linspace(0, 1, 9, **F64)
    for a, b in itertools.product(t, t):
        mix = torch.stack([a, b])
        c = l * (1 - mix) + u * mix
        top = c.abs().amax(1, keepdim=True).clamp(min=1)
        y = (c / top) / ((c / top).square().mean(1, keepdim=True) + op.eps / top / top).sqrt()
        assert (known.values[0] - 1e-15 <= y).all()
        assert (known.values[1] + 1e-15 >= y).all()
    rows, shift = known.lines().pull(torch.ones(1, 1, 2, **F64), torch.zeros_like(l))
    assert rows.isfinite().all()
    assert shift.isfinite().all()


# Tightness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_point_gives_the_norms_of_its_jacobian(name):
    for seed in range(2):
        net, shape = draw(name, seed)
        x = torch.randn(3, *shape, **F64)
        J = vmap(jacrev(lambda z, net=net: net(z[None])[0]))(x).flatten(2).detach()
        for ord, tolerance in ((INF, 1e-8), (2, 1e-6), (1, 1e-8)):
            found = LocalLipschitz(ord=ord).certify(net, x, 0.0).value
            assert found.numpy() == pytest.approx(torch.linalg.matrix_norm(J, ord).numpy(), rel=tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gap_vanishes_with_the_box(name):
    """To first order in its width: a tenth of the box, a tenth of the gap."""
    net, shape = draw(name, 5)
    x = torch.randn(1, *shape, **F64)
    J = vmap(jacrev(lambda z: net(z[None])[0]))(x).flatten(2)
    exact = J.abs().sum(2).amax().item()
    gaps = [LocalLipschitz(samples=1).certify(net, x, eps).value.item() / exact - 1 for eps in (1e-5, 1e-6, 1e-7)]
    assert all(later <= 0.2 * earlier for earlier, later in itertools.pairwise(gaps))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_bounds_are_never_looser_than_interval_arithmetic_on_the_parts(seed):
    net, shape = draw("after", seed)
    x, eps = torch.randn(1, *shape, **F64), 10 ** float(3 * torch.rand(()) - 3)
    chain = [LocalLipschitz(method=m, samples=1).certify(net, x, eps).value.item() for m in ("bound", "interval")]
    assert chain[0] <= chain[1] * (1 + 1e-9)
    graph = read_module(net, shape)
    budget, box = Budget(2**28, graph.widest), make_box(x, eps, None, None)
    with_lines, plain = Forward(graph, box, budget).bounds, Forward(graph, box, budget, crown=False).bounds
    for v in range(len(graph.nodes)):
        slack = 1e-9 * (1 + plain.upper[v].abs() + plain.lower[v].abs())
        assert (with_lines.upper[v] <= plain.upper[v] + slack).all()
        assert (with_lines.lower[v] >= plain.lower[v] - slack).all()


def test_linear_bounds_keep_the_spread_of_wide_layers():
    """Ten inputs move a hundred deviations together: interval arithmetic on the squares does not see it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 100), nn.LayerNorm(100), nn.ReLU(), nn.Linear(100, 3)).double()
    graph, x = read_module(net, (10,)), torch.randn(1, 10, **F64)
    budget, box = Budget(2**28, graph.widest), make_box(x, 0.05, None, None)
    v = graph.activations[0]
    lower, upper = (t[:, 1, 0] for t in Forward(graph, box, budget).bounds.slopes[v])
    c = graph.nodes[v].inputs[0]
    bounds = Forward(graph, box, budget).bounds
    plain = graph.nodes[v].op.within(bounds.lower[c], bounds.upper[c]).scale
    assert (upper - lower).item() < 0.6 * (plain[1] - plain[0]).max().item()


def test_known_gradients_project_exactly():
    centre = Centring(2, (3, 2, 4))
    r, eye = torch.rand(1, 3, 2, 4, **F64), torch.eye(24, **F64).view(24, 3, 2, 4)
    matrix = centre.push(eye).flatten(1)
    torch.testing.assert_close(centre.spread(r).flatten(1), r.flatten(1) @ matrix.abs())
    torch.testing.assert_close(centre.pull(eye).flatten(1), matrix.T)


def test_directional_derivatives_hold():
    net, shape = draw("after", 4)
    x, v = torch.randn(2, 1, *shape, **F64)
    low, high = jvp_bounds(net, x, v, 0.05)
    _, J = sampled(net, x, 0.05, 300)
    slopes = (J * v[:, None]).sum(-1)
    assert ((low - 1e-10 <= slopes) & (slopes <= high + 1e-10)).all()


# Branch and bound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ord", [INF, 2, 1])
@pytest.mark.parametrize("name", ["after", "first", "pair"])
def test_branching_stays_sound_and_only_tightens(name, ord):
    for seed in range(1):
        net, shape = draw(name, seed)
        x, eps = torch.randn(1, *shape, **F64), 0.1
        _, J = sampled(net, x, eps, 60)
        plain = LocalLipschitz(ord=ord).certify(net, x, eps)
        branched = LocalLipschitz(ord=ord, method="bab", max_domains=60, batch_size=16).certify(net, x, eps)
        assert (torch.linalg.matrix_norm(J.flatten(3), ord).amax(0) <= branched.value * (1 + 1e-10)).all()
        assert (branched.value <= plain.value).all()
        worst = [bound for _, bound, _ in branched.history]
        assert all(later <= earlier for earlier, later in itertools.pairwise(worst))


def test_branching_halves_what_a_normalisation_is_given():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3, eps=0.05), nn.Linear(3, 2)).double()
    x = torch.randn(1, 2, **F64)
    plain = LocalLipschitz().certify(net, x, 0.5)
    found = LocalLipschitz(method="bab", rtol=1e-2, max_domains=5000).certify(net, x, 0.5)
    assert found.status == (Status.CONVERGED,)
    assert found.value.item() < 0.97 * plain.value.item()


# Readers and refusals ------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = nn.functional.layer_norm(x, (4,), self.weight, self.bias, 1e-4)
        return nn.functional.rms_norm(y + x, (4,), eps=1e-3)


def test_functions_are_read_as_layers():
    torch.manual_seed(0)
    model, x = Functional().double(), torch.randn(5, 4, **F64)
    torch.testing.assert_close(read_module(model, (4,))(x), model(x))
    _, J = sampled(model, x, 0.01)
    lower, upper = jacobian_bounds(model, x, 0.01)
    assert ((lower - 1e-11 <= J) & (upper + 1e-11 >= J)).all()


def test_the_default_eps_of_a_root_mean_square_is_that_of_its_precision():
    single = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4))
    graph = read_module(single, (3,))
    assert graph.nodes[graph.activations[0]].op.eps == torch.finfo(torch.float32).eps
    assert single[1].eps is None


def onnx_model(tmp_path, nodes, arrays, shape):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    value = lambda name, sizes: helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
    weights = [numpy_helper.from_array(t.detach().numpy(), name) for name, t in arrays.items()]
    graph = helper.make_graph(
        [helper.make_node(*args, **kwargs) for args, kwargs in nodes],
        "net", [value("x", ["n", *shape])], [value("y", ["n", 8])], weights,
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def test_onnx_files_give_the_bounds_of_the_module(tmp_path):
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    dense, norm, last = nn.Linear(3, 4), nn.LayerNorm([2, 4], eps=1e-3), nn.RMSNorm(4, eps=1e-2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    module = nn.Sequential(dense, norm, nn.ReLU(), last, nn.Flatten())
    arrays = {"W": dense.weight.T.contiguous(), "B": dense.bias, "s": norm.weight, "b": norm.bias, "r": last.weight}
    nodes = [
        (("MatMul", ["x", "W"], ["1"]), {}),
        (("Add", ["1", "B"], ["2"]), {}),
        (("LayerNormalization", ["2", "s", "b"], ["3"]), {"axis": 1, "epsilon": 1e-3}),
        (("Relu", ["3"], ["4"]), {}),
        (("RMSNormalization", ["4", "r"], ["5"]), {"epsilon": 1e-2}),
        (("Flatten", ["5"], ["y"]), {}),
    ]
    network = read_onnx(onnx_model(tmp_path, nodes, arrays, (2, 3)))
    x = torch.randn(3, 2, 3)
    torch.testing.assert_close(network(x.double()), module(x).double(), rtol=1e-5, atol=1e-6)
    ours = LocalLipschitz().certify(network, x, 0.01).value
    torch.testing.assert_close(ours, LocalLipschitz().certify(module, x, 0.01).value, rtol=1e-4, atol=0)

    nodes[2] = (("LayerNormalization", ["2", "s", "b"], ["3"]), {"axis": 0, "name": "all"})
    with pytest.raises(ValueError, match=r"LayerNormalization \(all\) normalises over the batch"):
        read_onnx(onnx_model(tmp_path, nodes, arrays, (2, 3)))


class Unbounded(nn.Module):
    def forward(self, x):
        return nn.functional.rms_norm(x, (4,))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=0.0)), r"1 \(LayerNorm\) has eps 0"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(5)), r"1 \(LayerNorm\) does not take .* normalises \(5,\)"),
        (nn.Sequential(nn.Unflatten(1, (2, 2)), nn.LayerNorm([4, 2])), r"1 \(LayerNorm\) does not take"),
        (nn.Sequential(nn.Linear(4, 4), nn.LocalResponseNorm(2)), r"1 \(LocalResponseNorm\)|branches|control"),
        (nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 4)), r"1 \(GroupNorm\) does not take"),
        (Unbounded(), "rms_norm .* eps"),
    ],
)
def test_normalisations_that_cannot_be_bounded_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        LocalLipschitz().certify(model, torch.zeros(2, 4), 0.1)


def test_the_exact_programme_refuses_normalisations():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match=r"piecewise linear.*1 \(LayerNorm\)"):
        LocalLipschitz(method="exact").certify(net, torch.zeros(1, 2), 0.1)
