"""The encoders of BERT and ESM in plain torch, from embedded tokens to last hidden states.

BERT adds learnt positions and normalises after each residual; ESM turns queries and keys by position (or adds learnt
positions) and normalises before. Sources: Devlin et al., arXiv 1810.04805; Rives et al. (2021) and Lin et al. (2023)
for ESM; Su et al., arXiv 2104.09864, for rotary positions.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# ESM is trained with 15 % of the tokens chosen, 80 % of those masked, and rescales what is read without masks
UNMASKED_SHARE = 1 - 0.15 * 0.8

NAMES = {
    "bert": (
        (r"^embeddings\.position_embeddings\.", "positions."),
        (r"^embeddings\.token_type_embeddings\.", "types."),
        (r"^embeddings\.LayerNorm\.", "norm_before."),
        (r"^encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"layers.\1.\2."),
        (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.mix."),
        (r"^encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layers.\1.norm_1."),
        (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.widen."),
        (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.narrow."),
        (r"^encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layers.\1.norm_2."),
    ),
    "esm": (
        (r"^embeddings\.position_embeddings\.", "positions."),
        (r"^embeddings\.layer_norm\.", "norm_before."),
        (r"^encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"layers.\1.\2."),
        (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.mix."),
        (r"^encoder\.layer\.(\d+)\.attention\.LayerNorm\.", r"layers.\1.norm_1."),
        (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.widen."),
        (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.narrow."),
        (r"^encoder\.layer\.(\d+)\.LayerNorm\.", r"layers.\1.norm_2."),
        (r"^encoder\.emb_layer_norm_after\.", "norm_after."),
    ),
}
OLD_NAMES = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))  # of layer norms, before 2020 and again of ESM's
WORDS = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Architecture:
    """What config.json says about an encoder.

    Raises:
        ValueError: a key is missing or has a value that is not known here.
    """

    family: Literal["bert", "esm"]
    width: int
    layers: int
    heads: int
    inner: int
    epsilon: float
    activation: str
    positions: int  # learnt ones; 0: rotary
    first_position: int
    types: int
    norm_before: bool
    token_scale: float
    rotary_base: float

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Architecture":
        family = config.get("model_type")
        if family not in ("bert", "esm"):
            raise ValueError(f'model_type must be "bert" or "esm", got {family!r}')
        missing = [k for k in ("hidden_size", "num_hidden_layers", "num_attention_heads") if k not in config]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        kind = config.get("position_embedding_type") or "absolute"
        if kind not in (("absolute",) if family == "bert" else ("absolute", "rotary")):
            raise ValueError(f"position_embedding_type {kind!r} is not known for {family}")
        activation = config.get("hidden_act") or "gelu"
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        width, heads = config["hidden_size"], config["num_attention_heads"]
        if width % heads:
            raise ValueError(f"hidden_size {width} does not divide into {heads} heads")
        esm = family == "esm"
        return cls(
            family=family,
            width=width,
            layers=config["num_hidden_layers"],
            heads=heads,
            inner=config.get("intermediate_size", 4 * width),
            epsilon=config.get("layer_norm_eps", 1e-12),
            activation=activation,
            positions=0 if kind == "rotary" else config.get("max_position_embeddings", 512),
            first_position=config.get("pad_token_id", 1) + 1 if esm else 0,
            types=0 if esm else config.get("type_vocab_size", 2),
            norm_before=bool(config.get("emb_layer_norm_before")) if esm else True,
            token_scale=UNMASKED_SHARE if esm and config.get("token_dropout") else 1.0,
            rotary_base=config.get("rope_theta") or 10_000.0,
        )


class Encoder(nn.Module):
    """Embedded tokens to hidden states, all positions attended, no dropout.

    Args:
        shape: as read from config.json.
    """

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.shape = shape
        norm = lambda: nn.LayerNorm(shape.width, shape.epsilon)
        self.positions = nn.Embedding(shape.positions, shape.width) if shape.positions else None
        self.types = nn.Embedding(shape.types, shape.width) if shape.types else None
        self.norm_before = norm() if shape.norm_before else None
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm_after = norm() if shape.family == "esm" else None

    def forward(self, words: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        x = words * self.shape.token_scale
        if self.positions is not None:
            first = self.shape.first_position
            last = first + x.shape[1]
            if last > self.shape.positions:
                raise ValueError(f"the model reads at most {self.shape.positions - first} tokens, got {x.shape[1]}")
            x = x + self.positions.weight[first:last]
        if self.types is not None:
            x = x + self.types.weight[0]
        if self.norm_before is not None:
            x = self.norm_before(x)
        for layer in self.layers:
            x = layer(x)
        return x if self.norm_after is None else self.norm_after(x)


class Layer(nn.Module):
    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        d = shape.width
        self.heads, self.norm_first = shape.heads, shape.family == "esm"
        self.rotary_base = None if shape.positions else shape.rotary_base
        self.activation = ACTIVATIONS[shape.activation]
        self.query, self.key, self.value, self.mix = (nn.Linear(d, d) for _ in range(4))
        self.widen, self.narrow = nn.Linear(d, shape.inner), nn.Linear(shape.inner, d)
        self.norm_1, self.norm_2 = nn.LayerNorm(d, shape.epsilon), nn.LayerNorm(d, shape.epsilon)

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        if self.norm_first:
            x = x + self.attention(self.norm_1(x))
            return x + self.feed_forward(self.norm_2(x))
        x = self.norm_1(x + self.attention(x))
        return self.norm_2(x + self.feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.activation(self.widen(x)))

    def attention(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        if self.rotary_base is not None:
            query, key = turned(query, self.rotary_base), turned(key, self.rotary_base)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.mix(mixed.transpose(1, 2).flatten(2))


def turned(x: Float[Tensor, "n heads tokens d"], base: float) -> Float[Tensor, "n heads tokens d"]:
    """Rotate the pairs (i, i + d/2) by position times base^(-2 i / d)."""
    half = x.shape[-1] // 2
    rate = base ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def translate(weights: Mapping[str, Tensor], family: Literal["bert", "esm"]) -> dict[str, Tensor]:
    """Stored names, with or without the prefix of a model with a head, to those of `Encoder`; other parts left out."""
    found = {}
    for name, tensor in weights.items():
        short = name.removeprefix(f"{family}.")
        for pattern, replacement in (*NAMES[family], *OLD_NAMES):
            short = re.sub(pattern, replacement, short)
        if short == WORDS or re.match(r"(positions|types|norm_before|norm_after|layers\.\d+)\.", short):
            found[short] = tensor
    return found
