"""Sketched Newton steps beside GMRES-SQP, SciPy's SLSQP and trust-constr: academic, learning and control problems.

Evaluations are counted alike for all: one for f and c at a point, one for their first derivatives. A method has solved
a problem when it ends at a KKT residual of 1e-4. SciPy's methods report no comparable multipliers, so that theirs are
the least-squares ones at their final point, and their own tolerances are set tight enough not to decide.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.optimize import NonlinearConstraint, minimize
from scipy.sparse.linalg import lsqr
from sklearn.datasets import load_breast_cancer, load_digits, load_svmlight_file
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from locally.evidence import Run
from locally.optimize.constrained import (
    L1SQP,
    AdaSketchNewton,
    AugmentedLagrangian,
    EqualityProblem,
    Instance,
    Solution,
    constrained_logistic,
    hock_schittkowski,
    poisson_control,
)
from locally.optimize.constrained.problems import NAMES

TOL = 1e-4
OURS = "AdaSketch-Newton"
GAUSSIAN = "AdaSketch-Newton, Gaussian sketches"
PUBLISHED = "AdaSketch-Newton, capped inner solves accepted as published"
ADAPTIVE, L1 = "adaptive l1-SQP", "l1-SQP"
EXCHANGED = "l1-SQP, tests as published"
LIBSVM = ("a9a", "w8a", "mushrooms", "ionosphere_scale", "phishing", "sonar_scale", "splice_scale")
CUTEST = (
    "HS6 BT5 BT9 HS28 BT10 HIMMELBA BT12 HS40 BT3 BT6 BT11 HS7 GENHS28 HS51 SINVALNE BOOTH HS52 HS47 WAYSEA1NE HS48 "
    "HS50 RSNBRNE CUBENE HS77 MWRIGHT ZANGWIL3 TRIGON1NE BA-L1SP HS78 HS56 HELIXNE HS42 HS79 ORTHREGB HS100LNP GOTTFR "
    "HIMMELBE MOREBVNE WAYSEA2NE DENSCHNCNE DENSCHNFNE HIMMELBC PRICE4NE INTEQNE BA-L1 MANCINONE BT2"
)

Method = Callable[[Instance], "Ending"]


def experiment(run: Run) -> None:
    academic_problems(run, thorough=run.pick(quick=False, default=True, paper=True))
    superlinear_steps(run, run.pick(quick=["HS79"], default=["HS78", "HS79"], paper=["HS78", "HS79"]))
    sets = run.pick(quick=["breast cancer"], default=["breast cancer", "digits"], paper=list(LIBSVM))
    logistic_regression(run, sets)
    control_of_poisson(run, run.pick(quick=(3, 8), default=(3, 8, 16, 32, 64), paper=(3, 8, 16, 32, 64, 100)))
    if run.pick(quick=False, default=False, paper=True):
        cutest_problems(run)


# What is compared -----------------------------------------------------------------------------------------------------


class Ending:
    """Where a method ended, in the figures that all of them share."""

    def __init__(self, kkt: float, nit: int, nfev: int, njev: int, fallbacks: int = 0, success: bool = True) -> None:
        self.kkt, self.nit, self.nfev, self.njev, self.fallbacks = kkt, nit, nfev, njev, fallbacks
        self.solved = success and kkt <= TOL

    @classmethod
    def of(cls, s: Solution) -> "Ending":
        return cls(s.kkt, s.nit, s.nfev, s.njev, s.fallbacks, s.success)


def ours(seed: int, **options: Any) -> Method:
    def solve(instance: Instance) -> Ending:
        solver = AdaSketchNewton(tol=TOL, random_state=np.random.default_rng([1, seed]), **options)
        return Ending.of(solver.solve(instance.problem, instance.x0, instance.lam0))

    return solve


def baseline(solver: L1SQP | AugmentedLagrangian) -> Method:
    return lambda instance: Ending.of(solver.solve(instance.problem, instance.x0, instance.lam0))


def scipy_method(name: str, **options: Any) -> Method:
    """SciPy with the same derivatives; evaluations counted at the functions themselves."""

    def solve(instance: Instance) -> Ending:
        p = instance.problem
        calls: defaultdict[str, int] = defaultdict(int)

        def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                calls[kind] += 1
                return function(*args)

            return call

        zero = np.zeros(p.m)
        constraint = NonlinearConstraint(
            p.constr, 0.0, 0.0, jac=p.jac, hess=lambda x, v: p.hess(x, v) - p.hess(x, zero)
        )
        second = {"hess": lambda x: p.hess(x, zero)} if name == "trust-constr" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on singular quasi-Newton updates and the like
            found = minimize(
                counted("f", p.fun),
                instance.x0,
                jac=counted("g", p.grad),
                constraints=constraint,
                method=name,
                options=options,
                **second,
            )
        return Ending(kkt_at(p, found.x), found.nit, calls["f"], calls["g"])

    return solve


SLSQP = scipy_method("SLSQP", maxiter=500, ftol=1e-10)
TRUST_CONSTR = scipy_method("trust-constr", gtol=TOL / 10, xtol=1e-10)


def kkt_at(p: EqualityProblem, x: np.ndarray) -> float:
    """KKT residual with the multipliers that make it smallest."""
    g, G, c = p.grad(x), p.jac(x), p.constr(x)
    exact = not sp.issparse(G)
    lam = np.linalg.lstsq(G.T, -g, rcond=None)[0] if exact else lsqr(G.T, -g, atol=1e-12, btol=1e-12)[0]
    return float(np.hypot(np.linalg.norm(g + G.T @ lam), np.linalg.norm(c)))


def record(run: Run, method: str, ending: Ending, seed: int | None, seconds: float, **setting: str | int) -> None:
    measures = {
        "final KKT residual": ending.kkt,
        "outer iterations": ending.nit,
        "function evaluations": ending.nfev,
        "gradient evaluations": ending.njev,
        "unsolved": float(not ending.solved),
        "iterations that MINRES finished": ending.fallbacks,
        "seconds": seconds,
    }
    for metric, value in measures.items():
        run.record(method, metric, value, seed=seed, **setting)


def timed(method: Method, instance: Instance) -> tuple[Ending, float]:
    """On one core: inner products of a few thousand entries only lose by waiting for a second thread."""
    with threadpool_limits(1):
        start = perf_counter()
        return method(instance), perf_counter() - start


# Academic problems ----------------------------------------------------------------------------------------------------


def academic_problems(run: Run, *, thorough: bool) -> None:
    """The claims' figures: medians over fourteen problems."""
    instances = [hock_schittkowski(name) for name in NAMES]
    fixed: dict[str, Method] = {
        ADAPTIVE: baseline(L1SQP()),
        L1: baseline(L1SQP(adaptive=False)),
        "augmented Lagrangian": baseline(AugmentedLagrangian()),
        "SLSQP (SciPy)": SLSQP,
        "trust-constr (SciPy)": TRUST_CONSTR,
    }
    if thorough:
        fixed[EXCHANGED] = baseline(L1SQP(adaptive=False, exchanged=True))
    medians = {}
    for name, method in run.track(fixed.items(), "baselines", total=len(fixed)):
        medians[name] = over_problems(run, name, method, instances, None)
    for seed in run.track(run.seeds, "Hock-Schittkowski problems"):
        for name, options in ((OURS, {}), (GAUSSIAN, {"sketch": "gaussian"})):
            found = over_problems(run, name, ours(seed, **options), instances, seed)
            for other in (ADAPTIVE, L1):
                for metric, value in found.items():
                    run.record(name, f"{metric} / that of {other}", value / medians[other][metric], seed=seed)
    run.plot_bars("median function evaluations", name="evaluations", caption=EVALUATIONS_CAPTION)
    if thorough:
        run.plot_bars("median final KKT residual", log=True, name="kkt", caption=KKT_CAPTION)


