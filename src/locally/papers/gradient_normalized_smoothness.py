"""Iterations, gradients and seconds to a gap of 1e-8 on the paper's problems and on real tables.

Soft maxima of affine functions, fourth powers of linear residuals, Rosenbrock's valley and Nesterov's chain, beside
first-order methods in either metric, other adaptive Newton methods and SciPy's solvers.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.optimize
from jaxtyping import Float
from matplotlib import colormaps
from numpy import ndarray
from scipy.sparse import issparse
from sklearn.datasets import load_breast_cancer, load_digits, load_svmlight_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import scale
from threadpoolctl import threadpool_limits

from locally.evidence import Run
from locally.optimize.gradient_normalized import (
    CubicNewton,
    FastGradient,
    GNSLogisticRegression,
    GradientMethod,
    GradientNormalizedNewton,
    Logistic,
    LogSumExp,
    PowerResidual,
    SuperUniversalNewton,
    chebyshev_chain,
    rosenbrock,
)
from locally.plots import INK, canvas

GAP = 1e-8
EXACT = "GNS, exact Hessian"
WEIGHTED = "GNS, weighted Gauss-Newton"
RANK_ONE = "GNS, rank-one Fisher"
BOTH = "GNS, Gauss-Newton plus Fisher"
EMPIRICAL = "GNS, empirical Fisher"
GRADIENT, FAST = "gradient method", "fast gradient method"
GRADIENT_B, FAST_B = "gradient method, metric B", "fast gradient method, metric B"
SUPER, CUBIC = "super-universal Newton", "cubic Newton"
SCIPY = {"trust-exact": "SciPy trust-exact", "Newton-CG": "SciPy Newton-CG", "L-BFGS-B": "SciPy L-BFGS-B"}


@dataclass(frozen=True)
class Descent:
    """The gap f - f* after each gradient call, and what it took to bring it to the target."""

    gaps: Float[ndarray, " points"]
    calls: Float[ndarray, " points"]
    iterations: int
    seconds: float
    reached: bool
    gammas: Float[ndarray, " points"] | None = None


@dataclass(frozen=True)
class Study:
    """What one scale of the experiment runs.

    Attributes:
        sizes: variables of the soft maxima.
        chains, starts, few: variables of the chains, starts of the method itself and of everything else.
        first_order: iterations after which first-order methods give up.
        peers: SciPy's methods.
        cubic: whether adaptive cubic Newton runs along.
        tables: real tables whose rows make soft maxima.
        fits: bundled tables for the classifiers.
    """

    sizes: tuple[int, ...]
    chains: tuple[int, ...]
    starts: int
    few: int
    first_order: int
    peers: tuple[str, ...]
    cubic: bool
    tables: tuple[str, ...]
    fits: tuple[str, ...]


Part = Callable[[Run, Study], Any]


def experiment(run: Run) -> None:
    everyone, bundled = tuple(SCIPY), ("breast cancer", "digits")
    study = run.pick(
        quick=Study((200,), (200,), 9, 1, 500, ("L-BFGS-B",), False, bundled[:1], bundled[:1]),
        default=Study((100, 200), (100, 200), 15, 3, 3000, everyone, True, bundled, bundled),
        paper=Study((200, 500, 1000), (200, 1000, 2000), 15, 5, 10_000, everyone, True, ("mushrooms", "a9a"), bundled),
    )
    carry_out(run, study)


def carry_out(run: Run, study: Study) -> None:
    parts: list[Part] = [soft_maximum, chain, quartic, valley, tables, classifiers]
    soft, chained, _, _, on_tables, _ = run.parallel(partial(do, study=study), parts, "problems")
    draw(run, {"soft maximum": soft, "Nesterov's chain": chained, **on_tables})


def do(run: Run, part: Part, study: Study) -> Any:
    # with matrices of a few hundred rows, BLAS threads on a busy machine wait for each other longer than they work
    with threadpool_limits(run.pick(quick=1, default=1, paper=None), user_api="blas"):
        return part(run, study)


# The problems ---------------------------------------------------------------------------------------------------------


def soft_maximum(run: Run, study: Study) -> dict[str, Descent]:
    """n random affine functions of n variables, smoothing 1, minimum at 0, from (1, ..., 1), in the metric A^T A."""
    shown: dict[str, Descent] = {}
    for n in run.track(study.sizes, "soft maxima"):
        for seed in run.track(run.seeds, "seeds"):
            rng = np.random.default_rng(seed)
            A, b = rng.uniform(-1, 1, (n, n)), rng.uniform(-1, 1, n)
            found = soft_maximum_runs(study, LogSumExp.centred(A, b, 1.0), A.T @ A, np.ones(n))
            record(run, "log-sum-exp", found, seed=seed, n=n)
            if n == 200:
                compare_soft_maximum(run, found, seed)
            shown = shown or found
    return shown


def soft_maximum_runs(
    study: Study, f: LogSumExp, B: Float[ndarray, "n n"], x0: Float[ndarray, " n"]
) -> dict[str, Descent]:
    least = f.fun(np.zeros(len(B)))
    go = partial(descend, f, x0, least)
    found = {
        EXACT: go(GradientNormalizedNewton, curvature=f.hess, metric=B),
        WEIGHTED: go(GradientNormalizedNewton, curvature=f.gauss_newton, metric=B),
        SUPER: go(SuperUniversalNewton, curvature=f.hess, metric=B),
        GRADIENT_B: go(GradientMethod, metric=B, maxiter=study.first_order),
        FAST_B: go(FastGradient, metric=B, maxiter=study.first_order),
        GRADIENT: go(GradientMethod, maxiter=study.first_order),
        FAST: go(FastGradient, maxiter=study.first_order),
    }
    if study.cubic:
        found[CUBIC] = go(CubicNewton, curvature=f.hess, metric=B)
    return found | {SCIPY[method]: scipy_descent(f, x0, least, method) for method in study.peers}


def compare_soft_maximum(run: Run, found: dict[str, Descent], seed: int) -> None:
    exact, weighted, fast = found[EXACT], found[WEIGHTED], found[FAST]
    ratio = weighted.iterations / exact.iterations if weighted.reached else np.inf
    run.record(WEIGHTED, "iterations / those with the exact Hessian, log-sum-exp", ratio, seed=seed)
    # where the fast gradient method gives up, its calls are still a lower bound on what it needs
    ratio = weighted.calls[-1] / fast.calls[-1] if weighted.reached else np.inf
    run.record(WEIGHTED, "gradient calls / those of fast gradient descent, log-sum-exp", ratio, seed=seed)
    for name in (EXACT, WEIGHTED):
        half, whole = (int(np.argmax(found[name].gaps <= gap)) for gap in (1e-4, GAP))
        share = (whole - half) / half if found[name].reached else np.inf
        run.record(name, "iterations from 1e-4 to 1e-8 / iterations to 1e-4, log-sum-exp", share, seed=seed)


def quartic(run: Run, study: Study) -> None:
    """||Ax - b||^4 / 4 with 100 residuals and 200 variables, from (1, ..., 1), in the metric A^T A + 1e-8 I."""
    for seed in run.track(run.seeds, "fourth powers"):
        rng = np.random.default_rng(seed)
        A, b = rng.uniform(-1, 1, (100, 200)), rng.uniform(-1, 1, 100)
        f, B = PowerResidual.linear(A, b, 4.0), A.T @ A + 1e-8 * np.eye(200)
        go = partial(descend, f, np.ones(200), 0.0)
        found = {
            EXACT: go(GradientNormalizedNewton, curvature=f.hess, metric=B),
            RANK_ONE: go(GradientNormalizedNewton, curvature=f.fisher, metric=B),
            SUPER: go(SuperUniversalNewton, curvature=f.hess, metric=B),
            GRADIENT_B: go(GradientMethod, metric=B),
            GRADIENT: go(GradientMethod),
        }
        found |= {SCIPY[method]: scipy_descent(f, np.ones(200), 0.0, method) for method in study.peers}
        record(run, "quartic regression", found, seed=seed)
        fisher, exact = found[RANK_ONE], found[EXACT]
        ratio = fisher.iterations / exact.iterations if fisher.reached else np.inf
        run.record(RANK_ONE, "iterations / those with the exact Hessian, quartic regression", ratio, seed=seed)
        pace = (fisher.seconds / fisher.iterations) / (exact.seconds / exact.iterations)
        run.record(RANK_ONE, "seconds an iteration / those with the exact Hessian, quartic regression", pace, seed=seed)


def chain(run: Run, study: Study) -> dict[str, Descent]:
    """Nesterov's chain, p = 4, from random starts in [0, 1]^n: the median start, and how many starts stall.

    Where x_1 ends near -1 the chain's far end cannot follow, and every method crawls; a limit of 100 iterations, of
    1000 for first-order methods, stands for those starts.
    """
    shown: dict[str, Descent] = {}
    for n in run.track(study.chains, "chains"):
        f = chebyshev_chain(n)
        for seed in run.track(run.seeds, "seeds"):
            points = np.random.default_rng(seed).uniform(0, 1, (study.starts, n))
            found = chain_runs(f, points, points[: study.few])
            for name, runs in found.items():
                iterations = float(np.median([r.iterations for r in runs]))
                run.record(name, f"iterations to 1e-8, Chebyshev chain of {n}", iterations, seed=seed)
                within = float(np.mean([r.reached and r.iterations <= 200 for r in runs]))
                run.record(name, f"share of starts solved in 200 iterations, Chebyshev chain of {n}", within, seed=seed)
                stalled = float(np.mean([not r.reached for r in runs]))
                run.record(name, "share of starts that stall, Chebyshev chain", stalled, seed=seed, n=n)
                seconds = float(np.median([r.seconds for r in runs]))
                run.record(name, "seconds to 1e-8, Chebyshev chain", seconds, seed=seed, n=n)
            solved = [i for i in range(study.few) if found[BOTH][i].reached]
            if solved and not shown:
                shown = {name: runs[solved[0]] for name, runs in found.items()}
    return shown or {name: runs[0] for name, runs in found.items()}


def chain_runs(f: PowerResidual, points: Float[ndarray, "k n"], few: Float[ndarray, "j n"]) -> dict[str, list[Descent]]:
    """Every method from every start; the slow ones from a few, which is enough for a median."""
    newton, gns = partial(descend, f, least=0.0, maxiter=100), GradientNormalizedNewton
    return {
        BOTH: [newton(x, solver=gns, curvature=f.gauss_newton) for x in points],
        EXACT: [newton(x, solver=gns, curvature=f.hess) for x in few],
        SUPER: [newton(x, solver=SuperUniversalNewton, curvature=f.hess) for x in few],
        GRADIENT: [descend(f, x, 0.0, GradientMethod) for x in few],
        SCIPY["L-BFGS-B"]: [scipy_descent(f, x, 0.0, "L-BFGS-B", limit=1000) for x in few],
    }


def valley(run: Run, study: Study) -> None:
    """||(1 - x, 10 (y - x^2))||^5 / 5 from (-2, 2); nothing random."""
    f, x0 = rosenbrock(5.0), np.array([-2.0, 2.0])
    found = {
        EXACT: descend(f, x0, 0.0, GradientNormalizedNewton, curvature=f.hess),
        BOTH: descend(f, x0, 0.0, GradientNormalizedNewton, curvature=f.gauss_newton),
        SUPER: descend(f, x0, 0.0, SuperUniversalNewton, curvature=f.hess),
        GRADIENT: descend(f, x0, 0.0, GradientMethod, maxiter=study.first_order),
    } | {SCIPY[method]: scipy_descent(f, x0, 0.0, method) for method in study.peers}
    record(run, "Rosenbrock, p = 5", found)


# Real tables ----------------------------------------------------------------------------------------------------------


def tables(run: Run, study: Study) -> dict[str, dict[str, Descent]]:
    """Soft maxima over the rows of real tables, smoothing 0.1, and an unpenalised logistic regression."""
    for name in run.track(study.tables, "tables"):
        A, b = table(run, name)
        soft = LogSumExp.centred(A, b, 0.1)
        B = A.T @ A / len(A)
        B += 1e-8 * np.trace(B) / len(B) * np.eye(len(B))
        # not from (1, ..., 1): one-hot features sum to the same number in every row, and f would not change at all
        x0 = np.random.default_rng(0).standard_normal(len(B))
        record(run, f"log-sum-exp, {name}", soft_maximum_runs(study, soft, B, x0))

    X, y = load_breast_cancer(return_X_y=True)
    f = Logistic(scale(X), y)
    x0 = np.zeros(f.size)
    B = f.design.gram(f.weights) + 1e-8 * np.eye(f.size)
    # the classes are separable, so the infimum is 0
    found = {
        EXACT: descend(f, x0, 0.0, GradientNormalizedNewton, curvature=f.hess, metric=B, maxiter=60),
        EMPIRICAL: descend(f, x0, 0.0, GradientNormalizedNewton, curvature=f.fisher, metric=B, maxiter=60),
        GRADIENT_B: descend(f, x0, 0.0, GradientMethod, metric=B, maxiter=study.first_order),
        GRADIENT: descend(f, x0, 0.0, GradientMethod, maxiter=study.first_order),
        SCIPY["L-BFGS-B"]: scipy_descent(f, x0, 0.0, "L-BFGS-B", limit=500),
    }
    record(run, "logistic regression, breast cancer", found)
    for name, one in found.items():
        run.record(name, "loss at the end, logistic regression, breast cancer", one.gaps[-1])
    return {"logistic regression, breast cancer": found}


def table(run: Run, name: str) -> tuple[Float[ndarray, "m n"], Float[ndarray, " m"]]:
    """Rows and offsets of a soft maximum: the features and the labels of a table."""
    if name in ("mushrooms", "a9a"):
        X, y = load_svmlight_file(run.data(f"libsvm/{name}", f"the LIBSVM data set {name}"))
    else:
        X, y = (load_breast_cancer if name == "breast cancer" else load_digits)(return_X_y=True)
        X = scale(X) if name == "breast cancer" else X / 16
    return X.toarray() if issparse(X) else X, np.asarray(y, float)


def classifiers(run: Run, study: Study) -> None:
    """Penalised logistic regression on bundled tables: iterations, seconds and agreement with scikit-learn."""
    for name in study.fits:
        X, y = table(run, name)
        models = {
            "GNSLogisticRegression": GNSLogisticRegression(),
            "scikit-learn newton-cholesky": LogisticRegression(solver="newton-cholesky", tol=1e-10),
            "scikit-learn lbfgs": LogisticRegression(solver="lbfgs", tol=1e-8, max_iter=10_000),
        }
        for method, model in models.items():
            start = time.perf_counter()
            model.fit(X, y)
            run.record(method, "seconds of a fit", time.perf_counter() - start, table=name)
            run.record(method, "iterations of a fit", int(np.max(model.n_iter_)), table=name)
        ours, peer, _ = models.values()
        gap = float(abs(ours.coef_ - peer.coef_).max())
        run.record("GNSLogisticRegression", "largest difference to newton-cholesky", gap, table=name)


# Running, recording, drawing ------------------------------------------------------------------------------------------


def descend(f: Any, x0: ndarray, least: float, solver: Any, *, maxiter: int = 1000, **problem: Any) -> Descent:
    """One of our solvers until f - f* <= 1e-8."""
    start = time.perf_counter()
    found = solver(f_target=least + GAP, tol=0.0, maxiter=maxiter).minimize(f.fun_and_jac, x0, jac=True, **problem)
    seconds = time.perf_counter() - start
    history = found.history
    gaps = history["fun"] - least
    return Descent(gaps, history["njev"].astype(float), found.nit, seconds, bool(gaps[-1] <= GAP), history.get("gamma"))


class _Reached(Exception):
    """Ends a SciPy run whose target is met."""


def scipy_descent(f: Any, x0: ndarray, least: float, method: str, *, limit: int = 5000) -> Descent:
    """One of SciPy's solvers, stopped as soon as any point that it evaluates meets the target."""
    gaps: list[float] = []
    iterations = 0

    def fun_and_jac(x: ndarray) -> tuple[float, ndarray]:
        value, g = f.fun_and_jac(x)
        gaps.append(value - least)
        if gaps[-1] <= GAP or len(gaps) >= limit:
            raise _Reached
        return value, g

    def count(*_: Any) -> None:
        nonlocal iterations
        iterations += 1

    # tolerances out of the way: the gap alone ends a run
    options: dict[str, dict[str, Any]] = {
        "L-BFGS-B": {"ftol": 0.0, "gtol": 0.0, "maxfun": limit, "maxiter": limit},
        "Newton-CG": {"xtol": 0.0, "maxiter": limit},
        "trust-exact": {"gtol": 0.0, "maxiter": limit},
    }
    start = time.perf_counter()
    try:
        with np.errstate(all="ignore"):
            scipy.optimize.minimize(
                fun_and_jac,
                x0,
                jac=True,
                hess=None if method == "L-BFGS-B" else f.hess,
                method=method,
                callback=count,
                options=options[method],
            )
    except _Reached:
        iterations += 1
    seconds = time.perf_counter() - start
    best = np.minimum.accumulate(gaps)
    return Descent(best, np.arange(1.0, len(gaps) + 1), iterations, seconds, bool(best[-1] <= GAP))


