"""SOR and SSOR-CG against direct solves and golden counts, the bounds on their iterations, and the tuned solver."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import cg, spsolve

from locally.linalg.relaxation import (
    Splitting,
    SSORPreconditioner,
    optimal_omega,
    relax,
    sor_iteration_counts,
    sor_residual_map,
    young_radius,
)
from locally.papers.learning_to_relax import HeatEquation, laplacian
from locally.solvers.omega_bandit import (
    SOR,
    ChebCB,
    Solution,
    SSORConjugateGradients,
    Status,
    TsallisINF,
    TunedSolver,
    asymptocity,
    energy_norm_factor,
    energy_norm_iterations,
    near_asymptotic_cost,
    ssor_cg_iterations,
    tune_sequence,
)

SOLVERS = {
    "SOR": SOR(),
    "SSOR-CG": SSORConjugateGradients(),
    "SSOR-CG, forward first": SSORConjugateGradients(order="forward first"),
}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@solvers
@given(m=st.integers(1, 8), omega=st.floats(0.3, 1.8), seed=st.integers(0, 2**32 - 1), warm=st.booleans())
def test_answers_are_those_of_a_direct_solve_at_every_omega(solver, m, omega, seed, warm):
    rng = np.random.default_rng(seed)
    A = laplacian(m) + sp.diags_array(rng.uniform(0, 1, m * m))
    b = rng.standard_normal(m * m)
    x0 = rng.standard_normal(m * m) if warm else None
    found = solver.solve(A, b, omega=omega, x0=x0)
    assert found.status is Status.CONVERGED
    assert found.omega == omega
    assert np.linalg.norm(b - A @ found.x) == pytest.approx(found.relative_residual * np.linalg.norm(b), rel=1e-3)
    assert found.relative_residual <= 1e-8
    np.testing.assert_allclose(found.x, spsolve(A.tocsc(), b).reshape(-1), atol=1e-6)


def test_sor_at_omega_one_is_gauss_seidel():
    A, b = laplacian(6), np.random.default_rng(0).standard_normal(36)
    x = np.zeros(36)
    relax(A, x, b, sweeps=20)
    found = SOR(rtol=1e-14, max_iter=20).solve(A, b, omega=1.0)
    assert found.status is Status.ITERATION_LIMIT
    np.testing.assert_allclose(found.x, x, rtol=1e-12)


def test_carried_residuals_are_true_residuals():
    """What the callback sees is C^k r_0, from the recurrence; it agrees with b - A x to rounding."""
    A, b = laplacian(6), np.random.default_rng(0).standard_normal(36)
    C, seen = sor_residual_map(A, 1.5), []
    found = SOR().solve(A, b, omega=1.5, callback=lambda k, norm: seen.append((k, norm)))
    assert [k for k, _ in seen] == list(range(1, found.n_iter + 1))
    r = b
    for _, norm in seen:
        r = C @ r
        assert norm == pytest.approx(np.linalg.norm(r) / np.linalg.norm(b), rel=1e-6)


@solvers
def test_a_callback_changes_nothing(solver):
    A, b = laplacian(7), np.random.default_rng(1).standard_normal(49)
    norms = []
    watched = solver.solve(A, b, omega=1.4, callback=lambda k, norm: norms.append(norm))
    alone = solver.solve(A, b, omega=1.4)
    assert len(norms) == watched.n_iter == alone.n_iter
    np.testing.assert_array_equal(watched.x, alone.x)


def test_sor_counts_are_the_golden_ones(golden):
    with np.load(golden / "09-learning-to-relax" / "sor_bandit.npz") as z:
        for t in range(0, 60, 7):
            A = laplacian(10) + float(z["c"][t]) * sp.eye_array(100)
            counts = [SOR().solve(A, z["b"][t], omega=omega).n_iter for omega in z["omegas"].tolist()]
            np.testing.assert_array_equal(counts, z["sor_counts"][t])


def test_heat_counts_are_the_golden_ones(golden):
    """SSOR-CG and SciPy's CG on steps of the heat equation, within one iteration; contexts to rounding."""
    with np.load(golden / "09-learning-to-relax" / "heat25_steps0_600.npz") as z:
        heat, solver = HeatEquation(25), SSORConjugateGradients()
        for step in range(600):
            assert heat.context == pytest.approx(z["context"][step], abs=1e-12)
            A, b = heat.system()
            arms = range(20) if step % 40 == 0 else (8,)
            found = {arm: solver.solve(A, b, omega=float(z["omegas"][arm]), x0=heat.u) for arm in arms}
            for arm, solution in found.items():
                assert abs(solution.n_iter - z["ssor_counts"][step, arm]) <= 1
            if step % 40 == 0:
                plain = []
                cg(heat.A, b, x0=heat.u, rtol=1e-8, callback=plain.append)
                assert abs(len(plain) - z["cg_counts"][step]) <= 1
            heat.advance(found[8].x)


