"""The iteration of arXiv 2205.10763: the authors' trace, the methods that it contains as special cases, what holds for
any map of the residual, and how a solve that cannot succeed ends."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import cg

from locally.solvers.conjugate_direction import (
    Cell,
    ConjugateDirection,
    DeflatedCG,
    Domain,
    IncompleteCholesky,
    PressureSolver,
    Status,
)
from locally.solvers.conjugate_direction.ritz import lanczos

IDENTITY = lambda r: r


@pytest.fixture
def trace(golden):
    with np.load(golden / "30-deep-conjugate-direction" / "dcdm_trace.npz") as file:
        return dict(file)


def scipy_norms(A, b, **options):
    norms = [np.linalg.norm(b)]
    cg(A, b, callback=lambda x: norms.append(np.linalg.norm(b - A @ x)), **options)
    return np.array(norms)


def random_spd(n, condition, seed):
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    A = torch.from_numpy((Q * np.geomspace(1, condition, n)) @ Q.T)
    return (A + A.T) / 2, torch.from_numpy(rng.standard_normal(n))


def random_network(n, seed, width=20):
    """A nonlinear map that knows nothing of A."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(width, n, generator=generator, dtype=torch.float64)
    V = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return lambda r: r + 0.3 * torch.relu(r @ W.T) @ V.T / width


# The authors' run -----------------------------------------------------------------------------------------------------


def test_matches_the_authors_trace(trace):
    M = torch.from_numpy(trace["operator"].astype(np.float64))

    def network(r):
        y = r @ M.T
        return y + 0.05 * y.clamp(min=0)

    A = Domain.box(6, 6, 6).operator()
    found = ConjugateDirection(direction=network, rtol=1e-6).solve(A, torch.from_numpy(trace["b"]))
    expected = trace["res_dcdm"]
    assert found.converged
    assert found.iterations == len(expected) - 1
    np.testing.assert_allclose(found.history.numpy(), expected, rtol=1e-5, atol=1e-5 * expected[0] * 1e-3)
    np.testing.assert_allclose(found.x.numpy(), trace["x_dcdm"], atol=1e-5)


def test_baselines_match_the_authors_traces(trace):
    A, b = Domain.box(6, 6, 6).matrix(), trace["b"]
    ours = DeflatedCG(vectors=16, rtol=1e-6).solve(A, b)
    assert ours.converged
    theirs = trace["res_deflated16"][1:]  # theirs begins with ||b||, and does not note where the Ritz solution starts
    np.testing.assert_allclose(ours.residual_norms[1 : len(theirs) + 1], theirs, rtol=1e-3)
    cg_like = ConjugateDirection(direction=IDENTITY, rtol=1e-6)
    identity = cg_like.solve(Domain.box(6, 6, 6).operator(), torch.from_numpy(b))
    np.testing.assert_allclose(identity.history.numpy()[:15], trace["res_cg"][:15], rtol=1e-5)


def test_lanczos_matches_the_authors_run_up_to_signs(trace):
    Q, alpha, beta = lanczos(Domain.box(6, 6, 6).matrix(), trace["lanczos_v"], 20)
    np.testing.assert_allclose(alpha, trace["lanczos_alpha"], rtol=1e-6)
    np.testing.assert_allclose(beta, trace["lanczos_beta"], rtol=1e-6)
    overlap = np.abs((Q * trace["lanczos_Q"]).sum(1))
    np.testing.assert_allclose(overlap, 1, atol=1e-5)


# Methods that it contains ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, None])
def test_identity_gives_conjugate_gradients(window):
    domain = Domain.box(16, 16)
    A = domain.matrix()
    b = np.random.default_rng(0).standard_normal(domain.n)
    method = ConjugateDirection(direction=IDENTITY, window=window, rtol=1e-8)
    found = method.solve(domain.operator(), torch.from_numpy(b))
    theirs = scipy_norms(A, b, rtol=1e-8)
    np.testing.assert_allclose(found.history.numpy()[:30], theirs[:30], rtol=1e-6)
    assert abs(int(found.iterations) - (len(theirs) - 1)) <= 1


