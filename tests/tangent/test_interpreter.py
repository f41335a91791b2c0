"""F x + r = N(x) for every unit, F against autograd and against itself from all sides, golden systems, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from locally.tangent.interpreter import LinearInterpreter, NormMean, PixelVotes, Status

torch.set_num_threads(1)


class Written(nn.Module):
    """A network whose operations are written in `forward`."""

    def __init__(self, forward, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def images(n=2, channels=1, size=6, seed=0):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build().double().eval()
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        for p in net.parameters():
            if p.ndim == 1:
                p.data += 0.3 * torch.randn_like(p)
        return net


def classifier(unit=nn.ReLU, bias=True):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=bias), unit(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8, bias=bias),
        unit(), nn.Linear(8, 3, bias=bias),
    )  # fmt: skip


UNITS = {
    name: (lambda u=unit: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), u(), nn.Conv2d(4, 2, 3)))
    for name, unit in {
        "ReLU": nn.ReLU, "ReLU in place": lambda: nn.ReLU(inplace=True), "LeakyReLU": lambda: nn.LeakyReLU(0.2),
        "PReLU": lambda: nn.PReLU(4), "ReLU6": nn.ReLU6, "Hardtanh": lambda: nn.Hardtanh(-0.3, 0.5), "ELU": nn.ELU,
        "CELU": lambda: nn.CELU(0.7), "SELU": nn.SELU, "GELU": nn.GELU, "GELU tanh": lambda: nn.GELU("tanh"),
        "SiLU": nn.SiLU, "Mish": nn.Mish, "Tanh": nn.Tanh, "Sigmoid": nn.Sigmoid, "Softplus": nn.Softplus,
        "Softsign": nn.Softsign, "LogSigmoid": nn.LogSigmoid, "Hardswish": nn.Hardswish, "Hardsigmoid": nn.Hardsigmoid,
        "Threshold": lambda: nn.Threshold(0.1, 0.4), "Hardshrink": lambda: nn.Hardshrink(0.2),
        "Tanhshrink": nn.Tanhshrink, "Softshrink": lambda: nn.Softshrink(0.2), "Dropout": nn.Dropout,
        "MaxPool": lambda: nn.MaxPool2d(2),
        "AdaptiveMaxPool": lambda: nn.AdaptiveMaxPool2d(4), "AvgPool": lambda: nn.AvgPool2d(2),
        "AdaptiveAvgPool": lambda: nn.AdaptiveAvgPool2d(4), "BatchNorm": lambda: nn.BatchNorm2d(4),
        "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True), "GroupNorm": lambda: nn.GroupNorm(2, 4),
        "LayerNorm": lambda: nn.LayerNorm(6), "RMSNorm": lambda: nn.RMSNorm(6),
        "InstanceNorm, running": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        "Bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        "Bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
        "Nearest": lambda: nn.Upsample(scale_factor=2), "ReflectionPad": lambda: nn.ReflectionPad2d(2),
        "ConstantPad": lambda: nn.ConstantPad2d(1, 0.7), "Transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
        "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
        "PixelUnshuffle": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)),
    }.items()
}  # fmt: skip

WRITTEN = {
    "functional ReLU": lambda _, x: F.relu(x) + 1,
    "residual": lambda _, x: x + F.gelu(x),
    "concatenation with a constant": lambda _, x: torch.cat([x.tanh(), torch.ones_like(x)], 1),
    "squeeze and excitation": lambda _, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "gated linear unit": lambda _, x: F.glu(torch.cat([x, 2 * x + 1], 1), 1),
    "swish by hand": lambda _, x: x * x.sigmoid(),
    "SwiGLU": lambda _, x: F.silu(x) * (2 * x - 1),
    "tanh gate under sigmoid": lambda _, x: torch.sigmoid(x + 1) * torch.tanh(x),
    "leaky by hand": lambda _, x: torch.where(x > 0, x, 0.1 * x + 0.2),
    "maximum": lambda _, x: torch.maximum(x, 0.3 - 0.5 * x),
    "maximum with a constant": lambda _, x: torch.maximum(x, torch.full_like(x, 0.1)),
    "minimum": lambda _, x: torch.minimum(x, 2 * x),
    "maxout": lambda _, x: torch.stack([x, -x, x + 0.2]).max(0).values,
    "amax": lambda _, x: x.amax((2, 3)),
    "layer norm by hand": lambda _, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 0.1).sqrt(),
    "softsign by hand": lambda _, x: x / (1 + x.abs()),
    "square": lambda _, x: x * x + x**3,
    "in place": lambda _, x: x.clone().mul_(2).add_(1).relu_(),
    "written over": lambda _, x: written_over(x.clone()),
    "slices and a loop": lambda _, x: sum(x[..., i].tanh() * (i + 1) for i in range(3)),
    "self-attention by hand": lambda _, x: torch.softmax(x.flatten(2).mT @ x.flatten(2), -1) @ x.flatten(2).mT,
    "scaled dot product": lambda _, x: F.scaled_dot_product_attention(x, 2 * x, x + 1, is_causal=True),
    "masked fill": lambda _, x: x.masked_fill(torch.eye(6, dtype=torch.bool), 0.5),
    "subtracted from one": lambda _, x: (1 - torch.sigmoid(x)) * x + torch.sigmoid(x) * x.tanh(),
    "lerp": lambda _, x: torch.lerp(x, x.tanh() + 1, 0.3),
    "constant added to a hand-made one": lambda _, x: 3 - x.exp() / 2,
}


def written_over(x):
    x[:, :, 0] = x[:, :, 1] * 2
    x[:, :, 2] = 0.5
    return x.tanh()


def check_all_sides(net, x, **options):
    """What holds for every system: it reproduces the output, is linear, and forwards is the transpose of backwards."""
    scope = LinearInterpreter(net, x, **options)
    with torch.no_grad():
        assert torch.allclose(scope.output, net(x.clone()), rtol=1e-12, atol=1e-12)
    assert torch.allclose(scope.linear_part + scope.residual, scope.output, rtol=1e-10, atol=1e-10)
    generator = torch.Generator().manual_seed(1)
    v, u = torch.randn(2, *x.shape, generator=generator, dtype=x.dtype)
    w = torch.randn(scope.output.shape, generator=generator, dtype=x.dtype)
    assert torch.allclose(scope.matvec(2 * v - u), 2 * scope.matvec(v) - scope.matvec(u), rtol=1e-10, atol=1e-10)
    ahead, back = (scope.matvec(v) * w).sum(), (v * scope.rmatvec(w)).sum()
    assert torch.allclose(ahead, back, rtol=1e-10, atol=1e-10)
    assert torch.allclose(scope.matvec(scope.x), scope.linear_part, rtol=1e-10, atol=1e-10)
    if scope.constants:
        assert torch.allclose(sum(scope.residual_by_layer().values()), scope.residual, rtol=1e-10, atol=1e-10)
    votes = scope.votes()
    assert torch.allclose(votes.pixels.flatten(1).sum(1) + votes.bias, votes.score, rtol=1e-10, atol=1e-10)
    assert torch.allclose(
        sum(votes.by_layer().values(), torch.zeros_like(votes.bias)), votes.bias, rtol=1e-10, atol=1e-10
    )
    return scope


@pytest.mark.parametrize("name", UNITS)
def test_every_unit_reproduces_the_output(name):
    check_all_sides(seeded(UNITS[name]), images())


@pytest.mark.parametrize("name", ["InstanceNorm", "GroupNorm", "LayerNorm", "InstanceNorm, running", "BatchNorm"])
def test_norms_reproduce_the_output_with_their_mean_captured(name):
    scope = check_all_sides(seeded(UNITS[name]), images(), norm_mean=NormMean.CAPTURED)
    other = LinearInterpreter(seeded(UNITS[name]), images())
    measures = "running" not in name and name != "BatchNorm"
    assert torch.allclose(scope.residual, other.residual) is not measures


@pytest.mark.parametrize("name", WRITTEN)
def test_functional_calls_are_followed(name):
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Written(WRITTEN[name])))
    check_all_sides(net, images())


def test_attention_and_a_recurrent_cell():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.norm, self.gates = nn.LayerNorm(6), nn.Linear(11, 20)

        def forward(self, x):
            x = self.norm(x + self.attention(x, x, x)[0])
            h = c = x.new_zeros(len(x), 5)
            for t in range(x.shape[1]):  # LSTM
                i, f, o, g = self.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            return h

    check_all_sides(seeded(Block), images()[:, 0])


def test_a_module_used_twice_is_frozen_once_for_each_call():
    unit = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    scope = check_all_sides(seeded(lambda: nn.Sequential(unit, unit)), images()[:, 0, 0])
    assert [c.path for c in scope.constants] == ["0.0", "0.0"]


def test_a_second_input_is_held():
    class Conditioned(nn.Module):
        def forward(self, x, style):
            return F.relu(x * style[:, None] + 0.1 + style[:, None])

    x, style = images()[:, 0], images(seed=3)[:, 0, 0]
    scope = LinearInterpreter(Conditioned().eval(), (x, style))
    assert torch.allclose(scope(x), Conditioned()(x, style))
    assert torch.allclose(
        scope.matvec(torch.ones_like(x)), (x * style[:, None] + 0.1 + style[:, None] > 0) * style[:, None]
    )


@pytest.mark.parametrize("unit", [nn.ReLU, lambda: nn.LeakyReLU(0.2), lambda: nn.PReLU(1)])
def test_for_networks_that_are_homogeneous_piece_by_piece_f_is_the_jacobian(unit):
    net, x = seeded(lambda: classifier(unit)), images()
    jacobian = torch.stack([torch.autograd.functional.jacobian(net, x[i : i + 1])[0, :, 0] for i in range(2)])
    scope = LinearInterpreter(net, x)
    assert torch.allclose(scope.dense(), jacobian, rtol=1e-12, atol=1e-14)
    assert torch.allclose(LinearInterpreter(net, x, mode="tangent").dense(), jacobian, rtol=1e-12, atol=1e-14)


def test_the_slope_of_a_leaky_unit_at_exactly_zero_is_torchs():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Hardswish()).double().eval()
    scope = LinearInterpreter(net, torch.zeros(1, 2, dtype=torch.float64))
    assert torch.allclose(scope.dense()[0], net[0].weight / 2)


def test_smooth_units_differ_from_the_tangent_and_the_tangent_is_first_order():
    net, x = seeded(lambda: classifier(nn.Tanh)), images()
    secant, tangent = (LinearInterpreter(net, x, mode=m) for m in ("secant", "tangent"))
    assert not torch.allclose(secant.dense(), tangent.dense(), rtol=1e-2)
    assert torch.allclose(tangent.linear_part + tangent.residual, net(x))
    v = images(seed=5)
    errors = [(tangent(x + t * v) - net(x + t * v)).norm().item() for t in (1e-3, 1e-4)]
    assert errors[1] < 0.02 * errors[0]  # quadratic


def test_without_biases_there_is_no_residual_and_the_network_is_homogeneous():
    net, x = seeded(lambda: classifier(bias=False)), images()
    scope = LinearInterpreter(net, x)
    assert scope.constants == ()
    assert not scope.residual.any()
    assert torch.allclose(net(3 * x), 3 * net(x))
    assert torch.equal(scope.residual_share(), torch.zeros(2, dtype=torch.float64))


def test_golden_system(golden):
    g = {k: torch.as_tensor(v) for k, v in np.load(golden / "20-linear-interpreters/interpreter.npz").items()}
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1),
        nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3),
    ).double().eval()  # fmt: skip
    net.load_state_dict({k: v for k, v in g.items() if k[0].isdigit()})
    scope = LinearInterpreter(net, g["x"])
    same = lambda a, b: torch.allclose(a.reshape(-1), b.reshape(-1), rtol=1e-10, atol=1e-12)
    assert same(scope.output, g["y"])
    assert same(scope.dense(), g["F"])
    assert same(scope.residual, g["r"])
    for method in ("krylov", "randomized", "dense"):
        assert same(scope.svd(3, method=method).S, g["sv"])
    assert same(torch.cat([scope.votes(c).pixels for c in range(3)]), g["votes"])


@pytest.mark.parametrize(("norm_mean", "key"), [("linear", "linmean"), ("captured", "affmean")])
def test_golden_instance_norm(golden, norm_mean, key):
    g = {k: torch.as_tensor(v) for k, v in np.load(golden / "20-linear-interpreters/interpreter.npz").items()}
    first, second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
    net = nn.Sequential(first, nn.InstanceNorm2d(3), nn.ReLU(), second).double().eval()
    for conv, name in ((first, "in_c1"), (second, "in_c2")):
        conv.load_state_dict({"weight": g[f"{name}_w"], "bias": g[f"{name}_b"]})
    scope = LinearInterpreter(net, g["x"], norm_mean=norm_mean)
    same = lambda a, b: torch.allclose(a.reshape(-1), b.reshape(-1), rtol=1e-10, atol=1e-12)
    assert same(scope.output, g["in_y"])
    assert same(scope.dense(), g[f"in_F_{key}"])
    assert same(scope.residual, g[f"in_r_{key}"])


@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(1e-6, 1e3), shift=st.floats(-2, 2))
@settings(max_examples=20)
def test_units_hold_from_tiny_to_large_inputs(seed, scale, shift):
    units = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Softplus())
    x = scale * images(1, seed=seed)[:, 0, 0] + shift
    check_all_sides(seeded(lambda: units, seed % 100), x)


def test_sigmoid_networks_split_well_in_single_precision():
    """h(z) / z would make F x and r huge and let them cancel; the shifted secant does not."""
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 5), nn.Tanh())
    ).float()
    scope = LinearInterpreter(net, 1e-3 * images(4).float())
    size = scope.output.norm()
    assert (scope.linear_part + scope.residual - scope.output).norm() < 1e-6 * size
    assert max(scope.linear_part.norm(), scope.residual.norm()) < 10 * size


def test_columns_rows_and_the_matrix_agree():
    scope = LinearInterpreter(seeded(classifier), images())
    F_ = scope.dense()
    assert F_.shape == (2, 3, 1, 6, 6)
    assert torch.allclose(scope.column((0, 2, 4)), F_[:, :, 0, 2, 4])
    assert torch.allclose(scope.column(2 * 6 + 4), F_[:, :, 0, 2, 4])
    assert torch.allclose(scope.row(1), F_[:, 1])
    flat = F_.reshape(2, 3, 36)
    operator = scope.as_linear_operator()
    v = np.random.default_rng(0).standard_normal(72)
    expected = np.concatenate([flat[i].numpy() @ v.reshape(2, 36)[i] for i in range(2)])
    np.testing.assert_allclose(operator @ v, expected, rtol=1e-10)


def test_stacks_of_probes_and_a_small_budget_change_nothing():
    net, x = seeded(classifier), images(5)
    v = torch.stack([images(5, seed=s) for s in range(6)]).reshape(2, 3, 5, 1, 6, 6)
    wide, narrow = LinearInterpreter(net, x), LinearInterpreter(net, x, memory=12_000)
    assert narrow.system.chunk < 5
    assert torch.allclose(wide.matvec(v), narrow.matvec(v))
    assert torch.allclose(wide.residual, narrow.residual)
    assert all(torch.allclose(a[1], b[1]) for a, b in zip(wide.votes(0).constants, narrow.votes(0).constants))
    assert torch.allclose(wide.matvec(v)[1, 2], wide.matvec(v[1, 2]))


@pytest.mark.parametrize("method", ["krylov", "randomized"])
def test_singular_images_are_those_of_the_matrix(method):
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.PixelShuffle(2)
        )
    )
    scope = LinearInterpreter(net, images(2, size=8))
    found = scope.svd(5, method=method, generator=torch.Generator().manual_seed(0), max_steps=200)
    exact = scope.svd(5, method="dense")
    assert found.status is Status.CONVERGED
    assert torch.allclose(found.S, exact.S, rtol=1e-8)
    assert torch.allclose(found.V.abs(), exact.V.abs(), atol=1e-4)
    v = found.V.transpose(0, 1)
    assert torch.allclose(scope.matvec(v), (found.S[..., None, None, None] * found.U).transpose(0, 1), atol=1e-6)
    peak = found.V.flatten(2).gather(-1, found.V.flatten(2).abs().argmax(-1, keepdim=True))
    assert (peak > 0).all()


def test_too_few_steps_end_in_a_status():
    scope = LinearInterpreter(seeded(lambda: nn.Conv2d(1, 2, 3, padding=1)), images(1, size=12))
    found = scope.svd(3, method="randomized", rtol=1e-12, max_steps=1)
    assert found.status is Status.STEP_LIMIT
    assert found.residuals.max() > 1e-12


@pytest.mark.parametrize("size", [6, 24])
def test_eigenimages_satisfy_their_equation(size):
    """Dense below 512 unknowns, ARPACK above."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)))
    scope = LinearInterpreter(net, images(1, size=size))
    values, vectors = scope.eig(4)
    assert (values.abs().diff() <= 1e-12).all()
    for value, image in zip(values[0], vectors[0]):
        product = scope.matvec(image.real[None]) + 1j * scope.matvec(image.imag[None])
        assert torch.allclose(product[0], value * image, atol=1e-8)
    with pytest.raises(ValueError, match="shape to itself"):
        LinearInterpreter(seeded(classifier), images(1)).eig(1)


