"""Variance-reduced Halpern iteration for finite-sum monotone inclusions: games, saddle points, cocoercive sums.

Finds u with 0 in F(u) + G(u), F = (1/n) sum_i F_i monotone and G with a cheap resolvent, by the last iterate and with a
residual that anyone can check. Operators say what F is and how its components are drawn; solvers share one interface,
`Solver(parameters).solve(operator, start)`, so that the method and its baselines differ in one name.
Source: Cai, Alacaoglu and Diakonikolas, ICLR 2024, arXiv 2310.02987.
"""

from typing import TYPE_CHECKING, Any

from locally.equilibrium.halpern.baselines import (
    AnchoredExtragradient,
    Extragradient,
    Halpern,
    VarianceReducedExtragradient,
)
from locally.equilibrium.halpern.iterations import InexactHalpern, SingleLoopHalpern, VRFoRB, vr_halpern
from locally.equilibrium.halpern.ledger import Progress, Solution, Solver, Status
from locally.equilibrium.halpern.operators import Constants, FiniteSumOperator, FunctionOperator
from locally.equilibrium.halpern.regressions import LeastSquares, Logistic
from locally.equilibrium.halpern.resolvents import L1, Ball, Box, Product, Resolvent, Simplex, Unconstrained
from locally.equilibrium.halpern.saddles import BilinearSaddle, MatrixGame, QuadraticSaddle

if TYPE_CHECKING:
    from locally.equilibrium.halpern.losses import from_torch

__all__ = [
    "L1",
    "AnchoredExtragradient",
    "Ball",
    "BilinearSaddle",
    "Box",
    "Constants",
    "Extragradient",
    "FiniteSumOperator",
    "FunctionOperator",
    "Halpern",
    "InexactHalpern",
    "LeastSquares",
    "Logistic",
    "MatrixGame",
    "Product",
    "Progress",
    "QuadraticSaddle",
    "Resolvent",
    "Simplex",
    "SingleLoopHalpern",
    "Solution",
    "Solver",
    "Status",
    "Unconstrained",
    "VRFoRB",
    "VarianceReducedExtragradient",
    "from_torch",
    "vr_halpern",
]


def __getattr__(name: str) -> Any:
    if name == "from_torch":  # importing torch takes longer than most solves
        from locally.equilibrium.halpern.losses import from_torch

        return from_torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
