"""Least squares in a linear MDP: where policies go, what they earn there, and how uncertain that is.

Everything that the estimates need of n transitions is kept in moments of fixed size, so that no cost grows with n.
Source: arXiv 2211.04974, section on FTPedel; arXiv 2207.02575 for the estimator of feature visitations.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_count, check_shape
from locally.control.validity import check_unit_ball


@dataclass(frozen=True, eq=False)
class Fit:
    """Regularised least squares at every layer.

    Attributes:
        inverse: Lambda_h^(-1), where Lambda_h is the sum of phi phi^T plus ridge times I.
        transition: transition[h] @ phi estimates the probability of every next state.
        theta: <phi, theta[h]> estimates the mean reward.
    """

    inverse: Float[ndarray, "H d d"]
    transition: Float[ndarray, "H S d"]
    theta: Float[ndarray, "H d"]

    def visitations(self, averages: Float[ndarray, "H n S d"], start: Float[ndarray, " S"]) -> Float[ndarray, "H n d"]:
        """phi^_(pi,h), the expected feature of each policy at each layer, by the recursion over layers. O(n H S d)."""
        H, n, _, d = averages.shape
        phi = np.empty((H, n, d))
        states = np.broadcast_to(start, (n, start.size))
        for h in range(H):
            phi[h] = (states[:, None] @ averages[h])[:, 0]
            states = phi[h] @ self.transition[h].T
        return phi

    def widths(self, phi: Float[ndarray, "H n d"]) -> Float[ndarray, "H n"]:
        """||phi||^2 in the norm of Lambda_h^(-1). O(n H d^2)."""
        return ((phi @ self.inverse) * phi).sum(axis=-1)

    def widths_at(self, h: int, vectors: Float[ndarray, "k d"]) -> Float[ndarray, " k"]:
        """||v||^2 in the norm of Lambda_h^(-1) at one layer. O(k d^2)."""
        return ((vectors @ self.inverse[h]) * vectors).sum(axis=-1)

    def values(self, phi: Float[ndarray, "H n d"]) -> Float[ndarray, " n"]:
        """V^(pi), the sum over layers of <phi^_(pi,h), theta_h>."""
        return (phi @ self.theta[:, :, None]).sum(axis=(0, 2))


@dataclass(eq=False)
class Moments:
    """Sums over transitions of phi phi^T, of 1[s' = s] phi and of r phi, at every layer."""

    covariance: Float[ndarray, "H d d"]
    following: Float[ndarray, "H S d"]
    reward: Float[ndarray, "H d"]

    @classmethod
    def zeros(cls, horizon: int, n_states: int, dim: int) -> "Moments":
        return cls(np.zeros((horizon, dim, dim)), np.zeros((horizon, n_states, dim)), np.zeros((horizon, dim)))

    def copy(self) -> "Moments":
        return Moments(self.covariance.copy(), self.following.copy(), self.reward.copy())

    def add(
        self,
        features: Float[ndarray, "H S A d"],
        counts: Float[ndarray, "H S A S"],
        rewards: Float[ndarray, "H S A"],
        layers: slice = slice(None),
    ) -> None:
        """Take in transitions, given as counts of (s, a, s') and sums of rewards. O(H S A (d^2 + S d))."""
        H, S, A, d = features.shape
        phi = features.reshape(H, S * A, d)[layers]
        counts = counts.reshape(H, S * A, S)[layers]
        weighted = phi * counts.sum(axis=-1)[..., None]
        self.covariance[layers] += weighted.swapaxes(1, 2) @ phi
        self.following[layers] += counts.swapaxes(1, 2) @ phi
        self.reward[layers] += (rewards.reshape(H, 1, S * A)[layers] @ phi)[:, 0]

    def merge(self, other: "Moments") -> None:
        """Know what `other` knows as well."""
        self.covariance += other.covariance
        self.following += other.following
        self.reward += other.reward

    def take_layer(self, other: "Moments", h: int) -> None:
        """Forget layer h and know of it what `other` knows."""
        self.covariance[h], self.following[h], self.reward[h] = other.covariance[h], other.following[h], other.reward[h]

    def fit(self, ridge: float) -> Fit:
        """O(H d^3)."""
        inverse = np.linalg.inv(self.covariance + ridge * np.eye(self.covariance.shape[-1]))
        inverse = (inverse + inverse.swapaxes(1, 2)) / 2
        return Fit(inverse, self.following @ inverse, (inverse @ self.reward[..., None])[..., 0])


def check_features(features: Float[ndarray, "H S A d"]) -> None:
    """Norms at most 1, and every layer spans R^d: otherwise no data tell the parameters.

    Raises:
        ValueError: a norm exceeds 1, or a layer does not span.
    """
    check_shape("features", features, (None, None, None, None))
    check_count("the horizon, features.shape[0],", features.shape[0])
    check_unit_ball("features", features)
    H, _, _, d = features.shape
    for h, rank in enumerate(np.linalg.matrix_rank(features.reshape(H, -1, d)).tolist()):
        if rank < d:
            raise ValueError(f"features must span R^{d} at every layer, but those of layer {h} span {rank} dimensions")
