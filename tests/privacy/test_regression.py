"""NLDP-LR, its public-feature variant and LDP-IHT of arXiv 2310.07367: reference vectors, wire, refusals."""

import itertools
import json
import math
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from locally.privacy.regression import (
    BadRequest,
    Beyond,
    BudgetSpent,
    Calibration,
    Client,
    Crowd,
    GradientProtocol,
    IndefiniteCovariance,
    MomentProtocol,
    MomentServer,
    NotPrivateWarning,
    OutOfBounds,
    Protocol,
    PublicFeatureProtocol,
    Rejection,
    SecureNoise,
    SimulatedNoise,
    Status,
    Tally,
    ThresholdingServer,
    hard_threshold,
    soft_threshold,
    solve_sparse,
)
from locally.privacy.regression.protocols import symmetric
from locally.privacy.regression.reports import decode_request, encode_request
from locally.privacy.regression.theory import users_for_definite_covariance
from locally.privacy.regression.thresholding import noise_threshold, project_on_ball

D = 3
MOMENTS = MomentProtocol(n_features=D, epsilon=2.0, radius=2.0, clip_x=1.5, clip_y=1.5)
PUBLIC = PublicFeatureProtocol(n_features=D, epsilon=2.0, clip_x=1.5, clip_y=1.5)
PURE = PublicFeatureProtocol(
    n_features=D, epsilon=2.0, delta=None, calibration=Calibration.PURE, clip_x=1.5, clip_y=1.5
)
PURE_MOMENTS = MomentProtocol(
    n_features=D, epsilon=2.0, delta=None, calibration=Calibration.PURE, radius=2.0, clip_x=1.5, clip_y=1.5
)
GRADIENTS = GradientProtocol(n_features=D, epsilon=2.0, sparsity=2, n_rounds=3, clip_x=1.5, clip_y=1.5)
ONE_SHOT = [MOMENTS, PUBLIC, PURE, PURE_MOMENTS]
EVERY = [*ONE_SHOT, GRADIENTS]
records = st.tuples(arrays(np.float64, D, elements=st.floats(-1e6, 1e6)), st.floats(-1e6, 1e6))


class NoNoise:
    """What remains when the randomisers are switched off: the protocols' arithmetic."""

    def gaussian(self, shape, log2_scale):
        return np.zeros(shape, np.int64)

    def coins(self, n, probability):
        return np.ones(n, np.bool_)

    def directions(self, n, dimension):
        return np.eye(1, dimension).repeat(n, axis=0)


@pytest.fixture
def reference(golden):
    return np.load(golden / "06-ldp-sparse-regression" / "ldp_golden.npz", allow_pickle=False)


@pytest.fixture
def noise():
    with pytest.warns(NotPrivateWarning):
        return SimulatedNoise(0)


def table(n: int, seed: int = 0, d: int = D):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, X @ np.eye(d)[0] + 0.1 * rng.standard_normal(n)


def request_for(protocol):
    return ThresholdingServer(protocol).request() if isinstance(protocol, GradientProtocol) else None


# Reference vectors


def test_moments_and_solution_match_the_reference(reference):
    g = reference
    r, tau1, tau2 = (float(g[name]) for name in ("r", "tau1", "tau2"))
    protocol = MomentProtocol(n_features=6, epsilon=1.0, radius=r, clip_x=tau1, clip_y=tau2)
    triangle, cross = protocol.vectors(g["X"], g["y"]).parts
    covariance = symmetric(triangle.mean(0), 6) + g["agg_noise_cov"]
    cross = cross.mean(0) + g["agg_noise_cross"]
    np.testing.assert_allclose(covariance, g["cov"], rtol=1e-12)
    np.testing.assert_allclose(cross, g["cross"], rtol=1e-12)
    found = solve_sparse(covariance, cross, float(g["lam"]))
    np.testing.assert_allclose(found.raw, g["theta_raw"], rtol=1e-10)
    np.testing.assert_allclose(found.coef, g["theta"], atol=1e-12)


