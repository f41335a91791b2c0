"""Kernel regression with the kernels of wide networks, as a scikit-learn estimator."""

import math
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from locally.checks import check_choice, check_nonnegative
from locally.tangent.kernel.dynamics import KernelFlow, early_stopping, ensemble, posterior
from locally.tangent.kernel.network import InfiniteNetwork


class NTKRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """What an ensemble of infinitely wide networks predicts after training for a time t on the squared loss.

    For a few thousand examples: the fit takes O(n^2 (d + depth) + n^3). Source: Jacot et al., arXiv 1806.07572,
    Section 5, and Lee et al., arXiv 1902.06720.

    Parameters
    ----------
    network : InfiniteNetwork or None
        The architecture; None is a ReLU network with `depth` hidden layers.
    depth : int, default 2
        Of the default network.
    mode : {"ntk", "nngp"}
        All layers trained, or only the last one (a Gaussian process with the network's covariance).
    t : float or "loo", default infinity
        Training time, one unit a step of gradient descent with rate 1 on |f - y|^2 / (2 n); "loo" chooses by
        leaving one example out. Only for mode "ntk".
    alpha : float, default 1e-6
        Ridge, in multiples of the mean of the kernel's diagonal, >= 0.
    image_shape : (channels, height, width) or None
        Shape of each row of X for convolutional networks.

    Attributes
    ----------
    t_ : float
        The training time used.
    flow_ : KernelFlow
        Eigenpairs of the training kernel.
    y_mean_ : ndarray
        Mean of the targets, which is not learnt but added.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> model = NTKRegressor().fit(X, np.sin(3 * X[:, 0]))
    >>> mean, std = model.predict(X[:2] + 0.05, return_std=True)
    >>> bool(np.abs(mean - np.sin(3 * (X[:2, 0] + 0.05))).max() < 0.05), std.shape
    (True, (2,))
    """

    def __init__(
        self,
        network: InfiniteNetwork | None = None,
        *,
        depth: int = 2,
        mode: Literal["ntk", "nngp"] = "ntk",
        t: float | Literal["loo"] = math.inf,
        alpha: float = 1e-6,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.network = network
        self.depth = depth
        self.mode = mode
        self.t = t
        self.alpha = alpha
        self.image_shape = image_shape

    def fit(self, X: Any, y: Any) -> "NTKRegressor":
        """Compute and decompose the kernel; y is (n,) or (n, outputs)."""
        check_choice("mode", self.mode, ("ntk", "nngp"))
        check_nonnegative("alpha", self.alpha)
        if self.t != "loo" and (not isinstance(self.t, Real) or not self.t >= 0):
            raise ValueError(f't must be a time >= 0, infinity or "loo", got {self.t!r}')
        if self.mode == "nngp" and self.t != math.inf:
            raise ValueError(f't must be infinity for mode "nngp", got {self.t!r}')
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self.network_ = InfiniteNetwork.mlp(self.depth) if self.network is None else self.network
        self.X_ = self._shaped(X)
        targets = np.asarray(y, np.float64).reshape(len(X), -1)
        self._flat_y = np.ndim(y) == 1
        self.y_mean_ = targets.mean(axis=0)
        kernels = self.network_.kernel(self.X_)
        self.nngp_train_ = kernels.nngp
        K = kernels.ntk if self.mode == "ntk" else kernels.nngp
        self.flow_ = KernelFlow(K, targets - self.y_mean_, ridge=self.alpha)
        self.t_ = early_stopping(self.flow_).best if self.t == "loo" else float(self.t)
        return self

    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False) -> Any:
        """Mean, and the standard deviation (m,) or covariance (m, m) over networks, the same for every output."""
        if return_std and return_cov:
            raise ValueError("return_std and return_cov exclude each other")
        check_is_fitted(self)
        X = self._shaped(validate_data(self, X, reset=False, dtype=np.float64))
        cross = self.network_.kernel(X, self.X_)
        K = cross.ntk if self.mode == "ntk" else cross.nngp
        if not (return_std or return_cov):
            return self._outputs(self.flow_.test(self.t_, K))
        prior = self.network_.nngp(X)
        if self.mode == "nngp":
            mean, covariance = posterior(self.flow_, K, prior)
        else:
            mean, covariance = ensemble(self.flow_, self.t_, K, self.nngp_train_, cross.nngp, prior)
        spread = covariance if return_cov else np.sqrt(np.maximum(np.diag(covariance), 0))
        return self._outputs(mean), spread

    def _outputs(self, mean: ndarray) -> ndarray:
        mean = mean + self.y_mean_
        return mean[:, 0] if self._flat_y else mean

    def _shaped(self, X: ndarray) -> ndarray:
        if self.image_shape is None:
            return X
        if math.prod(self.image_shape) != X.shape[1]:
            raise ValueError(f"image_shape {self.image_shape} does not have the {X.shape[1]} features of X")
        return X.reshape(len(X), *self.image_shape)
