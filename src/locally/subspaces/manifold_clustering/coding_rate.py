"""Coding rates of an embedding, whole and by membership, and what follows from them.

The rate of n samples z_i in R^d at squared distortion eps^2 is the log-volume that they need; the rate given a
membership codes every cluster on its own. Source: arXiv 2301.01805, the rate-reduction objective and its doubly
stochastic form. Natural logarithms and no factor 1/2 throughout.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.checks import check_between, check_count, check_finite, check_positive


def coding_rate(Z: Float[Tensor, "*batch n d"], eps_sq: float) -> Float[Tensor, "*batch"]:
    """R(Z) = logdet(I + d / (n eps^2) Z'Z).

    Args:
        Z: one sample a row, of length one where rates are to be compared; a zero row adds nothing. Half precision is
            worked on in float32.
        eps_sq: squared distortion, positive.

    Returns:
        Differentiable, never negative. O(n d min(n, d)): the smaller of the two Gram matrices is factorised.

    Raises:
        ValueError: eps_sq is not positive.

    >>> float(coding_rate(torch.eye(4), eps_sq=0.5))  # 4 log(1 + 1 / 0.5)
    4.394...
    """
    check_positive("eps_sq", eps_sq)
    Z = _at_least_single(Z)
    n, d = Z.shape[-2:]
    gram = Z @ Z.mT if n < d else Z.mT @ Z  # the same determinant (Sylvester)
    scaled = gram * (d / (max(n, 1) * eps_sq))
    scaled.diagonal(dim1=-2, dim2=-1).add_(1)
    return 2 * torch.linalg.cholesky(scaled).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def coding_rate_membership(
    Z: Float[Tensor, "n d"], membership: Float[Tensor, "n k"], eps_sq: float, chunk: int | None = None
) -> Float[Tensor, ""]:
    """R_c(Z, G) = sum_j n_j / n logdet(I + d / (n_j eps^2) Z' Diag(G_j) Z), n_j the sum of column j.

    With k columns of soft or hard membership this is the rate of k clusters; with the n x n doubly stochastic
    membership every n_j is 1 and it is the paper's second form. Dividing by the column sum that is there keeps it exact
    where Sinkhorn was cut off early.

    Args:
        Z: one sample a row.
        membership: non-negative, one cluster a column; an empty column counts nothing.
        eps_sq: squared distortion, positive.
        chunk: columns to hold in memory at a time, d^2 numbers each; default as many as fit in about 64 MiB.

    Returns:
        Differentiable once in Z and membership. The gradient is found with the value, so that no factor is kept:
        three products of n x k with d(d+1)/2 packed pairs and k Cholesky factors, O(n k d^2 + k d^3) time and
        O((n + chunk) d^2) memory.

    Raises:
        ValueError: eps_sq or chunk is out of range, or the lengths of Z and membership differ.

    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> Z = torch.eye(2)[labels]
    >>> float(coding_rate_membership(Z, torch.nn.functional.one_hot(labels).float(), eps_sq=0.5))  # log(1 + 2 / 0.5)
    1.609...
    """
    check_positive("eps_sq", eps_sq)
    if Z.shape[0] != membership.shape[0]:
        raise ValueError(
            f"membership must have a row for each of the {Z.shape[0]} rows of Z, got {membership.shape[0]}"
        )
    d = Z.shape[1]
    chunk = max(1, 2**24 // max(d * d, 1)) if chunk is None else chunk
    check_count("chunk", chunk)
    Z, membership = _at_least_single(Z), _at_least_single(membership)
    return _RateOfMembership.apply(Z, membership.to(Z.dtype), eps_sq, chunk)


class _RateOfMembership(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, Z: Tensor, G: Tensor, eps_sq: float, chunk: int) -> Tensor:
        n, d = Z.shape
        c = d / eps_sq
        row, column = torch.tril_indices(d, d, device=Z.device)
        packed_at, weights = row * d + column, 2.0 - (row == column).to(Z.dtype)
        unpack = torch.empty(d, d, dtype=torch.long, device=Z.device)
        unpack[row, column] = unpack[column, row] = torch.arange(len(row), device=Z.device)
        # Z' Diag(G_j) Z for all j is one product of G' with the outer products z_i z_i', packed by symmetry
        pairs = (Z[:, :, None] * Z[:, None, :]).flatten(1).index_select(1, packed_at)
        sizes = G.sum(0)
        scale = c / sizes.clamp(min=torch.finfo(Z.dtype).tiny ** 0.5)  # an empty column has no pairs: any scale will do
        need_Z, need_G = ctx.needs_input_grad[:2]
        total = Z.new_zeros(())
        grad_G = torch.empty_like(G) if need_G else None
        mixed = torch.zeros_like(pairs) if need_Z else None
        for at in torch.arange(G.shape[1]).split(chunk):
            part = slice(int(at[0]), int(at[-1]) + 1)
            packed = (G[:, part].mT @ pairs) * scale[part, None]
            M = packed.index_select(1, unpack.flatten()).view(-1, d, d)
            M.diagonal(dim1=-2, dim2=-1).add_(1)
            L = torch.linalg.cholesky(M)
            logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            total += (sizes[part] @ logdet) / n
            if not (need_Z or need_G):
                continue
            factor = torch.linalg.solve_triangular(L, torch.eye(d, dtype=Z.dtype, device=Z.device), upper=False)
            inverse = (factor.mT @ factor).flatten(1).index_select(1, packed_at)
            if grad_G is not None:
                # d(n_j logdet M_j) = c tr(M_j^-1 dW_j) + (logdet M_j - d + tr M_j^-1) dn_j
                torch.matmul(pairs, (inverse * weights).mT, out=grad_G[:, part])
                trace = inverse[:, row == column].sum(1)
                grad_G[:, part].mul_(c).add_(logdet - d + trace)
            if mixed is not None:
                mixed.addmm_(G[:, part], inverse)
        grad_Z = None
        if mixed is not None:
            M = mixed.index_select(1, unpack.flatten()).view(n, d, d)
            grad_Z = (M @ Z[:, :, None]).squeeze(-1) * (2 * c / n)
        ctx.save_for_backward(grad_Z, None if grad_G is None else grad_G.div_(n))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_Z, grad_G = ctx.saved_tensors
        return None if grad_Z is None else grad * grad_Z, None if grad_G is None else grad * grad_G, None, None


def ideal_rate_reduction(d: int, k: int, eps_sq: float) -> float:
    """Largest R - R_c of k balanced clusters in R^d: orthogonal subspaces of dimension d / k, each filled evenly.

    Args:
        d: embedding dimension, a multiple of k.
        k: number of clusters.
        eps_sq: squared distortion, positive.

    >>> round(ideal_rate_reduction(12, 3, 0.2), 6)
    10.410759
    """
    check_count("k", k)
    check_count("d", d)
    check_positive("eps_sq", eps_sq)
    if d % k:
        raise ValueError(f"d must be a multiple of k = {k}, got {d}")
    r = d // k
    return d * math.log1p(1 / eps_sq) - r * math.log1p(d / (r * eps_sq))


def coding_length(Z: Float[Tensor, "n d"], labels: Int[Tensor, " n"], eps_sq: float = 0.1) -> float:
    """Nats to code all samples cluster by cluster, labels included: the criterion that picks k without labels.

    sum_k (n_k + d) / 2 logdet(I + d / (eps^2 n_k) Z_k'Z_k) + n_k (-log(n_k / n)); smaller is better.

    Args:
        Z: one sample a row, of length one.
        labels: cluster of each sample.
        eps_sq: squared distortion, positive.
    """
    check_positive("eps_sq", eps_sq)
    n, d = Z.shape
    if len(labels) != n:
        raise ValueError(f"labels must name a cluster for each of the {n} rows of Z, got {len(labels)}")
    total = 0.0
    for label in labels.unique():
        members = Z[labels == label]
        size = len(members)
        total += (size + d) / 2 * float(coding_rate(members, eps_sq)) + size * math.log(n / size)
    return total


def numerical_rank(Z: Float[Tensor, "n d"], energy: float = 0.95) -> int:
    """Smallest r whose r leading squared singular values exceed `energy` of their sum; 0 for a zero matrix.

    Args:
        Z: one sample a row.
        energy: in [0, 1].

    >>> numerical_rank(torch.diag(torch.tensor([3.0, 3.0, 0.1])))
    2
    """
    check_between("energy", energy, 0, 1)
    check_finite("Z", Z)
    squares = torch.linalg.svdvals(_at_least_single(Z)).square()
    if not squares.numel() or squares[0] == 0:
        return 0
    reached = squares.cumsum(0) > energy * squares.sum()
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(squares)


def class_spectra(Z: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Sequence[Float[Tensor, " r"]]:
    """Singular values of each class, largest first, classes in increasing order of label."""
    return [torch.linalg.svdvals(Z[labels == label]) for label in labels.unique()]


def mean_cosine_between(Z: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
    """Mean |<z_i, z_j>| over pairs with different labels; NaN where all labels agree. Rows of length one."""
    cosine = (Z @ Z.mT).abs()
    return float(cosine[labels[:, None] != labels[None, :]].mean())


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
