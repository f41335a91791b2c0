"""A matrix whose rows are at hand: checked once, row lengths known, swept in place."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_finite, check_shape
from locally.linalg.sketching import kernels


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a dense (C order) or CSR matrix in float64 with the inverses of their squared lengths.

    Rows of zeros have the inverse 0, so that a step on them does nothing.

    Attributes:
        matrix: the matrix as the kernels take it.
        squares: ||a_i||^2.
        inverse_squares: 1 / ||a_i||^2, 0 for rows of zeros.
    """

    matrix: Any
    squares: Float[ndarray, " n"]
    inverse_squares: Float[ndarray, " n"]

    @classmethod
    def of(cls, A: Any) -> "Rows":
        """Check A and measure its rows: O(entries).

        Args:
            A: (n, d), an array or a SciPy sparse matrix with real entries.

        Raises:
            TypeError: A has no rows to read, or is not real.
            ValueError: A is not two-dimensional, holds NaN or infinity, or has column numbers outside it.
        """
        if isinstance(A, Rows):
            return A
        if not isinstance(A, ndarray) and not sp.issparse(A):
            raise TypeError(
                f"A must be an array or a sparse matrix, whose rows can be read, got {type(A).__name__}: "
                "an operator takes a Gaussian or sparse sketch"
            )
        if A.dtype.kind not in "fiub":
            raise TypeError(f"A must have real entries, got dtype {A.dtype}")
        check_shape("A", A, (None, None))
        if sp.issparse(A):
            if hasattr(A, "check_format"):  # of compressed formats, whose indices SciPy takes on trust
                A.check_format(full_check=True)
            matrix = sp.csr_array(A, dtype=float)
            check_finite("A", matrix.data)
            squares = np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel()
        else:
            matrix = np.ascontiguousarray(A, dtype=float)
            check_finite("A", matrix)
            squares = np.einsum("ij,ij->i", matrix, matrix)
        inverse = np.divide(1.0, squares, out=np.zeros_like(squares), where=squares > 0)
        return cls(matrix, squares, inverse)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.matrix.shape

    @property
    def sparse(self) -> bool:
        """Whether the matrix is a SciPy sparse one."""
        return sp.issparse(self.matrix)

    @property
    def arrays(self) -> tuple[ndarray, ...]:
        """The matrix as positional arguments of a kernel."""
        m = self.matrix
        return (m.indptr, m.indices, m.data) if self.sparse else (m,)

    @cached_property
    def _storage_order(self) -> Int[ndarray, " n"]:
        return np.arange(self.shape[0])

    def lengths_to_one(self, b: Float[ndarray, " n"]) -> tuple["Rows", Float[ndarray, " n"]]:
        """The system with rows of length one that has the same solutions."""
        scale = np.sqrt(self.inverse_squares)
        scale[scale == 0] = 1.0
        scaled = sp.csr_array(sp.diags_array(scale) @ self.matrix) if self.sparse else scale[:, None] * self.matrix
        return Rows.of(scaled), scale * b

    def sweep(
        self, x: Float[ndarray, " d"], b: Float[ndarray, " n"], order: Int[ndarray, " steps"] | None = None
    ) -> Float[ndarray, " d"]:
        """Project x in place onto the hyperplanes of the rows in `order` (default: each once, in storage order).

        Each row is read from memory once, so a sweep over a matrix larger than the cache runs at about the speed of a
        product with it.

        >>> Rows.of(np.array([[2.0, 0.0], [0.0, 4.0]])).sweep(np.zeros(2), np.array([2.0, 2.0]))
        array([1. , 0.5])
        """
        check_shape("x", x, (self.shape[1],))
        check_shape("b", b, (self.shape[0],))
        if order is None:
            order = self._storage_order
        elif order.dtype.kind not in "iu":
            raise TypeError(f"order must hold integers, got {order.dtype}")
        elif order.size and (order.min() < 0 or order.max() >= self.shape[0]):
            raise ValueError(f"order must hold row numbers from 0 to {self.shape[0] - 1}")
        kernel = kernels.sweep_sparse if self.sparse else kernels.sweep_dense
        kernel(*self.arrays, b, x, order, self.inverse_squares)
        return x
