"""How much Gaussian noise (epsilon, delta) asks for, on the real line and on the integer lattice.

For whoever releases a vector of bounded l2 sensitivity. The analytic calibration (Balle and Wang, arXiv 1805.06530,
Theorem 8) is exact for every epsilon; the classical one is what arXiv 2310.07367 uses. Reports carry integers, so the
noise is the discrete Gaussian (Canonne, Kamath and Steinke, arXiv 2004.00010), whose distance from the rounded
continuous one is bounded below and charged to the budget.
"""

import math
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from locally.checks import check_count, check_nonnegative, check_positive

MAX_LOG2_SCALE = 24  # squares of noise draws then fit 64-bit integers in the exact sampler
MIN_LOG2_SCALE = 20  # what the lattice may cost is charged at this scale, so none is coarser
TAIL = 16.0  # noise beyond so many standard deviations is clamped: chance below 1e-56 a number
INT32_MAX = 2**31 - 1


def gaussian_delta(sigma: float, epsilon: float, sensitivity: float = 1.0) -> float:
    """Smallest delta at which N(0, sigma^2) noise on a query of l2 sensitivity `sensitivity` is epsilon-private.

    Phi(D / 2s - epsilon s / D) - e^epsilon Phi(-D / 2s - epsilon s / D), the second term from its logarithm.

    >>> round(gaussian_delta(4.22467889, 1.0) * 1e6, 4)
    1.0
    """
    check_positive("sigma", sigma)
    check_nonnegative("epsilon", epsilon)
    check_positive("sensitivity", sensitivity)
    half, slope = sensitivity / (2 * sigma), epsilon * sigma / sensitivity
    return float(ndtr(half - slope) - math.exp(epsilon + log_ndtr(-half - slope)))


def analytic_gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """Smallest standard deviation that makes the Gaussian mechanism (epsilon, delta)-private; any epsilon > 0.

    >>> round(analytic_gaussian_sigma(1.0, 1e-6), 4)
    4.2247
    """
    check_budget(epsilon, delta)
    check_positive("sensitivity", sensitivity)

    def excess(log_sigma: float) -> float:
        return math.log(max(gaussian_delta(math.exp(log_sigma), epsilon), 1e-320)) - math.log(delta)

    low, high = 0.0, 0.0
    while excess(low) < 0:
        low -= 1.0
    while excess(high) > 0:
        high += 1.0
    if low == high:
        return sensitivity
    return sensitivity * math.exp(brentq(excess, low, high, xtol=1e-15, rtol=1e-14)) * (1 + 1e-12)


def classical_gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """sensitivity sqrt(2 ln(1.25 / delta)) / epsilon: proved for epsilon <= 1 only, and never less than needed there.

    >>> round(classical_gaussian_sigma(1.0, 1e-6), 4)
    5.2988
    """
    check_budget(epsilon, delta)
    check_positive("sensitivity", sensitivity)
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def check_budget(epsilon: float, delta: float | None = None) -> None:
    """epsilon in (0, infinity); delta, where there is one, in (0, 1)."""
    check_positive("epsilon", epsilon)
    if delta is not None:
        check_positive("delta", delta, below=1.0)


@dataclass(frozen=True)
class LatticeScale:
    """Noise of standard deviation 2^log2_scale grid steps on a grid of width `step`."""

    log2_scale: int
    step: float

    @property
    def sigma(self) -> float:
        """Standard deviation in the units of the query."""
        return self.step * 2.0**self.log2_scale


def lattice_scale(sigma: float, sensitivity: float, dimension: int, largest: float) -> LatticeScale:
    """Grid on which integer noise gives a query what N(0, sigma^2) noise gives it on the real line.

    Rounding a vector to the nearest grid points moves two neighbouring answers apart by up to sqrt(dimension) steps
    more; the grid is widened so that noise over *integer* sensitivity is still sigma / sensitivity.

    Args:
        sigma, sensitivity: of the real-valued query.
        dimension: entries of the answer.
        largest: bound on the magnitude of one entry; the grid is as fine as 32-bit integers allow.

    Raises:
        ValueError: so little noise is asked for (epsilon in the thousands) that 32-bit integers cannot carry it.
    """
    check_positive("sigma", sigma)
    check_positive("sensitivity", sensitivity)
    check_count("dimension", dimension)
    multiplier = sigma / sensitivity
    for log2_scale in range(MAX_LOG2_SCALE, MIN_LOG2_SCALE - 1, -1):
        scale = 2.0**log2_scale
        steps = scale / multiplier - math.sqrt(dimension)  # sensitivity left for the real-valued query, in grid steps
        if steps <= 0:
            break
        step = sensitivity * (1 + 1e-9) / steps  # the slack covers floating-point error in the query itself
        if largest / step + TAIL * scale + 1 < INT32_MAX:
            return LatticeScale(log2_scale, step)
    raise ValueError(
        f"noise of {multiplier:.3g} sensitivities on {dimension} numbers does not fit 32-bit reports: "
        "epsilon or the dimension is outside the range in which this mechanism makes sense"
    )


def lattice_loss(epsilon: float, delta: float, dimension: int) -> tuple[float, float]:
    """What is left of (epsilon, delta) for calibrating the continuous Gaussian when the noise sent is discrete.

    Let s be the scale of the noise in grid steps, P the discrete Gaussian and R the rounded continuous one on Z^p.
    Jensen's inequality gives P <= e^(p / 24 s^2) R everywhere, and P >= e^(-r^2 / 24 s^4) R within radius r; R is
    post-processed Gaussian noise. So a continuous calibration at (epsilon - both exponents, delta less the tail beyond
    r) makes P (epsilon, delta)-private. At s = 2^20 both corrections lie below 1e-8 for up to 10^5 numbers.
    """
    s2 = 4.0**MIN_LOG2_SCALE
    tail = math.sqrt(2 * (epsilon + math.log(1 / delta) + 40))  # e^epsilon times the tail is then below e^-40 delta
    radius = math.sqrt(s2) * (math.sqrt(dimension) + tail) + math.sqrt(dimension)
    above, below = dimension / (24 * s2), radius**2 / (24 * s2 * s2)
    if above + below > epsilon / 2:
        raise ValueError(f"epsilon = {epsilon:g} is too small for {dimension} numbers on a lattice")
    return epsilon - above - below, delta * math.exp(-above) * (1 - 1e-12)
