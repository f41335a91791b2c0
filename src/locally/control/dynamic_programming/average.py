"""Long-run average reward: gain, bias and span of policies and of the best policy.

Source: Puterman, Markov Decision Processes (1994), sections 8.2 (evaluation), 8.5 (value iteration), 8.8 (linear
programme) and 9.2 (multichain policy iteration).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import linprog
from scipy.sparse.csgraph import connected_components

from locally.checks import check_choice, check_count, check_finite, check_positive
from locally.control.validity import check_kernel

Method = Literal["pi", "rvi", "lp"]
ROUGH_SWEEPS = 500
APERIODICITY = 0.5  # weight of the step in value iteration; below 1, or periodic policies would make it oscillate


class Status(StrEnum):
    """How a solve of an average-reward process ended; set by the solver, read from `AverageRewardSolution.status`."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    STOPPED = "stopped by the callback"
    GAIN_VARIES = "the best gain depends on the start: the process is not weakly communicating"


@dataclass(frozen=True)
class PolicyGain:
    """Of one policy, from each start: gain g = P* r, and bias h with g + h = r + P h and P* h = 0."""

    gain: Float[ndarray, " S"]
    bias: Float[ndarray, " S"]
    limiting: Float[ndarray, "S S"]  # P*, long-run share of time in s' from s


@dataclass(frozen=True)
class AverageRewardSolution:
    """gain + q(s, a) = r(s, a) + P(s, a) bias, bias = max_a q, with min(bias) = 0; policy greedy in q.

    `span` is max(bias) - min(bias); `residual` is the largest violation of the optimality equation.
    """

    gain: float
    bias: Float[ndarray, " S"]
    q: Float[ndarray, "S A"]
    policy: Int[ndarray, " S"]
    span: float
    n_iter: int
    residual: float
    status: Status

    @property
    def success(self) -> bool:
        """Whether the status is CONVERGED."""
        return self.status is Status.CONVERGED


def solve_average_reward(
    P: Float[ndarray, "S A S"],
    R: Float[ndarray, "S A"],
    *,
    method: Method = "pi",
    tol: float = 1e-10,
    max_iter: int = 100_000,
    callback: Callable[[int, float], bool | None] | None = None,
) -> AverageRewardSolution:
    """Gain, bias and policy of a weakly communicating process.

    Args:
        P: P[s, a, s'], transition probabilities.
        R: mean rewards, any finite numbers.
        method: "pi" is Howard's policy iteration for many chains, exact up to rounding, O(S^3 + S^2 A) a round and a
            handful of rounds. "rvi" is relative value iteration, O(S^2 A) a sweep, as many sweeps as mixing takes. "lp"
            finds the gain by HiGHS from the occupancies' linear programme and the bias from its policy.
        tol: for "rvi" the span of the last step, which bounds the error of the gain; for the others the smallest
            improvement that counts.
        max_iter: rounds or sweeps, at least 1.
        callback: called with (rounds, residual); True ends the iteration early, with STOPPED unless it had converged.

    Raises:
        ValueError: P is no kernel, R holds NaN or infinity, an option is out of range.

    >>> P = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    >>> found = solve_average_reward(P, np.array([[0.2, 0.0], [0.0, 1.0]]))
    >>> found.gain, found.bias, found.policy
    (1.0, array([0., 1.]), array([1, 1]))
    """
    check_kernel("P", P)
    check_finite("R", R)
    check_choice("method", method, ("pi", "rvi", "lp"))
    check_positive("tol", tol)
    check_count("max_iter", max_iter)
    if method == "rvi":
        return _value_iteration(P, R, tol, max_iter, callback)
    # from far off, policy iteration meets policies whose bias is beyond rounding; a few sweeps bring it near
    rough = _value_iteration(P, R, 1e-6, ROUGH_SWEEPS, None).policy
    policy = rough if method == "pi" else _occupancy_policy(P, R, rough)
    return _policy_iteration(P, R, policy, tol, max_iter, callback)


def evaluate_gain(
    P: Float[ndarray, "S A S"], R: Float[ndarray, "S A"], policy: Int[ndarray, " S"] | Float[ndarray, "S A"]
) -> PolicyGain:
    """Gain and bias of a deterministic policy (actions) or of a stochastic one (probabilities). O(S^3).

    Raises:
        ValueError: P or policy is no distribution, an action does not exist, R holds NaN or infinity.

    >>> P = np.array([[[0.0, 1.0]], [[1.0, 0.0]]])
    >>> evaluate_gain(P, np.array([[1.0], [0.0]]), np.array([0, 0])).gain
    array([0.5, 0.5])
    """
    check_kernel("P", P)
    check_finite("R", R)
    if policy.ndim == 1:
        if policy.min() < 0 or policy.max() >= R.shape[1]:
            raise ValueError(f"policy must hold actions 0, ..., {R.shape[1] - 1}, got {policy.min()} to {policy.max()}")
        each = np.arange(len(policy))
        return _gain_and_bias(P[each, policy], R[each, policy])
    check_kernel("policy", policy)
    return _gain_and_bias(np.einsum("sa,sat->st", policy, P), (policy * R).sum(axis=1))


