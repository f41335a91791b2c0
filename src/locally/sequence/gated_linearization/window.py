"""Softmax attention over a sliding window in O(T w), the local branch of Liger attention (arXiv 2503.01496, eq. 9)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from locally.checks import check_count, check_positive, check_shape

TILE = 64  # queries of one product at least: smaller ones cost more in calls than they save in keys


def sliding_window_attention(
    q: Float[Tensor, "batch heads T D"],
    k: Float[Tensor, "batch kv_heads S D"],
    v: Float[Tensor, "batch kv_heads S Dv"],
    *,
    window: int,
    scale: float | None = None,
    visible: Bool[Tensor, "batch S"] | None = None,
) -> Float[Tensor, "batch heads T Dv"]:
    """Causal softmax attention in which a query sees the last `window` keys, its own included.

    Args:
        q: queries at the last T of the S positions; what comes before them is the past.
        window: at least 1. With `window` >= S this is ordinary causal attention.
        scale: of the logits, D^-1/2 if None.
        visible: False where a key is padding. A query always sees its own key, so that its output is finite.

    Raises:
        ValueError, TypeError: shapes that do not fit together, window < 1.

    Complexity:
        O(T w (D + Dv)) work and O(T w) memory a head: tiles of queries against the keys that they can see.

    >>> v = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1)
    >>> sliding_window_attention(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), v, window=2).flatten().tolist()
    [1.0, 1.5, 3.0]
    """
    check_count("window", window)
    if scale is not None:
        check_positive("scale", scale)
    B, H, T, D = q.shape
    kv_heads, S = k.shape[1:3]
    if kv_heads == 0 or H % kv_heads:
        raise ValueError(f"k must have a number of heads that divides q's {H}, got {kv_heads}")
    check_shape("k", k, (B, kv_heads, S, D))
    check_shape("v", v, (B, kv_heads, S, None))
    if not 0 < T <= S:
        raise ValueError(f"k must hold at least q's {T} positions, got {S}, and q at least one")
    if visible is not None:
        check_shape("visible", visible, (B, S))

    window = min(window, S)
    past = window - 1  # keys that the first query of a tile can see before its own
    tile = min(T, max(window, TILE))
    tiles = -(-T // tile)
    front, behind = past - (S - T), tiles * tile - T  # rows to add (negative: to drop)
    if tiles == 1 and front > 0:  # nothing to lay out: all queries against the keys there are
        front, past = 0, S - T
    mask = band(tile, past, window, q.device)
    if front or behind or tiles > 1:
        k, v = (pad(x, (0, 0, front, behind)) for x in (k, v))
        q = pad(q, (0, 0, 0, behind))
    if visible is not None or front > 0:
        there = torch.ones(B, S, dtype=torch.bool, device=q.device) if visible is None else visible
        there = pad(there, (front, behind)).unfold(1, past + tile, tile).unsqueeze(2)  # batch tiles 1 keys
        mask = (mask & there) | band(tile, past, 1, q.device)
    else:
        mask = mask.expand(1, 1, -1, -1)
    groups = H // kv_heads
    if tiles > 1:
        k, v = (x.unfold(2, past + tile, tile).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
    queries = q.reshape(B, kv_heads, groups, tiles, tile, D).permute(0, 3, 1, 2, 4, 5)
    o = scaled_dot_product_attention(
        queries.reshape(B * tiles, kv_heads, groups * tile, D),
        k,
        v,
        attn_mask=mask.repeat(1, 1, groups, 1).flatten(0, 1).unsqueeze(1),
        scale=scale,
    )
    o = o.view(B, tiles, kv_heads, groups, tile, -1).permute(0, 2, 3, 1, 4, 5)
    return o.reshape(B, H, tiles * tile, -1)[:, :, :T]


def band(tile: int, past: int, window: int, device: torch.device) -> Bool[Tensor, "tile keys"]:
    """Query i of a tile, at key past + i, sees the `window` keys that end with its own."""
    own = past + torch.arange(tile, device=device).unsqueeze(-1)
    age = own - torch.arange(past + tile, device=device)
    return (age >= 0) & (age < window)


def attend_all(
    q: Float[Tensor, "batch heads 1 D"],
    k: Float[Tensor, "batch kv_heads w D"],
    v: Float[Tensor, "batch kv_heads w Dv"],
    scale: float,
    visible: Bool[Tensor, "batch w"] | None,
) -> Float[Tensor, "batch heads 1 Dv"]:
    """One query that sees all keys, in whatever order they lie: decoding from a ring."""
    groups = q.shape[1] // k.shape[1]
    folded = q.reshape(q.shape[0], k.shape[1], groups, q.shape[-1])
    mask = None if visible is None else visible[:, None, None].expand(-1, 1, groups, -1)
    return scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale).reshape(*q.shape[:-1], v.shape[-1])
