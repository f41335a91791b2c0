"""AdaSketch-Newton: published traces, the theory's invariants, robustness where a plain copy fails, bad input."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from locally.linalg.sketching import CountSketch, Kaczmarz
from locally.optimize.constrained import (
    L1SQP,
    AdaSketchNewton,
    AugmentedLagrangian,
    EqualityProblem,
    ExactAugmentedLagrangian,
    Status,
    constrained_logistic,
    hock_schittkowski,
    poisson_control,
)
from locally.optimize.constrained.inner import Accuracy, InnerSolve
from locally.optimize.constrained.kkt import (
    Measured,
    convex_on_null_space,
    frobenius,
    newton_system,
    smallest_eigenvalue,
    smallest_of_gram,
)
from locally.optimize.constrained.problem import Evaluator
from locally.optimize.constrained.problems import NAMES, problem_of

TRACED = ("HS6", "HS7", "HS28", "HS40", "HS42", "HS47", "HS48", "HS77", "HS79")


def point(instance, x=None, lam=None):
    """First-order information and Hessian, at the start or elsewhere."""
    evaluate = Evaluator(instance.problem)
    x = instance.x0 if x is None else x
    lam = instance.lam0 if lam is None else lam
    return evaluate.point(x, lam), evaluate.hessian(x, lam)


def solve(name, **options):
    instance = hock_schittkowski(name)
    return AdaSketchNewton(**options).solve(instance.problem, instance.x0, instance.lam0)


def regression(seed):
    X, y = load_breast_cancer(return_X_y=True)
    return constrained_logistic(StandardScaler().fit_transform(X), 2.0 * y - 1, random_state=seed)


# Published runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces(request):
    path = request.path.parent.parent / "golden" / "01-adasketch-newton" / "cutest_traces.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize(("sketch", "key"), [("kaczmarz", "adasketch_rk"), ("gaussian", "adasketch_gv")])
def test_sketched_runs_take_the_published_steps(name, sketch, key, traces):
    found, published = solve(name, sketch=sketch), traces[name][key]
    kkt, steps = np.array(published["kkt"]), published["alpha"]
    # published inner solves that their cap ended short move what follows
    kept = {("HS47", "kaczmarz"): 12, ("HS47", "gaussian"): 3, ("HS77", "gaussian"): 5}.get((name, sketch), len(steps))
    kkt, steps = kkt[: kept + 1], steps[:kept]
    assert list(found.alpha_history[: len(steps)]) == steps
    shown = kkt > 1e-6  # below, the accuracy of the inner solves shows
    np.testing.assert_allclose(np.array(found.kkt_history)[: len(kkt)][shown], kkt[shown], rtol=1e-3)
    assert found.success


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize(
    ("solver", "key"), [(L1SQP(), "gmres_l1_adap"), (L1SQP(adaptive=False, exchanged=True), "gmres_l1")]
)
def test_l1_runs_take_the_published_steps(name, solver, key, traces):
    instance, published = hock_schittkowski(name), traces[name][key]
    found = solver.solve(instance.problem, instance.x0)
    length = len(published["alpha"])
    assert list(found.alpha_history[:length]) == published["alpha"]
    np.testing.assert_allclose(found.kkt_history[: len(published["kkt"])], published["kkt"], rtol=1e-3)
    if (name, key) != ("HS77", "gmres_l1"):  # 172 iterations against 179
        assert found.nit == published.get("nit", length)
        # one evaluation a trial step and one more at each new iterate, of two functions each
        assert 2 * (found.nfev + found.nit) == published["objcon_eval"]
        assert 2 * found.njev == published["grad_eval"]


def test_penalties_end_where_published_runs_end():
    last = {name: solve(name) for name in ("HS6", "HS40", "HS42", "HS47", "HS100LNP")}
    etas = {name: (found.eta1_history[-1], found.eta2_history[-1]) for name, found in last.items()}
    expected = {
        "HS6": (1, 0.1),
        "HS40": (2.25, 0.1 / 1.5),
        "HS42": (2.25**2, 0.1 / 1.5**2),
        "HS100LNP": (2.25**2, 0.1 / 1.5**2),
        "HS47": (2.25**4, 0.1 / 1.5**4),
    }
    for name, pair in expected.items():
        assert etas[name] == pytest.approx(pair), name


# The merit function ---------------------------------------------------------------------------------------------------

states = {
    "name": st.sampled_from(NAMES),
    "seed": st.integers(0, 2**32 - 1),
    "eta1": st.floats(0.01, 100),
    "eta2": st.floats(0.001, 10),
}


def nearby(name, seed):
    """A random point with random multipliers not far from the start."""
    instance = hock_schittkowski(name)
    rng = np.random.default_rng(seed)
    return instance, instance.x0 + 0.3 * rng.standard_normal(instance.x0.size), rng.standard_normal(instance.lam0.size)


@given(**states)
def test_slope_along_an_exact_step_is_the_identity_of_the_theory(name, seed, eta1, eta2):
    """grad M . z = -dx' H dx + 2 c . dlam - eta1 ||c||^2 - eta2 ||grad L||^2 for B = H."""
    instance, x, lam = nearby(name, seed)
    at, H = point(instance, x, lam)
    gamma = np.block([[H, at.G.T], [at.G, np.zeros((lam.size, lam.size))]])
    if np.linalg.cond(gamma) > 1e8:
        return
    z = np.linalg.solve(gamma, -at.residual)
    dx, dlam = z[: x.size], z[x.size :]
    slope = ExactAugmentedLagrangian(eta1, eta2).gradient(at, H) @ z
    terms = np.array([-dx @ H @ dx, 2 * at.c @ dlam, -eta1 * at.c @ at.c, -eta2 * at.gL @ at.gL])
    assert slope == pytest.approx(terms.sum(), abs=1e-8 * np.linalg.cond(gamma) ** 0.5 * np.abs(terms).max())