def test_public_features_match_the_reference(reference):
    g = reference
    protocol = PublicFeatureProtocol(n_features=6, epsilon=1.0, clip_x=float(g["tau1"]), clip_y=float(g["tau2"]))
    server = MomentServer(protocol, g["X_public"], threshold=float(g["lam"]))
    np.testing.assert_allclose(server.solve([g["cross"]], 400).coef, g["theta_public"], atol=1e-12)


def test_iterates_without_noise_match_the_reference(reference):
    g = reference
    protocol = GradientProtocol(
        n_features=6,
        epsilon=1.0,
        sparsity=int(g["iht_k"]),
        n_rounds=int(g["iht_T"]),
        clip_x=float(g["tau1"]),
        clip_y=float(g["tau2"]),
    )
    assert protocol.gradient_bound == pytest.approx(float(g["iht_grad_bound"]), rel=1e-12)
    server = ThresholdingServer(protocol, step=float(g["iht_eta"]))
    for t, expected in enumerate(g["iht_noiseless_path"]):
        group = slice(80 * t, 80 * t + 80)
        (gradients,) = protocol.vectors(g["X"][group], g["y"][group], server.theta).parts
        np.testing.assert_allclose(server.close_round(gradients.mean(0), 80), expected, atol=1e-14)


def test_paper_constants_are_the_classical_calibration():
    epsilon, delta, r, tau1, tau2, d = 0.8, 1e-6, 2.0, 1.5, 1.2, 4
    protocol = MomentProtocol(
        n_features=d,
        epsilon=epsilon,
        delta=delta,
        radius=r,
        clip_x=tau1,
        clip_y=tau2,
        calibration=Calibration.CLASSICAL,
    )
    covariance, cross = protocol.releases
    log_term = math.log(2.5 / delta)
    assert covariance.sigma**2 == pytest.approx(32 * r**4 * log_term / epsilon**2, rel=1e-5)
    assert cross.sigma**2 == pytest.approx(32 * d * (tau1 * tau2) ** 2 * log_term / epsilon**2, rel=1e-5)


@pytest.mark.parametrize("calibration", [Calibration.JOINT, Calibration.ANALYTIC, Calibration.CLASSICAL])
def test_both_releases_together_spend_no_more_than_the_budget(calibration):
    """Exact privacy loss of the pair of Gaussians: one Gaussian with mu^2 = sum (D_j / s_j)^2, true sensitivities."""
    from locally.privacy.regression import gaussian_delta

    protocol = MomentProtocol(
        n_features=5, epsilon=1.0, delta=1e-6, radius=2.0, clip_x=1.5, clip_y=1.5, calibration=calibration
    )
    true_sensitivities = (math.sqrt(2) * protocol.radius**2, 2 * protocol.cross_bound)
    pairs = zip(protocol.releases, true_sensitivities, strict=True)
    mu = math.sqrt(sum((bound / release.noise_scale) ** 2 for release, bound in pairs))
    assert gaussian_delta(1 / mu, protocol.epsilon) <= protocol.delta * (1 + 1e-9)


# Bounds that privacy rests on


@given(record=records)
def test_moments_of_any_record_stay_within_their_bounds(record):
    X, y = record[0][None], np.array([record[1]])
    triangle, cross = MOMENTS.vectors(X, y).parts
    assert np.linalg.norm(symmetric(triangle[0], D)) <= MOMENTS.radius**2 * (1 + 1e-9)
    assert np.linalg.norm(cross) <= math.sqrt(D) * MOMENTS.clip_x * MOMENTS.clip_y * (1 + 1e-9)


@given(a=records, b=records)
def test_two_records_differ_by_no_more_than_the_sensitivity(a, b):
    X, y = np.stack([a[0], b[0]]), np.array([a[1], b[1]])
    for release, part in zip(MOMENTS.releases, MOMENTS.vectors(X, y).parts, strict=True):
        assert np.linalg.norm(part[0] - part[1]) <= release.sensitivity * (1 + 1e-9)


