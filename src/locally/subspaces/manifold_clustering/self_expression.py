"""Sparse subspace clustering: every sample written by a few others, affinities from the coefficients.

What a reader would otherwise use once an embedding is there. Sources: orthogonal matching pursuit, arXiv 1507.01238;
elastic net with an active set, arXiv 1605.02633.
"""

from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.linear_model import lars_path_gram
from sklearn.utils.validation import validate_data

from locally.checks import check_between, check_choice, check_count, check_nonnegative, check_positive
from locally.subspaces.manifold_clustering.spectral import spectral_labels


def matching_pursuit_coefficients(
    X: Float[ndarray, "n d"], n_nonzero: int = 5, tol: float = 1e-6, chunk: int = 1024
) -> sp.csr_array:
    """Row i: at most `n_nonzero` other samples, chosen greedily, whose combination is nearest to sample i.

    Args:
        X: finite, no row of zeros; rows are scaled to length one.
        n_nonzero: at least 1; no more than n - 1 and d are used.
        tol: a sample stops when its residual is not longer than this.
        chunk: samples worked on together.

    Returns:
        Coefficients (n, n) with a zero diagonal. O(n^2 d n_nonzero), in products of matrices.

    Raises:
        ValueError: a row of X is zero, or a parameter is out of range.

    >>> C = matching_pursuit_coefficients(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), n_nonzero=1)
    >>> C.toarray().round(3)[0]
    array([0., 1., 0., 0.])
    """
    check_count("n_nonzero", n_nonzero)
    check_nonnegative("tol", tol)
    check_count("chunk", chunk)
    X = unit_rows(X)
    n, d = X.shape
    most = min(n_nonzero, n - 1, d)
    parts = [_pursue(X, np.arange(at, min(at + chunk, n)), most, tol) for at in range(0, n, chunk)]
    rows, columns, values = (np.concatenate(p) for p in zip(*parts))
    return sp.coo_array((values, (rows, columns)), shape=(n, n)).tocsr()


def _pursue(X: Float[ndarray, "n d"], rows: Any, most: int, tol: float) -> tuple[ndarray, ndarray, ndarray]:
    """Orthogonal matching pursuit of all `rows` at once; a row that is done leaves."""
    chosen = np.empty((len(rows), 0), np.int64)
    found: list[tuple[ndarray, ndarray, ndarray]] = []
    active, residual = rows, X[rows]
    values = np.empty((len(rows), 0))
    for _ in range(most):
        match = np.abs(residual @ X.T)
        np.put_along_axis(match, np.c_[active, chosen], -1.0, axis=1)  # neither itself nor one that it has
        chosen = np.c_[chosen, match.argmax(1)]
        atoms = X[chosen]
        gram = atoms @ atoms.transpose(0, 2, 1)
        values = (np.linalg.pinv(gram, hermitian=True) @ (atoms @ X[active][:, :, None]))[:, :, 0]
        residual = X[active] - np.einsum("nk,nkd->nd", values, atoms)
        done = np.linalg.norm(residual, axis=1) <= tol
        if done.any():
            found.append(_entries(active[done], chosen[done], values[done]))
            active, chosen, values, residual = active[~done], chosen[~done], values[~done], residual[~done]
        if not len(active):
            break
    found.append(_entries(active, chosen, values))
    rows, columns, entries = (np.concatenate(p) for p in zip(*found))
    return rows, columns, entries


