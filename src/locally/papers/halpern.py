"""Component evaluations and operator norms of variance-reduced Halpern iteration beside what else solves the problems.

Five parts: the theorem's own setting (least squares, where the saving must grow like sqrt(n)), its bound, the paper's
two experiments (a matrix game and a linearly constrained quadratic programme), and a classification of real data.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import linprog

from locally.equilibrium.halpern import (
    AnchoredExtragradient,
    Extragradient,
    FiniteSumOperator,
    Halpern,
    InexactHalpern,
    LeastSquares,
    Logistic,
    MatrixGame,
    QuadraticSaddle,
    SingleLoopHalpern,
    Solution,
    Solver,
    VarianceReducedExtragradient,
    VRFoRB,
)
from locally.evidence import Run

OURS = "variance-reduced Halpern"
OURS_IMPORTANCE = "variance-reduced Halpern, importance"
OURS_RESTARTED = "variance-reduced Halpern, restarts"
OURS_BOTH = "variance-reduced Halpern, importance and restarts"
INEXACT = "inexact variance-reduced Halpern"
HALPERN = "deterministic Halpern"
EG, EAG, VREG = "extragradient", "anchored extragradient", "variance-reduced extragradient"


def experiment(run: Run) -> None:
    game = run.pick(quick=(100, 1000), default=(200, 1500), paper=(500, 5000))
    programme = run.pick(quick=(50, 1_500), default=(50, 10_000), paper=(200, 1_000_000))
    sizes = run.pick(quick=[100, 400], default=[100, 400, 1600, 6400], paper=[100, 400, 1600, 6400, 25600])
    checkpoints = run.pick(quick=[10, 100, 400], default=[10, 30, 100, 300, 1000], paper=[10, 10000])
    tables = run.pick(quick=["breast cancer"], default=["breast cancer", "digits"], paper=["digits"])
    parts: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (savings, (sizes,)),
        (bound, (10, checkpoints)),
        (matrix_game, game),
        (quadratic_programme, programme),
        (classification, (tables,)),
    ]
    run.parallel(do, parts, "parts of the study")


def do(run: Run, part: tuple[Callable[..., None], tuple[Any, ...]]) -> None:
    study, sizes = part
    with warnings.catch_warnings():
        # nor is it in the paper's experiments
        warnings.filterwarnings("ignore", message=".*not known to be cocoercive")
        study(run, *sizes)


def savings(run: Run, sizes: Sequence[int]) -> None:
    """Evaluations until the operator norm has fallen to 1 % of its first value, over the number of components."""
    evaluations = "component evaluations to 1 %"
    for seed in run.track(run.seeds, "least squares"):
        saved = []
        for n in run.track(sizes, "numbers of components"):
            op, _ = regression(n, np.random.default_rng(seed))
            u0 = np.zeros(op.dim)
            limits: dict[str, Any] = {"tol": 1e-2 * float(np.linalg.norm(op.full(u0))), "max_epochs": 20_000}
            solvers: dict[str, Solver] = {
                OURS: SingleLoopHalpern(multiplier=4.0, random_state=seed, **limits),
                HALPERN: Halpern(**limits),
                OURS_RESTARTED: SingleLoopHalpern(multiplier=4.0, restart=True, random_state=seed, **limits),
                EG: Extragradient(**limits),
                VREG: VarianceReducedExtragradient(random_state=seed, **limits),
            }
            cost = {name: solver.solve(op, u0).evaluations_to(limits["tol"]) for name, solver in solvers.items()}
            for name, spent in cost.items():
                run.record(name, evaluations, spent, seed=seed, components=n)
            saved.append(cost[HALPERN] / cost[OURS])
            run.record(OURS, "evaluations / those of deterministic Halpern", 1 / saved[-1], seed=seed, components=n)
        slope = np.polyfit(np.log(sizes), np.log(saved), 1)[0]
        run.record(OURS, "slope of log evaluations saved over log components", slope, seed=seed)
    run.plot_lines(
        x="components",
        y=evaluations,
        log=True,
        caption="Until the operator norm is 1 % of its first value: least squares, normalised rows, 50 unknowns.",
    )


def bound(run: Run, runs: int, checkpoints: Sequence[int]) -> None:
    """Mean operator norm after k steps with the theorem's step size, over the theorem's bound 16 L ||u0 - u*|| / k."""
    for seed in run.track(run.seeds, "bound"):
        rng = np.random.default_rng(seed)
        op, solution = regression(400, rng)
        distance = float(np.linalg.norm(solution))  # the rows are normalised: L = 1
        ratios = []
        for k in checkpoints:
            norms = [
                SingleLoopHalpern(tol=0.0, max_epochs=1e9, max_iterations=k, random_state=rng)
                .solve(op, np.zeros(op.dim))
                .residual
                for _ in range(runs)
            ]
            ratios.append(float(np.mean(norms)) * k / (16 * distance))
        run.record(OURS, "largest mean operator norm / its bound", max(ratios), seed=seed)


def matrix_game(run: Run, n: int, epochs: int) -> None:
    """Policeman and burglar on n houses, with the paper's step sizes; operator norms over epochs."""
    for seed in run.track(run.seeds, "matrix game"):
        game = MatrixGame(policeman_and_burglar(house_values(run, n, seed)))
        L, expected = float(np.linalg.norm(game.A, 2)), float(np.linalg.norm(game.A))
        limits: dict[str, Any] = {"tol": 0.0, "max_epochs": epochs}
        solvers: dict[str, Solver] = {
            OURS: SingleLoopHalpern(eta=5 / expected, random_state=seed, **limits),
            INEXACT: paper_inexact(math.sqrt(n) / expected, expected, 5.0, random_state=seed, **limits),
            VREG: VarianceReducedExtragradient(eta=3 / math.sqrt(n) / expected, random_state=seed, **limits),
            EG: Extragradient(eta=5 / L, **limits),
            EAG: AnchoredExtragradient(eta=5 / L, **limits),
        }
        found = trace(run, "operator norm, game", solvers, game, game.uniform_start(), seed)
        for name, solution in found.items():
            run.record(name, "duality gap, game", game.gap(solution.x), seed=seed)
        for name in (EG, EAG):
            needed = found[OURS].evaluations_to(found[name].residual) / found[name].evaluations
            run.record(OURS, f"epochs to the final norm of {name} / its epochs, game", needed, seed=seed)
        start = time.perf_counter()
        strategies = solve_by_linear_programming(game)
        run.record("linear programming (SciPy, HiGHS)", "seconds, game", time.perf_counter() - start, seed=seed)
        run.record("linear programming (SciPy, HiGHS)", "duality gap, game", game.gap(strategies), seed=seed)
    run.plot_lines(
        x="epoch",
        y="operator norm, game",
        log=True,
        caption=f"Matrix game with {n} strategies each. Linear programming solves games of this size to rounding.",
    )