@given(**states)
@settings(max_examples=25)
def test_the_merit_gradient_is_the_merits_slope(name, seed, eta1, eta2):
    """Central differences; the Hessian of the objective alone in place of the Lagrangian's would fail."""
    instance, x, lam = nearby(name, seed)
    merit = ExactAugmentedLagrangian(eta1, eta2)
    at, H = point(instance, x, lam)
    v = np.random.default_rng(seed).standard_normal(x.size + lam.size)
    h = 1e-5 / np.linalg.norm(v)
    evaluate = Evaluator(instance.problem)
    along = lambda t: merit.value(evaluate.point(x + t * v[: x.size], lam + t * v[x.size :]))
    scale = np.linalg.norm(merit.gradient(at, H)) * np.linalg.norm(v)
    noise = 1e-16 * abs(merit.value(at)) / h
    assert (along(h) - along(-h)) / (2 * h) == pytest.approx(
        merit.gradient(at, H) @ v, abs=1e-5 * scale + 100 * noise + 1e-7
    )


# Whole solves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_that_of_scipy(name):
    instance = hock_schittkowski(name)
    found = solve(name, tol=1e-8)
    assert found.success, found.message
    p = instance.problem
    theirs = minimize(
        p.fun,
        instance.x0,
        jac=p.grad,
        method="SLSQP",
        constraints={"type": "eq", "fun": p.constr, "jac": p.jac},
        options={"ftol": 1e-14, "maxiter": 100},
    )
    assert found.fun == pytest.approx(instance.optimum, abs=1e-6, rel=1e-7)
    if name != "HS47":  # a flat valley, on which SLSQP stops early
        np.testing.assert_allclose(found.x, theirs.x, atol=2e-4 if name == "HS50" else 1e-5)


@pytest.mark.parametrize("name", ["HS28", "HS48", "HS51", "HS52"])
@pytest.mark.parametrize("sketch", ["kaczmarz", "gaussian", "block-gaussian", "count", "sparse"])
def test_a_linear_quadratic_problem_takes_one_step(name, sketch):
    found = solve(name, sketch=sketch, block_size=1 if sketch in ("kaczmarz", "gaussian") else 4)
    assert found.alpha_history == (1.0,)
    assert found.kkt <= 1e-8


def test_a_linear_square_system_takes_one_step():
    """BOOTH: as many equations as unknowns and no objective."""
    problem = problem_of(lambda x, y: (0 * x, x + 2 * y - 7, 2 * x + y - 5), np.zeros(2))
    found = AdaSketchNewton().solve(problem, np.zeros(2))
    assert (found.nit, found.shifts) == (1, 0)
    np.testing.assert_allclose(found.x, [1, 3], atol=1e-8)


