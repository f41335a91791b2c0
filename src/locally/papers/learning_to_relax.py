"""Learned relaxation beside fixed omegas: shifted Laplacians under SOR, and a 2-D heat equation under SSOR-CG.

Both set-ups are the paper's. The Laplacians' iteration counts are tabulated once for all omegas and the learners replay
on the table; the heat equation is stepped with live solves, each learner along its own trajectory.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse.linalg import cg

from locally.evidence import Run
from locally.linalg.relaxation import Splitting, SSORPreconditioner, optimal_omega, sor_iteration_counts
from locally.solvers.omega_bandit import (
    SOR,
    BinnedTsallisINF,
    ChebCB,
    ParameterBandit,
    SSORConjugateGradients,
    TsallisINF,
    TunedSolver,
)

OMEGAS = np.linspace(1, 1.95, 20)
RTOL = 1e-8
VARIANCES = {"high variance": (0.5, 1.5), "low variance": (2.0, 6.0)}  # Beta distributions of the diagonal shift

Learners = Mapping[str, Callable[[np.random.Generator], ParameterBandit]]


@dataclass(frozen=True)
class Study:
    """Sizes of one scale. `replays` learners of each kind run on each seed's table of instances."""

    instances: int
    replays: int
    steps: int
    stride: int  # between the steps of the heat equation at which all omegas are tried
    grids: tuple[int, ...]


def experiment(run: Run) -> None:
    carry_out(
        run,
        run.pick(
            quick=Study(instances=1000, replays=1, steps=1000, stride=10, grids=(25,)),
            default=Study(instances=3000, replays=4, steps=2000, stride=1, grids=(25,)),
            paper=Study(instances=5000, replays=4, steps=5000, stride=1, grids=(25, 50, 100, 200, 400)),
        ),
    )


def carry_out(run: Run, study: Study) -> None:
    curves: dict[str, list[dict[str, ndarray]]] = {name: [] for name in VARIANCES}
    for seed in run.track(run.seeds, "shifted Laplacians"):
        with ThreadPoolExecutor(len(VARIANCES)) as pool:
            tables = pool.map(partial(ShiftedLaplacians.draw, study.instances, seed), VARIANCES.values())
        for name, table in zip(VARIANCES, tables):
            curves[name].append(compare_on_table(run, table, name, study.replays, seed))
    plot_curves(run, curves)

    for nx in run.track(study.grids, "heat equation"):
        compare_on_heat(run, nx, study.steps, study.stride)
    if len(study.grids) > 1:
        run.plot_lines("unknowns", "iterations over the heat run", log=True, name="heat-growth", caption=GROWTH_CAPTION)
    else:
        run.plot_bars("iterations over the heat run", name="heat-totals", caption=TOTALS_CAPTION)


# Shifted Laplacians ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShiftedLaplacians:
    """(A + c_t I) x = b_t on a 10 x 10 grid: contexts c_t and SOR's iteration counts at every omega."""

    contexts: Float[ndarray, " T"]
    targets: Float[ndarray, "T n"]
    counts: Int[ndarray, "T omegas"]

    @classmethod
    def draw(cls, instances: int, seed: int, beta: tuple[float, float]) -> "ShiftedLaplacians":
        rng = np.random.default_rng([seed, *(int(10 * b) for b in beta)])
        contexts = -0.15 + 0.6 * rng.beta(*beta, instances)
        targets = rng.standard_normal((instances, 100))
        while (outside := np.linalg.norm(targets, axis=1) > 10).any():  # radially truncated at sqrt(n)
            targets[outside] = rng.standard_normal((outside.sum(), 100))
        return cls(contexts, targets, sor_iteration_counts(laplacian(10), contexts, targets, OMEGAS, rtol=RTOL))

    def counts_at_optimal_omega(self) -> Int[ndarray, " T"]:
        """With the omega of Young's theory for each instance, which needs its spectrum."""
        A = laplacian(10)
        split = Splitting.of(A)
        solver = SOR(rtol=RTOL)
        counts = np.empty(self.contexts.size, np.int64)
        for t, c in enumerate(self.contexts):
            A.data[split.diagonal_at] = 4 + c
            beta = 4 * np.cos(np.pi / 11) / (4 + c)
            counts[t] = solver.solve(split, self.targets[t], omega=optimal_omega(beta)).n_iter
        return counts