@given(record=records, theta=arrays(np.float64, D, elements=st.floats(-1, 1)))
def test_gradient_of_any_record_at_any_admissible_iterate_stays_within_its_bound(record, theta):
    theta = project_on_ball(hard_threshold(theta, GRADIENTS.sparsity), GRADIENTS.theta_bound)
    (gradient,) = GRADIENTS.vectors(record[0][None], np.array([record[1]]), theta).parts
    assert np.linalg.norm(gradient) <= GRADIENTS.gradient_bound * (1 + 1e-9)


def test_sensitivity_of_the_second_moments_is_attained_by_orthogonal_records():
    X = np.eye(D)[:2] * MOMENTS.radius
    triangle, _ = MOMENTS.vectors(X, np.zeros(2)).parts
    assert np.linalg.norm(triangle[0] - triangle[1]) == pytest.approx(MOMENTS.releases[0].sensitivity)


# Client


@pytest.mark.parametrize("protocol", EVERY)
def test_a_device_reports_once_and_accounts_for_it(protocol):
    device = Client(protocol)
    request = request_for(protocol)
    assert device.spent.epsilon == 0
    device.report(np.array([0.1, 5.0, 0.0]), 0.3, request)
    assert (device.spent.epsilon, device.spent.delta) == (protocol.budget.epsilon, protocol.budget.delta)
    assert device.clipped == 1
    with pytest.raises(BudgetSpent, match="1 report"):
        device.report(np.zeros(D), 0.0, request)
    assert device.reports_sent == 1


def test_a_device_allowed_two_reports_spends_twice():
    device = Client(PUBLIC, reports_allowed=2)
    for _ in range(2):
        device.report(np.zeros(D), 0.0)
    assert device.spent.epsilon == 2 * PUBLIC.epsilon
    assert device.spent.delta == 2 * PUBLIC.delta


@pytest.mark.parametrize("protocol", EVERY)
def test_two_reports_of_one_record_differ(protocol):
    x, request = np.array([0.1, 0.2, 0.3]), request_for(protocol)
    assert Client(protocol).report(x, 1.0, request) != Client(protocol).report(x, 1.0, request)


def test_clients_use_cryptographic_noise_unless_told_otherwise():
    assert isinstance(Client(PUBLIC).noise, SecureNoise)
    assert isinstance(Crowd(PUBLIC).noise, SecureNoise)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_record_that_is_not_finite_is_refused_before_anything_is_spent(bad):
    device = Client(PUBLIC)
    with pytest.raises(ValueError, match="X holds NaN"):
        device.report(np.array([bad, 0.0, 0.0]), 0.0)
    with pytest.raises(ValueError, match="y holds NaN"):
        device.report(np.zeros(D), float(bad))
    assert device.reports_sent == 0


def test_a_record_beyond_the_bounds_is_refused_where_so_declared():
    strict = MomentProtocol(n_features=D, epsilon=2.0, radius=2.0, clip_x=1.5, clip_y=1.5, beyond=Beyond.REFUSE)
    with pytest.raises(OutOfBounds, match=r"\|x_j\| <= 1.5"):
        Client(strict).report(np.array([1.6, 0.0, 0.0]), 0.0)
    with pytest.raises(OutOfBounds, match=r"\|\|x\|\|_2 <= 2"):
        Client(strict).report(np.array([1.4, 1.4, 1.4]), 0.0)
    Client(strict).report(np.array([1.0, 1.0, 1.0]), 1.5)


def test_wrong_width_is_named(without_shape_checks):
    with pytest.raises(ValueError, match="X must have shape"):
        Client(PUBLIC).report(np.zeros(D + 1), 0.0)


def test_an_interactive_client_needs_a_request_and_the_others_refuse_one():
    with pytest.raises(ValueError, match="request must be the server's"):
        Client(GRADIENTS).report(np.zeros(D), 0.0)
    with pytest.raises(ValueError, match="not interactive"):
        Client(PUBLIC).report(np.zeros(D), 0.0, request_for(GRADIENTS))


