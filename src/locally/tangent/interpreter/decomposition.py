"""Singular images of many operators at once, from products alone.

One step of both methods projects F on the space found so far, Q, takes the singular vectors there and measures how far
each is from one of F. "randomized" then goes on from the images of these vectors (subspace iteration, Halko,
Martinsson & Tropp 2011, algorithm 4.4); "krylov" keeps everything and adds what is missing (block Golub-Kahan, Musco &
Musco, arXiv 1504.05477), which takes fewer products and more memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from locally.checks import check_count, check_positive

Product = Callable[[Tensor], Tensor]
OVERSAMPLING = 10


class Method(StrEnum):
    """How singular images are found; chosen by the caller."""

    KRYLOV = "krylov"  # block Krylov space of F F^T, from random images
    RANDOMIZED = "randomized"  # subspace iteration
    DENSE = "dense"  # F in full, then LAPACK: exact


class Status(StrEnum):
    """Whether all residuals met the tolerance; read from `SVD.status`."""

    CONVERGED = "converged"
    STEP_LIMIT = "step limit"


@dataclass(frozen=True)
class SVD:
    """F v_i = s_i u_i for the k largest s_i of each example; v_i is positive where it is largest.

    Attributes:
        U: (N, k, *outputs).  S: (N, k), falling.  V: (N, k, *shape).
        residuals: |F v_i - s_i u_i|, (N, k); F^T u_i = s_i v_i up to rounding.
        status: whether all residuals are below rtol times the largest singular value.
    """

    U: Float[Tensor, "n k ..."]
    S: Float[Tensor, "n k"]
    V: Float[Tensor, "n k ..."]
    residuals: Float[Tensor, "n k"]
    status: Status


def of_dense(F: Float[Tensor, "n p d"], k: int, outputs: tuple[int, ...], shape: tuple[int, ...]) -> SVD:
    U, S, Vh = torch.linalg.svd(F, full_matrices=False)
    S = S[:, :k]
    return signed(U[..., :k].mT, S, Vh[:, :k], torch.zeros_like(S), Status.CONVERGED, outputs, shape)


def signed(
    U: Tensor, S: Tensor, V: Tensor, gaps: Tensor, status: Status, outputs: tuple[int, ...], shape: tuple[int, ...]
) -> SVD:
    sign = V.gather(-1, V.abs().argmax(-1, keepdim=True)).sign()
    n, k = S.shape
    return SVD((U * sign).reshape(n, k, *outputs), S, (V * sign).reshape(n, k, *shape), gaps, status)


def singular_images(
    matvec: Product,
    rmatvec: Product,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    k: int,
    *,
    like: Tensor,
    block: bool,
    rtol: float | None,
    max_steps: int,
    generator: Generator | None,
) -> SVD:
    """Block Krylov (`block`) or subspace iteration from k + 10 random images.

    Args:
        matvec, rmatvec: (b, N, *shape) to (b, N, *outputs) and back.
        inputs: (N, *shape). outputs: without N.
        rtol: relative to the largest singular value; default the square root of the precision, which makes singular
            values right to full precision.
        max_steps: of k + 10 products with F and its transpose each.
    """
    if rtol is not None:
        check_positive("rtol", rtol)
    check_count("max_steps", max_steps)
    n, shape = inputs[0], inputs[1:]
    d, p = math.prod(shape), math.prod(outputs)
    most = min(d, p)
    width = min(k + OVERSAMPLING, most)
    tolerance = torch.finfo(like.dtype).eps ** 0.5 if rtol is None else rtol

    def push(V: Tensor) -> Tensor:  # rows are vectors throughout: (N, b, d) to (N, b, p)
        return matvec(V.transpose(0, 1).reshape(-1, n, *shape)).reshape(-1, n, p).transpose(0, 1)

    def pull(U: Tensor) -> Tensor:
        return rmatvec(U.transpose(0, 1).reshape(-1, n, *outputs)).reshape(-1, n, d).transpose(0, 1)

    start = torch.randn(n, width, d, dtype=like.dtype, generator=generator).to(like.device)
    Q = orthonormal(push(start))
    B = pull(Q)  # Q F
    for _ in range(max_steps):
        left, S, V = torch.linalg.svd(B, full_matrices=False)
        left, S, V = left[..., :width].mT, S[:, :width], V[:, :width]
        U = left @ Q
        image = push(V)
        missing = image - S[..., None] * U
        residuals = missing.norm(dim=-1)
        largest = S[:, :1].clamp_min(torch.finfo(S.dtype).tiny)
        done = bool((residuals[:, :k] <= tolerance * largest).all())
        if done or Q.shape[1] >= most:  # all of the smaller space is in Q: exact
            done = True
            break
        if block:
            new = orthonormal(missing, against=Q)[:, : most - Q.shape[1]]
            Q, B = torch.cat([Q, new], 1), torch.cat([B, pull(new)], 1)
        else:
            Q = orthonormal(image)
            B = pull(Q)
    status = Status.CONVERGED if done else Status.STEP_LIMIT
    return signed(U[:, :k], S[:, :k], V[:, :k], residuals[:, :k], status, outputs, shape)


def orthonormal(rows: Float[Tensor, "n b p"], against: Float[Tensor, "n q p"] | None = None) -> Tensor:
    """An orthonormal basis of the rows, orthogonal to `against`; twice, since once leaves rounding behind."""
    Q = rows
    for _ in range(2):
        if against is not None:
            Q = Q - (Q @ against.mT) @ against
        Q = torch.linalg.qr(Q.mT).Q.mT
    return Q
