"""Minimisation under equality constraints by sketched Newton steps on an exact augmented Lagrangian.

For whoever minimises a smooth function subject to c(x) = 0 and can give derivatives, or writes both in torch:
`minimize_adasketch` takes SciPy's arguments, also as `scipy.optimize.minimize(..., method=minimize_adasketch)`;
`AdaSketchNewton` takes an `EqualityProblem`. `L1SQP` and `AugmentedLagrangian` are the methods that it is measured by.
Source: Hong, Na, Mahoney and Kolar, ICML 2023 (arXiv 2305.18379).
"""

from locally.optimize.constrained.adasketch import AdaSketchNewton, Progress
from locally.optimize.constrained.augmented_lagrangian import AugmentedLagrangian
from locally.optimize.constrained.merit import ExactAugmentedLagrangian
from locally.optimize.constrained.minimize import minimize_adasketch
from locally.optimize.constrained.outcome import Solution, Status
from locally.optimize.constrained.problem import EqualityProblem
from locally.optimize.constrained.problems import Instance, constrained_logistic, hock_schittkowski, poisson_control
from locally.optimize.constrained.scipy_arguments import scipy_problem
from locally.optimize.constrained.sqp import L1SQP
from locally.optimize.constrained.torch_functions import torch_problem

__all__ = [
    "L1SQP",
    "AdaSketchNewton",
    "AugmentedLagrangian",
    "EqualityProblem",
    "ExactAugmentedLagrangian",
    "Instance",
    "Progress",
    "Solution",
    "Status",
    "constrained_logistic",
    "hock_schittkowski",
    "minimize_adasketch",
    "poisson_control",
    "scipy_problem",
    "torch_problem",
]