def test_a_linear_preconditioner_gives_preconditioned_conjugate_gradients():
    domain = Domain.box(24, 24).with_ball((12, 12), 5)
    A = domain.matrix()
    M = IncompleteCholesky(A)
    b = np.random.default_rng(1).standard_normal(domain.n) * domain.fluid.reshape(-1)
    direction = lambda r: torch.from_numpy(np.stack([M @ row for row in r.numpy()]))
    found = ConjugateDirection(direction=direction, rtol=1e-8).solve(A, torch.from_numpy(b))
    theirs = scipy_norms(A, b, rtol=1e-8, M=M)
    assert abs(int(found.iterations) - (len(theirs) - 1)) <= 1
    np.testing.assert_allclose(found.history.numpy()[:15], theirs[:15], rtol=1e-6)


def test_any_multiple_of_the_inverse_needs_one_iteration():
    A, b = random_spd(40, 1e3, 0)
    inverse = torch.linalg.inv(A)
    found = ConjugateDirection(direction=lambda r: -3.7 * r @ inverse, rtol=1e-9).solve(A, b)
    assert found.converged
    assert found.iterations == 1


# What holds for any map of the residual -------------------------------------------------------------------------------


@given(n=st.integers(3, 25), condition=st.floats(1.5, 1e4), seed=st.integers(0, 2**32 - 1), window=st.integers(0, 4))
def test_the_error_never_grows_in_the_norm_of_a(n, condition, seed, window):
    A, b = random_spd(n, condition, seed)
    exact = torch.linalg.solve(A, b)
    errors = [float(exact @ A @ exact)]
    for steps in range(1, 6):
        method = ConjugateDirection(direction=random_network(n, seed), window=window, rtol=1e-14, max_iter=steps)
        e = method.solve(A, b).x - exact
        errors.append(float(e @ A @ e))
    assert all(after <= before * (1 + 1e-9) + 1e-12 * errors[0] for before, after in pairwise(errors))


@pytest.mark.parametrize("window", [1, 2, 4])
def test_directions_are_conjugate_within_the_window(window):
    A, b = random_spd(60, 100.0, 3)
    iterates = []
    for steps in range(10):
        method = ConjugateDirection(direction=random_network(60, 1), window=window, rtol=1e-14, max_iter=steps + 1)
        iterates.append(method.solve(A, b).x)
    P = torch.stack([iterates[0], *(after - before for before, after in pairwise(iterates))])
    G = P @ A @ P.T
    G = G / (G.diagonal()[:, None] * G.diagonal()).sqrt()
    near = [float(G[i, j].abs()) for i in range(10) for j in range(i) if i - j <= window]
    assert max(near) <= 1e-8


def test_full_orthogonalisation_ends_within_n_steps_where_two_directions_stall():
    """The failure mode: an untrained map. Status and history say so; nothing loops."""
    A, b = random_spd(50, 1e4, 5)
    untrained = random_network(50, 2, width=200)
    useless = lambda r: untrained(r).abs() + 0.1 * r
    short = ConjugateDirection(direction=useless, max_iter=200).solve(A, b)
    assert short.status in (Status.STAGNATED, Status.ITERATION_LIMIT)
    assert float(short.residual_norms) > 1e-4 * float(b.norm())
    full = ConjugateDirection(direction=useless, window=None, max_iter=60, rtol=1e-6).solve(A, b)
    assert full.converged
    assert full.iterations <= 50


