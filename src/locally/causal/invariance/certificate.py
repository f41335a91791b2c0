"""What invariance on the training environments says of unseen ones: shares with a confidence, and exact extrapolation.

Moments of a family of interventions span few dimensions (`bounds`). Where a new environment's moments are the
combination sum_i a_i Sigma_i of the training ones, every representation within eps on those is within eps ||a||_1 on
it, with no probability involved. Source: arXiv 2205.15196.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import linprog

from locally.causal.invariance.bounds import (
    InterventionFamily,
    agnostic_delta,
    finite_class_delta,
    holdout_delta,
    pac_delta,
    unrestricted_lift_dimension,
    vc_dimension,
)
from locally.causal.invariance.moments import EnvironmentMoments


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Bounds on the share of unseen environments, from the law of the training ones, on which the gap passes `level`.

    Each bound holds with the given confidence by itself, over the draw of environments and rows; 1 says nothing.

    Attributes:
        level: the gap that is spoken of, in the units of the moments: eps and the sampling radius. The radius is that
            of a head which these rows did not fit: without a split, a held-out bound is the one to rely on.
        confidence: 1 - eta.
        environments: how many training environments met the constraint.
        lift_dimension: dimension that the moments of the family span at most.
        lift_source: "family" where it was declared, "all moments" where it was not.
        measured_rank: dimension that the training moments span, up to their sampling error.
        uniform: over all representations and heads, from the declared family or all moments.
        uniform_at_measured_rank: the same if no unseen environment left the span of the training moments: a
            heuristic, NaN while every new environment still adds a dimension.
        agnostic: the uniform bound for a learner that violates some training environments.
        finite_class: for the choice among subsets whose heads were fitted on other environments; NaN without a split.
        holdout: from environments that the learner never saw; NaN before `certify`.
        holdout_level, holdout_confidence: the gap and the confidence that this bound speaks of.
        holdout_environments, holdout_violations: how many there were, and how many passed the level.
    """

    level: float
    confidence: float
    environments: int
    lift_dimension: int
    lift_source: str
    measured_rank: int
    uniform: float
    uniform_at_measured_rank: float
    agnostic: float
    finite_class: float = math.nan
    holdout: float = math.nan
    holdout_level: float = math.nan
    holdout_confidence: float = math.nan
    holdout_environments: int = 0
    holdout_violations: int = 0

    @classmethod
    def of_training(
        cls,
        moments: EnvironmentMoments,
        *,
        level: float,
        violations: int,
        eta: float,
        family: InterventionFamily | None = None,
        candidates: int | None = None,
    ) -> "Certificate":
        """The bounds that the training environments allow.

        `candidates` is the size of the class if its heads were fixed before these environments were seen. Where the
        level includes a sampling radius, half of eta is left to the environments.
        """
        share = eta / 2 if np.isfinite(moments.rows).any() else eta
        N = len(moments)
        everything = unrestricted_lift_dimension(moments.xy.shape[1])
        lift = everything if family is None else min(family.lift_dimension, everything)
        vc = vc_dimension(lift)
        rank = moment_rank(moments)
        kept = violations == 0
        return cls(
            level=level,
            confidence=1 - eta,
            environments=N,
            lift_dimension=lift,
            lift_source="all moments" if family is None else "family",
            measured_rank=rank,
            uniform=pac_delta(N, vc, share) if kept else 1.0,
            uniform_at_measured_rank=pac_delta(N, vc_dimension(rank), share) if kept and rank < N else math.nan,
            agnostic=agnostic_delta(violations / N, N, vc, share),
            finite_class=math.nan if candidates is None or not kept else finite_class_delta(candidates, N, share),
        )

    def with_holdout(
        self, violations: int, environments: int, *, level: float, eta: float, share: float
    ) -> "Certificate":
        """The same with a held-out bound for `holdout_level`, in which `share` of eta is left to the environments."""
        return replace(
            self,
            holdout=holdout_delta(violations, environments, share),
            holdout_level=level,
            holdout_confidence=1 - eta,
            holdout_environments=environments,
            holdout_violations=violations,
        )


def moment_rank(moments: EnvironmentMoments, rtol: float | None = None) -> int:
    """Dimension that the moments of the environments span, at most their number; O(N^2 d^2).

    Args:
        rtol: singular values below rtol times the largest count as zero; default: 1e-7, or 3 sqrt(d / n) for the
            sampling error of n rows.
    """
    if rtol is None:
        d, n = moments.xy.shape[1], float(moments.rows.min())
        rtol = 1e-7 if math.isinf(n) else min(3 * math.sqrt(d / n), 0.5)
    return span_dimension(moments.second(), rtol)


def span_dimension(stack: Float[ndarray, "N p p"], rtol: float = 1e-7) -> int:
    """Dimension that symmetric matrices span, each scaled to the same norm."""
    flat = _vectors(stack)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    # Not by the N x N Gram matrix, which is faster but loses half of the digits.
    values = np.linalg.svd(flat, compute_uv=False)
    return int((values > rtol * values[0]).sum())


def extrapolation_factor(training: Float[ndarray, "N p p"], new: Float[ndarray, "p p"], tol: float = 1e-8) -> float:
    """Least ||a||_1 with new = sum_i a_i training_i: every gap at most eps there is at most eps ||a||_1 here.

    Args:
        training, new: moments, all of the same variables in the same units.
        tol: relative distance from the span of the training moments that counts as none.

    Returns:
        At least 0; infinity where the new moments lie outside the span.

    >>> round(extrapolation_factor(np.array([np.eye(2), np.diag([1.0, 3.0])]), np.diag([1.0, 5.0])), 6)
    3.0
    """
    A, b = _vectors(training), _vectors(new[None])[0]
    size = np.linalg.norm(b)
    if size == 0:
        return 0.0
    _, values, basis = np.linalg.svd(A, full_matrices=False)
    basis = basis[values > tol * values[0]]
    if np.linalg.norm(b - basis.T @ (basis @ b)) > tol * size:
        return math.inf
    N = len(A)
    found = linprog(
        np.ones(2 * N),
        A_eq=np.hstack([basis @ A.T, -(basis @ A.T)]) / size,
        b_eq=basis @ b / size,
        bounds=(0, None),
        method="highs",
    )
    return float(found.fun) if found.success else math.inf


def _vectors(stack: Float[ndarray, "N p p"]) -> Float[ndarray, "N entries"]:
    """Upper triangles."""
    p = stack.shape[-1]
    upper = np.triu_indices(p)
    return stack[:, upper[0], upper[1]]
