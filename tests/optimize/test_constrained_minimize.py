"""SciPy's and torch's ways in: every way to write a problem gives the same answer, and refusals say what is missing."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import BFGS, LinearConstraint, NonlinearConstraint, minimize
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from locally.optimize.constrained import minimize_adasketch, scipy_problem, torch_problem

X0 = np.array([0.9, 0.5, 0.4])
A = np.array([[1.0, -1.0, 0.0]])
ANSWER = np.full(3, 3**-0.5)  # the largest product of coordinates on the sphere, the first two equal


def fun(x, sign=-1.0):
    return sign * x[0] * x[1] * x[2]


def jac(x, sign=-1.0):
    return sign * np.array([x[1] * x[2], x[0] * x[2], x[0] * x[1]])


def hess(x, sign=-1.0):
    return sign * np.array([[0, x[2], x[1]], [x[2], 0, x[0]], [x[1], x[0], 0]])


sphere = {
    "nonlinear": NonlinearConstraint(
        lambda x: x @ x, 1.0, 1.0, jac=lambda x: 2 * x, hess=lambda x, v: v[0] * 2 * np.eye(3)
    ),
    "sparse": NonlinearConstraint(
        lambda x: [x @ x],
        [1.0],
        [1.0],
        jac=lambda x: sp.csr_array(2 * x[None]),
        hess=lambda x, v: sp.eye_array(3) * (2 * v[0]),
    ),
    "operators": NonlinearConstraint(
        lambda x: x @ x,
        1.0,
        1.0,
        jac=lambda x: aslinearoperator(2 * x[None]),
        hess=lambda x, v: LinearOperator((3, 3), matvec=lambda u: 2 * v[0] * u, dtype=float),
    ),
    "differences": NonlinearConstraint(lambda x: x @ x, 1.0, 1.0, jac=lambda x: 2 * x, hess=BFGS()),
    "dictionary": {"type": "eq", "fun": lambda x, r: x @ x - r, "jac": lambda x, r: 2 * x, "args": (1.0,)},
}


@pytest.mark.parametrize("kind", sphere)
@pytest.mark.parametrize("plane", [LinearConstraint(A, 0, 0), LinearConstraint(sp.csr_array(A), 0, 0)])
def test_every_form_of_constraint_gives_the_answer(kind, plane):
    options = {"sketch": "gaussian"} if kind == "operators" else {}
    found = minimize(
        fun,
        X0,
        method=minimize_adasketch,
        jac=jac,
        hess=hess,
        constraints=[sphere[kind], plane],
        tol=1e-8,
        options=options,
    )
    assert found.success, found.message
    assert found.status == 0
    np.testing.assert_allclose(found.x, ANSWER, atol=1e-6)
    assert found.kkt <= 1e-8
    assert found.constr.shape == found.lam.shape == (2,)
    gradient = jac(found.x) + 2 * found.x * found.lam[0] + A[0] * found.lam[1]
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


@pytest.mark.parametrize("second", [{}, {"hess": hess}, {"hessp": lambda x, v, sign=-1.0: hess(x, sign) @ v}])
def test_hessians_come_from_anywhere(second):
    options = {"sketch": "gaussian"} if "hessp" in second else {}
    found = minimize_adasketch(
        fun, X0, (-2.0,), jac=jac, constraints=sphere["nonlinear"], tol=1e-7, **second, **options
    )
    assert found.success
    np.testing.assert_allclose(found.x, ANSWER, atol=1e-5)
    assert found.fun == pytest.approx(-2 * 3**-1.5)


def test_jac_true_means_that_fun_returns_both():
    both = lambda x: (fun(x), jac(x))
    found = minimize(both, X0, method=minimize_adasketch, jac=True, hess=hess, constraints=sphere["nonlinear"])
    assert found.success


torch_ways = {
    "function": [lambda x: x.square().sum() - 1, lambda x: x[0] - x[1]],
    "scipy": [NonlinearConstraint(lambda x: x.square().sum(), 1.0, 1.0), LinearConstraint(A, 0, 0)],
    "dictionary": [{"type": "eq", "fun": lambda x: torch.stack([x.square().sum() - 1, x[0] - x[1]])}],
}


@pytest.mark.parametrize("way", torch_ways)
@pytest.mark.parametrize("derivatives", ["torch", "torch-products"])
def test_torch_functions_need_no_derivatives(way, derivatives):
    options = {"derivatives": derivatives, "sketch": "gaussian" if derivatives == "torch-products" else "kaczmarz"}
    found = minimize(
        lambda x: -x.prod(), X0, method=minimize_adasketch, constraints=torch_ways[way], tol=1e-8, options=options
    )
    assert found.success, found.message
    np.testing.assert_allclose(found.x, ANSWER, atol=1e-6)


def test_torch_and_handwritten_derivatives_agree():
    given = scipy_problem(fun, X0, jac=jac, hess=hess, constraints=[sphere["nonlinear"], LinearConstraint(A, 0.5, 0.5)])
    differentiated = torch_problem(
        lambda x: -x.prod(), X0, [lambda x: x.square().sum() - 1, LinearConstraint(A, 0.5, 0.5)]
    )
    assert (given.n, given.m) == (differentiated.n, differentiated.m) == (3, 2)
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, lam = rng.standard_normal(3), rng.standard_normal(2)
        for name in ("fun", "grad", "constr", "jac"):
            np.testing.assert_allclose(getattr(given, name)(x), getattr(differentiated, name)(x), atol=1e-12)
        np.testing.assert_allclose(given.hess(x, lam), differentiated.hess(x, lam), atol=1e-12)
    products = torch_problem(lambda x: -x.prod(), X0, [lambda x: x.square().sum() - 1], products=True)
    np.testing.assert_allclose(products.hess(X0, np.ones(1)) @ np.eye(3), hess(X0) + 2 * np.eye(3), atol=1e-12)


def test_no_constraints_and_linear_torch_functions():
    found = minimize_adasketch(lambda x: (x - 3).square().sum(), np.zeros(2), derivatives="torch")
    np.testing.assert_allclose(found.x, 3, atol=1e-4)
    assert found.lam.shape == (0,)
    linear = torch_problem(lambda x: x.sum(), np.zeros(2), lambda x: x[:1])
    np.testing.assert_array_equal(linear.hess(np.zeros(2), np.ones(1)), 0)


def test_callbacks_are_called_as_scipy_calls_them(capsys):
    seen = []
    ask = {"jac": jac, "hess": hess, "constraints": sphere["nonlinear"]}
    minimize(fun, X0, method=minimize_adasketch, callback=lambda xk: seen.append(xk), options={"disp": True}, **ask)
    assert "converged" in capsys.readouterr().out
    assert seen[0].shape == (3,)

    def stop(intermediate_result):
        seen.append(intermediate_result.fun)
        raise StopIteration

    stopped = minimize(fun, X0, method=minimize_adasketch, callback=stop, tol=1e-12, **ask)
    assert (stopped.success, stopped.nit) == (False, 1)
    assert "callback" in stopped.message
    assert seen[-1] == stopped.fun


def test_the_start_and_the_arrays_of_the_caller_stay_as_they_were():
    x0, lam0 = X0.copy(), np.array([0.3])
    minimize_adasketch(fun, x0, jac=jac, hess=hess, constraints=sphere["nonlinear"], lam0=lam0)
    np.testing.assert_array_equal(x0, X0)
    assert lam0[0] == 0.3


inequalities = [
    NonlinearConstraint(lambda x: x @ x, 0.0, 1.0, jac=lambda x: 2 * x),
    NonlinearConstraint(lambda x: x @ x, -np.inf, -np.inf, jac=lambda x: 2 * x),
    LinearConstraint(A, 0, np.inf),
    {"type": "ineq", "fun": lambda x: x[0], "jac": lambda x: np.eye(3)[0]},
]


@pytest.mark.parametrize("constraint", inequalities)
@pytest.mark.parametrize("derivatives", ["given", "torch"])
def test_inequalities_are_refused_by_name(constraint, derivatives):
    with pytest.raises(ValueError, match=r"constraints\[1\] must be an equality.*inequality"):
        minimize_adasketch(
            fun, X0, jac=jac, constraints=[LinearConstraint(A, 0, 0), constraint], derivatives=derivatives
        )


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"bounds": [(0, 1)] * 3}, ValueError, "bounds must be None"),
        ({"jac": None}, ValueError, "jac must be a function"),
        ({"constraints": NonlinearConstraint(lambda x: x @ x, 1, 1)}, ValueError, r"constraints\[0\] needs jac"),
        ({"constraints": [1.0]}, TypeError, r"constraints\[0\] must be a NonlinearConstraint"),
        ({"constraints": {"type": "equal", "fun": abs}}, ValueError, "'eq', 'ineq'"),
        ({"constraints": [sphere["nonlinear"]] * 4}, ValueError, "no more constraints than unknowns"),
        ({"derivatives": "jax"}, ValueError, "derivatives must be one of 'given', 'torch'"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"maxiter": 1.5}, TypeError, "max_iter"),
        ({"learning_rate": 0.1}, TypeError, "learning_rate"),
        ({"x0": np.ones((3, 1))}, ValueError, "x0 must be a vector"),
        ({"x0": np.array(["a"])}, ValueError, "x0 must be a vector"),
        ({"x0": np.array([np.nan, 1, 1])}, ValueError, "x0 holds NaN"),
        ({"lam0": np.ones(2)}, ValueError, "lam0 must have shape"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_bad_input_is_named(change, error, named):
    arguments = {"fun": fun, "x0": X0, "jac": jac, "hess": hess, "constraints": sphere["nonlinear"]} | change
    with pytest.raises(error, match=named):
        minimize_adasketch(**arguments)