def over_problems(run: Run, name: str, method: Method, instances: list[Instance], seed: int | None) -> dict[str, float]:
    endings = []
    for instance in instances:
        ending, seconds = timed(method, instance)
        record(run, name, ending, seed, seconds, problem=instance.name)
        endings.append(ending)
    run.record(name, f"unsolved problems out of {len(instances)}", sum(not e.solved for e in endings), seed=seed)
    medians = {
        "median final KKT residual": float(np.median([e.kkt for e in endings])),
        "median outer iterations": float(np.median([e.nit for e in endings])),
        "median function evaluations": float(np.median([e.nfev for e in endings])),
        "median gradient evaluations": float(np.median([e.njev for e in endings])),
    }
    for metric, value in medians.items():
        run.record(name, metric, value, seed=seed)
    return medians


def superlinear_steps(run: Run, names: list[str]) -> None:
    """Local rates under the plain inner test: theta = 1 contracts by delta a step, theta -> 0 superlinearly."""
    histories: dict[str, tuple[float, ...]] = {}
    for seed in run.seeds:
        for name in names:
            instance = hock_schittkowski(name)
            for schedule in ("constant", "superlinear"):
                solver = AdaSketchNewton(
                    accuracy="plain", theta=schedule, tol=1e-9, random_state=np.random.default_rng([2, seed])
                )
                found = solver.solve(instance.problem, instance.x0, instance.lam0)
                kkt = np.array(found.kkt_history)
                method = f"{OURS}, theta {schedule}"
                run.record(method, "local order", local_order(kkt), seed=seed, problem=name)
                run.record(method, "outer iterations to 1e-9", found.nit, seed=seed, problem=name)
                histories.setdefault(f"{name}, theta {schedule}", found.kkt_history)
    plot_rates(run, histories)


