"""Lanczos against dense eigensolvers and SciPy, the moments that Gauss quadrature keeps, and what bad operators get."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from locally.linalg.lanczos import ExtremeEigenvalues, Status, lanczos, spectral_measure


def symmetric(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((A + A.T) / 2).to(dtype)


def with_eigenvalues(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return (Q * eigenvalues) @ Q.T


# The basis ------------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 25), k=st.integers(1, 4), steps=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_the_lanczos_relation(n, k, steps, seed):
    """A Q = Q T + beta q e^T with orthonormal rows, for every starting vector by itself."""
    A = symmetric(n, seed)
    start = torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = lanczos(A, start, steps)
    m = min(n, steps)
    assert basis.vectors.shape == (k, m, n)
    for Q, T, beta, taken in zip(basis.vectors, basis.tridiagonal(), basis.beta, basis.steps):
        torch.testing.assert_close(Q @ Q.T, torch.diag((torch.arange(m) < taken).double()), atol=1e-12, rtol=0)
        left = Q @ A - T @ Q
        assert left[: taken - 1].norm() <= 1e-10 * (1 + A.norm())
        assert abs(left[taken - 1].norm() - beta[taken - 1]) <= 1e-10 * (1 + A.norm())


def test_golden_coefficients(golden):
    with np.load(golden / "13-batch-learning-rates/tinynet.npz") as z:
        H, v, alpha, beta = (torch.from_numpy(z[n]) for n in ("H", "lan_v0", "lan_alpha", "lan_beta"))
    basis = lanczos(H, v[None], 10)
    torch.testing.assert_close(basis.alpha[0], alpha, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(basis.beta[0], beta, rtol=1e-9, atol=1e-11)


def test_full_size_gives_the_spectrum_in_single_precision_without_ghosts():
    """Well separated ends converge early; without reorthogonalisation copies of them would take the others' places."""
    eigenvalues = torch.cat([torch.linspace(-1, 1, 57), torch.tensor([40.0, 70.0, 100.0])]).double()
    A = with_eigenvalues(eigenvalues).float()
    start = torch.randn(2, 60, generator=torch.Generator().manual_seed(1))
    T = lanczos((A + A.T) / 2, start, 60).tridiagonal()
    torch.testing.assert_close(torch.linalg.eigvalsh(T), eigenvalues.expand(2, -1), atol=2e-4, rtol=0)


def test_rows_may_meet_matrices_of_their_own():
    A = torch.stack([symmetric(12, seed) for seed in range(3)])
    start = torch.ones(3, 12, dtype=torch.float64)
    together = lanczos(lambda V: torch.einsum("kp,kpq->kq", V, A), start, 8)
    for i in range(3):
        alone = lanczos(A[i], start[:1], 8)
        torch.testing.assert_close(together.alpha[i], alone.alpha[0])
        torch.testing.assert_close(together.beta[i], alone.beta[0])


def test_an_exhausted_space_ends_in_zeros_and_leaves_the_others_alone():
    A = torch.diag(torch.tensor([1.0, 1, 1, 2, 3, 4])).double()
    start = torch.stack([torch.eye(6)[0], torch.ones(6)]).double()
    basis = lanczos(A, start, 6)
    assert basis.steps.tolist() == [1, 4]
    assert (basis.beta[0] == 0).all()
    measure = basis.quadrature()
    assert measure.smallest == pytest.approx(1)
    assert measure.largest == pytest.approx(4)
    torch.testing.assert_close(measure.weights.sum(1), torch.ones(2, dtype=torch.float64))


# Extreme eigenpairs ---------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 40),
    largest=st.integers(0, 3),
    smallest=st.integers(0, 3),
    seed=st.integers(0, 10_000),
    spare=st.integers(3, 12),
)
def test_extreme_pairs_equal_the_dense_ones(n, largest, smallest, seed, spare):
    if not 1 <= largest + smallest <= n:
        return
    A = symmetric(n, seed)
    method = ExtremeEigenvalues(largest=largest, smallest=smallest, rtol=1e-9, basis=largest + smallest + spare)
    found = method.solve(A, generator=torch.Generator().manual_seed(seed))
    exact = torch.linalg.eigvalsh(A)
    expected = torch.cat([exact[:smallest], exact[n - largest :]]).flip(0)
    scale = float(exact.abs().max()) + 1e-300
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.values, expected, atol=1e-8 * scale, rtol=0)
    V = found.vectors
    torch.testing.assert_close(V @ V.T, torch.eye(len(V), dtype=torch.float64), atol=1e-10, rtol=0)
    assert float((V @ A - found.values[:, None] * V).norm(dim=1).max()) <= 1.1e-8 * scale + 1e-12