@pytest.mark.parametrize(
    ("theta", "why"),
    [
        ([1.0, 1.0, 0.0], "l2 norm"),
        ([0.1, 0.1, 0.1], "nonzero"),
        ([np.nan, 0.0, 0.0], "NaN"),
        ([1e300, 0.0, 0.0], "norm"),
    ],
)
def test_a_request_that_would_void_the_bound_gets_no_answer(theta, why):
    device = Client(GRADIENTS)
    with pytest.raises(BadRequest, match=why):
        device.report(np.zeros(D), 0.0, encode_request(GRADIENTS, 0, np.array(theta, dtype=np.float64)))
    assert device.reports_sent == 0


def test_requests_survive_the_wire_and_damage_is_noticed():
    theta = np.array([0.6, 0.0, -0.8])
    request = encode_request(GRADIENTS, 2, theta)
    round_number, read = decode_request(GRADIENTS, request)
    assert round_number == 2
    np.testing.assert_array_equal(read, theta)
    other = GradientProtocol(n_features=D, epsilon=9.0, sparsity=2, n_rounds=3, clip_x=1.5, clip_y=1.5)
    for damaged in (request[:-1], request[:30] + b"\x00" + request[31:], b"", encode_request(other, 2, theta)):
        with pytest.raises(BadRequest):
            decode_request(GRADIENTS, damaged)
    with pytest.raises(BadRequest, match="round 3"):
        decode_request(GRADIENTS, encode_request(GRADIENTS, 3, theta))


# Wire and tally


def reports_of(protocol, n, noise):
    X, y = table(n)
    return list(Crowd(protocol, noise).reports(X, y, request_for(protocol)))


@pytest.mark.parametrize("protocol", EVERY)
def test_honest_reports_are_all_accepted(protocol, noise):
    tally = Tally(protocol)
    tally.extend(reports_of(protocol, 500, noise))
    assert (tally.accepted, sum(tally.rejected.values())) == (500, 0)


@pytest.mark.parametrize("protocol", EVERY)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=30)
def test_one_flipped_bit_anywhere_is_noticed(protocol, where, bit):
    report = Client(protocol).report(np.zeros(D), 0.0, request_for(protocol))
    at = int(where * len(report))
    damaged = report[:at] + bytes([report[at] ^ (1 << bit)]) + report[at + 1 :]
    tally = Tally(protocol)
    assert tally.add(damaged) is not None
    assert tally.accepted == 0
    assert not tally.total.any()


@given(junk=st.binary(max_size=200))
def test_junk_is_rejected_and_counted(junk):
    tally = Tally(PUBLIC)
    assert tally.add(junk) in (Rejection.LENGTH, Rejection.MAGIC)
    assert sum(tally.rejected.values()) == 1


def resealed(report: bytes, at: int, new: bytes) -> bytes:
    body = (report[:at] + new + report[at + len(new) :])[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda r: None, Rejection.NOT_BYTES),
        (lambda r: r[:10], Rejection.LENGTH),
        (lambda r: r[:-1], Rejection.LENGTH),
        (lambda r: r + b"\x00", Rejection.LENGTH),
        (lambda r: b"XXXX" + r[4:], Rejection.MAGIC),
        (lambda r: resealed(r, 4, b"\x02"), Rejection.VERSION),
        (lambda r: resealed(r, 5, b"\x03"), Rejection.PROTOCOL),
        (lambda r: resealed(r, 12, bytes(8)), Rejection.PROTOCOL),
        (lambda r: resealed(r, 6, b"\x01"), Rejection.ROUND),
        (lambda r: r[:-1] + bytes([r[-1] ^ 1]), Rejection.CHECKSUM),
        (lambda r: resealed(r, 24, b"\xff\xff\xff\x7f"), Rejection.RANGE),
        (lambda r: resealed(r, 24, b"\x00\x00\x00\x80"), Rejection.RANGE),
    ],
)
@pytest.mark.parametrize("protocol", [MOMENTS, PUBLIC, PURE])
def test_every_kind_of_bad_report_is_rejected_for_its_reason_and_never_averaged(protocol, damage, reason, noise):
    good = reports_of(protocol, 20, noise)
    tally, honest = Tally(protocol), Tally(protocol)
    tally.extend(iter([*good[:10], damage(good[0]), *good[10:]]))
    honest.extend(good)
    assert tally.rejected == {reason: 1}
    assert tally.accepted == 20
    np.testing.assert_array_equal(tally.total, honest.total)


