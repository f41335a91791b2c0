"""What all regressors on labelled environments share: rows or moments in, checks, and predictions out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from locally.causal.invariance.moments import EnvironmentMoments, TooFewEnvironments, TooFewRows

Regressor = TypeVar("Regressor", bound="EnvironmentRegressor")


class EnvironmentRegressor(RegressorMixin, BaseEstimator, ABC):
    """y ~ X @ coef_ + intercept_, learnt from several environments.

    A subclass names `fit_intercept` and `standardize` among its parameters and fits moments in `_fit`.
    """

    fit_intercept: bool
    standardize: bool

    def fit(self: Regressor, X: Any, y: Any, environments: Any) -> Regressor:
        """Learn from rows.

        Args:
            X: (n, d) covariates.
            y: (n,) target.
            environments: (n,) the label of each row's environment.

        Raises:
            TooFewEnvironments, TooFewRows, ConstantColumn, SingularCovariance: all of them ValueErrors.
            ValueError: NaN or infinity, lengths that differ.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        moments = EnvironmentMoments.from_rows(
            X, y.astype(np.float64), environments, intercept=self.fit_intercept, standardize=self.standardize
        )
        return self._learn(moments)

    def fit_environments(self: Regressor, pairs: Iterable[tuple[Any, Any]]) -> Regressor:
        """The same from a list of (X_e, y_e), labelled 0, 1, ... in this order."""
        return self.fit(*stack_environments(pairs))

    def fit_moments(
        self: Regressor, covariances: Float[ndarray, "N p p"], target: int, rows: Any = math.inf
    ) -> Regressor:
        """The same from a covariance matrix of (covariates, Y) for each environment.

        Args:
            covariances: one symmetric matrix an environment.
            target: index of Y in them; the other columns keep their order.
            rows: how many rows are behind each matrix; infinite for population moments.
        """
        moments = EnvironmentMoments.from_covariances(covariances, target, rows=rows, standardize=self.standardize)
        self.n_features_in_ = moments.features
        return self._learn(moments)

    def predict(self, X: Any) -> Float[ndarray, " n"]:
        """X @ coef_ + intercept_; NotFittedError before `fit`."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return X @ self.coef_ + self.intercept_

    def _learn(self: Regressor, moments: EnvironmentMoments) -> Regressor:
        if len(moments) < 2:
            raise TooFewEnvironments("environments must be at least 2: in a single one every subset is invariant")
        need = self._rows_needed(moments.features)
        if (short := np.flatnonzero(moments.rows < need)).size:
            at = int(short[0])
            raise TooFewRows(
                f"environment {moments.labels[at]!r} has {moments.rows[at]:g} rows, but candidates with up to "
                f"{need - 1} coefficients need at least {need} in each"
            )
        self.moments_ = moments
        self.environments_ = moments.labels
        self._fit(moments)
        return self

    def _rows_needed(self, features: int) -> int:
        return features + self.fit_intercept + 1

    @abstractmethod
    def _fit(self, moments: EnvironmentMoments) -> None:
        """Set the fitted attributes from moments in standard units, coefficients by `_keep`."""

    def _keep(self, v: Float[ndarray, " d"]) -> None:
        """Coefficients in the units of the data from those in standard units."""
        moments = self.moments_
        scale, centre = moments.scale, moments.centre
        slopes = v[moments.has_constant :]
        self.coef_ = slopes * scale[-1] / scale[:-1]
        offset = scale[-1] * v[0] if moments.has_constant else 0.0
        self.intercept_ = float(centre[-1] + offset - centre[:-1] @ self.coef_)
        self.risk_ = float(moments.risks(v).mean() * scale[-1] ** 2)

    def _predictor(self) -> Float[ndarray, " d"]:
        """The fitted predictor in standard units."""
        check_is_fitted(self)
        scale, centre = self.moments_.scale, self.moments_.centre
        slopes = self.coef_ * scale[:-1] / scale[-1]
        if not self.moments_.has_constant:
            return slopes
        offset = (self.intercept_ - centre[-1] + centre[:-1] @ self.coef_) / scale[-1]
        return np.append(offset, slopes)

    def _like(self, X: Any, y: Any, environments: Any) -> EnvironmentMoments:
        """Moments of other rows, centred and scaled as the training rows were."""
        check_is_fitted(self)
        X, y = validate_data(self, X, y, reset=False, dtype=np.float64, y_numeric=True)
        return self.moments_.like_rows(X, y.astype(np.float64), environments)


def stack_environments(
    pairs: Iterable[tuple[Any, Any]],
) -> tuple[Float[ndarray, "n d"], Float[ndarray, " n"], ndarray]:
    """X, y and labels 0, 1, ... from a list of (X_e, y_e).

    Raises:
        ValueError: no pair, or widths or lengths that differ, naming the environment.

    >>> X, y, environments = stack_environments([(np.ones((2, 1)), np.ones(2)), (np.zeros((1, 1)), np.zeros(1))])
    >>> environments
    array([0, 0, 1])
    """
    tables: list[ndarray] = []
    targets: list[ndarray] = []
    for e, (X_e, y_e) in enumerate(pairs):
        X_e, y_e = np.asarray(X_e, dtype=np.float64), np.asarray(y_e, dtype=np.float64)
        if X_e.ndim != 2 or y_e.shape != X_e.shape[:1]:
            raise ValueError(f"environment {e}: X must be (n, d) and y (n,), got {X_e.shape} and {y_e.shape}")
        if tables and X_e.shape[1] != tables[0].shape[1]:
            raise ValueError(f"environment {e}: X has {X_e.shape[1]} columns, the others {tables[0].shape[1]}")
        tables.append(X_e)
        targets.append(y_e)
    if not tables:
        raise TooFewEnvironments("environments must be at least 2, got none")
    labels = np.repeat(np.arange(len(tables)), [len(t) for t in tables])
    return np.concatenate(tables), np.concatenate(targets), labels