def compare_on_table(run: Run, table: ShiftedLaplacians, name: str, replays: int, seed: int) -> dict[str, ndarray]:
    """Record every method on one table; returns iterations over instances per method, averaged over replays."""
    problem = f"SOR, {name}"
    counts = table.counts
    totals = counts.sum(axis=0)
    best = int(totals.argmin())
    run.record("best fixed omega", "omega", OMEGAS[best], seed=seed, problem=problem)
    paths = {f"omega = {OMEGAS[arm]:g}": counts[:, arm] for arm in (0, 4, 8, 12, 16)}  # the paper's fixed omegas
    paths |= {
        "best fixed omega": counts[:, best],
        "instance-optimal on the grid": counts.min(axis=1),
        "UCB1": ucb1_on_table(counts),
        "instance-optimal by Young's formula": table.counts_at_optimal_omega(),
    }
    bounds = (-0.15, 0.65)
    learners: Learners = {
        "Tsallis-INF": lambda rng: TsallisINF(OMEGAS, rng=rng),
        "Tsallis-INF, reduced variance": lambda rng: TsallisINF(OMEGAS, estimator="rv", rng=rng),
        "Tsallis-INF, binned": lambda rng: BinnedTsallisINF(OMEGAS, bounds, n_bins=5, rng=rng),
        "ChebCB": lambda rng: ChebCB(OMEGAS, bounds, degree=5, rng=rng),
    }
    for index, (method, make) in enumerate(learners.items()):
        rngs = [np.random.default_rng([seed, index, replay]) for replay in range(replays)]
        paths[method] = np.mean([replay_on_table(make(rng), table) for rng in rngs], axis=0)

    last = slice(2 * len(counts) // 3, None)
    for method, path in paths.items():
        measures = {
            "iterations per solve": path.mean(),
            "iterations / best fixed omega": path.mean() / counts[:, best].mean(),
            "iterations / omega = 1": path.mean() / counts[:, 0].mean(),
            "last third / best fixed omega": path[last].mean() / counts[last, best].mean(),
            "last third / instance-optimal": path[last].mean() / counts[last].min(axis=1).mean(),
        }
        for metric, value in measures.items():
            run.record(method, metric, value, seed=seed, problem=problem)
    return paths


def replay_on_table(bandit: ParameterBandit, table: ShiftedLaplacians) -> Int[ndarray, " T"]:
    iterations = np.empty(table.contexts.size, np.int64)
    for t, (context, row) in enumerate(zip(table.contexts.tolist(), table.counts)):
        choice = bandit.ask(context)
        iterations[t] = row[choice.arm]
        bandit.tell(int(iterations[t]), choice)
    return iterations


def ucb1_on_table(counts: Int[ndarray, "T omegas"]) -> Int[ndarray, " T"]:
    """The textbook bandit (Auer et al., 2002): optimistic means, costs scaled by the largest so far."""
    T, d = counts.shape
    sums, plays = np.zeros(d), np.zeros(d)
    iterations = np.empty(T, np.int64)
    largest = counts[0, 0]
    for t in range(T):
        arm = t if t < d else int((sums / plays - largest * np.sqrt(2 * np.log(t) / plays)).argmin())
        iterations[t] = counts[t, arm]
        sums[arm] += counts[t, arm]
        plays[arm] += 1
        largest = max(largest, counts[t, arm])
    return iterations


def laplacian(m: int) -> sp.csr_array:
    """Five-point stencil with diagonal 4 on an m x m grid, zero around it."""
    T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(m, m))
    A = sp.csr_array(sp.kronsum(T, T, format="csr"))
    A.sort_indices()
    return A


# Heat equation --------------------------------------------------------------------------------------------------------


class HeatEquation:
    """u_t = kappa(t) Laplace(u) + f on the unit square, zero boundary, Crank-Nicolson with steps of 1e-3.

    kappa swings between a weak and a hundredfold stronger diffusion, f is a bump that circles the centre, u starts as a
    bump in the middle. All steps share one sparsity pattern, so one splitting serves the run and only values change.
    """

    def __init__(self, nx: int, dt: float = 1e-3) -> None:
        self.nx, self.dt, self.step = nx, dt, 0
        self.A = laplacian(nx - 1)
        self._stencil = self.A.data * nx**2
        self.split = Splitting.of(self.A)
        inner = np.arange(1, nx) / nx
        self._points = np.stack(np.meshgrid(inner, inner, indexing="ij"), axis=-1).reshape(-1, 2)
        self.u = self._bump(0.5, 0.5, radius=0.25)

    @staticmethod
    def diffusion(t: float) -> float:
        return max(0.1 * np.sin(2 * np.pi * t), -10 * np.sin(2 * np.pi * t))

    @property
    def context(self) -> float:
        """The diffusion coefficient at the start of the step."""
        return self.diffusion(self.step * self.dt)

    def system(self) -> tuple[Splitting, Float[ndarray, " n"]]:
        """Matrix (overwritten by the next call) and right-hand side of the next step."""
        t = (self.step + 0.5) * self.dt
        weight = 0.5 * self.dt * self.diffusion(t)
        # (I + weight Lap) u = 2 u - (I - weight Lap) u
        self.A.data[:] = weight * self._stencil
        self.A.data[self.split.diagonal_at] += 1
        x, y = 0.5 + np.cos(16 * np.pi * t) / 4, 0.5 + np.sin(16 * np.pi * t) / 4
        b = 2 * self.u - self.A @ self.u + self.dt * 32 * self._bump(x, y, radius=0.125)
        return self.split, b

    def advance(self, u: Float[ndarray, " n"]) -> None:
        self.u = u
        self.step += 1

    def _bump(self, x: float, y: float, radius: float) -> Float[ndarray, " n"]:
        distance = ((self._points - (x, y)) ** 2).sum(axis=1) / radius**2
        inside = distance < 1
        bump = np.zeros(distance.size)
        bump[inside] = np.exp(1 - 1 / (1 - distance[inside]))
        return bump


