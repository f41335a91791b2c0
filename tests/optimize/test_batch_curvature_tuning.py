"""Schedulers, the learner of rate and momentum, Adam's limit, and sweeps that must equal trainings one by one."""

import math

import pytest
import torch
from torch import nn

from locally.linalg.curvature import Hessian
from locally.optimize.batch_curvature import (
    BatchCurvature,
    BatchSizeLR,
    CurvatureTuner,
    LearningRateSweep,
    TuningStatus,
    largest_adam_learning_rate,
    optimal_heavy_ball,
)

CROSS_ENTROPY = nn.functional.cross_entropy
half_square = lambda out, target: ((out - target) ** 2).sum(1).mean() / 2


def quadratic(curvatures):
    """A linear model without bias whose loss is sum_i curvature_i w_i^2 / 2."""
    n = len(curvatures)
    model = nn.Linear(n, 1, bias=False).double()
    X = torch.diag((torch.tensor(curvatures, dtype=torch.float64) * n).sqrt())
    return model, (X, torch.zeros(n, 1, dtype=torch.float64))


def classifier(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    X = torch.randn(60, 5, dtype=torch.float64)
    return model, (X, X[:, :3].argmax(1))


# BatchSizeLR ----------------------------------------------------------------------------------------------------------


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1} | options)


def test_rates_follow_the_batch_size_by_the_optimizers_rule():
    model, _ = classifier()
    for optimizer, factor in ((sgd(model), 4.0), (torch.optim.Adam(model.parameters(), lr=0.1), 2.0)):
        scheduler = BatchSizeLR(optimizer, 32)
        assert scheduler.get_last_lr() == [0.1]
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [0.1]
        scheduler.step(128)
        assert scheduler.get_last_lr() == [pytest.approx(0.1 * factor)]
        scheduler.step()
        assert scheduler.get_last_lr() == [pytest.approx(0.1 * factor)]
        scheduler.step(32)
        assert scheduler.get_last_lr() == [pytest.approx(0.1)]
    assert BatchSizeLR(torch.optim.RMSprop(model.parameters()), 32).rule == "adam"


def test_chains_with_another_scheduler_and_resumes():
    model, _ = classifier()
    optimizer = sgd(model)
    batch, decay = BatchSizeLR(optimizer, 32), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    batch.step(64)
    decay.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 2 * 0.5)
    again = BatchSizeLR(optimizer, 32)
    again.load_state_dict(batch.state_dict())
    again.step(128)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_with_a_report_the_rate_stops_growing_at_the_knee():
    model, data = classifier()
    report = BatchCurvature(steps=10, probes=1, noise_examples=None).measure(model, CROSS_ENTROPY, data)
    optimizer = sgd(model)
    scheduler = BatchSizeLR(optimizer, 30, report=report)
    optimizer.step()
    scheduler.step(60)
    expected = report.max_learning_rate(60) / report.max_learning_rate(30)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * expected)
    assert expected < 1.9
    with pytest.raises(ValueError, match="at most n_examples"):
        scheduler.step(61)
    assert scheduler.batch_size == 60
    with pytest.raises(ValueError, match="report holds the limits of SGD"):
        BatchSizeLR(torch.optim.Adam(model.parameters()), 30, report=report)


def test_batch_sizes_that_are_none_are_refused():
    model, _ = classifier()
    with pytest.raises(ValueError, match="batch_size"):
        BatchSizeLR(sgd(model), 0)
    with pytest.raises(ValueError, match="rule must be one of"):
        BatchSizeLR(sgd(model), 8, rule="cubic")
    scheduler = BatchSizeLR(sgd(model), 8)
    with pytest.raises(ValueError, match="batch_size"):
        scheduler.step(-8)


# CurvatureTuner -------------------------------------------------------------------------------------------------------


def test_polyaks_heavy_ball_on_a_quadratic():
    model, data = quadratic([1.0, 0.5, 0.2, 0.04])
    optimizer = sgd(model, lr=2.0, momentum=0.9)
    tuner = CurvatureTuner(optimizer, model, half_square, steps=4, damping=1.0, every=3)
    tuned = tuner.step(data)
    ball = optimal_heavy_ball(1.0, 0.04)
    assert tuned.status is TuningStatus.UPDATED
    assert (tuned.largest, tuned.smallest) == (pytest.approx(1.0), pytest.approx(0.04))
    assert (tuned.lr, tuned.momentum) == (pytest.approx(ball.lr), pytest.approx(ball.momentum))
    assert optimizer.param_groups[0]["lr"] == tuned.lr
    assert [tuner.step(data).status for _ in range(3)] == [TuningStatus.WAITING] * 2 + [TuningStatus.UPDATED]