def test_a_batch_takes_the_steps_of_its_systems_one_by_one():
    domain = Domain.box(12, 14)
    b = torch.randn(2, 2, domain.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b[1, 0] = 0
    b[1, 1] = domain.operator().apply(b[:1, 1])[0]
    method = ConjugateDirection(direction=random_network(domain.n, 0), rtol=1e-5)
    together = method.solve(domain.operator(), b)
    for i in range(2):
        for j in range(2):
            alone = method.solve(domain.operator(), b[i, j])
            assert together.iterations[i, j] == alone.iterations
            torch.testing.assert_close(together.x[i, j], alone.x, rtol=1e-9, atol=1e-9)
            steps = int(alone.iterations) + 1
            torch.testing.assert_close(together.history[i, j, :steps], alone.history, rtol=1e-6, atol=1e-9)
            assert together.history[i, j, steps:].isnan().all()
    assert together.iterations[1, 0] == 0


def test_a_start_near_the_answer_saves_iterations_and_stays_as_it_was():
    A, b = random_spd(30, 1e3, 8)
    exact = torch.linalg.solve(A, b)
    x0 = exact + 1e-6 * torch.ones_like(b)
    kept = x0.clone()
    method = ConjugateDirection(direction=IDENTITY, rtol=1e-5)
    assert method.solve(A, b, x0).iterations < method.solve(A, b).iterations
    assert torch.equal(x0, kept)


# Bad matrices, bad maps -----------------------------------------------------------------------------------------------


def test_an_indefinite_matrix_is_noticed():
    A = torch.diag(torch.tensor([3.0, 2.0, -1.0, 5.0], dtype=torch.float64))
    found = ConjugateDirection(direction=IDENTITY, rtol=1e-10).solve(A, torch.tensor([0.1, 0.1, 1.0, 0.1]).double())
    assert found.status is Status.INDEFINITE


def test_an_unsymmetric_matrix_is_noticed():
    A, b = random_spd(20, 10.0, 1)
    A[3, 7] += 0.5
    assert ConjugateDirection(direction=IDENTITY).solve(A, b).status is Status.NOT_SYMMETRIC


def test_a_matrix_that_returns_nan_is_noticed():
    found = ConjugateDirection(direction=IDENTITY).solve(lambda v: v * torch.nan, torch.ones(5))
    assert found.status is Status.NOT_FINITE


@pytest.mark.parametrize("bad", [torch.nan, 0.0, torch.inf])
def test_useless_directions_fall_back_to_the_residual_and_are_counted(bad):
    A, b = random_spd(20, 100.0, 2)
    found = ConjugateDirection(direction=lambda r: r * bad, rtol=1e-6).solve(A, b)
    plain = ConjugateDirection(direction=IDENTITY, rtol=1e-6).solve(A, b)
    assert found.converged
    assert found.fallbacks == found.iterations == plain.iterations
    assert plain.fallbacks == 0


def test_a_tolerance_below_rounding_ends_in_a_status():
    A, b = random_spd(20, 1e6, 2)
    found = ConjugateDirection(direction=IDENTITY, rtol=1e-18, max_iter=10_000).solve(A, b)
    assert found.status is Status.STAGNATED
    assert found.iterations < 1000


def test_single_precision_reaches_its_own_accuracy():
    domain = Domain.box(16, 16)
    b = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    found = PressureSolver(rtol=1e-5).solve(domain, b)
    assert found.converged
    assert found.x.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "window"),
        ({"rtol": -1e-3}, "rtol"),
        ({"rtol": 0.0}, "both"),
        ({"max_iter": 0}, "max_iter"),
        ({"patience": 0}, "patience"),
    ],
)
def test_impossible_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ConjugateDirection(direction=IDENTITY, **options)


def test_what_does_not_fit_is_named(without_shape_checks):
    A, b = random_spd(6, 10.0, 0)
    method = ConjugateDirection(direction=IDENTITY)
    with pytest.raises(TypeError, match="direction"):
        ConjugateDirection(direction=3)
    with pytest.raises(ValueError, match="one matrix"):
        method.solve(A.repeat(2, 1, 1), b.repeat(2, 1))
    with pytest.raises(ValueError, match="b holds NaN"):
        method.solve(A, b * torch.nan)
    with pytest.raises(ValueError, match="A must have shape"):
        method.solve(A, b[:5])
    with pytest.raises(ValueError, match="square"):
        method.solve(sp.csr_array((5, 6)), b)
    with pytest.raises(ValueError, match="direction must return"):
        ConjugateDirection(direction=lambda r: r[:, :3]).solve(A, b)
    with pytest.raises(ValueError, match="orthonormal"):
        method.solve(A, b, null_space=torch.ones(1, 6).double())
    with pytest.raises(ValueError, match="null vectors"):
        method.solve(A, b, null_space=torch.eye(6).double()[:1])


