"""scikit-learn estimators: the protocols simulated on a table, and the closed-form estimator without privacy.

`fit(X, y)` plays every user and the server in one process, a report for each row, to see what a protocol would deliver.
With a `random_state` the noise is repeatable and the reports are therefore not private. Source: arXiv 2310.07367.
"""

import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from locally.checks import check_nonnegative
from locally.privacy.regression.client import Crowd
from locally.privacy.regression.protocols import (
    Beyond,
    Calibration,
    GradientProtocol,
    MomentProtocol,
    NonInteractiveProtocol,
    PublicFeatureProtocol,
)
from locally.privacy.regression.samplers import Noise, SecureNoise, SimulatedNoise
from locally.privacy.regression.server import MomentServer, SparseFit, ThresholdingServer
from locally.privacy.regression.thresholding import soft_threshold, solve_sparse

RandomState = int | np.random.Generator | np.random.RandomState | None


class _LinearModel(RegressorMixin, BaseEstimator):
    """predict(X) = X @ coef_; there is no intercept, since a centre would have to be learnt privately too."""

    def predict(self, X: Any) -> Float[ndarray, " n"]:
        """X @ coef_, in units of y; NotFittedError before `fit`."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return X @ self.coef_

    def _table(self, X: Any, y: Any, reset: bool = True) -> tuple[Float[ndarray, "n d"], Float[ndarray, " n"]]:
        X, y = validate_data(self, X, y, reset=reset, dtype=np.float64, y_numeric=True)
        return X, y.astype(np.float64)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # privacy needs far more rows than a test table has
        return tags

    def _keep(self, found: SparseFit) -> None:
        self.fit_result_ = found
        self.coef_ = found.coef
        self.support_ = found.support
        self.budget_ = found.budget
        self.status_ = found.status


class NLDPSparseRegression(_LinearModel):
    """NLDP-LR: non-interactive sparse linear regression under local differential privacy, simulated.

    Parameters
    ----------
    epsilon : privacy of each row's one report, positive.
    delta : in (0, 1); None with calibration="pure".
    radius, clip_x, clip_y : bounds on ||x||_2, |x_j| and |y|, or "auto": sqrt(d log n), sqrt(log n), sqrt(log n) of the
        paper, which suit standardised data. They must not be chosen by looking at private rows.
    beyond : "clip" rows to the bounds (`n_clipped_` says how many) or "refuse" them (OutOfBounds).
    threshold : soft-threshold level, or "auto" for the level of the noise.
    threshold_constant : multiple of the automatic level.
    calibration : "joint", "analytic" (the paper's split of the budget), "classical" (its constants) or "pure".
    theta_bound : bound on the l2 norm of the coefficients that the automatic threshold assumes.
    public_X : unlabelled features that are not private; users then send x y only, and the error loses a factor sqrt(d).
    on_indefinite : "warn", "raise" or "clip" where the noise made the covariance indefinite.
    floor : smallest eigenvalue after "clip".
    random_state : None for cryptographic noise; anything else is repeatable and warns that it is not private.

    Attributes
    ----------
    coef_, support_ : estimate and its nonzero entries.
    fit_result_ : the server's `SparseFit`; status_, threshold_, min_eigenvalue_, budget_ come from it.
    n_users_, n_clipped_ : rows, and how many were beyond the bounds.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((200_000, 4))
    >>> y = X @ [0.8, 0.0, 0.0, -0.6] + 0.1 * rng.standard_normal(200_000)
    >>> model = NLDPSparseRegression(epsilon=8.0, public_X=rng.standard_normal((2_000, 4))).fit(X, y)
    >>> bool(np.linalg.norm(model.coef_ - [0.8, 0.0, 0.0, -0.6]) < 0.6)
    True
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        delta: float | None = 1e-6,
        radius: float | str = "auto",
        clip_x: float | str = "auto",
        clip_y: float | str = "auto",
        beyond: str = "clip",
        threshold: float | str = "auto",
        threshold_constant: float = 1.0,
        calibration: str = "joint",
        theta_bound: float = 1.0,
        public_X: Any = None,
        on_indefinite: str = "warn",
        floor: float = 0.1,
        random_state: RandomState = None,
    ) -> None:
        self.epsilon = epsilon
        self.delta = delta
        self.radius = radius
        self.clip_x = clip_x
        self.clip_y = clip_y
        self.beyond = beyond
        self.threshold = threshold
        self.threshold_constant = threshold_constant
        self.calibration = calibration
        self.theta_bound = theta_bound
        self.public_X = public_X
        self.on_indefinite = on_indefinite
        self.floor = floor
        self.random_state = random_state

    def protocol(self, n_users: int, n_features: int) -> NonInteractiveProtocol:
        """The protocol that n users would agree to; its JSON goes to their devices."""
        options = {"delta": self.delta, "calibration": Calibration(self.calibration), "beyond": Beyond(self.beyond)}
        options |= declared(clip_x=self.clip_x, clip_y=self.clip_y)
        if self.public_X is not None:
            return PublicFeatureProtocol.for_users(n_users, n_features, self.epsilon, **options)
        return MomentProtocol.for_users(n_users, n_features, self.epsilon, **options, **declared(radius=self.radius))

    def server(self, protocol: NonInteractiveProtocol) -> MomentServer:
        """The server of this protocol with the estimator's own settings; it has seen no report yet."""
        public_X = None if self.public_X is None else np.asarray(self.public_X, dtype=np.float64)
        return MomentServer(
            protocol,
            public_X,
            threshold=self.threshold,
            threshold_constant=self.threshold_constant,
            theta_bound=self.theta_bound,
            on_indefinite=self.on_indefinite,
            floor=self.floor,
        )

    def fit(self, X: Any, y: Any) -> "NLDPSparseRegression":
        """Every row reports once, the server solves. O(n d^2), or O(n d) with public features.

        Raises
        ------
        ValueError : a parameter is out of range, or there are fewer rows than unknowns and no public features.
        """
        X, y = self._table(X, y)
        n, d = X.shape
        protocol = self.protocol(n, d)
        if self.public_X is None and n < d:
            raise ValueError(f"X must have at least as many rows (users) as columns: got n_samples = {n}, {d} columns")
        server = self.server(protocol)
        crowd = Crowd(protocol, noise_source(self.random_state))
        for payload in crowd.payloads(X, y):
            server.tally.add_payloads(payload)
        found = server.result()
        self.n_users_, self.n_clipped_ = n, crowd.clipped
        self.threshold_, self.min_eigenvalue_ = found.threshold, found.min_eigenvalue
        self._keep(found)
        return self