def test_local_systems_from_impulses_that_do_not_meet():
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2)
        )
    )
    scope = LinearInterpreter(net, images(2, channels=2, size=7)[..., :5])
    for reach in (2, 3, 9):
        found = scope.sparse(reach, example=1)
        np.testing.assert_allclose(found.toarray(), scope.dense()[1].reshape(2 * 140, 70), atol=1e-14)
    with pytest.raises(ValueError, match="reach"):
        scope.sparse(1)
    with pytest.raises(ValueError, match="images"):
        LinearInterpreter(seeded(classifier), images()).sparse(2)


def test_votes_with_their_places():
    scope = LinearInterpreter(seeded(classifier), images(3))
    votes = scope.votes(torch.tensor([0, 2, 1]))
    assert torch.allclose(votes.score, scope.output[torch.arange(3), torch.tensor([0, 2, 1])])
    placed, rest = votes.bias_image()
    assert torch.allclose(placed.sum((1, 2)) + rest, votes.bias)
    assert torch.allclose(votes.image().sum((1, 2)) + rest, votes.score)
    assert placed.abs().sum() > 0
    shapes = {c.path: tuple(v.shape) for c, v in votes.constants}
    assert shapes == {"0": (3, 4, 6, 6), "4": (3, 8), "6": (3, 3)}
    by_layer = scope.residual_by_layer()
    assert all(
        torch.allclose(by_layer[p][torch.arange(3), torch.tensor([0, 2, 1])], v) for p, v in votes.by_layer().items()
    )


