"""The deep baselines: gradients and Adam as PyTorch's, memories, what is forgotten without them, fuzzy tiles."""

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from locally.control.world_model import NetworkRegressor, StreamNetworks, forgetting_matrix
from locally.control.world_model.networks import TILES, fuzzy_slopes, fuzzy_tiles


def seeded(n=0):
    return torch.Generator().manual_seed(n)


@pytest.mark.parametrize("activation", ["relu", "fta"])
def test_gradients_are_those_of_finite_differences(activation):
    networks = StreamNetworks(3, 2, n_streams=4, hidden=(6, 5), activation=activation, generator=seeded())
    networks.theta = networks.theta.double()
    x, y = torch.rand(4, 7, 3, dtype=torch.float64), torch.rand(4, 7, 2, dtype=torch.float64)
    theta, step = networks.theta, torch.randn(networks.theta.shape, generator=seeded(1)).double()
    slope = (networks._gradient(x, y) * step).sum(dim=1)
    losses = []
    for h in (1e-6, -1e-6):
        networks.theta = theta + h * step
        losses.append((networks._forward(x)[1] - y).square().mean(dim=(1, 2)))
    torch.testing.assert_close(slope, (losses[0] - losses[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_a_stream_is_trained_as_by_pytorch():
    networks = StreamNetworks(2, 1, n_streams=2, hidden=(8, 8), lr=[1e-2, 1e-3], generator=seeded())
    twin = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    for layer, (W, bias) in zip([m for m in twin if isinstance(m, nn.Linear)], networks._layers(networks.theta)):
        layer.weight.data, layer.bias.data = W[0].T.clone(), bias[0, 0].clone()
    adam = torch.optim.Adam(twin.parameters(), lr=1e-2)
    xs = torch.rand(60, 2, generator=seeded(2))
    for x in xs:
        y = x.sum(dim=0, keepdim=True)
        networks.update(torch.stack([x, x]), torch.stack([y, y]))
        adam.zero_grad()
        (twin(x) - y).square().mean().backward()
        adam.step()
    torch.testing.assert_close(networks.predict(xs.expand(2, -1, -1))[0], twin(xs).detach(), rtol=1e-4, atol=1e-5)


def drift(n=600):
    """Inputs wander slowly from -1 to 1; the target is a wave."""
    x = np.linspace(-1, 1, n)[:, None]
    return x, np.sin(4 * x)


def test_without_replay_the_past_is_forgotten_and_with_it_not(without_shape_checks):
    x, y = drift()
    wrong = {}
    for memory in ("none", "replay", "coreset"):
        model = NetworkRegressor((32, 32), lr=1e-2, memory=memory, random_state=0)
        matrix = forgetting_matrix(model.partial_fit, model.predict, x, y, 4, threshold=0.05)
        wrong[memory] = matrix[:2, -1].mean()
    assert wrong["none"] > 0.5
    assert wrong["replay"] < 0.2
    assert wrong["coreset"] < 0.2


def test_the_coreset_is_a_uniform_sample_of_the_past():
    networks = StreamNetworks(1, 1, n_streams=200, hidden=(2,), memory="coreset", memory_size=20, generator=seeded())
    for t in range(100):
        networks.update(torch.full((200, 1), float(t)), torch.zeros(200, 1))
    kept = networks.kept_x[:, :20, 0]
    assert kept.mean() == pytest.approx(49.5, abs=2)
    assert all(len(set(row)) == 20 for row in kept.tolist())


def test_synaptic_intelligence_holds_on_to_what_it_learnt():
    x, y = (torch.tensor(part, dtype=torch.float32) for part in drift(800))
    early, errors = x[:400].expand(4, -1, -1), {}
    for strength in (0.0, 10.0):
        networks = StreamNetworks(
            1, 1, n_streams=4, hidden=(32,), si_strength=strength, si_period=200, generator=seeded()
        )
        for t in range(800):
            networks.update(x[t].expand(4, 1), y[t].expand(4, 1))
        errors[strength] = (networks.predict(early) - y[:400]).square().mean().item()
        assert (networks.importance >= 0).all()
        assert (networks.importance > 0).any() == bool(strength)
    assert errors[10.0] < 0.75 * errors[0.0]


def test_fuzzy_tiles_are_memberships_that_fade_over_their_width():
    z = torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None]
    tiles = fuzzy_tiles(z)
    assert tiles.min() >= 0
    assert tiles.max() <= 1
    inside = ((z - 1e-6 >= TILES) & (z + 1e-6 < TILES + 0.1)).nonzero()
    assert (tiles[inside[:, 0], inside[:, 1]] == 1).all()
    assert ((tiles > 1e-9).sum(dim=1) <= 4).all()
    middle = torch.rand(50, 1, dtype=torch.float64, generator=seeded()) * 1.8 - 0.9
    numeric = (fuzzy_tiles(middle + 1e-7) - fuzzy_tiles(middle - 1e-7)) / 2e-7
    torch.testing.assert_close(fuzzy_slopes(middle)[:, 0].double(), numeric, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"memory": "coreset", "memory_size": 8}, {"si_strength": 1.0, "si_period": 5}])
def test_networks_resume_exactly(options):
    x, y = drift(40)
    model = NetworkRegressor((4,), random_state=0, **options).fit(x[:20], y[:20])
    again = NetworkRegressor((4,), random_state=9, **options)
    again.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(
        model.partial_fit(x[20:], y[20:]).predict(x), again.partial_fit(x[20:], y[20:]).predict(x)
    )
    with pytest.raises(ValueError, match="theta"):
        NetworkRegressor((5,), **options).load_state_dict(model.state_dict())


def test_scikit_learn_takes_it_for_its_own(without_shape_checks):
    model = NetworkRegressor((16,), lr=1e-2, memory="replay", random_state=0)
    failing = {"check_fit2d_1sample": "a stream may have one sample so far"}
    check_estimator(model, expected_failed_checks=failing, on_skip=None, on_fail="raise")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": [1e-3, 1e-3, 1e-3]}, "lr must be one number or 2"),
        ({"memory": "all"}, "memory"),
        ({"activation": "tanh"}, "activation"),
        ({"hidden": (0,)}, "hidden"),
        ({"si_strength": -1.0}, "si_strength"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        StreamNetworks(1, 1, n_streams=2, **options)
    networks = StreamNetworks(1, 1)
    with pytest.raises(ValueError, match="y holds NaN"):
        networks.update(torch.zeros(1, 1), torch.full((1, 1), torch.nan))