def test_changes_are_limited_and_damped_and_weight_decay_counts():
    model, data = quadratic([1.0, 0.25])
    optimizer = sgd(model, lr=0.1, momentum=0.0, weight_decay=0.11)
    tuner = CurvatureTuner(optimizer, model, half_square, steps=2, every=1, max_change=3.0)
    first = tuner.step(data)
    assert first.status is TuningStatus.LIMITED
    assert first.lr == pytest.approx(0.3)
    assert first.largest == pytest.approx(1.11)
    assert first.smallest == pytest.approx(0.36)
    for _ in range(3):
        last = tuner.step(data)
    assert last.status is TuningStatus.UPDATED
    assert last.lr == pytest.approx(0.5 * optimal_heavy_ball(1.11, 0.36).lr)


def test_an_indefinite_bulk_is_no_curvature_to_follow():
    """The smallest curvature is taken outside [-|theta_min|, |theta_min|], or as a quantile of the positive mass."""
    model = nn.Linear(4, 1, bias=False).double()
    signs = torch.tensor([[2.0], [1.0], [0.05], [-0.1]], dtype=torch.float64)
    X = 2 * torch.eye(4, dtype=torch.float64)  # the loss is sum_i sign_i w_i^2 / 2
    indefinite = lambda out, sign: (sign * out**2).sum(1).mean() / 2
    default = CurvatureTuner(sgd(model, momentum=0.0), model, indefinite, steps=4)
    assert default.step((X, signs)).smallest == pytest.approx(1.0)
    quantile = CurvatureTuner(sgd(model, momentum=0.0), model, indefinite, steps=4, quantile=0.01)
    assert quantile.step((X, signs)).smallest == pytest.approx(0.05)


def test_curvature_that_is_not_finite_or_not_positive_leaves_everything_alone():
    model, (X, y) = quadratic([1.0, 0.5])
    optimizer = sgd(model, momentum=0.9)
    spoilt = CurvatureTuner(optimizer, model, lambda out, t: half_square(out, t) * math.nan)
    assert spoilt.step((X, y)).status is TuningStatus.NOT_FINITE
    concave = CurvatureTuner(optimizer, model, lambda out, t: -half_square(out, t), steps=2)
    found = concave.step((X, y))
    assert found.status is TuningStatus.NOT_CONVEX
    assert found.largest == pytest.approx(-0.5)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_modes_of_a_network_with_dropout_and_batch_norm():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    model[1].eval()  # a module's own mode must be back afterwards, whatever it was
    _, data = classifier()
    before = [module.training for module in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    tuner = CurvatureTuner(sgd(model, momentum=0.9), model, CROSS_ENTROPY)
    assert tuner.step(data).status in (TuningStatus.UPDATED, TuningStatus.LIMITED)
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers()))
    with pytest.raises(ValueError, match="drops at random"):
        CurvatureTuner(sgd(model, momentum=0.9), model, CROSS_ENTROPY, mode="train").step(data)
    assert [module.training for module in model.modules()] == before
    model[3].p = 0.0
    trained = CurvatureTuner(sgd(model, momentum=0.9), model, CROSS_ENTROPY, mode="train")
    assert trained.step(data).status in (TuningStatus.UPDATED, TuningStatus.LIMITED)


def test_the_tuner_rescues_a_training_that_would_diverge_and_resumes_where_it_was():
    losses = {}
    for tuned in (True, False):
        model, (X, y) = classifier(1)
        optimizer = sgd(model, lr=50.0, momentum=0.9)
        tuner = CurvatureTuner(optimizer, model, CROSS_ENTROPY, every=2, steps=8)
        for _ in range(80):
            if tuned:
                tuner.step((X, y))
            optimizer.zero_grad()
            loss = CROSS_ENTROPY(model(X), y)
            loss.backward()
            optimizer.step()
        losses[tuned] = float(loss.detach())
    assert losses[True] < 0.5 < losses[False]
    resumed = CurvatureTuner(optimizer, model, CROSS_ENTROPY, every=2)
    resumed.load_state_dict({"calls": 1})
    assert resumed.step((X, y)).status is TuningStatus.WAITING


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every"),
        ({"steps": 1}, "steps"),
        ({"damping": 0.0}, "damping"),
        ({"damping": 1.5}, "damping"),
        ({"max_momentum": 1.0}, "max_momentum"),
        ({"max_change": 1.0}, "max_change"),
        ({"quantile": 1.0}, "quantile"),
        ({"matrix": "fisher"}, "matrix"),
        ({"mode": "test"}, "mode"),
    ],
)
def test_impossible_options_are_named(options, message):
    model, _ = classifier()
    with pytest.raises(ValueError, match=message):
        CurvatureTuner(sgd(model, momentum=0.9), model, CROSS_ENTROPY, **options)


def test_optimizers_without_momentum_are_refused():
    model, _ = classifier()
    with pytest.raises(ValueError, match="must have momentum as SGD has, got Adam"):
        CurvatureTuner(torch.optim.Adam(model.parameters()), model, CROSS_ENTROPY)


# Adam -----------------------------------------------------------------------------------------------------------------


