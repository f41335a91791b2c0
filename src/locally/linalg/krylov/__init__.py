"""Krylov solvers for batches of symmetric systems: matrix-free, on any device, differentiable.

For whoever solves A x = b many times over, with A a tensor, a sparse matrix or a function, wants every system's status,
and gradients that do not remember the iterations. `CG` for positive definite A, `MINRES` for any symmetric one.
Sources: Hestenes and Stiefel (1952); Paige and Saunders (1975).
"""

from locally.linalg.krylov.cg import CG
from locally.linalg.krylov.minres import MINRES
from locally.linalg.krylov.operators import Dense, Diagonal, Operator, Sparse
from locally.linalg.krylov.solution import Solution, Status

__all__ = ["CG", "MINRES", "Dense", "Diagonal", "Operator", "Solution", "Sparse", "Status"]