def local_order(kkt: np.ndarray) -> float:
    """log r_{k+1} / log r_k of the last step that started below 0.1."""
    started = np.flatnonzero(kkt[:-1] < 0.1)
    return float(np.log(kkt[started[-1] + 1]) / np.log(kkt[started[-1]]))


# Constrained logistic regression --------------------------------------------------------------------------------------


def logistic_regression(run: Run, sets: list[str]) -> None:
    data = {name: loaded for name in sets if (loaded := load_set(run, name)) is not None}
    for seed in run.track(run.seeds, "constrained logistic regression"):
        methods: dict[str, Method] = {
            OURS: ours(seed, eps_b=1e-2),
            PUBLISHED: ours(seed, eps_b=1e-2, fallback="accept", equilibrate=False),
            ADAPTIVE: baseline(L1SQP(eps_b=1e-2, max_iter=300)),
            L1: baseline(L1SQP(adaptive=False, eps_b=1e-2, max_iter=300)),
            "augmented Lagrangian": baseline(AugmentedLagrangian(max_inner=100)),
            "SLSQP (SciPy)": SLSQP,
            "trust-constr (SciPy)": TRUST_CONSTR,
        }
        for set_name, (features, labels) in data.items():
            instance = constrained_logistic(features, labels, random_state=np.random.default_rng([3, seed]))
            for name, method in methods.items():
                ending, seconds = timed(method, instance)
                record(run, name, ending, seed, seconds, data=set_name)
                run.record(name, "unsolved regressions", float(not ending.solved), seed=seed, data=set_name)


def load_set(run: Run, name: str) -> tuple[Any, np.ndarray] | None:
    """Features and labels -1 or 1; None for a file that is not there, of which a9a must be."""
    if name == "breast cancer":
        X, y = load_breast_cancer(return_X_y=True)
        return StandardScaler().fit_transform(X), 2.0 * y - 1
    if name == "digits":
        X, y = load_digits(return_X_y=True)
        X = X / 16
        return X[:, X.std(axis=0) > 0], np.where(y == 0, 1.0, -1.0)
    path = run.data("libsvm/a9a", "a LIBSVM data set in svmlight text").parent / name
    return read_svmlight(path) if path.exists() else None


def read_svmlight(path: Path) -> tuple[sp.csr_array, np.ndarray]:
    X, y = load_svmlight_file(str(path))
    used = np.flatnonzero(np.bincount(X.indices, minlength=X.shape[1]))
    return sp.csr_array(X[:, used]), np.where(y == y.max(), 1.0, -1.0)


