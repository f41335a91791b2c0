"""The method beside SciPy's Newton and quasi-Newton solvers, the classifier beside scikit-learn's, and growth of cost.

Set LOCALLY_LIBSVM to a folder with the LIBSVM file `a9a` to time the classifier on it; a sparse table of the same size
and density is always timed.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.datasets import load_svmlight_file
from sklearn.linear_model import LogisticRegression
from torch import nn

from benchmarks.harness import Comparison, compare, growth
from locally.linalg.curvature import GaussNewton
from locally.optimize.gradient_normalized import (
    GNS,
    GNSLogisticRegression,
    GradientNormalizedNewton,
    LogSumExp,
    PowerResidual,
    chebyshev_chain,
    gns_minimize,
    rosenbrock,
)
from locally.papers.gradient_normalized_smoothness import SCIPY, descend, scipy_descent


def main() -> list[Comparison]:
    return [*classifiers(), *solvers(), *ranks(), networks(), *growths()]


def classifiers() -> list[Comparison]:
    tables = {"synthetic table of the size of a9a": sparse_table(32_561, 123, 14)}
    folder = os.environ.get("LOCALLY_LIBSVM")
    if folder and (Path(folder) / "a9a").exists():
        tables["a9a"] = load_svmlight_file(str(Path(folder) / "a9a"))
    else:
        print("  a9a skipped: LOCALLY_LIBSVM names no folder that holds it")
    results = []
    for name, (X, y) in tables.items():
        for kind, data in (("sparse", X), ("dense", X.toarray())):
            ours = GNSLogisticRegression(tol=1e-9)
            for tol in (1e-4, 1e-10):  # scikit-learn's default, and one whose answer has the digits of ours
                peer = LogisticRegression(solver="newton-cholesky", tol=tol)
                ours.fit(data, y), peer.fit(data, y)
                gap = float(abs(ours.coef_ - peer.coef_).max())
                result = compare(
                    f"logistic regression, {name}, {kind}",
                    ("GNSLogisticRegression", lambda ours=ours, data=data, y=y: ours.fit(data, y)),
                    (f"newton-cholesky, tol = {tol:g}", lambda peer=peer, data=data, y=y: peer.fit(data, y)),
                    rounds=5,
                    coefficients_apart=gap,
                )
                results.append(result)
    return results


def sparse_table(n: int, d: int, per_row: int) -> tuple[csr_matrix, np.ndarray]:
    """Binary features, `per_row` of d in each row of unequal frequency, and labels that a linear model half tells."""
    rng = np.random.default_rng(0)
    frequencies = np.geomspace(1, 0.01, d)
    columns = np.argsort(rng.gumbel(size=(n, d)) + np.log(frequencies), axis=1)[:, -per_row:]
    X = csr_matrix(
        (np.ones(n * per_row), np.sort(columns, axis=1).ravel(), np.arange(0, n * per_row + 1, per_row)), (n, d)
    )
    return X, (X @ rng.standard_normal(d) + rng.logistic(size=n) > 0).astype(int)


def solvers() -> list[Comparison]:
    results = []
    for n in (200, 500):
        rng = np.random.default_rng(0)
        A, b = rng.uniform(-1, 1, (n, n)), rng.uniform(-1, 1, n)
        f, B = LogSumExp.centred(A, b, 1.0), A.T @ A
        least, x0 = f.fun(np.zeros(n)), np.ones(n)
        ours = lambda f=f, B=B, x0=x0, least=least: descend(
            f, x0, least, GradientNormalizedNewton, curvature=f.hess, metric=B
        )
        results += beside(f"log-sum-exp, n = {n}, gap 1e-8", f, x0, least, ours)
    for name, f, x0 in (
        ("Chebyshev chain of 100, gap 1e-8", chebyshev_chain(100), np.random.default_rng(2).uniform(0, 1, 100)),
        ("Rosenbrock, p = 5, gap 1e-8", rosenbrock(5.0), np.array([-2.0, 2.0])),
    ):
        ours = lambda f=f, x0=x0: descend(f, x0, 0.0, GradientNormalizedNewton, curvature=f.gauss_newton)
        results += beside(name, f, x0, 0.0, ours)
    return results


def beside(name: str, f: Any, x0: np.ndarray, least: float, ours: Callable[[], Any]) -> list[Comparison]:
    results = []
    for method, peer in SCIPY.items():
        theirs = lambda method=method: scipy_descent(f, x0, least, method)
        found, other = ours(), theirs()
        counts = {"gradient_calls_ours": float(found.calls[-1]), "gradient_calls_peer": float(other.calls[-1])}
        detail = counts | {"peer_reached": other.reached}
        results.append(compare(name, ("GNS", ours), (peer, theirs), rounds=3, **detail))
    return results


def ranks() -> list[Comparison]:
    """One iteration with a rank-one matrix beside one with the exact Hessian, fourth power of a linear residual."""
    results = []
    for n in (200, 800):
        rng = np.random.default_rng(0)
        f = PowerResidual.linear(rng.uniform(-1, 1, (n // 2, n)), rng.uniform(-1, 1, n // 2), 4.0)
        B = f.jacobian(np.zeros(n)).T @ f.jacobian(np.zeros(n)) + 1e-8 * np.eye(n)
        run = lambda curvature, f=f, B=B, n=n: gns_minimize(
            f.fun_and_jac, np.ones(n), jac=True, curvature=curvature, metric=B, tol=0.0, maxiter=15
        )
        results.append(
            compare(
                f"15 iterations, quartic regression, n = {n}",
                ("rank-one Fisher", lambda run=run, f=f: run(f.fisher)),
                ("exact Hessian", lambda run=run, f=f: run(f.hess)),
                rounds=5,
            )
        )
    return results


def networks() -> Comparison:
    """Loss after the same number of closure calls, a small network fitted to a sine in full batches."""
    ratios, ours, theirs = [], [], []
    for seed in range(5):
        X = torch.linspace(-2, 2, 100).double()[:, None]
        y, loss = torch.sin(3 * X), nn.MSELoss()
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        start = {k: v.clone() for k, v in model.state_dict().items()}
        gns = GNS(model.parameters(), GaussNewton(model, loss, (X, y)))
        calls = [0]

        def closure(
            optimizer: Any, model: Any = model, X: Any = X, y: Any = y, loss: Any = loss, calls: Any = calls
        ) -> Any:
            calls[0] += 1
            optimizer.zero_grad()
            value = loss(model(X), y)
            value.backward()
            return value

        for _ in range(60):
            gns.step(lambda gns=gns: closure(gns))
        ours.append(loss(model(X), y).item())
        budget = calls[0]
        model.load_state_dict(start)
        lbfgs = torch.optim.LBFGS(
            model.parameters(),
            max_iter=budget,
            max_eval=budget,
            tolerance_grad=0,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        lbfgs.step(lambda lbfgs=lbfgs: closure(lbfgs))
        theirs.append(loss(model(X), y).item())
        ratios.append(ours[-1] / theirs[-1])
    detail = {"losses_ours": ours, "losses_peer": theirs, "seeds": 5}
    name = "network of 49 parameters, same closure calls"
    return Comparison(
        name, "loss", float(np.median(ratios)), min(ratios), max(ratios), "GNS", "torch LBFGS, strong Wolfe", detail
    )


def growths() -> list[Comparison]:
    def dense(n: int) -> Callable[[], object]:
        rng = np.random.default_rng(0)
        f = LogSumExp.centred(rng.uniform(-1, 1, (n, n)), rng.uniform(-1, 1, n), 1.0)
        return lambda: gns_minimize(f.fun_and_jac, np.ones(n), jac=True, curvature=f.hess, tol=0.0, maxiter=5)

    def rank_one(n: int) -> Callable[[], object]:
        rng = np.random.default_rng(0)
        f = PowerResidual.linear(rng.uniform(-1, 1, (50, n)), rng.uniform(-1, 1, 50), 4.0)
        return lambda: gns_minimize(f.fun_and_jac, np.ones(n), jac=True, curvature=f.fisher, tol=0.0, maxiter=5)

    def rows(n: int) -> Callable[[], object]:
        X, y = sparse_table(n, 123, 14)
        model = GNSLogisticRegression()
        return lambda: model.fit(X, y)

    return [
        growth("5 iterations, exact Hessian, log-sum-exp over n = m", "GNS", [200, 400, 800], dense),
        growth("5 iterations, rank-one Fisher, 50 residuals over n", "GNS", [1000, 4000, 16_000], rank_one),
        growth("a fit over rows of a sparse table", "GNSLogisticRegression", [10_000, 40_000, 160_000], rows),
    ]


if __name__ == "__main__":
    for line in main():
        print(line)
