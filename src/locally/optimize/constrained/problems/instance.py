"""A problem with its customary start."""

from dataclasses import dataclass

from jaxtyping import Float
from numpy import ndarray

from locally.optimize.constrained.problem import EqualityProblem


@dataclass(frozen=True, eq=False)
class Instance:
    """Attributes:
    name: what the literature calls it.
    problem: functions and derivatives.
    x0, lam0: the start.
    optimum: the smallest value, where it is known.
    """

    name: str
    problem: EqualityProblem
    x0: Float[ndarray, " n"]
    lam0: Float[ndarray, " m"]
    optimum: float | None = None
