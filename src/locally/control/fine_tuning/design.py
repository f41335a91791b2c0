"""Experiment design: which covariance of features makes a set of directions certain with the fewest episodes.

The XY design with a head start: over the covariances Lambda that mixtures of policies can produce, minimise the largest
||v||^2 in the norm of (T Lambda + Lambda_0)^(-1), where Lambda_0 is what the log holds. Both the learner's online steps
and the exact solution are Frank-Wolfe on a soft maximum whose linear subproblem is a planning problem: find the policy
with the largest E[phi^T Xi phi]. Source: arXiv 2211.04974 (OptCov), arXiv 2207.02575.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize

from locally.checks import check_count, check_finite, check_nonnegative, check_positive, check_shape, check_symmetric

Oracle = Callable[[Float[ndarray, "d d"]], Float[ndarray, "d d"]]


class Status(StrEnum):
    CONVERGED = "converged"
    STEP_LIMIT = "step limit: the bracket is valid but wider than asked for"


@dataclass(frozen=True)
class Design:
    """Attributes:
    value: the largest width under `covariance`, an upper bound on the optimum.
    lower: a certified lower bound on the optimum.
    covariance: Lambda, per episode.
    attention: weights of the directions in the dual certificate.
    """

    value: float
    lower: float
    covariance: Float[ndarray, "d d"]
    attention: Float[ndarray, " n"]
    status: Status
    steps: int


def attention_reward(
    directions: Float[ndarray, "n d"],
    inverse: Float[ndarray, "d d"],
    features: Float[ndarray, "*shape d"],
    sharpness: float | int = 5.0,
) -> Float[ndarray, "*shape"]:
    """The learner's linear subproblem: rewards phi^T Xi phi, scaled to at most 1.

    Xi = sum_v q_v A^(-1) v v^T A^(-1) is minus the gradient of the soft maximum of the widths w_v = v^T A^(-1) v, with
    q_v proportional to exp(sharpness w_v / max w): directions near the widest get the attention. Zero everywhere if all
    directions are zero, as they are at layers that nothing has reached yet. O(n d^2).
    """
    Z = directions @ inverse
    widths = (Z * directions).sum(axis=-1)
    widest = widths.max()
    if not widest > 0:
        return np.zeros(features.shape[:-1])
    q = np.exp(sharpness * (widths / widest - 1))
    Xi = (Z * (q / q.sum())[:, None]).T @ Z
    reward = ((features @ Xi) * features).sum(axis=-1)
    return reward / reward.max()


def xy_design(
    directions: Float[ndarray, "n d"],
    oracle: Oracle | Float[ndarray, "k d d"],
    *,
    budget: float | int = 1.0,
    base: Float[ndarray, "d d"] | None = None,
    initial: Float[ndarray, "d d"] | None = None,
    ridge: float | int = 1e-9,
    rtol: float = 1e-3,
    max_steps: int = 200,
) -> Design:
    """Minimise max_v ||v||^2 in the norm of (budget Lambda + base + ridge I)^(-1) over a convex set of Lambda.

    Fully corrective Frank-Wolfe: each step adds the vertex that the oracle returns and solves again over the mixtures
    of all vertices so far, on a soft maximum that is sharpened until the certified gap is closed. With weights q of the
    directions, sum_v q_v w_v is convex in Lambda and below the maximum, so its linearisation at the current point,
    minimised by the same oracle call, bounds the optimum from below. O(n d^2 + d^3) an evaluation.

    Args:
        directions: the vectors v, not all zero.
        oracle: returns the extreme point with the largest <Xi, Lambda> for a positive semidefinite Xi; or all extreme
            points.
        budget: T >= 0, in episodes.
        base: Lambda_0, positive semidefinite; zero by default.
        initial: a point of the set to start from, best in its interior; the mean of the extreme points by default,
            needed where the oracle is a function.
        ridge: positive.
        rtol: stop when (value - lower) <= rtol value.

    Raises:
        TypeError, ValueError: a shape or number is out of range, or `initial` is missing.

    >>> arms = np.eye(3)
    >>> design = xy_design(arms, arms[:, :, None] * arms[:, None, :], budget=60, base=np.diag([100.0, 0.0, 40.0]))
    >>> round(1 / design.value, 1), (60 * np.diag(design.covariance)).round(0) + 0.0
    (50.0, array([ 0., 50., 10.]))
    """
    d = directions.shape[-1]
    check_finite("directions", directions)
    if not directions.any():
        raise ValueError("directions must hold a vector other than zero")
    check_nonnegative("budget", budget)
    check_positive("ridge", ridge)
    check_positive("rtol", rtol, below=1)
    check_count("max_steps", max_steps)
    base = np.zeros((d, d)) if base is None else base
    check_shape("base", base, (d, d))
    check_finite("base", base)
    check_symmetric("base", base)
    if isinstance(oracle, ndarray):
        points = oracle
        check_shape("oracle", points, (None, d, d))
        start = points.mean(axis=0) if initial is None else initial
        answer: Oracle = lambda Xi: points[(points * Xi).sum(axis=(1, 2)).argmax()]
    elif initial is None:
        raise ValueError("initial must be given where the oracle is a function")
    else:
        answer, start = oracle, initial
    check_shape("initial", start, (d, d))
    problem = _Problem(directions, base + ridge * np.eye(d), float(budget))
    return problem.solve(answer, start, rtol, max_steps)


@dataclass(eq=False)
class _Problem:
    directions: Float[ndarray, "n d"]
    base: Float[ndarray, "d d"]
    budget: float | int

    def widths(self, covariance: Float[ndarray, "d d"]) -> tuple[Float[ndarray, "n d"], Float[ndarray, " n"]]:
        """A^(-1) v and v^T A^(-1) v of every direction."""
        Z = np.linalg.solve(self.budget * covariance + self.base, self.directions.T).T
        return Z, (Z * self.directions).sum(axis=-1)

    def solve(self, oracle: Oracle, start: Float[ndarray, "d d"], rtol: float, max_steps: int) -> Design:
        vertices, weights = start[None], np.ones(1)
        best = Design(np.inf, 0.0, start, np.zeros(len(self.directions)), Status.STEP_LIMIT, 0)
        sharpness = 10.0  # in units of 1 / width
        sharpest = 4 * max(np.log(len(self.directions)), 1.0) / rtol
        for step in range(1, max_steps + 1):
            covariance = np.tensordot(weights, vertices, 1)
            Z, widths = self.widths(covariance)
            value = float(widths.max())
            q = np.exp(sharpness * (widths / value - 1))
            q /= q.sum()
            Xi = (Z * q[:, None]).T @ Z
            vertex = oracle(Xi)
            smooth = float(q @ widths)
            towards = self.budget * float((Xi * (vertex - covariance)).sum())  # how fast the smooth one falls
            if value < best.value:
                best = Design(value, best.lower, covariance, q, Status.STEP_LIMIT, step)
            lower = max(best.lower, smooth - towards)
            done = best.value - lower <= rtol * best.value
            status = Status.CONVERGED if done else Status.STEP_LIMIT
            best = Design(best.value, lower, best.covariance, best.attention, status, step)
            if done:
                return best
            if towards <= max(value - smooth, rtol * value / 4):
                sharpness = min(3 * sharpness, sharpest)
            known = np.abs(vertices - vertex).max(axis=(1, 2)) <= 1e-12 * max(np.abs(vertex).max(), 1e-300)
            if not known.any():
                vertices, weights = np.concatenate([vertices, vertex[None]]), np.append(weights, 0.0)
            weights = self.mix(vertices, weights, sharpness / value)
            kept = weights > 1e-10
            vertices, weights = vertices[kept], weights[kept] / weights[kept].sum()
        return best

    def mix(self, vertices: Float[ndarray, "k d d"], weights: Float[ndarray, " k"], eta: float) -> Float[ndarray, " k"]:
        """The mixture of the vertices with the smallest soft maximum (1 / eta) log sum exp(eta w_v)."""
        scale = eta

        def soft_maximum(p: Float[ndarray, " k"]) -> tuple[float, Float[ndarray, " k"]]:
            Z, widths = self.widths(np.tensordot(np.maximum(p, 0), vertices, 1))
            top = widths.max()
            q = np.exp(eta * (widths - top))
            total = q.sum()
            Xi = (Z * (q / total)[:, None]).T @ Z
            slope = -self.budget * (vertices * Xi).sum(axis=(1, 2))
            return scale * (top + np.log(total) / eta), scale * slope

        newest = np.full(len(weights), 0.0)
        newest[-1] = 1.0
        found = minimize(
            soft_maximum,
            0.95 * weights + 0.05 * newest,
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * len(weights),
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones_like(p)},
            options={"ftol": 1e-9, "maxiter": 100},
        )
        p = np.clip(found.x, 0, None)
        return p / p.sum() if np.isfinite(p).all() and p.sum() > 0 else weights
