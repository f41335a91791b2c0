"""Design matrices, dense or sparse, with an intercept column that is never stored."""

from typing import Any, no_type_check

import numpy as np
from jaxtyping import Float
from numba import njit
from numpy import ndarray
from scipy.sparse import csr_array, issparse

CHUNK = 2**18  # numbers in a block of scaled rows, small enough to stay in a core's cache


class Design:
    """X, or [X, 1], with n rows and k columns.

    Args:
        X: (n, d) in double precision, an array or anything sparse.
        intercept: append the column of ones.
    """

    def __init__(self, X: Any, intercept: bool) -> None:
        self.X: Any = X
        self.sparse = issparse(X)
        if self.sparse:
            if hasattr(X, "check_format"):  # of compressed formats, whose indices SciPy takes on trust
                X.check_format(full_check=True)
            self.X = csr_array(X)
            self.X.sort_indices()  # the kernel fills one half, which takes columns in order
        self.intercept = intercept
        self.n, self.d = self.X.shape
        self.k = self.d + intercept

    def forward(self, theta: Float[ndarray, "... k"]) -> Float[ndarray, "n ..."]:
        """[X, 1] theta for one vector, or for each of several rows."""
        z = self.X @ theta[..., : self.d].T
        return z + theta[..., self.d] if self.intercept else z

    def adjoint(self, r: Float[ndarray, "n ..."]) -> Float[ndarray, "... k"]:
        """[X, 1]^T r."""
        out = np.empty((*r.shape[1:], self.k))
        out[..., : self.d] = (self.X.T @ r).T
        if self.intercept:
            out[..., self.d] = r.sum(axis=0)
        return out

    def gram(self, weights: Float[ndarray, " n"]) -> Float[ndarray, "k k"]:
        """[X, 1]^T diag(weights) [X, 1]; twice as fast for dense X where no weight is negative.

        n k^2 flops for dense X, the sum of the rows' squared numbers of entries for sparse.
        """
        out = np.zeros((self.k, self.k))
        square = out[: self.d, : self.d]
        if self.sparse:
            add_sparse_gram(self.X.indptr, self.X.indices, self.X.data, weights, square)
        else:
            self._add_dense_gram(weights, square)
        if self.intercept:
            out[self.d, : self.d] = out[: self.d, self.d] = self.X.T @ weights
            out[self.d, self.d] = weights.sum()
        return out

    def squares(self, weights: Float[ndarray, " n"]) -> Float[ndarray, " k"]:
        """The diagonal of `gram`."""
        X2 = self.X.power(2) if self.sparse else self.X**2
        return np.append(X2.T @ weights, weights.sum() if self.intercept else [])

    def _add_dense_gram(self, weights: ndarray, out: ndarray) -> None:
        definite = not weights.size or weights.min() >= 0
        scale = np.sqrt(weights) if definite else weights
        rows = max(256, CHUNK // max(self.d, 1))
        for start in range(0, self.n, rows):
            X = self.X[start : start + rows]
            scaled = scale[start : start + rows, None] * X
            # NumPy sees that the second is the transpose of the first, and computes one half only
            out += scaled.T @ scaled if definite else scaled.T @ X


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check  # before a run-time shape checker wraps what is to be compiled
def add_sparse_gram(indptr, indices, data, weights, out):
    """out += X^T diag(weights) X for X in CSR with ascending columns; `out` comes in as zeros."""
    for i in range(weights.size):
        start, stop = np.uintp(indptr[i]), np.uintp(indptr[i + 1])  # unsigned: no test for negative indices
        for a in range(start, stop):
            value = weights[i] * data[a]
            row = np.uintp(indices[a])
            for b in range(a, stop):
                out[row, np.uintp(indices[b])] += value * data[b]
    for i in range(out.shape[0]):
        for j in range(i):
            out[i, j] = out[j, i]