def test_a_curved_square_system_is_solved_by_damped_newton():
    """CUBENE."""
    x0 = np.array([-1.2, 1.0])
    problem = problem_of(lambda x, y: (0 * x, x - 1, 10 * (y - x**3)), x0)
    found = AdaSketchNewton().solve(problem, x0)
    assert found.success
    np.testing.assert_allclose(found.x, 1, atol=1e-5)


def test_without_constraints_it_is_a_newton_method():
    x0 = np.array([-1.2, 1.0])
    rosenbrock = problem_of(lambda x, y: (100 * (y - x**2) ** 2 + (1 - x) ** 2,), x0)
    found = AdaSketchNewton(tol=1e-7).solve(rosenbrock, x0)
    assert found.success
    np.testing.assert_allclose(found.x, 1, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_penalties_move_in_one_direction_and_the_descent_is_armijos(name):
    found = solve(name)
    assert np.all(np.diff(found.eta1_history) >= 0)
    assert np.all(np.diff(found.eta2_history) <= 0)
    assert np.all(np.diff(found.delta_history) <= 0)
    assert min(found.delta_history) >= 1e-6
    assert all(np.log2(a) == round(np.log2(a)) and a <= 1 for a in found.alpha_history)
    assert len(found.kkt_history) == found.nit + 1
    assert found.nfev == found.njev == 1 + sum(1 - int(np.log2(a)) for a in found.alpha_history)


@pytest.mark.parametrize("name", ["HS78", "HS79"])
def test_theta_to_zero_makes_it_superlinear(name):
    plain = {"accuracy": "plain", "tol": 1e-9}
    for seed in (0, 1):
        constant = solve(name, theta="constant", random_state=seed, **plain)
        fast = solve(name, theta="superlinear", random_state=seed, **plain)
        last = np.log(fast.kkt_history[-1]) / np.log(fast.kkt_history[-2])
        assert last >= 1.5
        ratios = np.array(constant.kkt_history[1:]) / constant.kkt_history[:-1]
        assert 0.02 < np.median(ratios[-4:]) < 0.2  # about delta = 0.1
        assert fast.nit < constant.nit
    custom = solve(name, theta=lambda k, kkt: min(1.0, kkt), random_state=1, **plain)
    assert custom.kkt_history == fast.kkt_history


def test_same_generator_same_iterates_and_other_seeds_same_steps():
    first, again, other = solve("HS77"), solve("HS77"), solve("HS77", random_state=5)
    assert first.kkt_history == again.kkt_history
    assert first.kkt_history != other.kkt_history
    assert first.alpha_history == other.alpha_history


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_regressions_on_which_accepted_capped_solves_fail_are_solved(seed):
    instance = regression(seed)
    found = AdaSketchNewton(eps_b=1e-2).solve(instance.problem, instance.x0, instance.lam0)
    assert found.success
    assert found.inexact == 0
    assert min(found.alpha_history) >= 0.25
    if seed == 0:
        copied = AdaSketchNewton(eps_b=1e-2, fallback="accept", equilibrate=False)
        ended = copied.solve(instance.problem, instance.x0, instance.lam0)
        assert not ended.success
        assert ended.inexact > 0
        assert found.fallbacks == 8


def test_a_tight_bound_saves_sketches():
    instance = regression(1)
    solved = {
        accuracy: AdaSketchNewton(eps_b=1e-2, accuracy=accuracy).solve(instance.problem, instance.x0, instance.lam0)
        for accuracy in ("a-priori", "tight")
    }
    assert solved["tight"].sketches < solved["a-priori"].sketches
    assert solved["tight"].alpha_history == solved["a-priori"].alpha_history


# Optimal control, in every form of matrix -----------------------------------------------------------------------------


def test_the_control_problem_is_the_published_one():
    instance = poisson_control(3)
    at, H = point(instance)
    assert at.kkt == pytest.approx(19.2, abs=0.05)
    system = newton_system(H, at.G, eps_b=1e-6, xi_b=0.1)
    assert np.linalg.cond(system.gamma.toarray()) == pytest.approx(275, rel=0.01)
    assert not system.shifted


@pytest.mark.parametrize("operators", [False, True])
@pytest.mark.parametrize("sketch", ["kaczmarz", "gaussian", "count", "sparse", CountSketch(block_size=6)])
def test_control_takes_one_step_with_matrices_and_with_operators(operators, sketch):
    instance = poisson_control(3, operators=operators)
    solver = AdaSketchNewton(sketch=sketch, block_size=1 if sketch in ("kaczmarz", "gaussian") else 6)
    if operators and sketch == "kaczmarz":
        with pytest.raises(TypeError, match="'kaczmarz' reads rows"):
            solver.solve(instance.problem, instance.x0, instance.lam0)
        return
    found = solver.solve(instance.problem, instance.x0, instance.lam0)
    assert found.success
    assert found.nit <= 2
    p = instance.problem
    G = p.jac(instance.x0) @ np.eye(18)
    exact = np.linalg.solve(
        np.block([[np.diag(np.repeat([1, 0.1], 9)), G.T], [G, np.zeros((9, 9))]]),
        np.append(-p.grad(np.zeros(18)), np.zeros(9)),
    )
    np.testing.assert_allclose(found.x, exact[:18], atol=1e-6)


def test_a_fine_grid_is_solved_without_a_dense_matrix():
    instance = poisson_control(64)
    found = AdaSketchNewton(max_sketches=20_000).solve(instance.problem, instance.x0, instance.lam0)
    assert found.success
    assert (found.nit, found.fallbacks) == (1, 1)  # the sketches cannot do it, and the result says so
    assert found.measured == Measured.FACTORISED


def test_operators_and_matrices_are_measured_alike(monkeypatch):
    monkeypatch.setattr("locally.optimize.constrained.kkt.SMALL", 20)  # so that a small grid counts as a large one
    instance, matrix_free = poisson_control(7), poisson_control(7, operators=True)
    (at, H), (at_free, H_free) = point(instance), point(matrix_free)
    np.testing.assert_allclose(at.residual, at_free.residual, atol=1e-9)
    assert frobenius(at_free.G) == pytest.approx(frobenius(at.G), rel=0.2)
    exact, estimate = smallest_of_gram(at.G), smallest_of_gram(at_free.G)
    assert (exact[1], estimate[1]) == (Measured.FACTORISED, Measured.ESTIMATED)
    assert 0.8 * exact[0] <= estimate[0] <= exact[0]
    for M, J in ((H, at.G), (H_free, at_free.G)):
        norm = frobenius(M)
        assert convex_on_null_space(M, J, 0.05, norm)
        assert not convex_on_null_space(M, J, 0.99, norm)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 8), m=st.integers(0, 8))