def _entries(rows: ndarray, chosen: ndarray, values: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    return np.repeat(rows, chosen.shape[1]), chosen.ravel(), values.ravel()


def elastic_net_coefficients(
    X: Float[ndarray, "n d"], gamma: float = 50.0, tau: float = 0.9, *, active: int = 50, max_rounds: int = 50
) -> sp.csr_array:
    """Row i minimises tau |c|_1 + (1 - tau) / 2 |c|^2 + gamma / 2 |x_i - X'c|^2 over c with c_i = 0.

    Each problem is solved exactly, by scikit-learn's LARS, on an active set that starts from the nearest samples and
    grows by those that violate the optimality conditions, |<x_j, residual>| <= tau / gamma, until none does.

    Args:
        X: finite, no row of zeros; rows are scaled to length one.
        gamma: weight of the residual, positive; below tau / max |<x_i, x_j>| a row stays empty.
        tau: share of the 1-norm, in (0, 1].
        active: size of the first active set, at least 1.
        max_rounds: of growing it, at least 1.

    Returns:
        Coefficients (n, n) with a zero diagonal.

    Raises:
        ValueError: a row of X is zero, or a parameter is out of range.

    >>> C = elastic_net_coefficients(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]))
    >>> C.toarray().round(3)[0]  # (1 - tau / gamma) / (1 + (1 - tau) / gamma)
    array([0.  , 0.98, 0.  , 0.  ])
    """
    check_positive("gamma", gamma)
    check_between("tau", tau, 1e-6, 1)
    check_count("active", active)
    check_count("max_rounds", max_rounds)
    X = unit_rows(X)
    n = len(X)
    first = min(active, n - 1)
    threshold = tau / gamma
    rows, columns, values = [], [], []
    for i in range(n):
        nearness = X @ X[i]
        match = np.abs(nearness)
        match[i] = -1.0
        support = np.argpartition(-match, first - 1)[:first]
        for _ in range(max_rounds):
            used, atoms = support, X[support]
            gram = atoms @ atoms.T
            gram[np.diag_indices_from(gram)] += (1 - tau) / gamma
            coefficients = lars_path_gram(
                nearness[support], gram, n_samples=1, alpha_min=threshold, method="lasso", return_path=False
            )[2]
            kept = coefficients != 0
            match = np.abs(X @ (X[i] - coefficients @ atoms))
            match[support] = 0.0
            match[i] = 0.0
            violated = np.flatnonzero(match > threshold * (1 + 1e-6))
            if not len(violated):
                break
            worst = violated[np.argsort(-match[violated])[:first]]
            support = np.concatenate([support[kept], worst])
        rows.append(np.full(int(kept.sum()), i))
        columns.append(used[kept])
        values.append(coefficients[kept])
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return sp.coo_array(entries, shape=(n, n)).tocsr()


class SparseSubspaceClustering(ClusterMixin, BaseEstimator):
    """Spectral clustering of |C| + |C'|, C the self-expressive coefficients of the samples.

    Args:
        n_clusters: at most the number of samples.
        method: "omp" or "elastic net".
        n_nonzero, tol: of matching pursuit.
        gamma, tau: of the elastic net.
        random_state: of k-means.

    Attributes:
        labels_: cluster of every sample.
        coefficients_: CSR (n, n).
        n_features_in_: features of X.

    >>> rng = np.random.default_rng(0)
    >>> lines = np.r_[np.outer(rng.uniform(1, 2, 20), [1, 0, 0]), np.outer(rng.uniform(1, 2, 20), [0, 1, 1])]
    >>> labels = SparseSubspaceClustering(2, random_state=0).fit_predict(lines)
    >>> labels.reshape(2, 20).std(axis=1)
    array([0., 0.])
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        method: str = "omp",
        n_nonzero: int = 5,
        tol: float = 1e-6,
        gamma: float = 50.0,
        tau: float = 0.9,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.method = method
        self.n_nonzero = n_nonzero
        self.tol = tol
        self.gamma = gamma
        self.tau = tau
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "SparseSubspaceClustering":
        """Cluster X (n, features); y is ignored.

        Raises:
            ValueError: X holds NaN, infinity or a row of zeros, fewer samples than clusters, or a bad parameter.
        """
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        check_count("n_clusters", self.n_clusters)
        check_choice("method", self.method, ("omp", "elastic net"))
        if self.n_clusters > len(X):
            raise ValueError(f"n_clusters must be at most n_samples={len(X)}, got {self.n_clusters}")
        if self.method == "omp":
            self.coefficients_ = matching_pursuit_coefficients(X, self.n_nonzero, self.tol)
        else:
            self.coefficients_ = elastic_net_coefficients(X, self.gamma, self.tau)
        affinity = abs(self.coefficients_)
        self.labels_ = spectral_labels((affinity + affinity.T).tocsr(), self.n_clusters, self.random_state)
        return self


def unit_rows(X: Float[ndarray, "n d"]) -> Float[ndarray, "n d"]:
    lengths = np.linalg.norm(X, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise ValueError("X holds NaN or infinity")
    if not lengths.all():
        raise ValueError(f"X must have no row of zeros, but row {int(np.flatnonzero(lengths.ravel() == 0)[0])} is one")
    return X / lengths
