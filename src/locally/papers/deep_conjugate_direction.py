"""Pressure systems solved with the shipped networks beside conjugate gradients, their preconditioners and multigrid.

The networks saw one matrix each in training: an open box of 64 x 64 or 16 x 16 x 16 cells. Everything else here is new
to them: larger grids, obstacles, closed walls, free surfaces. Seeds draw right-hand sides, obstacles and waves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import cg
from threadpoolctl import threadpool_limits

from locally.evidence import MissingData, Run
from locally.plots import canvas
from locally.solvers.conjugate_direction import (
    Cell,
    DeflatedCG,
    DirectionNetwork,
    Domain,
    IncompleteCholesky,
    PressureSolver,
    load_network,
    load_pretrained,
)

RTOL = 1e-4  # as in the paper
HAVE_PYAMG = find_spec("pyamg") is not None
MISSING_PYAMG = "" if HAVE_PYAMG else " Without algebraic multigrid: pyamg (extra bench) is not installed."
SHOWN = {"obstacle, smooth": "open box with an obstacle", "pool, splash": "pool with walls and a free surface"}
OPEN, WALLED = "box and obstacle, open edges", "walls and free surface"
CG, IC = "conjugate gradients (SciPy)", "incomplete-Cholesky CG"


@dataclass(frozen=True)
class Grid:
    """A cube of side `n`; with walled systems beside the open ones or not."""

    ndim: int
    n: int
    walls: bool = True

    @property
    def name(self) -> str:
        return f"{self.n}^{self.ndim}"


@dataclass(frozen=True)
class Study:
    """Grids, the last of them for the figure; a network for each number of axes; saved pressure systems."""

    grids: tuple[Grid, ...]
    networks: dict[int, DirectionNetwork]
    saved: tuple["System", ...] = ()


@dataclass(frozen=True, eq=False)
class System:
    """One pressure system. `group` is what the claims average over."""

    case: str
    group: str
    domain: Domain
    b: Float[ndarray, "..."]


@dataclass(frozen=True, eq=False)
class Solve:
    residual_norms: Float[ndarray, " steps"]  # relative to ||b||, by iteration; NaN where nobody asked
    seconds: float  # set-up included
    converged: bool

    @property
    def iterations(self) -> int:
        return len(self.residual_norms) - 1


def experiment(run: Run) -> None:
    if run.scale == "paper":
        carry_out(run, full_size(run, (Grid(3, 64), Grid(3, 128), Grid(3, 256))))
        return
    usual = (Grid(3, 24, walls=False), Grid(2, 128, walls=False), Grid(2, 64))
    grids = usual[-1:] if run.scale == "quick" else usual
    carry_out(run, Study(grids, {ndim: load_pretrained(ndim, device=run.device) for ndim in {g.ndim for g in grids}}))


def full_size(run: Run, grids: tuple[Grid, ...]) -> Study:
    """A network of one's own and, where there are any, pressure systems saved from a flow solver."""
    made_by = "python -m locally.solvers.conjugate_direction.train_pretrained --ndim 3 --size 128"
    checkpoint = run.data("deep-conjugate-direction/network.safetensors", f"a 3-D network trained by {made_by}")
    folder = checkpoint.parent / "systems"
    network = load_network(checkpoint, device=run.device)
    return Study(grids, {network.config.ndim: network}, tuple(map(read_system, sorted(folder.glob("*.npz")))))


@threadpool_limits.wrap(limits=1, user_api="blas")  # scalar products gain nothing by threads and wait for the network's
def carry_out(run: Run, study: Study) -> None:
    solvers = methods(study.networks, run.device)
    last: dict[str, dict[str, Solve]] = {}
    for ndim in study.networks:
        warm_up = Domain.box(*[8] * ndim)
        for solve in solvers.values():
            solve(System("", "", warm_up, np.ones(warm_up.shape)))  # compiles what is compiled
    for seed in run.track(run.seeds, "seeds"):
        rng = np.random.default_rng(seed)
        label = "grids" if HAVE_PYAMG else "grids, without multigrid: pyamg is not installed"
        for grid in run.track(study.grids, label):
            given = [s for s in systems(grid.n, grid.ndim, rng) if grid.walls or s.group == OPEN]
            last = compare(run, solvers, given, grid.name, seed, n=grid.n, ndim=grid.ndim)
        if seed == run.seeds[0] or run.scale != "quick":
            variants(run, study, seed)
    if study.saved:
        compare(run, solvers, list(study.saved), "saved systems", None)
    size_independence(run, study)
    plot(run, last, study.grids[-1].name)


# The systems ----------------------------------------------------------------------------------------------------------