def test_curvature_and_rank_are_those_of_dense_linear_algebra(seed, n, m):
    rng = np.random.default_rng(seed)
    m = min(m, n - 1)
    H, G = rng.standard_normal((n, n)), rng.standard_normal((m, n))
    H = H + H.T
    Z = np.linalg.svd(G)[2][m:].T if m else np.eye(n)
    curvature = np.linalg.eigvalsh(Z.T @ H @ Z)[0]
    norm = frobenius(H)
    for M, J in ((H, G), (sp.csr_array(H), sp.csr_array(G))):
        assert convex_on_null_space(M, J, curvature - 1e-6, norm)
        assert not convex_on_null_space(M, J, curvature + 1e-6, norm)
        assert smallest_eigenvalue(M) == pytest.approx(np.linalg.eigvalsh(H)[0])
        system = newton_system(M, J, eps_b=curvature + 1e-6, xi_b=0.1)
        assert system.shifted
        np.testing.assert_allclose(system.B @ np.eye(n), H + (0.1 + norm) * np.eye(n))
        gamma = system.gamma @ np.eye(n + m)
        assert system.norm == pytest.approx(np.linalg.norm(gamma))
        assert system.tight_inverse() == pytest.approx(np.linalg.norm(np.linalg.inv(gamma), 2), rel=1e-6)
        assert system.a_priori_inverse(0.1) >= system.tight_inverse() * (1 - 1e-9)
        if m:
            assert system.xi_g == pytest.approx(np.linalg.eigvalsh(G @ G.T)[0], abs=1e-9)


def test_a_rank_deficient_operator_is_seen(monkeypatch):
    monkeypatch.setattr("locally.optimize.constrained.kkt.SMALL", 20)
    G = sp.csr_array(poisson_control(7).problem.jac(np.ones(98)))
    G = sp.vstack([G, G[:1]], format="csr")
    assert smallest_of_gram(G)[0] < 1e-8
    assert smallest_of_gram(aslinearoperator(G))[0] < 1e-8