def test_a_message_off_the_sphere_is_out_of_range(noise):
    tally = Tally(PURE)
    tally.add_payloads(np.full((1, D), 2**29, np.int32))  # every entry within its limit, the norm is not
    assert tally.rejected == {Rejection.RANGE: 1}


def test_a_report_of_an_earlier_round_is_rejected(noise):
    server = ThresholdingServer(GRADIENTS)
    old = Client(GRADIENTS, noise).report(np.zeros(D), 0.0, server.request())
    server.close_round()
    assert server.receive(old) is Rejection.ROUND


@given(cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_sums_do_not_depend_on_order_or_grouping(cuts, seed):
    with pytest.warns(NotPrivateWarning):
        reports = reports_of(MOMENTS, 60, SimulatedNoise(1))
    whole = Tally(MOMENTS)
    whole.extend(reports)
    np.random.default_rng(seed).shuffle(reports)
    merged, edges = Tally(MOMENTS), [0, *sorted(cuts), 60]
    for start, stop in itertools.pairwise(edges):
        part = Tally(MOMENTS)
        part.extend(reports[start:stop])
        merged.merge(part)
    np.testing.assert_array_equal(whole.total, merged.total)
    assert whole.accepted == merged.accepted


def test_tallies_of_different_protocols_do_not_merge():
    with pytest.raises(ValueError, match="same protocol"):
        Tally(PUBLIC).merge(Tally(PURE))


def test_server_memory_does_not_grow_with_the_number_of_reports(noise, monkeypatch):
    monkeypatch.setattr("locally.privacy.regression.reports.CHUNK_BYTES", 1 << 14)
    pool = reports_of(MOMENTS, 200, noise)

    def peak(n: int) -> int:
        server = MomentServer(MOMENTS, on_indefinite="clip")
        tracemalloc.start()
        server.fit(pool[i % 200] for i in range(n))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(100)
    assert peak(20_000) < 1.2 * peak(2_000)


@pytest.mark.parametrize("protocol", EVERY)
def test_protocols_travel_as_json(protocol):
    again = Protocol.from_json(protocol.to_json())
    assert again == protocol
    assert again.fingerprint == protocol.fingerprint


def test_json_that_is_no_protocol_is_refused():
    fields = json.loads(PUBLIC.to_json())
    for text in ("[]", "{}", "x", json.dumps(fields | {"extra": 1}), json.dumps(fields | {"epsilon": -1})):
        with pytest.raises(ValueError):
            Protocol.from_json(text)


def test_any_change_of_the_protocol_changes_its_fingerprint():
    fields = json.loads(MOMENTS.to_json())
    for name, value in {"epsilon": 2.5, "radius": 3.0, "clip_x": 1.0, "calibration": "analytic", "delta": 1e-7}.items():
        assert Protocol.from_json(json.dumps(fields | {name: value})).fingerprint != MOMENTS.fingerprint


# Protocol parameters


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"delta": None}, "delta"),
        ({"clip_x": 0.0}, "clip_x"),
        ({"clip_y": math.nan}, "clip_y"),
        ({"radius": -1.0}, "radius"),
        ({"n_features": 0}, "n_features"),
        ({"calibration": Calibration.PURE}, "delta must be None"),
    ],
)
def test_impossible_protocols_are_named(change, named):
    fields = {"n_features": D, "epsilon": 1.0, "radius": 2.0, "clip_x": 1.0, "clip_y": 1.0} | change
    with pytest.raises(ValueError, match=named):
        MomentProtocol(**fields)