def systems(n: int, ndim: int, rng: np.random.Generator) -> Iterator[System]:
    box = Domain.box(*[n] * ndim)
    centre = n * rng.uniform(0.4, 0.6, ndim)
    obstacle = box.with_ball(centre, n / 6)
    for name, domain in (("box", box), ("obstacle", obstacle)):
        yield System(f"{name}, random", OPEN, domain, rng.standard_normal(domain.shape) * domain.fluid)
        yield System(f"{name}, smooth", OPEN, domain, two_bumps(domain, rng))

    phase = rng.uniform(0, 2 * np.pi)
    wave = np.rint(n * (0.6 + 0.1 * np.sin(2 * np.pi * np.arange(n) / n + phase))).astype(int)
    heights = wave if ndim == 2 else np.broadcast_to(wave, (n, n))
    pool = Domain.box(*[n] * ndim, outside=Cell.SOLID).with_surface(heights)
    yield System("pool, splash", WALLED, pool, splash(pool, rng))
    sunk = pool.with_ball([0.3 * n, *centre[1:]], n / 8)
    yield System("pool with obstacle, splash", WALLED, sunk, splash(sunk, rng))
    cells = np.full([n] * ndim, Cell.FLUID)
    cells[-1] = Cell.AIR
    chimney = Domain(cells, Cell.SOLID).with_ball(centre, n / 6)
    yield System("chimney with obstacle, stirred", WALLED, chimney, splash(chimney, rng))


def two_bumps(domain: Domain, rng: np.random.Generator) -> Float[ndarray, "..."]:
    """A Gaussian source and a sink in places of their own."""
    at = np.indices(domain.shape) / np.array(domain.shape).reshape(-1, *[1] * domain.ndim)

    def bump() -> ndarray:
        centre = rng.uniform(0.2, 0.8, domain.ndim).reshape(-1, *[1] * domain.ndim)
        return np.exp(-50 * ((at - centre) ** 2).sum(0))

    return (bump() - bump()) * domain.fluid


def splash(domain: Domain, rng: np.random.Generator) -> Float[ndarray, "..."]:
    """Divergence of water that falls, by gravity along the first axis, and swirls in every direction at random."""
    velocity = []
    for axis in range(domain.ndim):
        faces = [size + (a == axis) for a, size in enumerate(domain.shape)]
        coarse = rng.standard_normal([6] * domain.ndim)
        zoom = np.ix_(*(np.linspace(0, 5, size).round().astype(int) for size in faces))
        velocity.append(coarse[zoom] - (1.0 if axis == 0 else 0.0))
    return domain.divergence(*velocity)


def read_system(path: Path) -> System:
    """A saved pressure system: `cells` (0 fluid, 1 solid, 2 air), `rhs` on the same grid, `closed` edges or not."""
    with np.load(path, allow_pickle=False) as file:
        missing = {"cells", "rhs", "closed"} - set(file)
        if missing:
            raise MissingData(f"{path} lacks {', '.join(sorted(missing))}: it must hold cells, rhs and closed")
        domain = Domain(file["cells"], Cell.SOLID if bool(file["closed"]) else Cell.AIR)
        return System(path.stem, "saved", domain, file["rhs"].astype(np.float64))


# The methods ----------------------------------------------------------------------------------------------------------

Solver = Callable[[System], Solve]


def methods(networks: dict[int, DirectionNetwork], device: str) -> dict[str, Solver]:
    solvers: dict[str, Solver] = {
        "DCDM": learned(networks, device),
        CG: krylov(lambda A: None),
        IC: krylov(IncompleteCholesky),
        "deflated CG (16 vectors)": deflated,
    }
    if HAVE_PYAMG:
        from pyamg import ruge_stuben_solver, smoothed_aggregation_solver

        solvers["smoothed-aggregation CG (pyamg)"] = krylov(lambda A: smoothed_aggregation_solver(A).aspreconditioner())
        solvers["Ruge-Stuben CG (pyamg)"] = krylov(lambda A: ruge_stuben_solver(A).aspreconditioner())
    return solvers


def learned(networks: dict[int, DirectionNetwork], device: str, **options: Any) -> Solver:
    def solve(system: System) -> Solve:
        start = perf_counter()
        solver = PressureSolver(network=networks[system.domain.ndim], rtol=RTOL, max_iter=1000, **options)
        found = solver.solve(system.domain, torch.from_numpy(system.b).to(device))
        norms = found.history.cpu().numpy() / np.linalg.norm(system.b)
        return Solve(norms, perf_counter() - start, found.converged)

    return solve


def krylov(preconditioner: Callable[[sp.csr_array], object]) -> Solver:
    """SciPy's conjugate gradients on the rows that are not zero."""

    def solve(system: System) -> Solve:
        A, b = compressed(system)
        steps = 0

        def count(x: ndarray) -> None:
            nonlocal steps
            steps += 1

        start = perf_counter()
        M = preconditioner(A)
        _, info = cg(A, b, rtol=RTOL, M=M, callback=count)
        seconds = perf_counter() - start
        norms = [1.0]
        if system.case in SHOWN:  # a second, untimed pass: SciPy hands out iterates, and a residual costs a product
            size = np.linalg.norm(b)
            cg(A, b, rtol=RTOL, M=M, callback=lambda x: norms.append(float(np.linalg.norm(b - A @ x) / size)))
        return Solve(np.array(norms + [np.nan] * (steps + 1 - len(norms))), seconds, info == 0)

    return solve


