"""Learning rate, bonus and ridge as the theorems set them, and the factors by which practice departs from them.

Source: arXiv 2301.12942, Algorithms 1 to 3, and arXiv 2107.08346 for the dilated-bonus Hedge.
"""

import math
from dataclasses import dataclass
from typing import Literal

from locally.checks import check_between, check_choice, check_count, check_nonnegative, check_positive

Method = Literal["log_barrier", "magnitude_reduced", "dilated_hedge"]
METHODS = ("log_barrier", "magnitude_reduced", "dilated_hedge")


@dataclass(frozen=True)
class Parameters:
    """eta: learning rate; beta: weight of the bonus; gamma: ridge of the covariances."""

    eta: float
    beta: float
    gamma: float

    def __post_init__(self) -> None:
        check_positive("eta", self.eta)
        check_nonnegative("beta", self.beta)
        check_positive("gamma", self.gamma)

    @classmethod
    def of(
        cls,
        method: Method,
        *,
        n_actions: int,
        dim: int,
        horizon: int,
        n_episodes: int,
        eta_scale: float = 1.0,
        beta_scale: float = 1.0,
        gamma: float | None = None,
        gamma_scale: float = 1.0,
    ) -> "Parameters":
        """The rates of the theorems in K, d, A and H, times scales.

        The regret of the first two methods is at most of the order of A ln K H / eta (ln A H / eta) + 6 beta d H K +
        gamma d H^3 K / beta, under beta >= 4 eta H^2, which pays for the variance, and gamma >= 12 eta beta H^2, which
        keeps eta B below 1 / (2 H). With equality in both,

            log_barrier        eta = sqrt(A ln K / (d K)) / H^2
            magnitude_reduced  eta = sqrt(ln A / (d K)) / H^2
            dilated_hedge      eta = K^(-2/3) / H, beta = 0.3 H K^(-1/3), gamma = K^(-1/3) / 2  (Luo et al., 2021)

        The theorems' constants are far too cautious at every K that fits on a machine. Scales are chosen at one small K
        and kept; the dependence on K stays the theorem's. beta = beta_scale 4 eta H^2 follows the scaled eta.

        Args:
            gamma: the ridge itself, in place of gamma_scale times the theorem's.

        Raises:
            TypeError, ValueError: an argument is out of range.

        >>> Parameters.of("dilated_hedge", n_actions=6, dim=5, horizon=3, n_episodes=1000).gamma.__round__(3)
        0.05
        """
        check_choice("method", method, METHODS)
        sizes = {"n_actions": n_actions, "dim": dim, "horizon": horizon, "n_episodes": n_episodes}
        for name, size in sizes.items():
            check_count(name, size)
        for name, scale in {"eta_scale": eta_scale, "gamma_scale": gamma_scale}.items():
            check_positive(name, scale)
        check_nonnegative("beta_scale", beta_scale)
        A, d, H, K = n_actions, dim, horizon, n_episodes
        if method == "dilated_hedge":
            eta = eta_scale * K ** (-2 / 3) / H
            beta = beta_scale * 0.3 * H * K ** (-1 / 3)
            ridge = gamma_scale * 0.5 * K ** (-1 / 3)
        else:
            complexity = A * max(math.log(K), 1.0) if method == "log_barrier" else math.log(max(A, 2))
            eta = eta_scale * math.sqrt(complexity / (d * K)) / H**2
            beta = beta_scale * 4 * eta * H**2
            ridge = gamma_scale * 12 * eta * (4 * eta * H**2) * H**2  # a scaled-down bonus leaves the ridge as it is
        return cls(eta, beta, ridge if gamma is None else gamma)


@dataclass(frozen=True)
class EpochParameters:
    """Of Algorithm 3, as for `LinearMDPOptimizer`."""

    epoch: int
    cover_episodes: int
    explore: float
    known_up_to: float
    eta: float
    beta: float
    gamma: float
    ridge: float

    @classmethod
    def of(
        cls,
        *,
        n_actions: int,
        dim: int,
        horizon: int,
        n_episodes: int,
        epoch: int | None = None,
        cover_episodes: int | None = None,
        explore: float | None = None,
        known_up_to: float | None = None,
        eta_scale: float = 1.0,
        beta_scale: float = 1.0,
        gamma: float | None = None,
        ridge: float = 1.0,
    ) -> "EpochParameters":
        """Epochs of K^(1/3) episodes, a twentieth of all for the cover, and the rates that go with them.

        Raises:
            TypeError, ValueError: an argument is out of range.

        >>> EpochParameters.of(n_actions=6, dim=5, horizon=3, n_episodes=8000).epoch
        20
        """
        sizes = {"n_actions": n_actions, "dim": dim, "horizon": horizon, "n_episodes": n_episodes}
        for name, size in sizes.items():
            check_count(name, size)
        A, d, H, K = n_actions, dim, horizon, n_episodes
        W = max(2, math.ceil(round(K ** (1 / 3), 9))) if epoch is None else epoch
        check_count("epoch", W, at_least=2)
        cover = min(K, max(50, math.ceil(0.05 * K))) if cover_episodes is None else cover_episodes
        check_count("cover_episodes", cover)
        check_between("cover_episodes", cover, 1, K)
        share = min(0.5, K ** (-1 / 9)) if explore is None else explore
        check_between("explore", share, 0, 1)
        alpha = float(d) if known_up_to is None else known_up_to
        check_positive("known_up_to", alpha)
        check_positive("eta_scale", eta_scale)
        check_nonnegative("beta_scale", beta_scale)
        regularisation = d * math.log(max(d * K, 3)) / W if gamma is None else gamma
        check_positive("gamma", regularisation)
        check_positive("ridge", ridge)
        eta = eta_scale * math.sqrt(A * W * max(math.log(K), 1.0) / (d * K)) / H**2
        return cls(W, cover, share, alpha, eta, beta_scale * 4 * eta * H**2, regularisation, ridge)
