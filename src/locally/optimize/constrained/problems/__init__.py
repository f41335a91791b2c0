"""Equality-constrained problems to try a solver on: academic ones, a learning problem, a control problem."""

from locally.optimize.constrained.problems.control import poisson_control
from locally.optimize.constrained.problems.hock_schittkowski import NAMES, hock_schittkowski, problem_of
from locally.optimize.constrained.problems.instance import Instance
from locally.optimize.constrained.problems.logistic import constrained_logistic

__all__ = ["NAMES", "Instance", "constrained_logistic", "hock_schittkowski", "poisson_control", "problem_of"]
