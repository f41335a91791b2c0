"""Values and occupancies over a fixed horizon, by one sweep through the layers.

Layers h = 0, ..., H-1; everything after the last layer is worth nothing. Source: Puterman (1994), chapter 4.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_finite
from locally.control.validity import check_kernel


@dataclass(frozen=True)
class EpisodicSolution:
    """Optimal values: `value` from the start, `V[h, s]` (a row of zeros past the end), `Q[h, s, a]`, `policy[h, s]`."""

    value: float
    V: Float[ndarray, "H_and_1 S"]
    Q: Float[ndarray, "H S A"]
    policy: Int[ndarray, "H S"]


def solve_episodic(
    P: Float[ndarray, "H S A S"], R: Float[ndarray, "H S A"], start: Float[ndarray, " S"]
) -> EpisodicSolution:
    """The best policy for the sum of H rewards, by backward induction; ties go to the lowest action. O(H S^2 A).

    Args:
        P: P[h, s, a, s'] is the probability of s' at layer h + 1. The last layer's is not used.
        R: mean rewards, of any sign; pass negative losses to minimise.
        start: distribution of the first state.

    Raises:
        ValueError: P or start is no distribution, R holds NaN or infinity.

    >>> P, R = np.ones((2, 1, 2, 1)), np.array([[[0.0, 1.0]], [[0.5, 0.25]]])
    >>> found = solve_episodic(P, R, np.ones(1))
    >>> found.value, found.policy.ravel()
    (1.5, array([1, 0]))
    """
    check_kernel("P", P)
    check_kernel("start", start)
    check_finite("R", R)
    H, S, A = R.shape
    V, Q = np.zeros((H + 1, S)), np.empty((H, S, A))
    for h in reversed(range(H)):
        Q[h] = R[h] + P[h] @ V[h + 1]
        V[h] = Q[h].max(axis=-1)
    return EpisodicSolution(float(start @ V[0]), V, Q, Q.argmax(axis=-1))


def greedy_policy(Q: Float[ndarray, "*batch A"]) -> Float[ndarray, "*batch A"]:
    """Probabilities of the policy that takes the best action, the lowest among equals.

    >>> greedy_policy(np.array([[0.0, 1.0], [2.0, 2.0]]))
    array([[0., 1.], [1., 0.]])
    """
    return np.eye(Q.shape[-1])[Q.argmax(axis=-1)]


def evaluate_policy(
    P: Float[ndarray, "H S A S"], R: Float[ndarray, "*#batch H S A"], policy: Float[ndarray, "*#batch H S A"]
) -> tuple[Float[ndarray, "*batch H_and_1 S"], Float[ndarray, "*batch H S A"]]:
    """V[..., h, s] and Q[..., h, s, a] of stochastic policies, many at once along leading axes. O(H S^2 A) each.

    Args:
        P: as for `solve_episodic`.
        R: mean rewards; leading axes broadcast against the policies'.
        policy: policy[..., h, s, a], probabilities of actions.

    Raises:
        ValueError: P or policy is no distribution, R holds NaN or infinity.

    >>> V, Q = evaluate_policy(np.ones((1, 1, 2, 1)), np.array([[[0.0, 1.0]]]), np.full((1, 1, 2), 0.5))
    >>> float(V[0, 0])
    0.5
    """
    check_kernel("P", P)
    check_kernel("policy", policy)
    check_finite("R", R)
    batch = np.broadcast_shapes(R.shape[:-3], policy.shape[:-3])
    H, S, A = R.shape[-3:]
    V, Q = np.zeros((*batch, H + 1, S)), np.empty((*batch, H, S, A))
    for h in reversed(range(H)):
        following = V[..., h + 1, :] @ P[h].reshape(S * A, S).T
        Q[..., h, :, :] = R[..., h, :, :] + following.reshape(*batch, S, A)
        V[..., h, :] = (policy[..., h, :, :] * Q[..., h, :, :]).sum(axis=-1)
    return V, Q


def occupancy_measures(
    P: Float[ndarray, "H S A S"], policy: Float[ndarray, "*batch H S A"], start: Float[ndarray, " S"]
) -> Float[ndarray, "*batch H S A"]:
    """Probability that a policy is at (s, a) in layer h: sums to 1 over (s, a). O(H S^2 A) a policy.

    The value of the policy for rewards R is `(occupancy * R).sum((-3, -2, -1))`.

    Args:
        P, policy, start: as for `evaluate_policy` and `solve_episodic`.

    Raises:
        ValueError: an argument is no distribution.

    >>> occupancy_measures(np.ones((1, 1, 2, 1)), np.array([[[0.25, 0.75]]]), np.ones(1))
    array([[[0.25, 0.75]]])
    """
    check_kernel("P", P)
    check_kernel("policy", policy)
    check_kernel("start", start)
    *batch, H, S, A = policy.shape
    occupancy = np.empty(policy.shape)
    states = np.broadcast_to(start, (*batch, S))
    for h in range(H):
        occupancy[..., h, :, :] = states[..., None] * policy[..., h, :, :]
        states = occupancy[..., h, :, :].reshape(*batch, S * A) @ P[h].reshape(S * A, S)
    return occupancy