class LDPIterativeHardThresholding(_LinearModel):
    """LDP-IHT: sequentially interactive sparse regression under pure local differential privacy, simulated.

    Parameters
    ----------
    epsilon : privacy of each row's one report, positive; delta is 0.
    sparsity : coefficients to keep.
    n_rounds : groups that the rows are split into, in their order; "auto" is ceil(log n).
    step : in (0, 1 / largest eigenvalue of the features' covariance].
    clip_x, clip_y : bounds on |x_j| and |y|, or "auto": sqrt(log n).
    beyond : "clip" rows to the bounds or "refuse" them.
    theta_bound : bound on the l2 norm of the coefficients; iterates are projected on that ball.
    warm_start : continue from `coef_`.
    random_state : None for cryptographic noise; anything else is repeatable and warns that it is not private.

    Attributes
    ----------
    coef_, support_, path_ : estimate, its nonzero entries, and the iterate after every round.
    fit_result_, status_, budget_ : of the server.
    n_users_, n_clipped_ : rows that reported, and how many of them were beyond the bounds. Rows that are left when the
        others are split into equal groups do not report.
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        sparsity: int = 1,
        n_rounds: int | str = "auto",
        step: float = 0.5,
        clip_x: float | str = "auto",
        clip_y: float | str = "auto",
        beyond: str = "clip",
        theta_bound: float = 1.0,
        warm_start: bool = False,
        random_state: RandomState = None,
    ) -> None:
        self.epsilon = epsilon
        self.sparsity = sparsity
        self.n_rounds = n_rounds
        self.step = step
        self.clip_x = clip_x
        self.clip_y = clip_y
        self.beyond = beyond
        self.theta_bound = theta_bound
        self.warm_start = warm_start
        self.random_state = random_state

    def protocol(self, n_users: int, n_features: int) -> GradientProtocol:
        """The protocol that n users would agree to."""
        options = declared(clip_x=self.clip_x, clip_y=self.clip_y, n_rounds=self.n_rounds)
        return GradientProtocol.for_users(
            n_users,
            n_features,
            self.epsilon,
            self.sparsity,
            beyond=Beyond(self.beyond),
            theta_bound=self.theta_bound,
            **options,
        )

    def fit(self, X: Any, y: Any) -> "LDPIterativeHardThresholding":
        """T rounds over T disjoint groups of floor(n / T) rows. O(n d).

        Raises
        ------
        ValueError : a parameter is out of range, or there are fewer rows than rounds.
        """
        X, y = self._table(X, y)
        n, d = X.shape
        protocol = self.protocol(n, d)
        size = n // protocol.n_rounds
        if not size:
            raise ValueError(f"X must have a row (user) for each of {protocol.n_rounds} rounds, got n_samples = {n}")
        start = self.coef_ if self.warm_start and hasattr(self, "coef_") else None
        self.__dict__.pop("_server", None)  # a later partial_fit begins a protocol of its own
        server = ThresholdingServer(protocol, step=self.step, start=start)
        crowd = Crowd(protocol, noise_source(self.random_state))
        for t in range(protocol.n_rounds):
            group = slice(t * size, (t + 1) * size)
            play_round(server, crowd, X[group], y[group])
        return self._finish(server, crowd)

    def partial_fit(self, X: Any, y: Any) -> "LDPIterativeHardThresholding":
        """One round with the rows of X, who must be users that have not reported yet.

        The protocol is fixed by the first call. Where `n_rounds` or a bound is "auto" it follows from n = len(y), and
        "auto" rounds mean as many as ceil(log n).
        """
        first = not hasattr(self, "_server")
        X, y = self._table(X, y, reset=first)
        if first:
            protocol = self.protocol(len(y), X.shape[1])
            self._server = ThresholdingServer(protocol, step=self.step)
            self._crowd = Crowd(protocol, noise_source(self.random_state))
        play_round(self._server, self._crowd, X, y)
        return self._finish(self._server, self._crowd)

    def _finish(self, server: ThresholdingServer, crowd: Crowd) -> "LDPIterativeHardThresholding":
        found = server.result()
        self.path_ = found.path
        self.n_users_, self.n_clipped_ = crowd.reports_sent, crowd.clipped
        self._keep(found)
        return self


class ElementarySparseRegression(_LinearModel):
    """The closed-form estimator behind NLDP-LR, without privacy: least squares, then soft thresholding.

    Exactly the vector of smallest l1 norm within `threshold` of least squares in every coordinate; one factorisation
    instead of a lasso path. Where n < d the covariance is thresholded entry by entry first.

    Parameters
    ----------
    threshold : level, or "auto": sigma sqrt(2 log d / n) with sigma from the residuals of least squares.
    covariance_threshold : level for the off-diagonal entries of the covariance, or "auto": 0 where n >= d, otherwise
        sqrt(log d / n) times the largest variance.

    Attributes
    ----------
    coef_, support_, threshold_, status_

    Examples
    --------
    >>> X = np.random.default_rng(0).standard_normal((500, 20))
    >>> model = ElementarySparseRegression().fit(X, X @ np.eye(20)[3] + 0.1)
    >>> int(abs(model.coef_).argmax())
    3
    """

    def __init__(self, threshold: float | str = "auto", covariance_threshold: float | str = "auto") -> None:
        self.threshold = threshold
        self.covariance_threshold = covariance_threshold

    def fit(self, X: Any, y: Any) -> "ElementarySparseRegression":
        """O(n d^2 + d^3)."""
        X, y = self._table(X, y)
        n, d = X.shape
        for name in ("threshold", "covariance_threshold"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise ValueError(f'{name} must be a number or "auto", got {value!r}')
            if not isinstance(value, str):
                check_nonnegative(name, value)
        covariance, cross = X.T @ X / n, X.T @ y / n
        level = self.covariance_threshold
        if isinstance(level, str):
            level = 0.0 if n >= d else math.sqrt(math.log(max(d, 2)) / n) * float(covariance.diagonal().max())
        if level:
            variances = covariance.diagonal().copy()
            covariance = soft_threshold(covariance, level)
            np.fill_diagonal(covariance, variances)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a singular table gets the least-norm solution and says so in status_
            raw = solve_sparse(covariance, cross, 0.0)
        if isinstance(self.threshold, str):
            residual = float(np.sum((y - X @ raw.coef) ** 2)) / max(n - d, 1)
            self.threshold_ = math.sqrt(residual * 2 * math.log(max(d, 2)) / n)
        else:
            self.threshold_ = float(self.threshold)
        self.coef_ = soft_threshold(raw.coef, self.threshold_)
        self.support_ = np.flatnonzero(self.coef_)
        self.status_ = raw.status
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = False
        return tags


def declared(**parameters: Any) -> dict[str, Any]:
    """The parameters that are not "auto"."""
    for name, value in parameters.items():
        if isinstance(value, str) and value != "auto":
            raise ValueError(f'{name} must be a number or "auto", got {value!r}')
    return {name: value for name, value in parameters.items() if not isinstance(value, str)}


def noise_source(random_state: RandomState) -> Noise:
    """Cryptographic noise for None, repeatable noise (and its warning) for anything else."""
    if random_state is None:
        return SecureNoise()
    if isinstance(random_state, np.random.RandomState):
        random_state = int(random_state.randint(2**31))
    return SimulatedNoise(random_state)


def play_round(server: ThresholdingServer, crowd: Crowd, X: Float[ndarray, "m d"], y: Float[ndarray, " m"]) -> None:
    """One round of the interactive protocol with the rows of X as users."""
    for payload in crowd.payloads(X, y, server.request()):
        server.tally.add_payloads(payload)
    server.close_round()
