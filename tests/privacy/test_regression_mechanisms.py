"""Calibration against its defining identity and dp-accounting, samplers against exact laws, randomisers against theory.

Also the reference vectors of the l2-ball randomiser, and an audit: no attack on messages may prove more than epsilon.
"""

import math
import random
from collections import Counter

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import beta, kstest

from locally.privacy.regression import (
    BoundExceeded,
    GaussianRelease,
    L2BallRandomizer,
    NotPrivateWarning,
    SecureNoise,
    SimulatedNoise,
    analytic_gaussian_sigma,
    classical_gaussian_sigma,
    gaussian_delta,
)
from locally.privacy.regression.calibration import INT32_MAX, MAX_LOG2_SCALE, TAIL, lattice_loss, lattice_scale
from locally.privacy.regression.samplers import discrete_gaussian

epsilons = st.floats(0.01, 30)
deltas = st.floats(1e-12, 0.1)


@pytest.fixture
def reference(golden):
    return np.load(golden / "06-ldp-sparse-regression" / "ldp_golden.npz", allow_pickle=False)


def seeded(seed: int = 0) -> SimulatedNoise:
    with pytest.warns(NotPrivateWarning):
        return SimulatedNoise(seed)


def repeatable_entropy(seed: int):
    """The exact samplers on bytes that a test can draw again."""
    return SecureNoise(entropy=random.Random(seed).randbytes)


# Calibration


def test_sigmas_match_the_reference_grid(reference):
    for (epsilon, delta), analytic, classical in zip(
        reference["sigma_grid"], reference["sigma_analytic"], reference["sigma_classical"], strict=True
    ):
        assert analytic_gaussian_sigma(epsilon, delta) == pytest.approx(analytic, rel=1e-7)
        assert classical_gaussian_sigma(epsilon, delta) == pytest.approx(classical, rel=1e-12)


@given(epsilon=epsilons, delta=deltas, sensitivity=st.floats(1e-3, 1e3))
def test_calibrated_sigma_meets_the_privacy_loss_identity(epsilon, delta, sensitivity):
    sigma = analytic_gaussian_sigma(epsilon, delta, sensitivity)
    a, b = sensitivity / (2 * sigma), epsilon * sigma / sensitivity
    # log of the second term avoids overflow of e^epsilon; scipy's ndtr(-x) = 1 - ndtr(x) would cancel
    second = math.exp(epsilon) * ndtr(-a - b)
    assert ndtr(a - b) - second == pytest.approx(delta, rel=1e-6, abs=1e-13)
    assert gaussian_delta(sigma, epsilon, sensitivity) <= delta * (1 + 1e-6)


@given(epsilon=epsilons, delta=deltas, factor=st.floats(1.01, 3))
def test_less_noise_for_a_larger_budget(epsilon, delta, factor):
    sigma = analytic_gaussian_sigma(epsilon, delta)
    assert analytic_gaussian_sigma(factor * epsilon, delta) < sigma
    assert analytic_gaussian_sigma(epsilon, min(factor * delta, 0.5)) < sigma


@pytest.mark.parametrize(("epsilon", "delta"), [(0.25, 1e-8), (1.0, 1e-6), (4.0, 1e-6)])
def test_agrees_with_dp_accounting(epsilon, delta):
    sigma = analytic_gaussian_sigma(epsilon, delta)
    assert sigma == pytest.approx(dp_accounting.get_sigma_gaussian(epsilon, delta), rel=1e-4)
    accountant = pld.from_gaussian_mechanism(sigma, value_discretization_interval=1e-4)
    assert accountant.get_delta_for_epsilon(epsilon) == pytest.approx(delta, rel=2e-2)


