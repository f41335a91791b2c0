"""Two halves in one batch: the paper's layers against the operator, alone, inside a network and around it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locally.tangent.interpreter import LinearInterpreter, LinearScope, biases, convert

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.unit = nn.BatchNorm2d(4), nn.Sigmoid()

    def forward(self, x):
        return F.relu(x + self.norm(self.second(self.unit(self.first(x)))))


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), Block(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5)
        )
        return net.double().eval()


@pytest.fixture
def halves():
    return torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("make", [lambda net, x: LinearScope(net), convert])
def test_one_pass_gives_the_output_and_the_system(make, halves):
    net, (x, v) = network(), halves
    twin, scope = make(net, x), LinearInterpreter(network(), x)
    with torch.no_grad():
        y, answer = twin(torch.cat([x, v])).chunk(2)
        assert torch.allclose(y, net(x))
        assert torch.allclose(answer, scope(v))
        with biases(twin, False):
            assert torch.allclose(twin(torch.cat([x, v]))[3:], scope.matvec(v))
            assert torch.allclose(twin(torch.cat([x, x]))[3:], scope.linear_part)
        assert torch.allclose(twin(torch.cat([x, 0 * v]))[3:], scope.residual)


def test_scopes_go_around_the_smallest_part_that_holds_the_unit(halves):
    net = network()
    twin = convert(net, halves[0])
    kinds = [type(part).__name__ for part in twin]
    assert kinds == ["LinearScope", "LinearScope", "LinearScope", "AvgPool2d", "Flatten", "LinearScope"]
    assert not any(isinstance(m, LinearScope) for m in twin[2].module.modules())  # F.relu is in the block's own forward
    assert not any(isinstance(m, LinearScope) for m in net.modules())


def test_a_scope_follows_new_weights_and_sizes(halves):
    scope = LinearScope(nn.Sequential(nn.Linear(8, 3), nn.Tanh()).double())
    for size in (8, 8):
        x = halves[0, :, 0, :, :size]
        for _ in range(2):
            y, again = scope(torch.cat([x, x])).chunk(2)
            assert torch.allclose(y, again)
            with torch.no_grad():
                scope.module[0].bias.add_(1)
    y, again = scope(torch.cat([halves[0, :, 0, 0]] * 2)).chunk(2)
    assert torch.allclose(y, again)


def test_gradients_pass_through_both_halves(halves):
    x = halves[0].requires_grad_()
    scope = LinearScope(network())
    scope(torch.cat([x.detach(), x]))[3:].sum().backward()
    expected = LinearInterpreter(network(), x.detach()).rmatvec(torch.ones(3, 5, dtype=torch.float64))
    assert torch.allclose(x.grad, expected)


def test_biases_are_switched_back_after_an_error(halves):
    twin = convert(network(), halves[0])
    with pytest.raises(KeyError), biases(twin, False):
        raise KeyError
    assert all(m.biases for m in twin.modules() if isinstance(m, LinearScope))


def test_what_cannot_be_scoped_is_refused(halves):
    with pytest.raises(ValueError, match="two halves"):
        LinearScope(network())(halves[0])
    with pytest.raises(ValueError, match="norm_mean"):
        LinearScope(network(), norm_mean="none")
    with pytest.raises(ValueError, match=r"norm \(BatchNorm2d\)"):
        LinearScope(network().train())(torch.cat([*halves, *halves]))
    with pytest.raises(ValueError, match="_softmax"):
        convert(nn.Sequential(network(), nn.Softmax(1)), halves[0])


def test_a_network_that_mixes_the_halves_is_found_out(halves):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x).reshape(3, 5)  # only right for batches of three

    class Flipped(Whole):
        def forward(self, x):
            return self.body(x).flip(0)

    with pytest.raises((RuntimeError, ValueError)):
        convert(Whole(), halves[0])
    with pytest.raises((RuntimeError, ValueError)):
        convert(Flipped(), halves[0])
