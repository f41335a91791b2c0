"""SOR and SSOR-preconditioned conjugate gradients whose relaxation parameter a bandit sets.

For simulations that solve many related systems A_t x = b_t: the learner sees how many iterations each solve took and
nothing else, and approaches the best fixed omega (`TsallisINF`) or, told one number about each system such as a
diffusion coefficient, the best omega for each (`BinnedTsallisINF`, `ChebCB`). Any other scalar parameter and any other
cost can be learnt by the same `ask` and `tell`. Source: arXiv 2310.02246.
"""

from locally.solvers.omega_bandit.bandit import Choice, ParameterBandit
from locally.solvers.omega_bandit.chebyshev import ChebCB, box_least_squares, inverse_gap_weights
from locally.solvers.omega_bandit.solves import SOR, Solution, SSORConjugateGradients, Status
from locally.solvers.omega_bandit.surrogate import (
    asymptocity,
    energy_norm_factor,
    energy_norm_iterations,
    near_asymptotic_cost,
    ssor_cg_iterations,
)
from locally.solvers.omega_bandit.tsallis import BinnedTsallisINF, TsallisINF, tsallis_weights
from locally.solvers.omega_bandit.tuning import RelaxedSolver, TunedSequence, TunedSolver, tune_sequence

__all__ = [
    "SOR",
    "BinnedTsallisINF",
    "ChebCB",
    "Choice",
    "ParameterBandit",
    "RelaxedSolver",
    "SSORConjugateGradients",
    "Solution",
    "Status",
    "TsallisINF",
    "TunedSequence",
    "TunedSolver",
    "asymptocity",
    "box_least_squares",
    "energy_norm_factor",
    "energy_norm_iterations",
    "inverse_gap_weights",
    "near_asymptotic_cost",
    "ssor_cg_iterations",
    "tsallis_weights",
    "tune_sequence",
]
