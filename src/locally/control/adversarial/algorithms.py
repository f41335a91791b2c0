"""Policy optimisation with a simulator: Algorithms 1 and 2, and the dilated-bonus Hedge that they improve upon.

Source: Dai, Luo, Wei and Zimmert (ICML 2023, arXiv 2301.12942); Luo, Wei and Lee (NeurIPS 2021, arXiv 2107.08346).
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_choice, check_count
from locally.control.adversarial import kernels
from locally.control.adversarial.covariance import (
    empirical,
    matrix_geometric_resampling,
    samples_for_resampling,
    samples_for_ridge_inverse,
)
from locally.control.adversarial.estimators import reduce_magnitude
from locally.control.adversarial.learner import checked_episode, checked_features, checked_process
from locally.control.adversarial.parameters import METHODS, Method, Parameters
from locally.control.validity import check_generator_state, checked_arrays

Covariance = Literal["exact", "sample", "resampling"]
Regularizer = Literal["log_barrier", "entropy"]
Estimator = Literal["standard", "magnitude_reduced"]


class PolicyOptimizer:
    """Follow the regularised leader at every state, on estimated Q-functions minus dilated bonuses.

    For losses that change arbitrarily, visited losses only, values linear in known features, and a simulator, which
    for a finite process is its transition matrix. Expected regret against the best fixed policy is O~(sqrt(A d K) H^3)
    with the log-barrier, O~(sqrt(d K) H^3) with the magnitude-reduced estimator, and O~(d^(2/3) H^2 K^(2/3)) for the
    dilated-bonus Hedge.

    Args:
        features: phi[h, s, a] in the unit ball, spanning R^d in every layer; runs may lead. Q must be linear in them
            for every policy, which linear processes guarantee.
        P: P[h, s, a, s'] of the simulator; runs lead where they lead in `features`.
        n_episodes: K, which the parameters depend on.
        method: "log_barrier" (Algorithm 1), "magnitude_reduced" (Algorithm 2) or "dilated_hedge" (Luo et al.).
        start: distribution of the first state, state 0 by default.
        eta_scale, beta_scale, gamma, gamma_scale: as for `Parameters.of`; scales and gamma may be one number a run.
        regularizer, estimator: in place of the method's own, for ablations; the parameters stay the method's.
        covariance: "exact" from the occupancies, "sample" from `n_covariance_samples` draws of the simulator, or
            "resampling" for matrix geometric resampling.
        bonus: "exact" by backward induction, or "sample", one simulated path for each (x, a).
        n_covariance_samples: by default what two-sided concentration needs with probability 0.95.
        n_estimate_samples: draws for the shift of the magnitude-reduced estimator; None takes the exact mean.
        rng: draws all samples.

    Attributes:
        policies: (R, H, S, A), played next.
        cumulative: (R, H, S, A), sums of Q^ - B.
        parameters: one a run.
        lowest_scaled_estimate: (R,), the smallest eta Q^ so far.
        below_bound: (R,), episodes in which some Q^ fell below -H / sqrt(gamma).
        simulator_calls: draws of a pair (x, a) so far, in each run; 0 in exact mode.

    Raises:
        TypeError, ValueError: features outside the unit ball or not spanning, P no kernel, a parameter out of range.

    Complexity: O(H S A (d^2 + S)) an episode, O(H (S A)^2 d) with exact shifts; O(H S A) memory.

    >>> from locally.control.environments import random_adversarial_mdp
    >>> mdp = random_adversarial_mdp(100, "drifting", rng=0)
    >>> learner = PolicyOptimizer(mdp.features, mdp.P, n_episodes=100, method="magnitude_reduced", rng=0)
    >>> learner.tell(np.zeros((1, 3), int), np.zeros((1, 3), int), np.ones((1, 3)))
    >>> bool(learner.policies[0, 0, 0, 0] < 1 / 6)
    True
    """

    def __init__(
        self,
        features: Float[ndarray, "*runs H S A d"],
        P: Float[ndarray, "*runs H S A S"],
        *,
        n_episodes: int,
        method: Method = "log_barrier",
        start: Float[ndarray, "*runs S"] | None = None,
        eta_scale: float | Float[ndarray, " R"] = 1.0,
        beta_scale: float | Float[ndarray, " R"] = 1.0,
        gamma: float | Float[ndarray, " R"] | None = None,
        gamma_scale: float | Float[ndarray, " R"] = 1.0,
        regularizer: Regularizer | None = None,
        estimator: Estimator | None = None,
        covariance: Covariance = "exact",
        bonus: Literal["exact", "sample"] = "exact",
        n_covariance_samples: int | None = None,
        n_estimate_samples: int | None = None,
        rng: np.random.Generator | int,
    ) -> None:
        check_count("n_episodes", n_episodes)
        check_choice("method", method, METHODS)
        check_choice("covariance", covariance, ("exact", "sample", "resampling"))
        check_choice("bonus", bonus, ("exact", "sample"))
        self.regularizer = regularizer or ("log_barrier" if method == "log_barrier" else "entropy")
        self.estimator = estimator or ("magnitude_reduced" if method == "magnitude_reduced" else "standard")
        check_choice("regularizer", self.regularizer, ("log_barrier", "entropy"))
        check_choice("estimator", self.estimator, ("standard", "magnitude_reduced"))
        for name, count in {
            "n_covariance_samples": n_covariance_samples,
            "n_estimate_samples": n_estimate_samples,
        }.items():
            if count is not None:
                check_count(name, count)
        self.features = checked_features(features)
        R, H, S, A, d = self.features.shape
        self.P, self.start = checked_process(P, start, (R, H, S, A))
        self.n_episodes, self.covariance, self.bonus = n_episodes, covariance, bonus
        self.parameters = [
            Parameters.of(
                method,
                n_actions=A,
                dim=d,
                horizon=H,
                n_episodes=n_episodes,
                eta_scale=_of_run(eta_scale, r),
                beta_scale=_of_run(beta_scale, r),
                gamma=None if gamma is None else _of_run(gamma, r),
                gamma_scale=_of_run(gamma_scale, r),
            )
            for r in range(R)
        ]
        self._eta, self._beta, self._gamma = (
            np.array([getattr(p, name) for p in self.parameters]) for name in ("eta", "beta", "gamma")
        )
        self.n_estimate_samples = n_estimate_samples
        self.n_covariance_samples = n_covariance_samples or samples_for_ridge_inverse(self._gamma.min(), d)
        self.rng = np.random.default_rng(rng)
        self._phi = self.features.reshape(R * H, S * A, d)
        self._ridges = np.repeat(self._gamma, H)
        self.cumulative = np.zeros((R, H, S, A))
        self.episode, self.simulator_calls = 0, 0
        self.lowest_scaled_estimate = np.zeros(R)
        self.below_bound = np.zeros(R, np.int64)
        self.policies = self._follow_the_regularised_leader()

    def tell(self, states: Int[ndarray, "R H"], actions: Int[ndarray, "R H"], losses: Float[ndarray, "R H"]) -> None:
        """Learn from the episode that `policies` played.

        Raises:
            ValueError: shapes differ, a state or action does not exist, or a loss lies outside [0, 1].
        """
        R, H, S, A = self.policies.shape
        states, actions, losses = checked_episode(states, actions, losses, (R, H, S, A))
        visited = self._phi[np.arange(R * H), (states * A + actions).ravel()]
        loss_to_go = losses[:, ::-1].cumsum(axis=1)[:, ::-1]

        occupancy = kernels.occupancies(self.P, self.policies, self.start)
        inverse = self._inverse_covariances(occupancy)
        estimate = self._estimate(inverse, visited, loss_to_go, occupancy)
        norms = kernels.quadratic_forms(self._phi, inverse).reshape(R, H, S, A)
        local = kernels.local_bonuses(norms, self.policies, self._beta)
        self.cumulative += estimate - self._dilated(local)

        lowest = estimate.min(axis=(1, 2, 3))
        self.lowest_scaled_estimate = np.minimum(self.lowest_scaled_estimate, self._eta * lowest)
        self.below_bound += lowest < -H / np.sqrt(self._gamma) * (1 + 1e-9)
        self.episode += 1
        self.policies = self._follow_the_regularised_leader()

    def state_dict(self) -> dict[str, Any]:
        """Cumulative Q^ - B, counters and generator; the policies follow from them."""
        return {
            "episode": self.episode,
            "cumulative": self.cumulative.copy(),
            "lowest_scaled_estimate": self.lowest_scaled_estimate.copy(),
            "below_bound": self.below_bound.copy(),
            "simulator_calls": self.simulator_calls,
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its learner had another shape."""
        names = ("cumulative", "lowest_scaled_estimate", "below_bound")
        arrays = checked_arrays(state, {name: getattr(self, name) for name in names})
        episode, simulator_calls = int(state["episode"]), int(state["simulator_calls"])
        check_generator_state(self.rng, state["rng"])
        for name, array in arrays.items():
            setattr(self, name, array)
        self.episode, self.simulator_calls = episode, simulator_calls
        self.rng.bit_generator.state = state["rng"]
        self.policies = self._follow_the_regularised_leader()

    def _follow_the_regularised_leader(self) -> Float[ndarray, "R H S A"]:
        scaled = (self._eta[:, None, None, None] * self.cumulative).reshape(-1, self.cumulative.shape[-1])
        barrier = self.regularizer == "log_barrier"
        weights = kernels.log_barrier_weights(scaled) if barrier else kernels.exponential_weights(scaled)
        return weights.reshape(self.cumulative.shape)

    def _inverse_covariances(self, occupancy: Float[ndarray, "R H S A"]) -> Float[ndarray, "R_H d d"]:
        R, H, S, A = self.policies.shape
        if self.covariance == "resampling":
            return np.concatenate([self._resample(occupancy[r], r) for r in range(R)])
        if self.covariance == "sample":
            occupancy = empirical(occupancy, self.n_covariance_samples, self.rng)
            self.simulator_calls += self.n_covariance_samples
        moments = kernels.second_moments(self._phi, occupancy.reshape(R * H, S * A))
        return kernels.inverses(moments, self._ridges)

    def _resample(self, occupancy: Float[ndarray, "H S A"], run: int) -> Float[ndarray, "H d d"]:
        """Matrix geometric resampling with as many samples as its own analysis asks for."""
        H, S, A = occupancy.shape
        M, N = samples_for_resampling(self._gamma[run])
        self.simulator_calls += M * N
        pairs = [self.rng.choice(S * A, size=(M, N), p=p / p.sum()) for p in occupancy.reshape(H, S * A)]
        phi = self.features[run].reshape(H, S * A, -1)
        return np.stack([matrix_geometric_resampling(phi[h, pairs[h]], self._gamma[run]) for h in range(H)])

    def _estimate(
        self,
        inverse: Float[ndarray, "R_H d d"],
        visited: Float[ndarray, "R_H d"],
        loss_to_go: Float[ndarray, "R H"],
        occupancy: Float[ndarray, "R H S A"],
    ) -> Float[ndarray, "R H S A"]:
        R, H, S, A = self.policies.shape
        products = kernels.linear_forms(self._phi, inverse, visited).reshape(R, H, S, A)
        to_go = loss_to_go[:, :, None, None]
        if self.estimator == "standard":
            return products * to_go
        if self.n_estimate_samples is not None:
            occupancy = empirical(occupancy, self.n_estimate_samples, self.rng)
            self.simulator_calls += self.n_estimate_samples
        shift = kernels.negative_means(self._phi, inverse, occupancy.reshape(R * H, S * A)).reshape(R, H, S, A)
        return reduce_magnitude(products, shift, to_go, float(H))

    def _dilated(self, local: Float[ndarray, "R H S A"]) -> Float[ndarray, "R H S A"]:
        factor = 1 + 1 / local.shape[1]
        if self.bonus == "exact":
            return kernels.dilate(self.P, self.policies, local, factor)
        self.simulator_calls += local[0, :-1].size
        return kernels.sampled_dilation(self.P, self.policies, local, factor, self.rng.random((*local.shape, 2)))


def _of_run(value: Any, run: int) -> float:
    """One number for all runs, or the run's own."""
    return float(value) if np.ndim(value) == 0 else float(value[run])
