"""Policy classes to choose from: every answer of the learner is relative to the best policy in such a list."""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from locally.checks import check_count, check_positive, check_shape
from locally.control.environments import EpisodicMDP
from locally.control.fine_tuning.estimation import Moments
from locally.control.fine_tuning.offline import OfflineDataset
from locally.control.validity import check_unit_ball

LARGEST_CLASS = 1_000_000


def deterministic_policies(where: Bool[ndarray, "H S"] | tuple[int, int], n_actions: int) -> Float[ndarray, "n H S A"]:
    """All deterministic policies that differ at the states `where`; elsewhere they take action 0.

    Args:
        where: mask of the (layer, state) pairs that can be reached, or (horizon, n_states) for all of them.
        n_actions: A; there are A^k policies for k pairs. O(n H S A) memory.

    Raises:
        ValueError: more than a million policies, which no enumeration serves.

    >>> deterministic_policies((1, 2), 3).shape
    (9, 1, 2, 3)
    """
    check_count("n_actions", n_actions)
    mask = np.ones(where, dtype=bool) if isinstance(where, tuple) else where
    free = int(mask.sum())
    if n_actions**free > LARGEST_CLASS:
        raise ValueError(f"{n_actions}^{free} policies cannot be enumerated: give a smaller class, or a softmax_cover")
    n = n_actions**free
    actions = np.zeros((n, *mask.shape), np.int64)
    actions[:, mask] = np.stack(np.unravel_index(np.arange(n), (n_actions,) * free), axis=-1) if free else 0
    return np.eye(n_actions)[actions]


def reachable(mdp: EpisodicMDP) -> Bool[ndarray, "H S"]:
    """Which states some policy can be in at each layer. O(H S^2 A)."""
    mask = np.zeros((mdp.horizon, mdp.n_states), dtype=bool)
    mask[0] = mdp.start > 0
    for h in range(mdp.horizon - 1):
        mask[h + 1] = (mdp.P[h, mask[h]] > 0).any(axis=(0, 1))
    return mask


def softmax_cover(
    features: Float[ndarray, "H S A d"], n: int = 2000, *, scale: float | int = 10.0, rng: np.random.Generator | int
) -> Float[ndarray, "n H S A"]:
    """Random members of the linear softmax class, pi_h(a | s) proportional to exp(scale <phi_h(s, a), w_h>).

    w_h is uniform on the unit sphere, anew for each layer and policy. Every deterministic policy that is greedy for a
    linear function is a limit of the class as `scale` grows. O(n H S A d).

    Raises:
        TypeError, ValueError: features leave the unit ball, or n or scale is out of range.

    >>> softmax_cover(np.eye(2).reshape(1, 1, 2, 2), 3, rng=0).sum(axis=-1).ravel().round(12)
    array([1., 1., 1.])
    """
    check_unit_ball("features", features)
    check_count("n", n)
    check_positive("scale", scale)
    rng = np.random.default_rng(rng)
    H, _, _, d = features.shape
    w = rng.standard_normal((n, H, d))
    w /= np.linalg.norm(w, axis=-1, keepdims=True)
    scores = scale * np.einsum("hsad,nhd->nhsa", features, w, optimize=True)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def bootstrap_policies(
    features: Float[ndarray, "H S A d"],
    offline: OfflineDataset,
    n: int = 50,
    *,
    ridge: float | int = 1.0,
    rng: np.random.Generator | int,
) -> Float[ndarray, "n H S A"]:
    """Greedy policies of least-squares value iteration on bootstrap resamples of a log: good guesses for a class.

    O(n (rows + H S A d^2 + H d^3)).

    Raises:
        TypeError, ValueError: the log is empty or of other sizes, or an argument is out of range.
    """
    check_unit_ball("features", features)
    check_shape("features", features, (offline.horizon, offline.n_states, offline.n_actions, None))
    check_count("n", n)
    check_positive("ridge", ridge)
    if len(offline) == 0:
        raise ValueError("offline must hold at least one transition")
    rng = np.random.default_rng(rng)
    H, S, A, d = features.shape
    policies = np.zeros((n, H, S, A))
    for i in range(n):
        moments = Moments.zeros(H, S, d)
        moments.add(features, *offline.counts(rng.integers(len(offline), size=len(offline))))
        fit = moments.fit(ridge)
        V = np.zeros(S)
        for h in reversed(range(H)):
            Q = features[h] @ (fit.theta[h] + fit.transition[h].T @ V)
            policies[i, h] = np.eye(A)[Q.argmax(axis=-1)]
            V = np.clip(Q.max(axis=-1), 0, H - h)
    return policies


def average_features(
    features: Float[ndarray, "H S A d"], policies: Float[ndarray, "n H S A"]
) -> Float[ndarray, "H n S d"]:
    """phi_(pi,h)(s), the expected feature of each policy in each state. O(n H S A d)."""
    return np.ascontiguousarray(np.einsum("nhsa,hsad->hnsd", policies, features, optimize=True))
