"""AugLocal against the authors' structures and one of their training steps, its rules, and stages of users' own."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from locally.training.auxiliary_networks import AugLocal, adapted_copy, pyramidal_depths, select_stages
from locally.training.local_learning import Chain, LocalLearner, cifar_resnet, residual_network, vgg
from locally.training.local_learning.networks import BasicBlock


@pytest.fixture(scope="module")
def reference():
    from pathlib import Path

    file = Path(__file__).parents[1] / "golden" / "07-auglocal" / "auglocal_reference.json"
    return json.loads(file.read_text())


def formula(number, name, shape):
    """The reference's weights: the p-th parameter as a function of its place and kind."""
    e = np.arange(np.prod(shape, dtype=int), dtype=np.float64)
    if len(shape) >= 2:
        values = np.sqrt(3 / np.prod(shape[1:])) * np.sin(0.37 * e * (1 + 0.01 * number) + 1.3 * number)
    elif name.endswith("bias"):
        values = 0.1 * np.cos(1.7 * e + number)
    else:
        values = 1 + 0.1 * np.sin(2.3 * e + number)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_structures_of_resnet32(reference, depth):
    check_structure(reference["structures"][f"resnet32_d{depth}"], 32, depth)


@pytest.mark.parametrize("depth", [1, 6])
def test_structures_of_resnet110(reference, depth):
    check_structure(reference["structures"][f"resnet110_d{depth}"], 110, depth)


def check_structure(wanted, layers, depth):
    net = cifar_resnet(layers)
    local = LocalLearner(net, AugLocal(depth=depth), example=torch.zeros(1, 3, 32, 32), classes=10)
    assert local.plan.n_blocks == wanted["local_module_num"]
    assert sum(p.numel() for p in net.parameters()) == wanted["params_primary"]
    assert sum(p.numel() for p in local.parameters()) == wanted["params_total"]
    strides = [[s.conv1.stride[0] for s in o.network if isinstance(s, BasicBlock)] for o in local.objectives]
    assert strides == wanted["aux_strides"]


def test_depths_and_selections_of_every_reference(reference):
    for name, wanted in reference["structures"].items():
        n_stages = 16 if "resnet32" in name else 55
        depths = pyramidal_depths(int(name[-1]), wanted["local_module_num"])
        assert depths == wanted["aux_depth_list"]
        found = [select_stages(block, n_stages, depth) for block, depth in enumerate(depths)]
        assert found == wanted["selected_layers"]


