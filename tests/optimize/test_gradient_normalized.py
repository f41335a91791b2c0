"""The method: reference trajectories, the inequalities of the paper at every step, invariances, and how runs end."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from locally.optimize.gradient_normalized import (
    GradientNormalizedNewton,
    LogSumExp,
    LowRank,
    PowerResidual,
    Status,
    chebyshev_chain,
    gns_method,
    gns_minimize,
    rosenbrock,
)

seeds = st.integers(0, 2**32 - 1)


class Recorded(GradientNormalizedNewton):
    """The recorded runs add 1e-8 to gamma in lambda = ||g||_* / gamma."""

    def ridge(self, norm, gamma):
        return norm / (gamma + 1e-8)


def soft_maximum(seed=0, m=40, n=8, mu=0.5):
    rng = np.random.default_rng(seed)
    return LogSumExp.centred(rng.uniform(-1, 1, (m, n)), rng.uniform(-1, 1, m), mu)


def recorded_problem(golden, run):
    data = np.load(golden / "05-gradient-normalized-smoothness" / "trajectories.npz", allow_pickle=False)
    group, _ = run.split("_")
    part = lambda name: data[f"{group}/{name}"]
    if group == "lse":
        f, B = LogSumExp(part("A"), part("b"), float(part("mu"))), part("B")
        curvature = f.hess if run == "lse_exact" else f.gauss_newton
    elif group == "lin4":
        f, B = PowerResidual.linear(part("A"), part("b"), 4.0), part("B")
        curvature = f.hess if run == "lin4_exact" else f.fisher
    else:
        f, B = rosenbrock(5.0) if group == "ros5" else chebyshev_chain(6), None
        curvature = f.gauss_newton
    return f, curvature, B, part("x0"), {name: data[f"{run}/{name}"] for name in ("x", "f", "gnorm", "gamma", "solves")}


@pytest.mark.parametrize("run", ["lse_exact", "lse_wgn", "lin4_exact", "lin4_fisher", "ros5_gn", "cheb_gn"])
def test_recorded_trajectories_are_met_iterate_by_iterate(golden, run):
    f, curvature, B, x0, recorded = recorded_problem(golden, run)
    steps = len(recorded["f"]) - 1
    iterates = [x0]
    found = Recorded(maxiter=steps, tol=0.0).minimize(
        f.fun_and_jac,
        x0,
        jac=True,
        curvature=curvature,
        metric=B,
        callback=lambda r: iterates.append(r.x),
    )
    gaps = recorded["f"] - recorded["f"].min()
    # rounding decides the trials of the last iterations
    same = int(np.argmax(gaps <= 1e-12 * np.abs(recorded["f"]))) or steps
    same = min(same, len(iterates) - 1)
    assert same >= {"lse": 7}.get(run[:3], 10)
    history = found.history
    np.testing.assert_array_equal(history["gamma"][:same], recorded["gamma"][:same])
    np.testing.assert_array_equal(history["nsolve"][:same], recorded["solves"][:same])
    scale = np.abs(recorded["x"][:same]).max(axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(iterates[:same]) / scale, recorded["x"][:same] / scale, atol=1e-8)
    np.testing.assert_allclose(history["fun"][:same], recorded["f"][:same], rtol=1e-8)
    np.testing.assert_allclose(history["dual_norm"][:same], recorded["gnorm"][:same], rtol=1e-6)


PROBLEMS = {
    "log-sum-exp, exact": lambda seed: (soft_maximum(seed), "hess", 8),
    "log-sum-exp, Gauss-Newton": lambda seed: (soft_maximum(seed), "gauss_newton", 8),
    "chain, Gauss-Newton": lambda seed: (chebyshev_chain(8), "gauss_newton", 8),
    "chain, exact and indefinite": lambda seed: (chebyshev_chain(8), "hess", 8),
    "valley, p = 5": lambda seed: (rosenbrock(5.0), "gauss_newton", 2),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@settings(max_examples=12)  # each checks up to 25 steps
@given(seed=seeds, diagonal=st.booleans())
def test_every_step_keeps_what_the_lemma_promises(problem, seed, diagonal):
    f, name, n = PROBLEMS[problem](seed)
    rng = np.random.default_rng(seed)
    B = np.diag(rng.uniform(0.5, 2, n))
    if not diagonal:
        root = rng.standard_normal((n, n))
        B = B + root @ root.T / n
    points = []
    x0 = rng.uniform(-1, 1, n)
    found = GradientNormalizedNewton(maxiter=25, tol=1e-6).minimize(
        f.fun,
        x0,
        jac=f.jac,
        curvature=getattr(f, name),
        metric=np.diag(B).copy() if diagonal else B,
        callback=lambda r: points.append((r.x, r.fun, r.jac, r.gamma / 2)),
    )
    assert found.status in (Status.CONVERGED, Status.ITERATION_LIMIT)
    dual = lambda g: np.sqrt(g @ np.linalg.solve(B, g))
    x, value, g = x0, f.fun(x0), f.jac(x0)
    for x_new, value_new, g_new, gamma in points:
        lam, step = dual(g) / gamma, x_new - x
        assert value_new < value
        if name != "hess":  # needs H >= 0
            assert np.sqrt(step @ B @ step) <= gamma * (1 + 1e-9)
        assert value - value_new >= dual(g_new) ** 2 / (8 * lam) * (1 - 1e-9) - 1e-14 * abs(value)
        H = getattr(f, name)(x)
        residual = g_new + lam * B @ step - (g_new - g - H @ step)  # of the linear system
        assert np.linalg.norm(residual) <= 1e-8 * np.linalg.norm(g) + 1e-13
        x, value, g = x_new, value_new, g_new


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_the_scale_of_the_objective_changes_nothing(seed, scale):
    f, x0 = soft_maximum(seed), np.ones(8)
    runs = [
        gns_minimize(
            lambda x, c=c: c * f.fun(x),
            x0,
            jac=lambda x, c=c: c * f.jac(x),
            curvature=lambda x, c=c: c * f.gauss_newton(x),
            tol=0.0,
            maxiter=8,
        )
        for c in (1.0, scale)
    ]
    np.testing.assert_array_equal(runs[0].history["gamma"], runs[1].history["gamma"])
    np.testing.assert_allclose(runs[0].x, runs[1].x, rtol=1e-7, atol=1e-9)


@given(seed=seeds)
def test_linear_coordinates_change_nothing_when_the_metric_follows(seed):
    f, x0 = soft_maximum(seed), np.ones(8)
    S = np.random.default_rng(seed).standard_normal((8, 8)) + 4 * np.eye(8)
    B = f.A.T @ f.A
    plain = gns_minimize(f.fun, x0, jac=f.jac, curvature=f.gauss_newton, metric=B, tol=0.0, maxiter=8)
    moved = gns_minimize(
        lambda z: f.fun(S @ z),
        np.linalg.solve(S, x0),
        jac=lambda z: S.T @ f.jac(S @ z),
        curvature=lambda z: S.T @ f.gauss_newton(S @ z) @ S,
        metric=(S.T @ B @ S + (S.T @ B @ S).T) / 2,
        tol=0.0,
        maxiter=8,
    )
    np.testing.assert_array_equal(plain.history["gamma"], moved.history["gamma"])
    np.testing.assert_allclose(S @ moved.x, plain.x, rtol=1e-6, atol=1e-8)


def test_without_curvature_a_step_is_a_gradient_step_of_length_gamma():
    f, x0 = soft_maximum(), np.ones(8)
    points = [x0]
    found = gns_minimize(
        f.fun, x0, jac=f.jac, curvature=0.0, gamma0=0.25, maxiter=5, callback=lambda r: points.append(r.x)
    )
    accepted = found.history["gamma"][1:] / 2
    for x, x_new, gamma in zip(points, points[1:], accepted):
        g = f.jac(x)
        np.testing.assert_allclose(x_new, x - gamma * g / np.linalg.norm(g), rtol=1e-12)


def test_a_quadratic_accepts_every_trial_doubles_gamma_and_becomes_newtons_method():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 6))
    A, b = root @ root.T + np.eye(6), rng.standard_normal(6)
    found = gns_minimize(
        lambda x: x @ A @ x / 2 - b @ x, np.zeros(6), jac=lambda x: A @ x - b, curvature=lambda x: A, tol=1e-13
    )
    assert found.success
    assert found.nsolve == found.nit
    np.testing.assert_array_equal(found.history["gamma"], 2.0 ** np.arange(found.nit + 1))
    np.testing.assert_allclose(found.x, np.linalg.solve(A, b), atol=1e-12)
    norms = found.history["dual_norm"]
    norms = norms[norms > 1e-10]
    ratios = norms[1:] / norms[:-1]
    assert (np.diff(ratios) < 0).all()  # superlinear


def test_least_squares_has_gauss_newton_equal_to_the_hessian():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((9, 4)), rng.standard_normal(9)
    f = PowerResidual.linear(A, b)
    np.testing.assert_array_equal(f.gauss_newton(np.ones(4)), f.hess(np.ones(4)))
    found = gns_minimize(f.fun_and_jac, np.zeros(4), jac=True, curvature=f.gauss_newton, tol=1e-12)
    np.testing.assert_allclose(found.x, np.linalg.lstsq(A, b)[0], atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_the_answer_is_that_of_trust_exact(seed):
    f = soft_maximum(seed, m=60, n=10)
    x0 = np.ones(10)
    peer = scipy.optimize.minimize(f.fun, x0, jac=f.jac, hess=f.hess, method="trust-exact", options={"gtol": 1e-10})
    for curvature in (f.hess, f.gauss_newton):
        found = gns_minimize(f.fun_and_jac, x0, jac=True, curvature=curvature, tol=1e-9)
        assert found.success
        np.testing.assert_allclose(found.x, peer.x, atol=1e-6)
    assert abs(found.x).max() < 1e-6  # the minimiser is 0 by construction


def test_accepted_gamma_stays_above_half_of_the_class_bound():
    f = lambda x: (abs(x) ** 3).sum() / 6  # Hessian diag |x| is Lipschitz with constant 1
    jac = lambda x: x * abs(x) / 2
    rng = np.random.default_rng(0)
    for gamma0 in (1e-2, 1.0, 1e4):
        found = gns_minimize(
            f,
            rng.standard_normal(5),
            jac=jac,
            curvature=lambda x: np.diag(abs(x)),
            gamma0=gamma0,
            maxiter=30,
            tol=1e-6,
            f_target=1e-12,
        )
        norms, accepted = found.history["dual_norm"][:-1], found.history["gamma"][1:] / 2
        bound = np.minimum.accumulate(np.sqrt(2 * norms))  # the search comes from above or doubles from below
        assert (accepted >= 0.5 * np.minimum(gamma0, bound)).all()


def test_the_cost_of_the_search_is_two_trials_an_iteration():
    for f, x0 in ((chebyshev_chain(30), np.linspace(0, 1, 30)), (rosenbrock(5.0), np.array([-2.0, 2.0]))):
        found = gns_minimize(f.fun_and_jac, x0, jac=True, curvature=f.gauss_newton, tol=1e-10, maxiter=200)
        assert found.nhev == found.nit
        assert found.nsolve <= 2 * found.nit + np.log2(1.0 / (found.history["gamma"].min() / 2))


@pytest.mark.parametrize("kind", ["matrix", "low rank", "operator", "sparse", "eigh", "krylov", "cholesky"])
def test_every_kind_of_curvature_and_solver_takes_the_same_path(kind):
    rng = np.random.default_rng(1)
    f = LogSumExp.centred(rng.uniform(-1, 1, (12, 9)), rng.uniform(-1, 1, 12))
    dense = f.gauss_newton
    low = lambda x: LowRank(f.A.T, f._state(x)[2] / f.mu)
    curvature = {
        "low rank": lambda x: LowRank(low(x).U[:, :], low(x).c),
        "operator": lambda x: aslinearoperator(dense(x)),
        "sparse": lambda x: csr_array(dense(x)),
    }.get(kind, dense)
    solver = {"low rank": "woodbury"}.get(kind, kind if kind in ("eigh", "krylov", "cholesky") else "auto")
    B = f.A.T @ f.A + np.eye(9)
    run = lambda curvature, solver: gns_minimize(
        f.fun_and_jac, np.ones(9), jac=True, curvature=curvature, metric=B, solver=solver, maxiter=12, tol=1e-12
    )
    plain, found = run(dense, "auto"), run(curvature, solver)
    np.testing.assert_array_equal(plain.history["gamma"], found.history["gamma"])
    np.testing.assert_allclose(found.x, plain.x, atol=1e-8)


def test_an_implicit_metric_takes_the_path_of_its_matrix():
    f = soft_maximum()
    B = f.A.T @ f.A
    inverse = np.linalg.inv(B)
    pair = (aslinearoperator(B), aslinearoperator((inverse + inverse.T) / 2))
    runs = [
        gns_minimize(f.fun_and_jac, np.ones(8), jac=True, curvature=f.hess, metric=metric, maxiter=12, tol=1e-9)
        for metric in (B, pair)
    ]
    np.testing.assert_array_equal(runs[0].history["gamma"], runs[1].history["gamma"])
    np.testing.assert_allclose(runs[0].x, runs[1].x, atol=1e-9)


def test_a_run_goes_on_where_another_ended_as_if_nothing_had_happened():
    f = chebyshev_chain(12)
    run = lambda x0, gamma0, maxiter: gns_minimize(
        f.fun_and_jac, x0, jac=True, curvature=f.gauss_newton, gamma0=gamma0, maxiter=maxiter, tol=0.0
    )
    whole = run(np.full(12, 0.3), 1.0, 14)
    half = run(np.full(12, 0.3), 1.0, 6)
    rest = run(half.x, half.gamma, 8)
    np.testing.assert_array_equal(rest.x, whole.x)
    assert rest.gamma == whole.gamma


def test_a_fixed_rule_replaces_the_search_and_is_halved_where_it_promises_too_much():
    f, x0 = soft_maximum(), np.ones(8)
    modest = gns_minimize(f.fun_and_jac, x0, jac=True, curvature=f.hess, rule=lambda norm: 0.1, maxiter=10)
    np.testing.assert_array_equal(modest.history["gamma"][1:], 0.2)
    bold = gns_minimize(f.fun_and_jac, x0, jac=True, curvature=0.0, rule=lambda norm: 1e6, maxiter=10)
    assert bold.nsolve > bold.nit
    assert (np.diff(bold.history["fun"]) < 0).all()


def test_an_indefinite_hessian_is_survived_both_ways():
    f, x0 = chebyshev_chain(20), np.random.default_rng(0).uniform(0, 1, 20)
    assert np.linalg.eigvalsh(f.hess(x0))[0] < 0
    for indefinite in ("reject", "project"):
        found = gns_minimize(
            f.fun_and_jac, x0, jac=True, curvature=f.hess, indefinite=indefinite, f_target=1e-8, maxiter=400
        )
        assert found.success
        assert (np.diff(found.history["fun"]) < 0).all()


def test_scipy_minimize_takes_the_method():
    f, x0 = soft_maximum(), np.ones(8)
    direct = gns_minimize(f.fun, x0, jac=f.jac, curvature=f.gauss_newton, tol=1e-9)
    through = scipy.optimize.minimize(
        f.fun, x0, method=gns_method, jac=f.jac, hess=f.gauss_newton, options={"tol": 1e-9}
    )
    np.testing.assert_array_equal(direct.x, through.x)
    pair = scipy.optimize.minimize(f.fun_and_jac, x0, method=gns_method, jac=True, hess=f.gauss_newton)
    assert pair.success
    products = scipy.optimize.minimize(
        f.fun, x0, method=gns_method, jac=f.jac, hessp=lambda x, p: f.gauss_newton(x) @ p, options={"tol": 1e-9}
    )
    np.testing.assert_allclose(products.x, direct.x, atol=1e-8)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"bounds": [(0, 1)] * 8}, "bounds"),
        ({"constraints": {"type": "eq", "fun": sum}}, "constraints"),
        ({"jac": None}, "jac"),
        ({"hess": None}, "hess"),
    ],
)
def test_scipy_minimize_is_told_what_the_method_cannot_do(words, match):
    f = soft_maximum()
    call = {"jac": f.jac, "hess": f.hess} | words
    with pytest.raises(ValueError, match=match):
        scipy.optimize.minimize(f.fun, np.ones(8), method=gns_method, **call)


# How runs end ---------------------------------------------------------------------------------------------------------


def square(x):
    return float(x @ x)


def double(x):
    return 2 * x


def test_a_domain_that_ends_is_stepped_around():
    """-log x is NaN for x < 0; trials there are refused and the minimum is found."""
    with np.errstate(invalid="ignore"):
        found = gns_minimize(
            lambda x: float(x[0] - np.log(x[0])),
            np.array([10.0]),
            jac=lambda x: 1 - 1 / x,
            curvature=lambda x: np.diag(x**-2.0),
            gamma0=1e6,
        )
    assert found.success
    assert found.x[0] == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("part", ["fun", "jac", "curvature"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_from_the_start_are_named(part, bad):
    call = {"fun": square, "jac": double, "curvature": lambda x: 2 * np.eye(len(x))}
    broken = {
        "fun": lambda x: bad,
        "jac": lambda x: np.full(len(x), bad),
        "curvature": lambda x: np.full((len(x), len(x)), bad),
    }
    call[part] = broken[part]
    found = gns_minimize(call["fun"], np.ones(3), jac=call["jac"], curvature=call["curvature"])
    assert found.status is Status.NOT_FINITE
    assert not found.success
    assert part in found.message
    np.testing.assert_array_equal(found.x, np.ones(3))


@pytest.mark.parametrize("part", ["fun", "jac", "curvature", "product"])
def test_non_finite_values_on_the_way_leave_the_last_good_iterate(part):
    f = chebyshev_chain(5)
    calls = 0

    def spoil(name, value):
        nonlocal calls
        calls += name == part
        return value * np.nan if name == part and calls > 4 else value

    def curvature(x):
        H = f.gauss_newton(x)
        if part == "product":
            return LinearOperator(H.shape, matvec=lambda v: spoil("product", H @ v), dtype=float)
        return spoil("curvature", H)

    good = [np.full(5, 0.2)]
    found = gns_minimize(
        lambda x: spoil("fun", f.fun(x)),
        good[0],
        jac=lambda x: spoil("jac", f.jac(x)),
        curvature=curvature,
        callback=lambda r: good.append(r.x),
        tol=0.0,
    )
    assert found.status is Status.NOT_FINITE
    assert {"product": "curvature"}.get(part, part) in found.message
    np.testing.assert_array_equal(found.x, good[-1])
    assert found.fun == f.fun(good[-1])
    assert len(good) > 1 or part == "product"


@pytest.mark.parametrize("curvature", [0.0, lambda x: np.zeros((2, 2))])
def test_a_function_without_a_floor_is_recognised(curvature):
    found = gns_minimize(lambda x: float(x.sum()), np.zeros(2), jac=lambda x: np.ones(2), curvature=curvature)
    assert found.status is Status.UNBOUNDED
    assert found.fun < -1e19
    assert np.isfinite(found.x).all()


def test_minus_infinity_ends_at_the_last_finite_point():
    cliff = lambda x: -np.inf if x[0] < -3 else float(x[0])
    found = gns_minimize(cliff, np.zeros(1), jac=lambda x: np.ones(1), curvature=0.0)
    assert found.status is Status.UNBOUNDED
    assert found.x[0] >= -3
    assert found.fun == found.x[0]


def test_a_wrong_gradient_ends_in_a_failed_search_that_says_why():
    found = gns_minimize(square, np.ones(3), jac=lambda x: -2 * x, curvature=lambda x: 2 * np.eye(3))
    assert found.status is Status.SEARCH_FAILED
    assert "fun fell too little" in found.message
    np.testing.assert_array_equal(found.x, np.ones(3))


def test_iteration_limit_target_and_callback_end_a_run():
    f, x0 = chebyshev_chain(10), np.zeros(10)
    run = lambda **options: gns_minimize(f.fun_and_jac, x0, jac=True, curvature=f.gauss_newton, **options)
    assert run(maxiter=3).status is Status.ITERATION_LIMIT
    assert run(maxiter=0).nit == 0
    reached = run(f_target=1e-3)
    assert reached.status is Status.CONVERGED
    assert reached.history["fun"][-2] > 1e-3 >= reached.fun

    def stop(r):
        if r.nit == 2:
            raise StopIteration

    stopped = run(callback=stop)
    assert stopped.status is Status.STOPPED
    assert stopped.nit == 2


def test_an_interruption_passes_through_and_spares_the_start():
    x0 = np.ones(3)

    def interrupt(r):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gns_minimize(square, x0, jac=double, curvature=2.0, callback=interrupt)
    np.testing.assert_array_equal(x0, 1)


def test_a_callable_that_writes_into_its_argument_does_no_harm():
    def vandal(x):
        value, g = float(x @ x), 2 * x
        x[:] = np.nan
        return value, g

    assert gns_minimize(vandal, np.ones(3), jac=True, curvature=2.0).success


def test_rounding_at_the_minimum_does_not_stop_the_search():
    """1e6 + tiny: values lose all digits of the decrease long before the gradient is small."""
    f = soft_maximum()
    found = gns_minimize(lambda x: 1e6 + f.fun(x), np.ones(8), jac=f.jac, curvature=f.gauss_newton, tol=1e-11)
    assert found.success
    assert found.nsolve < 3 * found.nit


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"x0": np.array([1.0, np.nan])}, "x0"),
        ({"x0": np.ones((2, 2))}, "x0"),
        ({"x0": np.array([])}, "x0"),
        ({"x0": np.array(["a"])}, "x0"),
        ({"x0": np.array([1j, 0])}, "x0"),
        ({"fun": 3}, "fun"),
        ({"fun": lambda x: x}, "fun"),
        ({"jac": None}, "jac"),
        ({"jac": True}, "fun"),
        ({"jac": lambda x: np.ones(3)}, "jac"),
        ({"curvature": None}, "curvature"),
        ({"curvature": "gauss"}, "curvature"),
        ({"curvature": lambda x: np.eye(3)}, "curvature"),
        ({"curvature": lambda x: np.array([[1.0, 1.0], [0.0, 1.0]])}, "curvature"),
        ({"curvature": lambda x: "H"}, "curvature"),
        ({"curvature": lambda x: LowRank(np.ones((3, 1)))}, "curvature"),
        ({"metric": np.array([1.0, -1.0])}, "metric"),
        ({"metric": np.array([[1.0, 2.0], [2.0, 1.0]])}, "metric"),
        ({"metric": np.array([[1.0, 2.0], [0.0, 1.0]])}, "metric"),
        ({"metric": np.ones(3)}, "metric"),
        ({"metric": "I"}, "metric"),
        ({"solver": "lu"}, "solver"),
        ({"solver": "woodbury"}, "woodbury"),
        ({"solver": "cholesky", "curvature": lambda x: aslinearoperator(np.eye(2))}, "cholesky"),
        ({"gamma0": 0.0}, "gamma0"),
        ({"gamma_min": -1.0}, "gamma_min"),
        ({"gamma_min": 2.0, "gamma_max": 1.0}, "gamma_min"),
        ({"rule": 1.0}, "rule"),
        ({"tol": np.nan}, "tol"),
        ({"maxiter": -1}, "maxiter"),
        ({"maxiter": 1.5}, "maxiter"),
        ({"max_trials": 0}, "max_trials"),
        ({"indefinite": "ignore"}, "indefinite"),
        ({"krylov_rtol": 1.0}, "krylov_rtol"),
        ({"precision": 0.0}, "precision"),
        ({"f_target": np.nan}, "f_target"),
    ],
)
def test_bad_input_is_named(words, match, without_shape_checks):
    call = {"fun": square, "x0": np.ones(2), "jac": double, "curvature": lambda x: 2 * np.eye(2)} | words
    with pytest.raises((TypeError, ValueError), match=match):
        gns_minimize(call.pop("fun"), call.pop("x0"), **call)
