"""Learned search directions for symmetric positive definite systems: the deep conjugate direction method.

For flow solvers that project onto incompressible velocities over and over: `PressureSolver` takes a `Domain` with
obstacles and free surfaces and solves to the tolerance asked for, with a network that ships trained.
`ConjugateDirection` takes any matrix and any map from residuals to directions. Source: arXiv 2205.10763.
"""

from locally.solvers.conjugate_direction.baselines import DeflatedCG, DeflatedSolution, IncompleteCholesky
from locally.solvers.conjugate_direction.checkpoint import (
    CheckpointError,
    load_network,
    load_pretrained,
    save_network,
)
from locally.solvers.conjugate_direction.network import DirectionNetwork, GridDirection, NetworkConfig
from locally.solvers.conjugate_direction.poisson import Cell, Domain, PoissonOperator
from locally.solvers.conjugate_direction.pressure import PressureSolver
from locally.solvers.conjugate_direction.ritz import RitzBasis, ritz_vectors
from locally.solvers.conjugate_direction.solver import ConjugateDirection, Solution, Status
from locally.solvers.conjugate_direction.training import (
    Progress,
    Trainer,
    TrainingConfig,
    TrainingSystem,
    direction_loss,
)

__all__ = [
    "Cell",
    "CheckpointError",
    "ConjugateDirection",
    "DeflatedCG",
    "DeflatedSolution",
    "DirectionNetwork",
    "Domain",
    "GridDirection",
    "IncompleteCholesky",
    "NetworkConfig",
    "PoissonOperator",
    "PressureSolver",
    "Progress",
    "RitzBasis",
    "Solution",
    "Status",
    "Trainer",
    "TrainingConfig",
    "TrainingSystem",
    "direction_loss",
    "load_network",
    "load_pretrained",
    "ritz_vectors",
    "save_network",
]
