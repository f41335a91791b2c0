"""Sweeps against their definition and pyamg, SSOR as a preconditioner, Young's formula, tabulated iteration counts."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse.linalg import cg

from locally.linalg.relaxation import (
    Splitting,
    SSORPreconditioner,
    jacobi_radius,
    optimal_omega,
    relax,
    sor_iteration_counts,
    sor_residual_map,
    young_radius,
)


def laplacian(m: int) -> sp.csr_array:
    T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(m, m))
    A = sp.csr_array(sp.kronsum(T, T, format="csr"))
    A.sort_indices()
    return A


def with_rows_reversed(A: sp.csr_array) -> sp.csr_array:
    """The same matrix, columns descending within each row."""
    order = np.concatenate([np.arange(*limits)[::-1] for limits in zip(A.indptr[:-1], A.indptr[1:])])
    return sp.csr_array((A.data[order], A.indices[order], A.indptr), shape=A.shape)


@st.composite
def spd_systems(draw):
    """Sparse, symmetric, diagonally dominant A with its b and x."""
    n = draw(st.integers(1, 12))
    values = draw(hnp.arrays(np.float64, (n, n), elements=st.sampled_from([0.0, 0.0, -1.0, 0.5, 2.0])))
    lower = np.tril(values, -1)
    A = lower + lower.T
    np.fill_diagonal(A, np.abs(A).sum(axis=1) + draw(st.floats(0.1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return A, rng.standard_normal(n), rng.standard_normal(n)


omegas = st.floats(0.05, 1.95)


@given(spd_systems(), omegas)
def test_a_forward_sweep_solves_with_the_lower_triangle(system, omega):
    A, b, x = system
    M = np.tril(A, -1) + np.diag(np.diag(A)) / omega
    expected = x + np.linalg.solve(M, b - A @ x)
    relax(sp.csr_array(A), x, b, omega=omega)
    np.testing.assert_allclose(x, expected, rtol=1e-10, atol=1e-10)


@given(spd_systems(), omegas)
def test_a_backward_sweep_is_a_forward_sweep_of_the_unknowns_in_reverse(system, omega):
    A, b, x = system
    mirrored = x[::-1].copy()
    relax(sp.csr_array(A), x, b, omega=omega, direction="backward")
    relax(sp.csr_array(A[::-1, ::-1]), mirrored, b[::-1].copy(), omega=omega)
    np.testing.assert_allclose(x[::-1], mirrored, rtol=1e-10, atol=1e-10)


@given(spd_systems(), omegas)
def test_sweeps_never_increase_the_energy_norm_of_the_error(system, omega):
    A, b, x = system
    exact = np.linalg.solve(A, b)
    before = (x - exact) @ A @ (x - exact)
    relax(sp.csr_array(A), x, b, omega=omega, direction="symmetric", sweeps=3)
    assert (x - exact) @ A @ (x - exact) <= before * (1 + 1e-9) + 1e-18


@pytest.mark.parametrize("direction", ["forward", "backward", "symmetric"])
def test_gauss_seidel_agrees_with_pyamg(direction):
    pyamg_relaxation = pytest.importorskip("pyamg.relaxation.relaxation")
    A = laplacian(13)
    rng = np.random.default_rng(0)
    b, ours = rng.standard_normal(169), rng.standard_normal(169)
    theirs = ours.copy()
    relax(A, ours, b, direction=direction, sweeps=3)
    pyamg_relaxation.gauss_seidel(A, theirs, b, iterations=3, sweep=direction)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_dtypes_of_values_and_indices_are_followed(dtype, index_dtype):
    A = laplacian(4).astype(dtype)
    A.indices, A.indptr = A.indices.astype(index_dtype), A.indptr.astype(index_dtype)
    x, b = np.zeros(16, dtype), np.ones(16, dtype)
    relax(A, x, b, omega=1.3, sweeps=100)
    assert x.dtype == dtype
    np.testing.assert_allclose(A @ x, b, rtol=1e-5)


def test_splitting_copies_nothing_and_follows_new_values():
    A = laplacian(5)
    split = Splitting.of(A)
    assert np.shares_memory(split.data, A.data)
    A.data[split.diagonal_at] += 2.0
    x, b = np.zeros(25), np.ones(25)
    split.sweep(x, b, sweeps=60)
    np.testing.assert_allclose(A @ x, b, rtol=1e-9)


@pytest.mark.parametrize("form", ["csc", "coo", "unsorted", "dense", "integer"])
def test_other_formats_are_converted(form):
    A = laplacian(4)
    given_as = {
        "csc": lambda: A.tocsc(),
        "coo": lambda: A.tocoo(),
        "unsorted": lambda: with_rows_reversed(A),
        "dense": lambda: A.toarray(),
        "integer": lambda: A.astype(np.int64),
    }[form]()
    split = Splitting.of(given_as)
    rebuilt = sp.csr_array((split.data, split.indices, split.indptr), shape=(16, 16)).toarray()
    np.testing.assert_array_equal(rebuilt, A.toarray())
    np.testing.assert_array_equal(split.diagonal, np.full(16, 4.0))


@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        (np.ones((2, 3)), ValueError, "square"),
        (np.array([[1.0, 0.0], [0.0, -1.0]]), ValueError, "positive diagonal.*-1.0 in row 1"),
        (np.array([[0.0, 1.0], [1.0, 1.0]]), ValueError, "positive diagonal.*row 0"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), ValueError, "NaN or infinity"),
        (np.eye(2) * 1j, TypeError, "real"),
        ([[1.0]], TypeError, "SciPy sparse"),
    ],
)
def test_bad_matrices_are_refused(A, error, message):
    with pytest.raises(error, match=message):
        Splitting.of(A)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"omega": 2.0}, ValueError, "omega"),
        ({"omega": 0.0}, ValueError, "omega"),
        ({"omega": float("nan")}, ValueError, "omega"),
        ({"direction": "sideways"}, ValueError, "direction"),
        ({"sweeps": -1}, ValueError, "sweeps"),
        ({"b": np.ones(3)}, ValueError, "b must have shape"),
        ({"b": np.ones(4, np.float32)}, TypeError, "b must have the dtype"),
    ],
)
def test_bad_sweeps_are_refused_and_leave_x(change, error, message, without_shape_checks):
    arguments = {"A": laplacian(2), "x": np.zeros(4), "b": np.ones(4), "omega": 1.0} | change
    with pytest.raises(error, match=message):
        relax(arguments.pop("A"), arguments.pop("x"), arguments.pop("b"), **arguments)
    assert not arguments.get("x", np.zeros(4)).any()


@given(spd_systems(), omegas, st.sampled_from(["backward first", "forward first"]))
def test_ssor_is_the_preconditioner_of_the_book(system, omega, order):
    A, r, _ = system
    D = np.diag(np.diag(A))
    X = D + omega * np.tril(A, -1)
    product = X.T @ np.linalg.inv(D) @ X if order == "backward first" else X @ np.linalg.inv(D) @ X.T
    P = product / (omega * (2 - omega))
    M = SSORPreconditioner(A, omega, order=order)
    np.testing.assert_allclose(M @ r, np.linalg.solve(P, r), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(M.H @ r, M @ r)
    eigenvalues = np.linalg.eigvals(np.linalg.solve(P, A)).real
    assert eigenvalues.min() > 0
    if order == "forward first":  # the order in which P - A is a product of a matrix and its transpose
        assert eigenvalues.max() <= 1 + 1e-9


def test_one_symmetric_sweep_from_zero_is_the_preconditioner():
    A, r = laplacian(6), np.random.default_rng(1).standard_normal(36)
    z = np.zeros(36)
    relax(A, z, r, omega=1.4, direction="symmetric")
    np.testing.assert_allclose(SSORPreconditioner(A, 1.4, order="forward first") @ r, z, rtol=1e-12)


def test_ssor_speeds_up_scipys_conjugate_gradients():
    A, b = laplacian(30), np.ones(900)
    steps = {}
    for name, M in (("none", None), ("ssor", SSORPreconditioner(A, 1.7))):
        steps[name] = []
        x, info = cg(A, b, M=M, rtol=1e-10, callback=steps[name].append)
        assert info == 0
        np.testing.assert_allclose(A @ x, b, atol=1e-7)
    assert len(steps["ssor"]) < len(steps["none"]) / 2


@pytest.mark.parametrize(
    ("A", "symmetric"),
    [
        (np.array([[2.0, 1.0], [1.0, 2.0]]), True),
        (np.array([[2.0, 1.0], [1.1, 2.0]]), False),
        (np.array([[2.0, 1.0], [0.0, 2.0]]), False),
        (np.array([[2.0, 0.0], [1.0, 2.0]]), False),
        # a zero stored on one side only
        (sp.csr_array((np.array([2.0, 0.0, 2.0]), np.array([0, 1, 1]), np.array([0, 2, 3]))), True),
        (sp.csr_array((np.array([2.0, 0.0, 2.0]), np.array([0, 0, 1]), np.array([0, 1, 3]))), True),
    ],
)
def test_symmetry_is_seen_in_one_pass(A, symmetric):
    assert Splitting.of(A).is_symmetric() is symmetric
    if not symmetric:
        with pytest.raises(ValueError, match="A must be symmetric"):
            SSORPreconditioner(A)


@given(hnp.arrays(np.float64, (7, 7), elements=st.sampled_from([0.0, 0.0, 1.0, -2.0])), st.booleans())
def test_symmetry_agrees_with_the_dense_comparison(values, symmetrise):
    A = values + values.T if symmetrise else values
    np.fill_diagonal(A, 5.0)
    assert Splitting.of(sp.csr_array(A)).is_symmetric() == bool((A == A.T).all())


@pytest.mark.parametrize("shift", [-0.15, 0.0, 0.45])
def test_youngs_formula_is_the_spectral_radius_of_the_five_point_matrix(shift):
    A = laplacian(10) + shift * sp.eye_array(100)
    beta = jacobi_radius(A)
    assert beta == pytest.approx(4 * np.cos(np.pi / 11) / (4 + shift), abs=1e-12)
    best = optimal_omega(beta)
    for omega in (0.7, 1.0, 1.3, 1.5, best + 0.05, 1.9):
        radius = np.abs(np.linalg.eigvals(sor_residual_map(A, omega))).max()
        assert young_radius(omega, beta) == pytest.approx(radius, abs=1e-10)
    # at the optimum itself the eigenvalue is defective, which costs half the digits
    assert np.abs(np.linalg.eigvals(sor_residual_map(A, best))).max() == pytest.approx(best - 1, abs=1e-3)


@given(st.floats(0, 0.999), st.floats(0.01, 1.99))
def test_optimal_omega_minimises_youngs_formula(beta, omega):
    best = optimal_omega(beta)
    assert young_radius(best, beta) == pytest.approx(best - 1, abs=1e-9)
    assert young_radius(omega, beta) >= young_radius(best, beta) - 1e-9


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_young_needs_a_convergent_jacobi(beta):
    with pytest.raises(ValueError, match="beta"):
        optimal_omega(beta)


def test_residuals_are_powers_of_the_residual_map():
    A, b = laplacian(5), np.random.default_rng(2).standard_normal(25)
    C = sor_residual_map(A, 1.4)
    x = np.zeros(25)
    for k in range(1, 8):
        relax(A, x, b, omega=1.4)
        np.testing.assert_allclose(b - A @ x, np.linalg.matrix_power(C, k) @ b, rtol=1e-9, atol=1e-12)


def test_tabulated_counts_are_the_golden_ones(golden):
    with np.load(golden / "09-learning-to-relax" / "sor_bandit.npz") as z:
        counts = sor_iteration_counts(laplacian(10), z["c"], z["b"], z["omegas"])
        np.testing.assert_array_equal(counts, z["sor_counts"])


@given(st.integers(1, 9), st.integers(0, 60), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_tabulated_counts_are_those_of_plain_sweeps(m, instances, arms, seed):
    rng = np.random.default_rng(seed)
    A = laplacian(m)
    shifts, B, grid = rng.uniform(0, 2, instances), rng.standard_normal((instances, m * m)), rng.uniform(0.5, 1.7, arms)
    counts = sor_iteration_counts(A, shifts, B, grid, rtol=1e-3, max_iter=40)
    assert counts.shape == (instances, arms)
    for t in range(min(instances, 3)):
        A_t = sp.csr_array(A + shifts[t] * sp.eye_array(m * m))
        for j, omega in enumerate(grid):
            x, count = np.zeros(m * m), 0
            while count < 40 and np.linalg.norm(B[t] - A_t @ x) > 1e-3 * np.linalg.norm(B[t]):
                relax(A_t, x, B[t], omega=float(omega))
                count += 1
            assert counts[t, j] == count


def test_counts_do_not_see_the_scale_of_b_and_zero_takes_none():
    rng = np.random.default_rng(3)
    b = rng.standard_normal(25)
    B = np.array([b, 1e6 * b, 1e-6 * b, 0 * b])
    counts = sor_iteration_counts(laplacian(5), np.zeros(4), B, np.array([1.0, 1.5]))
    assert (counts[:3] == counts[0]).all()
    assert (counts[3] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shifts": np.array([-5.0])}, "positive diagonal"),
        ({"B": np.ones((2, 9))}, "B must have shape"),
        ({"B": np.full((1, 9), np.inf)}, "B holds NaN"),
        ({"omegas": np.array([2.5])}, "omega"),
        ({"rtol": 0.0}, "rtol"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_bad_tables_are_refused(change, message, without_shape_checks):
    arguments = {"shifts": np.zeros(1), "B": np.ones((1, 9)), "omegas": np.array([1.0])} | change
    with pytest.raises(ValueError, match=message):
        sor_iteration_counts(laplacian(3), **arguments)