def quadratic_programme(run: Run, n: int, epochs: int) -> None:
    """The hard instance of Ouyang and Xu, operator norms over epochs.

    The methods of the paper take its steps, but extragradient and its variance-reduced form get longer ones that suit
    them better, and anchored extragradient appears a second time with its longest safe step.
    """
    op = hard_quadratic(n)
    known = op.constants()
    tau = 0.001 / VRFoRB(step=1.0).tau(n, math.sqrt(n), known.expected)
    limits: dict[str, Any] = {"tol": 0.0, "max_epochs": epochs}
    u0 = np.full(op.dim, 1 / n)
    metric = "operator norm, quadratic programme"
    ours = []
    for seed in run.track(run.seeds, "quadratic programme"):
        stochastic: dict[str, Solver] = {
            OURS: SingleLoopHalpern(eta=0.3, random_state=seed, **limits),
            INEXACT: paper_inexact(math.sqrt(n), known.expected, tau, random_state=seed, **limits),
            VREG: VarianceReducedExtragradient(random_state=seed, **limits),
        }
        ours.append(trace(run, metric, stochastic, op, u0, seed)[OURS])
    longest = 0.99 / known.lipschitz
    deterministic: dict[str, Solver] = {
        EG: Extragradient(eta=longest, **limits),
        EAG: AnchoredExtragradient(eta=0.3, **limits),
        f"{EAG}, longest step": AnchoredExtragradient(eta=longest, **limits),
    }
    for name, reference in trace(run, metric, deterministic, op, u0, None).items():
        for seed, solution in zip(run.seeds, ours):
            needed = solution.evaluations_to(reference.residual) / reference.evaluations
            run.record(OURS, f"epochs to the final norm of {name} / its epochs, quadratic programme", needed, seed=seed)
    run.plot_lines(
        x="epoch",
        y=metric,
        log=True,
        caption=f"Linearly constrained quadratic programme with {n} unknowns and {n} constraints.",
    )