def test_sparsity_beyond_the_dimension_is_refused():
    with pytest.raises(ValueError, match="sparsity must be at most"):
        GradientProtocol(n_features=2, epsilon=1.0, sparsity=3, n_rounds=2, clip_x=1.0, clip_y=1.0)


def test_more_rounds_than_a_report_can_name_are_refused():
    options = {"n_features": 2, "epsilon": 1.0, "sparsity": 1, "clip_x": 1.0, "clip_y": 1.0}
    last = encode_request(GradientProtocol(n_rounds=2**16, **options), 2**16 - 1, np.zeros(2))
    assert decode_request(GradientProtocol(n_rounds=2**16, **options), last)[0] == 2**16 - 1
    with pytest.raises(ValueError, match="n_rounds must be at most"):
        GradientProtocol(n_rounds=2**16 + 1, **options)


def test_automatic_bounds_are_those_of_the_paper():
    n, d = 10_000, 7
    moments = MomentProtocol.for_users(n, d, 1.0)
    assert moments.radius == pytest.approx(math.sqrt(d * math.log(n)))
    assert moments.clip_x == moments.clip_y == pytest.approx(math.sqrt(math.log(n)))
    assert GradientProtocol.for_users(n, d, 1.0, 2).n_rounds == math.ceil(math.log(n))
    assert PublicFeatureProtocol.for_users(n, d, 1.0, clip_x=1.0).clip_x == 1.0


# Servers


def test_without_noise_the_server_returns_least_squares():
    X, y = table(300)
    wide = MomentProtocol(n_features=D, epsilon=2.0, radius=50.0, clip_x=50.0, clip_y=50.0)
    server = MomentServer(wide, threshold=0.0)
    found = server.fit(Crowd(wide, NoNoise()).reports(X, y))
    expected = np.linalg.lstsq(X, y)[0]
    np.testing.assert_allclose(found.coef, expected, atol=3e-4)  # what is left is the grid
    soft = MomentServer(wide, threshold=0.2)
    soft.merge(server)
    np.testing.assert_allclose(soft.result().coef, soft_threshold(expected, 0.2), atol=3e-4)
    assert found.status is Status.SOLVED
    assert found.budget == wide.budget


@pytest.mark.parametrize("protocol", [PUBLIC, PURE], ids=["gaussian", "pure"])
def test_enough_users_with_public_features_are_learnt_from(protocol, noise):
    X, y = table(100_000, seed=1)
    server = MomentServer(protocol, X[:500], threshold_constant=2.0)
    found = server.fit(Crowd(protocol, noise).reports(X, y))
    assert found.support.tolist() == [0]
    assert abs(found.raw - np.eye(D)[0]).max() < 0.3  # clipping at 1.5 costs some of the slope
    assert found.accepted == 100_000


def test_noise_of_the_estimate_is_as_reported(noise):
    X, y = table(4_000)
    server = MomentServer(PUBLIC, math.sqrt(D) * np.eye(D), threshold=0.0)
    draws = []
    for _ in range(60):
        fresh = MomentServer(PUBLIC, math.sqrt(D) * np.eye(D), threshold=0.0)
        for payload in Crowd(PUBLIC, noise).payloads(X, y):
            fresh.tally.add_payloads(payload)
        draws.append(fresh.result().coef)
    server.tally.merge(fresh.tally)
    assert np.std(draws, axis=0).mean() == pytest.approx(server.result().noise, rel=0.15)