def test_agrees_with_arpack_and_restarts_within_its_memory():
    A = with_eigenvalues(torch.linspace(-1, 1, 400).double() ** 3)
    found = ExtremeEigenvalues(largest=3, smallest=2, basis=20).solve(A, generator=torch.Generator().manual_seed(0))
    operator = LinearOperator((400, 400), matvec=lambda v: A.numpy() @ v.ravel(), dtype=np.float64)
    top = np.sort(eigsh(operator, k=3, which="LA", return_eigenvectors=False))[::-1]
    bottom = np.sort(eigsh(operator, k=2, which="SA", return_eigenvectors=False))[::-1]
    assert found.products > 20  # it did restart
    np.testing.assert_allclose(found.values.numpy(), np.concatenate([top, bottom]), atol=1e-6)


@pytest.mark.parametrize("A", [torch.eye(7), torch.zeros(7, 7), torch.diag(torch.tensor([2.0, 2, 2, 1, 1, 0, 0]))])
def test_repeated_eigenvalues_are_found_once_the_space_is_exhausted(A):
    found = ExtremeEigenvalues(largest=3, smallest=1).solve(A, generator=torch.Generator().manual_seed(0))
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.vectors @ A, found.values[:, None] * found.vectors, atol=1e-5, rtol=0)


def test_the_product_limit_is_a_status_with_residuals():
    A = with_eigenvalues(torch.linspace(0, 1, 300).double())
    found = ExtremeEigenvalues(rtol=1e-12, max_products=5).solve(A, generator=torch.Generator().manual_seed(0))
    assert found.status is Status.PRODUCT_LIMIT
    assert found.products == 5
    r = found.vectors @ A - found.values[:, None] * found.vectors
    torch.testing.assert_close(found.residuals, r.norm(dim=1))


def test_a_callback_sees_every_product_and_may_stop():
    seen: list[int] = []

    def stop(products: int, residual: float) -> None:
        seen.append(products)
        if products == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ExtremeEigenvalues().solve(symmetric(30), callback=stop)
    assert seen == [1, 2, 3, 4]


# Quadrature -----------------------------------------------------------------------------------------------------------


def test_moments_of_a_full_set_of_probes_are_exact():
    """m steps integrate polynomials of degree 2 m - 1; the n unit vectors as probes sum to the trace."""
    A = symmetric(9)
    measure = lanczos(A, torch.eye(9, dtype=torch.float64), 3).quadrature()
    power = torch.eye(9, dtype=torch.float64)
    for order in range(6):
        assert measure.moment(order).value == pytest.approx(float(power.trace()) / 9, abs=1e-10)
        power = power @ A


def test_traces_of_functions_lie_within_their_standard_errors():
    eigenvalues = torch.linspace(0.1, 4, 200).double()
    A = with_eigenvalues(eigenvalues)
    measure = spectral_measure(A, steps=25, probes=30, generator=torch.Generator().manual_seed(3))
    for function in (torch.log, torch.sqrt, torch.reciprocal, torch.exp):
        found = measure.trace(function)
        assert abs(found.value - float(function(eigenvalues).sum())) < 4 * found.stderr
    gaussian = spectral_measure(
        A, steps=25, probes=30, distribution="gaussian", generator=torch.Generator().manual_seed(3)
    )
    assert abs(gaussian.moment(1).value - float(eigenvalues.mean())) < 4 * gaussian.moment(1).stderr


def test_density_distribution_and_quantiles_of_the_semicircle():
    n = 400
    A = symmetric(n, 5) * math.sqrt(2 / n)  # radius 2
    measure = spectral_measure(A, steps=40, probes=10, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(-3, 3, 601)
    density = measure.density(grid.double(), width=0.15)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-3)
    inside = torch.sqrt((4 - grid[150:451:75] ** 2).clamp_min(0)) / (2 * math.pi)
    torch.testing.assert_close(density[150:451:75].float(), inside, atol=0.02, rtol=0)
    assert measure.cumulative(0.0) == pytest.approx(0.5, abs=0.05)
    assert measure.quantile(0.5) == pytest.approx(0, abs=0.15)
    assert measure.quantile(0.0) == measure.smallest
    assert measure.quantile(1.0) == measure.largest
    default = measure.density(grid.double())
    assert float(torch.trapezoid(default, grid)) == pytest.approx(1, abs=1e-3)


