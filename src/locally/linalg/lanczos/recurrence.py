"""The Lanczos recurrence from several starting vectors at once, fully reorthogonalised. Source: Lanczos (1950)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from locally.checks import check_count, check_finite, check_square
from locally.linalg.lanczos.measure import SpectralMeasure

Product = Callable[[Tensor], Tensor]
Operator = Product | Tensor


@dataclass(frozen=True)
class KrylovBasis:
    """A Q_m = Q_m T_m + beta_m q_{m+1} e_m^T for each of k starting vectors; T_m is tridiagonal.

    Attributes:
        alpha: diagonals of T_m, in double precision.
        beta: sub-diagonals, and in the last column the norm of what is left over; zero once a space is exhausted.
        vectors: orthonormal rows q_1, ..., q_m; zero rows past `steps`.
        steps: rows that each starting vector led to, below m where its Krylov space ended.
    """

    alpha: Float[Tensor, "k m"]
    beta: Float[Tensor, "k m"]
    vectors: Float[Tensor, "k m p"]
    steps: Int[Tensor, " k"]

    def tridiagonal(self) -> Float[Tensor, "k m m"]:
        """T_m of every starting vector, as full matrices."""
        off = self.beta[:, :-1]
        return self.alpha.diag_embed() + off.diag_embed(1) + off.diag_embed(-1)

    def quadrature(self) -> "SpectralMeasure":
        """Gauss quadrature of the spectrum as each starting vector sees it: Ritz values and their weights."""
        nodes, S = torch.linalg.eigh(self.tridiagonal())
        return SpectralMeasure(nodes, S[:, 0].square(), self.steps, self.vectors.shape[-1])


def lanczos(
    op: Operator,
    start: Float[Tensor, "k p"],
    steps: int,
    *,
    callback: Callable[[int, int], None] | None = None,
) -> KrylovBasis:
    """Run `steps` steps of Lanczos from every row of `start` at once, each with its own Krylov space.

    Every new vector is orthogonalised twice against all before it. That costs 4 m^2 p flops a start in all and m p
    numbers of memory; on the way it shows whether the operator is symmetric.

    Args:
        op: a symmetric matrix (p, p), or a function v -> A v of a stack (k, p) of row vectors, and of one vector (p,)
            where k is 1. Row i of a stack may meet a matrix of its own.
        start: finite and not zero; need not be normalised.
        steps: at least 1; no more than p are taken.
        callback: called with (steps done, steps in all).

    Raises:
        ValueError: `start` cannot be used, `op` returns another shape or is not symmetric.
        ArithmeticError: `op` returns NaN or infinity.

    >>> basis = lanczos(torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(1, 3), steps=3)
    >>> torch.linalg.eigvalsh(basis.tridiagonal()).round(decimals=4)
    tensor([[1., 2., 4.]], dtype=torch.float64)
    """
    check_count("steps", steps)
    if start.ndim != 2 or not start.numel():
        raise ValueError(f"start must have shape (k, p) with k, p >= 1, got {tuple(start.shape)}")
    check_finite("start", start)
    norms = start.norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise ValueError("start holds a zero vector")
    multiply = Checked(op, start)
    k, p = start.shape
    m = min(steps, p)
    alpha, beta = torch.zeros(2, k, m, dtype=torch.float64, device=start.device)
    Q = start.new_zeros(k, m, p)
    Q[:, 0] = start / norms
    taken = torch.ones(k, dtype=torch.int64, device=start.device)
    scale = torch.zeros(k, dtype=torch.float64, device=start.device)  # a lower bound on the norm of A
    eps = torch.finfo(start.dtype).eps
    for j in range(m):
        expected = torch.zeros(k, j + 1, dtype=torch.float64, device=start.device)
        if j:
            expected[:, j - 1] = beta[:, j - 1]
        w = multiply(Q[:, j])
        scale = torch.maximum(scale, w.norm(dim=1).double())
        w, h = orthogonalise(w, Q[:, : j + 1])
        check_coefficients(h, expected, scale, eps)
        alpha[:, j] = h[:, j]
        left = w.norm(dim=1).double()
        alive = left > rounding(eps, p) * scale
        beta[:, j] = torch.where(alive, left, 0)
        if j + 1 < m:
            Q[:, j + 1] = torch.where(alive[:, None], w / left.clamp_min(1e-300)[:, None].to(w.dtype), 0)
            taken += alive & (taken == j + 1)
        if callback is not None:
            callback(j + 1, m)
        if not alive.any():
            break
    return KrylovBasis(alpha, beta, Q, taken)


# Extreme eigenpairs ---------------------------------------------------------------------------------------------------


class Checked:
    """`op` as a function of a stack of row vectors, whose answers have been looked at."""

    def __init__(self, op: Operator, start: Float[Tensor, "k p"]) -> None:
        if isinstance(op, Tensor):
            check_square("op", op)
            check_finite("op", op)
        shape = getattr(op, "shape", None)
        if shape is not None and tuple(shape) != (start.shape[1],) * 2:
            raise ValueError(f"start has vectors of {start.shape[1]} entries, but op has shape {tuple(shape)}")
        self._op: Any = op

    def __call__(self, v: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        given = v[0] if len(v) == 1 else v
        w = given @ self._op if isinstance(self._op, Tensor) else self._op(given)
        if not isinstance(w, Tensor) or w.shape != given.shape:
            got = f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"op must map a tensor of shape {tuple(given.shape)} to one like it, got {got}")
        if w.dtype != v.dtype:
            raise TypeError(f"op must keep the dtype {v.dtype}, got {w.dtype}")
        if not (w.sum().isfinite() or w.isfinite().all()):
            raise ArithmeticError("op returned NaN or infinity for a finite vector")
        return w.detach().view(v.shape)


def describe(op: Operator) -> tuple[int, torch.dtype, torch.device]:
    if any(not hasattr(op, name) for name in ("shape", "dtype", "device")):
        raise ValueError("op has no shape, dtype and device: say how large it is by a starting vector or size")
    op_: Any = op
    return int(op_.shape[-1]), op_.dtype, op_.device


def orthogonalise(
    w: Float[Tensor, "k p"], Q: Float[Tensor, "#k j p"]
) -> tuple[Float[Tensor, "k p"], Float[Tensor, "k j"]]:
    """w less its components along the rows of Q, and these components; the second pass removes what rounding left."""
    total = torch.zeros(Q.shape[:2], dtype=torch.float64, device=w.device)
    for _ in range(2):
        h = torch.einsum("kjp,kp->kj", Q, w)
        w = w - torch.einsum("kj,kjp->kp", h, Q)
        total += h
    return w, total


def rounding(eps: float, p: int) -> float:
    """What rounding leaves, relative to the matrix, of a vector that lies in the space: no direction."""
    return 10 * eps * p**0.5


def check_coefficients(
    h: Float[Tensor, "k j"], expected: Float[Tensor, "k j"], scale: Float[Tensor, " k"], eps: float
) -> None:
    """q_i^T A q_j must equal q_j^T A q_i, which an earlier step found: far beyond rounding A is not symmetric."""
    gap = (h[:, :-1] - expected[:, :-1]).abs().amax(1) if h.shape[1] > 1 else torch.zeros_like(scale)
    if (gap > eps**0.25 * scale).any():
        raise ValueError(
            f"op is not symmetric: products along two orthonormal vectors differ by {float(gap.max()):.3g}, "
            f"on a matrix of norm {float(scale.max()):.3g} or more"
        )


def fresh_direction(Q: Float[Tensor, "j p"], generator: Generator | None) -> Float[Tensor, " p"]:
    """A random unit vector orthogonal to the rows of Q; zero where they span the whole space."""
    if len(Q) >= Q.shape[1]:
        return Q.new_zeros(Q.shape[1])
    w = torch.randn(1, Q.shape[1], dtype=Q.dtype, device=Q.device, generator=generator)
    w, _ = orthogonalise(w, Q[None])
    return w[0] / w.norm()