@pytest.mark.parametrize("order", ["backward first", "forward first"])
def test_ssor_cg_takes_the_iterations_of_scipys_with_the_same_preconditioner(order):
    A, b = laplacian(20), np.random.default_rng(2).standard_normal(400)
    for omega in (0.8, 1.0, 1.5, 1.8):
        steps = []
        x, _ = cg(A, b, M=SSORPreconditioner(A, omega, order=order), rtol=1e-8, callback=steps.append)
        found = SSORConjugateGradients(order=order).solve(A, b, omega=omega)
        assert abs(found.n_iter - len(steps)) <= 1
        np.testing.assert_allclose(found.x, x, atol=1e-6)


def test_both_orders_are_one_method_up_to_the_numbering_of_the_unknowns():
    rng = np.random.default_rng(3)
    A, b = laplacian(9) + sp.diags_array(rng.uniform(0, 2, 81)), rng.standard_normal(81)
    mirror = sp.csr_array(A.toarray()[::-1, ::-1])
    one = SSORConjugateGradients(order="backward first").solve(A, b, omega=1.6)
    two = SSORConjugateGradients(order="forward first").solve(mirror, b[::-1].copy(), omega=1.6)
    assert one.n_iter == two.n_iter
    np.testing.assert_allclose(one.x, two.x[::-1], rtol=1e-9)


def test_a_diagonal_matrix_takes_one_iteration():
    A, b = sp.diags_array([1.0, 5.0, 25.0], format="csr"), np.ones(3)
    for omega in (0.5, 1.0, 1.7):
        assert SSORConjugateGradients().solve(A, b, omega=omega).n_iter == 1
    assert SOR().solve(A, b, omega=1.0).n_iter == 1


@solvers
def test_starts_that_are_good_enough_take_no_iteration(solver):
    A, b = laplacian(4), np.random.default_rng(4).standard_normal(16)
    exact = spsolve(A.tocsc(), b)
    found = solver.solve(A, b, x0=exact)
    assert (found.n_iter, found.status) == (0, Status.CONVERGED)
    zero = solver.solve(A, np.zeros(16), x0=exact)
    assert (zero.n_iter, zero.status) == (0, Status.CONVERGED)
    assert not zero.x.any()


@solvers
def test_counts_do_not_see_the_scale_of_b_and_input_is_left_alone(solver):
    A, b, x0 = laplacian(6), np.random.default_rng(5).standard_normal(36), np.ones(36)
    copies = A.data.copy(), b.copy(), x0.copy()
    assert solver.solve(A, b).n_iter == solver.solve(A, 1e9 * b).n_iter == solver.solve(A, 1e-9 * b).n_iter
    solver.solve(A, b, x0=x0)
    for now, before in zip((A.data, b, x0), copies):
        np.testing.assert_array_equal(now, before)