def compare_on_heat(run: Run, nx: int, steps: int, stride: int) -> None:
    counts = heat_table(run, nx, steps, stride)
    best = int(counts.sum(axis=0).argmin())
    totals = {
        "conjugate gradients (SciPy)": [scipy_heat_run(nx, steps, omega=None)],
        "SSOR-CG (SciPy), omega = 1": [scipy_heat_run(nx, steps, omega=1.0)],
    }
    fixed = {f"SSOR-CG, omega = {omega:g}": omega for omega in (1.0, 1.5, 1.95)}
    fixed["SSOR-CG, best fixed omega"] = float(OMEGAS[best])
    for method, omega in fixed.items():
        totals[method] = [heat_run(nx, steps, TsallisINF([omega]))]
    bounds = (0.0, 10.0)
    learners: Learners = {
        "Tsallis-INF": lambda rng: TsallisINF(OMEGAS, rng=rng),
        "Tsallis-INF, binned": lambda rng: BinnedTsallisINF(OMEGAS, bounds, n_bins=6, rng=rng),
        "ChebCB": lambda rng: ChebCB(OMEGAS, bounds, degree=5, rng=rng),
    }
    for index, (method, make) in enumerate(learners.items()):
        totals[method] = [
            heat_run(nx, steps, make(np.random.default_rng([seed, 10 + index])))
            for seed in run.track(run.seeds, f"heat equation, {method}")
        ]
    plain = totals["conjugate gradients (SciPy)"][0].iterations.sum()
    fixed_best = totals["SSOR-CG, best fixed omega"][0].iterations.sum()
    for method, runs in totals.items():
        for seed, done in zip(run.seeds if method in learners else [None], runs):
            total = done.iterations.sum()
            run.record(method, "iterations over the heat run", total, seed=seed, unknowns=(nx - 1) ** 2)
            run.record(method, "heat: iterations / best fixed omega", total / fixed_best, seed=seed, nx=nx)
            run.record(method, "heat: iterations / conjugate gradients", total / plain, seed=seed, nx=nx)
            run.record(method, "heat: milliseconds per step", 1e3 * done.seconds / steps, seed=seed, nx=nx)
    optimum = counts.min(axis=1).mean() * steps
    run.record("SSOR-CG, instance-optimal", "iterations over the heat run", optimum, unknowns=(nx - 1) ** 2)
    if nx == 25:
        plot_heat(run, counts, stride, {name: totals[name] for name in ("Tsallis-INF", "ChebCB")}, float(OMEGAS[best]))


@dataclass(frozen=True)
class HeatRun:
    omegas: Float[ndarray, " steps"]
    iterations: Int[ndarray, " steps"]
    seconds: float


def heat_run(nx: int, steps: int, bandit: ParameterBandit) -> HeatRun:
    """Step the equation with live solves; a bandit of one arm is a fixed omega."""
    heat = HeatEquation(nx)
    tuned = TunedSolver(SSORConjugateGradients(rtol=RTOL), bandit)
    omegas, iterations = np.empty(steps), np.empty(steps, np.int64)
    start = perf_counter()
    for step in range(steps):
        found = tuned.solve(*heat.system(), heat.u, context=heat.context)
        omegas[step], iterations[step] = found.omega, found.n_iter
        heat.advance(found.x)
    return HeatRun(omegas, iterations, perf_counter() - start)


def scipy_heat_run(nx: int, steps: int, omega: float | None) -> HeatRun:
    """The same with SciPy's conjugate gradients, without preconditioner or with SSOR at a fixed omega."""
    heat = HeatEquation(nx)
    iterations = np.zeros(steps, np.int64)
    start = perf_counter()
    for step in range(steps):
        _, b = heat.system()
        M = None if omega is None else SSORPreconditioner(heat.A, omega)

        def count(_: ndarray, step: int = step) -> None:
            iterations[step] += 1

        x, _ = cg(heat.A, b, x0=heat.u, rtol=RTOL, M=M, callback=count)
        heat.advance(x)
    return HeatRun(np.full(steps, omega or np.nan), iterations, perf_counter() - start)


