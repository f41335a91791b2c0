"""Losse: random projections, softly binned on many small grids, as a scikit-learn transformer.

An input touches 2^grid_dim nodes of every grid and no other: two inputs share features to the degree that they are
close, and none at all when they are far apart. Source: arXiv 2401.13034, section 3.
"""

from typing import Any, Literal, no_type_check

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numba import njit
from numpy import ndarray
from scipy.special import expit
from scipy.stats import truncnorm
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from locally.checks import check_choice, check_count, check_finite, check_positive, check_shape

LARGEST_CODE = 2**31 - 1  # nodes are numbered in 32 bits where their pairs are stored
Projection = Literal["truncnorm", "normal"] | ndarray
Scale = float | int | ndarray | list[float | int] | tuple[float | int, ...]


class LosseEncoder(TransformerMixin, BaseEstimator):
    """Locality-sensitive sparse codes: project, squash into (0, 1), interpolate multilinearly between grid nodes.

    With P fixed at random, u = sigmoid(x P) is cut into `n_grids` points of dimension `grid_dim`; each lies in one cell
    of a grid with `n_bins` cells a side, and its code is the weights with which multilinear interpolation would mix the
    corners of that cell. The values of one grid are not negative and sum to one, and the code is continuous in x.

    Inputs should be standardised, or scaled to [-1, 1], once and for all.

    Args:
        n_grids: kappa, at least 1.
        grid_dim: rho, dimensions of a grid, in 1 ... 8; a code has 2^rho entries a grid.
        n_bins: lambda, cells a side, at least 1.
        scale: multiplies the projection; one positive number, or one for each input.
        projection: "truncnorm" draws N(0, 1) cut at two, times 1 / sqrt(n_inputs), as the authors do; "normal" draws
            N(0, 1); an array (n_inputs, grid_dim * n_grids) is used as it is, column j * n_grids + g being dimension j
            of grid g.
        binning: "soft", or "hard": the one cell that holds the point, which is tile coding.
        random_state: of the projection.

    Attributes:
        projection_: (n_inputs, grid_dim * n_grids).
        n_codes_: D, length of a code: kappa (lambda + 1)^rho nodes, or kappa lambda^rho cells with hard binning.
        n_active_: K, stored entries of a code: kappa 2^rho, or kappa.
        n_features_in_: number of inputs.

    Raises:
        ValueError, TypeError: an argument is out of range, or D exceeds 2^31 - 1.

    Complexity: O(n_inputs kappa rho + kappa rho 2^rho) an input.

    References: arXiv 2401.13034, section 3.

    >>> X = np.array([[0.0], [0.5]])
    >>> encoder = LosseEncoder(n_grids=1, grid_dim=1, n_bins=4, projection=np.array([[1.0]])).fit(X)
    >>> encoder.transform(X).toarray().round(3)
    array([[0.  , 0.  , 1.  , 0.  , 0.  ],
           [0.  , 0.  , 0.51, 0.49, 0.  ]])
    """

    def __init__(
        self,
        n_grids: int = 50,
        grid_dim: int = 2,
        n_bins: int = 5,
        *,
        scale: Scale = 1.0,
        projection: Any = "truncnorm",
        binning: str = "soft",
        random_state: Any = None,
    ) -> None:
        self.n_grids = n_grids
        self.grid_dim = grid_dim
        self.n_bins = n_bins
        self.scale = scale
        self.projection = projection
        self.binning = binning
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "LosseEncoder":
        """Draw the projection for inputs as wide as X (n, n_inputs); nothing is learnt from the values of X."""
        X = validate_data(self, X, dtype=np.float64)
        self._check_grids()
        nodes = self.n_bins + (self.binning == "soft")
        self.n_codes_ = self.n_grids * nodes**self.grid_dim
        self.n_active_ = self.n_grids * (2**self.grid_dim if self.binning == "soft" else 1)
        if self.n_codes_ > LARGEST_CODE:
            raise ValueError(
                f"n_grids * {nodes}**grid_dim must be at most {LARGEST_CODE}, got {self.n_codes_}: "
                "take fewer bins or smaller grids"
            )
        self.projection_ = self._project_at_random(X.shape[1])
        return self

    def _check_grids(self) -> None:
        check_count("n_grids", self.n_grids)
        check_count("grid_dim", self.grid_dim)
        if self.grid_dim > 8:
            raise ValueError(f"grid_dim must be at most 8, got {self.grid_dim}: a code has 2**grid_dim entries a grid")
        check_count("n_bins", self.n_bins)
        check_choice("binning", self.binning, ("soft", "hard"))

    def _project_at_random(self, n_inputs: int) -> Float[ndarray, "n_inputs columns"]:
        shape = (n_inputs, self.grid_dim * self.n_grids)
        if isinstance(self.projection, str):
            check_choice("projection", self.projection, ("truncnorm", "normal"))
            rng = check_random_state(self.random_state)
            if self.projection == "truncnorm":
                P = truncnorm.rvs(-2, 2, size=shape, random_state=rng) / np.sqrt(n_inputs)
            else:
                P = rng.standard_normal(shape)
        else:
            P = np.array(self.projection, dtype=np.float64)
            check_shape("projection", P, shape)
            check_finite("projection", P)
        if np.ndim(self.scale) == 0:
            check_positive("scale", self.scale)  # type: ignore[arg-type]
            return P * self.scale
        scale = np.array(self.scale, dtype=np.float64)
        check_shape("scale", scale, (n_inputs,))
        for value in scale.tolist():
            check_positive("scale", value)
        return P * scale[:, None]

    def encode(self, X: Any) -> tuple[Int[ndarray, "n K"], Float[ndarray, "n K"]]:
        """Indices of the active nodes, ascending and distinct, and their values.

        Grid by grid; within a grid the corners in C order, the last dimension fastest.

        Args:
            X: (n, n_inputs), finite.

        Raises:
            ValueError: X has another width than the fitted one, or holds NaN or infinity.
        """
        check_is_fitted(self)
        return self._encode(read_inputs(self, X))

    def _encode(self, X: Float[ndarray, "n n_inputs"]) -> tuple[Int[ndarray, "n K"], Float[ndarray, "n K"]]:
        U = expit(X @ self.projection_)
        if np.isnan(U.sum()):  # infinity minus infinity; the loops below index by what they find
            raise ValueError("X must be small enough for its projections to be finite")
        U *= self.n_bins
        indices = np.empty((len(X), self.n_active_), np.int64)
        values = np.empty((len(X), self.n_active_))
        if self.binning == "soft":
            _soft_bins(U, self.n_grids, self.grid_dim, self.n_bins, indices, values)
        else:
            _hard_bins(U, self.n_grids, self.grid_dim, self.n_bins, indices)
            values[:] = 1.0
        return indices, values

    def transform(self, X: Any) -> sp.csr_array:
        """Codes as a sparse matrix (n, D) with K entries a row."""
        indices, values = self.encode(X)
        n, K = indices.shape
        return sp.csr_array((values.ravel(), indices.ravel(), np.arange(n + 1) * K), shape=(n, self.n_codes_))


