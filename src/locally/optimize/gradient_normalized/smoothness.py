"""The quantity that names the method, how far a linear model of the gradient field can be trusted, and lower bounds.

gamma(x) is the radius of the largest ball on which g + H h is off by at most ||g||_* ||h|| / gamma (arXiv 2506.13710,
Definition 1). Problem classes bound it from below by powers of ||g||_*, and the bounds add up like resistances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_between, check_count, check_nonnegative, check_positive
from locally.optimize.gradient_normalized.metrics import as_metric


@dataclass(frozen=True)
class SmoothnessBound:
    """gamma >= 1 / sum_i M_i ||g||_*^{-alpha_i}; called with ||g||_* it is a `rule` for the solver.

    Bounds of a sum of functions, or of an exact bound and the error of an approximate Hessian, combine with `+`.

    Args:
        terms: pairs (M, alpha), M >= 0 and 0 <= alpha <= 1.

    >>> rule = SmoothnessBound.lipschitz_hessian(2.0) + SmoothnessBound.inexact(c1=0.0, c2=0.5, beta=0.0)
    >>> rule(4.0)  # 1 / (1/2 + 1/2)
    1.0
    """

    terms: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        for M, alpha in self.terms:
            check_nonnegative("M", M)
            check_between("alpha", alpha, 0.0, 1.0)
        if not any(M for M, _ in self.terms):
            raise ValueError("terms must hold at least one M > 0: without any, gamma is unbounded")

    def __call__(self, norm: float) -> float:
        return 1 / sum(M * norm**-alpha for M, alpha in self.terms)

    def __add__(self, other: "SmoothnessBound") -> "SmoothnessBound":
        return SmoothnessBound(self.terms + other.terms)

    @classmethod
    def lipschitz_gradient(cls, L: float) -> "SmoothnessBound":
        """||grad f(x) - grad f(y)||_* <= L ||x - y||, with H = 0: the gradient method of step 1 / L."""
        return cls(((L, 1.0),))

    @classmethod
    def hoelder_hessian(cls, L: float, nu: float) -> "SmoothnessBound":
        """The Hessian is Hoelder continuous of degree nu in [0, 1], with the exact H."""
        check_between("nu", nu, 0.0, 1.0)
        return cls((((L / (1 + nu)) ** (1 / (1 + nu)), 1 / (1 + nu)),))

    @classmethod
    def lipschitz_hessian(cls, L: float) -> "SmoothnessBound":
        """nu = 1: gamma >= sqrt(2 ||g||_* / L)."""
        return cls.hoelder_hessian(L, 1.0)

    @classmethod
    def quasi_self_concordant(cls, M: float) -> "SmoothnessBound":
        """|D^3 f(x)[u, u, v]| <= M <Hess f(x) u, u> ||v||, such as logistic losses and log-sum-exp, with the exact H.

        Between x and x + h the Hessian then grows at most by the factor e^{M ||h||}; on O_{x,g}, where <Hess f h, h>
        is at most ||g||_* ||h||, this leaves gamma >= 1 / M up to a constant.
        """
        return cls(((M, 0.0),))

    @classmethod
    def inexact(cls, *, c1: float, c2: float, beta: float) -> "SmoothnessBound":
        """What ||Hess f - H|| <= c1 + c2 ||g||_*^{1 - beta} costs, 0 <= beta <= 1: a term each of degree 1 and beta."""
        check_between("beta", beta, 0.0, 1.0)
        return cls(((c1, 1.0), (c2, beta)))


def probe_smoothness(
    jac: Callable[[ndarray], Any],
    x: Float[ndarray, " n"],
    H: Any,
    *,
    hess: Any | None = None,
    metric: Any = None,
    directions: int = 200,
    radius: float = 1e3,
    rng: np.random.Generator | int | None = None,
) -> float:
    """An upper bound on gamma(x) by trying directions; exact in the limit of many, and in one dimension.

    Definition 1 asks for the inequality at every h in the ball; this looks along random directions, and along the
    Newton-like step and its mirror image, at radii on a geometric grid of ratio 1.02 from radius / 1e9 to radius.

    Args:
        jac: x -> gradient.
        H: the curvature at x: a matrix, `LowRank` or anything else with `@`.
        hess: the Hessian at x, which limits h to <Hess h, h> + <g, h> <= 0; default H.
        metric: as for the solver.
        directions: at least 1.
        radius: largest gamma looked for, > 0.

    Returns:
        The largest grid radius below the first violation; 0 where the smallest violates, `radius` where none does.

    >>> cube = lambda x: x * abs(x) / 2  # gradient of |x|^3 / 6; its Hessian |x| has Lipschitz constant 1
    >>> x = np.array([2.0])
    >>> bound = SmoothnessBound.lipschitz_hessian(1.0)(abs(cube(x)[0]))
    >>> bool(probe_smoothness(cube, x, np.diag(x), rng=0) >= 0.98 * bound)
    True
    """
    check_count("directions", directions)
    check_positive("radius", radius)
    B, rng = as_metric(metric, x.size), np.random.default_rng(rng)
    g = np.asarray(jac(x.copy()), float)
    norm = B.dual_norm(g)
    exact = H if hess is None else hess
    steepest = -B.solve(g)
    rays = [steepest, -steepest, *rng.standard_normal((directions, x.size))]
    radii = np.geomspace(radius / 1e9, radius, math.ceil(math.log(1e9) / math.log(1.02)))
    limit = len(radii)
    for ray in rays:
        length = B.norm(ray)
        if not length:
            continue
        ray = ray / length
        Hray, curved, slope = H @ ray, ray @ (exact @ ray), g @ ray
        for i, r in enumerate(radii):
            if i >= limit:
                break
            if curved * r**2 + slope * r > 0:
                continue  # outside O_{x,g}
            error = B.dual_norm(jac(x + r * ray) - g - r * Hray)
            # this h forbids every gamma that is both at least r and above norm r / error
            allowed = max(r, norm * r / error) if error else math.inf
            limit = min(limit, int(np.searchsorted(radii, allowed)))
    return float(radii[limit - 1]) if limit else 0.0
