"""Exact optimal weights for the small-gain margin, the small-gain test itself, and timescale bands.

With the Metzler matrix B = L - diag(mu) the best margin over all weights is -s(B), s the spectral abscissa, attained at
w_i = u_i / v_i for the left and right Perron vectors u, v of B: there sqrt(u v) is both a left and a right eigenvector
of D^{1/2} B D^{-1/2}, hence an eigenvector of its symmetric part, and a positive one. So a certificate exists if and
only if rho(diag(1/mu) L) < 1. Extends the two-player closed form of arXiv 2512.06791 to N players.
"""

from dataclasses import dataclass
from graphlib import TopologicalSorter

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from locally.checks import check_between, check_count
from locally.equilibrium.small_gain.margins import (
    Coupling,
    check_coupling,
    check_weights,
    margin,
    off_diagonal,
)

LOG_SPREAD = 600.0  # weights whose logarithms differ by more leave the range of doubles


@dataclass(frozen=True)
class OptimalWeights:
    """Weights, the margin they reach, and what no weights can exceed.

    `supremum` is attained unless players depend on each other one way only (a reducible coupling matrix): then the
    margin approaches it as the timescales separate, and the weights stop `slack` short of it.
    """

    weights: Float[ndarray, " players"]
    margin: float
    supremum: float

    @property
    def feasible(self) -> bool:
        """Whether the margin is positive."""
        return self.margin > 0


@dataclass(frozen=True)
class PerronPair:
    """Spectral abscissa of an irreducible Metzler matrix with its Perron vectors, enclosed: low <= abscissa <= high."""

    abscissa: float
    low: float
    high: float
    left: Float[ndarray, " n"]
    right: Float[ndarray, " n"]


def optimal_weights(
    mu: Float[ndarray, " players"], coupling: Coupling, *, slack: float = 1e-3, tol: float = 1e-12
) -> OptimalWeights:
    """Weights that maximise the small-gain margin, geometric mean 1.

    Args:
        mu: curvature bounds, any sign.
        coupling: L_ij >= 0, dense or SciPy sparse; the diagonal is ignored.
        slack: fraction of the supremum that may be given up where it is only approached, in (0, 1).
        tol: relative width of the Collatz-Wielandt enclosure of the Perron root at which the iteration stops.

    Returns:
        The weights also where no weights certify (then the margin is not positive). Sparse: O(nonzeros) a power step
        plus one sparse factorisation if the spectral gap is too small for power steps. Dense: a few LU factorisations.

    >>> found = optimal_weights(np.array([1.0, 1.0]), np.array([[0.0, 10.0], [0.05, 0.0]]))
    >>> float(round(found.weights[1] / found.weights[0], 6)), round(found.margin, 6)
    (200.0, 0.292893)
    """
    check_coupling(mu, coupling)
    check_between("slack", slack, 1e-12, 1 - 1e-12)
    check_between("tol", tol, 1e-15, 1e-2)
    coupling = off_diagonal(coupling)
    graph = coupling if isinstance(coupling, sp.sparray) else sp.csr_array(coupling)
    n_components, labels = connected_components(graph, directed=True, connection="strong")
    log_weights = np.zeros(len(mu))
    supremum = np.inf
    for members in _groups(labels, n_components):
        if len(members) == 1:
            supremum = min(supremum, float(mu[members[0]]))
            continue
        inside = coupling[members][:, members]
        pair = perron_pair(inside, mu[members], tol=tol)
        supremum = min(supremum, -pair.low)
        z = np.log(pair.left) - np.log(pair.right)
        log_weights[members] = z - z.mean()
    if n_components == 1:
        weights = _exponential(log_weights)
        return OptimalWeights(weights, margin(mu, coupling, weights), supremum)
    return _separate_timescales(mu, coupling, log_weights, labels, supremum, slack)


def balanced_weights(coupling: Coupling) -> Float[ndarray, " players"]:
    """Weights that make the scaled coupling as symmetric as its Perron vectors allow; w_1/w_2 = L_21/L_12 for two.

    Optimal for the margin where all curvatures are equal.
    """
    return optimal_weights(np.zeros(coupling.shape[0]), coupling).weights


