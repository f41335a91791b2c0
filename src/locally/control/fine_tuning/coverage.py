"""How well a log covers what must be known: the offline-to-online coefficient and the fewest episodes that remain.

C(T) = min over Lambda of max over policies of ||phi_(pi,h)||^2 in the norm of (T Lambda + Lambda_off,h + ridge I)^(-1),
divided by max(V* - V(pi), eps)^2: only directions of policies that are nearly optimal, and that the log leaves open,
count. T episodes suffice at layer h once C(T) <= 1 / beta. Needs the process itself, so it judges logs and learners
rather than serving one. Source: arXiv 2211.04974, definition of offline-to-online concentrability.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_count, check_finite, check_nonnegative, check_positive, check_shape
from locally.control.dynamic_programming import greedy_policy, occupancy_measures, solve_episodic
from locally.control.environments import EpisodicMDP
from locally.control.fine_tuning.design import Design, xy_design
from locally.control.validity import check_index, check_kernel


def features_of(mdp: EpisodicMDP) -> Float[ndarray, "H S A d"]:
    """The process's own features, or one for every state and action."""
    if mdp.features is not None:
        return mdp.features
    H, S, A = mdp.R.shape
    return np.broadcast_to(np.eye(S * A).reshape(S, A, S * A), (H, S, A, S * A)).copy()


def visited_features(mdp: EpisodicMDP, policies: Float[ndarray, "n H S A"]) -> Float[ndarray, "n H d"]:
    """phi_(pi,h), exactly. O(n H S A (S + d))."""
    occupancy = occupancy_measures(mdp.P, policies, mdp.start)
    return np.einsum("nhsa,hsad->nhd", occupancy, features_of(mdp), optimize=True)


def offline_to_online_coefficient(
    mdp: EpisodicMDP,
    policies: Float[ndarray, "n H S A"],
    offline_covariance: Float[ndarray, "H d d"] | None,
    epsilon: float | int,
    budget: float | int,
    layer: int,
    *,
    ridge: float | int = 1e-9,
    rtol: float = 1e-3,
) -> Design:
    """C at one layer for `budget` online episodes; `value` and `lower` of the design bracket it.

    Args:
        mdp: the process.
        policies: the class Pi, probabilities.
        offline_covariance: Lambda_off,h for all layers, as `OfflineDataset.covariance` gives it; None for no log.
        epsilon: accuracy asked for, positive.
        budget: T >= 0, in episodes.
        layer: h in 0, ..., H - 1.
        ridge: positive; it keeps C finite where nothing was seen.
        rtol: relative width of the bracket.

    Raises:
        TypeError, ValueError: a shape, distribution or number is out of range.

    >>> from locally.control.environments import missing_arm
    >>> from locally.control.fine_tuning import deterministic_policies, reachable
    >>> mdp = missing_arm()
    >>> policies = deterministic_policies(reachable(mdp), 4)
    >>> found = offline_to_online_coefficient(mdp, policies, None, epsilon=0.2, budget=1000, layer=0)
    >>> round(found.value, 3)
    0.1
    """
    return _Coverage(mdp, policies, offline_covariance, epsilon, layer, ridge).solve(budget, rtol)


def minimal_online_samples(
    mdp: EpisodicMDP,
    policies: Float[ndarray, "n H S A"],
    offline_covariance: Float[ndarray, "H d d"] | None,
    epsilon: float | int,
    beta: float | int,
    *,
    ridge: float | int = 1e-9,
    rtol: float = 0.03,
    max_samples: float | int = 1e12,
) -> Float[ndarray, " H"]:
    """The fewest episodes T at each layer for which C(T) <= 1 / beta; infinity above `max_samples`.

    The main theorem's leading term is their sum, for beta of the order of d H^5 log(1 / (delta epsilon)); a lower bound
    shows that none does without it. Bisection to a relative `rtol`, each step one `xy_design`.

    Raises:
        TypeError, ValueError: as for `offline_to_online_coefficient`.
    """
    check_positive("beta", beta)
    check_positive("rtol", rtol, below=1)
    check_positive("max_samples", max_samples)
    needs = np.zeros(mdp.horizon)
    for h in range(mdp.horizon):
        coverage = _Coverage(mdp, policies, offline_covariance, epsilon, h, ridge)
        if coverage.solve(0, rtol / 3).value <= 1 / beta:
            continue
        low, high = 0.0, 1.0
        while high <= max_samples and not coverage.reaches(1 / beta, high, rtol / 3):
            low, high = high, 2 * high
        if high > max_samples:
            needs[h] = np.inf
            continue
        while high - low > rtol * high:
            middle = (low + high) / 2
            low, high = (low, middle) if coverage.reaches(1 / beta, middle, rtol / 3) else (middle, high)
        needs[h] = high
    return needs


class _Coverage:
    """The directions of one layer, divided by the gaps, and what policies can do about them."""

    def __init__(
        self,
        mdp: EpisodicMDP,
        policies: Float[ndarray, "n H S A"],
        offline_covariance: Float[ndarray, "H d d"] | None,
        epsilon: float | int,
        layer: int,
        ridge: float | int,
    ) -> None:
        check_positive("epsilon", epsilon)
        check_positive("ridge", ridge)
        check_shape("policies", policies, (None, *mdp.R.shape))
        check_kernel("policies", policies)
        check_count("number of policies", len(policies))
        self.layer = check_index("layer", layer, mdp.horizon)
        self.mdp, self.ridge = mdp, ridge
        self.features = features_of(mdp)[layer]
        dim = self.features.shape[-1]
        if offline_covariance is not None:
            check_shape("offline_covariance", offline_covariance, (mdp.horizon, dim, dim))
            check_finite("offline_covariance", offline_covariance)
        self.base = None if offline_covariance is None else offline_covariance[layer]
        values = mdp.values(policies)
        gaps = np.maximum(values.max() - values, epsilon)
        self.directions = visited_features(mdp, policies)[:, layer] / gaps[:, None]
        uniform = np.full(mdp.R.shape, 1 / mdp.n_actions)
        self.initial = self.covariance(uniform)

    def covariance(self, policy: Float[ndarray, "H S A"]) -> Float[ndarray, "d d"]:
        """E_pi[phi phi^T] at the layer."""
        upto = self.layer + 1
        occupancy = occupancy_measures(self.mdp.P[:upto], policy[:upto], self.mdp.start)[self.layer]
        return np.einsum("sa,sai,saj->ij", occupancy, self.features, self.features, optimize=True)

    def oracle(self, Xi: Float[ndarray, "d d"]) -> Float[ndarray, "d d"]:
        """The covariance of the policy with the largest E[phi^T Xi phi], by backward induction from the layer."""
        upto = self.layer + 1
        reward = np.zeros((upto, *self.features.shape[:2]))
        reward[self.layer] = ((self.features @ Xi) * self.features).sum(axis=-1)
        return self.covariance(greedy_policy(solve_episodic(self.mdp.P[:upto], reward, self.mdp.start).Q))

    def solve(self, budget: float | int, rtol: float) -> Design:
        check_nonnegative("budget", budget)
        return xy_design(
            self.directions,
            self.oracle,
            budget=budget,
            base=self.base,
            initial=self.initial,
            ridge=self.ridge,
            rtol=rtol,
        )

    def reaches(self, target: float, budget: float | int, rtol: float) -> bool:
        return self.solve(budget, rtol).value <= target
