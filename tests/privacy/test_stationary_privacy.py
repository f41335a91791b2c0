"""What private stationary points cost: the accountant's figures, sensitivities on neighbours, noise, and audits."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from locally.errors import MissingExtra
from locally.privacy.stationary import (
    LOGISTIC,
    SIGMOID_SQUARE,
    Accountant,
    Adjacency,
    Beyond,
    Composition,
    LinearModel,
    Mechanism,
    NoisyGradientDescent,
    PerExampleObjective,
    PrivateSpiderBoost,
    PrivateTreeSpider,
    Randomness,
    RecursiveRegularization,
    Sampling,
    Solver,
    VariationNoise,
    audit,
    audit_spiderboost,
    calibrate,
    huber,
    spent_epsilon,
    worst_case_pair,
)
from locally.privacy.stationary.auditing import _path_score
from locally.privacy.stationary.convex import Round, phased_sgd
from locally.privacy.stationary.spider import noisy_mean


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Exact delta of Gaussian releases whose sensitivity / noise adds up in squares to mu^2 (Balle and Wang, 2018)."""
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


def poisson(z: float, count: int, rate: float) -> Mechanism:
    return Mechanism("x", z, count) if rate == 1 else Mechanism("x", z, count, Sampling.POISSON, rate)


# Accounting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchors", "variations", "delta", "epsilon"),
    [
        ((5.0, 10, 1.0), (8.0, 90, 1.0), 1e-5, 6.6655),
        ((2.0, 20, 0.5), (1.5, 200, 0.05), 1e-5, 6.8317),
        ((1.0, 0, 1.0), (1.1, 1000, 0.01), 1e-6, 1.97675),
        ((30.0, 16, 1.0), (60.0, 1008, 0.1), 1e-5, 0.55423),
    ],
)
def test_composed_epsilons_are_the_reference_values(anchors, variations, delta, epsilon):
    mechanisms = (poisson(*anchors), poisson(*variations))
    assert spent_epsilon(mechanisms, delta, Adjacency.ADD_REMOVE) == pytest.approx(epsilon, rel=5e-3)


@pytest.mark.parametrize("adjacency", Adjacency)
@pytest.mark.parametrize(("z", "count"), [(1.0, 1), (3.0, 10), (20.0, 50)])
def test_loss_distributions_agree_with_the_exact_gaussian(adjacency, z, count):
    """Our noise multiplier is noise over sensitivity under either adjacency, whatever the library's unit is."""
    epsilon = spent_epsilon((Mechanism("x", z, count),), 1e-5, adjacency, Accountant.PLD)
    assert gaussian_delta(epsilon, math.sqrt(count) / z) == pytest.approx(1e-5, rel=1e-2)
    assert epsilon <= spent_epsilon((Mechanism("x", z, count),), 1e-5, adjacency, Accountant.RDP)


@given(z=st.floats(0.5, 100), count=st.integers(1, 1000), epsilon=st.floats(0.05, 20), delta=st.floats(1e-9, 1e-2))
def test_calibration_never_exceeds_the_budget_and_wastes_under_a_percent(z, count, epsilon, delta):
    plan = (Mechanism("a", z, count), Mechanism("b", 2 * z, 3 * count))
    a, b = calibrate(plan, epsilon, delta)
    assert 0.99 * epsilon <= spent_epsilon((a, b), delta) <= epsilon
    assert b.noise_multiplier == pytest.approx(2 * a.noise_multiplier)


@pytest.mark.parametrize(
    ("sampling", "adjacency", "accountant"),
    [
        (Sampling.FIXED, Adjacency.REPLACE, Accountant.RDP),
        (Sampling.POISSON, Adjacency.ADD_REMOVE, Accountant.RDP),
    ],
)
def test_sampled_calibration_too(sampling, adjacency, accountant):
    plan = (Mechanism("x", 0.1, 50, sampling, 0.1, 1000),)
    found = calibrate(plan, 2.0, 1e-5, adjacency, accountant)
    assert 0.99 * 2 <= spent_epsilon(found, 1e-5, adjacency, accountant) <= 2.0


