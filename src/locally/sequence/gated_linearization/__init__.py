"""Pretrained transformers into gated recurrences with a short attention window: constant-memory decoding.

For people who have a checkpoint of Llama's kind, a little text, and long contexts to decode. `linearize` converts a
model, `fit_lora` recovers its quality by low-rank adapters, `load` and Transformers' own `from_pretrained` read the
result; `gated_linear_attention`, `gated_slot_attention` and `sliding_window_attention` are the parts. Everything but
the parts needs the extra `llm`. Source: Lan et al., Liger, arXiv 2503.01496.

With keys of few heads and short contexts a key-value cache is smaller than a recurrent state: for 8 key heads of
dimension 128 in bfloat16 and a window of 64, the state (float32) and the window are as large as a cache of 192 tokens.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from locally.errors import MissingExtra
from locally.sequence.gated_linearization.attention import LigerAttention
from locally.sequence.gated_linearization.gates import gated_recurrence
from locally.sequence.gated_linearization.recurrence import gated_linear_attention, gated_slot_attention
from locally.sequence.gated_linearization.settings import LigerConfig
from locally.sequence.gated_linearization.window import sliding_window_attention

if TYPE_CHECKING or find_spec("transformers"):
    from locally.sequence.gated_linearization.cache import LigerCache, cache_bytes
    from locally.sequence.gated_linearization.models import linearize, load
    from locally.sequence.gated_linearization.recovery import Examples, Recovery, Schedule, Status, fit_lora
    from locally.sequence.gated_linearization.text import read_examples

__all__ = [
    "Examples",
    "LigerAttention",
    "LigerCache",
    "LigerConfig",
    "Recovery",
    "Schedule",
    "Status",
    "cache_bytes",
    "fit_lora",
    "gated_linear_attention",
    "gated_recurrence",
    "gated_slot_attention",
    "linearize",
    "load",
    "read_examples",
    "sliding_window_attention",
]


def __getattr__(name: str) -> Any:
    """Reached without Transformers only: names the extra that brings what was asked for."""
    if name in __all__:
        raise MissingExtra('transformers is not installed: pip install "locally[llm]" brings it')
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