# Singular systems -----------------------------------------------------------------------------------------------------


def closed_box():
    domain = Domain.box(12, 12, outside=Cell.SOLID)
    b = np.random.default_rng(4).standard_normal(domain.shape)
    return domain, torch.from_numpy(b - b.mean())


def test_pure_neumann_gives_the_answer_of_mean_zero():
    domain, b = closed_box()
    found = PressureSolver(rtol=1e-8).solve(domain, b)
    expected = np.linalg.pinv(domain.matrix().toarray()) @ b.numpy().reshape(-1)
    assert found.converged
    np.testing.assert_allclose(found.x.numpy().reshape(-1), expected, atol=1e-6)


def test_without_the_null_space_a_compatible_system_converges_too():
    domain, b = closed_box()
    found = ConjugateDirection(direction=IDENTITY, rtol=1e-8).solve(domain.operator(), b.reshape(-1))
    assert found.converged


def test_an_incompatible_system_gives_its_least_squares_answer_and_says_so():
    domain, b = closed_box()
    found = PressureSolver(rtol=1e-8).solve(domain, b + 0.3)
    assert found.status is Status.INCONSISTENT
    expected = np.linalg.pinv(domain.matrix().toarray()) @ b.numpy().reshape(-1)
    np.testing.assert_allclose(found.x.numpy().reshape(-1), expected, atol=1e-5)
    assert float(found.residual_norms) == pytest.approx(0.3 * 12, rel=1e-6)


@pytest.mark.parametrize("direction", [IDENTITY, random_network(144, 7)])
def test_without_the_null_space_an_incompatible_system_is_still_told_apart(direction):
    domain, b = closed_box()
    found = ConjugateDirection(direction=direction, rtol=1e-8).solve(domain.operator(), (b + 0.3).reshape(-1))
    assert found.status is Status.INCONSISTENT
    expected = np.linalg.pinv(domain.matrix().toarray()) @ b.numpy().reshape(-1)
    np.testing.assert_allclose(found.x.numpy(), expected, atol=1e-5)


def test_a_zero_matrix_has_no_answer_but_for_zero():
    method = ConjugateDirection(direction=IDENTITY)
    A = torch.zeros(4, 4, dtype=torch.float64)
    assert method.solve(A, torch.ones(4, dtype=torch.float64)).status is Status.INCONSISTENT
    assert method.solve(A, torch.zeros(4, dtype=torch.float64)).converged


# Baselines ------------------------------------------------------------------------------------------------------------


def test_incomplete_cholesky_reproduces_a_on_its_pattern():
    domain = Domain.box(9, 8).with_ball((4, 4), 2)
    A = domain.matrix()
    M = IncompleteCholesky(A)
    L = sp.csr_array((M.factor[2], M.factor[1], M.factor[0]), shape=A.shape)
    difference = (L @ L.T - A).toarray()[A.toarray() != 0]
    assert np.abs(difference).max() <= 1e-12
    assert M.replaced_pivots == 0
    assert not (M @ np.ones(domain.n))[~domain.fluid.reshape(-1)].any()


def test_incomplete_cholesky_refuses_a_bad_diagonal():
    with pytest.raises(ValueError, match="positive diagonal"):
        IncompleteCholesky(sp.csr_array(np.array([[1.0, 2.0], [2.0, -1.0]])))


def test_deflated_cg_solves_to_its_tolerance():
    domain = Domain.box(20, 20)
    b = np.random.default_rng(2).standard_normal(domain.n)
    found = DeflatedCG(rtol=1e-8).solve(domain.matrix(), b)
    assert found.converged
    assert np.linalg.norm(b - domain.matrix() @ found.x) <= 1.01e-8 * np.linalg.norm(b)
    assert DeflatedCG().solve(domain.matrix(), 0 * b).converged
