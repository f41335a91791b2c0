"""Episodic processes: random linear ones, the combination lock, and the one whose offline data miss an arm."""

import numpy as np

from locally.checks import check_between, check_count, check_positive
from locally.control.environments.processes import EpisodicMDP, one_hot_features


def random_episodic_linear_mdp(
    horizon: int = 3,
    n_states: int = 4,
    n_actions: int = 6,
    dim: int = 5,
    *,
    rng: np.random.Generator | int,
    feature_concentration: float = 0.35,
    measure_concentration: float = 0.5,
) -> EpisodicMDP:
    """P_h(s' | s, a) = phi_h(s, a) . mu_h(s') and r_h = phi_h . theta_h with features on the simplex.

    phi ~ Dirichlet(feature_concentration), each mu_(h, i) ~ Dirichlet(measure_concentration), theta uniform on the
    unit cube; the first state is 0. Overlapping features make inner products of either sign under an inverse
    covariance, which one-hot features never do.

    Raises:
        TypeError, ValueError: a size or concentration is out of range.

    >>> mdp = random_episodic_linear_mdp(rng=0)
    >>> mdp.P.shape, mdp.features.shape, bool(mdp.solve().value <= 3)
    ((3, 4, 6, 4), (3, 4, 6, 5), True)
    """
    for name, size in {"horizon": horizon, "n_states": n_states, "n_actions": n_actions, "dim": dim}.items():
        check_count(name, size)
    check_positive("feature_concentration", feature_concentration)
    check_positive("measure_concentration", measure_concentration)
    rng = np.random.default_rng(rng)
    phi = rng.dirichlet(np.full(dim, feature_concentration), (horizon, n_states, n_actions))
    mu = rng.dirichlet(np.full(n_states, measure_concentration), (horizon, dim))
    theta = rng.random((horizon, dim))
    P = np.einsum("hsad,hdt->hsat", phi, mu)
    R = np.einsum("hsad,hd->hsa", phi, theta)
    return EpisodicMDP(P / P.sum(axis=-1, keepdims=True), R, features=phi, measures=mu)


def combination_lock(
    horizon: int = 10, n_actions: int = 4, *, rng: np.random.Generator | int, slip: float = 0.0, decoy: float = 0.1
) -> EpisodicMDP:
    """One secret action a layer keeps the lock turning (state 0); any other jams it for good (state 1).

    A lock that still turns in the last layer pays 1; jamming it pays `decoy` at once, so greedy learners jam it. With
    probability `slip` even the right action jams. The best value is max over when to give up; with slip = 0 and
    decoy < 1 it is 1. Blind search opens the lock once in n_actions^horizon episodes.

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> combination_lock(rng=0).solve().value
    1.0
    """
    check_count("horizon", horizon)
    check_count("n_actions", n_actions, at_least=2)
    check_between("slip", slip, 0, 1)
    check_between("decoy", decoy, 0, 1)
    rng = np.random.default_rng(rng)
    secret = rng.integers(n_actions, size=horizon)
    layers = np.arange(horizon)
    P = np.zeros((horizon, 2, n_actions, 2))
    R = np.zeros((horizon, 2, n_actions))
    P[:, :, :, 1] = 1
    P[layers, 0, secret] = [1 - slip, slip]
    R[:, 0, :] = decoy
    R[layers, 0, secret] = 0
    R[-1, 0, secret[-1]] = 1
    phi = np.broadcast_to(one_hot_features(2, n_actions), (horizon, 2, n_actions, 2 * n_actions)).copy()
    return EpisodicMDP(P, R, features=phi, measures=P.reshape(horizon, 2 * n_actions, 2))


def missing_arm(*, reach: float = 0.15, bonus: float = 0.45, gap: float = 0.15) -> EpisodicMDP:
    """Two layers, three states, four actions: the best arm is the one that offline data can leave out.

    In layer 0, state 0, action 0 leads to (.9, .1, 0), action 1 to (.1, .9, 0), action 2 reaches state 2 with
    probability `reach` and the others evenly, action 3 all evenly. Only layer 1 pays: 0.5, but 0.5 + gap for action 1
    in state 0 and action 2 in state 1, and 0.5 + bonus for action 3 in state 2. One-hot features.

    Raises:
        ValueError: reach is outside [0, 1], bonus or gap outside [0, 0.5].

    >>> solution = missing_arm().solve()
    >>> round(solution.value, 6), int(solution.policy[0, 0]), solution.policy[1]
    (0.75, 3, array([1, 2, 3]))
    """
    check_between("reach", reach, 0, 1)
    check_between("bonus", bonus, 0, 0.5)
    check_between("gap", gap, 0, 0.5)
    rest = (1 - reach) / 2
    P = np.full((2, 3, 4, 3), 1 / 3)
    P[0, :, 0] = [0.9, 0.1, 0]
    P[0, :, 1] = [0.1, 0.9, 0]
    P[0, :, 2] = [rest, rest, 1 - 2 * rest]
    R = np.zeros((2, 3, 4))
    R[1] = 0.5
    R[1, 0, 1] = R[1, 1, 2] = 0.5 + gap
    R[1, 2, 3] = 0.5 + bonus
    phi = np.broadcast_to(one_hot_features(3, 4), (2, 3, 4, 12)).copy()
    return EpisodicMDP(P, R, features=phi, measures=P.reshape(2, 12, 3))
