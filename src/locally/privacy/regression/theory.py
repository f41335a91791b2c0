"""The rates of arXiv 2310.07367 as curves, without their unstated constants, and the users that a covariance needs."""

import math

from locally.checks import check_count, check_positive
from locally.privacy.regression.calibration import check_budget


def non_interactive_lower_bound(n: int, d: int, k: int, epsilon: float) -> float:
    """sqrt(d k log d) / (sqrt(n) epsilon): no one-shot protocol does better, up to a constant."""
    return math.sqrt(d * k * math.log(max(d, 2))) / _information(n, d, k, epsilon)


def interactive_lower_bound(n: int, d: int, k: int, epsilon: float) -> float:
    """sqrt(d k) / (sqrt(n) epsilon): nor does a sequentially interactive one."""
    return math.sqrt(d * k) / _information(n, d, k, epsilon)


def moment_upper_bound(n: int, d: int, k: int, epsilon: float) -> float:
    """d sqrt(k) / (sqrt(n) epsilon): NLDP-LR, up to logarithms."""
    return d * math.sqrt(k) / _information(n, d, k, epsilon)


def public_upper_bound(n: int, d: int, k: int, epsilon: float) -> float:
    """sqrt(d k) / (sqrt(n) epsilon): NLDP-LR with public features, up to logarithms."""
    return math.sqrt(d * k) / _information(n, d, k, epsilon)


def interactive_upper_bound(n: int, d: int, k: int, epsilon: float) -> float:
    """k sqrt(d) / (sqrt(n) epsilon): LDP-IHT, up to logarithms."""
    return k * math.sqrt(d) / _information(n, d, k, epsilon)


def users_for_definite_covariance(noise_scale: float, d: int, min_eigenvalue: float = 1.0) -> int:
    """16 s^2 d / kappa^2 users: the noise matrix, of norm about 2 s sqrt(d / n), is then half of kappa.

    Args:
        noise_scale: s, standard deviation of one user's noise in an entry of the covariance.
        d: features.
        min_eigenvalue: kappa, smallest eigenvalue of the true covariance.

    >>> users_for_definite_covariance(100.0, 10)
    1600000
    """
    check_positive("noise_scale", noise_scale)
    check_count("d", d)
    check_positive("min_eigenvalue", min_eigenvalue)
    return math.ceil(16 * noise_scale**2 * d / min_eigenvalue**2)


def _information(n: int, d: int, k: int, epsilon: float) -> float:
    """sqrt(n) epsilon."""
    check_positive("n", n)
    check_count("d", d)
    check_count("k", k)
    check_budget(epsilon)
    return math.sqrt(n) * epsilon
