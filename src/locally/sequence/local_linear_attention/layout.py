"""One layout for every caller: batch and key-value heads flattened, query heads grouped under the keys they share."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locally.checks import check_finite


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values of all heads. `heads` counts batch entries times key-value heads.

    Keys are given relative to `centre`, the first key that is not hidden: z_ij = k_j - q_i does not change, and
    second moments lose no digits to an offset that all keys share. Logits lose s q_i . centre, one number a row, which
    leaves the fit as it is.
    """

    q: Float[Tensor, "heads group L d"]
    keys: Float[Tensor, "heads S d"]
    values: Float[Tensor, "heads S dv"]
    centre: Float[Tensor, "heads d"]
    ridge: Float[Tensor, "heads group L"]
    scale: Float[Tensor, "heads group L"]
    hidden: Bool[Tensor, "heads S"] | None
    causal: bool

    @property
    def first_reach(self) -> int:
        """How many keys the first query sees; each later one sees one more. All of them without a causal mask."""
        S, L = self.keys.shape[1], self.q.shape[2]
        return S - L + 1 if self.causal else S

    def reach(self, rows: slice) -> int:
        """How many leading keys any of these queries sees."""
        S = self.keys.shape[1]
        return max(0, min(S, self.first_reach + rows.stop - 1)) if self.causal else S


@dataclass(frozen=True)
class Arranged:
    """What `arrange` hands on: still part of the caller's autograd graph, in the caller's precision or float32."""

    q: Float[Tensor, "heads group L d"]
    k: Float[Tensor, "heads S d"]
    v: Float[Tensor, "heads S dv"]
    ridge: Float[Tensor, "heads group L"]
    scale: Float[Tensor, "heads group L"]
    hidden: Bool[Tensor, "heads S"] | None
    causal: bool
    shape: tuple[int, ...]  # of the queries without their last dimension

    def restore(self, rows: Float[Tensor, "heads group L ..."]) -> Tensor:
        """Back into the caller's shape."""
        return rows.reshape(self.shape + tuple(rows.shape[3:]))


def arrange(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: float | Tensor,
    scale: float | Tensor | None,
    is_causal: bool,
    key_padding_mask: Tensor | None,
) -> Arranged:
    """Check the caller's arguments and bring them into the layout of `Problem`; no copy where a view will do."""
    check_tensors(q, k, v)
    batch, heads, kv_heads = q.shape[:-3], q.shape[-3], k.shape[-3]
    L, d, S = q.shape[-2], q.shape[-1], k.shape[-2]
    group = heads // kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    per_query = (math.prod(batch) * kv_heads, group, L)
    return Arranged(
        q.to(dtype).reshape(*per_query, d),
        k.to(dtype).reshape(per_query[0], S, d),
        v.to(dtype).reshape(per_query[0], S, v.shape[-1]),
        rowwise("ridge", ridge, q, dtype).reshape(per_query),
        rowwise("scale", d**-0.5 if scale is None else scale, q, dtype).reshape(per_query),
        hidden_keys(key_padding_mask, (*batch, S), kv_heads),
        is_causal,
        tuple(q.shape[:-1]),
    )


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point type, got {x.dtype}")
        if x.ndim < 3:
            raise ValueError(f"{name} must have shape (..., heads, length, dimension), got {tuple(x.shape)}")
        if x.shape[-1] == 0:
            raise ValueError(f"{name} must have a positive last dimension, got shape {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"{name} must be {q.dtype} on {q.device} as q is, got {x.dtype} on {x.device}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's last dimension {q.shape[-1]}, got {k.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v must have k's heads and length {tuple(k.shape[:-1])}, got {tuple(v.shape[:-1])}")
    if k.shape[:-3] != q.shape[:-3]:
        raise ValueError(f"k must have q's batch dimensions {tuple(q.shape[:-3])}, got {tuple(k.shape[:-3])}")
    if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
        raise ValueError(f"k's number of heads must divide q's, got {k.shape[-3]} and {q.shape[-3]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_finite(name, x)


def rowwise(name: str, value: float | Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """One positive number a query, expanded without a copy."""
    given = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=dtype, device=q.device)
    if not (given.isfinite() & (given > 0)).all():
        shown = value if not isinstance(value, Tensor) else "a tensor with entries that are not"
        raise ValueError(f"{name} must be positive and finite, got {shown}")
    try:
        return given.to(dtype).expand(q.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to (..., heads, length) = {tuple(q.shape[:-1])}, got shape {tuple(given.shape)}"
        ) from None


def hidden_keys(mask: Tensor | None, expected: tuple[int, ...], kv_heads: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be boolean (True hides a key), got {mask.dtype}")
    if tuple(mask.shape) != expected:
        raise ValueError(f"key_padding_mask must have shape (..., keys) = {expected}, got {tuple(mask.shape)}")
    return (
        mask.unsqueeze(-2)
        .expand(*expected[:-1], kv_heads, expected[-1])
        .reshape(math.prod(expected[:-1]) * kv_heads, expected[-1])
    )


def pose(
    q: Float[Tensor, "heads group L d"],
    k: Float[Tensor, "heads S d"],
    v: Float[Tensor, "heads S dv"],
    ridge: Float[Tensor, "heads group L"],
    scale: Float[Tensor, "heads group L"],
    hidden: Bool[Tensor, "heads S"] | None,
    causal: bool,
) -> Problem:
    """Subtract the first key that is not hidden; the first and no mean, so that no later key touches an earlier row."""
    if k.shape[1] == 0:
        centre = k.new_zeros(k.shape[0], k.shape[2])
    elif hidden is None:
        centre = k[:, 0]
    else:
        first = (~hidden).int().argmax(1)
        centre = k[torch.arange(len(k), device=k.device), first]
    return Problem(q, k - centre.unsqueeze(1), v, centre, ridge, scale, hidden, causal)