# Optimal control ------------------------------------------------------------------------------------------------------


def control_of_poisson(run: Run, sides: tuple[int, ...]) -> None:
    for side in run.track(sides, "Poisson control"):
        instance = poisson_control(side)
        methods: dict[str, Method] = {OURS: ours(run.seeds[0], max_sketches=200_000)}
        if side <= 3:
            methods |= {
                GAUSSIAN: ours(run.seeds[0], sketch="gaussian", max_sketches=200_000),
                ADAPTIVE: baseline(L1SQP(max_cycles=5000)),
                "augmented Lagrangian": baseline(AugmentedLagrangian()),
                "SLSQP (SciPy)": SLSQP,
            }
        if side <= 32:
            methods["trust-constr (SciPy)"] = TRUST_CONSTR
        for name, method in methods.items():
            ending, seconds = timed(method, instance)
            record(run, name, ending, None, seconds, side=side, unknowns=instance.problem.n)
            run.record(name, "unsolved control problem", float(not ending.solved), side=side)
            run.record(name, "seconds on Poisson control", seconds, unknowns=instance.problem.n)
    if len(sides) > 2:
        run.plot_lines("unknowns", "seconds on Poisson control", log=True, name="control", caption=CONTROL_CAPTION)


# The CUTEst list ------------------------------------------------------------------------------------------------------


def cutest_problems(run: Run) -> None:
    """All 47 problems where the CUTEst interface is installed; without it the claim stays undecided."""
    try:
        import pycutest
    except ImportError:
        print("the CUTEst list is left out: pycutest, with the CUTEst libraries, is not installed")
        return
    for seed in run.track(run.seeds, "CUTEst problems"):
        instances = [from_cutest(name, problem) for name, problem in imported(pycutest)]
        solved = 0
        for instance in instances:
            ending, seconds = timed(ours(seed), instance)
            record(run, OURS, ending, seed, seconds, problem=f"CUTEst {instance.name}")
            solved += ending.solved
        run.record(OURS, f"solved CUTEst problems out of {len(CUTEST.split())}", solved, seed=seed)


def imported(pycutest: Any) -> Iterator[tuple[str, Any]]:
    for name in CUTEST.split():
        yield name, pycutest.import_problem(name)


def from_cutest(name: str, p: Any) -> Instance:
    """A problem of the CUTEst interface, all of whose constraints are equalities c(x) = 0."""
    problem = EqualityProblem(
        n=p.n,
        m=p.m,
        fun=p.obj,
        grad=lambda x: p.obj(x, gradient=True)[1],
        constr=p.cons,
        jac=lambda x: p.cons(x, gradient=True)[1],
        hess=lambda x, lam: p.hess(x, lam),
    )
    return Instance(name, problem, np.array(p.x0, dtype=float), np.zeros(p.m))


# Figures --------------------------------------------------------------------------------------------------------------

EVALUATIONS_CAPTION = (
    "Median evaluations of objective and constraints over 14 Hock-Schittkowski problems, to a KKT residual of 1e-4."
    " The sketched methods also take a gradient at each of them, the SQP methods only at accepted points."
)
KKT_CAPTION = (
    "Median final KKT residual over the same problems, all stopped at 1e-4: accurate Newton steps overshoot the"
    " tolerance."
)
CONTROL_CAPTION = (
    "Seconds to a KKT residual of 1e-4 on Poisson control over the number of unknowns. On fine grids the sketches are"
    " used up before they converge and MINRES, without factorising, finishes the solve."
)


def plot_rates(run: Run, histories: dict[str, tuple[float, ...]]) -> None:
    from locally.plots import canvas

    figure, axes = canvas()
    for label, history in histories.items():
        axes.semilogy(history, marker="o", markersize=3.5, label=label)
    axes.set(xlabel="outer iteration", ylabel="KKT residual")
    axes.legend()
    caption = (
        "One run on each problem with the plain inner test: a constant theta contracts by about delta = 0.1 a step,"
        " theta = min(1, KKT residual) superlinearly."
    )
    run.figure(figure, "rates", caption)