def test_pixel_votes_of_relu_networks_are_captums_input_x_gradient():
    attr = pytest.importorskip("captum.attr")
    net, x = seeded(classifier), images(3)
    theirs = attr.InputXGradient(net).attribute(x.clone().requires_grad_(), target=1)
    assert torch.allclose(PixelVotes(net).attribute(x, target=1), theirs, rtol=1e-10, atol=1e-12)


def test_the_module_is_left_as_it_is():
    net, x = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))), images()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    kept = x.clone()
    LinearInterpreter(net, x).svd(2)
    with pytest.raises(ValueError):
        LinearInterpreter(nn.Sequential(net, nn.Softmax(1)), x)
    assert torch.equal(x, kept)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# What is refused -----------------------------------------------------------------------------------------------------


class Head(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU())
        self.bad = Written(forward)

    def forward(self, x):
        return self.bad(self.trunk(x))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda _, x: torch.softmax(x, 1), r"_softmax at bad"),
        (lambda _, x: x + torch.softmax(x, 1), r"bad \(Written\) adds .* _softmax at bad"),
        (lambda _, x: x.flatten(2) @ x.flatten(2).mT, r"bmm at bad"),
        (lambda _, x: x.log().nan_to_num(), r"at bad|not finite"),
        (lambda _, x: x.sort(-1).values, r"sort at bad"),
        (lambda _, x: x + torch.div(x, 0.1, rounding_mode="floor"), r"div at bad"),
        (lambda _, x: x + (4 * x).to(torch.int32).to(x.dtype), r"_to_copy at bad"),
        (lambda _, x: x * 2 if x.sum() > 0 else x, r"control flow.*bad"),
        (lambda _, x: nn.LSTMCell(6, 6).to(x)(x[:, 0, 0])[0], r"cannot be linearised at .*\(LSTMCell\)|at bad"),
        (lambda _, x: x - x.mean(0), "depend on each other, beginning at bad"),
        (lambda _, x: F.dropout(x, 0.5, True), "(two calls differ|randomness).* bad"),
        (lambda _, x: torch.ones_like(x), "does not depend on its input"),
    ],
)
def test_what_has_no_linear_action_is_named_with_its_path(forward, message):
    with pytest.raises(ValueError, match=message):
        LinearInterpreter(seeded(lambda: Head(forward)), images())