def heat_table(run: Run, nx: int, steps: int, stride: int) -> Int[ndarray, "rows omegas"]:
    """Iterations at every omega of every `stride`-th step, along one trajectory: they differ within the tolerance."""
    heat = HeatEquation(nx)
    solver = SSORConjugateGradients(rtol=RTOL)
    rows = []
    for step in run.track(range(steps), f"heat equation, {nx} x {nx}"):
        A, b = heat.system()
        found = [solver.solve(A, b, omega=w, x0=heat.u) for w in (OMEGAS.tolist() if step % stride == 0 else [1.4])]
        if len(found) > 1:
            rows.append([solution.n_iter for solution in found])
        heat.advance(found[0].x)
    return np.array(rows)


# Figures --------------------------------------------------------------------------------------------------------------

TOTALS_CAPTION = (
    "Iterations over the whole heat run on the 25 x 25 grid; a dot for each seed of a learner. Instance-optimal is the"
    " fewest iterations over all omegas of the grid at every single step."
)
GROWTH_CAPTION = "Iterations over the whole heat run as the grid is refined; band from the lowest to the highest seed."


def plot_curves(run: Run, curves: dict[str, list[dict[str, ndarray]]]) -> None:
    """Iterations per solve over the sequence, in windows: mean over seeds, band from the lowest to the highest."""
    from locally.plots import INK, PALETTE, canvas

    shown = {
        "best fixed omega": (INK, "--"),
        "Tsallis-INF": (PALETTE[0], "-"),
        "Tsallis-INF, binned": (PALETTE[2], "-"),
        "ChebCB": (PALETTE[1], "-"),
        "instance-optimal on the grid": (INK, ":"),
    }
    figure, panels = canvas(9.6, 3.8, ncols=2)
    for axes, (name, tables) in zip(panels, curves.items()):
        length = len(tables[0]["ChebCB"])
        edges = np.linspace(0, length, 16).astype(int)
        middles = (edges[1:] + edges[:-1]) / 2
        for method, (colour, style) in shown.items():
            windows = np.array([np.add.reduceat(t[method], edges[:-1]) / np.diff(edges) for t in tables])
            axes.plot(middles, windows.mean(axis=0), style, color=colour, label=method)
            if style == "-":
                axes.fill_between(middles, windows.min(axis=0), windows.max(axis=0), color=colour, alpha=0.15, lw=0)
        axes.set(xlabel="instance", title=f"SOR, shifts of {name}", ylim=(0, None), xlim=(0, length))
    panels[0].set_ylabel("iterations per solve")
    panels[1].legend(labelcolor=INK, fontsize=8.5)
    caption = (
        "SOR on shifted Laplacians: iterations per solve as the sequence goes on, in 15 windows, mean and range over"
        " seeds. Tsallis-INF approaches the best fixed omega (dashed); ChebCB, told the shift, goes below it towards"
        " the best omega for each instance (dotted)."
    )
    run.figure(figure, "sor-sequences", caption)


def plot_heat(
    run: Run, counts: Int[ndarray, "rows omegas"], stride: int, runs: dict[str, list[HeatRun]], best: float
) -> None:
    """Iterations over step and omega, with what the learners chose."""
    from locally.plots import INK, PALETTE, canvas

    steps = stride * len(counts)
    figure, axes = canvas(8.0, 4.0)
    excess = counts / counts.min(axis=1, keepdims=True)
    cells = stride * np.arange(len(counts) + 1), edges_around(OMEGAS), excess.T
    image = axes.pcolormesh(*cells, cmap="Greys", vmin=1, vmax=2, rasterized=True)
    figure.colorbar(image, ax=axes, label="iterations / fewest at that step", extend="max")
    width = max(steps // 80, 1)
    for (method, done), colour in zip(runs.items(), PALETTE):
        smooth = np.convolve(done[-1].omegas, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(smooth.size) + width / 2, smooth, color=colour, lw=1.6, label=method)
    axes.axhline(best, color=PALETTE[2], ls="--", lw=1.4, label="best fixed omega")
    axes.set(xlabel="time step", ylabel="omega", xlim=(0, steps))
    axes.grid(False)
    figure.legend(labelcolor=INK, fontsize=8.5, loc="outside upper left", ncols=3)
    caption = (
        "Heat equation: iterations of SSOR-CG at every step and omega beside the fewest at that step (white is best),"
        f" and the omega that each learner chose in one run, averaged over {width} steps. The best omegas move with the"
        " diffusion coefficient; ChebCB, which is told that coefficient, follows."
    )
    run.figure(figure, "heat-omegas", caption)


def edges_around(centres: Float[ndarray, " k"]) -> Float[ndarray, " k_plus_1"]:
    half = (centres[1] - centres[0]) / 2
    return np.append(centres - half, centres[-1] + half)