# The inner solve ------------------------------------------------------------------------------------------------------


def inner(instance, **changes):
    at, H = point(instance)
    system = newton_system(H, at.G, eps_b=1e-6, xi_b=0.1)
    options = {"sketch": Kaczmarz(), "max_sketches": 10**5, "minres": True, "rounding": 4.0}
    return InnerSolve(system=system, rhs=-at.residual, rng=np.random.default_rng(0), **(options | changes))


@pytest.mark.parametrize("equilibrate", [False, True])
def test_targets_are_residuals_of_the_system_as_given(equilibrate):
    work = inner(hock_schittkowski("HS100LNP"), equilibrate=equilibrate)
    spent = []
    for target in (1e-1, 1e-4, 1e-7):
        assert work.reach(target) is Accuracy.REACHED
        true = np.linalg.norm(work.system.gamma @ work.z - work.rhs)
        assert work.residual == pytest.approx(true)
        assert true <= target
        spent.append(work.sketches)
    assert spent == sorted(spent)
    assert work.fallbacks == 0
    assert work.reach(1e-30) is Accuracy.ROUNDING


def test_used_up_sketches_are_finished_by_minres_or_reported():
    capped = inner(poisson_control(8), max_sketches=100, minres=False)
    assert capped.reach(1e-6) is Accuracy.SHORT
    assert (capped.sketches, capped.products) == (100, 0)
    finished = inner(poisson_control(8), max_sketches=100)
    assert finished.reach(1e-6) is Accuracy.REACHED
    assert finished.fallbacks == 1
    assert finished.products > 0


def test_without_a_fallback_the_solve_ends_with_its_cause():
    instance = poisson_control(8)
    ended = AdaSketchNewton(fallback=None, max_sketches=1000).solve(instance.problem, instance.x0, instance.lam0)
    assert ended.status is Status.INNER_FAILED
    np.testing.assert_array_equal(ended.x, instance.x0)
    assert "Newton system" in ended.message


# What goes wrong ------------------------------------------------------------------------------------------------------


def changed(instance, **functions):
    p = instance.problem
    parts = {name: getattr(p, name) for name in ("n", "m", "fun", "grad", "constr", "jac", "hess")}
    return EqualityProblem(**(parts | functions))


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("fun", "fun"),
        ("grad", "jac of fun"),
        ("constr", "constraints"),
        ("jac", "jac of the constraints"),
        ("hess", "hess"),
    ],
)
@pytest.mark.parametrize("after", [1, 4])
def test_nan_ends_in_a_status_with_the_last_good_iterate(function, named, after):
    instance = hock_schittkowski("HS77")
    good = getattr(instance.problem, function)
    calls = [0]

    def sick(*args):
        calls[0] += 1
        value = good(*args)
        return value if calls[0] < after else value * np.nan

    found = AdaSketchNewton().solve(changed(instance, **{function: sick}), instance.x0)
    assert found.status is Status.NOT_FINITE
    assert named in found.message
    assert np.isfinite(found.x).all()
    if after == 1:
        np.testing.assert_array_equal(found.x, instance.x0)
    else:
        assert found.kkt == found.kkt_history[-1]


def test_a_search_steps_back_from_where_the_function_ends():
    """-log x is not a number for x < 0, where the first full step leads."""
    problem = EqualityProblem(
        n=2,
        m=1,
        fun=lambda x: float(10 * x[0] - np.log(x[0]) if x[0] > 0 else np.nan),
        grad=lambda x: np.array([10 - 1 / x[0], 0.0]),
        constr=lambda x: x[1:] - 1,
        jac=lambda x: np.array([[0.0, 1.0]]),
        hess=lambda x, lam: np.diag([1 / x[0] ** 2, 0.0]),
    )
    found = AdaSketchNewton(tol=1e-7).solve(problem, np.array([2.0, 0.0]))
    assert found.success
    np.testing.assert_allclose(found.x, [0.1, 1], atol=1e-6)
    assert min(found.alpha_history) < 1


