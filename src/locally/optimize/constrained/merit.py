"""The exact augmented Lagrangian, a merit function of primal and dual variables whose minimisers are KKT points.

Source: arXiv 2305.18379; the function goes back to Pillo and Grippo, SIAM J. Control Optim. 17 (1979).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.optimize.constrained.problem import Matrix, Point


@dataclass(frozen=True)
class ExactAugmentedLagrangian:
    """M(x, lam) = L(x, lam) + eta1/2 ||c(x)||^2 + eta2/2 ||grad_x L(x, lam)||^2.

    Args:
        eta1: weight of infeasibility, positive.
        eta2: weight of the dual residual, positive.
    """

    eta1: float
    eta2: float

    def value(self, at: Point) -> float:
        """Needs f, g, c and the Jacobian, no Hessian."""
        return at.f + at.c @ at.lam + self.eta1 / 2 * (at.c @ at.c) + self.eta2 / 2 * (at.gL @ at.gL)

    def gradient(self, at: Point, H: Matrix) -> Float[ndarray, " d"]:
        """(grad_x M; grad_lam M). H is the Hessian of the Lagrangian, constraint curvature included."""
        in_x = at.gL + self.eta2 * (H @ at.gL) + self.eta1 * (at.G.T @ at.c)
        in_lam = at.c + self.eta2 * (at.G @ at.gL)
        return np.concatenate([in_x, in_lam])
