"""What runs on the server: reports in, sparse coefficients out. It never sees a record.

`MomentServer` serves the two one-shot protocols of arXiv 2310.07367 (Algorithm 1 and its public-feature variant),
`ThresholdingServer` the interactive one (Algorithm 2). Memory does not depend on the number of reports.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_choice, check_count, check_finite, check_nonnegative, check_positive, check_shape
from locally.privacy.regression.protocols import (
    Budget,
    GradientProtocol,
    MomentProtocol,
    NonInteractiveProtocol,
    symmetric,
)
from locally.privacy.regression.reports import Rejection, Tally, encode_request
from locally.privacy.regression.theory import users_for_definite_covariance
from locally.privacy.regression.thresholding import (
    Solution,
    Status,
    hard_threshold,
    noise_threshold,
    project_on_ball,
    solve_sparse,
)

Ask = Callable[[bytes], Iterable[bytes]]


@dataclass(frozen=True)
class SparseFit:
    """What a server has learnt.

    Attributes:
        coef: the estimate.
        status: SOLVED, or why the estimate deserves less trust.
        budget: privacy that one report cost its user.
        accepted, rejected: how many reports were averaged, and how many were not, by reason.
        noise: standard deviation per coordinate that privacy noise alone gives the unthresholded estimate where the
            features are standardised and uncorrelated (moments), or the mean gradient of the last round (interactive).
        raw: the estimate before soft thresholding; of the last round, before hard thresholding.
        threshold: soft-threshold level; 0 where hard thresholding was used.
        min_eigenvalue: of the covariance that was solved with; NaN where none was.
        users_needed: users from which on the noisy covariance can be expected to be definite (0: no noise in it).
        path: iterates of the interactive protocol, a row each round.
    """

    coef: Float[ndarray, " d"]
    status: Status
    budget: Budget
    accepted: int
    rejected: Mapping[Rejection, int]
    noise: float
    raw: Float[ndarray, " d"]
    threshold: float = 0.0
    min_eigenvalue: float = math.nan
    users_needed: int = 0
    path: Float[ndarray, "rounds d"] = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def support(self) -> Int[ndarray, " s"]:
        """Indices of the nonzero coefficients."""
        return np.flatnonzero(self.coef)


class MomentServer:
    """Averages one-shot reports and solves for a sparse vector.

    Args:
        protocol: a `MomentProtocol`, or a `PublicFeatureProtocol` together with `public_X`.
        public_X: m >= d unlabelled feature vectors that are not private.
        threshold: soft-threshold level, or "auto": the level of the noise (`noise_threshold`), which needs no data.
        threshold_constant: multiple of the automatic level.
        theta_bound: bound on ||theta||_2 that the automatic level assumes.
        inverse_bound: guess of ||Sigma^{-1}||_inf; 1 for standardised features; "public" takes it from public_X.
        on_indefinite: what to do where the noise made the covariance indefinite: "warn", "raise" or "clip".
        floor: smallest eigenvalue after "clip".

    Raises:
        ValueError: public_X is missing, superfluous, too narrow or rank-deficient, or a parameter is out of range.
    """

    def __init__(
        self,
        protocol: NonInteractiveProtocol,
        public_X: Float[ndarray, "m d"] | None = None,
        *,
        threshold: float | str = "auto",
        threshold_constant: float = 1.0,
        theta_bound: float = 1.0,
        inverse_bound: float | str = 1.0,
        on_indefinite: str = "warn",
        floor: float = 0.1,
    ) -> None:
        if not isinstance(protocol, NonInteractiveProtocol):
            raise TypeError(f"protocol must be a one-shot protocol, got {type(protocol).__name__}")
        check_choice("on_indefinite", on_indefinite, ("warn", "raise", "clip"))
        if isinstance(threshold, str):
            check_choice("threshold", threshold, ("auto",))
        else:
            check_nonnegative("threshold", threshold)
        if isinstance(inverse_bound, str):
            check_choice("inverse_bound", inverse_bound, ("public",))
            if public_X is None:
                raise ValueError('inverse_bound may be "public" only where there is a public_X')
        else:
            check_positive("inverse_bound", inverse_bound)
        check_positive("threshold_constant", threshold_constant)
        check_positive("theta_bound", theta_bound)
        check_positive("floor", floor)
        self.protocol = protocol
        self.public_covariance = self._public_covariance(public_X)
        self.threshold = threshold
        self.threshold_constant = threshold_constant
        self.theta_bound = theta_bound
        self.inverse_bound = self._inverse_bound(inverse_bound)
        self.on_indefinite = on_indefinite
        self.floor = floor
        self.tally = Tally(protocol)

    def receive(self, report: bytes) -> Rejection | None:
        """Take in one report as it arrives; the reason if it is rejected."""
        return self.tally.add(report)

    def merge(self, other: "MomentServer") -> None:
        """Take over what another server of the same protocol has received; exact in any order."""
        self.tally.merge(other.tally)

    def fit(self, reports: Iterable[bytes]) -> SparseFit:
        """Take in any number of reports in one pass, then `result()`. O(width) a report, O(d^2) memory."""
        self.tally.extend(reports)
        return self.result()

    def result(self) -> SparseFit:
        """The estimate from what has been received so far. O(d^3)."""
        n = self.tally.accepted
        if n < self.reports_needed:
            nothing = np.zeros(self.protocol.n_features)
            return self._fit(n, Solution(nothing, nothing, Status.TOO_FEW_REPORTS, math.nan), 0.0, math.inf)
        return self.solve(self.tally.means(), n)

    def solve(self, means: list[Float[ndarray, " _"]], n_users: int) -> SparseFit:
        """Steps 3 and 4 of Algorithm 1 on the means of what n users sent."""
        if self.public_covariance is None:
            covariance = symmetric(means[0], self.protocol.n_features)
        else:
            covariance = self.public_covariance
        level = self.soft_level(n_users)
        found = solve_sparse(covariance, means[-1], level, self.on_indefinite, self.floor)
        noise_covariance, noise_cross = self.noise_scales
        noise = math.hypot(noise_covariance * self.theta_bound, noise_cross) / math.sqrt(n_users)
        return self._fit(n_users, found, level, noise)

    @property
    def reports_needed(self) -> int:
        """Fewer reports than unknowns cannot make a covariance, noise or not."""
        return self.protocol.n_features if self.public_covariance is None else 1

    def _fit(self, n: int, found: Solution, threshold: float, noise: float) -> SparseFit:
        noise_covariance, _ = self.noise_scales
        d = self.protocol.n_features
        return SparseFit(
            found.coef,
            found.status,
            self.protocol.budget,
            accepted=n,
            rejected=dict(self.tally.rejected),
            noise=noise,
            raw=found.raw,
            threshold=threshold,
            min_eigenvalue=found.min_eigenvalue,
            users_needed=users_for_definite_covariance(noise_covariance, d) if noise_covariance else 0,
        )

    @property
    def noise_scales(self) -> tuple[float, float]:
        """Noise of one user in an entry of x x^T (0 where it is not sent) and of x y."""
        *covariance, cross = (r.noise_scale for r in self.protocol.releases)
        return (covariance[0] if covariance else 0.0), cross

    def soft_level(self, n_users: int) -> float:
        """The soft-threshold level for that many users: `threshold`, or the level of the noise by `noise_threshold`."""
        if not isinstance(self.threshold, str):
            return float(self.threshold)
        noise_covariance, noise_cross = self.noise_scales
        return noise_threshold(
            noise_covariance,
            noise_cross,
            n_users,
            self.protocol.n_features,
            self.theta_bound,
            self.inverse_bound,
            self.threshold_constant,
        )

    def _public_covariance(self, public_X: Float[ndarray, "m d"] | None) -> Float[ndarray, "d d"] | None:
        d = self.protocol.n_features
        if isinstance(self.protocol, MomentProtocol):
            if public_X is not None:
                raise ValueError("public_X must be None where users send their own second moments")
            return None
        if public_X is None:
            raise ValueError("public_X must hold public feature vectors for this protocol, got None")
        check_shape("public_X", public_X, (None, d))
        check_finite("public_X", public_X)
        if np.linalg.matrix_rank(public_X) < d:
            raise ValueError(f"public_X must have full column rank {d}, got {np.linalg.matrix_rank(public_X)}")
        public_X = public_X.astype(np.float64)
        return public_X.T @ public_X / len(public_X)

    def _inverse_bound(self, inverse_bound: float | str) -> float:
        if not isinstance(inverse_bound, str):
            return inverse_bound
        assert self.public_covariance is not None
        return float(np.abs(np.linalg.inv(self.public_covariance)).sum(axis=1).max())


class ThresholdingServer:
    """Private iterative hard thresholding: one group of users a round, each asked once.

    Args:
        protocol: what clients agreed to.
        step: eta, in (0, 1 / largest eigenvalue of the features' covariance].
        min_reports: a round with fewer accepted reports leaves the iterate as it was and says so in the status.
        start: iterate to start from (warm start), sparse and in the ball.
    """

    def __init__(
        self,
        protocol: GradientProtocol,
        *,
        step: float = 0.5,
        min_reports: int = 1,
        start: Float[ndarray, " d"] | None = None,
    ) -> None:
        if not isinstance(protocol, GradientProtocol):
            raise TypeError(f"protocol must be a GradientProtocol, got {type(protocol).__name__}")
        check_positive("step", step)
        check_count("min_reports", min_reports)
        self.protocol = protocol
        self.step = step
        self.min_reports = min_reports
        self.theta = np.zeros(protocol.n_features) if start is None else start.astype(np.float64)
        protocol.check_iterate(self.theta)
        self.raw = self.theta.copy()
        self.path: list[Float[ndarray, " d"]] = []
        self.round_number = 0
        self.accepted = 0
        self.rejected: Counter[Rejection] = Counter()
        self.starved = 0  # rounds with too few reports
        self._last_accepted = 0
        self.tally = Tally(protocol, 0)

    @property
    def finished(self) -> bool:
        """Whether all rounds are over."""
        return self.round_number >= self.protocol.n_rounds

    def request(self) -> bytes:
        """What to send to the users of the current round. RuntimeError when all rounds are over."""
        if self.finished:
            raise RuntimeError(f"all {self.protocol.n_rounds} rounds are over")
        return encode_request(self.protocol, self.round_number, self.theta)

    def receive(self, report: bytes) -> Rejection | None:
        """Take in one report of the current round; the reason if it is rejected."""
        return self.tally.add(report)

    def close_round(
        self, mean_gradient: Float[ndarray, " d"] | None = None, n_users: int | None = None
    ) -> Float[ndarray, " d"]:
        """End the round with a step on the mean gradient of its reports; the new iterate.

        theta <- P_ball(H_k'(theta - eta gradient)): keep the k' largest entries, project on the ball. A simulation may
        name the mean gradient and how many users it stands for.
        """
        if self.finished:
            raise RuntimeError(f"all {self.protocol.n_rounds} rounds are over")
        n = self.tally.accepted if n_users is None else n_users
        if n >= self.min_reports:
            gradient = self.tally.means()[0] if mean_gradient is None else mean_gradient
            self.raw = self.theta - self.step * gradient
            self.theta = project_on_ball(hard_threshold(self.raw, self.protocol.sparsity), self.protocol.theta_bound)
        else:
            self.starved += 1
        self.path.append(self.theta)
        self.accepted += n
        self._last_accepted = n
        self.rejected += self.tally.rejected
        self.round_number += 1
        self.tally = Tally(self.protocol, min(self.round_number, self.protocol.n_rounds - 1))
        return self.theta

    def fit(self, ask: Ask, callback: Callable[[int, Float[ndarray, " d"]], None] | None = None) -> SparseFit:
        """Run the remaining rounds: `ask(request)` returns the reports of users who have not been asked before.

        `callback(round, theta)` sees every iterate. O(d) a report.
        """
        while not self.finished:
            self.tally.extend(ask(self.request()))
            self.close_round()
            if callback is not None:
                callback(self.round_number, self.theta)
        return self.result()

    def result(self) -> SparseFit:
        """The current iterate and how it came about."""
        (release,) = self.protocol.releases
        starved = self.starved or not self.path
        return SparseFit(
            self.theta,
            Status.TOO_FEW_REPORTS if starved else Status.SOLVED,
            budget=self.protocol.budget,
            accepted=self.accepted,
            rejected=dict(self.rejected),
            noise=release.noise_scale / math.sqrt(self._last_accepted) if self._last_accepted else math.inf,
            raw=self.raw,
            path=np.array(self.path).reshape(len(self.path), self.protocol.n_features),
        )