@pytest.mark.parametrize("sparse", [False, True])
def test_a_rank_deficient_jacobian_is_named(sparse):
    A = np.array([[1.0, 1, 0], [2, 2, 0]])
    problem = EqualityProblem(
        n=3,
        m=2,
        fun=lambda x: float(x @ x),
        grad=lambda x: 2 * x,
        constr=lambda x: A @ x - np.array([1.0, 2]),
        jac=lambda x: sp.csr_array(A) if sparse else A,
        hess=lambda x, lam: 2 * np.eye(3),
    )
    for solver in (AdaSketchNewton(), L1SQP()):
        found = solver.solve(problem, np.ones(3))
        assert found.status is Status.RANK_DEFICIENT
        assert "lambda_min(G G^T)" in found.message
        np.testing.assert_array_equal(found.x, np.ones(3))


@pytest.mark.parametrize(
    "formulas", [lambda x, y: (x, y - 1), lambda x, y: (-1 * x**2, y - 1), lambda x, y: (x**3, y - 1)]
)
def test_an_unbounded_problem_is_no_success(formulas):
    x0 = np.array([-1.0, 0.0])
    found = AdaSketchNewton().solve(problem_of(formulas, x0), x0)
    assert found.status is Status.UNBOUNDED
    assert np.isfinite(found.x).all()
    assert found.fun < -100


