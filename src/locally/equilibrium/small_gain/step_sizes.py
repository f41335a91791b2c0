"""Step sizes and contraction factors that follow from a margin alpha and a Lipschitz constant beta in one norm.

All bounds hold for any field that is alpha-strongly monotone and beta-Lipschitz in that norm; the affine versions are
exact. `rk4_guideline` is the rule of arXiv 2512.06791 and is not a contraction guarantee: there are fields of norm 1
whose Runge-Kutta map at h = 2.5 expands by 13 %.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_choice, check_nonnegative, check_positive, check_square
from locally.equilibrium.small_gain.margins import check_weights, owners, rescale

RK4_CONSTANT = 2.5


def euler_step_max(alpha: float, beta: float) -> float:
    """2 alpha / beta^2: every smaller step contracts; 0 where nothing is certified."""
    _check(alpha, beta)
    return 2 * alpha / beta**2 if alpha > 0 else 0.0


def euler_step_opt(alpha: float, beta: float) -> float:
    """alpha / beta^2, with the best certified factor sqrt(1 - (alpha / beta)^2)."""
    return euler_step_max(alpha, beta) / 2


def euler_contraction(alpha: float, beta: float, step: float) -> float:
    """q = sqrt(1 - 2 step alpha + step^2 beta^2), the factor per step between any two points.

    >>> round(euler_contraction(0.29289, 1.70711, 0.1005), 5)
    0.98517
    """
    _check(alpha, beta)
    check_nonnegative("step", step)
    return float(np.sqrt(max(1 - 2 * step * alpha + (step * beta) ** 2, 0.0)))


def extragradient_step(alpha: float, beta: float) -> float:
    """Largest step at which the extragradient bound below loses nothing, 1 / (alpha + sqrt(alpha^2 + beta^2)).

    From ||x+ - x*||^2 <= (1 - step alpha) ||x - x*||^2 - (1 - step^2 beta^2 - 2 step alpha) ||x - x_half||^2.
    The half step may move away from x* by up to sqrt(2), so a run must start within radius / sqrt(2).
    """
    _check(alpha, beta)
    return 1 / (alpha + np.sqrt(alpha**2 + beta**2)) if alpha > 0 else 0.0


def extragradient_contraction(alpha: float, beta: float, step: float) -> float:
    """Factor per step towards the equilibrium, sqrt(1 - step alpha) for step <= `extragradient_step`, else infinite."""
    if step > extragradient_step(alpha, beta) * (1 + 1e-12):
        return np.inf
    return float(np.sqrt(1 - step * alpha))


def optimistic_step(alpha: float, beta: float) -> float:
    """1 / (4 beta), at which the optimistic gradient method converges linearly (Mokhtari et al., AISTATS 2020)."""
    _check(alpha, beta)
    return 1 / (4 * beta) if alpha > 0 else 0.0


def rk4_guideline(alpha: float, beta: float) -> float:
    """2.5 / beta, inside the stability region of every normal Jacobian; contraction in one step is not implied."""
    _check(alpha, beta)
    return RK4_CONSTANT / beta if alpha > 0 else 0.0


def rk4_contraction(alpha: float, beta: float, step: float) -> float:
    """Certified factor of one classical Runge-Kutta step between any two points; infinite where none is certified.

    Carries upper bounds b_k on the stage slopes and lower bounds c_k on their inner products with the initial
    difference from stage to stage. Also refuses a step at which a stage may leave a ball around the equilibrium that
    holds the two points, since alpha and beta are known only there.
    """
    _check(alpha, beta)
    check_nonnegative("step", step)
    if alpha <= 0:
        return np.inf
    slopes, products, stages = [beta], [alpha], []
    for advance in (step / 2, step / 2, step):
        b, c = slopes[-1], products[-1]
        largest = np.sqrt(max(1 - 2 * advance * c + (advance * b) ** 2, 0.0))
        smallest = max(1 - advance * b, 0.0)
        stages.append(largest)
        slopes.append(beta * largest)
        products.append(alpha * smallest**2 - advance * slopes[-1] * b)
    weights = np.array([1, 2, 2, 1]) / 6
    c, b = float(weights @ products), float(weights @ slopes)
    factor = float(np.sqrt(max(1 - 2 * step * c + (step * b) ** 2, 0.0)))
    return factor if factor < 1 and max(stages) <= 1 else np.inf


def rk4_step_rigorous(alpha: float, beta: float) -> float:
    """Largest step that `rk4_contraction` certifies, by bisection; all smaller ones are certified too.

    >>> round(rk4_step_rigorous(0.5, 1.0), 3)
    0.366
    """
    _check(alpha, beta)
    if alpha <= 0:
        return 0.0
    # h -> 0 gives q^2 = 1 - 2 h alpha + O(h^2): halve until certified, then close in
    high = 1 / beta
    while not rk4_contraction(alpha, beta, high) < 1:
        high /= 2
    return _bisect(lambda h: rk4_contraction(alpha, beta, h) < 1, high, 2 * high)


def rk4_step_opt(alpha: float, beta: float) -> float:
    """Step with the smallest certified Runge-Kutta factor, by golden-section search."""
    from scipy.optimize import minimize_scalar

    limit = rk4_step_rigorous(alpha, beta)
    if limit == 0:
        return 0.0
    found = minimize_scalar(lambda h: min(rk4_contraction(alpha, beta, h), 2.0), bounds=(0, limit), method="bounded")
    return float(found.x)


def affine_step_matrix(H: Float[ndarray, "d d"], step: float, method: str = "euler") -> Float[ndarray, "d d"]:
    """The linear map of one step on x' = -H x: I - hH for Euler, the degree-4 Taylor polynomial for "rk4"."""
    check_square("H", H)
    check_nonnegative("step", step)
    check_choice("method", method, ("euler", "rk4"))
    identity = np.eye(len(H))
    z = -step * H
    if method == "euler":
        return identity + z
    return identity + z @ (identity + z @ (identity / 2 + z @ (identity / 6 + z / 24)))


