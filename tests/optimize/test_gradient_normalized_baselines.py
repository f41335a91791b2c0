"""The baselines: a reference trajectory, the inequalities that define them, and SciPy's answers."""

import numpy as np
import pytest

from locally.optimize.gradient_normalized import (
    CubicNewton,
    FastGradient,
    GradientMethod,
    LogSumExp,
    Status,
    SuperUniversalNewton,
    chebyshev_chain,
)

METHODS = [GradientMethod, FastGradient, SuperUniversalNewton, CubicNewton]


def soft_maximum(seed=0, n=6):
    rng = np.random.default_rng(seed)
    return LogSumExp.centred(rng.uniform(-1, 1, (30, n)), rng.uniform(-1, 1, 30), 0.5)


def test_super_universal_newton_meets_its_recorded_trajectory(golden):
    data = np.load(golden / "05-gradient-normalized-smoothness" / "trajectories.npz", allow_pickle=False)
    f = LogSumExp(data["lse/A"], data["lse/b"], float(data["lse/mu"]))
    points = [data["lse/x0"]]
    found = SuperUniversalNewton(maxiter=len(data["lse_super/f"]) - 1, tol=0.0).minimize(
        f.fun_and_jac,
        data["lse/x0"],
        jac=True,
        curvature=f.hess,
        metric=data["lse/B"],
        callback=lambda r: points.append(r.x),
    )
    values = data["lse_super/f"]
    same = int(np.argmax(values - values.min() <= 1e-12 * abs(values)))
    assert same >= 5
    np.testing.assert_allclose(np.array(points[:same]), data["lse_super/x"][:same], rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(found.history["constant"][:same], data["lse_super/H"][:same])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metric", [None, "diagonal", "dense"])
def test_every_method_reaches_the_minimum_in_every_metric(method, metric):
    f = soft_maximum()
    B = {"diagonal": np.linspace(0.5, 2, 6), "dense": f.A.T @ f.A}.get(metric)
    found = method(tol=1e-7, maxiter=5000).minimize(f.fun_and_jac, np.ones(6), jac=True, curvature=f.hess, metric=B)
    assert found.status is Status.CONVERGED
    np.testing.assert_allclose(found.x, 0, atol=1e-5)
    assert found.history["fun"][0] == f.fun(np.ones(6))


def test_acceleration_pays_on_an_ill_conditioned_problem(without_shape_checks):
    A = np.diag(np.geomspace(1e-5, 1, 50))
    run = lambda method, steps: method(tol=0.0, maxiter=steps).minimize(
        lambda x: x @ A @ x / 2, np.ones(50), jac=lambda x: A @ x
    )
    fast = run(FastGradient, 300)
    plain = run(GradientMethod, fast.njev)  # one gradient an iteration
    assert fast.fun < 0.5 * plain.fun


@pytest.mark.parametrize("seed", range(5))
def test_a_cubic_step_minimises_its_model(seed):
    """The global minimiser of the cubic model satisfies (H + M r / 2) h = -g with r = ||h|| and a positive matrix."""
    f, rng = chebyshev_chain(6), np.random.default_rng(seed)
    x0 = rng.uniform(0, 1, 6)
    points = []
    found = CubicNewton(constant0=0.01, maxiter=1).minimize(
        f.fun_and_jac, x0, jac=True, curvature=f.hess, callback=lambda r: points.append(r.x)
    )
    h, M = points[0] - x0, 2 * found.constant
    shifted = f.hess(x0) + M * np.linalg.norm(h) / 2 * np.eye(6)
    np.testing.assert_allclose(shifted @ h, -f.jac(x0), rtol=1e-6, atol=1e-8)
    assert np.linalg.eigvalsh(shifted)[0] > 0


@pytest.mark.parametrize("method", METHODS)
def test_runs_end_in_a_status(method):
    f = soft_maximum()
    run = lambda **words: method(**words).minimize(f.fun_and_jac, np.ones(6), jac=True, curvature=f.hess)
    assert run(maxiter=2).status is Status.ITERATION_LIMIT
    assert run(f_target=f.fun(np.zeros(6)) + 1e-2).success
    broken = method().minimize(lambda x: np.nan, np.ones(2), jac=lambda x: x, curvature=lambda x: np.eye(2))
    assert broken.status is Status.NOT_FINITE
    uphill = method(max_trials=5).minimize(
        lambda x: float(x @ x),
        np.ones(2),
        jac=lambda x: -x * (1 if x[0] == 1 else np.nan),
        curvature=lambda x: np.eye(2),
    )
    assert uphill.status is Status.SEARCH_FAILED


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("words", [{"constant0": 0.0}, {"maxiter": -1}, {"tol": -1.0}, {"max_trials": 0}])
def test_bad_input_is_named(method, words):
    with pytest.raises(ValueError, match=next(iter(words))):
        method(**words)
