"""What sampling noise does to a spectrum: spiked Wigner and spiked covariance matrices, and their bulk densities.

Source: arXiv 2006.09092, theorem on the extremal eigenvalues of the batch Hessian, for the additive case; Baik, Ben
Arous and Peche (2005) and Benaych-Georges and Nadakuditi (arXiv 0910.2120) for spikes and overlaps.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import eigvalsh_tridiagonal

from locally.checks import check_count, check_nonnegative, check_positive


class Regime(StrEnum):
    """Whether an eigenvalue of the full matrix can be told from the noise of a batch."""

    OUTLIER = "outlier: shifted, still visible"
    BULK = "bulk: drowned, the edge of the noise is seen instead"


@dataclass(frozen=True)
class Shifted:
    """An eigenvalue as a batch shows it, and the squared overlap of its eigenvector with the true one, in [0, 1]."""

    value: float
    overlap: float
    regime: Regime


def effective_batch_size(batch_size: int, n_examples: int | None = None, *, replacement: bool = False) -> float:
    """b with 1/b = 1/B - 1/N: a batch drawn without replacement leaves less noise, and none at B = N.

    Args:
        batch_size: B, in [1, N].
        n_examples: N; None for a stream that never repeats.
        replacement: examples may repeat within a batch; then b = B.

    Returns:
        b in [B, infinity].

    >>> effective_batch_size(50, 100), effective_batch_size(100, 100), effective_batch_size(50)
    (100.0, inf, 50.0)
    """
    check_count("batch_size", batch_size)
    if n_examples is None or replacement:
        return float(batch_size)
    check_count("n_examples", n_examples)
    if batch_size > n_examples:
        raise ValueError(f"batch_size must be at most n_examples = {n_examples} without replacement, got {batch_size}")
    return math.inf if batch_size == n_examples else batch_size / (1 - batch_size / n_examples)


def spiked_wigner(spike: float, radius: float) -> Shifted:
    """Additive noise: a semicircle of radius 2 r on top of one eigenvalue.

    An eigenvalue beyond r in size moves out to lambda + r^2 / lambda and keeps the overlap 1 - (r / lambda)^2; any
    other disappears behind the edge 2 r. For the batch Hessian of the i.i.d. model r = sqrt(P / b) sigma.

    Args:
        spike: lambda; its sign says which edge is meant.
        radius: r >= 0, half the radius of the semicircle.

    >>> spiked_wigner(4.0, 2.0).value, spiked_wigner(-4.0, 2.0).value, spiked_wigner(1.0, 2.0).value
    (5.0, -5.0, 4.0)
    """
    check_nonnegative("radius", radius)
    if not math.isfinite(spike):
        raise ValueError(f"spike must be finite, got {spike!r}")
    if abs(spike) > radius:
        return Shifted(spike + radius**2 / spike, 1 - (radius / spike) ** 2, Regime.OUTLIER)
    return Shifted(math.copysign(2 * radius, spike), 0.0, Regime.BULK)


def spiked_covariance(spike: float, bulk_variance: float, ratio: float) -> Shifted:
    """Multiplicative noise: the sample covariance of B draws whose covariance is s^2 but for one eigenvalue.

    With gamma = P / B, an eigenvalue above s^2 (1 + sqrt(gamma)) moves out to lambda (1 + gamma s^2 / (lambda - s^2));
    any other disappears behind the edge s^2 (1 + sqrt(gamma))^2.

    Args:
        spike: lambda >= 0.
        bulk_variance: s^2 >= 0.
        ratio: gamma > 0.

    >>> spiked_covariance(3.0, 1.0, 2.0).value
    6.0
    """
    check_nonnegative("spike", spike)
    check_nonnegative("bulk_variance", bulk_variance)
    check_positive("ratio", ratio)
    if spike <= bulk_variance * (1 + math.sqrt(ratio)):
        return Shifted(bulk_variance * (1 + math.sqrt(ratio)) ** 2, 0.0, Regime.BULK)
    excess = spike / bulk_variance - 1 if bulk_variance else math.inf
    overlap = (1 - ratio / excess**2) / (1 + ratio / excess)
    return Shifted(spike * (1 + ratio / excess), overlap, Regime.OUTLIER)


def semicircle_density(x: Float[ndarray, " n"], radius: float) -> Float[ndarray, " n"]:
    """Density of the eigenvalues of Wigner noise on [-radius, radius]."""
    check_positive("radius", radius)
    return 2 / (math.pi * radius**2) * np.sqrt(np.clip(radius**2 - x**2, 0, None))


def marchenko_pastur_density(x: Float[ndarray, " n"], variance: float, ratio: float) -> Float[ndarray, " n"]:
    """Continuous part of the density of sample covariances; for ratio > 1 a mass 1 - 1 / ratio sits at zero besides."""
    check_positive("variance", variance)
    check_positive("ratio", ratio)
    low, high = (variance * (1 + sign * math.sqrt(ratio)) ** 2 for sign in (-1, 1))
    inside = (x > low) & (x < high)
    density = np.zeros_like(x)
    at = x[inside]
    density[inside] = np.sqrt((high - at) * (at - low)) / (2 * math.pi * variance * ratio * at)
    return density


def spiked_wigner_extreme(P: int, b: float | int, spike: float, rng: np.random.Generator) -> float:
    """The eigenvalue at the spike's end of a symmetric matrix of N(0, 1/b) entries (2/b on the diagonal) plus it."""
    diagonal = rng.standard_normal(P) * math.sqrt(2 / b)
    diagonal[0] += spike
    off = np.sqrt(rng.chisquare(np.arange(P - 1, 0, -1)) / b)
    end = P - 1 if spike > 0 else 0
    return float(eigvalsh_tridiagonal(diagonal, off, select="i", select_range=(end, end))[0])


def spiked_covariance_top(P: int, B: int, spike: float, rng: np.random.Generator) -> float:
    """The largest eigenvalue of the sample covariance of B < P normal vectors of covariance diag(spike, 1, ..., 1)."""
    d = np.sqrt(rng.chisquare(np.arange(B, 0, -1)) / B)
    d[0] *= math.sqrt(spike)
    e = np.sqrt(rng.chisquare(np.arange(P - 1, P - B - 1, -1)) / B)
    # rows of the bidiagonal factor: d_i on the diagonal, e_i beside it
    return float(eigvalsh_tridiagonal(d**2 + e**2, d[1:] * e[:-1], select="i", select_range=(B - 1, B - 1))[0])