def test_an_exception_of_the_callers_passes_through():
    instance = hock_schittkowski("HS6")

    def broken(x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        AdaSketchNewton().solve(changed(instance, grad=broken), instance.x0)


def test_the_iteration_limit_returns_the_last_iterate():
    found = solve("HS77", max_iter=3)
    assert (found.status, found.nit) == (Status.ITERATION_LIMIT, 3)
    assert found.kkt_history == solve("HS77").kkt_history[:4]
    assert solve("HS77", max_iter=0).nit == 0


def test_a_callback_sees_every_iteration_and_may_stop():
    seen = []

    def callback(now):
        seen.append((now.nit, now.point.kkt))
        if now.nit == 3:
            raise StopIteration

    instance = hock_schittkowski("HS77")
    found = AdaSketchNewton().solve(instance.problem, instance.x0, callback=callback)
    assert (found.status, found.nit) == (Status.STOPPED, 3)
    assert [kkt for _, kkt in seen] == list(found.kkt_history[1:])


@pytest.mark.parametrize(
    "bad",
    [
        *({"beta": b} for b in (0.0, 0.5, -1.0)),
        *({"nu": v} for v in (1.0, 0.5, np.inf)),
        *({name: 0.0} for name in ("tol", "eta1", "eta2", "delta", "xi_b", "eps_b", "delta_min", "xi_g_min", "xi_g")),
        *({"sketch": "fourier"}, {"theta": "linear"}, {"accuracy": "best"}, {"fallback": "cg"}),
        *({"max_iter": -1}, {"max_sketches": 0}, {"block_size": 0}),
    ],
)
def test_a_bad_hyper_parameter_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdaSketchNewton(**bad)


@pytest.mark.usefixtures("without_shape_checks")
def test_bad_starts_and_sizes_are_named():
    problem = hock_schittkowski("HS6").problem
    for solver in (AdaSketchNewton(), L1SQP(), AugmentedLagrangian()):
        with pytest.raises(ValueError, match="x0 must have shape"):
            solver.solve(problem, np.ones(3))
        with pytest.raises(ValueError, match="x0 holds NaN"):
            solver.solve(problem, np.array([1.0, np.nan]))
        with pytest.raises(ValueError, match="lam0 must have shape"):
            solver.solve(problem, np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="no more constraints than unknowns"):
        changed(hock_schittkowski("HS6"), n=2, m=3)
    with pytest.raises(ValueError, match="hess must return shape"):
        AdaSketchNewton().solve(changed(hock_schittkowski("HS6"), hess=lambda x, lam: np.eye(3)), np.ones(2) * 2)
    with pytest.raises(ValueError, match="theta"):
        AdaSketchNewton(theta=lambda k, kkt: 2.0).solve(problem, np.array([3.0, 1.0]))


# Baselines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if n != "HS40"])
def test_the_augmented_lagrangian_method_solves_what_its_first_penalty_bounds(name):
    instance = hock_schittkowski(name)
    found = AugmentedLagrangian().solve(instance.problem, instance.x0)
    assert found.success
    assert found.fun == pytest.approx(instance.optimum, abs=1e-2, rel=1e-4)


def test_an_unbounded_augmented_lagrangian_is_named():
    instance = hock_schittkowski("HS40")
    assert AugmentedLagrangian().solve(instance.problem, instance.x0).status is Status.UNBOUNDED


@pytest.mark.parametrize("name", NAMES)
def test_both_l1_methods_solve_every_problem(name):
    instance = hock_schittkowski(name)
    for solver in (L1SQP(), L1SQP(adaptive=False)):
        assert solver.solve(instance.problem, instance.x0).success


@pytest.mark.parametrize("form", [sp.csr_array, aslinearoperator])
def test_l1_and_augmented_lagrangian_take_sparse_matrices_and_operators(form):
    instance = hock_schittkowski("HS79")
    p = instance.problem
    other = changed(instance, jac=lambda x: form(p.jac(x)), hess=lambda x, lam: form(p.hess(x, lam)))
    for solver in (L1SQP(), AugmentedLagrangian()):
        dense, found = solver.solve(p, instance.x0), solver.solve(other, instance.x0)
        assert found.success
        np.testing.assert_allclose(found.x, dense.x, atol=1e-4)


def test_gmres_that_does_not_converge_is_a_status():
    instance = poisson_control(8)
    found = L1SQP(max_cycles=3).solve(instance.problem, instance.x0)
    assert found.status is Status.INNER_FAILED


@pytest.mark.usefixtures("without_shape_checks")
def test_regression_refuses_what_is_not_one():
    X, y = np.ones((4, 3)), np.array([1.0, -1, 1, -1])
    with pytest.raises(ValueError, match="labels must be -1 or 1"):
        constrained_logistic(X, y + 1)
    with pytest.raises(ValueError, match="equations must be below the 3 features"):
        constrained_logistic(X, y, equations=3)
    with pytest.raises(ValueError, match="labels must have shape"):
        constrained_logistic(X, y[:2], equations=1)


def test_the_equations_of_a_regression_meet_the_sphere(monkeypatch):
    y = np.where(np.arange(30) % 2, 1.0, -1.0)
    X = np.random.default_rng(0).standard_normal((30, 13))
    for seed in range(10):  # ten equations leave a point of the sphere in one draw of a dozen
        p = constrained_logistic(X, y, random_state=seed).problem
        A, b = p.jac(np.zeros(13))[:-1], -p.constr(np.zeros(13))[:-1]
        assert np.linalg.norm(np.linalg.pinv(A) @ b) < 1
    monkeypatch.setattr("locally.optimize.constrained.problems.logistic.DRAWS", 3)
    with pytest.raises(ValueError, match="solutions on the unit sphere"):
        constrained_logistic(np.ones((2, 40)), y[:2], equations=39)


def test_sparse_and_dense_features_give_the_same_regression():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((20, 5)) * (rng.random((20, 5)) < 0.5)
    y = np.where(rng.random(20) < 0.5, 1.0, -1.0)
    dense, sparse = (constrained_logistic(M, y, equations=2) for M in (X, sp.csr_array(X)))
    x, lam = rng.standard_normal(5), rng.standard_normal(3)
    (at, H), (at_sparse, H_sparse) = point(dense, x, lam), point(sparse, x, lam)
    np.testing.assert_allclose(at.residual, at_sparse.residual)
    np.testing.assert_allclose(H, H_sparse)
    v = rng.standard_normal(5)
    moved = (point(dense, x + 1e-6 * v, lam)[0].gL - point(dense, x - 1e-6 * v, lam)[0].gL) / 2e-6
    np.testing.assert_allclose(H @ v, moved, rtol=1e-6)


def test_products_alone_suffice():
    """Hessian and Jacobian as operators without a matrix behind them."""
    instance = hock_schittkowski("HS79")
    p = instance.problem

    def operator(M):
        return LinearOperator(
            M.shape, matvec=lambda v: M @ np.ravel(v), rmatvec=lambda v: M.T @ np.ravel(v), dtype=float
        )

    free = changed(instance, jac=lambda x: operator(p.jac(x)), hess=lambda x, lam: operator(p.hess(x, lam)))
    found = AdaSketchNewton(sketch="gaussian").solve(free, instance.x0)
    assert found.success
    assert found.alpha_history == solve("HS79", sketch="gaussian").alpha_history
