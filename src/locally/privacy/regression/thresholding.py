"""From moments to a sparse vector: closed-form soft thresholding, and hard thresholding with projection.

All of this is post-processing of what the server holds: it costs no privacy. Source: arXiv 2310.07367, Algorithms 1, 2.
"""

import math
import warnings
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_choice, check_count, check_nonnegative, check_positive


class IndefiniteCovariance(UserWarning):
    """The noisy covariance is not positive definite: there are too few users for this budget."""


class Status(StrEnum):
    """What became of the reports; set by the servers, read from `SparseFit.status`.

    Of a covariance the worst that is true is said: INDEFINITE (an eigenvalue below zero, beyond rounding), before
    FLOORED, before SINGULAR.
    """

    SOLVED = "solved"
    INDEFINITE = "covariance not positive definite: too few users for this budget"
    FLOORED = "eigenvalues of the covariance were raised to the floor"
    SINGULAR = "covariance singular: least-norm solution"
    TOO_FEW_REPORTS = "too few reports were accepted"


@dataclass(frozen=True)
class Solution:
    """A^{-1} c, soft-thresholded, and how trustworthy A was."""

    coef: Float[ndarray, " d"]
    raw: Float[ndarray, " d"]
    status: Status
    min_eigenvalue: float


def soft_threshold(v: Float[ndarray, "*shape"], threshold: float) -> Float[ndarray, "*shape"]:
    """sign(v_j) max(|v_j| - threshold, 0).

    >>> soft_threshold(np.array([-3.0, 0.5, 2.0]), 1.0)
    array([-2.,  0.,  1.])
    """
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0.0)


def hard_threshold(v: Float[ndarray, " d"], keep: int) -> Float[ndarray, " d"]:
    """The `keep` entries of largest magnitude, zero elsewhere; ties go to the lower index.

    >>> hard_threshold(np.array([-3.0, 0.5, 2.0]), 2)
    array([-3.,  0.,  2.])
    """
    kept = np.argsort(-np.abs(v), kind="stable")[:keep]
    out = np.zeros_like(v)
    out[kept] = v[kept]
    return out


def project_on_ball(v: Float[ndarray, " d"], radius: float) -> Float[ndarray, " d"]:
    return v * (radius / max(radius, float(np.linalg.norm(v))))


def solve_sparse(
    covariance: Float[ndarray, "d d"],
    cross: Float[ndarray, " d"],
    threshold: float,
    on_indefinite: str = "warn",
    floor: float = 0.1,
) -> Solution:
    """soft(covariance^{-1} cross, threshold): steps 3 and 4 of Algorithm 1. O(d^3).

    Args:
        covariance: symmetric; noise may have made it indefinite.
        cross: mean of x y.
        threshold: non-negative.
        on_indefinite: "warn", "raise", or "clip" eigenvalues to `floor`.
        floor: smallest eigenvalue after clipping, in the units of the covariance.

    Raises:
        ValueError: the covariance is indefinite and on_indefinite is "raise".

    >>> solve_sparse(np.diag([2.0, 1.0]), np.array([2.0, 0.1]), 0.25).coef
    array([0.75, 0.  ])
    """
    check_nonnegative("threshold", threshold)
    check_choice("on_indefinite", on_indefinite, ("warn", "raise", "clip"))
    check_positive("floor", floor)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    smallest = float(eigenvalues[0])
    wanted = floor if on_indefinite == "clip" else 0.0
    if smallest <= wanted:
        if on_indefinite == "clip":
            eigenvalues = np.maximum(eigenvalues, floor)
        else:
            message = (
                f"the noisy covariance has eigenvalue {smallest:.3g}: too few users for this dimension and budget; "
                "more users, public features or the interactive protocol would help"
            )
            if on_indefinite == "raise":
                raise ValueError(message)
            warnings.warn(message, IndefiniteCovariance, stacklevel=2)
    negligible = np.finfo(np.float64).eps * len(cross) * np.abs(eigenvalues).max()
    usable = np.abs(eigenvalues) > negligible
    if on_indefinite == "clip" and smallest <= floor:
        status = Status.FLOORED
    elif smallest < -negligible:
        status = Status.INDEFINITE
    else:
        status = Status.SOLVED if usable.all() else Status.SINGULAR
    inverse = np.where(usable, 1 / np.where(usable, eigenvalues, 1.0), 0.0)
    raw = vectors @ (inverse * (vectors.T @ cross))
    return Solution(soft_threshold(raw, threshold), raw, status, smallest)


def noise_threshold(
    noise_covariance: float,
    noise_cross: float,
    n_users: int,
    d: int,
    theta_bound: float = 1.0,
    inverse_bound: float = 1.0,
    constant: float = 1.0,
) -> float:
    """The level that the noise alone reaches in the largest of d coordinates; needs nothing from the data.

    constant inverse_bound sqrt(2 ln 2d) sqrt((noise_covariance theta_bound)^2 + noise_cross^2) / sqrt(n).

    Args:
        noise_covariance, noise_cross: standard deviation of the noise that one user adds to an entry of each moment.
        n_users: reports averaged.
        theta_bound: bound on ||theta||_2.
        inverse_bound: guess of ||Sigma^{-1}||_inf; 1 for uncorrelated standardised features.
        constant: multiple of that level.
    """
    check_nonnegative("noise_covariance", noise_covariance)
    check_nonnegative("noise_cross", noise_cross)
    check_count("n_users", n_users)
    check_count("d", d)
    for name, value in (("theta_bound", theta_bound), ("inverse_bound", inverse_bound), ("constant", constant)):
        check_positive(name, value)
    level = math.sqrt(2 * math.log(2 * d)) * math.hypot(noise_covariance * theta_bound, noise_cross)
    return constant * inverse_bound * level / math.sqrt(n_users)
