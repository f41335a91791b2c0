"""Liger attention as a layer: a softmax attention module whose projections now feed a recurrence and a short window."""

from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float
from torch import Tensor, cat, nn

from locally.sequence.gated_linearization.gates import gated_recurrence
from locally.sequence.gated_linearization.settings import LigerConfig
from locally.sequence.gated_linearization.window import attend_all, sliding_window_attention

if TYPE_CHECKING:
    from locally.sequence.gated_linearization.cache import LigerLayer

BORROWED = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


class LigerAttention(nn.Module):
    """o = alpha recurrence + beta window, from the projections of an attention module of Llama's kind.

    The modules are taken over under their names, so that weights of the one load into the other; nothing is added.
    Queries and keys are those before rotation in the recurrence, with rotary positions in the window; where the model
    normalises them a head (Qwen3), both branches and the gates read the normalised ones.

    Args:
        source: with `q_proj`, `k_proj`, `v_proj`, `o_proj`, `head_dim`, and perhaps `q_norm`, `k_norm`.
        config: of the conversion.
        layer_idx: which layer of a cache is this one's.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, source: nn.Module, config: LigerConfig, layer_idx: int) -> None:
        super().__init__()
        self.liger, self.layer_idx = config, layer_idx
        self.head_dim: int = source.head_dim  # type: ignore[assignment]
        for name in BORROWED:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    def forward(
        self,
        hidden_states: Float[Tensor, "batch T width"],
        position_embeddings: tuple[Float[Tensor, "_ T D"], Float[Tensor, "_ T D"]],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        padding_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "batch T width"], None]:
        """Called by a decoder layer of Transformers; `attention_mask`, the quadratic one, is not read.

        Args:
            position_embeddings: cosines and sines of the rotation.
            cache: a `LigerCache`, extended in place.
            padding_mask: 0 where a token is padding, for the T tokens or for all tokens so far.
        """
        T = hidden_states.shape[1]
        visible = None if padding_mask is None else padding_mask[:, -T:].bool()
        q, k, v = self.project(hidden_states)
        layer: LigerLayer | None = None if cache is None else cache.layers[self.layer_idx]
        parts = []
        if self.liger.alpha:
            state = None if layer is None else layer.state
            read, state = gated_recurrence(self.liger, q, k, v, state=state, visible=visible)
            parts.append(self.liger.alpha * read)
            if layer is not None:
                layer.state = tuple(part.detach() for part in state)
        if layer is not None and not self.liger.beta:
            layer.count(T)
        if self.liger.beta:
            rotated = (rotate(q, *position_embeddings), rotate(k, *position_embeddings), v)
            parts.append(self.liger.beta * self.attend_nearby(*rotated, layer, visible))
        o = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return self.o_proj(o.to(v.dtype).transpose(1, 2).flatten(2)), None

    def project(self, x: Float[Tensor, "batch T width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before rotation, each (batch, heads, T, head_dim)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend_nearby(
        self, q: Tensor, k: Tensor, v: Tensor, layer: "LigerLayer | None", visible: Bool[Tensor, "batch T"] | None
    ) -> Tensor:
        """The window branch: softmax attention to the last `window` tokens, o of q's shape.

        Args:
            q, k, v: rotated queries and keys, and values, (batch, heads, T, head_dim).
            layer: the cache's, which takes these keys and values in; None where every token is here.
            visible: False at padding.
        """
        scale = self.head_dim**-0.5
        if layer is None:
            return sliding_window_attention(q, k, v, window=self.liger.window, scale=scale, visible=visible)
        if q.shape[2] == 1:
            layer.append(k, v, visible)
            return attend_all(q, *layer.ring, scale=scale, visible=layer.ring_visible)
        past = layer.recent()
        layer.append(k, v, visible)
        if past is not None:
            now = past[2].new_ones(k.shape[0], k.shape[2]) if visible is None else visible
            k, v, visible = cat([past[0], k], 2), cat([past[1], v], 2), cat([past[2], now], 1)
        return sliding_window_attention(q, k, v, window=self.liger.window, scale=scale, visible=visible)


def rotate(
    x: Float[Tensor, "batch heads T D"], cos: Float[Tensor, "_ T D"], sin: Float[Tensor, "_ T D"]
) -> Float[Tensor, "batch heads T D"]:
    """Rotary position embedding; halves of a head are paired."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + cat([-second, first], -1) * sin.unsqueeze(1)