def test_interactive_protocol_asks_every_user_once_and_learns():
    n, d = 60_000, 5
    X, y = table(n, seed=2, d=d)
    protocol = GradientProtocol(n_features=d, epsilon=4.0, sparsity=1, n_rounds=6, clip_x=2.0, clip_y=2.0)
    asked = np.zeros(n, int)
    seen = []

    with pytest.warns(NotPrivateWarning):
        crowd = Crowd(protocol, SimulatedNoise(0))

    def ask(request):
        t, _ = decode_request(protocol, request)
        group = slice(t * 10_000, (t + 1) * 10_000)
        asked[group] += 1
        return crowd.reports(X[group], y[group], request)

    server = ThresholdingServer(protocol)
    found = server.fit(ask, callback=lambda t, theta: seen.append(t))
    assert (asked == 1).all()
    assert seen == [1, 2, 3, 4, 5, 6]
    assert found.accepted == n
    assert found.status is Status.SOLVED
    assert found.path.shape == (6, d)
    assert found.support.tolist() == [0]
    assert np.linalg.norm(found.coef) <= 1 + 1e-12
    with pytest.raises(RuntimeError, match="rounds are over"):
        server.request()


def test_a_round_without_reports_keeps_the_iterate_and_says_so():
    start = np.array([0.5, 0.0, 0.0])
    server = ThresholdingServer(GRADIENTS, start=start)
    found = server.fit(lambda request: [b"nonsense"])
    assert found.status is Status.TOO_FEW_REPORTS
    np.testing.assert_array_equal(found.coef, start)
    assert found.rejected == {Rejection.LENGTH: 3}


def test_too_few_reports_give_no_estimate(noise):
    found = MomentServer(MOMENTS).fit(reports_of(MOMENTS, D - 1, noise))
    assert found.status is Status.TOO_FEW_REPORTS
    assert not found.coef.any()
    assert found.noise == math.inf
    assert MomentServer(PUBLIC, np.eye(D)).fit([]).status is Status.TOO_FEW_REPORTS


def test_an_indefinite_covariance_is_never_passed_over_in_silence(noise):
    reports = reports_of(MOMENTS, 50, noise)  # far fewer than the users needed
    with pytest.warns(IndefiniteCovariance, match="too few users"):
        found = MomentServer(MOMENTS).fit(reports)
    assert found.status is Status.INDEFINITE
    assert found.min_eigenvalue < 0
    assert found.users_needed > 50
    with pytest.raises(ValueError, match="too few users"):
        MomentServer(MOMENTS, on_indefinite="raise").fit(reports)
    clipped = MomentServer(MOMENTS, on_indefinite="clip", floor=0.5, threshold=0.0).fit(reports)
    assert clipped.status is Status.FLOORED
    triangle, cross = means_of(reports)
    eigenvalues, vectors = np.linalg.eigh(symmetric(triangle, D))
    expected = vectors @ ((vectors.T @ cross) / np.maximum(eigenvalues, 0.5))
    np.testing.assert_allclose(clipped.raw, expected, rtol=1e-9)


def means_of(reports):
    tally = Tally(MOMENTS)
    tally.extend(reports)
    return tally.means()


@pytest.mark.parametrize(
    ("public_X", "message"),
    [
        (None, "must hold public feature vectors"),
        (np.ones((2, D)), "full column rank"),
        (np.full((5, D), np.nan), "NaN"),
        (np.ones((5, D + 1)), "must have shape"),
    ],
)
def test_unusable_public_features_are_refused(public_X, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        MomentServer(PUBLIC, public_X)


def test_public_features_are_refused_where_users_send_moments():
    with pytest.raises(ValueError, match="public_X must be None"):
        MomentServer(MOMENTS, np.eye(D))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threshold": -1.0}, "threshold"),
        ({"threshold": "best"}, "threshold"),
        ({"on_indefinite": "hope"}, "on_indefinite"),
        ({"floor": 0.0}, "floor"),
        ({"theta_bound": 0.0}, "theta_bound"),
        ({"inverse_bound": "public"}, "inverse_bound"),
        ({"threshold_constant": math.nan}, "threshold_constant"),
    ],
)
def test_impossible_server_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        MomentServer(MOMENTS, **options)


def test_inverse_bound_can_come_from_public_features():
    X = np.random.default_rng(0).standard_normal((200, D)) * [1.0, 2.0, 0.5]
    server = MomentServer(PUBLIC, X, inverse_bound="public")
    expected = np.linalg.norm(np.linalg.inv(X.T @ X / 200), np.inf)
    assert server.soft_level(100) == pytest.approx(expected * MomentServer(PUBLIC, X).soft_level(100))


