"""Sweeps beside pyamg's, the tabulated iteration counts beside lone solves, and the growth of a sweep's cost."""

from collections.abc import Callable

import numpy as np
from pyamg.relaxation.relaxation import gauss_seidel
from scipy.sparse.linalg import cg

from benchmarks.harness import Comparison, compare, growth
from locally.linalg.relaxation import Direction, Splitting, SSORPreconditioner, relax, sor_iteration_counts
from locally.papers.learning_to_relax import ShiftedLaplacians, laplacian
from locally.solvers.omega_bandit import SOR


def main() -> list[Comparison]:
    return [
        *(line for m in (30, 100, 500) for line in against_pyamg(m)),
        tabulated_counts(),
        preconditioned_by_scipy(),
        growth("forward sweep over unknowns", "Splitting.sweep", [50**2, 100**2, 200**2, 400**2], sweep),
    ]


def against_pyamg(m: int) -> list[Comparison]:
    A = laplacian(m)
    b = np.random.default_rng(0).standard_normal(m * m)
    split, x, y = Splitting.of(A), np.zeros(m * m), np.zeros(m * m)
    sweeps = max(400_000 // m**2, 4)

    def many(direction: Direction) -> Comparison:
        return compare(
            f"{sweeps} {direction} Gauss-Seidel sweeps, {m} x {m} grid",
            ("Splitting.sweep", lambda: split.sweep(x, b, direction=direction, sweeps=sweeps)),
            ("pyamg gauss_seidel", lambda: gauss_seidel(A, y, b, iterations=sweeps, sweep=direction)),
        )

    single = compare(
        f"one forward sweep, checks of A included, {m} x {m} grid",
        ("relax", lambda: relax(A, x, b)),
        ("pyamg gauss_seidel", lambda: gauss_seidel(A, y, b)),
        rounds=51,
    )
    return [many("forward"), many("backward"), many("symmetric"), single]


def sweep(n: int) -> Callable[[], object]:
    m = round(n**0.5)
    split, x, b = Splitting.of(laplacian(m)), np.zeros(n), np.ones(n)
    return lambda: split.sweep(x, b, sweeps=20)


def tabulated_counts() -> Comparison:
    table = ShiftedLaplacians.draw(1000, 0, (0.5, 1.5))
    omegas = np.array([1.2, 1.5, 1.8])

    def one_by_one() -> None:
        A = laplacian(10)
        split = Splitting.of(A)
        for c, b in zip(table.contexts, table.targets):
            A.data[split.diagonal_at] = 4 + c
            for omega in omegas.tolist():
                SOR().solve(split, b, omega=omega)

    return compare(
        "iteration counts of 1000 instances at 3 omegas",
        ("sor_iteration_counts", lambda: sor_iteration_counts(laplacian(10), table.contexts, table.targets, omegas)),
        ("SOR.solve one by one", one_by_one),
    )


def preconditioned_by_scipy() -> Comparison:
    A, b = laplacian(200), np.ones(200**2)
    return compare(
        "SciPy cg on a 200 x 200 grid, rtol 1e-8",
        ("with SSORPreconditioner, omega 1.9", lambda: cg(A, b, M=SSORPreconditioner(A, 1.9), rtol=1e-8)),
        ("without", lambda: cg(A, b, rtol=1e-8)),
    )


if __name__ == "__main__":
    for line in main():
        print(line)