def small_gain(mu: Float[ndarray, " players"], coupling: Coupling) -> float:
    """rho(diag(1/mu) L): below 1 if and only if some weights certify; infinite where a curvature is not positive.

    >>> round(small_gain(np.array([1.0, 1.0]), np.array([[0.0, 10.0], [0.05, 0.0]])), 6)
    0.707107
    """
    check_coupling(mu, coupling)
    if (mu <= 0).any():
        return np.inf
    coupling = off_diagonal(coupling)
    gain = (
        sp.csr_array(sp.diags_array(1 / mu) @ coupling) if isinstance(coupling, sp.sparray) else coupling / mu[:, None]
    )
    return -optimal_weights(np.zeros(len(mu)), gain).supremum + 0.0


def timescale_band(
    mu: Float[ndarray, " players"],
    coupling: Coupling,
    i: int = 0,
    j: int = 1,
    *,
    at_least: float = 0.0,
    weights: Float[ndarray, " players"] | None = None,
) -> tuple[float, float] | None:
    """Interval of w_j / w_i on which the margin is at least `at_least`; None where it is empty.

    Two players have a closed form. For more, the other weights stay where `weights` (default: the optimal ones) puts
    them relative to w_i; the margin is concave in log w, so bisection finds both ends. Ends are 0 or infinity where
    player j's weight meets no coupling on that side.

    >>> low, high = timescale_band(np.array([1.0, 1.0]), np.array([[0.0, 10.0], [0.05, 0.0]]))
    >>> round(low, 4), round(high, 4)
    (34.3146, 1165.6854)
    """
    check_coupling(mu, coupling)
    players = len(mu)
    for name, player in (("i", i), ("j", j)):
        check_count(name, player, at_least=0)
        if player >= players:
            raise ValueError(f"{name} must be below the number of players, {players}, got {player}")
    if i == j:
        raise ValueError(f"i and j must differ, got {i} twice")
    coupling = off_diagonal(coupling)
    if players == 2:
        return _two_player_band(mu[i], mu[j], float(coupling[i, j]), float(coupling[j, i]), at_least)
    if weights is None:
        weights = optimal_weights(mu, coupling).weights
    check_weights(weights, players)
    return _band_by_bisection(mu, coupling, i, j, at_least, np.log(weights))


def perron_pair(coupling: Coupling, mu: Float[ndarray, " n"], *, tol: float = 1e-12) -> PerronPair:
    """Perron root and vectors of B = coupling - diag(mu) for an irreducible coupling of zero diagonal."""
    left, _, _ = _perron_vector(coupling.T, mu, tol)
    right, low, high = _perron_vector(coupling, mu, tol)
    return PerronPair((low + high) / 2, low, high, left, right)


def _perron_vector(coupling: Coupling, mu: ndarray, tol: float) -> tuple[ndarray, float, float]:
    x = np.ones(len(mu))
    if isinstance(coupling, sp.sparray):
        coupling = sp.csr_array(coupling)
        x, low, high, done = _power_iteration(coupling, mu, x, tol)
        if done:
            return x, low, high
    return _noda_iteration(coupling, mu, x, tol)


def _power_iteration(
    coupling: sp.csr_array, mu: ndarray, x: ndarray, tol: float, max_steps: int = 500
) -> tuple[ndarray, float, float, bool]:
    # the shift makes the matrix non-negative and, by its positive diagonal, primitive
    shift = mu.max() + coupling.sum(axis=1).mean() / 2
    diagonal = shift - mu
    for _ in range(max_steps):
        y = coupling @ x + diagonal * x
        ratios = y / x
        low, high = ratios.min() - shift, ratios.max() - shift
        if high - low <= tol * max(abs(shift), abs(high)):
            return x, float(low), float(high), True
        x = y / y.max()
    return x, float(low), float(high), False


def _noda_iteration(
    coupling: Coupling, mu: ndarray, x: ndarray, tol: float, max_steps: int = 100
) -> tuple[ndarray, float, float]:
    """Inverse iteration shifted by the upper Collatz-Wielandt bound: quadratic, and the vector stays positive."""
    sparse = isinstance(coupling, sp.sparray)
    scale = np.abs(mu).max() + abs(coupling).max()
    best = (np.inf, x, -np.inf, np.inf)
    for _ in range(max_steps):
        ratios = (coupling @ x) / x - mu
        low, high = float(ratios.min()), float(ratios.max())
        if high - low >= best[0]:  # rounding has taken over
            break
        best = (high - low, x, low, high)
        if high - low <= tol * scale:
            break
        diagonal = high + mu
        try:
            if sparse:
                y = splu(sp.csc_array(sp.diags_array(diagonal) - coupling)).solve(x)
            else:
                y = np.linalg.solve(np.diag(diagonal) - coupling, x)
        except (RuntimeError, np.linalg.LinAlgError):  # the shift is the root itself
            break
        y = np.abs(y)
        if not np.isfinite(y).all() or y.min() == 0:
            break
        x = y / y.max()
    return best[1], best[2], best[3]