@given(
    epsilon=st.floats(0.05, 20), delta=st.floats(1e-12, 1e-2), p=st.integers(1, 20_000), sensitivity=st.floats(0.1, 1e4)
)
def test_integer_noise_covers_integer_sensitivity(epsilon, delta, p, sensitivity):
    left_epsilon, left_delta = lattice_loss(epsilon, delta, p)
    assert 0.99 * epsilon < left_epsilon <= epsilon
    assert 0.99 * delta < left_delta <= delta
    sigma = analytic_gaussian_sigma(left_epsilon, left_delta, sensitivity)
    lattice = lattice_scale(sigma, sensitivity, p, largest=sensitivity)
    widest = sensitivity / lattice.step + math.sqrt(p)  # after rounding, in grid steps
    assert 2.0**lattice.log2_scale / widest >= sigma / sensitivity * (1 - 1e-9)
    assert lattice.sigma < 1.2 * sigma  # sending integers costs little noise
    assert sensitivity / lattice.step + TAIL * 2.0**lattice.log2_scale < INT32_MAX


def test_discrete_gaussian_hockey_stick_is_within_the_charged_loss():
    # The divergence of the integer noise itself, summed over the lattice for a coarse scale where effects would show.
    scale, shift, epsilon = 64.0, 100.0, 2.0
    z = np.arange(-2000, 2001)
    log_p = -(z**2) / (2 * scale**2)
    log_p -= np.log(np.exp(log_p).sum())
    log_q = -((z - shift) ** 2) / (2 * scale**2)
    log_q -= np.log(np.exp(log_q).sum())
    discrete = np.maximum(np.exp(log_p) - np.exp(epsilon + log_q), 0).sum()
    exponents = 1 / (24 * scale**2) + (scale * 12 + 1) ** 2 / (24 * scale**4)
    assert discrete <= math.exp(1 / (24 * scale**2)) * gaussian_delta(scale, epsilon - exponents, shift)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_impossible_epsilon_is_named(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        analytic_gaussian_sigma(epsilon, 1e-6)
    with pytest.raises(ValueError, match="epsilon"):
        L2BallRandomizer(epsilon, 1.0, 3)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_impossible_delta_is_named(delta):
    with pytest.raises(ValueError, match="delta"):
        analytic_gaussian_sigma(1.0, delta)


def test_absurd_budget_is_refused_rather_than_sent_without_noise():
    with pytest.raises(ValueError, match="does not fit"):
        lattice_scale(1e-9, 1.0, 10, 1.0)


# Samplers


@pytest.mark.parametrize("log2_scale", [0, 1, 3])
def test_exact_sampler_has_the_discrete_gaussian_law(log2_scale):
    n, s = 40_000, 2.0**log2_scale
    draws = repeatable_entropy(log2_scale).gaussian((n,), log2_scale)
    z = np.arange(-int(12 * s) - 12, int(12 * s) + 13)
    law = np.exp(-(z**2) / (2 * s * s))
    law /= law.sum()
    seen = Counter(draws.tolist())
    likely = law * n > 20
    observed = np.array([seen[int(v)] for v in z[likely]])
    expected = law[likely] * n
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < likely.sum() + 5 * math.sqrt(2 * likely.sum())
    assert observed.sum() > 0.99 * n


@pytest.mark.parametrize("noise", [repeatable_entropy(5), None], ids=["exact", "simulated"])
def test_fine_noise_is_normal_at_both_ends_and_in_the_middle(noise):
    noise = noise or seeded(5)
    draws = noise.gaussian((200, 100), MAX_LOG2_SCALE).ravel() / 2.0**MAX_LOG2_SCALE
    assert kstest(draws, "norm").pvalue > 1e-3
    assert np.abs(draws).max() < TAIL


def test_a_draw_that_runs_out_of_words_is_begun_again_from_its_own_words():
    words = np.frombuffer(random.Random(1).randbytes(8 * 40_000), np.uint64)
    whole, parts = np.empty(500, np.int64), np.empty(500, np.int64)
    discrete_gaussian(words, whole, 0, 20)
    done = start = 0
    end = 1
    while done < 500:  # feed one more word at a time
        done, used = discrete_gaussian(words[start:end], parts, done, 20)
        start, end = start + used, end + 1
    np.testing.assert_array_equal(whole, parts)


def test_coins_are_never_more_lopsided_than_asked_for():
    # An entropy source that returns every threshold neighbour shows the exact comparison.
    p = 0.75
    top = int(p * 2**53)
    words = np.array([top - 5, top - 4, top - 1, top], np.uint64) << np.uint64(11)
    noise = SecureNoise(entropy=lambda n: words.tobytes()[:n])
    assert noise.coins(4, p).tolist() == [True, False, False, False]


@pytest.mark.parametrize("log2_scale", [-1, 25, 31])
@pytest.mark.parametrize("noise", [SecureNoise(), seeded()], ids=["secure", "simulated"])
def test_noise_of_a_scale_that_integers_do_not_hold_is_refused(noise, log2_scale):
    with pytest.raises(ValueError, match="log2_scale"):
        noise.gaussian((3,), log2_scale)
    assert np.abs(noise.gaussian((50,), 24)).max() > 2**20


def test_secure_noise_reads_the_system_generator(monkeypatch):
    import os

    first, second = (SecureNoise().gaussian((50,), 20) for _ in range(2))
    assert (first != second).any()
    assert SecureNoise()._entropy is os.urandom


def test_a_seed_repeats_the_noise_and_warns():
    np.testing.assert_array_equal(seeded(3).gaussian((9,), 20), seeded(3).gaussian((9,), 20))


# Gaussian release


def test_gaussian_release_is_unbiased_with_the_stated_noise():
    release = GaussianRelease(dimension=4, sensitivity=2.0, norm_bound=1.0, sigma=3.0)
    v = np.array([0.5, -0.5, 0.1, 0.0])
    sent = release.randomise(np.tile(v, (50_000, 1)), seeded(1)) * release.step
    standard_error = release.noise_scale / math.sqrt(50_000)
    assert np.abs(sent.mean(0) - v).max() < 5 * standard_error
    assert sent.std(0) == pytest.approx(release.noise_scale, rel=0.02)
    assert release.noise_scale >= 3.0


def test_gaussian_release_sends_only_grid_points_whatever_the_record():
    release = GaussianRelease(dimension=2, sensitivity=2.0, norm_bound=1.0, sigma=1.0)
    sent = release.randomise(np.array([[0.1, 1 / 3]]), SecureNoise())
    assert sent.dtype == np.int32
    assert np.abs(sent).max() <= release.limit


@pytest.mark.parametrize(
    "release", [GaussianRelease(3, 2.0, 1.0, 1.0), L2BallRandomizer(1.0, 1.0, 3)], ids=["gaussian", "ball"]
)
def test_a_vector_beyond_the_bound_is_never_sent(release):
    with pytest.raises(BoundExceeded, match=r"1\.1"):
        release.randomise(np.array([[1.1, 0.0, 0.0]]), SecureNoise())
    with pytest.raises(BoundExceeded):
        release.randomise(np.array([[np.nan, 0.0, 0.0]]), SecureNoise())


# l2-ball randomiser


def test_randomiser_with_fixed_coins_matches_the_reference(reference):
    g = reference
    v, radius, epsilon = g["rand_V"], float(g["rand_radius"]), float(g["rand_eps"])
    randomizer = L2BallRandomizer(epsilon, radius, v.shape[1])
    assert randomizer.magnitude == pytest.approx(float(g["rand_B"]), rel=1e-12)
    norms = np.linalg.norm(v, axis=1)
    towards = g["rand_u_sign"] < 0.5 + norms / (2 * radius)
    truthful = g["rand_u_flip"] < math.exp(epsilon) / (1 + math.exp(epsilon))
    w = g["rand_gauss"] / np.linalg.norm(g["rand_gauss"], axis=1, keepdims=True)
    out = randomizer.magnitude * randomizer.orient(v, norms, towards, truthful, w)
    np.testing.assert_allclose(out, g["rand_out"], rtol=1e-12)


@pytest.mark.parametrize(("d", "ratio"), [(1, 1.0), (2, math.pi / 2), (3, 2.0), (10, 3.86563), (100, 12.50185)])
def test_magnitude_has_the_surface_ratio(d, ratio):
    assert L2BallRandomizer(1.0, 1.0, d).magnitude * math.tanh(0.5) == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize("noise", [repeatable_entropy(2), None], ids=["exact", "simulated"])
@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_randomiser_is_unbiased_and_on_the_sphere(scale, noise):
    n, d = 60_000, 5
    randomizer = L2BallRandomizer(1.5, 2.0, d)
    v = scale * 2.0 * np.ones(d) / math.sqrt(d)
    sent = randomizer.randomise(np.tile(v, (n, 1)), noise or seeded(2))
    assert randomizer.on_sphere(sent).all()
    out = sent * randomizer.step
    assert np.linalg.norm(out, axis=1) == pytest.approx(randomizer.magnitude, rel=1e-8)
    assert np.abs(out.mean(0) - v).max() < 4.5 * randomizer.magnitude / math.sqrt(d * n)


def test_in_one_dimension_it_is_randomised_response():
    n, epsilon = 100_000, 1.0
    randomizer = L2BallRandomizer(epsilon, 1.0, 1)
    sent = randomizer.randomise(np.ones((n, 1)), seeded(4))[:, 0]
    assert set(np.unique(sent)) == {-randomizer.UNIT, randomizer.UNIT}
    share = float((sent > 0).mean())
    assert share == pytest.approx(math.exp(epsilon) / (1 + math.exp(epsilon)), abs=0.006)


@given(epsilon=st.floats(0.1, 5), v=st.lists(st.floats(-1, 1), min_size=3, max_size=3), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_likelihood_ratio_of_every_message_is_at_most_e_to_the_epsilon(epsilon, v, seed):
    """For a given direction the record decides between w and -w only, by a coin of odds at most e^epsilon."""
    rng = np.random.default_rng(seed)
    v = np.array([v]) / 2
    w = rng.standard_normal((1, 3))
    w /= np.linalg.norm(w)
    randomizer = L2BallRandomizer(epsilon, 1.0, 3)
    norms = np.linalg.norm(v, axis=1)
    p = math.exp(epsilon) / (1 + math.exp(epsilon))
    chance = 0.0  # of sending +w given that the direction drawn is w or -w
    for drawn in (w, -w):
        for towards, a in ((True, 0.5 + norms[0] / 2), (False, 0.5 - norms[0] / 2)):
            for truthful, b in ((True, p), (False, 1 - p)):
                out = randomizer.orient(v, norms, np.array([towards]), np.array([truthful]), drawn)
                chance += 0.5 * a * b * bool((out == w).all())
    assert 1 - p - 1e-12 <= chance <= p + 1e-12


@pytest.mark.parametrize("kind", ["gaussian", "ball"])
def test_best_threshold_attack_proves_no_more_than_epsilon(kind):
    """Two opposite records at the bound, 1e5 messages each: Clopper-Pearson bound on the privacy loss."""
    n, d, epsilon, delta = 100_000, 4, 1.0, 1e-3
    if kind == "ball":
        release, delta = L2BallRandomizer(epsilon, 1.0, d), 0.0
    else:
        release = GaussianRelease(d, 2.0, 1.0, analytic_gaussian_sigma(epsilon, delta, 2.0))
    v = np.eye(1, d).repeat(n, axis=0)
    noise = seeded(7)
    plus, minus = (release.randomise(sign * v, noise)[:, 0] for sign in (1.0, -1.0))
    thresholds = np.quantile(plus, [0.3, 0.5, 0.7, 0.9, 0.97])
    proved = -math.inf
    for t in np.append(thresholds, 0.0):
        hits, false_alarms = int((plus > t).sum()), int((minus > t).sum())
        low = beta.ppf(0.005, hits, n - hits + 1)
        high = beta.ppf(0.995, false_alarms + 1, n - false_alarms)
        proved = max(proved, math.log(max(low - delta, 1e-12) / high))
    assert proved <= epsilon
    assert proved > 0.5 * epsilon  # the attack is not a straw man
