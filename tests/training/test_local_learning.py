"""Isolation of blocks, cut points and what is refused, networks, rules, schedules of one step."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from locally.training.local_learning import (
    DGL,
    Bottleneck,
    Chain,
    InfoPro,
    LinearHeads,
    LocalLearner,
    PredSim,
    cifar_resnet,
    imagenet_resnet,
    reinitialize,
    residual_network,
    saved_peak,
    similarity_matrix,
    vgg,
)
from locally.training.local_learning.overlap import overlapped_step
from locally.training.local_learning.rules import CellMeans, GridMean, Mean, Pointwise

RULES = [LinearHeads(), DGL(), PredSim(), InfoPro(), InfoPro(head="2c2f")]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0):
    return residual_network([1, 1, 1], [4, 8, 16], in_channels=1, classes=3, generator=seeded(seed))


def batch(n=8, size=8, classes=3, seed=0):
    rng = seeded(seed)
    return torch.rand(n, 1, size, size, generator=rng), torch.randint(classes, (n,), generator=rng)


def learner(rule=None, cuts=None, net=None, **options):
    x, _ = batch()
    net = small() if net is None else net
    rule = LinearHeads() if rule is None else rule
    return LocalLearner(net, rule, example=x, classes=3, cuts=cuts, generator=seeded(1), **options)


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_one_block_is_backpropagation_to_the_last_bit():
    x, y = batch()
    local, net = learner(cuts=1), small()
    local.local_step(x, y)
    F.cross_entropy(net(x), y).backward()
    for found, wanted in zip(local.chain.parameters(), net.parameters()):
        assert torch.equal(found.grad, wanted.grad)


@pytest.mark.parametrize("rule", RULES)
def test_each_loss_reaches_its_own_block_alone(rule):
    x, y = batch()
    local = learner(rule)
    owned = [{id(p) for p in local.block_parameters(k)} for k in range(local.plan.n_blocks)]
    assert sum(map(len, owned)) == len(set().union(*owned)) == len(list(local.trainable()))
    h = x
    for k in range(local.plan.n_blocks):
        h = local.run_block(k, h)
        local.zero_grad()
        local.block_loss(k, h, y, x).backward(retain_graph=True)
        assert {id(p) for p in local.parameters() if p.grad is not None} == owned[k]
        h = h.detach()


def test_the_next_block_does_not_matter_to_the_gradients_of_this_one():
    x, y = batch()
    first, second = learner(DGL()), learner(DGL())
    with torch.no_grad():
        for p in second.chain.stages[1].parameters():
            p.add_(0.3)
    for local in (first, second):
        local.local_step(x, y)
    pairs = zip(first.block_parameters(0), second.block_parameters(0))
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    assert not torch.equal(first.block_parameters(2)[0].grad, second.block_parameters(2)[0].grad)


def test_block_by_block_gives_the_gradients_of_the_summed_losses():
    x, y = batch()
    local = learner(DGL())
    summed = copy.deepcopy(local)
    losses = local.local_step(x, y)
    h, total = x, 0.0
    for k in range(summed.plan.n_blocks):
        h = summed.run_block(k, h)
        total = total + summed.block_loss(k, h, y, x)
        h = h.detach()
    total.backward()
    torch.testing.assert_close(losses.sum(), total.detach())
    for a, b in zip(local.parameters(), summed.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_overlapped_order_computes_the_same():
    x, y = batch()
    local = learner(DGL())
    other = copy.deepcopy(local)
    seen = []
    losses = overlapped_step(other, x, y, seen.append)
    assert torch.equal(losses, local.local_step(x, y))
    assert seen == list(range(local.plan.n_blocks))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(local.parameters(), other.parameters()))
    assert torch.equal(local.local_step(x, y, overlap=True), other.local_step(x, y))  # on the CPU: in sequence


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_overlap_on_two_streams_computes_the_same():
    x, y = (t.cuda() for t in batch(64))
    local = LocalLearner(small().cuda(), DGL(), example=x, classes=3)
    other = copy.deepcopy(local)
    torch.testing.assert_close(local.local_step(x, y), other.local_step(x, y, overlap=True))
    for a, b in zip(local.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_running_statistics_are_those_of_one_plain_pass():
    x, y = batch()
    local, net = learner(DGL()), small()
    local.local_step(x, y)
    net.train()(x)
    for found, wanted in zip(local.chain.buffers(), net.buffers()):
        torch.testing.assert_close(found, wanted)


def test_construction_leaves_network_and_global_random_state_alone():
    net, x = small(), batch()[0]
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    LocalLearner(net, DGL(), example=x, classes=3, generator=seeded())
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in net.modules())


def test_export_is_the_plain_network():
    x, y = batch()
    local = learner(DGL())
    optimizer = torch.optim.SGD(local.trainable(), 0.1)
    local.local_step(x, y)
    optimizer.step()
    exported, plain = local.export(), small(5)
    plain.load_state_dict(exported.state_dict())
    assert torch.equal(plain.eval()(x), local.eval()(x))
    assert not any("objective" in name for name in exported.state_dict())


def test_bfloat16_autocast_keeps_float32_gradients_near_the_exact_ones():
    x, y = batch(32)
    for rule in RULES:
        local = learner(rule)
        exact = copy.deepcopy(local)
        losses = local.local_step(x, y, amp=torch.bfloat16)
        torch.testing.assert_close(losses.float(), exact.local_step(x, y), rtol=0.05, atol=0.05)
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in local.trainable())


# Chains and cut points ------------------------------------------------------------------------------------------------


def plain_convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )


def test_a_sequential_is_grouped_into_stages():
    net, (x, _) = plain_convolutional(), batch()
    chain = Chain.of(net, x)
    assert chain.names == ["0", "3.0", "4"]
    assert [type(m).__name__ for m in chain.head] == ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert chain.shapes(x) == [(4, 8, 8), (8, 4, 4), (8, 4, 4)]
    assert {id(p) for p in chain.parameters()} == {id(p) for p in net.parameters()}
    assert chain.cut_points(["3.0", "4"]) == (1, 2)


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x + self.second(self.first(x).relu()))


def test_what_is_no_chain_is_refused():
    with pytest.raises(ValueError, match="not the chain of its children"):
        Chain.of(Shortcut(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="at least two parts"):
        Chain.of(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))


def test_a_cut_through_a_residual_block_is_refused():
    named = nn.Sequential(*small().stages, *small().head)
    local = LocalLearner(named, LinearHeads(), example=batch()[0], classes=3, cuts=["2"])
    assert local.plan.starts == (2,)
    with pytest.raises(ValueError, match=r"'2.conv2' lies inside stage 2, '2' \(BasicBlock\), and would split it"):
        LocalLearner(named, LinearHeads(), example=batch()[0], classes=3, cuts=["2.conv2"])


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (5, "5 blocks, but the network has only 4 stages"),
        (0, "cuts must be at least 1"),
        ([0, 1], "rise within 1 .. 3"),
        ([2, 2], "rise within 1 .. 3"),
        ([3, 1], "rise within 1 .. 3"),
        (["layer9"], "'layer9' names no stage"),
        ([1, 2, 3, 3], "5 blocks"),
    ],
)
def test_impossible_cuts_are_named(cuts, message):
    with pytest.raises(ValueError, match=message):
        learner(cuts=cuts)


def test_cuts_of_another_type_are_refused(without_shape_checks):
    with pytest.raises(TypeError, match="stage numbers or names"):
        learner(cuts=[1.5])


@given(stages=st.integers(1, 40), data=st.data())
def test_a_number_of_blocks_makes_even_ones(stages, data):
    blocks = data.draw(st.integers(1, stages))
    chain = Chain([nn.Identity() for _ in range(stages)], nn.Identity())
    edges = [0, *chain.cut_points(blocks), stages]
    sizes = np.diff(edges)
    assert len(sizes) == blocks
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


def test_parameters_shared_across_blocks_are_refused():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="shares a parameter across blocks"):
        LocalLearner(net, LinearHeads(), example=x, classes=3)
    LocalLearner(net, LinearHeads(), example=x, classes=3, cuts=1)
    with pytest.raises(ValueError, match="one module twice"):
        Chain([shared, shared], nn.Linear(4, 3))


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.relu_())


def test_blocks_that_overwrite_what_they_read_are_refused():
    chain = Chain([nn.Linear(4, 4), Overwriting()], nn.Linear(4, 3))
    with pytest.raises(ValueError, match="overwrites its input"):
        LocalLearner(chain, LinearHeads(), example=torch.randn(2, 4), classes=3)


def test_unsupported_modules_are_named():
    recurrent = Chain([nn.LSTM(4, 4), nn.Linear(4, 4)], nn.Linear(4, 3))
    with pytest.raises(TypeError, match="stage 0, '0', must return a tensor, got tuple"):
        LocalLearner(recurrent, LinearHeads(), example=torch.randn(2, 5, 4), classes=3)
    misfit = Chain([nn.Linear(4, 5), nn.Linear(4, 4)], nn.Linear(4, 3))
    with pytest.raises(ValueError, match="stage 1, '1', fails on an input"):
        LocalLearner(misfit, LinearHeads(), example=torch.randn(2, 4), classes=3)
    chain = Chain([nn.Linear(4, 4), nn.Linear(4, 4)], nn.Linear(4, 3))
    with pytest.raises(ValueError, match="DGL needs blocks that put out images"):
        LocalLearner(chain, DGL(), example=torch.randn(2, 4), classes=3)
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="no reset_parameters"):
        reinitialize(nn.Sequential(owner))


def test_bad_batches_are_named(without_shape_checks):
    x, y = batch()
    local = learner()
    with pytest.raises(ValueError, match="one entry a sample"):
        local.local_step(x, y[:3])
    with pytest.raises(ValueError, match="example holds NaN"):
        LocalLearner(small(), LinearHeads(), example=x * torch.nan, classes=3)
    with pytest.raises(TypeError, match="net must be"):
        LocalLearner(F.relu, LinearHeads(), example=x, classes=3)
    with pytest.raises(TypeError, match="rule must have"):
        LocalLearner(small(), F.relu, example=x, classes=3)
    for options in ({"weight": 1.5}, {"weight": -0.1}):
        with pytest.raises(ValueError, match="weight"):
            PredSim(**options)
    for options in ({"head": "3c"}, {"reconstruction": (-1.0, 0.0)}, {"coefficients": "layer"}, {"std": (0.0,)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            InfoPro(**options)


# Networks and rules ---------------------------------------------------------------------------------------------------


def test_networks_have_the_papers_sizes():
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(cifar_resnet(32)) == 466_906
    assert len(cifar_resnet(110).stages) == 55
    with torch.device("meta"):
        sizes = {depth: count(imagenet_resnet(depth)) for depth in (18, 34, 50, 101, 152)}
    # the counts that every library of these networks has
    assert sizes == {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
    assert len(vgg(19).stages) == 16
    assert vgg(11).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    narrow = residual_network([1, 1], [8, 16], block=Bottleneck, classes=3)
    assert narrow(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    for depth in (31, 7):
        with pytest.raises(ValueError, match="depth"):
            cifar_resnet(depth)
    with pytest.raises(ValueError, match="depths and widths"):
        residual_network([1, 1], [8])


def test_similarity_loss_is_the_reference(golden):
    file = np.load(golden / "07-auglocal" / "simloss.npz")
    onehot = similarity_matrix(F.one_hot(torch.from_numpy(file["y"]), 4).float())
    for kind in ("4d", "2d"):
        found = similarity_matrix(torch.from_numpy(file[f"h{kind}"]))
        assert float(F.mse_loss(found, onehot)) == pytest.approx(float(file[f"loss{kind}"]), rel=1e-5)
    torch.testing.assert_close(similarity_matrix(torch.from_numpy(file["h4d"])), torch.from_numpy(file["sim4d"]))


def test_infopro_weights_move_from_block_to_block():
    local = learner(InfoPro(reconstruction=(5.0, 1.0), prediction=(0.0, 0.5)))
    assert [o.reconstruction for o in local.objectives] == [5, 3, 1]
    assert [o.prediction for o in local.objectives] == [0, 0.25, 0.5]
    two = learner(InfoPro(), cuts=2)
    assert (two.objectives[0].reconstruction, two.objectives[0].prediction) == (5.0, 0.05)


FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("size", "q"), [((6, 6), 1), ((4, 6), 1), ((8, 8), 2), ((4, 6), 2), ((2, 2), 2), ((5, 7), 2)])
def test_means_over_cells_are_pytorchs_pooling_and_keep_nothing(size, q, format):
    h = torch.randn(3, 4, *size, dtype=torch.float64).contiguous(memory_format=format).requires_grad_()
    means = GridMean(q)(h)
    weight = torch.randn_like(means)
    expected = F.adaptive_avg_pool2d(h, q)
    torch.testing.assert_close(means, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad((out * weight).sum(), h, retain_graph=True)[0] for out in (means, expected))
    )
    torch.testing.assert_close(Mean()(h), h.mean((2, 3)))
    if not size[0] % q and not size[1] % q:
        assert torch.autograd.gradcheck(GridMean(q), h)
        assert torch.autograd.gradgradcheck(GridMean(q), h)
        assert saved_peak(lambda: CellMeans.apply(h, q).sum().backward()) == 0


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_pointwise_layer_is_the_convolution(format):
    h = torch.randn(3, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=format).requires_grad_()
    layer = Pointwise(4, 7).double()
    out, expected = layer(h), F.conv2d(h, layer.weight)
    assert out.is_contiguous(memory_format=format)
    weight = torch.randn_like(out)
    for found, right in zip(
        (out, *torch.autograd.grad(out, (h, layer.weight), weight)),
        (expected, *torch.autograd.grad(expected, (h, layer.weight), weight)),
    ):
        torch.testing.assert_close(found, right)


def test_compiled_blocks_compute_the_same():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(6, 4, generator=seeded()), torch.tensor([0, 1, 2, 0, 1, 2])
    local = LocalLearner(net, LinearHeads(), example=x, classes=3, generator=seeded())
    other = copy.deepcopy(local)
    # capture and its autograd as with every backend, without minutes of C++
    local.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(local.local_step(x, y), other.local_step(x, y))
    for a, b in zip(local.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
