"""Optimism over an ellipsoid: the largest gain that a hypothesis can claim while it fits the data.

A hypothesis is w = Q + J, with V(s) = min(max_a w(s, a) - J, span) and min V = 0. It may be off the regression
r^ + P^ V by xi with ||xi|| <= sqrt(beta) in the data's metric, so that w solves the optimality equation of P^ with
rewards r^ + xi. Source: arXiv 2404.12648, Algorithm 1; the clipped equation is that of Fruit et al. (ICML 2018).
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_choice, check_count, check_finite, check_nonnegative, check_shape
from locally.control.average_reward.kernels import active_system, eliminate, solve_equation
from locally.control.dynamic_programming import limiting_matrix

Planner = Literal["alternate", "enumerate"]
DAMPING = 0.7  # aperiodicity; signed regression kernels, which contract less, halve it
ROUNDS, SWEEPS = 400, 25  # of Newton steps with sweeps between them
ASCENTS = 50
LIMIT_ENUMERATION = 4096


@dataclass(frozen=True)
class Plan:
    """The hypothesis to follow: greedy policy, gain J, V = max_a Q (clipped, min 0) and w = Q + J.

    `converged` says whether the equation was solved to `tol`; `clipped`, whether the bound on the span was active.
    `bonus` is xi, what the hypothesis adds to the regression.
    """

    policy: Int[ndarray, " S"]
    gain: float
    V: Float[ndarray, " S"]
    w: Float[ndarray, "S A"]
    bonus: Float[ndarray, "S A"]
    converged: bool
    clipped: bool


@dataclass(frozen=True)
class _FixedPoint:
    """A solved clipped equation and dJ/dc, the weight of each (s, a)'s reward in the gain."""

    gain: float
    V: Float[ndarray, " S"]
    w: Float[ndarray, "S A"]
    policy: Int[ndarray, " S"]
    weights: Float[ndarray, "S A"]
    converged: bool
    clipped: bool


def optimistic_plan(
    P: Float[ndarray, "S A S"],
    r: Float[ndarray, "S A"],
    metric: Float[ndarray, "S A"] | Float[ndarray, "n n"],
    beta: float,
    *,
    span: float = np.inf,
    ceiling: float = np.inf,
    planner: Planner = "alternate",
    n_starts: int = 8,
    tol: float = 1e-9,
    rng: np.random.Generator | int | None = None,
) -> Plan:
    """Maximise the gain of (P, r + xi) over xi . metric^-1 xi <= beta.

    For a policy with occupancy mu the best xi is metric mu, scaled to the boundary, and the gain is
    mu . r + sqrt(beta mu . metric mu). "alternate" goes from policy to xi and back until the gain stops rising, from
    several starts: the gain is convex in xi, so that it never falls, but may stop at a local maximum. "enumerate" tries
    every policy, exact where rows sum to 1; what they lack goes to the least valuable state of beta = 0. It then solves
    the equation once.

    Args:
        P: estimated kernel. Rows may sum to less than 1: the rest goes to the state of least value. Entries of a
            regression on features may be negative.
        r: estimated rewards.
        metric: covariance of the regression, up to scale: 1 / (visits + lam) of each cell for tables,
            Phi Lambda^-1 Phi' over the S A cells for features.
        beta: squared radius, at least 0; 0 is certainty equivalence.
        span: bound on V.
        ceiling: w is capped at ceiling + max V; 1 where rewards are at most 1, which bounds the gain by 1.
        planner, n_starts: see above; enumeration takes at most 4096 policies.
        tol: on the width of the last step.
        rng: of the random starts.

    Raises:
        ValueError: beta or an option is out of range, there are too many policies to enumerate.

    Complexity: O(S^3 + S^2 A) an equation, a handful to 50 equations a start; with "enumerate" O(A^S S^3).

    >>> P = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    >>> visits = np.array([[100.0, 1.0], [100.0, 1.0]])
    >>> plan = optimistic_plan(P, np.array([[0.5, 0.0], [0.0, 0.4]]), 1 / visits, beta=0.25, rng=0)
    >>> round(plan.gain, 6), plan.policy
    (0.9, array([1, 1]))
    """
    check_shape("r", r, (None, None))
    S, A = r.shape
    check_shape("P", P, (S, A, S))
    check_finite("P", P)
    check_finite("r", r)
    check_finite("metric", metric)
    if metric.shape != r.shape:
        check_shape("metric", metric, (S * A, S * A))
    check_nonnegative("beta", beta)
    check_choice("planner", planner, ("alternate", "enumerate"))
    check_count("n_starts", n_starts)
    rng = np.random.default_rng(rng)
    equation = _Equation(
        np.ascontiguousarray(P, np.float64), np.asarray(r, np.float64), float(span), float(ceiling), tol
    )
    radius = np.sqrt(beta)

    def towards(mu: Float[ndarray, "S A"]) -> Float[ndarray, "S A"]:
        """The point of the ellipsoid that is farthest along mu."""
        image = metric * mu if metric.shape == mu.shape else (metric @ mu.ravel()).reshape(mu.shape)
        length = np.sqrt(max((mu * image).sum(), 0.0))
        return radius / length * image if length > 0 else np.zeros_like(mu)

    if beta == 0:
        return equation.plan(np.zeros((S, A)), equation.solve(r, None))
    if planner == "enumerate":
        bonus = towards(_best_occupancy(P, r, metric, radius, sink=int(equation.solve(r, None).V.argmin())))
        return equation.plan(bonus, equation.solve(r + bonus, None))

    best: tuple[float, Float[ndarray, "S A"], _FixedPoint] | None = None
    for start in range(n_starts):
        # the first start spreads the radius evenly over the cells, in their own scales
        cells = metric if metric.shape == r.shape else np.diag(metric).reshape(S, A)
        bonus = (
            radius * np.sqrt(np.maximum(cells, 0) / (S * A)) if start == 0 else towards(rng.exponential(size=(S, A)))
        )
        bonus, point = _ascend(equation, bonus, towards, best[2].V if best else None)
        if best is None or (point.converged, point.gain) > (best[2].converged, best[0]):
            best = point.gain, bonus, point
    assert best is not None
    return equation.plan(best[1], best[2])