def test_what_the_output_does_not_need_is_not_refused():
    net = seeded(lambda: Head(lambda _, x: (x + torch.softmax(x, 1)).argmax(1, keepdim=True) * x))
    check_all_sides(net, images())


def test_a_softmax_is_left_off_by_naming_the_logits():
    net = seeded(lambda: nn.Sequential(classifier(), nn.Softmax(1)))
    scope = LinearInterpreter(net, images(), target="0")
    assert torch.allclose(scope.output, net[0](images()))


def test_training_mode_is_refused():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))).train()
    with pytest.raises(ValueError, match=r"1 \(BatchNorm2d\)"):
        LinearInterpreter(net, images())


def test_changed_weights_are_noticed():
    net = seeded(classifier)
    scope = LinearInterpreter(net, images())
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="capture it again"):
        scope.row(0)


def test_a_module_that_hides_what_it_does_fails_the_check():
    class Hidden(nn.Module):
        def forward(self, x):
            return torch.as_tensor(np.tanh(x.detach().numpy())) if type(x) is torch.Tensor else x

    with pytest.raises((RuntimeError, ValueError, TypeError)):
        LinearInterpreter(Hidden(), images())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.row(3), "index"),
        (lambda s: s.column((0, 9, 0)), "index"),
        (lambda s: s.votes(-1), "target"),
        (lambda s: s.votes(torch.tensor([0, 1, 2])), "target"),
        (lambda s: s.svd(4), "k must be at most 3"),
        (lambda s: s.svd(2, rtol=-1.0), "rtol"),
        (lambda s: s.dense(max_entries=10), "max_entries"),
        (lambda s: s.matvec(torch.zeros(2, 1, 6, 5, dtype=torch.float64)), "shape"),
        (lambda s: s.sparse(1, example=2), "example"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(LinearInterpreter(seeded(classifier), images()))


def test_bad_constructor_arguments_are_named():
    for options in ({"mode": "chord"}, {"norm_mean": "own"}, {"rtol": 0.0}, {"target": "9"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LinearInterpreter(seeded(classifier), images(), **options)
    with pytest.raises(ValueError, match="tangent"):
        LinearInterpreter(seeded(classifier), images(), mode="tangent").votes()
