"""Sweeps in place on CSR matrices, and the SSOR preconditioner made of them."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator

from locally.checks import check_choice, check_count, check_finite, check_positive, check_square
from locally.linalg.relaxation import kernels

Direction = Literal["forward", "backward", "symmetric"]
SweepOrder = Literal["backward first", "forward first"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "symmetric")
SWEEP_ORDERS: tuple[SweepOrder, ...] = ("backward first", "forward first")


def check_omega(omega: float) -> None:
    """Sweeps converge for symmetric positive definite A exactly when 0 < omega < 2."""
    check_positive("omega", omega, below=2.0)


@dataclass(frozen=True, eq=False)
class Splitting:
    """A = D + L + U seen inside the CSR arrays of A: views and the position of each diagonal entry, no copy of A.

    Made by `Splitting.of`. The arrays are A's own, so writing new values into `A.data` (same pattern) changes the
    splitting too; make a new one where the new values should be checked again.

    Attributes:
        indptr, indices, data: the CSR arrays, columns ascending within a row.
        diagonal_at: `data[diagonal_at[i]]` is a_ii.
    """

    indptr: Int[ndarray, " row_limits"]
    indices: Int[ndarray, " nonzeros"]
    data: Float[ndarray, " nonzeros"]
    diagonal_at: Int[ndarray, " n"]

    @classmethod
    def of(cls, A: Any) -> "Splitting":
        """Split a square matrix with positive diagonal.

        CSR with ascending columns is used as it stands; other sparse formats, dense arrays and integer values are
        converted to that first. One pass over the non-zeros.

        Raises:
            TypeError: A is complex, or neither a SciPy sparse nor a NumPy matrix.
            ValueError: A is not square, holds NaN or infinity, or has a diagonal entry that is not positive.

        >>> A = sp.csr_array([[2.0, -1.0], [-1.0, 2.0]])
        >>> split = Splitting.of(A)
        >>> split.diagonal
        array([2., 2.])
        >>> np.shares_memory(split.data, A.data)
        True
        """
        A = as_csr(A)
        check_finite("A", A.data)
        positions = np.empty(A.shape[0], np.intp)
        row = kernels.locate_diagonal(A.indptr, A.indices, A.data, positions)
        if row >= 0:
            raise ValueError(f"A must have a positive diagonal, got {float(A.diagonal()[row])!r} in row {row}")
        return cls(A.indptr, A.indices, A.data, positions)

    @property
    def n(self) -> int:
        """Rows of A."""
        return self.diagonal_at.size

    @property
    def dtype(self) -> np.dtype:
        """Of the entries."""
        return self.data.dtype

    @property
    def diagonal(self) -> Float[ndarray, " n"]:
        """The diagonal of A, a copy."""
        return self.data[self.diagonal_at]

    def is_symmetric(self, *, rtol: float = 1e-10) -> bool:
        """Whether a_ij = a_ji up to rtol max |a|; costs about one sweep."""
        tolerance = rtol * float(np.abs(self.data).max(initial=0.0))
        return bool(kernels.symmetric(self.indptr, self.indices, self.data, self.diagonal_at, tolerance))

    def sweep(
        self,
        x: Float[ndarray, " n"],
        b: Float[ndarray, " n"],
        *,
        omega: float = 1.0,
        direction: Direction = "forward",
        sweeps: int = 1,
    ) -> None:
        """Over-relax x in place; see `relax`."""
        check_omega(omega)
        check_choice("direction", direction, DIRECTIONS)
        check_count("sweeps", sweeps, at_least=0)
        for name, vector in (("x", x), ("b", b)):
            self._check_vector(name, vector)
        scale = self.dtype.type(omega)  # a Python float would silently widen single-precision arithmetic
        for _ in range(sweeps):
            if direction != "backward":
                kernels.sweep_forward(self.indptr, self.indices, self.data, self.diagonal_at, x, b, scale)
            if direction != "forward":
                kernels.sweep_backward(self.indptr, self.indices, self.data, self.diagonal_at, x, b, scale)

    def _check_vector(self, name: str, vector: ndarray) -> None:
        if vector.shape != (self.n,):
            raise ValueError(f"{name} must have shape ({self.n},), got {vector.shape}")
        if vector.dtype != self.dtype:
            raise TypeError(f"{name} must have the dtype of A, {self.dtype}, got {vector.dtype}")


def relax(
    A: sp.csr_array | sp.csr_matrix,
    x: Float[ndarray, " n"],
    b: Float[ndarray, " n"],
    *,
    omega: float = 1.0,
    direction: Direction = "forward",
    sweeps: int = 1,
) -> None:
    """Over-relax x in place towards A x = b; omega = 1 is Gauss-Seidel.

    Args:
        A: CSR with positive diagonal, in the dtype of x and b (float32 or float64).
        x: current iterate, overwritten.
        b: right-hand side.
        omega: relaxation parameter in (0, 2).
        direction: rows in ascending order, in descending order, or first one then the other ("symmetric": SSOR).
        sweeps: how many times; a symmetric sweep counts once.

    Raises:
        ValueError, TypeError: omega, direction, sweeps, shapes or dtypes are not as above; x is left as it was.

    O(nonzeros) a sweep. To sweep one matrix many times keep its `Splitting` and call `Splitting.sweep`.

    >>> A = sp.csr_array([[2.0, -1.0], [-1.0, 2.0]])
    >>> x = np.zeros(2)
    >>> relax(A, x, np.array([1.0, 1.0]), sweeps=30)
    >>> x.round(8)
    array([1., 1.])
    """
    Splitting.of(A).sweep(x, b, omega=omega, direction=direction, sweeps=sweeps)


class SSORPreconditioner(LinearOperator):
    """P^-1 for P = X^T D^-1 X / (omega (2 - omega)), X = D + omega L, as a SciPy `LinearOperator`.

    The eigenvalues of P^-1 A lie in (0, 1]. `order` says which triangular sweep applies first: "backward first" is the
    P above, "forward first" is P = X D^-1 X^T / (omega (2 - omega)), the same after numbering the unknowns in reverse.

    Args:
        A: symmetric with positive diagonal; see `Splitting.of` for the formats.
        omega: in (0, 2); 1 is symmetric Gauss-Seidel.
        order: see above.

    Raises:
        ValueError: omega is out of range, or A is not symmetric or has a diagonal entry that is not positive.

    Applying it costs about one product with A. Source: Axelsson (1994), chapter 7.

    >>> from scipy.sparse.linalg import cg
    >>> A = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(50, 50), format="csr")
    >>> x, info = cg(A, np.ones(50), M=SSORPreconditioner(A, 1.8), rtol=1e-10)
    >>> bool(info == 0 and abs(A @ x - 1).max() < 1e-8)
    True
    """

    def __init__(self, A: Any, omega: float = 1.0, *, order: SweepOrder = "backward first"):
        check_omega(omega)
        check_choice("order", order, SWEEP_ORDERS)
        self.splitting = Splitting.of(A)
        if not self.splitting.is_symmetric():
            raise ValueError("A must be symmetric")
        self.omega, self.order = omega, order
        super().__init__(self.splitting.dtype, (self.splitting.n, self.splitting.n))

    def _matvec(self, r: ndarray) -> ndarray:
        s = self.splitting
        z = np.array(r, dtype=s.dtype).reshape(s.n)
        apply_ssor = kernels.ssor_backward_first if self.order == "backward first" else kernels.ssor_forward_first
        apply_ssor(s.indptr, s.indices, s.data, s.diagonal_at, z, z, s.dtype.type(self.omega))
        return z

    def _adjoint(self) -> "SSORPreconditioner":
        return self


def as_csr(A: Any) -> sp.csr_array | sp.csr_matrix:
    """A itself if it is CSR in single or double precision with ascending columns, otherwise converted to that."""
    if not (sp.issparse(A) or isinstance(A, ndarray)):
        raise TypeError(f"A must be a SciPy sparse matrix or a NumPy array, got {type(A).__name__}")
    check_square("A", A)
    if np.issubdtype(A.dtype, np.complexfloating):
        raise TypeError(f"A must be real, got {A.dtype}")
    if hasattr(A, "check_format"):  # of compressed formats, whose indices SciPy takes on trust
        A.check_format(full_check=True)
    if not (sp.issparse(A) and A.format == "csr"):
        A = sp.csr_array(A)
    if A.dtype not in (np.float32, np.float64):
        A = A.astype(np.float64)
    if not A.has_canonical_format:
        A = A.copy()
        A.sum_duplicates()
    return A
