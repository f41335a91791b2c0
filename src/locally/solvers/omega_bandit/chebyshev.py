"""ChebCB: a contextual bandit that regresses every arm's cost on Chebyshev polynomials of a scalar context.

Costs of neighbouring contexts inform each other, so it needs fewer rounds than bins of contexts do. Arms are drawn by
inverse gap weighting of the predictions (Foster & Rakhlin, ICML 2020). Source: arXiv 2310.02246; constants
as in the authors' experiments.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, no_type_check

import numpy as np
from jaxtyping import Float
from numba import njit
from numpy import ndarray

from locally.checks import check_choice, check_count, check_finite, check_nonnegative, check_positive, check_shape
from locally.solvers.omega_bandit.bandit import (
    Choice,
    ContextInterval,
    GridBandit,
    Outside,
    RandomSource,
    Real,
    restored,
)


def inverse_gap_weights(predictions: Float[ndarray, " d"], eta: float) -> Float[ndarray, " d"]:
    """p_i = 1 / (d + eta (y_i - min y)) for all arms but the best one, which gets the rest.

    eta = 0 is uniform, eta -> infinity greedy; of several best arms the first gets the rest.

    >>> inverse_gap_weights(np.array([2.0, 1.0, 1.5]), eta=2.0).round(3)
    array([0.2 , 0.55, 0.25])
    """
    check_finite("predictions", predictions)
    check_nonnegative("eta", eta)
    return _inverse_gap_weights(np.asarray(predictions, np.float64), float(eta))


def box_least_squares(
    A: Float[ndarray, "rows m"], b: Float[ndarray, " rows"], bound: Float[ndarray, " m"]
) -> tuple[Float[ndarray, " m"], float]:
    """Minimise ||A x - b||^2 over |x_j| <= bound_j by active sets (Stark & Parker, 1995).

    Starts from the minimum-norm solution, so among many minimisers it tends to one near that. For a few unknowns:
    every step solves a least-squares problem in the free ones.

    Returns:
        (x, ||A x - b||^2).

    >>> x, squares = box_least_squares(np.eye(2), np.array([3.0, 0.5]), np.array([1.0, 1.0]))
    >>> x, squares
    (array([1. , 0.5]), 4.0)
    """
    check_shape("b", b, (A.shape[0],))
    check_shape("bound", bound, (A.shape[1],))
    for name, values in (("A", A), ("b", b), ("bound", bound)):
        check_finite(name, values)
    if (bound < 0).any():
        raise ValueError(f"bound must not be negative, got {bound.min()}")
    A, b, bound = (np.ascontiguousarray(v, np.float64) for v in (A, b, bound))
    x = _box_least_squares(A, b, bound, np.linalg.lstsq(A, b, rcond=None)[0])
    return x, float(((A @ x - b) ** 2).sum())


class ChebCB(GridBandit):
    """The best parameter for every context, for costs that vary smoothly with one scalar context.

    The predicted cost of arm i at context c is min_cost + s theta_i . (T_0(u), ..., T_{m-1}(u)) with m = degree + 1,
    u in [-1, 1] the place of c in `bounds`, and s the learner's scale.

    Args:
        grid: parameters to choose from, e.g. `np.linspace(1, 1.95, 20)` for omega.
        bounds: (low, high) of the contexts.
        degree: of the polynomials, at least 0.
        lipschitz: bound on the slope of the cost over the context. "auto" is the largest cost so far over the width of
            `bounds`.
        min_cost, rng: see `GridBandit`.
        outside: what to do with a context out of bounds: "clip" it to the nearer end, or "raise" ValueError.

    A round costs O(d m + m^3) whatever its number: each arm's history is kept as one triangular factor. When a new
    largest cost moves the scale all d arms are fitted again.

    Expected regret against the best arm for every context: O(T^(9/11)) with grid and degree growing with T.

    >>> bandit = ChebCB([1.0, 1.5, 1.9], bounds=(0.0, 1.0), degree=2, rng=0)
    >>> for t in range(300):
    ...     c = (t % 10) / 10
    ...     choice = bandit.ask(context=c)
    ...     bandit.tell(cost=10 + 40 * abs(choice.value - 1.9 + 0.9 * c), choice=choice)
    >>> [float(bandit.grid[bandit.distribution(context=c).argmax()]) for c in (0.0, 0.45, 1.0)]
    [1.9, 1.5, 1.0]
    """

    def __init__(
        self,
        grid: Sequence[float] | ndarray,
        bounds: tuple[Real, Real],
        *,
        degree: int = 5,
        lipschitz: float | Literal["auto"] = "auto",
        min_cost: float = 1.0,
        outside: Outside = "clip",
        rng: RandomSource = None,
    ) -> None:
        super().__init__(grid, min_cost=min_cost, rng=rng)
        check_count("degree", degree, at_least=0)
        if isinstance(lipschitz, str):
            check_choice("lipschitz", lipschitz, ("auto",))
        else:
            check_positive("lipschitz", lipschitz)
        self.interval = ContextInterval(bounds, outside)
        self.degree, self.lipschitz = degree, lipschitz
        d, m = self.grid.size, degree + 1
        self.theta = np.zeros((d, m))
        self.eta = 0.0
        self.scale = 0.0
        self.rounds = 0
        self._largest = 0.0
        # triangular factor of [features | excess costs] of each arm: all that least squares needs of its history
        self._factors = np.zeros((d, m + 1, m + 1))
        self._played = np.zeros(d, dtype=bool)
        # sums over rounds of prediction^2, prediction * cost and cost^2 make up the online square loss at any scale
        self._moments = (0.0, 0.0, 0.0)

    def predict(self, context: Real) -> Float[ndarray, " d"]:
        """Expected cost of every arm, in the units of the costs.

        Raises:
            ValueError: the context is not a number, or out of bounds where those are refused.
        """
        return self.min_cost + self.scale * (self.theta @ self._features(context))

    def distribution(self, context: Real | None = None) -> Float[ndarray, " d"]:
        return _inverse_gap_weights(self.theta @ self._features(context), self.eta)

    def _features(self, context: Real | None) -> Float[ndarray, " m"]:
        return _chebyshev(2 * self.interval.place(context) - 1, self.degree + 1)

    def _remember(self, context: Real | None, p: Float[ndarray, " d"], arm: int) -> list[float]:
        return [float(self.theta[arm] @ self._features(context))]

    def _learn(self, choice: Choice, memory: list[float], cost: float) -> None:
        m, width = self.degree + 1, self.interval.width
        self._largest = max(self._largest, cost)
        K = self._largest or 1.0  # nothing but zeros so far: any scale will do
        lipschitz = K / width if isinstance(self.lipschitz, str) else self.lipschitz
        N = 2 + 4 * width * lipschitz / K * (1 + math.log(m))
        changed, self.scale = self.scale != K * N, K * N
        # coefficients of Lipschitz functions decay like 1/j
        bound = np.empty(m)
        bound[0] = 1 / N
        bound[1:] = 2 * width * lipschitz / self.scale / np.arange(1, m)

        row = np.empty(m + 1)
        row[:m], row[m] = self._features(choice.context), cost - self.min_cost
        _add_row(self._factors[choice.arm], row)
        self._played[choice.arm] = True
        residual = 0.0
        refitted = np.flatnonzero(self._played).tolist() if changed else [choice.arm]
        for arm in refitted:
            self.theta[arm], squares, constrained = _fit(self._factors[arm], self.scale, bound)
            if constrained:
                residual = squares

        self.rounds += 1
        pp, pc, cc = self._moments
        pp, pc, cc = self._moments = pp + memory[0] ** 2, pc + memory[0] * cost, cc + cost**2
        online = pp - 2 * pc / self.scale + cc / self.scale**2
        # Jackson-type bound on how well degree m - 1 can do
        alpha = (math.pi + 2 / math.pi * math.log(2 * m + 1)) / (2 * self.scale * (m + 1)) * width * lipschitz
        # online predictions that changed scale on the way can beat the constrained fit, in which case their regret is 0
        regret = max(online - residual, 0.0) + 2 * alpha**2 * self.rounds
        self.eta = 2 * self.rounds * math.sqrt(self.grid.size * self.rounds / regret)

    def _settings(self) -> dict[str, Any]:
        bounds = [self.interval.low, self.interval.high]
        return {"bounds": bounds, "degree": self.degree, "lipschitz": self.lipschitz}

    def _save(self) -> dict[str, Any]:
        state: dict[str, Any] = {"settings": self._settings(), "eta": self.eta, "scale": self.scale}
        state |= {"rounds": self.rounds, "largest": self._largest, "moments": list(self._moments)}
        arrays = {"theta": self.theta, "factors": self._factors, "played": self._played}
        return state | {name: array.tolist() for name, array in arrays.items()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["settings"] != self._settings():
            raise ValueError(f"state must be of a learner with {self._settings()}, got {state['settings']}")
        theta = restored("theta", state["theta"], self.theta)
        factors = restored("factors", state["factors"], self._factors)
        played = restored("played", state["played"], self._played)
        eta, scale, largest = (float(state[name]) for name in ("eta", "scale", "largest"))
        rounds, (pp, pc, cc) = int(state["rounds"]), state["moments"]
        self._moments = float(pp), float(pc), float(cc)
        self.theta, self._factors, self._played = theta, factors, played
        self.eta, self.scale, self.rounds, self._largest = eta, scale, rounds, largest


@njit(cache=True, nogil=True)
@no_type_check
def _chebyshev(u, m):
    features = np.ones(m)
    if m > 1:
        features[1] = u
    for j in range(2, m):
        features[j] = 2 * u * features[j - 1] - features[j - 2]
    return features


@njit(cache=True, nogil=True)
@no_type_check
def _inverse_gap_weights(y, eta):
    best = np.argmin(y)
    p = 1 / (y.size + eta * (y - y[best]))
    p[best] = 0.0
    p[best] = 1 - p.sum()
    return p


@njit(cache=True, nogil=True)
@no_type_check
def _add_row(factor, row):
    """Rotate `row` into an upper triangular factor, in place: F^T F grows by row row^T. `row` is used up."""
    n = row.size
    for j in range(n):
        radius = np.hypot(factor[j, j], row[j])
        if radius == 0.0:
            continue
        cosine, sine = factor[j, j] / radius, row[j] / radius
        for k in range(j, n):
            above = factor[j, k]
            factor[j, k] = cosine * above + sine * row[k]
            row[k] = cosine * row[k] - sine * above


@njit(cache=True, nogil=True)
@no_type_check
def _fit(factor, scale, bound):
    """Minimum-norm least squares of excess cost / scale on the features, in the box if it does not lie there by itself.

    Returns (theta, residual sum of squares, whether the box mattered).
    """
    m = bound.size
    R = factor[:m, :m].copy()
    q = factor[:m, m] / scale
    pivots = np.abs(np.diag(R))
    if pivots.min() > 1e-6 * pivots.max():
        theta = q.copy()  # the history determines every coefficient: back substitution
        for j in range(m - 1, -1, -1):
            theta[j] = (theta[j] - R[j, j + 1 :] @ theta[j + 1 :]) / R[j, j]
    else:
        theta = np.linalg.lstsq(R, q)[0]
    constrained = np.any(np.abs(theta) > bound)
    if constrained:
        theta = _box_least_squares(R, q, bound, theta)
    misfit = R @ theta - q
    return theta, misfit @ misfit + (factor[m, m] / scale) ** 2, constrained


@njit(cache=True, nogil=True)
@no_type_check
def _box_least_squares(A, b, bound, start):
    m = bound.size
    x = start.copy()
    side = np.zeros(m)  # -1 at the lower bound, 1 at the upper, 0 free
    # settle: clip what leaves the box and solve again for the rest, until nothing more leaves
    while True:
        for j in range(m):
            if side[j] == 0 and abs(x[j]) >= bound[j]:
                side[j] = 1.0 if x[j] > 0 else -1.0
                x[j] = side[j] * bound[j]
        free = np.flatnonzero(side == 0)
        if free.size == 0:
            break
        z = _free_solution(A, b, x, side, free)
        inside = True
        for k in range(free.size):
            x[free[k]] = z[k]
            inside &= abs(z[k]) <= bound[free[k]]
        if inside:
            break
    # improve: free the bound whose multiplier has the wrong sign by most, walk to the new solution, stop at new bounds
    tolerance = 1e-14 * np.sqrt((A * A).sum() * (b * b).sum())
    for _ in range(20 * m):
        slope = A.T @ (A @ x - b)
        gain = slope * side
        j = np.argmax(gain)
        if gain[j] <= tolerance:
            break
        side[j] = 0.0
        while True:
            free = np.flatnonzero(side == 0)
            if free.size == 0:
                break
            z = _free_solution(A, b, x, side, free)
            step, blocking = 1.0, -1
            for k in range(free.size):
                i = free[k]
                if abs(z[k]) > bound[i]:
                    to_bound = (np.sign(z[k]) * bound[i] - x[i]) / (z[k] - x[i])
                    if to_bound < step:
                        step, blocking = to_bound, k
            for k in range(free.size):
                x[free[k]] += step * (z[k] - x[free[k]])
            if blocking < 0:
                break
            i = free[blocking]
            side[i] = np.sign(z[blocking])
            x[i] = side[i] * bound[i]
    return x


@njit(cache=True, nogil=True)
@no_type_check
def _free_solution(A, b, x, side, free):
    rest = b.copy()
    for j in range(x.size):
        if side[j] != 0:
            rest -= A[:, j] * x[j]
    return np.linalg.lstsq(np.ascontiguousarray(A[:, free]), rest)[0]