def record(run: Run, problem: str, found: dict[str, Descent], *, seed: int | None = None, **setting: Any) -> None:
    """What every method took; infinity where it did not get there."""
    for name, one in found.items():
        quantities = {"iterations": one.iterations, "gradient calls": one.calls[-1], "seconds": one.seconds}
        for quantity, value in quantities.items():
            spent = float(value) if one.reached else np.inf
            run.record(name, f"{quantity} to 1e-8, {problem}", spent, seed=seed, **setting)


def draw(run: Run, panels: dict[str, dict[str, Descent]]) -> None:
    """Gap over gradient calls on three problems, and the gammas that the search found on the first."""
    figure, axes = canvas(9.0, 7.0, nrows=2, ncols=2)
    shown = ["soft maximum", "Nesterov's chain", "logistic regression, breast cancer"]
    names = list(dict.fromkeys(name for title in shown for name in panels[title]))
    colours = {name: colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    for ax, title in zip(axes.flat, shown):
        for name, one in panels[title].items():
            style = "-" if name.startswith("GNS") else "--"
            at = np.unique(np.geomspace(1, len(one.gaps), 200).astype(int)) - 1  # what a logarithmic axis can show
            ax.plot(one.calls[at], np.maximum(one.gaps[at], 1e-10), style, color=colours[name], lw=1.5, label=name)
        ax.axhline(GAP, color=INK, lw=0.8, ls=":")
        ax.set(xscale="log", yscale="log", title=title, xlabel="gradient calls", ylabel="f - f*")
        ax.set_ylim(1e-9, None)
    ax = axes.flat[-1]
    for name in (EXACT, WEIGHTED):
        ax.plot(panels["soft maximum"][name].gammas, color=colours[name], lw=1.5)
    ax.set(yscale="log", title="gamma on the soft maximum", xlabel="iteration")
    handles = {h.get_label(): h for a in axes.flat for h in a.get_lines() if h.get_label() in colours}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8.5)
    caption = (
        "Distance to the minimum over gradient calls, one start each: the method (solid) beside what else solves these"
        " problems (dashed). Last panel: the step bound gamma found by doubling and halving, which levels off as the"
        " theory of quasi-self-concordant functions says."
    )
    run.figure(figure, "gaps", caption)