def _separate_timescales(
    mu: ndarray, coupling: Coupling, log_weights: ndarray, labels: ndarray, supremum: float, slack: float
) -> OptimalWeights:
    """Divide the weights of each level of the dependency order by a factor until the one-way couplings cost little.

    A player that depends on others gets the smaller weight, so its coupling enters as sqrt(small): the margin grows
    monotonically with the factor towards the worst component's own margin.
    """
    levels = _dependency_levels(coupling, labels)
    # one side of the mean is what a factor of exp(t) a level adds to the spread of the logarithms
    reach = LOG_SPREAD / max(levels.max(), 1)

    def at(log_factor: float) -> tuple[ndarray, float]:
        z = log_weights - log_factor * levels
        weights = _exponential(z - z.mean())
        return weights, margin(mu, coupling, weights)

    size = abs(supremum) if supremum else float(np.abs(mu).max())
    goal = supremum - slack * size
    low, high = 0.0, 1.0
    weights, reached = at(0.0)
    if reached >= goal:
        return OptimalWeights(weights, reached, supremum)
    while at(high)[1] < goal and high < reach:
        low, high = high, min(2 * high, reach)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[1] >= goal else (middle, high)
    weights, reached = at(high)
    return OptimalWeights(weights, reached, supremum)


def _dependency_levels(coupling: Coupling, labels: ndarray) -> Int[ndarray, " players"]:
    """Longest chain of components that each player's component depends on."""
    rows, columns = coupling.nonzero()
    across = labels[rows] != labels[columns]
    depends_on: dict[int, set[int]] = {int(label): set() for label in np.unique(labels)}
    for a, b in zip(labels[rows[across]].tolist(), labels[columns[across]].tolist(), strict=True):
        depends_on[a].add(b)
    level: dict[int, int] = {}
    for label in TopologicalSorter(depends_on).static_order():
        level[label] = 1 + max((level[other] for other in depends_on[label]), default=-1)
    return np.array([level[int(label)] for label in labels])


def _two_player_band(mu_i: float, mu_j: float, L_ij: float, L_ji: float, at_least: float) -> tuple[float, float] | None:
    if min(mu_i, mu_j) <= at_least:
        return None
    product = (mu_i - at_least) * (mu_j - at_least)
    gap = product - L_ij * L_ji
    if gap < 0:
        return None
    # roots of L_ji r - 2 sqrt(product) sqrt(r) + L_ij <= 0 in sqrt(r), in the form that survives L_ij = 0 or L_ji = 0
    half = np.sqrt(product) + np.sqrt(gap)
    return float((L_ij / half) ** 2), float((half / L_ji) ** 2) if L_ji > 0 else np.inf


def _band_by_bisection(
    mu: ndarray, coupling: Coupling, i: int, j: int, at_least: float, log_weights: ndarray
) -> tuple[float, float] | None:
    def clears(log_ratio: float) -> bool:
        z = log_weights.copy()
        z[j] = z[i] + log_ratio
        return margin(mu, coupling, _exponential(z - z.mean())) >= at_least

    start = float(log_weights[j] - log_weights[i])
    if not clears(start):
        return None
    ends = []
    for direction, couplings in ((-1, coupling[:, [j]]), (1, coupling[[j], :])):
        if couplings.max() == 0:  # nothing grows on this side
            ends.append(0.0 if direction < 0 else np.inf)
            continue
        step = 1.0
        while clears(start + direction * step) and step < LOG_SPREAD:
            step *= 2
        inside, outside = 0.0, step
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if clears(start + direction * middle) else (inside, middle)
        ends.append(float(np.exp(start + direction * inside)))
    return ends[0], ends[1]


def _groups(labels: ndarray, count: int) -> list[ndarray]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=count))[:-1])


def _exponential(log_weights: ndarray) -> ndarray:
    return np.exp(np.clip(log_weights, -LOG_SPREAD, LOG_SPREAD))
