"""The same fit as a scikit-learn estimator: ridge-regularised local linear regression with a Gaussian kernel."""

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from locally.checks import check_positive
from locally.sequence.local_linear_attention.passes import guard
from locally.sequence.local_linear_attention.solvers import Options, Report, solve
from locally.sequence.local_linear_attention.strips import STRIP_ENTRIES, strip_of


class LocalLinearRegressor(RegressorMixin, BaseEstimator):
    """Predicts with the intercept of a weighted linear fit around each query, weights exp(-|x - x_i|^2 / (2 h^2)).

    Parameters
    ----------
    bandwidth : float, default=1.0
        h > 0, in the units of X.
    ridge : float, default=1e-6
        Penalty on the squared norm of the slope, > 0, relative to the sum of the weights and in the units of X squared.

    Attributes
    ----------
    n_features_in_ : int

    References
    ----------
    arXiv 2510.01450; Fan and Gijbels, Local Polynomial Modelling and Its Applications (1996).

    Examples
    --------
    >>> X = np.linspace(0, 1, 50)[:, None]
    >>> model = LocalLinearRegressor(bandwidth=0.1).fit(X, 2 * X[:, 0] + 1)
    >>> model.predict([[0.0], [1.0]]).round(3)
    array([1., 3.])
    """

    def __init__(self, bandwidth: float = 1.0, ridge: float = 1e-6) -> None:
        self.bandwidth = bandwidth
        self.ridge = ridge

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike) -> "LocalLinearRegressor":
        """Keep the samples: all work is in `predict`. ValueError if X, y or a parameter is unfit."""
        check_positive("bandwidth", self.bandwidth)
        check_positive("ridge", self.ridge)
        features, targets = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        self._X, self._y = features, np.asarray(targets, np.float64)
        return self

    def predict(self, X: ArrayLike) -> Float[ndarray, "m *outputs"]:
        """The intercepts of the local fits at the rows of X, in units of y.

        Queries are taken in blocks, so that memory does not grow with m n.
        """
        check_is_fitted(self, "_X")
        at: ndarray = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))
        wide = self._y.reshape(len(self._y), -1)
        centre = self._X.mean(0)
        keys, values = torch.from_numpy(self._X - centre), torch.from_numpy(wide)
        rows = max(1, STRIP_ENTRIES // len(keys))
        parts = [
            self._predict_block(torch.from_numpy(at[start : start + rows] - centre), keys, values)
            for start in range(0, len(at), rows)
        ]
        return torch.cat(parts).numpy().reshape(len(at), *self._y.shape[1:])

    def _predict_block(
        self, queries: Float[Tensor, "m d"], keys: Float[Tensor, "n d"], values: Float[Tensor, "n outputs"]
    ) -> Float[Tensor, "m outputs"]:
        logits = torch.cdist(queries, keys).square().div_(-2 * self.bandwidth**2)
        shift, ones = logits.amax(-1), torch.ones(len(queries), dtype=queries.dtype)
        weights = logits.sub_(shift.unsqueeze(-1)).exp_()
        rows = (queries, queries, ones, shift, self.ridge * ones)
        strip = strip_of(weights.unsqueeze(0), keys.unsqueeze(0), *(x.unsqueeze(0) for x in rows))
        rho = solve(strip, strip.mu, Options("cholesky", tol=1e-12, max_iter=10 * keys.shape[1]), Report())
        numerators = strip.weights * (1 - strip.project(rho))
        return (numerators @ values / guard(numerators.sum(-1, keepdim=True))).squeeze(0)
