"""Processes that never reset: RiverSwim, linear processes, mixtures of kernels, Garnet, an access-control queue."""

from itertools import product

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_between, check_count, check_positive
from locally.control.environments.processes import ContinuingMDP, RewardNoise

LEFT, RIGHT = 0, 1


def riverswim(
    n_states: int = 6,
    *,
    up: float = 0.35,
    down: float = 0.05,
    left: float = 0.005,
    noise: RewardNoise = "bernoulli",
) -> ContinuingMDP:
    """Swim up a river to a reward of 1 at its end, or stay where you are washed up for a little, `left`.

    Action 0 goes left for certain. Action 1 goes right with probability `up`, is carried back with `down`, and
    otherwise stays; 0.6 and 0.4 replace them at the ends. Exploration has to pass states of reward 0 against the
    current. Source: Strehl & Littman, JCSS 74 (2008); probabilities of Osband, Russo & Van Roy (NeurIPS 2013).

    Args:
        n_states: at least 2.
        up, down: non-negative, up > 0, up + down <= 1.
        left: mean reward of staying at the left end, in [0, 1].

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> solution = riverswim().solve()
    >>> round(solution.gain, 6), round(solution.span, 6), solution.policy
    (0.428622, 6.310324, array([1, 1, 1, 1, 1, 1]))
    """
    check_count("n_states", n_states, at_least=2)
    check_positive("up", up, below=1 + 1e-12)
    check_between("down", down, 0, 1 - up)
    check_between("left", left, 0, 1)
    end = n_states - 1
    P = np.zeros((n_states, 2, n_states))
    R = np.zeros((n_states, 2))
    R[0, LEFT], R[end, RIGHT] = left, 1
    for s in range(n_states):
        P[s, LEFT, max(s - 1, 0)] = 1
        P[s, RIGHT, max(s - 1, 0)] += down
        P[s, RIGHT, min(s + 1, end)] += up
        P[s, RIGHT, s] += 1 - up - down
    P[0, RIGHT], P[end, RIGHT] = 0, 0
    P[0, RIGHT, :2] = 0.4, 0.6
    P[end, RIGHT, end - 1 :] = 0.4, 0.6
    return ContinuingMDP(P, R, noise=noise)


def random_linear_mdp(
    n_states: int = 10,
    n_actions: int = 3,
    dim: int = 4,
    *,
    rng: np.random.Generator | int,
    feature_concentration: float = 0.3,
    measure_concentration: float = 0.5,
) -> ContinuingMDP:
    """P(s' | s, a) = phi(s, a) . mu(s') and r = phi . theta with features on the simplex.

    phi ~ Dirichlet(feature_concentration), each mu_i ~ Dirichlet(measure_concentration), theta uniform on the unit
    cube. Ergodic with probability one, and Q* + J* is linear in phi.

    Raises:
        TypeError, ValueError: a size or concentration is out of range.

    >>> mdp = random_linear_mdp(rng=0)
    >>> solution = mdp.solve()
    >>> target = solution.q + solution.gain
    >>> phi = mdp.features.reshape(-1, 4)
    >>> fit = np.linalg.lstsq(phi, target.ravel(), rcond=None)[0]
    >>> np.allclose(phi @ fit, target.ravel())
    True
    """
    _check_sizes(n_states, n_actions, dim)
    check_positive("feature_concentration", feature_concentration)
    check_positive("measure_concentration", measure_concentration)
    rng = np.random.default_rng(rng)
    phi = rng.dirichlet(np.full(dim, feature_concentration), (n_states, n_actions))
    mu = rng.dirichlet(np.full(n_states, measure_concentration), dim)
    theta = rng.random(dim)
    return ContinuingMDP(_normalised(phi @ mu), phi @ theta, features=phi)


