"""Policies that go where a design wants to be, and whole batches of their episodes at once.

The proofs of arXiv 2211.04974 use a regret minimiser with first-order bounds here; optimistic value iteration on all
data so far takes its place, which any setting of this size is solved by.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_count, check_nonnegative
from locally.control.environments import EpisodicMDP
from locally.control.fine_tuning.estimation import Fit


def optimistic_policy(
    features: Float[ndarray, "H S A d"],
    rewards: Float[ndarray, "H S A"],
    fit: Fit,
    target: int,
    bonus: float | int,
    rng: np.random.Generator,
) -> Float[ndarray, "H S A"]:
    """Optimistic value iteration (LSVI-UCB) for rewards[target], then onwards from there for those of later layers.

    Transitions up to the target layer are unknown, so each carries `bonus` H ||phi|| in the norm of Lambda^(-1):
    without optimism a rare state is never found. What comes after the target does not draw the episode anywhere before
    it. Ties are broken at random. O(H S A d (S + d)).
    """
    H, S, _, d = features.shape
    transitions = features.reshape(H, -1, d) @ fit.transition.swapaxes(1, 2)
    flat = features.reshape(H, -1, d)
    norms = np.sqrt(np.maximum(((flat @ fit.inverse) * flat).sum(axis=-1), 0))
    shape = rewards.shape
    return _plan(rewards, transitions.reshape(*shape, S), bonus * H * norms.reshape(shape), target, rng)


def exact_policy(
    rewards: Float[ndarray, "H S A"], P: Float[ndarray, "H S A S"], target: int, rng: np.random.Generator
) -> Float[ndarray, "H S A"]:
    """The same where transitions are known: no bonus. O(H S^2 A)."""
    return _plan(rewards, P, np.zeros_like(rewards), target, rng)


def _plan(
    rewards: Float[ndarray, "H S A"],
    transitions: Float[ndarray, "H S A S"],
    bonus: Float[ndarray, "H S A"],
    target: int,
    rng: np.random.Generator,
) -> Float[ndarray, "H S A"]:
    H, S, A = rewards.shape
    policy = np.zeros((H, S, A))
    V, most = np.zeros(S), 0.0
    for h in reversed(range(H)):
        ends = h in (H - 1, target)  # of a stretch: nothing later counts here
        own = rewards[h] if h >= target else 0.0
        if ends:
            Q, most = rewards[h], 1.0
        else:
            most += h > target
            Q = np.minimum(own + transitions[h] @ V + bonus[h], most)
        V = Q.max(axis=-1)
        tied = V[:, None] - Q <= 1e-12
        chosen = np.where(tied, rng.random((S, A)), -1).argmax(axis=-1)
        policy[h, np.arange(S), chosen] = 1
    return policy


def play_episodes(
    mdp: EpisodicMDP, policy: Float[ndarray, "H S A"], n: int, rng: np.random.Generator
) -> tuple[Float[ndarray, "H S A S"], Float[ndarray, "H S A"]]:
    """Counts of (h, s, a, s') and sums of rewards of n episodes, drawn as counts: O(H S^2 A) whatever n is.

    Episodes of one policy are exchangeable, so how many of them go each way is multinomial, layer by layer; the counts
    have the same law as those of n episodes played one by one.

    Raises:
        TypeError, ValueError: n is no positive integer.

    >>> from locally.control.environments import missing_arm
    >>> mdp = missing_arm()
    >>> counts, _ = play_episodes(mdp, np.full(mdp.R.shape, 0.25), 1000, np.random.default_rng(0))
    >>> counts.sum(axis=(1, 2, 3))
    array([1000., 1000.])
    """
    check_count("n", n)
    H, S, A = mdp.R.shape
    counts, rewards = np.empty((H, S, A, S)), np.empty((H, S, A))
    at = rng.multinomial(n, _normalised(mdp.start))
    for h in range(H):
        taken = rng.multinomial(at, _normalised(policy[h]))
        gone = rng.multinomial(taken, _normalised(mdp.P[h]))
        counts[h] = gone
        paid = np.clip(mdp.R[h], 0, 1)
        rewards[h] = rng.binomial(taken, paid) if mdp.noise == "bernoulli" else taken * mdp.R[h]
        at = gone.sum(axis=(0, 1))
    return counts, rewards


def collect(mdp: EpisodicMDP, visits: ndarray, rng: np.random.Generator) -> tuple[ndarray, ...]:
    """Rows (layers, states, actions, rewards, next states) of a log with the given visits[h, s, a].

    Raises:
        TypeError, ValueError: visits are no counts of the process's shape.
    """
    visits = np.asarray(visits)
    if visits.shape != mdp.R.shape or not np.issubdtype(visits.dtype, np.integer):
        raise ValueError(f"visits must hold integers of shape {mdp.R.shape}, got {visits.dtype} of {visits.shape}")
    check_nonnegative("the smallest of visits", float(visits.min()))
    layers, states, actions = (np.repeat(i, visits.ravel()) for i in map(np.ravel, np.indices(visits.shape)))
    mean = mdp.R[layers, states, actions]
    rewards = (rng.random(len(mean)) < mean).astype(float) if mdp.noise == "bernoulli" else mean
    gone = rng.multinomial(visits, _normalised(mdp.P)).reshape(-1, mdp.n_states)
    following = np.repeat(np.tile(np.arange(mdp.n_states), len(gone)), gone.ravel())
    return layers, states, actions, rewards, following


def _normalised(p: Float[ndarray, "*batch S"]) -> Float[ndarray, "*batch S"]:
    """Sums at most 1 to the last bit, which NumPy's multinomial insists on."""
    return p / p.sum(axis=-1, keepdims=True)
