"""Local linear attention as a layer, and as an attention implementation of Transformers' models."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from locally.checks import check_count, check_positive
from locally.errors import require
from locally.sequence.local_linear_attention.decoding import KeyValueCache, lla_decode
from locally.sequence.local_linear_attention.functional import local_linear_attention


class LocalLinearAttention(nn.Module):
    """Causal self-attention with projections, in place of a multi-head softmax attention.

    Args:
        embed_dim: width of the input and the output, num_heads times the dimension of a head.
        num_heads, num_kv_heads: query heads, and heads of keys and values that divide them (default: as many).
        qk_norm: scale queries and keys to unit norm, so that weights are Gaussian and the scale is an inverse squared
            bandwidth.
        learnable_ridge: one ridge a head, through softplus; else constant.
        ridge: positive, at the start. Keys of unit norm have variances of about 1 / E: a ridge of 1 starts close to
            softmax attention, 0.1 between it and linear regression.
        rope_theta: base of rotary position embeddings, None for none.
        bias: of the projections.
        solver, preconditioner, tol, max_iter, backend: as for `local_linear_attention`.

    Source: arXiv 2510.01450.

    >>> layer = LocalLinearAttention(32, num_heads=4, num_kv_heads=2)
    >>> x = torch.randn(2, 10, 32)
    >>> y = layer(x)
    >>> prompt, cache = layer(x[:, :9], use_cache=True)
    >>> last, cache = layer(x[:, 9:], past=cache, use_cache=True)
    >>> torch.allclose(last, y[:, 9:], atol=1e-4)
    True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        qk_norm: bool = True,
        learnable_ridge: bool = True,
        ridge: float = 0.1,
        rope_theta: float | None = None,
        bias: bool = False,
        solver: str = "auto",
        preconditioner: str | None = None,
        tol: float = 1e-6,
        max_iter: int = 32,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", kv_heads)):
            check_count(name, count)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {kv_heads} and {num_heads}")
        check_positive("ridge", ridge)
        self.head_dim = embed_dim // num_heads
        if rope_theta is not None:
            check_positive("rope_theta", rope_theta)
            if self.head_dim % 2:
                raise ValueError(f"rope_theta needs heads of even dimension, got {self.head_dim}")
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.qk_norm, self.rope_theta = qk_norm, rope_theta
        self.options = {
            "solver": solver,
            "preconditioner": preconditioner,
            "tol": tol,
            "max_iter": max_iter,
            "backend": backend,
        }
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias)
        raw = torch.full((num_heads, 1), ridge + math.log(-math.expm1(-ridge)))  # softplus of it is the ridge
        self.raw_ridge = nn.Parameter(raw, requires_grad=learnable_ridge)
        # logits of random directions have unit variance at the start, as in softmax attention without normalisation
        power = 0.5 if qk_norm else -0.5
        self.log_scale = nn.Parameter(torch.full((num_heads, 1), power * math.log(self.head_dim)))

    @property
    def ridge(self) -> Float[Tensor, "heads 1"]:
        """The ridge of each head, positive."""
        return nn.functional.softplus(self.raw_ridge)

    def forward(
        self,
        x: Float[Tensor, "batch L embed"],
        key_padding_mask: Bool[Tensor, "batch L"] | None = None,
        past: KeyValueCache | None = None,
        use_cache: bool = False,
    ) -> Float[Tensor, "batch L embed"] | tuple[Float[Tensor, "batch L embed"], KeyValueCache]:
        """Attend causally within x, or from x to the tokens of `past` and x; decoding has no gradients.

        Args:
            key_padding_mask: True where x is padding; its outputs mean nothing.
            past: of an earlier call; it is extended in place.
            use_cache: also return the cache for the next call.

        Raises:
            ValueError: x has the wrong width, or holds NaN or infinity.
        """
        if x.ndim != 3 or x.shape[-1] != self.q_proj.in_features:
            raise ValueError(f"x must have shape (batch, length, {self.q_proj.in_features}), got {tuple(x.shape)}")
        q, k, v = self.project(x, 0 if past is None else past.seen)
        options: dict[str, Any] = {"ridge": self.ridge, "scale": self.log_scale.exp(), **self.options}
        if past is None and not use_cache:
            o = local_linear_attention(q, k, v, key_padding_mask=key_padding_mask, **options)
            return self.merge(o)
        past = KeyValueCache() if past is None else past
        y = self.merge(lla_decode(q, k, v, past, hidden=key_padding_mask, **options))
        return (y, past) if use_cache else y

    def merge(self, o: Float[Tensor, "batch heads L d"]) -> Float[Tensor, "batch L embed"]:
        """The output projection of all heads side by side."""
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def project(self, x: Float[Tensor, "batch L embed"], position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the heads, normalised and rotated as set; the first token has this position."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        if self.rope_theta is not None:
            q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        return q, k, v


def rotate(x: Float[Tensor, "*batch L E"], position: int, theta: float) -> Float[Tensor, "*batch L E"]:
    """Rotary position embedding of rows at `position`, `position` + 1, ...; halves of a head are paired."""
    L, E = x.shape[-2:]
    frequencies = theta ** (-torch.arange(0, E, 2, device=x.device, dtype=torch.float32) / E)
    angles = torch.outer(torch.arange(position, position + L, device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def register_with_transformers(name: str = "local_linear", **options: Any) -> str:
    """Let models of Transformers take this attention: `from_pretrained(folder, attn_implementation=name)`.

    Causal models whose layers use the attention interface (Llama and its relatives), with padding and caches; sliding
    windows and attention dropout are refused with ValueError. `options` are those of `local_linear_attention`, such as
    `ridge`. Returns the name. Raises MissingExtra without Transformers.
    """
    require("transformers", "llm")
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if dropout:
            raise ValueError(f"dropout of attention weights must be 0: they are no probabilities, got {dropout}")
        if sliding_window is not None and sliding_window < key.shape[-2]:
            raise ValueError(f"sliding_window must be None or as long as the sequence, got {sliding_window}")
        hidden = None if attention_mask is None else ~attention_mask.bool()
        causal = getattr(module, "is_causal", True) and query.shape[-2] > 1
        o = local_linear_attention(
            query, key, value, scale=scaling, is_causal=causal, key_padding_mask=hidden, **options
        )
        return o.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, flash_attention_mask)  # the padding of each key, and nothing n x n
    return name
