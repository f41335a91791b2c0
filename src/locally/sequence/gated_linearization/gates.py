"""Gates and feature maps from the projections that are there already: nothing is learned anew.

Lan et al., arXiv 2503.01496, equations 6-7 and table 1: the gate of a channel is a pooled key. Where the pool keeps the
width, the gate is the key itself.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, logsigmoid, softplus

from locally.sequence.gated_linearization.recurrence import attend_slots, computing, recur
from locally.sequence.gated_linearization.settings import LigerConfig

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Inputs:
    """What a recurrence reads: queries of all heads, and one key, value and gate for each head that keeps a state."""

    q: Float[Tensor, "batch heads T D"]
    k: Float[Tensor, "batch states T D"]
    v: Float[Tensor, "batch states T Dv"]
    log_gate: Float[Tensor, "batch states T _"] | None


def pool(x: Float[Tensor, "batch heads T D"], width: int) -> Float[Tensor, "batch heads T {width}"]:
    """Average the channels of all heads, side by side, into `width` a head; within heads where `width` divides D.

    >>> pool(torch.tensor([1.0, 3.0, 5.0, 7.0]).reshape(1, 1, 1, 4), 2).flatten().tolist()
    [2.0, 6.0]
    """
    B, H, T, D = x.shape
    if width == D:
        return x
    if D % width == 0:
        return x.unflatten(-1, (width, -1)).mean(-1)
    flat = adaptive_avg_pool1d(x.transpose(1, 2).reshape(B * T, 1, H * D), H * width)
    return flat.view(B, T, H, width).transpose(1, 2)


def inputs(
    config: LigerConfig,
    q: Float[Tensor, "batch heads T D"],
    k: Float[Tensor, "batch kv_heads T D"],
    v: Float[Tensor, "batch kv_heads T D"],
    visible: Bool[Tensor, "batch T"] | None = None,
) -> Inputs:
    """From raw projections, before any rotation. A token that is not visible leaves the state as it is."""
    dtype = computing(v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    source = {"k": k, "q": q, "v": v}[config.gate_source]
    if source.shape[1] != k.shape[1]:  # gates from queries: a state for each query head
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    D = k.shape[-1]
    log_gate: Tensor | None = None
    match config.variant:
        case "gla":
            log_gate = logsigmoid(pool(source, D)) / config.gate_normalizer
        case "gsa":
            log_gate = logsigmoid(pool(source, config.slots or D)) / config.gate_normalizer
        case "hgrn2":
            forget = pool(source, D)
            low = config.lower_bound
            log_gate = torch.log(low + (1 - low) * forget.sigmoid()) if low else logsigmoid(forget)
            k = (1 - low) * (-forget).sigmoid()  # 1 - gate, without cancellation where the gate is near 1
        case "mamba2":
            log_gate = -softplus(pool(source, 1))
        case "mlstm":
            log_gate = logsigmoid(pool(source, 1))
        case "rwkv6":
            log_gate = -pool(source, D).exp()
    if config.variant != "gsa":
        q = q.softmax(-1)
        if config.variant != "hgrn2":
            k = k.softmax(-1)
    if visible is not None:
        hidden = ~visible[:, None, :, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        log_gate = log_gate.masked_fill(hidden, 0) if log_gate is not None else None
    return Inputs(q, k, v, log_gate)


def gated_recurrence(
    config: LigerConfig,
    q: Float[Tensor, "batch heads T D"],
    k: Float[Tensor, "batch kv_heads T D"],
    v: Float[Tensor, "batch kv_heads T D"],
    *,
    state: State | None = None,
    visible: Bool[Tensor, "batch T"] | None = None,
) -> tuple[Float[Tensor, "batch heads T D"], State]:
    """The recurrent branch: gates, feature maps and the scan, chunkwise for sequences and step by step for one token.

    Returns:
        Outputs in float32 at least, and the state to go on with: (S,) with S (batch, states, D, D), or (K, V) of the
        slots, both (batch, states, M, D).

    Complexity:
        O(T (C + D) D) work a head, C the chunk size.
    """
    mode = "recurrent" if q.shape[2] == 1 else "chunk"
    x = inputs(config, q, k, v, visible)
    if config.variant == "gsa":
        assert x.log_gate is not None
        pair = None if state is None else (state[0], state[1])
        return attend_slots(x.q, x.k, x.v, x.log_gate, pair, config.chunk_size, mode)
    first = None if state is None else state[0]
    o, last = recur(x.q, x.k, x.v, x.log_gate, first, config.chunk_size, mode)
    return o, (last,)
