"""What a protocol delivers at user numbers that no computer can play one by one, drawn from the law of the averages.

For Gaussian records the averaged moments follow a Wishart law, and the average of n noise vectors is Gaussian: exactly
so for the Gaussian releases, by the central limit theorem for the l2-ball randomiser. Clipping is left out, so the
bounds must be wide. For rate studies only: one draw on an average is not local privacy.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import wishart

from locally.checks import check_count, check_nonnegative, check_shape, check_symmetric
from locally.privacy.regression.server import MomentServer, SparseFit, ThresholdingServer


@dataclass(frozen=True)
class Population:
    """y = <x, theta> + noise with x ~ N(0, covariance) and noise ~ N(0, noise_std^2).

    >>> population = Population(np.eye(2), np.array([1.0, 0.0]), 0.5)
    >>> X, y = population.sample(5, np.random.default_rng(0))
    >>> X.shape, y.shape
    ((5, 2), (5,))
    """

    covariance: Float[ndarray, "d d"]
    theta: Float[ndarray, " d"]
    noise_std: float

    def __post_init__(self) -> None:
        check_symmetric("covariance", self.covariance)
        check_shape("theta", self.theta, (len(self.covariance),))
        check_nonnegative("noise_std", self.noise_std)

    @cached_property
    def factor(self) -> Float[ndarray, "d d"]:
        """Lower Cholesky factor of the covariance."""
        return np.linalg.cholesky(self.covariance)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[Float[ndarray, "n d"], Float[ndarray, " n"]]:
        """Records of n users."""
        X = rng.standard_normal((n, len(self.theta))) @ self.factor.T
        return X, X @ self.theta + self.noise_std * rng.standard_normal(n)

    def sample_moments(self, n: int, rng: np.random.Generator) -> tuple[Float[ndarray, "d d"], Float[ndarray, " d"]]:
        """Averages of x x^T and x y over n users, without drawing the users. O(d^3)."""
        check_count("n", n, at_least=len(self.theta) + 1)
        cross = self.covariance @ self.theta
        variance = self.theta @ cross + self.noise_std**2
        joint = np.block([[self.covariance, cross[:, None]], [cross[None], np.array([[variance]])]])
        moments = wishart.rvs(df=n, scale=joint / n, random_state=rng)
        return moments[:-1, :-1], moments[:-1, -1]

    def sample_mean_gradient(
        self, theta: Float[ndarray, " d"], n: int, rng: np.random.Generator
    ) -> Float[ndarray, " d"]:
        """Average of x (<x, theta> - y) over n users, without drawing the users. O(d^2).

        Given the residuals r = y - <x, theta>, the sum of x r is Gaussian: mean (c / v) S and covariance
        S (covariance - c c^T / v), where c = cov(x, r), v = var(r) and S = sum of r^2 ~ v chi^2_n.
        """
        check_count("n", n)
        gap = self.theta - theta
        c = self.covariance @ gap
        v = float(gap @ c) + self.noise_std**2
        if v == 0.0:
            return np.zeros_like(theta)
        x, y = self.sample(1, rng)
        residual = float(y[0] - x[0] @ theta)
        mean_square = v * rng.chisquare(n) / n
        return -(c / v * mean_square + math.sqrt(mean_square / n) * (x[0] - c / v * residual))


def simulate_moment_aggregate(
    server: MomentServer, population: Population, n_users: int, rng: np.random.Generator
) -> SparseFit:
    """What `server` would find from n users: one draw of the averages. O(d^3)."""
    d = server.protocol.n_features
    covariance, cross = population.sample_moments(n_users, rng)
    noise_covariance, noise_cross = (s / math.sqrt(n_users) for s in server.noise_scales)
    triangle = np.triu_indices(d)
    upper = covariance[triangle] + noise_covariance * rng.standard_normal(len(triangle[0]))
    return server.solve([upper, cross + noise_cross * rng.standard_normal(d)], n_users)


def simulate_gradient_aggregate(
    server: ThresholdingServer, population: Population, n_users: int, rng: np.random.Generator
) -> SparseFit:
    """All remaining rounds of `server`, floor(n / T) users each. O(T d^2)."""
    (release,) = server.protocol.releases
    m = n_users // server.protocol.n_rounds
    check_count("n_users // n_rounds", m)
    while not server.finished:
        gradient = population.sample_mean_gradient(server.theta, m, rng)
        noise = release.noise_scale / math.sqrt(m) * rng.standard_normal(server.protocol.n_features)
        server.close_round(gradient + noise, m)
    return server.result()