def test_probes_in_stacks_or_one_by_one_give_the_same_measure():
    A, progress = symmetric(30), []
    make = lambda at_once: spectral_measure(
        A,
        steps=8,
        probes=5,
        at_once=at_once,
        generator=torch.Generator().manual_seed(0),
        callback=lambda done, total: progress.append((done, total)),
    )
    together = make(None)
    assert progress[-1] == (40, 40)
    for at_once in (1, 2):
        progress.clear()
        apart = make(at_once)
        assert progress[-1] == (40, 40)
        assert [done for done, _ in progress] == sorted(done for done, _ in progress)
        # the draws are the same numbers in the same order
        torch.testing.assert_close(apart.nodes, together.nodes)
        torch.testing.assert_close(apart.weights, together.weights)


def test_one_by_one_takes_a_function_of_vectors():
    A = symmetric(20, dtype=torch.float32)
    measure = spectral_measure(lambda v: A @ v, steps=20, probes=2, at_once=1, size=20)
    exact = torch.linalg.eigvalsh(A)
    assert measure.largest == pytest.approx(float(exact[-1]), abs=1e-4)
    assert math.isnan(spectral_measure(A, steps=3, probes=1).trace(torch.exp).stderr)


# Bad operators and arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run", [lambda op: lanczos(op, torch.ones(2, 6), 4), lambda op: lanczos(op, torch.ones(1, 6), 4)]
)
def test_bad_products_are_named(run):
    with pytest.raises(ArithmeticError, match="op returned NaN"):
        run(lambda v: v * math.nan)
    with pytest.raises(ValueError, match="op must map a tensor of shape"):
        run(lambda v: v[..., :2])
    with pytest.raises(TypeError, match="op must keep the dtype"):
        run(lambda v: v.double())
    A = torch.arange(36.0).view(6, 6)
    with pytest.raises(ValueError, match="op is not symmetric"):
        run(lambda v: v @ A)
    with pytest.raises(ValueError, match="op is not symmetric"):
        ExtremeEigenvalues().solve(A)
    with pytest.raises(ValueError, match="op holds NaN"):
        run(torch.full((6, 6), math.nan))
    with pytest.raises(ValueError, match="op has shape"):
        run(torch.eye(5))


def test_bad_arguments_are_named(without_shape_checks):
    A = torch.eye(4)
    with pytest.raises(ValueError, match="zero vector"):
        lanczos(A, torch.zeros(1, 4), 2)
    with pytest.raises(ValueError, match="start holds NaN"):
        lanczos(A, torch.full((1, 4), math.inf), 2)
    with pytest.raises(ValueError, match="start must have shape"):
        lanczos(A, torch.ones(4), 2)
    with pytest.raises(ValueError, match="steps"):
        lanczos(A, torch.ones(1, 4), 0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ExtremeEigenvalues(largest=0)
    with pytest.raises(ValueError, match="rtol"):
        ExtremeEigenvalues(rtol=0)
    with pytest.raises(ValueError, match="basis"):
        ExtremeEigenvalues(largest=3, basis=4)
    with pytest.raises(ValueError, match="eigenvalues of a matrix that has 4"):
        ExtremeEigenvalues(largest=5).solve(A)
    with pytest.raises(ValueError, match="start must be one vector"):
        ExtremeEigenvalues().solve(A, torch.zeros(4))
    with pytest.raises(ValueError, match="no shape, dtype and device"):
        ExtremeEigenvalues().solve(lambda v: v)
    with pytest.raises(ValueError, match="distribution"):
        spectral_measure(A, distribution="sparse")
    with pytest.raises(ValueError, match="probes"):
        spectral_measure(A, probes=0)
    indefinite = spectral_measure(torch.diag(torch.tensor([-1.0, 2.0, 3.0])), steps=3, probes=2)
    with pytest.raises(ValueError, match=r"function is not finite at the Ritz value -1"):
        indefinite.trace(torch.log)
    with pytest.raises(ValueError, match="width"):
        indefinite.density(torch.zeros(2), width=-1.0)
    with pytest.raises(ValueError, match="q must lie in"):
        indefinite.quantile(1.5)
