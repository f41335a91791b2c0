"""k-medoids on a matrix of dissimilarities: clusters whose centres are simulations that were run.

With the sine dissimilarity the cost is the sum of the errors of one-mode bases spanned by the medoids: the clustering
minimises what the bases are for. Source: arXiv 2103.13683; partitioning around medoids with the exchange rules of
arXiv 2008.05171 (FastPAM, FasterPAM).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from locally.checks import check_choice, check_count, check_nonnegative, check_square
from locally.subspaces.local_bases.swaps import build, inspect, swap

RandomState = int | np.random.RandomState | None
TOLERANCE = 1e-12


class Status(StrEnum):
    """How an exchange of medoids ended; set by the clusterings of this room."""

    CONVERGED = "converged: no exchange of a medoid lowers the cost"
    ITERATION_LIMIT = "iteration limit"


@dataclass(frozen=True)
class Medoids:
    """Attributes:
    indices: (k,) which points are medoids.
    labels: (n,) position in `indices` of each point's medoid.
    cost: sum of dissimilarities to the own medoid.
    swaps, sweeps: exchanges made, passes over all candidates.
    """

    indices: Int[ndarray, " k"]
    labels: Int[ndarray, " n"]
    cost: float
    status: Status
    swaps: int
    sweeps: int


def k_medoids(
    D: Float[ndarray, "n n"],
    start: int | Int[ndarray, " k"],
    *,
    rule: Literal["eager", "best"] = "eager",
    max_iter: int = 300,
    tol: float = TOLERANCE,
) -> Medoids:
    """Exchange medoids from one start until no exchange helps.

    Args:
        D: D[i, j] is the cost of representing point i by j: finite, non-negative, symmetric or not.
        start: the number of medoids, chosen by BUILD, or their distinct indices.
        rule: "eager" takes every exchange that lowers the cost as soon as it is seen (FasterPAM), "best" the best of
            each sweep (PAM). Both end where no single exchange helps.
        max_iter: sweeps.
        tol: the least decrease that counts.

    O(n^2) a sweep whatever the number of medoids; BUILD O(n^2 k).

    >>> D = np.abs(np.subtract.outer([0.0, 1.0, 2.0, 10.0, 11.0], [0.0, 1.0, 2.0, 10.0, 11.0]))
    >>> found = k_medoids(D, 2)
    >>> found.labels, found.cost
    (array([0, 0, 0, 1, 1]), 3.0)
    """
    check_choice("rule", rule, ("eager", "best"))
    check_count("max_iter", max_iter)
    check_nonnegative("tol", tol)
    costs = candidate_rows(D)
    if isinstance(start, ndarray):
        medoids = np.asarray(start, dtype=np.int64)
        _check_start(medoids, len(costs))
    else:
        check_clusters(start, len(costs))
        medoids = build(costs, int(start))
    return _exchanged(costs, medoids, rule, max_iter, tol)


def candidate_rows(D: Float[ndarray, "n n"]) -> Float[ndarray, "n n"]:
    """D transposed, without a copy where it is symmetric: row j holds the costs of candidate j.

    Raises:
        ValueError: not square, NaN or infinity, a negative entry.
    """
    check_square("D", D)
    if D.dtype not in (np.float64, np.float32):
        D = D.astype(np.float64)
    fault, symmetric = inspect(D)
    if fault:
        raise ValueError("D holds NaN or infinity" if fault == 1 else "D must not have negative entries")
    return np.ascontiguousarray(D if symmetric else D.T)


def check_clusters(n_clusters: int, n: int) -> None:
    check_count("n_clusters", n_clusters)
    if n_clusters > n:
        raise ValueError(f"n_clusters={n_clusters} must not exceed the number of points, but n_samples={n}")


def _check_start(medoids: Int[ndarray, " k"], n: int) -> None:
    if medoids.ndim != 1 or medoids.size == 0 or np.unique(medoids).size != medoids.size:
        raise ValueError("start must be distinct indices of points")
    if medoids.min() < 0 or medoids.max() >= n:
        raise ValueError(f"start must hold indices of {n} points, got {medoids.min()} to {medoids.max()}")


def _exchanged(
    costs: Float[ndarray, "n n"], medoids: Int[ndarray, " k"], rule: str, max_iter: int, tol: float
) -> Medoids:
    indices, labels, cost, swaps, sweeps, converged = swap(costs, medoids, rule == "eager", max_iter, tol)
    status = Status.CONVERGED if converged else Status.ITERATION_LIMIT
    return Medoids(indices, labels, float(cost), status, int(swaps), int(sweeps))


class KMedoids(ClusterMixin, BaseEstimator):
    """k-medoids (PAM) from several starts.

    Parameters
    ----------
    n_clusters : at most the number of points.
    metric : "precomputed", then X is the matrix of dissimilarities; "sine" or "euclidean", then X is (n, features).
    n_init : random starts besides BUILD; the lowest cost of all is kept.
    rule : "eager" (FasterPAM) or "best" (PAM), see `k_medoids`.
    max_iter : sweeps a start may take.
    random_state : of the random starts.
    callback : called as callback(start, cost) after each start; an exception from it interrupts.

    Attributes
    ----------
    labels_, medoid_indices_, inertia_ : cluster of each point, points that are medoids, cost.
    cluster_centers_ : rows of X at the medoids, where X holds features.
    n_iter_, status_ : sweeps and status of the start that was kept.

    Examples
    --------
    >>> X = np.array([[1.0, 0.0], [-100.0, 0.1], [0.0, 1.0], [0.1, -100.0]])
    >>> KMedoids(n_clusters=2, metric="sine", random_state=0).fit(X).labels_.tolist()
    [0, 0, 1, 1]
    """

    def __init__(
        self,
        n_clusters: int = 8,
        metric: str = "precomputed",
        n_init: int = 10,
        rule: str = "eager",
        max_iter: int = 300,
        random_state: RandomState = None,
        callback: Callable[[int, float], None] | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric = metric
        self.n_init = n_init
        self.rule = rule
        self.max_iter = max_iter
        self.random_state = random_state
        self.callback = callback

    def fit(self, X: Any, y: Any = None) -> "KMedoids":
        """Medoids of the rows of X, of the lowest cost over all starts; `y` is ignored. O(n^2) a sweep for n points.

        Raises
        ------
        ValueError, TypeError : a parameter or X is unfit.

        Warns
        -----
        ConvergenceWarning : the best start stopped at `max_iter` sweeps; `status_` says so too.
        """
        check_choice("metric", self.metric, ("precomputed", "sine", "euclidean"))
        check_choice("rule", self.rule, ("eager", "best"))
        check_count("n_init", self.n_init, at_least=0)
        check_count("max_iter", self.max_iter)
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        check_clusters(self.n_clusters, len(X))
        costs = candidate_rows(X if self.metric == "precomputed" else self._dissimilarities(X, X))
        rng = check_random_state(self.random_state)
        best = None
        for start in range(self.n_init + 1):
            random = lambda: rng.choice(len(X), self.n_clusters, replace=False).astype(np.int64)
            medoids = build(costs, self.n_clusters) if start == 0 else random()
            found = _exchanged(costs, medoids, self.rule, self.max_iter, TOLERANCE)
            if best is None or found.cost < best.cost - TOLERANCE:
                best = found
            if self.callback is not None:
                self.callback(start, found.cost)
        assert best is not None
        order = np.argsort(best.indices)  # one numbering, whichever start found these medoids
        self.medoid_indices_ = best.indices[order]
        self.labels_ = np.argsort(order)[best.labels]
        self.inertia_, self.n_iter_, self.status_ = best.cost, best.sweeps, best.status
        if self.metric != "precomputed":
            self.cluster_centers_ = X[self.medoid_indices_]
        if best.status is Status.ITERATION_LIMIT:
            warnings.warn(f"k-medoids stopped at max_iter={self.max_iter} sweeps", ConvergenceWarning, stacklevel=2)
        return self

    def predict(self, X: Any) -> Int[ndarray, " k"]:
        """The nearest medoid; with precomputed dissimilarities X is (new points, points fitted)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        if self.metric == "precomputed":
            return X[:, self.medoid_indices_].argmin(axis=1)
        return self._dissimilarities(X, self.cluster_centers_).argmin(axis=1)

    def _dissimilarities(self, X: Float[ndarray, "n d"], Y: Float[ndarray, "k d"]) -> Float[ndarray, "n k"]:
        from scipy.spatial.distance import cdist

        from locally.subspaces.local_bases.dissimilarity import spans_of, subspace_distances
        from locally.subspaces.local_bases.snapshots import SnapshotSet

        if self.metric == "euclidean":
            return cdist(X, Y)
        left = spans_of(SnapshotSet(X))
        return subspace_distances(left, left if Y is X else spans_of(SnapshotSet(Y)))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.metric == "precomputed"
        return tags