class RandomReLU(TransformerMixin, BaseEstimator):
    """Dense random features max(0, [x, 1] P), P drawn from N(0, scale^2): the untrained layer that Losse competes with.

    Args:
        n_components: length of a code, at least 1.
        scale: standard deviation of weights and biases, positive.
        random_state: of the weights.

    >>> RandomReLU(3, random_state=0).fit_transform(np.ones((1, 2))).round(2)
    array([[4.96, 2.12, 0.  ]])
    """

    def __init__(self, n_components: int = 100, *, scale: float = 1.0, random_state: Any = None) -> None:
        self.n_components = n_components
        self.scale = scale
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "RandomReLU":
        """Draw the weights for inputs as wide as X (n, n_inputs)."""
        X = validate_data(self, X, dtype=np.float64)
        check_count("n_components", self.n_components)
        check_positive("scale", self.scale)
        rng = check_random_state(self.random_state)
        self.weights_ = self.scale * rng.standard_normal((X.shape[1] + 1, self.n_components))
        return self

    def transform(self, X: Any) -> Float[ndarray, "n components"]:
        """The codes max(0, [x, 1] P) of all rows; NotFittedError before `fit`."""
        check_is_fitted(self)
        X = read_inputs(self, X)
        return np.maximum(X @ self.weights_[:-1] + self.weights_[-1], 0)


def take_over(estimator: Any, fresh: Any) -> None:
    """Everything fitted, and nothing else, from another estimator of the same arguments."""
    arguments = estimator.get_params(deep=False)
    for name in [n for n in vars(estimator) if n not in arguments]:
        delattr(estimator, name)
    for name, value in vars(fresh).items():
        if name not in arguments:
            setattr(estimator, name, value)


def read_inputs(estimator: Any, X: Any) -> Float[ndarray, "n n_inputs"]:
    """X as scikit-learn checks it, by a short cut where nothing is to be converted: streams come a row at a time."""
    ready = (
        type(X) is ndarray
        and X.dtype == np.float64
        and X.ndim == 2
        and X.shape[1] == estimator.n_features_in_
        and len(X)
    )
    if ready and np.isfinite(X).all():
        return X
    return validate_data(estimator, X, dtype=np.float64, reset=False)


@njit(cache=True, nogil=True)
@no_type_check
def _soft_bins(H, n_grids, grid_dim, n_bins, indices, values):
    """Corners of the cells that hold the points H (n, grid_dim * n_grids), dimension-major, in units of bins."""
    nodes = n_bins + 1
    corners = 2**grid_dim
    grid_size = nodes**grid_dim
    for r in range(H.shape[0]):
        for g in range(n_grids):
            at = g * corners
            indices[r, at] = g * grid_size
            values[r, at] = 1.0
            filled = 1
            stride = grid_size
            for j in range(grid_dim):
                h = H[r, j * n_grids + g]
                # a point on the last border belongs to the last cell, not to one outside
                i = min(int(h), n_bins - 1)
                o = h - i
                stride //= nodes
                for c in range(filled - 1, -1, -1):  # each corner so far splits in two, in C order
                    index, value = indices[r, at + c] + i * stride, values[r, at + c]
                    indices[r, at + 2 * c] = index
                    values[r, at + 2 * c] = value * (1.0 - o)
                    indices[r, at + 2 * c + 1] = index + stride
                    values[r, at + 2 * c + 1] = value * o
                filled *= 2


@njit(cache=True, nogil=True)
@no_type_check
def _hard_bins(H, n_grids, grid_dim, n_bins, indices):
    for r in range(H.shape[0]):
        for g in range(n_grids):
            index = g
            for j in range(grid_dim):
                index = index * n_bins + min(int(H[r, j * n_grids + g]), n_bins - 1)
            indices[r, g] = index
