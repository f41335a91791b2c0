"""Optimal weights where the Jacobians themselves are known, not only their block norms.

`optimal_signed_weights` maximises the margin over explicit Jacobians: the largest alpha such that
M(w) J_p + J_p^T M(w) >= 2 alpha M(w) for all samples p, a generalised eigenvalue problem in w, solved by the method of
centres (Boyd and El Ghaoui, Linear Algebra Appl. 188, 1993) with a Newton step that costs a few d x d products however
many players there are. `optimal_step_weights` trades margin against Lipschitz constant, alpha / beta^power.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp

from locally.checks import check_choice, check_count, check_positive
from locally.equilibrium.small_gain.margins import (
    block_bounds,
    check_jacobians,
    check_weights,
    lipschitz,
    owners,
    rescale,
    signed_margin,
)
from locally.equilibrium.small_gain.perron import LOG_SPREAD, optimal_weights

SHORTFALL = 0.1  # share of the last gain by which the next level stays below what the centre already reaches


@dataclass(frozen=True)
class SignedOptimum:
    """Weights, their margin, and a dual bound that no weights exceed; `converged` says that the two met."""

    weights: Float[ndarray, " players"]
    margin: float
    upper_bound: float
    converged: bool


def optimal_signed_weights(
    jacobians: Float[ndarray, "samples d d"],
    block_sizes: Sequence[int],
    *,
    start: Float[ndarray, " players"] | None = None,
    tol: float = 1e-8,
    max_steps: int = 400,
) -> SignedOptimum:
    """Maximise `signed_margin` over the weights, with a certificate of optimality.

    Args:
        jacobians: one or more Jacobians of the pseudo-gradient.
        block_sizes: sizes of the players' blocks.
        start: weights to start from; default the optimum of the block bounds.
        tol: stop when the dual bound is within tol times the largest Jacobian norm of the margin.
        max_steps: Newton steps.

    Returns:
        Weights of geometric mean 1. Without convergence (an optimum that is only approached as weights separate) the
        margin is still the true margin of the weights and `upper_bound` still bounds every other choice.
        O(samples d^3) a Newton step.

    >>> J = np.array([[[1.0, 4.0], [-1.0, 1.0]]])  # a spiral: block norms certify nothing, since 4 * 1 > 1 * 1
    >>> found = optimal_signed_weights(J, (1, 1))
    >>> round(found.margin, 6), float(round(found.weights[1] / found.weights[0], 3))
    (1.0, 4.0)
    """
    check_jacobians(jacobians, block_sizes)
    check_positive("tol", tol)
    check_count("max_steps", max_steps)
    players, owner = len(block_sizes), owners(block_sizes)
    if start is None:
        bounds = block_bounds(jacobians, block_sizes)
        start = optimal_weights(bounds.mu, bounds.coupling).weights
    check_weights(start, players)
    starts = np.append(np.arange(len(owner))[np.r_[True, np.diff(owner) > 0]], len(owner))[:-1]
    scale = float(np.linalg.norm(jacobians, axis=(1, 2)).max()) or 1.0
    weights, best = start, start
    best_margin, upper = (
        signed_margin(jacobians, block_sizes, start),
        float(block_bounds(jacobians, block_sizes).mu.min()),
    )
    alpha = best_margin - 0.1 * scale
    w = start * (len(jacobians) * len(owner) / start.sum())  # the barrier's own scale
    steps = 0
    while steps < max_steps and upper - best_margin > tol * scale:
        shifted = jacobians - alpha * np.eye(len(owner))
        decrement = np.inf
        while decrement > 0.3 and steps < max_steps:
            steps += 1
            system = _barrier(shifted, w, owner, starts)
            if system is None:  # rounding: alpha has come as close to the optimum as doubles allow
                break
            root, inverse, gradient, hessian = system
            # in relative coordinates w_i e^s the Hessian stays well scaled when the weights spread
            direction = np.linalg.lstsq(w[:, None] * hessian * w, -w * gradient, rcond=1e-14)[0]
            decrement = float(np.sqrt(max(-(w * gradient) @ direction, 0.0)))
            change = (w * direction)[owner][:, None] * shifted
            change = change + change.swapaxes(1, 2)
            if decrement < 1:
                # Z - Z dX Z solves the dual equations that Z misses by the gradient, and stays semidefinite
                upper = min(upper, _dual_bound(jacobians, inverse - inverse @ change @ inverse, w, starts))
            w = w * (1 + _line_search(root @ change @ root.swapaxes(1, 2), float(w @ direction)) * direction)
        weights = w / np.exp(np.log(w).mean())
        value = signed_margin(jacobians, block_sizes, weights)
        if value > best_margin:
            best, best_margin = weights, value
        elif system is None:
            break
        # the next level lies strictly below what the centre reaches, so the centre is a feasible start
        alpha = value - SHORTFALL * (value - alpha)
    best = best / np.exp(np.log(best).mean())
    return SignedOptimum(best, best_margin, max(upper, best_margin), upper - best_margin <= tol * scale)


def _barrier(
    shifted: ndarray, w: ndarray, owner: ndarray, starts: ndarray
) -> tuple[ndarray, ndarray, ndarray, ndarray] | None:
    """The barrier sum_i w_i - sum_p log det X_p, X_p = W K_p + K_p^T W; None outside its domain.

    Returns the inverse Cholesky factors and the inverses of X_p, and the barrier's gradient and Hessian in w.
    """
    product = w[owner][:, None] * shifted
    matrices = product + product.swapaxes(1, 2)
    try:
        factors = np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError:
        return None
    root = np.linalg.inv(factors)
    inverse = root.swapaxes(1, 2) @ root
    image = shifted @ inverse  # K Z
    gradient = 1 - 2 * _sum_blocks(np.einsum("paa->a", image), starts)
    # tr(Z G_i Z G_j) with G_i = E_i K + K^T E_i falls into two sums over the entries of block (i, j)
    entries = np.einsum("pab,pba->ab", image, image) + np.einsum("pab,pab->ab", image @ shifted.swapaxes(1, 2), inverse)
    hessian = 2 * np.add.reduceat(np.add.reduceat(entries, starts, axis=0), starts, axis=1)
    return root, inverse, gradient, (hessian + hessian.T) / 2


def _line_search(change: ndarray, slope: float) -> float:
    """Exact minimiser of the barrier along a direction: slope t - sum log(1 + t sigma), sigma the relative changes.

    Damped Newton steps of 1 / (1 + decrement) are safe as well, but far shorter where a sample has just become active.
    """
    sigma = np.linalg.eigvalsh(change).ravel()
    low, high = 0.0, 0.99 / max(-sigma.min(), 1e-3)
    for _ in range(40):
        t = (low + high) / 2
        low, high = (t, high) if slope < (sigma / (1 + t * sigma)).sum() else (low, t)
    return low


def _dual_bound(jacobians: ndarray, inverse: ndarray, w: ndarray, starts: ndarray) -> float:
    """Bound on every weights' margin from positive semidefinite Z_p: max_i sum_p <Z_p, E_i J_p> / sum_p <Z_p, E_i>.

    It stays one when Z is restricted to the blocks of some players. That closes the gap where the optimum is decided by
    a few of them: on the others Z fades away and their quotients mean nothing.
    """
    entries = np.einsum("pab,pba->ab", jacobians, inverse)
    pairing = np.add.reduceat(np.add.reduceat(entries, starts, axis=0), starts, axis=1)
    size = _sum_blocks(np.einsum("paa->a", inverse), starts)
    share = w * size / (w * size).max()
    bounds = []
    for least in (0.0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 0.5):
        kept = share >= least
        bounds.append((pairing[np.ix_(kept, kept)].sum(axis=1) / size[kept]).max())
    return float(min(bounds))


def _sum_blocks(values: ndarray, starts: ndarray) -> ndarray:
    return np.add.reduceat(values, starts)


def optimal_step_weights(
    margin_jacobians: Float[ndarray, "samples d d"],
    lipschitz_jacobians: Float[ndarray, "samples2 d d"],
    block_sizes: Sequence[int],
    start: Float[ndarray, " players"],
    *,
    power: int,
) -> Float[ndarray, " players"]:
    """Maximise alpha(w) / beta(w)^power: 2 for the best Euler step and its rate, 1 for that of Runge-Kutta.

    log alpha - power log beta is concave in log w: alpha is the limit of log-convex norms of semigroups, and
    ||e^Z A e^-Z||_2 is log-convex in commuting Z (Hadamard's three lines), so a local search finds the maximum.
    Two players: a bounded scalar search. More: L-BFGS on soft extrema of the spectra that sharpen in four rounds.

    Args:
        margin_jacobians: Jacobians whose worst margin counts; the comparison matrix for block bounds.
        lipschitz_jacobians: Jacobians whose largest norm counts; the matrix of block norms for block bounds.
        block_sizes: sizes of the blocks of both.
        start: weights with a positive margin.
        power: 1 or 2.

    Raises:
        ValueError: the starting weights have no positive margin, so that no step is certified to begin with.
    """
    check_jacobians(margin_jacobians, block_sizes)
    check_jacobians(lipschitz_jacobians, block_sizes)
    check_weights(start, len(block_sizes))
    check_choice("power", power, (1, 2))
    best, best_value = start, _step_value(margin_jacobians, lipschitz_jacobians, block_sizes, start, power)
    if best_value == -np.inf:
        raise ValueError("start must be weights with a positive margin and a positive Lipschitz constant")
    if len(block_sizes) == 1:
        return start
    z = np.log(start)
    if len(block_sizes) == 2:
        reach = _bracket(margin_jacobians, block_sizes, z[1] - z[0])
        candidates = [_scalar_search(margin_jacobians, lipschitz_jacobians, block_sizes, power, reach)]
    else:
        candidates = _soft_search(margin_jacobians, lipschitz_jacobians, owners(block_sizes), power, z)
    for weights in candidates:
        value = _step_value(margin_jacobians, lipschitz_jacobians, block_sizes, weights, power)
        if value > best_value:
            best, best_value = weights, value
    return best


def _step_value(
    margin_jacobians: ndarray, lipschitz_jacobians: ndarray, sizes: Sequence[int], weights: ndarray, power: int
) -> float:
    alpha = signed_margin(margin_jacobians, sizes, weights)
    beta = lipschitz(lipschitz_jacobians, sizes, weights)
    return float(np.log(alpha) - power * np.log(beta)) if alpha > 0 and beta > 0 else -np.inf


def _bracket(jacobians: ndarray, sizes: Sequence[int], log_ratio: float) -> tuple[float, float]:
    """An interval of log(w_2 / w_1) around a certified ratio, at most one doubling longer than the certified band."""
    ends = []
    for direction in (-1, 1):
        step = 0.25
        while step < LOG_SPREAD / 4:
            if signed_margin(jacobians, sizes, np.exp([0.0, log_ratio + direction * step])) <= 0:
                break
            step *= 2
        ends.append(log_ratio + direction * step)
    return ends[0], ends[1]


def _scalar_search(
    margin_jacobians: ndarray,
    lipschitz_jacobians: ndarray,
    sizes: Sequence[int],
    power: int,
    reach: tuple[float, float],
) -> ndarray:
    def cost(log_ratio: float) -> float:
        weights = np.exp([-log_ratio / 2, log_ratio / 2])
        alpha = signed_margin(margin_jacobians, sizes, weights)
        # alpha itself outside the certified band: still unimodal, and always above any value inside
        if alpha <= 0:
            return 1e3 - alpha
        return power * np.log(lipschitz(lipschitz_jacobians, sizes, weights)) - np.log(alpha)

    found = minimize_scalar(cost, bounds=reach, method="bounded", options={"xatol": 1e-10})
    return np.exp([-found.x / 2, found.x / 2])


def _soft_search(
    margin_jacobians: ndarray, lipschitz_jacobians: ndarray, owner: ndarray, power: int, z: ndarray
) -> list[ndarray]:
    players = int(owner[-1]) + 1
    found = []
    for sharpness in (1e1, 1e2, 1e3, 1e4):

        def cost(z: ndarray, sharpness: float = sharpness) -> tuple[float, ndarray]:
            alpha, alpha_slope = _soft_margin(margin_jacobians, owner, players, z, sharpness)
            beta, beta_slope = _soft_lipschitz(lipschitz_jacobians, owner, players, z, sharpness)
            if alpha <= 0:  # outside: refuse, the line search steps back
                return 1e3, np.zeros(players)
            return power * np.log(beta) - np.log(alpha), power * beta_slope / beta - alpha_slope / alpha

        if cost(z)[0] >= 1e3:
            continue
        z = minimize(cost, z, jac=True, method="L-BFGS-B", options={"maxiter": 300, "gtol": 1e-10, "ftol": 1e-15}).x
        z = z - z.mean()
        found.append(np.exp(z))
    return found


def _soft_margin(
    jacobians: ndarray, owner: ndarray, players: int, z: ndarray, sharpness: float
) -> tuple[float, ndarray]:
    """Soft minimum over samples and eigenvalues of sym(e^{Z/2} J e^{-Z/2}), at most the true one, and its gradient."""
    scaled = rescale(jacobians, np.exp(z / 2)[owner])
    values, vectors = np.linalg.eigh((scaled + scaled.swapaxes(1, 2)) / 2)
    temperature = np.abs(values).max() / sharpness
    alpha = -temperature * logsumexp(-values / temperature)
    share = np.exp((alpha - values) / temperature)
    rows = np.einsum("pak,pk,pbk,pab->a", vectors, share, vectors, scaled, optimize=True)
    columns = np.einsum("pak,pk,pbk,pab->b", vectors, share, vectors, scaled, optimize=True)
    return float(alpha), np.bincount(owner, (rows - columns) / 2, players)


def _soft_lipschitz(
    jacobians: ndarray, owner: ndarray, players: int, z: ndarray, sharpness: float
) -> tuple[float, ndarray]:
    """Soft maximum over samples and singular values of e^{Z/2} J e^{-Z/2}, at least the true one, and its gradient."""
    scaled = rescale(jacobians, np.exp(z / 2)[owner])
    left, values, right = np.linalg.svd(scaled)
    temperature = values.max() / sharpness
    beta = temperature * logsumexp(values / temperature)
    share = np.exp((values - beta) / temperature)
    rows = np.einsum("pak,pk,pkb,pab->a", left, share, right, scaled, optimize=True)
    columns = np.einsum("pak,pk,pkb,pab->b", left, share, right, scaled, optimize=True)
    return float(beta), np.bincount(owner, (rows - columns) / 2, players)
