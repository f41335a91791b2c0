"""What a conversion can choose: the recurrence, where its gates come from, the window, the layers that stay softmax."""

from dataclasses import asdict, dataclass
from typing import Any

from locally.checks import check_choice, check_count, check_nonnegative, check_positive

VARIANTS = ("gla", "hgrn2", "gsa", "mamba2", "mlstm", "rwkv6", "linear")
SOURCES = ("k", "q", "v")


@dataclass(frozen=True, kw_only=True)
class LigerConfig:
    """Liger attention: o = alpha recurrence + beta softmax attention over a short window.

    Args:
        variant: the gated recurrence. "gla", "hgrn2" and "gsa" gate every channel (GSA: every slot); "mamba2" and
            "mlstm" (gated retention's gate too) one number a head; "rwkv6" every channel with exp(-exp(.)); "linear"
            does not gate at all, the paper's ablation.
        window: keys that a query of the softmax branch sees, itself included; at least 1.
        alpha, beta: non-negative shares of recurrence and window, alpha + beta = 1. 0 leaves a branch out.
        gate_normalizer: divides the log gates of "gla" and "gsa"; positive. 16 halves what is remembered about every 16
            tokens where the pooled key is 0.
        gate_source: which projection the gates are pooled from, "k", "q" or "v".
        slots: of "gsa", at least 1; None for the head dimension.
        lower_bound: smallest gate of "hgrn2", in [0, 1).
        softmax_layers: layers that stay as they are. Their cache grows with the context: memory is no longer constant.
        chunk_size: of the chunkwise form, a power of two.

    Raises:
        ValueError, TypeError: an argument out of range.

    >>> LigerConfig(window=0)
    Traceback (most recent call last):
        ...
    ValueError: window must be at least 1, got 0
    """

    variant: str = "gla"
    window: int = 64
    alpha: float = 0.5
    beta: float = 0.5
    gate_normalizer: float = 16.0
    gate_source: str = "k"
    slots: int | None = None
    lower_bound: float = 0.0
    softmax_layers: tuple[int, ...] = ()
    chunk_size: int = 64

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_count("window", self.window)
        check_nonnegative("alpha", self.alpha)
        check_nonnegative("beta", self.beta)
        if abs(self.alpha + self.beta - 1) > 1e-9:
            raise ValueError(f"alpha + beta must be 1, got {self.alpha} + {self.beta}")
        check_positive("gate_normalizer", self.gate_normalizer)
        check_choice("gate_source", self.gate_source, SOURCES)
        if self.slots is not None:
            check_count("slots", self.slots)
        check_nonnegative("lower_bound", self.lower_bound)
        if self.lower_bound >= 1:
            raise ValueError(f"lower_bound must be below 1, got {self.lower_bound}")
        for layer in self.softmax_layers:
            check_count("softmax_layers", layer, at_least=0)
        check_count("chunk_size", self.chunk_size)
        if self.chunk_size & (self.chunk_size - 1):
            raise ValueError(f"chunk_size must be a power of two, got {self.chunk_size}")

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return asdict(self) | {"softmax_layers": list(self.softmax_layers)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LigerConfig":
        """The settings that a checkpoint carries; ValueError for names that are none."""
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown settings of Liger attention: {', '.join(sorted(unknown))}")
        return cls(**{**data, "softmax_layers": tuple(data.get("softmax_layers", ()))})
