"""Products against explicit Jacobians, adjointness, budgets, and the hazards that are named by path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev

from locally.tangent.linearization import Linearization

MODES = ("inputs", "parameters", "activations")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(48, 5),
            nn.Tanh(),
            nn.Linear(5, 4),
        )
        .double()
        .eval()
    )


@pytest.fixture
def x():
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def explicit(net, x, mode):
    """(N, outputs, variables), by jacrev example by example."""
    if mode == "parameters":
        own = dict(net.named_parameters())
        rows = jacrev(lambda p: functional_call(net, p, (x,)))(own)
        return torch.cat([rows[n].flatten(2) for n in own], 2)
    if mode == "inputs":
        return torch.stack([jacrev(lambda a: net(a[None])[0])(a).flatten(1) for a in x])
    with torch.no_grad():
        activations = net[:4](x)
    return torch.stack([jacrev(lambda a: net[4:](a[None])[0])(a) for a in activations])


def linearized(net, x, mode, **options):
    return Linearization(net, x, wrt=mode, source="3" if mode == "activations" else None, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_products_are_those_of_the_explicit_jacobian(net, x, mode, chunk):
    J, exact = linearized(net, x, mode, chunk=chunk), explicit(net, x, mode)
    assert torch.allclose(J.value, net(x))
    assert torch.allclose(J.jacobian().reshape(exact.shape), exact, atol=1e-12)
    v, u = torch.randn(3, 2, *J.point.shape).double(), torch.randn(3, 2, *J.value.shape).double()
    if mode == "parameters":
        forward, backward = torch.einsum("nkp,abp->abnk", exact, v), torch.einsum("nkp,abnk->abp", exact, u)
    else:
        forward = torch.einsum("nkd,abnd->abnk", exact, v.flatten(3))
        backward = torch.einsum("nkd,abnk->abnd", exact, u).reshape(v.shape)
    assert torch.allclose(J.jvp(v), forward, atol=1e-12)
    assert torch.allclose(J.vjp(u), backward, atol=1e-12)


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), mode=st.sampled_from(MODES))
def test_scipy_operator_is_adjoint_to_itself(seed, mode):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    A = Linearization(net, x, wrt=mode, source="1" if mode == "activations" else None).scipy()
    v, w = (torch.randn(n, generator=generator, dtype=torch.float64).numpy() for n in reversed(A.shape))
    assert (A @ v) @ w == pytest.approx(v @ (A.H @ w), rel=1e-10)
    assert A.matmat(v[:, None])[:, 0] == pytest.approx(A.matvec(v))


def test_more_inputs_than_outputs_and_the_reverse_take_either_mode():
    x = torch.randn(3, 2).double()
    wide = nn.Sequential(nn.Linear(2, 9), nn.Tanh()).double()
    assert torch.allclose(Linearization(wide, x).jacobian(), explicit(wide, x, "inputs"), atol=1e-12)


def test_skip_connections_are_held_and_the_target_may_be_inside():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(torch.relu(self.inner(x)) * x)

    net, x = Skip().double(), torch.randn(4, 3).double()
    J = Linearization(net, x, wrt="activations", source="inner")
    mask = (net.inner(x) > 0) * x
    assert torch.allclose(J.jacobian(), net.last.weight * mask[:, None], atol=1e-12)
    inside = Linearization(net, x, target="inner")
    assert torch.allclose(inside.jacobian(), net.inner.weight.expand(4, 3, 3))
    there = Linearization(net, x, wrt="activations", source="inner", at=-J.point)
    assert torch.allclose(there.jacobian(), net.last.weight * ((net.inner(x) < 0) * x)[:, None], atol=1e-12)


def test_shared_submodules_and_tied_parameters_move_together_and_stay_as_they_were():
    layer, other = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    other.weight = layer.weight
    net, x = nn.Sequential(layer, nn.Tanh(), layer, other), torch.randn(2, 3).double()
    weight = layer.weight
    J = Linearization(net, x, wrt="parameters", parameters=["0.weight"])
    function = lambda w: torch.nn.functional.linear(
        torch.nn.functional.linear(torch.tanh(x @ w.T + layer.bias), w, layer.bias), w, other.bias
    )
    assert torch.allclose(J.jacobian(), jacrev(function)(weight).flatten(2), atol=1e-12)
    assert layer.weight is weight is other.weight
    assert weight.requires_grad


def test_token_inputs_and_several_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, tokens, scale):
            return self.head(self.embed(tokens).mean(1) * scale)

    net, tokens = Model().double(), torch.randint(7, (3, 5))
    scale = torch.randn(3, 4).double()
    J = Linearization(net, (tokens, scale), wrt="activations", source="embed")
    assert J.jacobian().shape == (3, 2, 5, 4)
    assert Linearization(net, (tokens, scale), wrt="parameters", parameters=["head.bias"]).jacobian().shape == (3, 2, 2)
    with pytest.raises(TypeError, match="floating point"):
        Linearization(net, (tokens, scale))


def test_operations_without_forward_mode_fall_back_to_reverse():
    class Cube(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    class Net(nn.Module):
        def forward(self, x):
            return Cube.apply(x)

    x = torch.randn(2, 3).double()
    try:
        found = Linearization(Net(), x).jvp(torch.ones(2, 3).double())
    except ValueError as error:
        pytest.skip(f"this torch reports a missing forward mode in another way: {error}")
    assert torch.allclose(found, 3 * x**2)


def test_taylor_is_exact_for_affine_networks():
    net, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    assert torch.allclose(Linearization(net, x).taylor(y), net(y))


def test_nothing_of_the_callers_changes(net, x):
    before, state = x.clone(), {k: v.clone() for k, v in net.state_dict().items()}
    for mode in MODES:
        J = linearized(net, x, mode)
        J.vjp(torch.ones_like(J.value))
        J.jvp(torch.ones_like(J.point))
    assert torch.equal(x, before)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    first = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
    y = torch.tensor([[-1.0, 1.0, -2.0, 2.0]])
    Linearization(first, y).jacobian()
    assert y[0, 0] == -1


@pytest.mark.parametrize("mode", MODES)
def test_small_budgets_go_in_chunks_and_too_small_ones_are_refused(net, x, mode):
    whole = linearized(net, x, mode)
    with pytest.raises(ValueError, match=r"memory: 1 bytes do not hold one example and one vector") as refused:
        linearized(net, x, mode, memory=1)
    least = int(str(refused.value).rpartition("about ")[2])
    small = linearized(net, x, mode, memory=least)
    assert small.chunk == 1
    assert whole.chunk == 6
    v, u = torch.randn(4, *whole.point.shape).double(), torch.randn(4, *whole.value.shape).double()
    assert torch.allclose(small.jvp(v), whole.jvp(v))
    assert torch.allclose(small.vjp(u), whole.vjp(u))
    if mode == "parameters":
        with pytest.raises(ValueError, match=r"memory: .* Jacobian of one example"):
            small.jacobian()


class Shuffle(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.rand_like(x)


class Mix(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Branch(nn.Module):
    def forward(self, x):
        return 2 * x if x.sum() > 0 else x


class Overwrite(nn.Module):
    def forward(self, x):
        out = torch.zeros(x.shape, dtype=x.dtype)
        out[:, 0] = x[:, 0]
        return out


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (nn.Dropout(0.5), "random in training mode"),
        (nn.BatchNorm1d(3), "normalises by batch"),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), "normalises by batch"),
        (Shuffle(), "two calls differ"),
        (Mix(), "depend on each other"),
        (Branch(), "control flow"),
        (Overwrite(), "in place"),
    ],
)
def test_hazards_are_named_with_their_path(bad, reason):
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), bad), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=reason) as refused:
        Linearization(net, torch.randn(4, 3))
    assert f"1.1 ({type(bad).__name__})" in str(refused.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, x: Linearization(n, x, wrt="weights"), ValueError, "wrt"),
        (lambda n, x: Linearization(n, x, memory=0), ValueError, "memory"),
        (lambda n, x: Linearization(n, x, chunk=0), ValueError, "chunk"),
        (lambda n, x: Linearization(n, x, wrt="activations"), ValueError, "source"),
        (lambda n, x: Linearization(n, x, wrt="activations", source="9"), ValueError, "no submodule '9'"),
        (lambda n, x: Linearization(n, x, target="9"), ValueError, "no submodule '9'"),
        (lambda n, x: Linearization(n, x, parameters=["0.weight"]), ValueError, "parameters are for"),
        (lambda n, x: Linearization(n, x, wrt="parameters", parameters=["q"]), ValueError, "none called q"),
        (lambda n, x: Linearization(n, x, wrt="parameters", parameters=["0.bias"] * 2), ValueError, "twice"),
        (lambda n, x: Linearization(n, x / 0), ValueError, "inputs holds NaN"),
        (lambda n, x: Linearization(n, x[:0]), ValueError, "leading dimension"),
        (lambda n, x: Linearization(n, (x, x[:1])), ValueError, "leading dimension"),
        (lambda n, x: Linearization(n, x, at=x[:1]), ValueError, "at must be"),
        (lambda n, x: Linearization(n, x).jvp(torch.ones(2)), ValueError, "v must have shape"),
        (lambda n, x: Linearization(n, x).vjp(torch.ones(4, 2).double()), TypeError, "u must be"),
        (lambda n, x: Linearization(n, x).taylor(torch.ones(1, 4, 3)), ValueError, "point must have shape"),
        (lambda n, x: Linearization(Twice(), x, wrt="activations", source="layer"), ValueError, "called 2 times"),
        (lambda n, x: Linearization(nn.LSTM(3, 2), x), TypeError, "must return a tensor"),
        (lambda n, x: Linearization(nn.Flatten(0), x), ValueError, "one row for each"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    with pytest.raises(error, match=message):
        call(net, torch.randn(4, 3))