@given(z=st.floats(1, 20), count=st.integers(1, 200), rate=st.floats(0.01, 0.9))
@settings(max_examples=10)
def test_epsilon_grows_with_releases_and_rate_and_falls_with_noise(z, count, rate):
    def cost(z, count, rate):
        return spent_epsilon((poisson(z, count, rate),), 1e-5, Adjacency.ADD_REMOVE)

    here, rounding = cost(z, count, rate), 1e-3  # of the library's series at fractional orders
    assert cost(z, 2 * count, rate) >= here
    assert cost(1.5 * z, count, rate) <= here * (1 + rounding)
    assert cost(z, count, min(1.0, 1.1 * rate)) >= here * (1 - rounding)


def test_disjoint_parts_cost_the_dearest_of_them():
    parts = (Mechanism("a", 2.0, 1, releases=9), Mechanism("b", 1.0, 1, releases=4))
    together = spent_epsilon(parts, 1e-5, composition=Composition.PARALLEL)
    assert together == spent_epsilon(parts[1:], 1e-5) < spent_epsilon(parts, 1e-5)


def test_a_release_without_noise_costs_everything():
    assert spent_epsilon((Mechanism("a", 0.0, 1), Mechanism("b", 9.0, 1)), 1e-5) == math.inf
    with pytest.raises(ValueError, match="no noise"):
        calibrate((Mechanism("a", 0.0, 1),), 1.0, 1e-5)


def test_sampling_that_no_accountant_bounds_is_refused():
    with pytest.raises(ValueError, match="cannot bound this sampling"):
        spent_epsilon((poisson(1.0, 5, 0.1),), 1e-5, Adjacency.REPLACE, Accountant.RDP)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_calibration_refuses_impossible_budgets(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        calibrate((Mechanism("a", 1.0, 1),), epsilon, 1e-5)
    with pytest.raises(ValueError, match="delta"):
        spent_epsilon((Mechanism("a", 1.0, 1),), 1.0)


@pytest.mark.parametrize("bad", [{"noise_multiplier": math.nan}, {"count": -1}, {"rate": 1.5}])
def test_impossible_mechanisms_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Mechanism(**{"what": "x", "noise_multiplier": 1.0, "count": 1} | bad)


def test_missing_accountant_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtra, match=r"locally\[privacy\]"):
        spent_epsilon((Mechanism("never asked about before", 1.2345, 1),), 1e-5)


# Sensitivity on neighbours --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [LOGISTIC, SIGMOID_SQUARE, huber(0.5)])
def test_neighbours_differ_by_at_most_the_declared_sensitivity(loss):
    """1000 random pairs, near the origin and far from it, both kinds of release."""
    generator = torch.Generator().manual_seed(0)

    def row(count):
        X = 1.5 * torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64))
        return X, (torch.rand(count, generator=generator) < 0.5).double()

    X, y = row(6)
    closest = 0.0
    for trial in range(1000):
        other_X, other_y = row(1)
        first = LinearModel(X, y, data_norm=1.5 + 1e-12, loss=loss)
        second = LinearModel(torch.cat([other_X, X[1:]]), torch.cat([other_y, y[1:]]), data_norm=1.5 + 1e-12, loss=loss)
        w = 10.0 ** (trial % 4 - 1) * torch.randn(3, generator=generator, dtype=torch.float64)
        v = w + 10.0 ** (trial % 5 - 3) * torch.randn(3, generator=generator, dtype=torch.float64)
        gap = float((first.gradient_sum(w) - second.gradient_sum(w)).norm())
        assert gap <= 2 * first.lipschitz * (1 + 1e-9)
        bound = first.difference_bound(float((w - v).norm()))
        change = float((first.difference_sum(w, v, bound) - second.difference_sum(w, v, bound)).norm())
        assert change <= 2 * bound * (1 + 1e-9)
        closest = max(closest, gap / (2 * first.lipschitz))
    assert closest > 0.5  # the bound is not vacuous


