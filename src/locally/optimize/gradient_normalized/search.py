"""The inner loop of the method: halve gamma until the step makes the progress that the lemma promises.

Shared by the NumPy solver and the torch optimizer. Source: arXiv 2506.13710, Lemma 1 and the adaptive search.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from locally.optimize.gradient_normalized.metrics import Metric
from locally.optimize.gradient_normalized.oracle import Point
from locally.optimize.gradient_normalized.systems import ShiftedSystem

Evaluate = Callable[[Any], tuple[float, Callable[[], Any]]]


class Refusal(StrEnum):
    INDEFINITE = "H + lambda B was not positive definite"
    FUN_NOT_FINITE = "fun was NaN or infinite"
    JAC_NOT_FINITE = "jac held NaN or infinity"
    NO_PROGRESS = "fun fell too little for the gradient left"
    UNBOUNDED = "fun was minus infinity"


@dataclass(frozen=True)
class Step:
    """An accepted point with the gamma that gave it; without a point, why every trial was refused."""

    point: Point | None
    gamma: float
    trials: int
    refusals: tuple[Refusal, ...] = ()

    @property
    def unbounded(self) -> bool:
        return Refusal.UNBOUNDED in self.refusals

    @property
    def non_finite(self) -> bool:
        """Whether even the shortest step met NaN or infinity."""
        return self.refusals[-1] in (Refusal.FUN_NOT_FINITE, Refusal.JAC_NOT_FINITE)

    @property
    def reasons(self) -> str:
        return "; ".join(
            f"{count} of {self.trials} trials: {why}" for why, count in Counter(self.refusals).most_common()
        )


def ridge(norm: float, gamma: float) -> float:
    """lambda = ||g||_* / gamma."""
    return norm / gamma


def search(
    here: Point,
    gamma: float,
    system: ShiftedSystem,
    evaluate: Evaluate,
    metric: Metric,
    *,
    max_trials: int,
    precision: float,
    ridge: Callable[[float, float], float] = ridge,
) -> Step:
    """One outer iteration from `here`: a solve and an evaluation for each trial, no new curvature.

    Args:
        gamma: first trial, > 0.
        precision: relative accuracy of fun; smaller differences of values are rounding.
    """
    refusals: list[Refusal] = []
    for trial in range(1, max_trials + 1):
        shift = ridge(here.norm, gamma)
        direction = system.step(shift)
        found = (
            Refusal.INDEFINITE if direction is None else attempt(here, direction, shift, evaluate, metric, precision)
        )
        if isinstance(found, Point):
            return Step(found, gamma, trial)
        refusals.append(found)
        if found is Refusal.UNBOUNDED:
            break
        gamma /= 2
    return Step(None, gamma, trial, tuple(refusals))


def attempt(
    here: Point, direction: Any, shift: float, evaluate: Evaluate, metric: Metric, precision: float
) -> Point | Refusal:
    """f_k - f_{k+1} >= ||g_{k+1}||_*^2 / (8 lambda), Lemma 1."""
    x = here.x + direction
    f, gradient = evaluate(x)
    if f == -math.inf:
        return Refusal.UNBOUNDED
    if not math.isfinite(f):
        return Refusal.FUN_NOT_FINITE
    rounding = precision * max(abs(f), abs(here.f))
    if f > here.f + rounding:
        return Refusal.NO_PROGRESS  # whatever the gradient is there
    g = gradient()
    finite = np.isfinite(g) if isinstance(g, np.ndarray) else g.isfinite()
    if not finite.all():
        return Refusal.JAC_NOT_FINITE
    norm = metric.dual_norm(g)
    needed = norm**2 / (8 * shift) if shift else math.inf
    enough = here.f - f >= needed
    if needed <= rounding:
        # values cannot tell any more; for convex f, <g_{k+1}, x_k - x_{k+1}> bounds their difference from below
        enough = -float(g @ direction) >= needed or norm <= here.norm / 2
    return Point(x, f, g, norm) if enough else Refusal.NO_PROGRESS