def classification(run: Run, names: Sequence[str]) -> None:
    """Logistic regression on data that ships with scikit-learn: epochs to 1 % of the first gradient norm."""
    for name in run.track(names, "classification"):
        X, y = labelled_data(name)
        uniform, importance = (Logistic(X, y, ridge=1e-3, sampling=s) for s in ("uniform", "importance"))
        u0 = np.zeros(uniform.dim)
        limits: dict[str, Any] = {"tol": 1e-2 * float(np.linalg.norm(uniform.full(u0))), "max_epochs": 40_000}
        metric = f"epochs to 1 %, {name}"
        deterministic = {HALPERN: Halpern(**limits), EG: Extragradient(**limits)}
        cost = {
            method: solver.solve(uniform, u0).evaluations_to(limits["tol"]) for method, solver in deterministic.items()
        }
        for method, spent in cost.items():
            run.record(method, metric, spent / uniform.n)
        for seed in run.seeds:
            ours = SingleLoopHalpern(multiplier=4.0, random_state=seed, **limits)
            attempts: list[tuple[str, Solver, Logistic]] = [
                (OURS, ours, uniform),
                (OURS_IMPORTANCE, ours, importance),
                (OURS_BOTH, SingleLoopHalpern(multiplier=4.0, restart=True, random_state=seed, **limits), importance),
                (VREG, VarianceReducedExtragradient(random_state=seed, **limits), importance),
            ]
            for method, solver, op in attempts:
                spent = solver.solve(op, u0).evaluations_to(limits["tol"])
                run.record(method, metric, spent / op.n, seed=seed)
                ratio = spent / cost[HALPERN]
                run.record(method, f"evaluations / those of deterministic Halpern, {name}", ratio, seed=seed)
        caption = "Logistic regression; importance: observations drawn by squared norm. Until the gradient norm is 1 %."
        run.plot_bars(metric, log=True, caption=caption)


def trace(
    run: Run, metric: str, solvers: dict[str, Solver], op: FiniteSumOperator, u0: ndarray, seed: int | None
) -> dict[str, Solution]:
    """Run every solver, record its last known operator norm on a grid of epochs and its seconds."""
    found = {}
    for name, solver in solvers.items():
        start = time.perf_counter()
        found[name] = solver.solve(op, u0)
        run.record(name, metric.replace("operator norm", "seconds"), time.perf_counter() - start, seed=seed)
        for epoch in np.unique(np.geomspace(10, solver.max_epochs, 25).astype(int)).tolist():
            run.record(name, metric, found[name].residual_after(epoch * op.n), seed=seed, epoch=epoch)
    return found


def paper_inexact(eta: float, L: float, step: float, **limits: Any) -> InexactHalpern:
    """Algorithm 2 as the paper's experiments set it: short inner runs with long steps."""
    return InexactHalpern(eta=eta, L=L, inner=VRFoRB(step=step), inner_length=0.05, check_every=10, **limits)


def regression(n: int, rng: np.random.Generator, dim: int = 50) -> tuple[LeastSquares, Float[ndarray, " dim"]]:
    """n normalised rows with decaying columns and a consistent right-hand side, and the solution."""
    A = rng.standard_normal((n, dim)) / np.arange(1, dim + 1)
    A /= np.linalg.norm(A, axis=1, keepdims=True)
    solution = rng.standard_normal(dim)
    return LeastSquares(A, A @ solution), solution


def house_values(run: Run, n: int, seed: int) -> Float[ndarray, " n"]:
    """A fresh street for each seed; at full size the paper's, which NumPy's old generator makes from seed 1."""
    normal = run.pick(
        quick=np.random.default_rng(seed).standard_normal,
        default=np.random.default_rng(seed).standard_normal,
        paper=np.random.RandomState(1).standard_normal,
    )
    return np.abs(normal(n))


def policeman_and_burglar(values: Float[ndarray, " n"]) -> Float[ndarray, "n n"]:
    """A[i, j] = values[j] (1 - exp(-0.8 |i - j|)): worth of house j times the chance to escape a guard at house i."""
    houses = np.arange(len(values))
    return values * (1 - np.exp(-0.8 * np.abs(houses[:, None] - houses)))


def hard_quadratic(n: int) -> QuadraticSaddle:
    """min x^T H x / 2 - h^T x subject to A x = b with A / 4 a flipped difference matrix and H = 2 A^T A."""
    A = np.fliplr(np.eye(n) - np.eye(n, k=1)) / 4
    return QuadraticSaddle(2 * A.T @ A, A, np.full(n, 0.25), np.eye(n)[-1] / 4)


def labelled_data(name: str) -> tuple[Float[ndarray, "n dim"], Float[ndarray, " n"]]:
    """Features with a column of ones; digits are told apart as even and odd."""
    from sklearn.datasets import load_breast_cancer, load_digits
    from sklearn.preprocessing import StandardScaler

    if name == "digits":
        X, y = load_digits(return_X_y=True)
        X, y = X / 16, y % 2
    else:
        X, y = load_breast_cancer(return_X_y=True)
        X = StandardScaler().fit_transform(X)
    return np.column_stack([X, np.ones(len(X))]), y.astype(float)


def solve_by_linear_programming(game: MatrixGame) -> Float[ndarray, " dim"]:
    """Both players' linear programmes: min t subject to A x <= t, and max s subject to A^T y >= s."""

    def player(A: ndarray) -> ndarray:
        rows, columns = A.shape
        solved = linprog(
            np.append(np.zeros(columns), 1.0),
            A_ub=np.column_stack([A, -np.ones(rows)]),
            b_ub=np.zeros(rows),
            A_eq=np.append(np.ones(columns), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * columns + [(None, None)],
            method="highs",
        )
        return solved.x[:columns]

    return np.concatenate([player(game.A), player(-game.A.T)])