def _ascend(equation, bonus, towards, V):
    point = equation.solve(equation.r + bonus, V)
    for _ in range(ASCENTS):
        candidate = towards(point.weights)
        following = equation.solve(equation.r + candidate, point.V)
        if not following.gain > point.gain + 1e-10:
            if following.gain >= point.gain:
                return candidate, following
            break
        bonus, point = candidate, following
    return bonus, point


@dataclass(frozen=True)
class _Equation:
    """V + J = min(max_a w, J + span) with w = c + P V and both capped: by sweeps, with Newton steps in between."""

    P: Float[ndarray, "S A S"]
    r: Float[ndarray, "S A"]
    span: float
    ceiling: float
    tol: float

    def solve(self, c: Float[ndarray, "S A"], V: Float[ndarray, " S"] | None) -> _FixedPoint:
        V = np.zeros(len(c)) if V is None else V.copy()
        damping = DAMPING / 2 if self.P.min() < 0 else DAMPING
        arguments = self.P, c, self.span, self.ceiling, V
        gain, width = solve_equation(*arguments, self.tol, damping, ROUNDS, SWEEPS)
        w = c + self.P @ V
        top = np.minimum(w, self.ceiling + V.max()).max(axis=1)
        clipped = bool((top > top.min() + self.span + self.tol).any())
        weights, policy = self._weights(c, V)
        return _FixedPoint(gain, V, w, policy, weights, bool(width < 10 * self.tol), clipped)

    def _weights(
        self, c: Float[ndarray, "S A"], V: Float[ndarray, " S"]
    ) -> tuple[Float[ndarray, "S A"], Int[ndarray, " S"]]:
        """dJ/dc, by the adjoint of the equation as linear as V makes it; and the greedy actions."""
        M, _, policy, free = active_system(self.P, c, self.span, self.ceiling, V)
        adjoint = np.eye(len(M))[-1]
        transposed = np.ascontiguousarray(M.T)
        if not eliminate(transposed, adjoint):  # several recurrent classes
            adjoint = np.linalg.lstsq(M.T, np.eye(len(M))[-1])[0]
        weights = np.zeros_like(c)
        weights[np.flatnonzero(free), policy[free]] = adjoint[:-1][free]
        return weights, policy

    def plan(self, bonus: Float[ndarray, "S A"], point: _FixedPoint) -> Plan:
        return Plan(point.policy, point.gain, point.V, point.w, bonus, point.converged, point.clipped)


def _best_occupancy(
    P: Float[ndarray, "S A S"], r: Float[ndarray, "S A"], metric: Float[ndarray, "..."], radius: float, sink: int
) -> Float[ndarray, "S A"]:
    """Over all deterministic policies and their recurrent classes; the mass that P lacks goes to `sink`."""
    S, A = r.shape
    if A**S > LIMIT_ENUMERATION:
        raise ValueError(
            f"planner 'enumerate' takes at most {LIMIT_ENUMERATION} policies, got {A}^{S}: use 'alternate'"
        )
    each = np.arange(S)
    best, best_gain = np.zeros_like(r), -np.inf
    for policy in product(range(A), repeat=S):
        chain = P[each, policy]
        chain = np.maximum(chain, 0)
        lost = np.maximum(1 - chain.sum(axis=1), 0)
        chain[:, sink] += lost
        for share in np.unique(limiting_matrix(chain / chain.sum(axis=1, keepdims=True)).round(15), axis=0):
            mu = np.zeros_like(r)
            mu[each, policy] = share
            image = metric * mu if metric.shape == mu.shape else (metric @ mu.ravel()).reshape(mu.shape)
            gain = (mu * r).sum() + radius * np.sqrt((mu * image).sum())
            if gain > best_gain:
                best, best_gain = mu, gain
    return best
