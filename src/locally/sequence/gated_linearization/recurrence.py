"""Gated linear recurrences in three forms that give the same numbers: chunkwise, parallel and recurrent.

Gated linear attention reads S_t = diag(exp g_t) S_{t-1} + k_t^T v_t with q_t; gated slot attention is two such
recurrences with a softmax between them. Sources: Yang et al., arXiv 2312.06635 (chunkwise form); Zhang et al.,
arXiv 2409.07146 (slots); used by Lan et al., arXiv 2503.01496, equations 6-8.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from locally.checks import check_choice, check_count, check_shape

Form = Literal["chunk", "parallel", "recurrent"]
FORMS = ("chunk", "parallel", "recurrent")
# largest exponent that one factor of a product of two may have, so that the product stays finite with room to spare
LARGEST_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}
TOGETHER = 32  # chunks at a time: what lies between two products stays in the processor's cache
SHUT = {torch.float32: -110.0, torch.float64: -800.0}  # log gates below are 0 as gates, and stay out of sums


def gated_linear_attention(
    q: Float[Tensor, "batch heads T D"],
    k: Float[Tensor, "batch kv_heads T D"],
    v: Float[Tensor, "batch kv_heads T Dv"],
    log_gate: Float[Tensor, "batch kv_heads T gates"] | None = None,
    *,
    initial_state: Float[Tensor, "batch kv_heads D Dv"] | None = None,
    chunk_size: int = 64,
    mode: Form = "chunk",
) -> tuple[Float[Tensor, "batch heads T Dv"], Float[Tensor, "batch kv_heads D Dv"]]:
    """o_t = q_t S_t with S_t = diag(exp log_gate_t) S_{t-1} + k_t^T v_t; no scale, no normaliser.

    Query heads h G, ..., h G + G - 1 read the one state of key head h, G = heads / kv_heads: nothing is repeated.

    Args:
        log_gate: at most 0; one a channel of the keys (gates = D), one a head (gates = 1), or None for no decay.
        initial_state: S_0; zeros if None.
        chunk_size: a power of two.
        mode: "chunk" for training and long prompts, "parallel" for one chunk over everything, "recurrent" for single
            tokens. They agree to rounding.

    Returns:
        Outputs in v's dtype, and the last state, in float32 or what is wider.

    Raises:
        ValueError, TypeError: shapes that do not fit together, a positive gate, an unknown mode.

    Complexity:
        chunk: O(T (C + D) (D + Dv)) work a head, C the chunk size, O(T) memory; parallel: O(T^2); recurrent: O(T D Dv)
        in T steps. No exponential of a positive sum of gates is formed unless it is known to be small.

    >>> q = k = torch.eye(3).reshape(1, 1, 3, 3)
    >>> v = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    >>> o, state = gated_linear_attention(q, k, v, torch.full((1, 1, 3, 1), 0.5).log())
    >>> o.flatten().tolist(), state.flatten().tolist()
    ([1.0, 2.0, 3.0], [0.25, 1.0, 3.0])
    """
    check_heads(q, k, v, log_gate, (1, k.shape[-1]), mode, chunk_size)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (*k.shape[:2], k.shape[-1], v.shape[-1]))
    o, state = recur(q, k, v, log_gate, initial_state, chunk_size, mode)
    return o.to(v.dtype), state


def gated_slot_attention(
    q: Float[Tensor, "batch heads T D"],
    k: Float[Tensor, "batch kv_heads T D"],
    v: Float[Tensor, "batch kv_heads T Dv"],
    log_gate: Float[Tensor, "batch kv_heads T M"],
    *,
    initial_state: tuple[Float[Tensor, "batch kv_heads M D"], Float[Tensor, "batch kv_heads M Dv"]] | None = None,
    chunk_size: int = 64,
    mode: Form = "chunk",
) -> tuple[
    Float[Tensor, "batch heads T Dv"],
    tuple[Float[Tensor, "batch kv_heads M D"], Float[Tensor, "batch kv_heads M Dv"]],
]:
    """Softmax attention over M slots: o_t = softmax(K_t q_t) V_t, whose slots forget and write by one gate.

    K_t = diag(exp g_t) K_{t-1} + (1 - exp g_t)^T k_t, and V_t likewise from v_t. Two gated recurrences: the first,
    gated on its values, gives the logits; the second, gated on its keys, reads the slots.

    Args, Returns, Raises:
        as for `gated_linear_attention`, with a gate a slot and the pair (K, V) as state.

    Complexity:
        chunk: O(T (C + M) (D + Dv)) work a head, O(T) memory.

    >>> v = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1)
    >>> gated_slot_attention(v, v, v, torch.full((1, 1, 2, 1), -torch.inf))[0].flatten().tolist()
    [1.0, 2.0]
    """
    check_heads(q, k, v, log_gate, None, mode, chunk_size)
    slots = log_gate.shape[-1]
    if initial_state is not None:
        for name, part, width in (("K", initial_state[0], k.shape[-1]), ("V", initial_state[1], v.shape[-1])):
            check_shape(f"initial_state ({name})", part, (*k.shape[:2], slots, width))
    o, state = attend_slots(q, k, v, log_gate, initial_state, chunk_size, mode)
    return o.to(v.dtype), state


def attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    state: tuple[Tensor, Tensor] | None,
    chunk_size: int,
    mode: str,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    keys, values = (None, None) if state is None else state
    log_gate = log_gate.to(computing(v))
    write = -torch.expm1(log_gate)
    transposed = None if keys is None else keys.mT
    logits, transposed = recur(q, k, write, log_gate, transposed, chunk_size, mode, gates_values=True)
    o, values = recur(logits.softmax(-1), write, v, log_gate, values, chunk_size, mode)
    return o, (transposed.mT, values)


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
    mode: str,
    *,
    gates_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence in one of its forms, unchecked; with `gates_values` the gates scale the columns of the state."""
    dtype = computing(v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    g = k.new_zeros(*k.shape[:-1], 1) if log_gate is None else log_gate.to(dtype).clamp(min=SHUT[dtype])
    state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.to(dtype)
    grouped = q.unflatten(1, (k.shape[1], -1))  # batch, key head, query head of that key head, T, D
    if mode == "recurrent":
        o, state = stepwise(grouped, k, v, g, state, gates_values)
    else:
        T = k.shape[-2]
        chunk = min(chunk_size, power_of_two(T)) if mode == "chunk" else power_of_two(T)
        pieces = []
        for start in range(0, T, chunk * TOGETHER):
            at = slice(start, start + chunk * TOGETHER)
            piece, state = chunkwise(
                grouped[..., at, :], k[..., at, :], v[..., at, :], g[..., at, :], state, chunk, gates_values
            )
            pieces.append(piece)
        o = torch.cat(pieces, -2) if len(pieces) > 1 else pieces[0]
    return o.flatten(1, 2), state


def stepwise(
    q: Float[Tensor, "b h G T D"],
    k: Float[Tensor, "b h T D"],
    v: Float[Tensor, "b h T Dv"],
    g: Float[Tensor, "b h T _"],
    state: Float[Tensor, "b h D Dv"],
    gates_values: bool,
) -> tuple[Float[Tensor, "b h G T Dv"], Float[Tensor, "b h D Dv"]]:
    gates = (g.unsqueeze(-2) if gates_values else g.unsqueeze(-1)).exp()
    outputs = []
    for t in range(k.shape[-2]):
        state = torch.addcmul(gates[:, :, t] * state, k[:, :, t].unsqueeze(-1), v[:, :, t].unsqueeze(-2))
        outputs.append(q[:, :, :, t] @ state)
    return torch.stack(outputs, -2), state


def chunkwise(
    q: Float[Tensor, "b h G T D"],
    k: Float[Tensor, "b h T D"],
    v: Float[Tensor, "b h T Dv"],
    g: Float[Tensor, "b h T _"],
    state: Float[Tensor, "b h D Dv"],
    chunk: int,
    gates_values: bool,
) -> tuple[Float[Tensor, "b h G T Dv"], Float[Tensor, "b h D Dv"]]:
    T = k.shape[-2]
    q, k, v, g = (pad(x, (0, 0, 0, -T % chunk)).unflatten(-2, (-1, chunk)) for x in (q, k, v, g))
    q = q.transpose(2, 3)  # b h N G C D
    b = g.cumsum(-2)  # log decay since the chunk began, its own gate included
    last = b[..., -1:, :]
    away = b - b[..., chunk // 2 : chunk // 2 + 1, :]  # from the middle: half the range on either side
    gentle = float(away.detach().abs().max()) <= LARGEST_EXPONENT[b.dtype]
    kept = (last - b if gentle else still_to_come(g)).exp()
    if gates_values:
        added, decay = k.mT @ (v * kept), last.exp()
    else:
        added, decay = (k * kept).mT @ v, last.mT.exp()
    before, state = carry(state, decay, added)
    passed = b.exp().unsqueeze(-3)
    o = passed * rows(q, before) if gates_values else rows(q * passed, before)
    o = o + (at_once(q, k, v, away, gates_values) if gentle else by_halves(q, k, v, g, gates_values))
    return o.transpose(2, 3).flatten(3, 4)[..., :T, :], state


def carry(
    state: Float[Tensor, "b h D Dv"], decay: Float[Tensor, "b h N _ _"], added: Float[Tensor, "b h N D Dv"]
) -> tuple[Float[Tensor, "b h N D Dv"], Float[Tensor, "b h D Dv"]]:
    """The state before each chunk, and after the last."""
    before = []
    for fade, new in zip(decay.unbind(2), added.unbind(2)):
        before.append(state)
        state = torch.addcmul(new, fade, state)
    return torch.stack(before, 2), state


def at_once(
    q: Float[Tensor, "b h N G C D"],
    k: Float[Tensor, "b h N C D"],
    v: Float[Tensor, "b h N C Dv"],
    away: Float[Tensor, "b h N C _"],
    gates_values: bool,
) -> Float[Tensor, "b h N G C Dv"]:
    """What the positions of a chunk read from one another: weight exp(away_i - away_j) of key j <= i for query i."""
    grow, shrink = away.exp().unsqueeze(-3), (-away).exp()
    if gates_values:
        return grow * rows(rows(q, k.mT).tril(), v * shrink)
    return rows(rows(q * grow, (k * shrink).mT).tril(), v)


def by_halves(
    q: Float[Tensor, "b h N G C D"],
    k: Float[Tensor, "b h N C D"],
    v: Float[Tensor, "b h N C Dv"],
    g: Float[Tensor, "b h N C _"],
    gates_values: bool,
) -> Float[Tensor, "b h N G C Dv"]:
    """The same for any gates: a block's later half reads its earlier half, and each half is a block again.

    Decay is counted from the border between them, so that no exponent is positive and no large sums are subtracted.
    """
    o = (q * k.unsqueeze(-3)).sum(-1, keepdim=True) * v.unsqueeze(-3)
    C = k.shape[-2]
    half = 1
    while half < C:
        _, late_q = halves(q, half)
        (early_k, _), (early_v, _), (early_g, late_g) = (halves(x, half) for x in (k, v, g))
        since, until = late_g.cumsum(-2).exp().unsqueeze(-4), still_to_come(early_g).exp()
        if gates_values:
            read = since * apart(apart(late_q, early_k.mT), early_v * until)
        else:
            read = apart(apart(late_q * since, (early_k * until).mT), early_v)
        o = o + torch.stack([torch.zeros_like(read), read], -3).flatten(-4, -2)
        half *= 2
    return o


def still_to_come(g: Float[Tensor, "*batch C width"]) -> Float[Tensor, "*batch C width"]:
    """Sums over the rows after each."""
    return pad(g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def halves(x: Float[Tensor, "*batch C width"], half: int) -> tuple[Tensor, ...]:
    """Earlier and later halves of all blocks of 2 half rows."""
    return x.unflatten(-2, (-1, 2, half)).unbind(-3)


def apart(q: Float[Tensor, "*batch G R c D"], m: Float[Tensor, "*batch R D E"]) -> Float[Tensor, "*batch G R c E"]:
    """Every query head's rows of block r times the one matrix of that block."""
    return rows(q.transpose(-4, -3), m).transpose(-4, -3)


def rows(q: Float[Tensor, "*batch G C D"], m: Float[Tensor, "*batch D E"]) -> Float[Tensor, "*batch G C E"]:
    """Rows of all query heads times the matrix of their key head, as one product."""
    return (q.flatten(-3, -2) @ m).unflatten(-2, q.shape[-3:-1])


def computing(x: Tensor) -> torch.dtype:
    """States are kept in float32 at least: they sum over the whole context."""
    return torch.promote_types(x.dtype, torch.float32)


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def check_heads(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor | None, widths: tuple[int, ...] | None, mode: str, chunk: int
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, T, channels), got {tuple(x.shape)}")
    B, H, T, D = q.shape
    if T == 0:
        raise ValueError("q must hold at least one position")
    kv_heads = k.shape[1]
    if kv_heads == 0 or H % kv_heads:
        raise ValueError(f"k must have a number of heads that divides q's {H}, got {kv_heads}")
    check_shape("k", k, (B, kv_heads, T, D))
    check_shape("v", v, (B, kv_heads, T, None))
    if log_gate is not None:
        check_shape("log_gate", log_gate, (B, kv_heads, T, None))
        if widths is not None and log_gate.shape[-1] not in widths:
            raise ValueError(f"log_gate must have 1 or {widths[-1]} channels, got {log_gate.shape[-1]}")
        if not bool((log_gate <= 0).all()):
            raise ValueError("log_gate must be at most 0 everywhere")
    check_choice("mode", mode, FORMS)
    check_count("chunk_size", chunk)
    if chunk & (chunk - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk}")