def deflated(system: System) -> Solve:
    A, b = compressed(system)
    start = perf_counter()
    found = DeflatedCG(rtol=RTOL).solve(A, b)
    return Solve(found.residual_norms / np.linalg.norm(b), perf_counter() - start, found.converged)


def compressed(system: System) -> tuple[sp.csr_array, Float[ndarray, " rows"]]:
    rows = np.flatnonzero(system.domain.diagonal.reshape(-1) > 0)
    return sp.csr_array(system.domain.matrix()[rows][:, rows]), system.b.reshape(-1)[rows]


# Records and figures --------------------------------------------------------------------------------------------------


def compare(
    run: Run, solvers: dict[str, Solver], given: list[System], grid: str, seed: int | None, **setting: int
) -> dict[str, dict[str, Solve]]:
    """Solve every system by every method and record it all; returns the solves by case and method."""
    by_case: dict[str, dict[str, Solve]] = {}
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for system in given:
        solves = by_case[system.case] = {name: solve(system) for name, solve in solvers.items()}
        for name, solve in solves.items():
            where = setting | {"case": system.case, "group": system.group}
            run.record(name, "iterations", solve.iterations, seed=seed, **where)
            run.record(name, "seconds, set-up included", solve.seconds, seed=seed, **where)
            run.record(name, "failed solves", not solve.converged, seed=seed, **where)
            for peer in (CG, IC):
                ratio = solve.iterations / max(solves[peer].iterations, 1)
                ratios.setdefault((name, peer, system.group), []).append(ratio)
    for (name, peer, group), values in ratios.items():
        metric = f"largest iterations / those of {peer}, {group}"
        run.record(name, metric, max(values), seed=seed, grid=grid)
    return by_case


VARIANTS: dict[str, dict[str, Any]] = {
    "DCDM": {},
    "DCDM, no orthogonalisation": {"window": 0},
    "DCDM, window 1": {"window": 1},
    "DCDM, full orthogonalisation": {"window": None},
    "DCDM, zeros beyond walls": {"mirror": False},
    "DCDM, odd network": {"odd": True},
}


def variants(run: Run, study: Study, seed: int) -> None:
    """What the parts of the method are worth, on two small systems."""
    ndim = study.grids[-1].ndim
    n = min(32 if ndim == 2 else 16, *(grid.n for grid in study.grids))
    for system in systems(n, ndim, np.random.default_rng(seed)):
        if system.case not in SHOWN:
            continue
        for name, options in VARIANTS.items():
            solve = learned(study.networks, run.device, **options)(system)
            run.record(name, "iterations of a variant", solve.iterations, seed=seed, case=system.case, n=n, ndim=ndim)


def size_independence(run: Run, study: Study) -> None:
    """Iterations on the finest grid over those on the one before it, in three dimensions."""
    sizes = sorted(grid.n for grid in study.grids if grid.ndim == 3)[-2:]
    if len(sizes) < 2:
        return
    for name in ("DCDM", CG):
        for seed in run.seeds:
            before, finest = (iterations(run, name, seed, OPEN, n=n, ndim=3) for n in sizes)
            metric = "iterations on the finest grid / on the grid before"
            run.record(name, metric, finest / before, seed=seed, ndim=3)


def iterations(run: Run, method: str, seed: int, group: str, **setting: int) -> float:
    wanted = {"group": group, **setting}.items()
    found = [
        m.value
        for m in run.measures
        if (m.method, m.metric, m.seed) == (method, "iterations", seed) and wanted <= m.setting.items()
    ]
    return float(np.mean(found))


def plot(run: Run, last: dict[str, dict[str, Solve]], grid: str) -> None:
    """Residuals of the last seed on the last grid of the run, and everybody's seconds."""
    figure, panels = canvas(width=8.2, height=4.0, ncols=2, sharey=True)
    for axes, (case, title) in zip(panels, SHOWN.items()):
        for name, solve in last[case].items():
            axes.semilogx(1 + np.arange(len(solve.residual_norms)), solve.residual_norms, label=name)
        axes.set(title=title, xlabel="iteration + 1", yscale="log")
    panels[0].set_ylabel("relative residual")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    run.figure(
        figure,
        "residuals",
        f"Relative residual over iterations, {grid} cells. The directions minimise the A-norm of the error, so the "
        f"residual may rise for a step. An iteration of DCDM costs a call of the network.{MISSING_PYAMG}",
    )
    run.plot_bars(
        "seconds, set-up included",
        log=True,
        name="seconds",
        caption="Seconds of a solve to 1e-4, all grids and cases of this run. On a processor the network's calls cost "
        f"more than the iterations that they save.{MISSING_PYAMG}",
    )
    if run.scale == "quick":
        return
    run.plot_bars(
        "iterations of a variant",
        name="variants",
        caption="Iterations with other windows of A-orthogonalisation, with the edges padded by zeros as in the paper "
        "instead of mirror images at walls, and with the network made odd.",
    )
