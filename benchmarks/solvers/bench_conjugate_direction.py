"""Pressure systems by the shipped networks beside conjugate gradients, incomplete Cholesky and algebraic multigrid:
iterations and seconds, set-up included; and how both grow with the grid."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from scipy.sparse.linalg import cg

from benchmarks.harness import Comparison, compare, growth
from locally.papers.deep_conjugate_direction import System, compressed, systems
from locally.solvers.conjugate_direction import (
    Domain,
    GridDirection,
    IncompleteCholesky,
    PressureSolver,
    load_pretrained,
)

RTOL = 1e-4
CASES = ("obstacle, smooth", "pool, splash")


def main() -> list[Comparison]:
    return [*against(2, 64), *against(2, 128), *against(3, 16), *growths(), iteration_price()]


def peers() -> dict[str, Callable[..., object]]:
    """Preconditioners of SciPy's cg."""
    found: dict[str, Callable[..., object]] = {"SciPy cg": lambda A: None, "SciPy cg, our IC(0)": IncompleteCholesky}
    if find_spec("pyamg") is None:
        print("  pyamg is not installed (extra bench): without algebraic multigrid")
        return found
    from pyamg import ruge_stuben_solver, smoothed_aggregation_solver

    return found | {
        "SciPy cg, pyamg smoothed aggregation": lambda A: smoothed_aggregation_solver(A).aspreconditioner(),
        "SciPy cg, pyamg Ruge-Stuben": lambda A: ruge_stuben_solver(A).aspreconditioner(),
    }


def against(ndim: int, n: int) -> list[Comparison]:
    given = [s for s in systems(n, ndim, np.random.default_rng(0)) if s.case in CASES]
    solver = PressureSolver(network=load_pretrained(ndim), rtol=RTOL)
    return [
        line
        for system in given
        for peer, preconditioner in peers().items()
        for line in beside(f"{system.case}, {n}^{ndim}", solver, system, peer, preconditioner)
    ]


def beside(
    name: str, solver: PressureSolver, system: System, peer: str, preconditioner: Callable[..., object]
) -> list[Comparison]:
    """Iterations and seconds of one system, set-up included."""
    A, rhs = compressed(system)
    b, domain = torch.from_numpy(system.b), system.domain

    def ours() -> int:
        # a domain of its own each time: what it works out about itself is part of the set-up
        return int(solver.solve(Domain(domain.cells, domain.outside), b).iterations)

    def theirs() -> int:
        seen: list[None] = []
        cg(A, rhs, rtol=RTOL, M=preconditioner(A), callback=lambda x: seen.append(None))
        return len(seen)

    counts = {"ours": ours(), "peer": theirs()}
    ratio = counts["ours"] / counts["peer"]
    return [
        Comparison(name, "iterations", ratio, ratio, ratio, "DCDM", peer, counts),
        compare(name, ("DCDM", ours), (peer, theirs), rounds=3),
    ]


def growths() -> list[Comparison]:
    """Over the number of cells: seconds of a solve, and its iterations."""
    sides = [32, 64, 128]
    solver = PressureSolver(network=load_pretrained(2), rtol=RTOL)

    def right_hand_side(side: int) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng(0).standard_normal((side, side)))

    def solve(cells: int) -> Callable[[], object]:
        side = round(cells**0.5)
        domain, b = Domain.box(side, side), right_hand_side(side)
        return lambda: solver.solve(domain, b)

    cells = [side**2 for side in sides]
    steps = [int(solver.solve(Domain.box(side, side), right_hand_side(side)).iterations) for side in sides]
    slope = float(np.polyfit(np.log(cells), np.log(steps), 1)[0])
    return [
        growth("open box over its cells, a solve", "DCDM", cells, solve),
        Comparison(
            "open box over its cells, iterations",
            "growth exponent",
            slope,
            slope,
            slope,
            "DCDM (conjugate gradients: 0.5)",
            detail={"sizes": cells, "iterations": steps},
        ),
    ]


def iteration_price() -> Comparison:
    """One call of the network in products with the matrix: what the saved iterations must pay for."""
    domain = Domain.box(128, 128)
    network, A = GridDirection(load_pretrained(2), domain), domain.matrix()
    r = torch.from_numpy(np.random.default_rng(0).standard_normal((1, domain.n)))
    row = r[0].numpy()
    products = lambda: [A @ row for _ in range(100)]
    return compare("128^2 cells", ("a call of the network", lambda: network(r)), ("100 products with A", products))