def affine_contraction(
    H: Float[ndarray, "d d"],
    block_sizes: Sequence[int],
    weights: Float[ndarray, " players"],
    step: float,
    method: str = "euler",
) -> float:
    """Exact factor of one step in the M(w)-norm for an affine pseudo-gradient H x + c."""
    check_weights(weights, len(block_sizes))
    return float(np.linalg.norm(rescale(affine_step_matrix(H, step, method), np.sqrt(weights)[owners(block_sizes)]), 2))


def affine_step_max(
    H: Float[ndarray, "d d"], block_sizes: Sequence[int], weights: Float[ndarray, " players"], method: str = "euler"
) -> float:
    """Largest step up to which every step contracts the M(w)-norm of an affine game; 0 if the smallest ones do not."""
    norm = float(np.linalg.norm(rescale(H, np.sqrt(weights)[owners(block_sizes)]), 2))
    return _first_failure(lambda h: affine_contraction(H, block_sizes, weights, h, method), norm)


def stability_threshold(H: Float[ndarray, "d d"], method: str = "euler") -> float:
    """Largest step up to which the iteration on H x + c converges at all: spectral radius of the step map below 1."""
    check_square("H", H)
    check_choice("method", method, ("euler", "rk4"))
    eigenvalues = np.linalg.eigvals(H)

    def radius(h: float) -> float:
        z = -h * eigenvalues
        step = 1 + z if method == "euler" else 1 + z * (1 + z * (1 / 2 + z * (1 / 6 + z / 24)))
        return float(np.abs(step).max())

    return _first_failure(radius, float(np.abs(eigenvalues).max()))


def _first_failure(factor: Callable[[float], float], norm: float) -> float:
    """Scan steps up to 4 / norm, where neither method is stable any more, then close in on the first factor >= 1."""
    if norm == 0:
        return 0.0
    grid = np.linspace(0, 4 / norm, 161)[1:]
    failed = next((k for k, h in enumerate(grid) if factor(h) >= 1), None)
    if failed is None:
        return float(grid[-1])
    if failed == 0:
        return _bisect(lambda h: factor(h) < 1, 0.0, grid[0])
    return _bisect(lambda h: factor(h) < 1, grid[failed - 1], grid[failed])


def _bisect(passes: Callable[[float], bool], inside: float, outside: float, steps: int = 60) -> float:
    for _ in range(steps):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if passes(middle) else (inside, middle)
    return float(inside)


def _check(alpha: float, beta: float) -> None:
    check_positive("beta", beta)
    if not np.isfinite(alpha) or alpha > beta * (1 + 1e-9):
        raise ValueError(f"alpha must be finite and at most beta = {beta:g}, got {alpha!r}")
