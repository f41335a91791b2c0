"""Successive over-relaxation on sparse matrices: sweeps in place, the SSOR preconditioner, iteration counts, spectra.

For whoever writes a solver, a smoother or a preconditioner out of triangular sweeps and wants them compiled and free of
copies. With A = D + L + U (diagonal, strictly lower, strictly upper) the sweep is x <- x + (D/omega + L)^-1 (b - A x).
Sources: Young, Iterative Solution of Large Linear Systems (1971); Axelsson, Iterative Solution Methods (1994), chapter
7; batched iteration counts serve the experiments of arXiv 2310.02246.
"""

from locally.linalg.relaxation.counting import sor_iteration_counts
from locally.linalg.relaxation.spectra import jacobi_radius, optimal_omega, sor_residual_map, young_radius
from locally.linalg.relaxation.splitting import Direction, Splitting, SSORPreconditioner, SweepOrder, relax

__all__ = [
    "Direction",
    "SSORPreconditioner",
    "Splitting",
    "SweepOrder",
    "jacobi_radius",
    "optimal_omega",
    "relax",
    "sor_iteration_counts",
    "sor_residual_map",
    "young_radius",
]