@given(seed=st.integers(0, 10**6), large=st.floats(1, 1e6), at=st.integers(0, 15))
def test_phased_sgd_moves_by_at_most_one_step_between_neighbours(seed, large, at):
    generator = torch.Generator().manual_seed(seed)
    X = torch.nn.functional.normalize(torch.randn(16, 3, generator=generator, dtype=torch.float64))
    y = torch.randn(16, generator=generator, dtype=torch.float64)
    changed = y.clone()
    changed[at] = large
    start, mu = torch.zeros(3, dtype=torch.float64), 0.3
    task = Round(torch.arange(16), mu, mu * start, start, 2.0, start)
    ends = [
        phased_sgd(LinearModel(X, target, data_norm=1 + 1e-9, loss=huber(1.0)), task, 0.0, Randomness(generator))[0]
        for target in (y, changed)
    ]
    phase = next(k for k, end in enumerate((8, 12, 14, 15, 16), start=1) if at < end)
    eta = min(math.log(16) / (mu * 16), 1 / (1 + mu)) * 4.0**-phase
    assert float((ends[0] - ends[1]).norm()) <= 2 * eta * (1 + 1e-6)


@given(bound=st.floats(1e-6, 1e6), scale=st.floats(1e-3, 1e9), seed=st.integers(0, 1000))
def test_clipped_examples_have_bounded_influence(bound, scale, seed):
    rows = scale * torch.randn(7, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[3, 1] = torch.inf
    rows[4, 0] = torch.nan
    objective = PerExampleObjective(
        lambda w, index: rows[index], torch.arange(7), dimension=4, lipschitz=bound, smoothness=1.0, chunk=3
    )
    w = torch.zeros(4, dtype=torch.float64)
    for i in range(7):
        influence = objective.gradient_sum(w, torch.tensor([i]))
        assert float(influence.norm()) <= bound * (1 + 1e-12)
        assert bool((influence == 0).all()) == (i in (3, 4))
    whole = sum(objective.gradient_sum(w, torch.tensor([i])) for i in range(7))
    torch.testing.assert_close(objective.gradient_sum(w), whole)


def test_gradients_beyond_the_bound_are_refused_when_asked():
    data = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    make = {"dimension": 2, "lipschitz": 2.0, "smoothness": 1.0}
    w = torch.zeros(2, dtype=torch.float64)
    strict = PerExampleObjective(lambda w, x: w - x, data, **make, beyond=Beyond.REFUSE)
    with pytest.raises(ValueError, match="norm at most 2, got 5"):
        strict.gradient_sum(w)
    steep = PerExampleObjective(lambda w, x: 3 * w + 0 * x, data, **make, beyond=Beyond.REFUSE)
    with pytest.raises(ValueError, match=r"norm at most 0\.1"):
        steep.difference_sum(w + 0.1 / math.sqrt(2), w, 0.1)
    assert "clipped to 2" in PerExampleObjective(lambda w, x: w - x, data, **make).assumptions[0]
    assert "refused beyond 2" in strict.assumptions[0]


# Noise ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjacency", Adjacency)
def test_noise_is_the_multiplier_times_the_sensitivity(adjacency):
    randomness = Randomness(torch.Generator().manual_seed(0))
    drawn = noisy_mean(torch.zeros(10_000, dtype=torch.float64), 3.0, 50, 4.0, adjacency, randomness)
    sensitivity = (2 if adjacency == Adjacency.REPLACE else 1) * 3.0 / 50
    assert float(drawn.std()) == pytest.approx(4.0 * sensitivity, rel=0.03)
    assert abs(float(drawn.mean())) < 0.05 * 4.0 * sensitivity


@pytest.mark.parametrize(("learning_rate", "capped"), [(1e-4, False), (10.0, True)])
def test_noise_of_a_variation_scales_with_the_distance_up_to_its_cap(learning_rate, capped):
    """Examples without gradients, so that all that is released is noise."""
    silent = PerExampleObjective(
        lambda w, x: torch.zeros(len(x), 10_000, dtype=torch.float64),
        torch.zeros(4, 1, dtype=torch.float64),
        dimension=10_000,
        lipschitz=0.5,
        smoothness=2.0,
    )
    method = PrivateSpiderBoost(
        delta=1e-5, noise_multipliers=(0.3, 0.7), steps=2, phase=2, learning_rate=learning_rate, keep_trace=True
    )
    trace = method.minimize(silent, rng=1).trace
    moved = float((trace.iterates[1] - trace.iterates[0]).norm())
    assert (2.0 * moved > 2 * 0.5) == capped
    expected = 0.7 * 2 * min(2.0 * moved, 1.0) / 4
    assert float((trace.estimates[1] - trace.estimates[0]).std()) == pytest.approx(expected, rel=0.03)
    assert float(trace.estimates[0].std()) == pytest.approx(0.3 * 2 * 0.5 / 4, rel=0.03)


def test_path_noise_of_the_tree_is_the_papers_and_never_smaller():
    """sensitivity 2 beta 2^(D/2) / b at every depth."""
    silent = PerExampleObjective(
        lambda w, x: torch.zeros(len(x), 5_000, dtype=torch.float64),
        torch.zeros(32, 1, dtype=torch.float64),
        dimension=5_000,
        lipschitz=5.0,
        smoothness=2.0,
    )
    shared = {"delta": 1e-5, "noise_multipliers": (1.0, 0.5), "depth": 2, "batch": 16, "step": 0.1, "rounds": 1}
    stds = {}
    for kind in VariationNoise:
        estimates = (
            PrivateTreeSpider(**shared, variation_noise=kind, keep_trace=True).minimize(silent, rng=0).trace.estimates
        )
        parents = {1: 0, 2: 0, 3: 2}  # of the leaves' right children, by leaf
        stds[kind] = [float((estimates[leaf] - estimates[parent]).std()) for leaf, parent in parents.items()]
    np.testing.assert_allclose(stds[VariationNoise.PATH], 0.5 * 2 * 0.1 * 2 / 16, rtol=0.05)
    assert all(a <= 1.05 * b for a, b in zip(stds[VariationNoise.DISTANCE], stds[VariationNoise.PATH]))


# Audits ---------------------------------------------------------------------------------------------------------------

CONFIDENCE = 0.99  # an honest mechanism fails an audit at one seed in a hundred; these are fixed
RUNS = 600


@pytest.mark.parametrize("adjacency", Adjacency)
def test_released_paths_are_as_far_apart_as_the_accountant_says(adjacency, without_shape_checks):
    """On the worst pair log-likelihood ratios are normal, mu^2 apart and of variance mu^2, mu^2 = sum 1 / z^2."""
    method = PrivateSpiderBoost(epsilon=1.0, delta=0.02, steps=4, phase=2, adjacency=adjacency, keep_trace=True)
    generator = torch.Generator().manual_seed(0)
    scores = [
        np.array([_path_score(method, side, method.minimize(side, rng=generator)) for _ in range(RUNS)])
        for side in worst_case_pair(adjacency)
    ]
    statement = method.privacy_statement(worst_case_pair(adjacency)[0])
    mu = math.sqrt(sum(m.count / m.noise_multiplier**2 for m in statement.mechanisms))
    apart = scores[0].mean() - scores[1].mean()
    assert apart == pytest.approx(mu**2, abs=4 * mu * math.sqrt(2 / RUNS))
    for side in scores:
        assert side.std() == pytest.approx(mu, rel=4 / math.sqrt(2 * RUNS))
    assert audit(scores[0], scores[1], 0.02, CONFIDENCE).epsilon <= 1.0


def test_audit_catches_a_third_of_the_noise(without_shape_checks):
    honest = PrivateSpiderBoost(epsilon=1.0, delta=0.02, steps=4, phase=2)
    assert audit_spiderboost(honest, runs=RUNS, confidence=CONFIDENCE, rng=0).epsilon <= 1.0
    first, _ = worst_case_pair(honest.adjacency)
    fraud = tuple(m.noise_multiplier / 3 for m in honest.privacy_statement(first).mechanisms)
    cheat = replace(honest, epsilon=None, noise_multipliers=fraud)
    assert audit_spiderboost(cheat, runs=RUNS, confidence=CONFIDENCE, rng=0).epsilon > 1.0


def shown(method, sides, score) -> float:
    """The epsilon that runs on either side show, at delta 0.02."""
    generator = torch.Generator().manual_seed(1)
    scores = [np.array([score(method.minimize(side, rng=generator)) for _ in range(RUNS)]) for side in sides]
    return audit(scores[0], scores[1], 0.02, CONFIDENCE).epsilon


@pytest.mark.parametrize("adjacency", Adjacency)
def test_audited_samples_keep_their_claim(adjacency, without_shape_checks):
    """One release from half of two examples. The same runs with a tenth of the noise are found out."""
    method = NoisyGradientDescent(epsilon=1.0, delta=0.02, steps=1, batch=1, adjacency=adjacency, keep_trace=True)
    sides = worst_case_pair(adjacency)

    def first_release(found):
        return float(found.trace.estimates[0])

    assert shown(method, sides, first_release) <= 1.0
    (honest,) = method.privacy_statement(sides[0]).mechanisms
    fraud = replace(method, epsilon=None, noise_multiplier=honest.noise_multiplier / 10)
    assert shown(fraud, sides, first_release) > 1.0


def test_audited_tree_keeps_its_claim(without_shape_checks):
    """Three examples, a root of two and a right child of one: the odd one out meets either."""

    def side(x):
        data = torch.tensor([[0.0], [0.0], [x]], dtype=torch.float64)
        return PerExampleObjective(lambda w, x: x * (1000 + w), data, dimension=1, lipschitz=1.0, smoothness=1.0)

    def largest(found):
        w, estimates = found.trace.iterates[:, 0], found.trace.estimates[:, 0]
        z_root, z_child = (m.noise_multiplier for m in found.privacy.mechanisms)
        change = float(estimates[1] - estimates[0]) / (2 * float(w[1] - w[0]))
        return max(float(estimates[0]) / z_root, change / z_child, key=abs)

    method = PrivateTreeSpider(epsilon=1.0, delta=0.02, depth=1, batch=2, step=0.5, keep_trace=True)
    sides = side(1.0), side(-1.0)
    assert shown(method, sides, largest) <= 1.0
    fraud = tuple(m.noise_multiplier / 5 for m in method.privacy_statement(sides[0]).mechanisms)
    assert shown(replace(method, epsilon=None, noise_multipliers=fraud), sides, largest) > 1.0


def test_audited_phased_sgd_keeps_its_claim(without_shape_checks):
    X = torch.ones(8, 1, dtype=torch.float64)
    sides = [
        LinearModel(X, torch.tensor([y] + [0.0] * 7).double(), data_norm=1.0, loss=huber(1.0)) for y in (9.0, -9.0)
    ]
    method = RecursiveRegularization(
        epsilon=1.0, delta=0.02, radius=10.0, strength=0.5, rounds=1, solver=Solver.PHASED_SGD
    )
    assert shown(method, sides, lambda found: float(found.w)) <= 1.0
    (honest,) = method.privacy_statement(sides[0]).mechanisms
    fraud = replace(method, epsilon=None, noise_multiplier=honest.noise_multiplier / 10)
    assert shown(fraud, sides, lambda found: float(found.w)) > 1.0


def test_audit_of_equal_inputs_shows_nothing_and_of_far_ones_much():
    rng = np.random.default_rng(0)
    same = rng.normal(size=(2, 4000))
    assert audit(same[0], same[1], 1e-5).epsilon < 0.3
    assert audit(same[0] + 50, same[1], 1e-5).epsilon > 5
    assert audit(same[0] - 50, same[1], 1e-5).epsilon == 0  # told apart, but by a score that points the other way


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"delta": 0.0}, "delta"),
        ({"confidence": 1.0}, "confidence"),
        ({"scores": np.array([1.0])}, "scores"),
        ({"neighbour_scores": np.array([1.0, np.nan])}, "neighbour_scores"),
    ],
)
def test_audits_refuse_bad_input(change, named):
    good = {"scores": np.zeros(5), "neighbour_scores": np.zeros(5), "delta": 0.1}
    with pytest.raises(ValueError, match=named):
        audit(**good | change)


def test_audits_of_runs_refuse_what_they_cannot_score():
    shared = {"delta": 0.01, "steps": 4, "phase": 2}
    with pytest.raises(ValueError, match="every example"):
        audit_spiderboost(PrivateSpiderBoost(**shared, epsilon=1.0, variation_batch=1), runs=10)
    with pytest.raises(ValueError, match="must add noise"):
        audit_spiderboost(PrivateSpiderBoost(**shared, noise_multipliers=(0.0, 1.0)), runs=10)
    with pytest.raises(ValueError, match="runs"):
        audit_spiderboost(PrivateSpiderBoost(**shared, epsilon=1.0), runs=1)