# Post-processing


@given(v=arrays(np.float64, 6, elements=st.floats(-10, 10)), level=st.floats(0, 5))
def test_soft_threshold_is_the_smallest_l1_norm_in_the_box(v, level):
    found = soft_threshold(v, level)
    assert np.abs(found - v).max() <= level + 1e-12
    assert np.abs(found).sum() == pytest.approx(np.maximum(np.abs(v) - level, 0).sum())


@given(v=arrays(np.float64, 6, elements=st.floats(-10, 10)), keep=st.integers(1, 6))
def test_hard_threshold_is_the_nearest_sparse_vector(v, keep):
    found = hard_threshold(v, keep)
    assert np.count_nonzero(found) <= keep
    assert np.sum((found - v) ** 2) == pytest.approx(np.sort(v**2)[: 6 - keep].sum(), abs=1e-9)


def test_singular_covariance_gets_the_least_norm_solution():
    with pytest.warns(IndefiniteCovariance):
        found = solve_sparse(np.ones((2, 2)), np.array([1.0, 1.0]), 0.0)
    assert found.status is Status.SINGULAR
    np.testing.assert_allclose(found.coef, [0.5, 0.5])


@pytest.mark.filterwarnings("ignore::locally.privacy.regression.IndefiniteCovariance")
@pytest.mark.parametrize(
    ("eigenvalues", "option", "floor", "status"),
    [
        ([2, 1, 1], "warn", 0.1, Status.SOLVED),
        ([1, 0, 1], "warn", 0.1, Status.SINGULAR),
        ([1, -1e-17, 1], "warn", 0.1, Status.SINGULAR),
        ([0, 0, 0], "warn", 0.1, Status.SINGULAR),
        ([1, 1, -1], "warn", 0.1, Status.INDEFINITE),
        ([1, 0, -1], "warn", 0.1, Status.INDEFINITE),
        ([1, 0, -1e-3], "warn", 0.1, Status.INDEFINITE),
        ([2, 1, 1], "clip", 0.1, Status.SOLVED),
        ([1, 0, 1], "clip", 0.1, Status.FLOORED),
        ([1, 0, -1], "clip", 0.1, Status.FLOORED),
        ([1, 0, -1], "clip", 1e-20, Status.FLOORED),  # the floor itself is lost in rounding
        ([1, 1e-18, 1], "clip", 1e-20, Status.SINGULAR),
        ([2, 1, 1], "raise", 0.1, Status.SOLVED),
    ],
)
def test_the_worst_that_is_true_of_a_covariance_is_its_status(eigenvalues, option, floor, status):
    found = solve_sparse(np.diag(np.array(eigenvalues, float)), np.ones(3), 0.0, on_indefinite=option, floor=floor)
    assert found.status is status
    assert found.min_eigenvalue == pytest.approx(min(eigenvalues))


def test_the_automatic_threshold_covers_the_noise_of_null_coordinates():
    rng = np.random.default_rng(0)
    d, n, s1, s2 = 50, 10_000, 3.0, 4.0
    level = noise_threshold(s1, s2, n, d)
    worst = [np.abs(math.hypot(s1, s2) / math.sqrt(n) * rng.standard_normal(d)).max() for _ in range(400)]
    assert np.mean(np.array(worst) < level) > 0.75
    assert level < 1.5 * np.mean(worst)


def test_users_needed_make_the_noisy_covariance_definite():
    rng = np.random.default_rng(0)
    d, s = 30, 20.0
    n = users_for_definite_covariance(s, d)
    for _ in range(20):
        noise = np.triu(rng.standard_normal((d, d)))
        noise = noise + np.triu(noise, 1).T
        assert np.linalg.eigvalsh(np.eye(d) + s / math.sqrt(n) * noise)[0] > 0.3
        assert np.linalg.eigvalsh(np.eye(d) + s / math.sqrt(n / 16) * noise)[0] < 0