def test_adams_limit_on_a_quadratic_separates_growth_from_decay():
    """Second moments held fixed: 2 (1 + beta1) / (1 - beta1) over the preconditioned curvature."""
    model, (X, y) = quadratic([3.0, 1.0, 0.1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.8, 0.99))
    for _ in range(5):
        optimizer.zero_grad()
        half_square(model(X), y).backward()
        optimizer.step()
    limit = largest_adam_learning_rate(Hessian(model, half_square, (X, y)), optimizer, rtol=1e-9)
    v = optimizer.state[model.weight]["exp_avg_sq"][0] / (1 - 0.99**5)
    H = torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64)
    denominator = v.sqrt() + 1e-8
    for factor, diverges in ((1.01, True), (0.99, False)):
        w, m = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for _ in range(4000):
            m = 0.8 * m + 0.2 * H * w
            w = w - factor * limit * m / denominator
        assert bool(w.norm() > 1e3) == diverges


def test_adam_with_a_large_epsilon_is_sgd_scaled_by_it():
    model, data = classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, eps=1e6)
    CROSS_ENTROPY(model(data[0]), data[1]).backward()
    optimizer.step()
    op = Hessian(model, CROSS_ENTROPY, data)
    top = float(torch.linalg.eigvalsh(op.dense())[-1])
    assert largest_adam_learning_rate(op, optimizer, rtol=1e-8) == pytest.approx(1e6 * 2 * 19 / top, rel=1e-5)


def test_adams_limit_refuses_what_has_no_second_moments():
    model, data = classifier()
    op = Hessian(model, CROSS_ENTROPY, data)
    with pytest.raises(ValueError, match="take a step first"):
        largest_adam_learning_rate(op, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="second moments as Adam does, got SGD"):
        largest_adam_learning_rate(op, sgd(model))
    optimizer = torch.optim.Adam(model[2].parameters(), lr=0.0)
    CROSS_ENTROPY(model(data[0]), data[1]).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="optimizer holds 21 parameters, op is over 57"):
        largest_adam_learning_rate(op, optimizer)


# Sweeps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_sweep_equals_trainings_with_torchs_optimizers(optimizer):
    model, (X, y) = classifier()
    start = [p.detach().clone() for p in model.parameters()]
    rates = [0.3, 0.01]
    sweep = LearningRateSweep(optimizer=optimizer, steps=7, momentum=0.5 if optimizer == "sgd" else 0.0)
    make = lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    found = sweep.run(model, CROSS_ENTROPY, (X, y), rates, 5, generators=make())
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start))
    assert found.rates.tolist() == sorted(rates)
    for row, generator in zip(found.losses, make()):
        batches = [torch.randperm(60, generator=generator)[:5] for _ in range(7)]
        for rate, loss in zip(found.rates.tolist(), row.tolist()):
            alone, _ = classifier()
            theirs = (
                sgd(alone, lr=rate, momentum=0.5)
                if optimizer == "sgd"
                else torch.optim.Adam(alone.parameters(), lr=rate)
            )
            for rows in batches:
                theirs.zero_grad()
                CROSS_ENTROPY(alone(X[rows]), y[rows]).backward()
                theirs.step()
            assert loss == pytest.approx(float(CROSS_ENTROPY(alone(X), y).detach()), rel=1e-8)


def test_the_largest_stable_rate_of_a_quadratic_is_two_over_the_curvature():
    model, data = quadratic([2.0, 0.1])
    nn.init.ones_(model.weight)
    rates = [0.97, 0.99, 1.01, 1.03]
    found = LearningRateSweep(steps=2000).run(
        model, half_square, data, rates, 2, generators=[torch.Generator().manual_seed(0)]
    )
    assert found.largest_stable(1.05) == 0.99
    assert math.isnan(found.largest_stable(-1.0))


def test_overflow_counts_as_infinite_loss():
    model, data = quadratic([2.0, 0.1])
    found = LearningRateSweep(steps=600).run(
        model, half_square, data, [1e3], 2, generators=[torch.Generator().manual_seed(0)]
    )
    assert found.losses.isinf().all()


def test_impossible_sweeps_are_named():
    model, data = classifier()
    one = [torch.Generator()]
    with pytest.raises(ValueError, match="rates"):
        LearningRateSweep().run(model, CROSS_ENTROPY, data, [], 5, generators=one)
    with pytest.raises(ValueError, match="rates"):
        LearningRateSweep().run(model, CROSS_ENTROPY, data, [-1.0], 5, generators=one)
    with pytest.raises(ValueError, match="at most the 60 examples"):
        LearningRateSweep().run(model, CROSS_ENTROPY, data, [0.1], 61, generators=one)
    with pytest.raises(ValueError, match="generators"):
        LearningRateSweep().run(model, CROSS_ENTROPY, data, [0.1], 5, generators=[])
    with pytest.raises(ValueError, match="starts must have shape"):
        LearningRateSweep().run(
            model, CROSS_ENTROPY, data, [0.1], 5, generators=one, starts=torch.zeros(2, 57).double()
        )
    with pytest.raises(ValueError, match="optimizer must be one of"):
        LearningRateSweep(optimizer="lion")
    with pytest.raises(ValueError, match="momentum"):
        LearningRateSweep(momentum=1.0)
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        LearningRateSweep(betas=(0.9, 1.0))
