"""Transformer layers that can be folded, and the one-layer transformer for modular addition (arXiv 2405.10928, 4.1)."""

import math
from collections import OrderedDict
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from locally.checks import check_count


class Residual(nn.Sequential):
    """x + layers(x).

    >>> Residual(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return x + super().forward(x)


class CausalSelfAttention(nn.Module):
    """Softmax attention of every position to itself and to those before it, with scores over sqrt(head_width).

    Args:
        width: of the residual stream, at least 1.
        heads: at least 1.
        head_width: at least 1; default width / heads.

    Raises:
        ValueError: a size is below 1, or heads do not divide the width and no head_width is given.

    >>> CausalSelfAttention(8, 2)(torch.ones(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, head_width: int | None = None) -> None:
        super().__init__()
        check_count("width", width)
        check_count("heads", heads)
        if head_width is None:
            if width % heads:
                raise ValueError(f"heads must divide width, got {heads} and {width}")
            head_width = width // heads
        check_count("head_width", head_width)
        self.width, self.heads, self.head_width = width, heads, head_width
        self.project_in = nn.Linear(width, 3 * heads * head_width)  # queries, keys, values
        self.project_out = nn.Linear(heads * head_width, width)

    def forward(self, x: Float[Tensor, "n positions width"]) -> Float[Tensor, "n positions width"]:
        q, k, v = self.project_in(x).unflatten(-1, (3, self.heads, self.head_width)).unbind(-3)
        return self.project_out(self.mix(q, k, v))

    @staticmethod
    def mix(
        q: Float[Tensor, "n positions heads d"],
        k: Float[Tensor, "n positions heads d"],
        v: Float[Tensor, "n positions heads d"],
    ) -> Float[Tensor, "n positions heads_d"]:
        """Values averaged by softmax(q . k / sqrt(d)) over present and past positions, heads side by side."""
        positions = q.shape[1]
        scores = torch.einsum("nthd,nshd->nhts", q, k) / math.sqrt(q.shape[-1])
        future = torch.ones(positions, positions, dtype=torch.bool, device=q.device).triu(1)
        pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("nhts,nshd->nthd", pattern, v).flatten(-2)


class LastPosition(nn.Module):
    """(n, positions, width) -> (n, width): only the last position goes on."""

    def forward(self, x: Float[Tensor, "n positions width"]) -> Float[Tensor, "n width"]:
        return x[:, -1]


class TokenEmbedding(nn.Module):
    """Sum of a token's and a position's vector, (n, positions) -> (n, positions, width)."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(vocabulary, width) / math.sqrt(width))
        self.positions = nn.Parameter(torch.randn(positions, width) / math.sqrt(width))

    def forward(self, tokens: Int[Tensor, "n positions"]) -> Float[Tensor, "n positions width"]:
        return F.embedding(tokens, self.tokens) + self.positions[: tokens.shape[1]]  # its backward is the faster one


def addition_transformer(
    modulus: int = 113, *, width: int = 128, heads: int = 4, head_width: int = 32, hidden: int = 512
) -> nn.Sequential:
    """The paper's one-layer transformer without normalisation: tokens (a, b, =) to the logits of a + b mod `modulus`.

    Node layers of the paper: "attention", "mlp", "unembed" and the output. Token `modulus` is "=".

    Raises:
        TypeError, ValueError: a size is no positive integer.

    >>> addition_transformer(7, width=8, heads=2, head_width=4, hidden=16)(torch.tensor([[1, 2, 7]])).shape
    torch.Size([1, 8])
    """
    check_count("modulus", modulus, at_least=2)
    for name, size in (("width", width), ("heads", heads), ("head_width", head_width), ("hidden", hidden)):
        check_count(name, size)
    return nn.Sequential(
        OrderedDict(
            embed=TokenEmbedding(modulus + 1, 3, width),
            attention=Residual(CausalSelfAttention(width, heads, head_width)),
            last=LastPosition(),
            mlp=Residual(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)),
            unembed=nn.Linear(width, modulus + 1),
        )
    )


def load_addition_transformer(path: Path | str) -> nn.Sequential:
    """Read `addition_transformer` from a safetensors file in the layout of TransformerLens (one block, ReLU, no norm).

    Raises:
        ValueError: the file is no such model.
    """
    try:
        with safe_open(str(path), "pt") as file:
            w = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not readable as safetensors: {error}") from error
    block = "blocks.0."
    needed = {
        *("embed.W_E", "pos_embed.W_pos", "unembed.W_U", "unembed.b_U"),
        *(f"{block}attn.{kind}_{part}" for kind in "Wb" for part in "QKVO"),
        *(f"{block}mlp.{kind}_{part}" for kind in "Wb" for part in ("in", "out")),
    }
    if missing := sorted(needed - w.keys()):
        raise ValueError(f"{path} holds no one-layer transformer: {', '.join(missing)} missing")
    if extra := sorted(name for name in w if name.startswith("blocks.1.") or ".ln" in name):
        raise ValueError(f"{path} holds more than one layer without normalisation: {', '.join(extra[:3])}")
    heads, width, head_width = w[f"{block}attn.W_Q"].shape
    hidden = w[f"{block}mlp.W_in"].shape[1]
    model = addition_transformer(
        len(w["embed.W_E"]) - 1, width=width, heads=heads, head_width=head_width, hidden=hidden
    )

    stacked = lambda kind: torch.stack([w[f"{block}attn.{kind}_{part}"] for part in "QKV"])
    state = {
        "embed.tokens": w["embed.W_E"],
        "embed.positions": w["pos_embed.W_pos"],
        "attention.0.project_in.weight": stacked("W").permute(0, 1, 3, 2).reshape(-1, width),
        "attention.0.project_in.bias": stacked("b").reshape(-1),
        "attention.0.project_out.weight": w[f"{block}attn.W_O"].reshape(-1, width).T,
        "attention.0.project_out.bias": w[f"{block}attn.b_O"],
        "mlp.0.weight": w[f"{block}mlp.W_in"].T,
        "mlp.0.bias": w[f"{block}mlp.b_in"],
        "mlp.2.weight": w[f"{block}mlp.W_out"].T,
        "mlp.2.bias": w[f"{block}mlp.b_out"],
        "unembed.weight": w["unembed.W_U"].T,
        "unembed.bias": w["unembed.b_U"],
    }
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: the shapes do not fit together: {error}") from error
    return model.eval()
