"""Inner products of solution spaces, and the coordinates in which they are Euclidean.

With M = F F^T the map u -> F^T u turns <u, v> = u^T M v into the dot product, so that every factorisation afterwards is
a plain one and keeps all its digits. Snapshots are rows throughout: whitening is `rows @ F`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import splu, spsolve_triangular

from locally.checks import check_finite, check_shape, check_symmetric

Product = Any  # None, positive weights, a dense or sparse symmetric positive definite matrix, a pyMOR matrix operator
Rows = Float[ndarray, "rows n_dof"]


@dataclass(frozen=True)
class InnerProduct:
    """The Euclidean inner product; `inner_product` makes the others."""

    n_dof: int

    def apply(self, rows: Rows) -> Rows:
        """rows @ M"""
        return rows

    def whiten(self, rows: Rows) -> Rows:
        """Rows whose Euclidean inner products are those of `rows` in M."""
        return rows

    def unwhiten(self, rows: Rows) -> Rows:
        """The rows that `whiten` takes to `rows`."""
        return rows

    def norms(self, rows: Rows) -> Float[ndarray, " rows"]:
        """The norm of each row in M."""
        return np.sqrt(np.maximum(np.einsum("ij,ij->i", rows, self.apply(rows)), 0))


@dataclass(frozen=True)
class WeightedProduct(InnerProduct):
    weights: Float[ndarray, " n_dof"]

    def apply(self, rows: Rows) -> Rows:
        return rows * self.weights

    def whiten(self, rows: Rows) -> Rows:
        return rows * np.sqrt(self.weights)

    def unwhiten(self, rows: Rows) -> Rows:
        return rows / np.sqrt(self.weights)


@dataclass(frozen=True)
class DenseProduct(InnerProduct):
    matrix: Float[ndarray, "n_dof n_dof"]
    factor: Float[ndarray, "n_dof n_dof"]  # lower triangular

    def apply(self, rows: Rows) -> Rows:
        return rows @ self.matrix

    def whiten(self, rows: Rows) -> Rows:
        return rows @ self.factor

    def unwhiten(self, rows: Rows) -> Rows:
        return scipy.linalg.solve_triangular(self.factor, rows.T, lower=True, trans="T").T


@dataclass(frozen=True)
class SparseProduct(InnerProduct):
    """M[p][:, p] = F F^T, where p reorders the unknowns so that the factor stays sparse."""

    matrix: Any
    factor: Any
    order: ndarray

    def apply(self, rows: Rows) -> Rows:
        return np.ascontiguousarray((self.matrix @ rows.T).T)

    def whiten(self, rows: Rows) -> Rows:
        return np.ascontiguousarray((self.factor.T @ rows[:, self.order].T).T)

    def unwhiten(self, rows: Rows) -> Rows:
        found = np.empty_like(rows)
        found[:, self.order] = spsolve_triangular(self.factor.T.tocsr(), rows.T, lower=False).T
        return found


def inner_product(product: Product, n_dof: int) -> InnerProduct:
    """Check and factorise what a caller gave as `product`.

    Raises:
        ValueError: wrong shape, NaN, or not symmetric positive definite.
    """
    if product is None:
        return InnerProduct(n_dof)
    if isinstance(product, InnerProduct):
        if product.n_dof != n_dof:
            raise ValueError(f"snapshots have {n_dof} unknowns, but their inner product is of {product.n_dof}")
        return product
    matrix = getattr(product, "matrix", product)  # pyMOR's NumpyMatrixOperator carries one
    if sp.issparse(matrix):
        return _sparse(sp.csr_array(matrix, dtype=np.float64), n_dof)
    matrix = np.asarray(matrix, dtype=np.float64)
    check_finite("product", matrix)
    if matrix.ndim == 1:
        check_shape("product", matrix, (n_dof,))
        if not (matrix > 0).all():
            raise ValueError(f"product must have positive weights, the smallest is {matrix.min():.3g}")
        return WeightedProduct(n_dof, matrix)
    check_shape("product", matrix, (n_dof, n_dof))
    check_symmetric("product", matrix)
    try:
        return DenseProduct(n_dof, matrix, np.linalg.cholesky(matrix))
    except np.linalg.LinAlgError:
        raise ValueError("product must be positive definite: its Cholesky factorisation fails") from None


def _sparse(matrix: Any, n_dof: int) -> InnerProduct:
    check_shape("product", matrix, (n_dof, n_dof))
    check_finite("product", matrix.data)
    check_symmetric("product", matrix)
    indefinite = ValueError("product must be positive definite: its factorisation L D L^T has a pivot that is not")
    if not (matrix.diagonal() > 0).all():
        raise indefinite
    try:  # without pivoting, as symmetric positive definite matrices allow: U = D L^T
        lu = splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    except RuntimeError:
        raise indefinite from None
    pivots = lu.U.diagonal()
    if not (pivots > 0).all() or (lu.perm_r != lu.perm_c).any():
        raise indefinite
    factor = sp.csr_array(lu.L @ sp.diags_array(np.sqrt(pivots)))
    return SparseProduct(n_dof, matrix, factor, np.argsort(lu.perm_c))
