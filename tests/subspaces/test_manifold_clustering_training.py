"""Network, views, optimisers, and the training loop: objectives, reproducibility, interruption and resumption."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from locally.subspaces.manifold_clustering import (
    CropAndColour,
    Jitter,
    MLCNet,
    RandomAffine,
    RateReduction,
    ResNet18,
    Schedule,
    TotalCodingRate,
    Training,
    coding_rate,
    coding_rate_membership,
    ideal_rate_reduction,
    sinkhorn_projection,
)
from locally.subspaces.manifold_clustering.optimizers import LARS, Adam, Group, Momentum


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Network and views ----------------------------------------------------------------------------------------------------


def test_after_the_copy_both_memberships_are_the_same_bit_for_bit():
    net = MLCNet(10, 32, 8, generator=generator())
    x = torch.randn(40, 10, generator=generator())
    z, c = net(x)
    assert not torch.equal(z, c)
    z, c = net.copy_feature_head_()(x)
    assert torch.equal(sinkhorn_projection(c @ c.T, 0.175), sinkhorn_projection(z @ z.T, 0.175))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(40))
    net.feature_head.weight.data.zero_()  # a copy, not a tie
    assert net.cluster_head.weight.abs().sum() > 0


def test_weights_come_from_the_generator_alone():
    torch.manual_seed(0)
    one = MLCNet(5, 16, 4, generator=generator(3)).state_dict()
    torch.manual_seed(1)
    other = MLCNet(5, 16, 4, generator=generator(3)).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_residual_network_has_the_parameters_of_its_name():
    net = ResNet18((3, 32, 32), generator=generator())
    assert sum(p.numel() for p in net.parameters()) == 11_168_832  # ResNet-18 without its classifier, 3 x 3 stem
    small = ResNet18((3, 8, 8), width=4, generator=generator())
    assert small(torch.rand(2, 192)).shape == (2, 32)
    assert small.out_dim == 32


@pytest.mark.parametrize("bad", [0, -1, 2.5])
def test_bad_widths_are_named(bad, without_shape_checks):
    with pytest.raises((ValueError, TypeError), match="hidden_dim"):
        MLCNet(3, bad, 4)


def test_no_change_is_the_identity():
    x = torch.rand(6, 64, generator=generator())
    still = RandomAffine((1, 8, 8), rotation=0.0, scale=0.0, shear=0.0, shift=0.0, noise=0.0)
    torch.testing.assert_close(still(x, generator()), x, atol=1e-6, rtol=0)
    colour = torch.rand(6, 3 * 64, generator=generator())
    whole = CropAndColour((3, 8, 8), area=1.0, jitter=0.0, grey=0.0)
    view = whole(colour, generator()).view(6, 3, 8, 8)
    images = colour.view(6, 3, 8, 8)
    # a crop of the whole area may still change its shape a little; half of the views are mirrored
    assert view.shape == images.shape
    assert ((view >= 0) & (view <= 1 + 1e-6)).all()


def test_a_shift_of_one_pixel_moves_the_image_by_one_pixel():
    x = torch.zeros(400, 64)
    x.view(-1, 8, 8)[:, 4, 4] = 1
    moved = RandomAffine((1, 8, 8), rotation=0.0, scale=0.0, shear=0.0, shift=1.0, noise=0.0)(x, generator()).view(
        -1, 8, 8
    )
    places = torch.arange(8.0)
    mass = moved.sum((1, 2))
    centre = torch.stack([(moved.sum(2) @ places) / mass, (moved.sum(1) @ places) / mass])
    assert (centre - 4).abs().max() <= 1 + 1e-4
    assert (centre - 4).abs().max() > 0.9


def test_grey_views_have_no_colour_and_hue_keeps_brightness():
    x = torch.rand(8, 3 * 16, generator=generator())
    grey = CropAndColour((3, 4, 4), jitter=0.0, grey=1.0)(x, generator()).view(8, 3, 16)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    images = x.view(8, 3, 4, 4)
    turned = CropAndColour._turn_hue(images, torch.full((8, 1, 1, 1), 0.4))
    luma = lambda i: torch.einsum("c,nchw->nhw", torch.tensor([0.299, 0.587, 0.114]), i)
    torch.testing.assert_close(luma(turned), luma(images), atol=1e-5, rtol=1e-4)
    assert (turned - images).abs().max() > 0.05


def test_jitter_follows_the_distance_between_neighbours():
    grid = np.stack(np.meshgrid(np.arange(10.0), np.arange(10.0)), -1).reshape(-1, 2)
    assert Jitter.among_neighbours(grid, 0.5).scale == pytest.approx(0.5 * np.sqrt(2) / np.sqrt(2), rel=0.5)
    assert Jitter.among_neighbours(np.ones((5, 3))).scale == 0
    assert Jitter.among_neighbours(np.ones((1, 3))).scale == 0


@pytest.mark.parametrize(
    ("make", "name"), [(lambda: Jitter(-1.0), "scale"), (lambda: CropAndColour((3, 4, 4), area=0.0), "area")]
)
def test_bad_views_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_views_of_the_wrong_size_are_refused(without_shape_checks):
    with pytest.raises(ValueError, match="64 features"):
        RandomAffine((1, 8, 8))(torch.rand(2, 63), generator())


# Objectives -----------------------------------------------------------------------------------------------------------


def views(seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(2, 12, 5, generator=generator(seed)), dim=-1)


def test_the_two_forms_of_the_start():
    z = views()
    cosine = (z[0] * z[1]).sum(1)
    loss, logged = TotalCodingRate(0.2, 10.0)(z, z)
    expected = -(coding_rate(z[0], 0.2) + coding_rate(z[1], 0.2)) / 4 - 10 * cosine.mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logged["agreement"], cosine.mean())
    loss, _ = TotalCodingRate(0.2, 10.0, form="mean")(z, z)
    torch.testing.assert_close(loss, -coding_rate(z.mean(0), 0.2) - 10 * cosine.abs().mean())
    loss, logged = TotalCodingRate(0.2, 10.0)(z[:1], z[:1])  # one view: the rate alone
    torch.testing.assert_close(loss, -coding_rate(z[0], 0.2) / 2)
    assert logged["agreement"] == 0


def test_rate_reduction_averages_memberships_and_renormalises_the_embedding():
    z, c = views(0), views(1)
    objective = RateReduction(0.2, 0.3, half_steps=40)
    loss, logged = objective(z, c)
    G = objective.membership(c)
    torch.testing.assert_close(G.sum(0), torch.ones(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(G.sum(1), torch.ones(12), atol=1e-4, rtol=0)
    Z = F.normalize(z.mean(0), dim=1)
    torch.testing.assert_close(loss, coding_rate_membership(Z, G, 0.2) - coding_rate(Z, 0.2))
    torch.testing.assert_close(loss, logged["rate of clusters"] - logged["rate"])
    fined, _ = RateReduction(0.2, 0.3, half_steps=40, penalty=0.1)(z, c)
    torch.testing.assert_close(fined - loss, 0.05 * G.square().sum())
    assert not torch.equal(RateReduction(affinity="abs").membership(c), RateReduction().membership(c))


# Optimisers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_updates_are_those_of_torch(kind):
    start = torch.randn(4, 3, generator=generator())
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    rule = {"adam": Adam, "momentum": Momentum}[kind]([Group([ours], 0.1)])
    if kind == "adam":
        peer = torch.optim.Adam([theirs], lr=0.01, weight_decay=0.1)
    else:
        peer = torch.optim.SGD([theirs], lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(20):
        for p, optimizer in ((ours, rule), (theirs, peer)):
            optimizer.zero_grad()
            (p**4).sum().backward()
        rule.step(0.01)
        peer.step()
    torch.testing.assert_close(ours, theirs)


def test_lars_steps_are_bounded_by_the_size_of_the_layer():
    weight, bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    rule = LARS([Group([weight, bias], 0.0)])
    weight.grad, bias.grad = torch.full((3, 3), 100.0), torch.full((3,), 0.5)
    rule.step(0.1)
    assert float((weight - 1).norm()) == pytest.approx(0.02 * 3, rel=1e-4)
    torch.testing.assert_close(bias.data, torch.full((3,), 0.95))  # plain momentum
    weight.grad = None
    before = weight.clone()
    rule.step(0.1)
    assert torch.equal(weight, before)


def test_schedule_warms_up_and_falls():
    schedule = Schedule(steps=110, lr=1.0, warmup=10, cosine=True)
    assert [schedule.factor(s) for s in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert schedule.factor(109) < 0.001
    assert Schedule(10, 1.0).factor(7) == 1
    for bad in ({"lr": 0.0}, {"weight_decay": -1.0}, {"optimizer": "newton"}, {"steps": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Schedule(**{"steps": 10, "lr": 1.0} | bad)


# The loop -------------------------------------------------------------------------------------------------------------


def training(objective, steps=8, optimizer="adam", seed=0, **options) -> Training:
    X = torch.randn(50, 6, generator=generator())
    net = MLCNet(6, 16, 4, generator=generator(1))
    schedule = Schedule(steps, 1e-2, optimizer=optimizer)
    return Training(net, X, objective, schedule, 20, augment=Jitter(0.1), seed=seed, **options)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lars"])
@pytest.mark.parametrize("objective", [TotalCodingRate(), RateReduction()])
def test_both_stages_climb_under_every_rule(optimizer, objective):
    stage = training(objective, steps=40, optimizer=optimizer)
    history = stage.run()
    value = np.array(history["rate"])
    if objective.name == "mlc":
        value = value - np.array(history["rate of clusters"])
    else:
        value = value + objective.lam * np.array(history["agreement"])
    assert value[-10:].mean() > value[:5].mean()
    assert all(len(v) == 40 for v in history.values())


def test_rate_reduction_stays_below_the_ideal():
    X = torch.cat([torch.randn(30, 6, generator=generator(k)) * 0.1 + 3 * torch.eye(6)[k] for k in range(2)])
    net = MLCNet(6, 32, 4, generator=generator(1)).copy_feature_head_()
    history = Training(net, X, RateReduction(), Schedule(60, 1e-2), 60, augment=Jitter(0.05)).run()
    gains = np.array(history["rate"]) - np.array(history["rate of clusters"])
    # G may mix samples within clusters only: no two-cluster embedding gains more
    assert gains.max() <= ideal_rate_reduction(4, 4, 0.2) + 1e-4
    assert gains[-1] > gains[0]


def test_one_seed_gives_one_result():
    one, two, other = training(RateReduction()), training(RateReduction()), training(RateReduction(), seed=1)
    assert one.run() == two.run()
    assert one.run() != other.run()


def test_every_pass_sees_every_sample_once():
    stage = training(TotalCodingRate())
    stage.batches.size = 25
    stage.batches.at = 50
    seen = torch.cat([stage.batches.next(), stage.batches.next()])
    assert sorted(seen.tolist()) == list(range(50))


@pytest.mark.parametrize("optimizer", ["adam", "lars"])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, optimizer):
    path = tmp_path / "stage.safetensors"

    def stop(stage: str, step: int, logged: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    whole = training(RateReduction(), optimizer=optimizer)
    expected = whole.run()
    with pytest.raises(KeyboardInterrupt):
        training(RateReduction(), optimizer=optimizer).run(callback=stop, checkpoint=path)
    resumed = training(RateReduction(), optimizer=optimizer)
    found = resumed.run(checkpoint=path)
    assert resumed.step == 8
    assert found == expected
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name]), name
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "stage.safetensors"
    training(TotalCodingRate()).save(path)
    stage = Training(MLCNet(6, 8, 4), torch.zeros(50, 6), TotalCodingRate(), Schedule(2, 1e-3), 20)
    with pytest.raises(ValueError, match="not written by this stage"):
        stage.run(checkpoint=path)


def test_divergence_is_an_error():
    stage = training(TotalCodingRate(), steps=3)
    with torch.no_grad():
        stage.net.feature_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="'tcr' diverged"):
        stage.run()


def test_autocast_keeps_rates_in_single_precision():
    history = training(RateReduction(), amp=True).run()
    assert np.isfinite(history["rate"]).all()