def random_linear_mixture(
    n_states: int = 8,
    n_actions: int = 3,
    n_kernels: int = 4,
    *,
    rng: np.random.Generator | int,
    concentration: float = 0.3,
) -> ContinuingMDP:
    """P = sum_i theta_i P_i with known kernels P_i, rows Dirichlet(concentration), and unknown theta on the simplex.

    Rewards are uniform on [0, 1]; `mixture` holds the kernels.

    Raises:
        TypeError, ValueError: a size or concentration is out of range.

    >>> mdp = random_linear_mixture(rng=0)
    >>> mdp.mixture.shape
    (8, 3, 8, 4)
    """
    _check_sizes(n_states, n_actions, n_kernels)
    check_positive("concentration", concentration)
    rng = np.random.default_rng(rng)
    kernels = rng.dirichlet(np.full(n_states, concentration), (n_kernels, n_states, n_actions))
    theta = rng.dirichlet(np.ones(n_kernels))
    mixture = np.moveaxis(_normalised(kernels), 0, -1)
    return ContinuingMDP(_normalised(mixture @ theta), rng.random((n_states, n_actions)), mixture=mixture)


def garnet(
    n_states: int = 20, n_actions: int = 3, branching: int = 3, *, rng: np.random.Generator | int, restart: float = 0.01
) -> ContinuingMDP:
    """Each (s, a) leads to `branching` states drawn without replacement, with uniformly cut probabilities.

    With probability `restart` a step goes to a uniformly drawn state instead, which makes the process communicate.
    Rewards are uniform on [0, 1]. Source: Bhatnagar et al., Automatica 45 (2009), section 6.

    Raises:
        TypeError, ValueError: a size is out of range.

    >>> garnet(rng=1).solve().success
    True
    """
    _check_sizes(n_states, n_actions, branching)
    check_between("branching", branching, 1, n_states)
    check_positive("restart", restart, below=1)
    rng = np.random.default_rng(rng)
    P = np.zeros((n_states, n_actions, n_states))
    for s, a in product(range(n_states), range(n_actions)):
        cuts = np.sort(rng.random(branching - 1))
        P[s, a, rng.choice(n_states, branching, replace=False)] = np.diff(cuts, prepend=0.0, append=1.0)
    P = (1 - restart) * P + restart / n_states
    return ContinuingMDP(_normalised(P), rng.random((n_states, n_actions)))


def access_control_queue(
    n_servers: int = 10, priorities: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0), free: float = 0.06
) -> ContinuingMDP:
    """Give a free server to the customer at the head of the queue (action 1) or turn the customer away (action 0).

    State (free servers, priority of the head) is numbered `free * len(priorities) + priority`. Served customers pay
    their priority, here divided by the highest; each busy server becomes free with probability `free`; the next
    customer's priority is uniform. Source: Sutton & Barto, Reinforcement Learning (2018), example 10.2.

    Raises:
        TypeError, ValueError: an argument is out of range.

    >>> solution = access_control_queue().solve()
    >>> round(8 * solution.gain, 2)
    2.75
    """
    check_count("n_servers", n_servers)
    check_positive("free", free, below=1)
    if not priorities or min(priorities) <= 0:
        raise ValueError(f"priorities must be positive and at least one, got {priorities}")
    from scipy.stats import binom

    kinds = len(priorities)
    P = np.zeros((n_servers + 1, kinds, 2, n_servers + 1, kinds))
    R = np.zeros((n_servers + 1, kinds, 2))
    for idle, kind, action in product(range(n_servers + 1), range(kinds), (0, 1)):
        served = action == 1 and idle > 0
        left = idle - served
        busy = n_servers - left
        R[idle, kind, action] = served * priorities[kind] / max(priorities)
        P[idle, kind, action, left:, :] = binom.pmf(np.arange(busy + 1), busy, free)[:, None] / kinds
    S = (n_servers + 1) * kinds
    return ContinuingMDP(_normalised(P.reshape(S, 2, S)), R.reshape(S, 2), start=np.eye(S)[-1], noise="none")


def _check_sizes(n_states: int, n_actions: int, dim: int) -> None:
    check_count("n_states", n_states, at_least=2)
    check_count("n_actions", n_actions)
    check_count("number of features, kernels or branches", dim)


def _normalised(P: Float[ndarray, "*batch S"]) -> Float[ndarray, "*batch S"]:
    return P / P.sum(axis=-1, keepdims=True)
