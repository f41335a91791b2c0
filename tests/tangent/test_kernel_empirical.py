"""The kernel of a concrete network: three ways, one matrix; operator form; the linearised network."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call, jacrev

from locally.tangent.kernel import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    InfiniteNetwork,
    LinearizedModule,
    NTKOperator,
    empirical_ntk,
    residual,
)

METHODS = ("structured", "jacobian", "vector_product")


class Tokens(nn.Module):
    """A linear layer that is applied to every position."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).mean(1)


def networks():
    torch.manual_seed(0)
    kernel = InfiniteNetwork(
        Conv(3, 3, padding="circular"),
        Activation(),
        AvgPool(2),
        Flatten(),
        Dense(6),
        residual(Activation("gelu"), Dense()),
        Dense(),
    )
    images = torch.randn(5, 2, 6, 6).double()
    yield (
        "dense",
        nn.Sequential(nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)).double(),
        torch.randn(5, 4).double(),
    )
    yield (
        "conv",
        nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect"), nn.GELU(), nn.Flatten(), nn.Linear(27, 2)
        ).double(),
        images,
    )
    yield "ntk", kernel.finite((2, 6, 6), 4, 2, dtype=torch.float64), images
    yield "tokens", Tokens().double(), torch.randn(5, 4, 3).double()
    yield (
        "standard",
        InfiniteNetwork.mlp(2, width=4, parametrization="standard").finite(3, 4, dtype=torch.float64),
        torch.randn(5, 3).double(),
    )


CASES = {name: (net, x) for name, net, x in networks()}


def explicit(net, x):
    own = dict(net.named_parameters())
    rows = jacrev(lambda p: functional_call(net, p, (x,)))(own)
    J = torch.cat([rows[n].flatten(2) for n in own], 2).detach()
    return torch.einsum("nkp,mlp->nmkl", J, J)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_every_way_gives_the_gram_of_the_jacobian(name, method):
    net, x = CASES[name]
    exact = explicit(net, x)
    full = empirical_ntk(net, x, mode="full", method=method)
    assert torch.allclose(full, exact, rtol=1e-10, atol=1e-10)
    diagonal = empirical_ntk(net, x, x[:2], mode="diagonal", method=method)
    assert torch.allclose(diagonal, exact[:, :2].diagonal(dim1=2, dim2=3), rtol=1e-10, atol=1e-10)
    trace = empirical_ntk(net, x[:3], x, method=method)
    assert torch.allclose(trace, exact[:3].diagonal(dim1=2, dim2=3).mean(2), rtol=1e-10, atol=1e-10)
    n, _, k, _ = full.shape
    assert torch.linalg.eigvalsh(full.transpose(1, 2).reshape(n * k, n * k)).min() > -1e-10


@pytest.mark.parametrize("method", METHODS)
def test_some_parameters_and_small_budgets(method):
    net, x = CASES["dense"]
    names = ["0.bias", "2.weight"]
    some = empirical_ntk(net, x, parameters=names, method=method)
    J = jacrev(lambda p: functional_call(net, p, (x,)))({n: dict(net.named_parameters())[n] for n in names})
    exact = sum(torch.einsum("nkp,mkp->nm", j.flatten(2), j.flatten(2)) for j in J.values()) / 3
    assert torch.allclose(some, exact.detach(), atol=1e-12)
    assert torch.allclose(empirical_ntk(net, x, method=method, memory=4000), empirical_ntk(net, x), atol=1e-12)


def test_the_operator_is_the_kernel_matrix():
    net, x = CASES["ntk"]
    A = NTKOperator(net, x)
    exact = explicit(net, x).transpose(1, 2).reshape(10, 10).numpy()
    np.testing.assert_allclose(A.matmat(np.eye(10)), exact, atol=1e-10)
    np.testing.assert_allclose(A.H @ np.ones(10), exact.sum(1), atol=1e-10)
    np.testing.assert_allclose(eigsh(A, 2, return_eigenvectors=False), np.linalg.eigvalsh(exact)[-2:], rtol=1e-8)


def test_the_linearised_network_is_the_first_order_expansion():
    net, x = CASES["dense"]
    before = [p.clone() for p in net.parameters()]
    linear = LinearizedModule(net)
    exact = explicit(net, x)
    out = linear(x)
    assert torch.allclose(out, net(x))
    out[0, 0].backward()
    step = [p.grad.clone() for p in linear.theta]
    with torch.no_grad():
        for p, g in zip(linear.theta, step):
            p.add_(g)
    assert torch.allclose(linear(x) - out, exact[:, 0, :, 0], atol=1e-10)  # moved along the kernel of that output
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert torch.allclose(empirical_ntk(linear, x, mode="full", method="jacobian"), exact, atol=1e-10)


def test_what_cannot_be_structured_says_why_and_auto_falls_back():
    x = torch.randn(3, 4).double()
    norm = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"1 \(LayerNorm\) is no plain linear"):
        empirical_ntk(norm, x, method="structured")
    assert torch.allclose(empirical_ntk(norm, x), explicit(norm, x)[:, :, 0, 0], atol=1e-10)
    shared = nn.Linear(4, 4).double()
    twice = nn.Sequential(shared, nn.Tanh(), shared)
    with pytest.raises(ValueError, match=r"shared|called 2 times"):
        empirical_ntk(twice, x, method="structured")
    K = empirical_ntk(twice, x)
    assert torch.allclose(K, explicit(twice, x).diagonal(dim1=2, dim2=3).mean(2), atol=1e-10)


@pytest.mark.usefixtures("without_shape_checks")
def test_hazards_and_bad_arguments_are_named():
    class Mix(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"depend on each other, beginning at 1 \(Mix\)"):
        empirical_ntk(nn.Sequential(nn.Linear(4, 4), Mix()), x)
    with pytest.raises(ValueError, match=r"memory: 9 bytes do not hold one example"):
        empirical_ntk(nn.Linear(4, 1), x, memory=9)
    with pytest.raises(ValueError, match="inputs holds NaN"):
        empirical_ntk(nn.Linear(4, 1), x, x / 0)
    with pytest.raises(ValueError, match=r"1 \(Dropout\) is random"):
        empirical_ntk(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), x)
    for options, match in [({"mode": "sum"}, "mode"), ({"method": "fast"}, "method"), ({"memory": 0}, "memory")]:
        with pytest.raises(ValueError, match=match):
            empirical_ntk(nn.Linear(4, 1), x, **options)
