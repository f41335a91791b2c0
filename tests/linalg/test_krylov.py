"""CG and MINRES: the answers of a direct solve, the counts of SciPy, batches, warm starts, and how a solve that cannot
succeed ends."""

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, cg, minres

from locally.linalg.krylov import CG, MINRES, Dense, Diagonal, Operator, Sparse, Status
from locally.linalg.krylov import method as krylov_method

METHODS = [CG, MINRES]


def spectral(eigenvalues, seed):
    """A dense matrix with these eigenvalues."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))
    A = (Q * np.asarray(eigenvalues)) @ Q.T
    return torch.from_numpy((A + A.T) / 2)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def poisson(side):
    T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
    return sp.csr_array(sp.kronsum(T, T, format="csr"))


def as_torch(A):
    return torch.from_numpy(A.toarray()).to_sparse_csr()


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@given(n=st.integers(1, 25), batch=st.integers(1, 4), condition=st.floats(1, 1e4), seed=st.integers(0, 2**32 - 1))
def test_the_answer_is_that_of_a_direct_solve(method, n, batch, condition, seed):
    A = torch.stack([spectral(np.geomspace(1, condition, n), seed + i) for i in range(batch)])
    b = normal(batch, n, seed=seed)
    found = method(rtol=1e-9).solve(A, b)
    assert found.status is Status.CONVERGED
    norms = torch.linalg.vector_norm(b - (A @ found.x[:, :, None])[:, :, 0], dim=1)
    torch.testing.assert_close(found.residual_norms, norms, rtol=1e-3, atol=1e-12)
    assert (norms <= 1.0001e-9 * torch.linalg.vector_norm(b, dim=1) + 1e-300).all()
    exact = torch.linalg.solve(A, b)
    assert ((found.x - exact).norm(dim=1) <= 1e-8 * condition * exact.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(n=st.integers(1, 30), exponent=st.integers(-120, 120), seed=st.integers(0, 2**32 - 1))
def test_one_small_system_takes_the_steps_that_it_takes_when_it_is_watched(dtype, n, exponent, seed):
    """A callback turns the compiled solve of a single system off."""
    exponent = exponent // 4 if dtype is torch.float32 else exponent
    A = spectral(np.geomspace(1, 50, n), seed).to(dtype)
    b = (normal(n, seed=seed) * 2.0**exponent).to(dtype)
    steps = []
    quick, watched = (CG(rtol=1e-4).solve(A, b, callback=c) for c in (None, lambda k, _: steps.append(k)))
    assert quick.status is watched.status is Status.CONVERGED
    # sums are taken in different orders, which moves the last steps: as many as five of thirty in single precision
    single = dtype is torch.float32
    assert abs(int(quick.iterations) - int(watched.iterations)) <= (5 if single else 2)
    assert len(steps) == int(watched.iterations)
    k = min(len(quick.history), len(watched.history)) // 2 + 1  # rounding grows with the steps
    k, rtol = (min(k, 6), 1e-2) if single else (k, 1e-9)
    torch.testing.assert_close(quick.history[:k], watched.history[:k], rtol=rtol, atol=0.0)
    gap = torch.linalg.vector_norm(quick.x - watched.x) / torch.linalg.vector_norm(watched.x)
    assert gap <= (2 * 50 * 1e-4 if single else 2e-4)  # twice the condition number times the tolerance
    norm = torch.linalg.vector_norm(b.double() - A.double() @ quick.x.double())
    rounding = 10 * torch.finfo(dtype).eps * float(torch.linalg.vector_norm(A) * torch.linalg.vector_norm(quick.x))
    assert float(quick.residual_norms) == pytest.approx(float(norm), rel=1e-6, abs=rounding)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 20))
def test_minres_solves_indefinite_systems_and_its_residual_never_grows(seed, n):
    rng = np.random.default_rng(seed)
    A = spectral(rng.uniform(0.5, 5, n) * rng.choice([-1, 1], n), seed)
    b = normal(n, seed=seed)
    found = MINRES(rtol=1e-9).solve(A, b)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-7)
    assert (found.history.diff() <= 1e-12 * b.norm()).all()


@given(condition=st.floats(1, 1e4), n=st.integers(2, 30), seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 12))
def test_the_error_of_cg_stays_under_the_chebyshev_bound(condition, n, seed, steps):
    A = spectral(np.geomspace(1, condition, n), seed)
    x = normal(n, seed=seed)
    e = CG(rtol=1e-14, max_steps=steps).solve(A, A @ x).x - x
    q = (math.sqrt(condition) - 1) / (math.sqrt(condition) + 1)
    a_norm = lambda v: math.sqrt(max(float(v @ A @ v), 0))
    assert a_norm(e) <= (2 * q**steps + 1e-9) * a_norm(x)


def test_distinct_eigenvalues_are_the_steps_that_it_takes():
    A = spectral([1, 1, 1, 4, 4, 9, 9, 9], 3)
    for method in METHODS:
        assert method(rtol=1e-10).solve(A, normal(8)).iterations == 3


def test_counts_and_norms_are_those_of_scipy():
    A, b = poisson(24), np.random.default_rng(0).standard_normal(576)
    norms = [np.linalg.norm(b)]
    cg(A, b, rtol=1e-8, callback=lambda x: norms.append(np.linalg.norm(b - A @ x)))
    found = CG(rtol=1e-8).solve(as_torch(A), torch.from_numpy(b))
    assert abs(int(found.iterations) - (len(norms) - 1)) <= 1
    np.testing.assert_allclose(found.history.numpy()[:40], norms[:40], rtol=1e-6)

    shifted = sp.csr_array(A - 0.3 * sp.eye_array(576))
    norms = [np.linalg.norm(b)]
    minres(shifted, b, rtol=1e-6, callback=lambda x: norms.append(np.linalg.norm(b - shifted @ x)))
    found = MINRES(rtol=1e-6, shift=0.3).solve(as_torch(A), torch.from_numpy(b))
    np.testing.assert_allclose(found.history.numpy()[:40], norms[:40], rtol=1e-5)


def test_a_preconditioner_gives_scipys_preconditioned_counts():
    scales = sp.diags_array(np.geomspace(1, 100, 400))
    A = sp.csr_array(scales @ poisson(20) @ scales)
    b = np.random.default_rng(1).standard_normal(400)
    steps = []
    cg(A, b, rtol=1e-8, M=sp.diags_array(1 / A.diagonal()), callback=lambda x: steps.append(1))
    matrix, rhs = as_torch(A), torch.from_numpy(b)
    jacobi = Diagonal.jacobi(matrix)
    for preconditioner in (jacobi, torch.diag(jacobi.entries), lambda v: v * jacobi.entries):
        found = CG(rtol=1e-8).solve(matrix, rhs, preconditioner=preconditioner)
        assert found.status is Status.CONVERGED
        assert abs(int(found.iterations) - len(steps)) <= 2
    plain, better = (MINRES(rtol=1e-8).solve(matrix, rhs, preconditioner=M) for M in (None, jacobi))
    assert better.status is Status.CONVERGED
    assert better.iterations < plain.iterations


@pytest.mark.parametrize("method", METHODS)
def test_every_form_of_a_gives_the_same(method):
    matrix = torch.from_numpy(poisson(7).toarray())
    b = normal(2, 3, 49)
    forms = [matrix, matrix.to_sparse_csr(), matrix.to_sparse_coo(), matrix.to_sparse_csc(), Dense(matrix)]
    forms += [Sparse(matrix.to_sparse_csr()), lambda v: v @ matrix, matrix.expand(2, 3, 49, 49)]
    expected = torch.linalg.solve(matrix, b.reshape(6, 49).mT).mT.reshape(2, 3, 49)
    for A in forms:
        found = method(rtol=1e-10).solve(A, b)
        assert found.status is Status.CONVERGED
        assert found.codes.shape == (2, 3)
        torch.testing.assert_close(found.x, expected, rtol=1e-7, atol=1e-8)


# Batches, starts, tolerances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("form", ["tensors", "callable"])
def test_a_batch_takes_the_steps_of_its_systems_one_by_one(method, preconditioned, form):
    conditions = [1.0, 3.0, 10.0, 100.0, 1000.0]
    A = torch.stack([spectral(np.geomspace(1, c, 30), i) for i, c in enumerate(conditions)])
    b = normal(5, 30)
    M = Diagonal.jacobi(A) if preconditioned else None
    given_A = A if form == "tensors" else lambda v: (A @ v[:, :, None])[:, :, 0]
    together = method(rtol=1e-8).solve(given_A, b, preconditioner=M)
    assert together.converged.all()
    for i in range(5):
        alone = method(rtol=1e-8).solve(A[i], b[i], preconditioner=M and Diagonal(M.entries[i]))
        steps = int(alone.iterations)
        assert abs(int(together.iterations[i]) - steps) <= 2  # sums are taken in another order
        torch.testing.assert_close(together.x[i], alone.x, rtol=1e-6, atol=1e-8)
        common = min(steps, 15)
        torch.testing.assert_close(together.history[i, :common], alone.history[:common], rtol=1e-5, atol=1e-12)
        assert together.history[i, int(together.iterations[i]) + 1 :].isnan().all()
    assert together.iterations.tolist() == sorted(together.iterations.tolist())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_compiled_loops_do_what_the_tensor_operations_of_other_devices_do(method, preconditioned, monkeypatch):
    A = torch.stack([spectral(np.geomspace(1, c, 25), i) for i, c in enumerate([2.0, 50.0, 1e3])])
    singular = torch.diag(torch.tensor([1.0] * 24 + [0.0], dtype=torch.float64))
    A = torch.cat([A, singular[None], -torch.eye(25, dtype=torch.float64)[None]])
    b = normal(5, 25)
    M = Diagonal(torch.linspace(0.5, 2, 25, dtype=torch.float64)) if preconditioned else None
    compiled = method(rtol=1e-8).solve(A, b, preconditioner=M)
    monkeypatch.setattr(krylov_method, "COMPILED_DEVICES", frozenset())
    plain = method(rtol=1e-8).solve(A, b, preconditioner=M)
    assert compiled.statuses == plain.statuses
    assert (compiled.iterations - plain.iterations).abs().max() <= 1
    torch.testing.assert_close(compiled.x, plain.x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_near_the_answer_saves_steps_and_stays_as_it_was(method):
    A, x = spectral(np.geomspace(1, 1e3, 40), 0), normal(3, 40)
    b = x @ A
    x0 = x + 1e-6 * normal(3, 40, seed=1)
    kept = x0.clone()
    warm, cold = method(rtol=1e-6).solve(A, b, x0), method(rtol=1e-6).solve(A, b)
    assert (warm.iterations < cold.iterations).all()
    assert warm.status is Status.CONVERGED
    assert torch.equal(x0, kept)
    assert (method(rtol=1e-6).solve(A, b, x).iterations == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_tolerances_are_relative_to_b_or_absolute(method):
    A, b = spectral(np.geomspace(1, 100, 30), 0), torch.stack([normal(30), 1e-6 * normal(30)])
    relative = method(rtol=1e-6).solve(A, b)
    assert (relative.residual_norms <= 1e-6 * b.norm(dim=1)).all()
    absolute = method(rtol=0.0, atol=1e-4).solve(A, b)
    assert (absolute.residual_norms <= 1e-4).all()
    assert absolute.iterations[1] == 0
    assert 0 < absolute.iterations[0] <= relative.iterations[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_right_hand_side_has_the_answer_zero_wherever_the_solve_starts(method):
    found = method().solve(spectral([1, 2, 3], 0), torch.zeros(2, 3).double(), normal(2, 3))
    assert found.status is Status.CONVERGED
    assert not found.x.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_neither_tiny_nor_huge_numbers_overflow(method, scale):
    A, b = spectral([1, 2, 3, 4], 0), normal(4)
    found = method(rtol=1e-10).solve(A, scale * b)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.x / scale, torch.linalg.solve(A, b), rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_keeps_its_dtype_and_accuracy(method):
    A = poisson(16)
    b = normal(2, 256).float()
    found = method(rtol=1e-5).solve(as_torch(A).float(), b)
    assert found.status is Status.CONVERGED
    assert found.x.dtype == torch.float32
    assert (np.linalg.norm(b.numpy() - found.x.numpy() @ A, axis=1) <= 1.1e-5 * np.linalg.norm(b.numpy(), axis=1)).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_callback_sees_every_step(method):
    seen = []
    found = method(rtol=1e-8).solve(
        spectral(np.geomspace(1, 50, 12), 0), normal(2, 12), callback=lambda *a: seen.append(a)
    )
    assert [step for step, _ in seen] == list(range(1, len(seen) + 1))
    assert len(seen) == int(found.iterations.max())
    torch.testing.assert_close(torch.stack([norms for _, norms in seen[:5]], 1), found.history[:, 1:6])


# Solves that cannot succeed -------------------------------------------------------------------------------------------


def test_the_step_limit_is_reported_for_the_systems_that_reach_it():
    A = torch.stack([torch.eye(50).double(), spectral(np.geomspace(1, 1e4, 50), 0)])
    for method in METHODS:
        found = method(rtol=1e-8, max_steps=5).solve(A, normal(2, 50))
        assert found.statuses == (Status.CONVERGED, Status.ITERATION_LIMIT)
        assert found.status is Status.ITERATION_LIMIT
        assert found.iterations.tolist() == [1, 5]


def test_cg_notices_an_indefinite_operator_by_its_curvature():
    b = normal(2, 20)
    A = torch.stack([spectral(np.linspace(-1, 3, 20), 0), spectral(np.linspace(1, 3, 20), 0)])
    found = CG(rtol=1e-8).solve(A, b)
    assert found.statuses == (Status.INDEFINITE, Status.CONVERGED)
    assert found.residual_norms[0] <= b[0].norm()
    assert CG().solve(-torch.eye(4).double(), normal(4)).status is Status.INDEFINITE


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_operator_that_is_not_symmetric_is_never_silently_wrong(method, seed):
    A = spectral(np.geomspace(1, 100, 15), seed) + 0.5 * normal(15, 15, seed=seed)
    b = normal(15, seed=seed)
    found = method(rtol=1e-8).solve(A, b)
    if found.status is Status.CONVERGED:  # by luck, and then the true residual says so
        assert (b - A @ found.x).norm() <= 1.01e-8 * b.norm()
    else:
        assert found.status in (Status.NOT_SYMMETRIC, Status.INDEFINITE)
    assert method(rtol=1e-8, probe_symmetry=True).solve(A, b).status is Status.NOT_SYMMETRIC


@pytest.mark.parametrize("method", METHODS)
def test_symmetric_operators_pass_the_probe(method):
    found = method(probe_symmetry=True).solve(spectral(np.geomspace(1, 1e3, 30), 0), normal(3, 30))
    assert found.status is Status.CONVERGED


@pytest.mark.parametrize("method", METHODS)
def test_a_singular_system_with_an_answer_gives_the_one_nearest_to_the_start(method):
    A = spectral([0, 0, 0, 1, 2, 3, 5, 8, 13, 21], 0)
    b = A @ normal(10)
    pinv = torch.linalg.pinv(A, hermitian=True, rtol=1e-10)
    found = method(rtol=1e-10).solve(A, b)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.x, pinv @ b, rtol=1e-6, atol=1e-8)
    x0 = normal(10, seed=5)
    found = method(rtol=1e-10).solve(A, b, x0)
    torch.testing.assert_close(found.x, x0 + pinv @ (b - A @ x0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_a_singular_system_without_an_answer_is_inconsistent(seed):
    A = spectral([0, 0, 1, 2, 3, 5, 8, 13, 21, 34], seed)
    b = normal(10, seed=seed)
    pinv = torch.linalg.pinv(A, hermitian=True, rtol=1e-10)
    found = MINRES(rtol=1e-8).solve(A, b)
    assert found.status is Status.INCONSISTENT
    torch.testing.assert_close(found.x, pinv @ b, rtol=1e-5, atol=1e-6)  # the least-squares solution
    assert found.residual_norms == pytest.approx(float((b - A @ pinv @ b).norm()), rel=1e-6)
    assert CG(rtol=1e-8).solve(A, b).status is Status.INCONSISTENT


def test_an_indefinite_singular_system_without_an_answer_is_inconsistent():
    A = spectral([-3, -1, 0, 2, 4, 7], 1)
    b = normal(6)
    found = MINRES(rtol=1e-8).solve(A, b)
    assert found.status is Status.INCONSISTENT
    torch.testing.assert_close(found.x, torch.linalg.pinv(A, hermitian=True, rtol=1e-10) @ b, rtol=1e-5, atol=1e-6)


def test_bad_condition_is_not_taken_for_inconsistency():
    A = torch.diag(torch.tensor(np.geomspace(1e-7, 1, 30)))
    found = MINRES(rtol=1e-6, max_steps=5000).solve(A, torch.ones(30, dtype=torch.float64))
    assert found.status is Status.CONVERGED


@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_below_rounding_ends_in_a_status(method):
    found = method(rtol=1e-19, max_steps=3000).solve(spectral(np.geomspace(1, 1e4, 20), 0), normal(20))
    assert found.status is not Status.CONVERGED
    assert found.residual_norms <= 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_operators_and_preconditioners_that_fail_are_told_apart(method):
    A, b = spectral([1, 2, 3, 4], 0), normal(4)
    assert method().solve(lambda v: v * math.nan, b).status is Status.NOT_FINITE
    assert method().solve(A, b, preconditioner=-torch.eye(4).double()).status is Status.BAD_PRECONDITIONER


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_fit_is_named(method, without_shape_checks):
    A, b, solve = spectral([1, 2, 3], 0), normal(2, 3), method().solve
    for wrong, error, message in [
        ((A[:2], b), ValueError, "A must have shape"),
        ((A.repeat(3, 1, 1), b), ValueError, "A must have shape"),
        ((A.float(), b), TypeError, "dtype"),
        ((A * math.nan, b), ValueError, "A holds NaN"),
        (("A", b), TypeError, "A must be"),
        ((A, b * math.inf), ValueError, "b holds NaN"),
        ((A, b.long()), TypeError, "b must be float"),
        ((A, b.numpy()), TypeError, "b must be a tensor"),
        ((A, b, b[0]), ValueError, "x0 must have"),
        ((lambda v: v[:, :2], b), ValueError, "shape of v"),
        ((lambda v: v.float(), b), TypeError, "dtype"),
        ((lambda v: None, b), TypeError, "return a tensor"),
        ((torch.eye(4).double().to_sparse_csr(), b), ValueError, "A must have shape"),
        ((Dense(torch.eye(4).double()), b), ValueError, "vectors of 3"),
    ]:
        with pytest.raises(error, match=message):
            solve(*wrong)
    with pytest.raises(ValueError, match="parameters"):
        solve(A, b, parameters=(A,))
    with pytest.raises(ValueError, match="positive diagonal"):
        Diagonal.jacobi(-A)


@pytest.mark.parametrize("method", METHODS)
def test_impossible_parameters_are_named(method, without_shape_checks):
    for options in ({"rtol": -1.0}, {"rtol": 2.0}, {"atol": -1.0}, {"rtol": 0.0}, {"max_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            method(**options)
    with pytest.raises(ValueError, match="shift"):
        MINRES(shift=math.inf)


def test_scipys_operators_serve_through_a_callable():
    """A reader's LinearOperator, wrapped in one line."""
    A = poisson(6)
    theirs = LinearOperator(A.shape, matvec=lambda v: A @ v)
    found = CG(rtol=1e-8).solve(lambda v: torch.from_numpy(theirs.matmat(v.numpy().T).T.copy()), normal(3, 36))
    assert found.status is Status.CONVERGED


def test_an_operator_of_ones_own_needs_one_method():
    class Circulant(Operator):
        def product(self, v, out):
            out.copy_(3 * v - v.roll(1, 1) - v.roll(-1, 1))

    found = CG(rtol=1e-10).solve(Circulant(), normal(2, 9))
    torch.testing.assert_close(
        3 * found.x - found.x.roll(1, 1) - found.x.roll(-1, 1), normal(2, 9), rtol=1e-8, atol=1e-8
    )