def test_one_training_step_is_the_authors(reference):
    wanted = reference["numeric"]
    rng = np.random.default_rng(wanted["batch_seed"])
    x = torch.from_numpy(rng.standard_normal((8, 3, 32, 32)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 10, 8))
    local = LocalLearner(cifar_resnet(32), AugLocal(depth=wanted["d"]), example=x, classes=10)
    parameters = list(local.parameters())
    assert [list(p.shape) for p in parameters] == [shape for _, shape in wanted["params_in_order"]]
    with torch.no_grad():
        for number, ((name, shape), p) in enumerate(zip(wanted["params_in_order"], parameters)):
            p.copy_(formula(number, name, shape))
    losses = local.local_step(x, y)
    np.testing.assert_allclose(losses.numpy(), wanted["local_losses_in_order"], rtol=1e-5)
    norms = {name: float(p.grad.norm()) for (name, _), p in zip(wanted["params_in_order"], parameters)}
    for name, norm in wanted["grad_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-6)


@given(n_stages=st.integers(2, 200), depth=st.integers(1, 12), data=st.data())
def test_selected_stages_rise_to_the_last(n_stages, depth, data):
    stage = data.draw(st.integers(0, n_stages - 2))
    chosen = select_stages(stage, n_stages, depth)
    assert len(chosen) == min(depth, n_stages - 1 - stage)
    assert chosen[-1] == n_stages - 1
    assert all(a < b for a, b in zip([stage, *chosen], chosen))


@given(depth=st.integers(1, 10), blocks=st.integers(1, 60), tau=st.floats(0, 1))
def test_depths_fall_from_depth_to_no_less_than_one(depth, blocks, tau):
    depths = pyramidal_depths(depth, blocks, tau=tau)
    assert len(depths) == blocks - 1
    assert all(a >= b >= 1 for a, b in pairwise(depths))
    assert depths[:1] in ([], [depth])
    assert pyramidal_depths(depth, blocks, tau=0.0) == [depth] * (blocks - 1)
    assert blocks <= 2 or pyramidal_depths(depth, blocks, tau=1.0)[-1] == 1


def test_auxiliary_networks_share_no_weights_and_start_afresh():
    net = residual_network([2, 2], [4, 8], classes=3)
    local = LocalLearner(net, AugLocal(depth=2), example=torch.zeros(2, 3, 8, 8), classes=3)
    owned = {id(p) for p in net.parameters()}
    assert all(id(p) not in owned for o in local.objectives for p in o.parameters())
    assert not torch.equal(local.objectives[0].network[-3].conv2.weight, net.stages[-1].conv2.weight)


def test_selections_widths_and_factories():
    x, net = torch.zeros(2, 3, 16, 16), residual_network([2, 2, 2], [4, 8, 16], classes=3)
    kinds = lambda local: [p.shape[0] for n, p in local.objectives[0].named_parameters() if n.endswith("conv2.weight")]
    make = lambda **options: LocalLearner(net, AugLocal(depth=2, **options), example=x, classes=3)
    assert kinds(make()) == [8, 16]
    assert kinds(make(selection="sequential")) == [4, 4]
    assert kinds(make(selection="repeat")) == []  # the first stage is a convolution without a second one
    assert kinds(make(widen=2.0)) == [16, 32]
    seen = []

    def factory(stage, entry, out, stride):
        seen.append((type(stage).__name__, entry, out, stride))
        return BasicBlock(entry, out, stride)

    make(block_factory=factory)
    assert seen[:2] == [("BasicBlock", 4, 8, 2), ("BasicBlock", 8, 16, 2)]


def test_networks_that_halve_without_widening():
    local = LocalLearner(vgg(11), AugLocal(depth=3, downsample="size"), example=torch.zeros(2, 3, 32, 32), classes=10)
    strides = [[s.conv.stride[0] for s in o.network[:-2] if hasattr(s, "conv")] for o in local.objectives]
    assert all(set(found) <= {1, 2} for found in strides)
    assert strides[0].count(2) == 3


def test_stages_of_other_kinds_are_copied():
    net = nn.Sequential(
        *(nn.Linear(6, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU()),
        *(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
    )
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    local = LocalLearner(net, AugLocal(depth=2), example=x, classes=3)
    assert local.local_step(x, y).isfinite().all()
    assert local.objectives[0].network[0][0].in_features == 12

    tokens = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    other = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    third = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    chain = Chain([tokens, other, third], nn.Linear(8, 3))
    sequence, targets = torch.randn(4, 5, 8), torch.randint(3, (4, 3))
    loss = lambda logits, y: logits.mean(1).square().sum() if logits.ndim == 3 else logits.square().sum()
    local = LocalLearner(chain, AugLocal(depth=1), example=sequence, classes=3, loss=loss)
    assert local.local_step(sequence, targets).shape == (2,)


def test_copies_that_cannot_be_fitted_are_refused():
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(TypeError, match="no single convolution"):
        adapted_copy(block, 4, 8, 1, "stage 2")
    assert adapted_copy(nn.Conv2d(4, 8, 3, 2, 1), 4, 6, 1, "stage 0").stride == (1, 1)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"depth": 0}, "depth"),
        ({"tau": 1.5}, "tau"),
        ({"min_depth": 3}, "min_depth"),
        ({"widen": 0.0}, "widen"),
        ({"selection": "random"}, "selection"),
        ({"downsample": "never"}, "downsample"),
    ],
)
def test_numbers_out_of_range_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        AugLocal(**options)
