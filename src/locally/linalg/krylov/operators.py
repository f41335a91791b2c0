"""Square matrices seen through their products: dense, sparse, diagonal, or whatever a function computes.

`as_operator` turns what a caller has into one of these. All act on the rows of a (batch, n) tensor; `product` writes
into a buffer and records no graph, `apply` is the same product as a differentiable function of the operator's tensors,
and `select` keeps some of the systems, which lets a solver go on without those that have finished.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.checks import check_finite, check_square
from locally.linalg.krylov import kernels

SPARSE = (torch.sparse_csr, torch.sparse_coo, torch.sparse_csc)


class Operator(ABC):
    """A symmetric n x n matrix for each of the systems, or one for all.

    Subclass it to give a solver an operator of one's own. A callable v -> A v does too, but cannot be told which
    systems have finished.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the matrix is a differentiable function of."""
        return ()

    @property
    def size(self) -> int | None:
        """n, where the operator knows it."""
        return self.tensors[0].shape[-1] if self.tensors else None

    @abstractmethod
    def product(self, v: Float[Tensor, "batch n"], out: Float[Tensor, "batch n"]) -> None:
        """out = A v, without a graph; v and out never overlap."""

    def apply(self, v: Float[Tensor, "batch n"], *tensors: Tensor) -> Float[Tensor, "batch n"]:
        """A v as a differentiable function of `tensors`, which stand in for `self.tensors`."""
        out = torch.empty_like(v)
        self.product(v, out)
        return out

    def select(self, index: Int[Tensor, " kept"]) -> "Operator | None":
        """The operator for these systems alone; None where that is not known."""
        return None

    def __matmul__(self, v: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        out = torch.empty_like(v)
        self.product(v, out)
        return out


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """(n, n) for all systems or (batch, n, n)."""

    matrix: Float[Tensor, "*batch n n"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    def product(self, v: Tensor, out: Tensor) -> None:
        matrix = self.matrix.detach()
        if matrix.ndim == 3:
            torch.bmm(v[:, None], matrix.mT, out=out[:, None])  # as row vectors: half the time of columns
        elif v.shape[0] == 1:
            torch.mv(matrix, v[0], out=out[0])
        else:
            torch.mm(v, matrix.mT, out=out)

    def apply(self, v: Tensor, *tensors: Tensor) -> Tensor:
        (matrix,) = tensors
        return (matrix @ v[:, :, None])[:, :, 0] if matrix.ndim == 3 else v @ matrix.mT

    def select(self, index: Tensor) -> "Dense":
        return self if self.matrix.ndim == 2 else Dense(self.matrix.detach()[index])


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """diag(d), one (n,) for all systems or (batch, n). `Diagonal.jacobi(A)` is the preconditioner of that name."""

    entries: Float[Tensor, "*batch n"]

    @classmethod
    def jacobi(cls, A: Tensor) -> "Diagonal":
        """diag(A)^-1 of a dense tensor (..., n, n) or a sparse matrix.

        Raises:
            ValueError: a diagonal entry is not positive.

        >>> Diagonal.jacobi(torch.tensor([[2.0, 1.0], [1.0, 4.0]])).entries
        tensor([0.5000, 0.2500])
        """
        if A.layout in SPARSE:
            limits, columns, values = compressed_rows(A)
            rows = row_numbers(limits)
            on = rows == columns
            diagonal = values.new_zeros(A.shape[0]).index_add(0, rows[on], values[on])
        else:
            diagonal = A.diagonal(dim1=-2, dim2=-1)
        if not (diagonal > 0).all():
            raise ValueError(f"A must have a positive diagonal, its smallest entry is {float(diagonal.min())!r}")
        return cls(1 / diagonal.detach())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.entries,)

    def product(self, v: Tensor, out: Tensor) -> None:
        torch.mul(v, self.entries.detach(), out=out)

    def apply(self, v: Tensor, *tensors: Tensor) -> Tensor:
        return v * tensors[0]

    def select(self, index: Tensor) -> "Diagonal":
        return self if self.entries.ndim == 1 else Diagonal(self.entries.detach()[index])


class Sparse(Operator):
    """A torch sparse matrix for all systems; on the CPU its products are compiled. Keep it to solve again and again.

    Raises:
        ValueError: the matrix is not square, has column indices outside it, or row limits that do not ascend.
    """

    def __init__(self, matrix: Tensor):
        check_square("matrix", matrix)
        self.n = matrix.shape[0]
        limits, columns, self.values = compressed_rows(matrix)
        if columns.numel() and (int(columns.min()) < 0 or int(columns.max()) >= self.n):
            raise ValueError(f"matrix has column indices outside 0 .. {self.n - 1}")
        ends = (int(limits[0]), int(limits[-1])) == (0, columns.numel()) and self.values.numel() == columns.numel()
        if limits.numel() != self.n + 1 or not ends or (limits.diff() < 0).any():
            raise ValueError(f"matrix must have {self.n + 1} row limits that ascend from 0 to {columns.numel()}")
        # half the index traffic wherever 32 bits suffice
        narrow = torch.int32 if max(self.n, columns.numel()) < 2**31 else torch.int64
        self.limits, self.columns = limits.to(narrow), columns.to(narrow)
        if self.values.device.type == "cpu":
            self.arrays = tuple(t.detach().numpy() for t in (self.limits, self.columns, self.values))
        else:
            size = (self.n, self.n)
            self.matrix = torch.sparse_csr_tensor(self.limits, self.columns, self.values.detach(), size)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    @property
    def size(self) -> int:
        return self.n

    def product(self, v: Tensor, out: Tensor) -> None:
        if self.values.device.type == "cpu":
            kernels.csr_product(*self.arrays, v.numpy(), out.numpy())
        else:
            out.copy_((self.matrix @ v.mT).mT)

    def apply(self, v: Tensor, *tensors: Tensor) -> Tensor:
        return torch.zeros_like(v).index_add(1, row_numbers(self.limits), v[:, self.columns] * tensors[0])

    def select(self, index: Tensor) -> "Sparse":
        return self


@dataclass(frozen=True, eq=False)
class Shifted(Operator):
    """A - shift I."""

    inner: Operator
    shift: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.inner.tensors

    @property
    def size(self) -> int | None:
        return self.inner.size

    def product(self, v: Tensor, out: Tensor) -> None:
        self.inner.product(v, out)
        out.add_(v, alpha=-self.shift)

    def apply(self, v: Tensor, *tensors: Tensor) -> Tensor:
        return self.inner.apply(v, *tensors) - self.shift * v

    def select(self, index: Tensor) -> "Shifted | None":
        inner = self.inner.select(index)
        return None if inner is None else Shifted(inner, self.shift)


class Function(Operator):
    """v -> function(v, *parameters). The function may use autograd itself, as Hessian-vector products do."""

    def __init__(self, name: str, function: Callable[..., Tensor], parameters: Sequence[Tensor], track: bool):
        self.name, self.function, self.parameters = name, function, tuple(parameters)
        self.constants = tuple(p.detach() for p in self.parameters)
        self.track = track  # gradients are asked for, so one that would get lost is an error

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.parameters

    @property
    def size(self) -> None:
        return None

    def product(self, v: Tensor, out: Tensor) -> None:
        with torch.enable_grad():
            result = self._checked(v, self.function(v, *self.constants))
        if self.track and result.requires_grad:
            raise ValueError(
                f"{self.name} depends on tensors that require gradients: pass them as parameters=(...) and let"
                f" {self.name} take them after its vector, {self.name}(v, *parameters), or solve under torch.no_grad()"
            )
        out.copy_(result.detach())

    def apply(self, v: Tensor, *tensors: Tensor) -> Tensor:
        return self._checked(v, self.function(v, *tensors))

    def _checked(self, v: Tensor, result: Any) -> Tensor:
        if not isinstance(result, Tensor):
            raise TypeError(f"{self.name}(v) must return a tensor, got {type(result).__name__}")
        if result.shape != v.shape:
            raise ValueError(f"{self.name}(v) must have the shape of v, {tuple(v.shape)}, got {tuple(result.shape)}")
        if result.dtype != v.dtype or result.device != v.device:
            expected, got = f"{v.dtype} on {v.device}", f"{result.dtype} on {result.device}"
            raise TypeError(f"{self.name}(v) must have the dtype and device of v, {expected}, got {got}")
        return result


def as_operator(
    name: str,
    A: Any,
    like: Tensor,
    *,
    parameters: Sequence[Tensor] = (),
    track: bool = False,
) -> Operator:
    """Check A against the vectors `like` (*batch, n) that it will act on, and wrap it for their flattened batch.

    Raises:
        TypeError: A is no tensor, `Operator` or callable, or of another dtype.
        ValueError: another shape or device, NaN or infinity, or parameters for something that is not a callable.
    """
    if callable(A) and not isinstance(A, Tensor):
        return Function(name, A, parameters, track)
    if parameters:
        raise ValueError(f"parameters belong to a callable {name}, got {len(parameters)} with a {type(A).__name__}")
    if isinstance(A, Operator):
        _check_kin(name, A.tensors[:1], like)
        if A.size not in (None, like.shape[-1]):
            raise ValueError(f"{name} must act on vectors of {like.shape[-1]} entries, got one for {A.size}")
        return A
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} must be a tensor, an Operator or a callable, got {type(A).__name__}")
    _check_kin(name, (A,), like)
    *batch, n = like.shape
    if A.layout in SPARSE:
        if tuple(A.shape) != (n, n):
            raise ValueError(f"{name} must have shape {(n, n)}, got {tuple(A.shape)}")
        operator = Sparse(A)
        _check_entries(name, operator.values)
        return operator
    if tuple(A.shape) not in {(n, n), (*batch, n, n)}:
        allowed = f"{(n, n)}" + (f" or {(*batch, n, n)}" if batch else "")
        raise ValueError(f"{name} must have shape {allowed}, got {tuple(A.shape)}")
    _check_entries(name, A)
    return Dense(A if A.ndim == 2 else A.reshape(-1, n, n))


def _check_entries(name: str, entries: Tensor) -> None:
    """`check_finite`, but where the sum is finite, which takes an eighth of the time: then so is every entry."""
    if not bool(entries.detach().sum().isfinite()):
        check_finite(name, entries)


def _check_kin(name: str, tensors: tuple[Tensor, ...], like: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} must have the dtype of the vectors, {like.dtype}, got {tensor.dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{name} must be on the device of the vectors, {like.device}, got {tensor.device}")


def compressed_rows(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row limits, columns and values of a sparse matrix, the values differentiable with respect to it."""
    if A.layout == torch.sparse_csr:
        return A.crow_indices(), A.col_indices(), A.values()
    coo = A.to_sparse_coo().coalesce()
    rows, columns = coo.indices()
    counts = torch.bincount(rows, minlength=A.shape[0])
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), columns, coo.values()


def row_numbers(limits: Int[Tensor, " row_limits"]) -> Int[Tensor, " nonzeros"]:
    counts = limits.diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=limits.device), counts)