@solvers
def test_single_precision_is_followed_and_its_limit_is_admitted(solver):
    A, b = laplacian(8).astype(np.float32), np.random.default_rng(6).standard_normal(64).astype(np.float32)
    coarse = type(solver)(rtol=1e-4)
    found = coarse.solve(A, b, omega=1.4)
    assert found.x.dtype == np.float32
    assert found.converged
    stuck = type(solver)(rtol=1e-12).solve(A, b, omega=1.4)
    assert stuck.status is Status.STAGNATED
    assert 1e-12 < stuck.relative_residual < 1e-5


def test_the_iteration_limit_is_a_status():
    A, b = laplacian(10), np.ones(100)
    found = SOR(max_iter=7).solve(A, b, omega=1.5)
    assert (found.n_iter, found.status) == (7, Status.ITERATION_LIMIT)
    assert found.relative_residual > 1e-8


def test_indefinite_matrices_end_in_a_status():
    A = np.array([[1.0, 3.0], [3.0, 1.0]])
    b = np.array([1.0, -2.0])
    assert SSORConjugateGradients().solve(A, b).status is Status.BREAKDOWN
    assert SOR().solve(A, b).status is Status.DIVERGED


@solvers
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"omega": 2.0}, ValueError, "omega"),
        ({"omega": -0.5}, ValueError, "omega"),
        ({"b": np.ones(3)}, ValueError, "b must have shape"),
        ({"b": np.array([1.0, np.nan, 0, 0])}, ValueError, "b holds NaN"),
        ({"b": np.ones(4) * 1j}, TypeError, "b must be real"),
        ({"x0": np.ones(5)}, ValueError, "x0 must have shape"),
        ({"A": np.ones((2, 3))}, ValueError, "square"),
        ({"A": np.diag([1.0, 0.0, 1.0, 1.0])}, ValueError, "positive diagonal"),
    ],
)
def test_bad_problems_are_refused(solver, change, error, message, without_shape_checks):
    arguments = {"A": laplacian(2), "b": np.ones(4)} | change
    with pytest.raises(error, match=message):
        solver.solve(arguments.pop("A"), arguments.pop("b"), **arguments)


def test_conjugate_gradients_refuse_what_is_not_symmetric():
    with pytest.raises(ValueError, match="A must be symmetric"):
        SSORConjugateGradients().solve(np.array([[2.0, 1.0], [0.0, 2.0]]), np.ones(2))


