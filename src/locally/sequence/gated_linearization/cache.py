"""The memory of decoding: a state and a ring of the window's keys and values for each layer, whatever the context."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from locally.sequence.gated_linearization.gates import State
from locally.sequence.gated_linearization.settings import LigerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LigerLayer(CacheLayerMixin):
    """One layer's state, and its last `window` keys (rotated) and values, written in place.

    Nothing kept here carries gradients. A state cannot be wound back: cropping is refused.

    Attributes:
        state: of the recurrence; None before the first token.
        seen: tokens so far, padding included.
    """

    is_croppable = False

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.state: State | None = None
        self.seen = 0
        self._visible: Bool[Tensor, "batch window"] | None = None
        self._unpadded = 0  # tokens since the last padded one

    @property
    def ring(self) -> tuple[Tensor, Tensor]:
        """Keys and values in the order of the ring, which attention does not depend on."""
        return self._held()[:2]

    @property
    def ring_visible(self) -> Tensor | None:
        """What the newest token sees: real tokens and itself. None when the whole ring is filled by real tokens."""
        if self._unpadded >= self.window:
            return None
        visible = self._held()[2].clone()
        visible[:, (self.seen - 1) % self.window] = True
        return visible

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        (B, heads), D = key_states.shape[:2], key_states.shape[-1]
        self.keys = key_states.new_zeros(B, heads, self.window, D)
        self.values = value_states.new_zeros(B, heads, self.window, value_states.shape[-1])
        self._visible = torch.zeros(B, self.window, dtype=torch.bool, device=key_states.device)
        self.is_initialized = True

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, visible: Tensor | None) -> None:
        """Remember the last `window` of these, whose visibility is given where some are padding."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        keys, values, shown = self._held()
        T = k.shape[2]
        kept = min(T, self.window)
        places = torch.arange(self.seen + T - kept, self.seen + T, device=k.device) % self.window
        keys.index_copy_(2, places, k[:, :, T - kept :])
        values.index_copy_(2, places, v[:, :, T - kept :])
        now = shown.new_ones(k.shape[0], kept) if visible is None else visible[:, T - kept :]
        shown.index_copy_(1, places, now)
        self._unpadded = self._unpadded + T if visible is None else 0
        self.count(T)

    def count(self, tokens: int) -> None:
        self.seen += tokens

    def recent(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The window - 1 newest keys, values and their visibility, oldest first; None before the first token."""
        if not self.is_initialized or self.window == 1:
            return None
        keys, values, visible = self._held()
        order = (self.seen + torch.arange(1, self.window, device=keys.device)) % self.window
        return keys[:, :, order], values[:, :, order], visible[:, order]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append, and return the ring: the interface of other caches' layers."""
        self.append(key_states, value_states, None)
        return self.ring

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__(self.window)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(f"a recurrent state cannot be cropped, asked to remove {tokens_to_remove} tokens")

    def tensors(self) -> list[Tensor]:
        return [*(self.state or ()), *(self._held() if self.is_initialized else ())]

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        assert self._visible is not None
        return self.keys, self.values, self._visible

    def _all(self, function: Any) -> None:
        """Replace every tensor by what `function` makes of it."""
        if self.state is not None:
            self.state = tuple(function(part) for part in self.state)
        if self.is_initialized:
            self.keys, self.values, self._visible = (function(x) for x in self._held())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._all(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._all(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._all(lambda x: x[indices])


class LigerCache(Cache):
    """For a converted model: `LigerLayer`s, and ordinary growing layers where softmax attention stayed.

    Args:
        config: of the converted model.
    """

    def __init__(self, config: "PreTrainedConfig") -> None:
        liger = LigerConfig.from_dict(config.liger)
        layers = list(DynamicCache(config=config).layers)
        for index in range(len(layers)):
            if index not in liger.softmax_layers:
                layers[index] = LigerLayer(liger.window)
        super().__init__(layers=layers)

    @property
    def is_dummy(self) -> list[bool]:
        """Masks are laid out for the softmax layers; ours need none."""
        return [isinstance(layer, LigerLayer) for layer in self.layers]


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds, of this kind or of Transformers' own."""
    layers: list[Any] = cache.layers
    held = [x for y in layers for x in (y.tensors() if isinstance(y, LigerLayer) else (y.keys, y.values))]
    return sum(x.nbytes for x in held if x is not None)
