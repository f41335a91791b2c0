"""Random-matrix formulas on matrices that are drawn, golden vectors, the noise of a network, and what a report says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from locally.linalg.curvature import Hessian
from locally.linalg.lanczos import Status, spectral_measure
from locally.optimize.batch_curvature import (
    BatchCurvature,
    BatchNoise,
    CurvatureReport,
    Noise,
    Regime,
    effective_batch_size,
    largest_learning_rate,
    marchenko_pastur_density,
    optimal_heavy_ball,
    sampling_noise,
    scale_damping,
    scale_learning_rate,
    semicircle_density,
    spiked_covariance,
    spiked_wigner,
)

CROSS_ENTROPY = nn.functional.cross_entropy


@pytest.fixture(scope="module")
def tinynet(request):
    path = request.path.parents[1] / "golden/13-batch-learning-rates/tinynet.npz"
    with np.load(path) as z:
        return {name: torch.from_numpy(z[name]) for name in z.files}


def golden_network(tinynet):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    nn.utils.vector_to_parameters(tinynet["w"], model.parameters())
    return model, (tinynet["X"], tinynet["y"])


# Random matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "measured"), [(0.5, 8.917), (1, 8.952), (1.5, 9.619), (2, 11.121), (4, 18.987)])
def test_spiked_wigner_against_recorded_simulations(ratio, measured):
    r = math.sqrt(1000 / 50)
    for sign in (1, -1):
        assert spiked_wigner(sign * ratio * r, r).value == pytest.approx(sign * measured, rel=0.02)


def test_spikes_and_overlaps_of_matrices_drawn_here():
    generator = torch.Generator().manual_seed(0)
    P, b = 400, 20.0
    r = math.sqrt(P / b)
    values, overlaps = [], []
    for _ in range(6):
        noise = torch.randn(P, P, generator=generator, dtype=torch.float64)
        A = (noise + noise.T) / math.sqrt(2 * b)
        A[0, 0] += 2 * r
        eigenvalues, vectors = torch.linalg.eigh(A)
        values.append(float(eigenvalues[-1]))
        overlaps.append(float(vectors[0, -1] ** 2))
    predicted = spiked_wigner(2 * r, r)
    assert np.mean(values) == pytest.approx(predicted.value, rel=0.02)
    assert np.mean(overlaps) == pytest.approx(predicted.overlap, abs=0.05)

    P, B, spike = 300, 150, 8.0
    values, overlaps = [], []
    for _ in range(10):
        examples = torch.randn(B, P, generator=generator, dtype=torch.float64)
        examples[:, 0] *= math.sqrt(spike)
        _, s, Vh = torch.linalg.svd(examples / math.sqrt(B), full_matrices=False)
        values.append(float(s[0] ** 2))
        overlaps.append(float(Vh[0, 0] ** 2))
    predicted = spiked_covariance(spike, 1.0, P / B)
    assert np.mean(values) == pytest.approx(predicted.value, rel=0.04)
    assert np.mean(overlaps) == pytest.approx(predicted.overlap, abs=0.05)


@given(r=st.floats(1e-3, 1e3))
def test_both_branches_meet_at_the_threshold(r):
    assert spiked_wigner(r, r).value == pytest.approx(2 * r)
    assert spiked_wigner(r * (1 + 1e-9), r).value == pytest.approx(2 * r)
    assert spiked_wigner(r, r).regime is Regime.BULK
    edge = r * (1 + math.sqrt(2))
    assert spiked_covariance(edge, r, 2.0).value == pytest.approx(spiked_covariance(edge * (1 + 1e-9), r, 2.0).value)


@given(spike=st.floats(-1e3, 1e3), radius=st.floats(0, 1e3))
def test_noise_only_pushes_outwards(spike, radius):
    shifted = spiked_wigner(spike, radius)
    assert abs(shifted.value) >= max(abs(spike), 2 * radius * (1 - 1e-12)) * (1 - 1e-12)
    assert 0 <= shifted.overlap <= 1


def test_far_spikes_of_a_covariance_move_by_the_trace_over_the_batch():
    assert spiked_covariance(1e4, 1.0, 5.0).value == pytest.approx(1e4 + 5, rel=1e-6)
    assert spiked_covariance(2.0, 0.0, 5.0).value == 2.0


def test_densities_have_mass_one():
    x = np.linspace(-3, 12, 300_001)
    assert np.trapezoid(semicircle_density(x, 2.0), x) == pytest.approx(1, abs=1e-4)
    assert np.trapezoid(marchenko_pastur_density(x, 1.5, 0.5), x) == pytest.approx(1, abs=1e-3)
    assert np.trapezoid(marchenko_pastur_density(x, 1.5, 2.0), x) == pytest.approx(0.5, abs=1e-3)


@given(N=st.integers(1, 10_000), data=st.data())
def test_effective_batch_size(N, data):
    B = data.draw(st.integers(1, N))
    b = effective_batch_size(B, N)
    assert 1 / b == pytest.approx(1 / B - 1 / N, abs=1e-12)
    assert effective_batch_size(B) == effective_batch_size(B, N, replacement=True) == B
    assert math.isinf(effective_batch_size(N, N))
    with pytest.raises(ValueError, match="batch_size must be at most"):
        effective_batch_size(N + 1, N)


# The network of the golden vectors ------------------------------------------------------------------------------------


def test_golden_noise_and_predictions(tinynet):
    model, data = golden_network(tinynet)
    N = len(data[1])
    op = Hessian(model, CROSS_ENTROPY, data)
    torch.testing.assert_close(op.dense(), tinynet["H"], rtol=1e-9, atol=1e-11)
    vectors = torch.linalg.eigh(tinynet["H"]).eigenvectors
    for name, v in (("c_top", vectors[:, -1]), ("c_bottom", vectors[:, 0])):
        # the golden figures are means over N examples, ours are unbiased
        assert sampling_noise(op, v).total * (N - 1) / N == pytest.approx(float(tinynet[name]), rel=1e-8)
    report = BatchCurvature(steps=27, noise_examples=None, rtol=1e-9).measure(model, CROSS_ENTROPY, data)
    assert report.status is Status.CONVERGED
    assert report.largest == pytest.approx(float(tinynet["eig_H"].max()), rel=1e-8)
    assert report.smallest == pytest.approx(float(tinynet["eig_H"].min()), rel=1e-8)
    biased = N / (N - 1)
    lam = report.largest
    for B, b, iid, direction in zip(*(tinynet[n].tolist() for n in ("B", "b_eff", "pred_iid", "pred_dir"))):
        assert effective_batch_size(B, N) == pytest.approx(b)
        found = report.batch_eigenvalues(B, model="direction").largest.value
        assert lam + (found - lam) / biased == pytest.approx(direction, rel=1e-8)
        r2 = 27 * float(tinynet["sigma2"]) / b
        assert spiked_wigner(lam, math.sqrt(r2)).value == pytest.approx(iid, rel=1e-8)


def test_entry_variance_of_all_entries(tinynet):
    """Hutchinson's estimate from two probes, over the seeds, against the variance taken entry by entry."""
    model, (X, y) = golden_network(tinynet)
    theta = tinynet["w"]
    named = {n: p.shape for n, p in model.named_parameters()}

    def loss(t, x, label):
        parts = t.split([s.numel() for s in named.values()])
        values = {n: part.view(s) for (n, s), part in zip(named.items(), parts)}
        return CROSS_ENTROPY(functional_call(model, values, (x[None],)), label[None])

    each = torch.func.vmap(torch.func.hessian(loss), in_dims=(None, 0, 0))(theta, X, y)
    exact = float(each.var(0).mean())
    assert exact * 23 / 24 == pytest.approx(float(tinynet["sigma2"]), rel=1e-9)
    estimates = [
        BatchCurvature(steps=2, probes=1, outliers=1, noise_examples=None, random_state=seed)
        .measure(model, CROSS_ENTROPY, (X, y))
        .noise.entry_variance
        for seed in range(6)
    ]
    assert np.mean(estimates) == pytest.approx(exact, rel=0.35)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    X = torch.randn(300, 6, dtype=torch.float64) + 0.5
    y = (X @ torch.randn(6, 4, dtype=torch.float64)).argmax(1)
    parameters = list(model.parameters())
    for _ in range(200):
        gradients = torch.autograd.grad(CROSS_ENTROPY(model(X), y), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                p -= 0.5 * g
    return model, (X, y)


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
def test_predictions_meet_measured_batches(trained, matrix):
    model, data = trained
    curvature = BatchCurvature(matrix=matrix, steps=40, noise_examples=None, outliers=8)
    report = curvature.measure(model, CROSS_ENTROPY, data)
    previous = math.inf
    for size in (8, 16, 64, 300):
        seen = curvature.batch_extremes(model, CROSS_ENTROPY, data, size, draws=64 if size < 64 else 8)
        mean = float(seen.largest.mean())
        assert report.batch_eigenvalues(size).largest.value == pytest.approx(mean, rel=0.15)
        assert mean >= report.largest * 0.97  # the largest eigenvalue is convex: batches overstate it on average
        assert mean <= previous * 1.04
        previous = mean
    torch.testing.assert_close(seen.largest, torch.full((8,), report.largest).double(), rtol=1e-6, atol=0)
    assert report.batch_eigenvalues(300).largest.value == report.largest
    assert report.batch_eigenvalues(300).smallest.value == report.smallest


def test_extremes_of_batches_are_those_of_their_dense_matrices(trained):
    model, (X, y) = trained
    curvature = BatchCurvature(steps=100)
    for at_once in (None, 1):
        seen = curvature.batch_extremes(model, CROSS_ENTROPY, (X, y), 5, draws=3, at_once=at_once)
        for rows, top, bottom in zip(seen.batches, seen.largest, seen.smallest):
            exact = torch.linalg.eigvalsh(Hessian(model, CROSS_ENTROPY, (X[rows], y[rows])).dense())
            assert float(top) == pytest.approx(float(exact[-1]), rel=1e-6)
            assert float(bottom) == pytest.approx(float(exact[0]), rel=1e-6)
    assert seen.spectrum.largest == pytest.approx(float(seen.largest.max()))
    many = curvature.batch_extremes(model, CROSS_ENTROPY, (X, y), 5, draws=64).spectrum.moment(1)
    trace = float(Hessian(model, CROSS_ENTROPY, (X, y)).dense().trace()) / sum(p.numel() for p in model.parameters())
    assert abs(many.value - trace) < 4 * many.stderr  # batches are right on average


def test_a_loader_gives_the_same_report(trained):
    model, (X, y) = trained
    curvature = BatchCurvature(steps=8, probes=1, noise_examples=50)
    whole = curvature.measure(model, CROSS_ENTROPY, (X, y))
    phases = set()
    loaded = curvature.measure(
        model,
        CROSS_ENTROPY,
        DataLoader(TensorDataset(X, y), batch_size=64),
        callback=lambda phase, products: phases.add(phase),
    )
    assert phases == {"spectrum", "extreme eigenvalues", "sampling noise"}
    assert loaded.n_examples == 300
    assert loaded.noise.largest.total == pytest.approx(whole.noise.largest.total, rel=1e-6)
    assert loaded.outliers == pytest.approx(whole.outliers, rel=1e-6)


def test_noise_of_a_linear_model_is_known(trained):
    """Squared error of a linear model: H_i = x_i x_i^T, so D u has a closed form."""
    X = trained[1][0]
    model = nn.Linear(6, 1, bias=False).double()
    square = lambda out, y: ((out - y) ** 2).sum(1).mean() / 2
    op = Hessian(model, square, (X, torch.zeros(300, 1).double()))
    u = torch.ones(6, dtype=torch.float64) / math.sqrt(6)
    D = torch.einsum("ni,nj->nij", X, X) - X.T @ X / 300
    found = sampling_noise(op, u)
    assert found.total == pytest.approx(float((D @ u).square().sum() / 299), rel=1e-9)
    assert found.along == pytest.approx(float(torch.einsum("i,nij,j->n", u, D, u).square().sum() / 299), rel=1e-9)


# Reports and rules ----------------------------------------------------------------------------------------------------


def report(largest=2.0, smallest=-0.1, c=18.0, matrix="hessian", n=1797) -> CurvatureReport:
    measure = spectral_measure(torch.diag(torch.tensor([largest, 0.0, smallest])).double(), steps=3, probes=1)
    blocks = torch.zeros(4, 1, 1, dtype=torch.float64)
    noise = BatchNoise(1e-6, Noise(c, 0.0, 0.1), Noise(0.01, 0.0, 0.001), blocks, c)
    return CurvatureReport(
        matrix=matrix,
        n_parameters=3,
        n_examples=n,
        outliers=(largest,),
        smallest=smallest,
        status=Status.CONVERGED,
        spectrum=measure,
        noise=noise,
    )


@given(sizes=st.tuples(st.integers(1, 1797), st.integers(1, 1797)), c=st.floats(0.0, 1e3))
def test_rates_grow_with_the_batch_but_never_faster(sizes, c):
    small, large = sorted(sizes)
    r = report(c=c)
    for model in ("subspace", "direction", "iid"):
        a, b = (r.max_learning_rate(size, model=model) for size in (small, large))
        assert a <= b * (1 + 1e-9)
        # 1/b - 1/N falls faster than 1/B, towards the whole data
        ratio = effective_batch_size(large, 1797) / effective_batch_size(small, 1797)
        assert b <= a * ratio * (1 + 1e-9)
        assert b <= 2 / r.largest * (1 + 1e-9)


def test_linear_below_the_knee_and_flat_above():
    r = report(c=4000.0, n=10**9)
    assert r.knee == 1000
    assert r.scale_learning_rate(0.1, 1, 10) == pytest.approx(1.0, rel=0.02)
    assert r.scale_learning_rate(0.1, 10**6, 10**7) == pytest.approx(0.1, rel=0.02)
    assert r.max_learning_rate(10**8, momentum=0.5) == pytest.approx(1.5 * r.max_learning_rate(10**8))
    assert r.max_learning_rate(10**8, weight_decay=2.0) == pytest.approx(0.5, rel=1e-3)


def test_prediction_of_the_smallest_eigenvalue():
    assert report().batch_eigenvalues(8).smallest.regime is Regime.OUTLIER
    assert report(smallest=-0.001).batch_eigenvalues(8).smallest.regime is Regime.BULK
    semidefinite = report(smallest=0.0, matrix="gauss-newton")
    assert semidefinite.batch_eigenvalues(8).smallest.value == 0
    covariance = semidefinite.batch_eigenvalues(8, model="covariance")
    assert covariance.largest.value >= semidefinite.largest
    assert semidefinite.batch_eigenvalues(1797, model="covariance").largest.value == semidefinite.largest


def test_gradient_descent_diverges_just_above_the_limit_and_converges_just_below():
    eigenvalues = torch.linspace(0.1, 3.0, 20, dtype=torch.float64)
    for momentum in (0.0, 0.6):
        for averaged in (False, True):
            limit = largest_learning_rate(3.0, momentum=momentum, averaged=averaged)
            for factor, diverges in ((1.01, True), (0.99, False)):
                x, v = torch.ones(20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
                for _ in range(3000):
                    v = momentum * v + (1 - momentum if averaged else 1) * eigenvalues * x
                    x = x - factor * limit * v
                assert bool(x.norm() > 1e3) == diverges
                if not diverges:
                    assert x.norm() < 1e-3


def test_optimal_heavy_ball_reaches_its_rate():
    ball = optimal_heavy_ball(1.0, 0.01)
    assert ball.lr == pytest.approx(3.3058, abs=1e-4)
    assert ball.momentum == pytest.approx(0.66942, abs=1e-5)
    eigenvalues = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    x, v = torch.ones(100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)
    for _ in range(100):
        v = ball.momentum * v + eigenvalues * x
        x = x - ball.lr * v
    assert x.norm() / 10 < 1e-6


def test_rules_of_thumb():
    assert scale_learning_rate(0.1, 64, 256) == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 64, 256, optimizer="adam") == pytest.approx(0.2)
    # linear scaling of the rate leaves the damping alone
    assert scale_damping(0.01, 32, 128, old_lr=0.1, new_lr=0.4) == pytest.approx(0.01)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: report().batch_eigenvalues(0), "batch_size"),
        (lambda: report().batch_eigenvalues(1798), "at most n_examples"),
        (lambda: report().batch_eigenvalues(8, model="poisson"), "model must be one of"),
        (lambda: report().batch_eigenvalues(8, model="covariance"), "semidefinite"),
        (lambda: report(largest=-1.0, c=0.0).max_learning_rate(8), "no positive curvature"),
        (lambda: report().max_learning_rate(8, momentum=1.0), "momentum"),
        (lambda: spiked_wigner(math.nan, 1.0), "spike"),
        (lambda: spiked_wigner(1.0, -1.0), "radius"),
        (lambda: spiked_covariance(-1.0, 1.0, 1.0), "spike"),
        (lambda: spiked_covariance(1.0, 1.0, 0.0), "ratio"),
        (lambda: largest_learning_rate(0.0), "sharpness"),
        (lambda: largest_learning_rate(1.0, momentum=-0.1), "momentum"),
        (lambda: optimal_heavy_ball(1.0, 2.0), "smallest"),
        (lambda: optimal_heavy_ball(1.0, 0.0), "smallest"),
        (lambda: scale_learning_rate(-1.0, 1, 2), "lr"),
        (lambda: scale_learning_rate(1.0, 1, 2, optimizer="lion"), "optimizer must be one of"),
        (lambda: scale_damping(-1.0, 1, 2, old_lr=1.0, new_lr=1.0), "damping"),
        (lambda: BatchCurvature(matrix="fisher"), "matrix"),
        (lambda: BatchCurvature(noise_examples=1), "noise_examples"),
        (lambda: BatchCurvature(steps=0), "steps"),
        (lambda: BatchCurvature(max_products=3), "max_products"),
    ],
)
def test_impossible_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_data_and_losses_that_cannot_be_measured(trained):
    model, (X, y) = trained
    curvature = BatchCurvature(steps=4, probes=1)
    with pytest.raises(ValueError, match="single example"):
        curvature.measure(model, CROSS_ENTROPY, (X[:1], y[:1]))
    with pytest.raises(ValueError, match="no batches"):
        curvature.measure(model, CROSS_ENTROPY, [])
    with pytest.raises(ArithmeticError, match="not finite"):
        curvature.measure(model, lambda out, t: CROSS_ENTROPY(out, t) * math.nan, (X, y))
    with pytest.raises(ValueError, match="at most the 300 examples"):
        curvature.batch_extremes(model, CROSS_ENTROPY, (X, y), 301)
    dropping = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4)).double()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        curvature.measure(dropping, CROSS_ENTROPY, (X, y))