@pytest.mark.parametrize("make", [SOR, SSORConjugateGradients])
@pytest.mark.parametrize("arguments", [{"rtol": 0.0}, {"rtol": 1.0}, {"rtol": float("nan")}, {"max_iter": 0}])
def test_bad_solvers_are_refused(make, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(**arguments)


# Bounds


@pytest.mark.parametrize("shift", [-0.15, 0.0, 0.45])
def test_sor_stays_under_the_near_asymptotic_surrogate(shift):
    """SOR(omega) <= U(omega), and U falls to the best omega and rises after it."""
    omegas = np.linspace(1, 1.95, 20)
    A = laplacian(10) + shift * sp.eye_array(100)
    b = np.random.default_rng(7).standard_normal(100)
    counts = sor_iteration_counts(A, np.zeros(1), b[None], omegas)[0]
    tau = asymptocity(A, omegas, counts)
    beta = 4 * np.cos(np.pi / 11) / (4 + shift)
    bounds = np.array([near_asymptotic_cost(young_radius(w, beta), tau, 1e-8) for w in omegas.tolist()])
    assert (counts <= bounds).all()
    best = optimal_omega(beta)
    assert (np.diff(bounds[omegas <= best]) < 0).all()
    assert (np.diff(bounds[omegas >= best]) > 0).all()


def test_the_surrogate_has_the_value_of_its_formula():
    assert near_asymptotic_cost(0.0, 0.0, 1e-8) == 1.0
    assert near_asymptotic_cost(0.5, 0.0, 2.0**-10) == pytest.approx(11)
    assert near_asymptotic_cost(0.0, 0.25, 2.0**-10) == pytest.approx(6)


@given(st.integers(2, 6), st.floats(0.1, 1.9), st.floats(0, 1))
def test_the_energy_norm_of_the_error_falls_by_the_factor(m, omega, shift):
    A = (laplacian(m) + shift * sp.eye_array(m * m)).toarray()
    M = np.tril(A, -1) + np.diag(np.diag(A)) / omega
    values, vectors = np.linalg.eigh(A)
    root, inverse = (vectors * values**p @ vectors.T for p in (0.5, -0.5))
    factor = np.linalg.norm(root @ (np.eye(m * m) - np.linalg.solve(M, A)) @ inverse, 2)
    assert factor <= energy_norm_factor(A, omega) + 1e-12


@pytest.mark.parametrize("omega", [0.7, 1.0, 1.4, 1.7, 1.9])
def test_iteration_bounds_hold_from_zero(omega):
    rng = np.random.default_rng(8)
    A = laplacian(8) + sp.diags_array(rng.uniform(0, 0.5, 64))
    for _ in range(5):
        b = rng.standard_normal(64)
        assert SOR().solve(A, b, omega=omega).n_iter <= energy_norm_iterations(A, omega, 1e-8)
        for order in ("backward first", "forward first"):
            cg_solver = SSORConjugateGradients(order=order)
            assert cg_solver.solve(A, b, omega=omega).n_iter <= ssor_cg_iterations(A, omega, 1e-8)


def test_the_cg_bound_sees_the_spectrum_of_the_preconditioned_matrix():
    """Its condition number bounds the true one, tightly enough to be of use."""
    A = laplacian(8)
    for omega in (1.0, 1.5):
        P = np.linalg.inv(np.column_stack([SSORPreconditioner(A, omega) @ e for e in np.eye(64)]))
        eigenvalues = np.linalg.eigvals(np.linalg.solve(P, A.toarray())).real
        kappa = eigenvalues.max() / eigenvalues.min()
        amplification = np.sqrt(np.linalg.cond(A.toarray())) / 1e-8
        tight = 1 + np.arccosh(amplification) / -np.log(1 - 2 / (1 + np.sqrt(kappa)))
        assert tight <= ssor_cg_iterations(A, omega, 1e-8) <= 2 * tight


@pytest.mark.parametrize("bad", [{"radius": 1.0}, {"radius": -0.1}, {"tau": 1.0}, {"rtol": 0.0}])
def test_bad_surrogates_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        near_asymptotic_cost(**({"radius": 0.5, "tau": 0.1, "rtol": 1e-8} | bad))


def test_bounds_need_a_positive_definite_matrix():
    with pytest.raises(ValueError, match="positive definite"):
        energy_norm_iterations(np.array([[1.0, 0.9, 0.9], [0.9, 1.0, -0.9], [0.9, -0.9, 1.0]]), 1.0, 1e-8)


# Tuned solver


def test_a_tuned_sequence_learns_and_answers_as_accurately_as_any_omega():
    rng = np.random.default_rng(9)
    A, eye = laplacian(10), sp.eye_array(100, format="csr")
    shifts = rng.uniform(-0.15, 0.45, 600).tolist()
    problems = [(sp.csr_array(A + c * eye), rng.standard_normal(100), c) for c in shifts]
    tuned = TunedSolver(SOR(), ChebCB(np.linspace(1, 1.95, 20), (-0.15, 0.65), rng=0))
    worst = []
    done = tune_sequence(problems, tuned, callback=lambda _, found: worst.append(found.relative_residual))
    assert max(worst) <= 1e-8
    assert done.converged.all()
    assert done.total_iterations == done.iterations.sum()
    gauss_seidel = [SOR().solve(A, b).n_iter for A, b, _ in problems[-100:]]
    assert done.iterations[-100:].mean() < 0.2 * np.mean(gauss_seidel)


def test_context_from_the_matrix_and_warm_starts():
    A, eye = laplacian(6), sp.eye_array(36, format="csr")
    bandit = ChebCB([1.0, 1.5], (4.0, 5.0), rng=0)
    seen = []
    ask = bandit.ask
    bandit.ask = lambda context=None: (seen.append(context), ask(context))[1]
    tuned = TunedSolver(SSORConjugateGradients(), bandit, context=lambda A, b: float(A.diagonal()[0]))
    done = tune_sequence([(sp.csr_array(A + c * eye), np.ones(36)) for c in (0.0, 0.5, 0.5)], tuned, warm_start=True)
    assert seen == [4.0, 4.5, 4.5]
    assert done.iterations[0] > 0
    assert done.iterations[2] == 0  # the same system again, from its own solution


def test_problems_may_depend_on_the_last_solution():
    heat = HeatEquation(10)
    tuned = TunedSolver(SSORConjugateGradients(), TsallisINF([1.0, 1.4], rng=0))

    def steps():
        for _ in range(30):
            yield heat.system()

    done = tune_sequence(steps(), tuned, warm_start=True, callback=lambda _, found: heat.advance(found.x))
    assert heat.step == 30
    np.testing.assert_array_equal(done.last.x, heat.u)


def test_solves_that_fail_cost_the_limit_however_soon_they_stop():
    bandit = TsallisINF([1.0, 1.5], rng=0)
    told = []
    bandit.tell = lambda cost, choice: told.append(cost)
    tuned = TunedSolver(SSORConjugateGradients(max_iter=50), bandit)
    assert tuned.solve(np.array([[1.0, 3.0], [3.0, 1.0]]), np.array([1.0, -2.0])).status is Status.BREAKDOWN
    assert told == [50]


def test_a_solve_that_raises_teaches_nothing():
    bandit = TsallisINF([1.0, 1.5], rng=0)
    tuned = TunedSolver(SOR(), bandit)
    with pytest.raises(ValueError, match="b holds NaN"):
        tuned.solve(laplacian(2), np.full(4, np.nan))
    assert bandit.open_asks == ()
    np.testing.assert_allclose(bandit.distribution(), 0.5)


def test_any_cost_can_be_tuned():
    """Here the answer's distance from omega = 1.5, and not an iteration count, decides."""
    bandit = TsallisINF([1.0, 1.25, 1.5, 1.75], min_cost=0.0, rng=0)
    tuned = TunedSolver(SOR(), bandit, cost=lambda found: 100 * abs(found.omega - 1.5))
    for _ in range(400):
        tuned.solve(laplacian(3), np.ones(9))
    assert bandit.distribution().argmax() == 2


def test_solvers_of_others_fit_in():
    class Direct:
        max_iter = 1

        def solve(self, A, b, *, omega, x0=None):
            return Solution(spsolve(A.tocsc(), b), Status.CONVERGED, 1, omega, 0.0)

    tuned = TunedSolver(Direct(), TsallisINF([1.0], rng=0))
    np.testing.assert_allclose(laplacian(3) @ tuned.solve(laplacian(3), np.ones(9)).x, 1)


def test_a_splitting_is_taken_in_place_of_the_matrix():
    A, b = laplacian(6), np.ones(36)
    for solver in SOLVERS.values():
        np.testing.assert_array_equal(solver.solve(Splitting.of(A), b).x, solver.solve(A, b).x)


def test_bad_glue_is_refused(without_shape_checks):
    with pytest.raises(ValueError, match="grid of the bandit"):
        TunedSolver(SOR(), TsallisINF([1.0, 2.0]))
    with pytest.raises(TypeError, match="bandit must offer"):
        TunedSolver(SOR(), [1.0, 1.5])
    with pytest.raises(ValueError, match="at least one"):
        tune_sequence([], TunedSolver(SOR(), TsallisINF([1.0])))
