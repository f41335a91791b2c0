"""Follow the regularised leader on the simplex, with the log-barrier or with the negative entropy.

Source: Dai, Luo, Wei and Zimmert (ICML 2023, arXiv 2301.12942), Algorithms 1 and 2. What tells the two apart is the
stability term: with the log-barrier it is at most eta sum_a p_a c_a^2 for losses c of any size and sign, with the
entropy only for eta c >= -1.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_finite
from locally.control.adversarial import kernels
from locally.control.validity import check_kernel


def log_barrier_simplex(
    cost: Float[ndarray, "*batch A"], eta: float | Float[ndarray, "*#batch"] = 1.0
) -> Float[ndarray, "*batch A"]:
    """The minimiser of eta <p, cost> + sum_a ln(1 / p_a) over the simplex, row by row.

    Args:
        cost: cumulative costs, any finite numbers.
        eta: learning rate, positive; one number or one a row.

    Returns: probabilities, all positive. The optimality condition is that eta cost_a - 1 / p_a is the same for all a.

    Raises:
        ValueError: cost holds NaN or infinity or no action, or eta is not positive.

    Complexity: 5 to 15 Newton steps of O(A).

    >>> log_barrier_simplex(np.array([0.0, 1.0]), eta=1.5)
    array([0.66666667, 0.33333333])
    """
    scaled = _scaled(cost, eta)
    return kernels.log_barrier_weights(scaled).reshape(cost.shape)


def exponential_weights(
    cost: Float[ndarray, "*batch A"], eta: float | Float[ndarray, "*#batch"] = 1.0
) -> Float[ndarray, "*batch A"]:
    """The minimiser of eta <p, cost> + sum_a p_a ln p_a over the simplex: p_a proportional to exp(-eta cost_a).

    Arguments and errors as for `log_barrier_simplex`. O(A) a row.

    >>> exponential_weights(np.array([0.0, np.log(3.0)]))
    array([0.75, 0.25])
    """
    scaled = _scaled(cost, eta)
    return kernels.exponential_weights(scaled).reshape(cost.shape)


def log_barrier_stability(
    p: Float[ndarray, "*batch A"], cost: Float[ndarray, "*batch A"], eta: float | Float[ndarray, "*#batch"]
) -> Float[ndarray, "*batch"]:
    """max over q of <p - q, cost> - D(q, p) / eta, D the Bregman divergence of the log-barrier.

    The refined analysis bounds it by eta sum_a p_a cost_a^2, however large and however negative the costs are.

    Args:
        p: distributions with positive entries.
        cost: any finite numbers.
        eta: learning rate, positive.

    Raises:
        ValueError: p is no such distribution, cost holds NaN or infinity, or eta is not positive.

    Complexity: O(A) a row, times the Newton steps.

    >>> bool(log_barrier_stability(np.array([0.5, 0.5]), np.array([-1e6, 0.0]), 10.0) < 0.5 * 10 * 1e12)
    True
    """
    eta = _checked_stability(p, cost, eta)
    # first-order condition of the maximiser: eta cost_a + 1 / p_a - 1 / q_a is the same for all a
    q = log_barrier_simplex(eta[..., None] * cost + 1 / p)
    ratio = q / p
    divergence = (ratio - 1 - np.log(ratio)).sum(axis=-1)  # the linear parts cancel on the simplex
    return np.asarray(((p - q) * cost).sum(axis=-1) - divergence / eta)


def entropy_stability(
    p: Float[ndarray, "*batch A"], cost: Float[ndarray, "*batch A"], eta: float | Float[ndarray, "*#batch"]
) -> Float[ndarray, "*batch"]:
    """As `log_barrier_stability` for the negative entropy: <p, cost> + ln(sum_a p_a exp(-eta cost_a)) / eta.

    >>> bool(entropy_stability(np.array([0.5, 0.5]), np.array([-10.0, 0.0]), 1.0) > 0)
    True
    """
    eta = _checked_stability(p, cost, eta)
    exponent = np.log(p) - eta[..., None] * cost
    largest = exponent.max(axis=-1)
    log_sum = largest + np.log(np.exp(exponent - largest[..., None]).sum(axis=-1))
    return np.asarray((p * cost).sum(axis=-1) + log_sum / eta)


def _scaled(cost: ndarray, eta: float | ndarray) -> ndarray:
    check_finite("cost", cost)
    if cost.ndim == 0 or cost.shape[-1] == 0:
        raise ValueError(f"cost must have at least one action along its last axis, got shape {cost.shape}")
    rates = _rates(eta)
    return np.ascontiguousarray(rates[..., None] * cost, np.float64).reshape(-1, cost.shape[-1])


def _checked_stability(p: ndarray, cost: ndarray, eta: float | ndarray) -> ndarray:
    check_kernel("p", p)
    if p.min(initial=1.0) <= 0:
        raise ValueError(f"p must have positive entries, got {p.min():.3g}")
    check_finite("cost", cost)
    return _rates(eta)


def _rates(eta: float | ndarray) -> ndarray:
    rates = np.asarray(eta, np.float64)
    check_finite("eta", rates)
    if rates.min(initial=np.inf) <= 0:
        raise ValueError(f"eta must be positive, got {rates.min():.3g}")
    return rates