def limiting_matrix(P: Float[ndarray, "S S"]) -> Float[ndarray, "S S"]:
    """P* = lim (I + P + ... + P^(n-1)) / n of any chain: several recurrent classes and periods are fine. O(S^3).

    Raises:
        ValueError: P is no kernel.

    >>> limiting_matrix(np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]))[2]
    array([0.5, 0.5, 0. ])
    """
    check_kernel("P", P)
    n_parts, label = connected_components(P > 0, directed=True, connection="strong")
    leaves = np.zeros(n_parts, bool)
    source, target = np.nonzero(P > 0)
    leaves[label[source[label[source] != label[target]]]] = True
    transient = leaves[label]
    limit = np.zeros_like(P)
    recurrent = np.flatnonzero(~leaves)
    for c in recurrent:
        (inside,) = np.nonzero(label == c)
        w = _stationary(P[np.ix_(inside, inside)])
        if len(recurrent) == 1:
            limit[:, inside] = w  # reached from everywhere, however long it takes
            break
        limit[np.ix_(inside, inside)] = w
        if transient.any():
            out = P[np.ix_(transient, transient)]
            into = P[np.ix_(transient, inside)].sum(axis=1)
            reached = np.linalg.solve(np.eye(len(out)) - out, into)
            limit[np.ix_(np.flatnonzero(transient), inside)] = reached[:, None] * w
    return limit


def _stationary(P: Float[ndarray, "n n"]) -> Float[ndarray, " n"]:
    """Of an irreducible chain: w (I - P) = 0 and w 1 = 1, of which w (I - P + 1 1') = 1' is the regular sum."""
    w = np.linalg.solve((np.eye(len(P)) - P + 1).T, np.ones(len(P)))
    w = np.maximum(w, 0)
    return w / w.sum()


def _gain_and_bias(P: Float[ndarray, "S S"], r: Float[ndarray, " S"]) -> PolicyGain:
    limit = limiting_matrix(P)
    gain = limit @ r
    bias = np.linalg.solve(np.eye(len(P)) - P + limit, r - gain)  # Puterman (1994), Theorem A.7
    return PolicyGain(gain, bias, limit)


def _policy_iteration(
    P: Float[ndarray, "S A S"],
    R: Float[ndarray, "S A"],
    policy: Int[ndarray, " S"],
    tol: float,
    max_iter: int,
    callback: Callable[[int, float], bool | None] | None,
) -> AverageRewardSolution:
    """First raise the gain; only where no action does, the bias, and only among actions that keep the gain."""
    each = np.arange(len(R))
    for n in range(1, max_iter + 1):
        of = _gain_and_bias(P[each, policy], R[each, policy])
        reached = P @ of.gain
        slack = tol * max(1.0, np.abs(of.gain).max())
        better = reached.max(axis=1) > reached[each, policy] + slack
        if better.any():
            improved = np.where(better, reached.argmax(axis=1), policy)
        else:
            q = np.where(reached >= reached.max(axis=1, keepdims=True) - slack, R + P @ of.bias, -np.inf)
            slack = tol * max(1.0, np.abs(of.bias).max())
            improved = np.where(q.max(axis=1) > q[each, policy] + slack, q.argmax(axis=1), policy)
        found = _solution(P, R, of.gain, of.bias, n, Status.CONVERGED)
        stop = callback is not None and callback(n, found.residual)
        if (improved == policy).all():
            varies = np.ptp(of.gain) > 1e3 * tol * max(1.0, np.abs(of.gain).max())
            return _solution(P, R, of.gain, of.bias, n, Status.GAIN_VARIES) if varies else found
        policy = improved
        if stop:
            return _solution(P, R, of.gain, of.bias, n, Status.STOPPED)
    return _solution(P, R, of.gain, of.bias, n, Status.ITERATION_LIMIT)


def _value_iteration(
    P: Float[ndarray, "S A S"],
    R: Float[ndarray, "S A"],
    tol: float,
    max_iter: int,
    callback: Callable[[int, float], bool | None] | None,
) -> AverageRewardSolution:
    V = np.zeros(len(R))
    status = Status.ITERATION_LIMIT
    for n in range(1, max_iter + 1):
        step = (R + P @ V).max(axis=1) - V
        V += APERIODICITY * step
        V -= V.min()
        width = np.ptp(step)
        if width < tol:
            status = Status.CONVERGED
            break
        if callback is not None and callback(n, width):
            status = Status.STOPPED
            break
    gain = np.full(len(R), (step.max() + step.min()) / 2)
    return _solution(P, R, gain, V, n, status)


def _solution(
    P: Float[ndarray, "S A S"],
    R: Float[ndarray, "S A"],
    gain: Float[ndarray, " S"],
    bias: Float[ndarray, " S"],
    n_iter: int,
    status: Status,
) -> AverageRewardSolution:
    best = float(gain.max())
    bias = bias - bias.min()
    q = R + P @ bias - best
    residual = float(np.abs(q.max(axis=1) - bias).max())
    return AverageRewardSolution(best, bias, q, q.argmax(axis=1), float(np.ptp(bias)), n_iter, residual, status)


def _occupancy_policy(
    P: Float[ndarray, "S A S"], R: Float[ndarray, "S A"], elsewhere: Int[ndarray, " S"]
) -> Int[ndarray, " S"]:
    """Maximise x.R over stationary occupancies x; states that x does not visit do as `elsewhere` says."""
    S, A = R.shape
    balance = np.repeat(np.eye(S), A, axis=1) - P.reshape(S * A, S).T  # outflow of s' minus inflow
    A_eq = np.vstack([balance, np.ones(S * A)])
    b_eq = np.append(np.zeros(S), 1.0)
    found = linprog(-R.ravel(), A_eq=A_eq, b_eq=b_eq, bounds=(0, None), method="highs")
    x = found.x.reshape(S, A)
    return np.where(x.sum(axis=1) > 1e-12, x.argmax(axis=1), elsewhere)
