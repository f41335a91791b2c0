"""One token after the other: a cache of keys and values, and the same fit at the newest query."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locally.checks import check_count
from locally.sequence.local_linear_attention.functional import local_linear_attention


class KeyValueCache:
    """Keys and values of the tokens so far, in buffers that double when they are full.

    The weights of every earlier pair depend on the new query, so a step reads all pairs: O(n E) memory and work that
    grows with n, as for softmax attention. With `window`, only the last so many pairs are kept, in a ring: memory and
    work of a step are constant.

    Args:
        window: at least 1, or None for all.

    Attributes:
        seen: tokens so far, also those that a window has dropped.

    >>> cache = KeyValueCache(window=2)
    >>> for t in range(3):
    ...     cache.append(torch.full((1, 1, 4), float(t)), torch.zeros(1, 1, 4))
    >>> len(cache), cache.seen, cache.keys[0, :, 0].tolist()  # in the ring's order, which no fit depends on
    (2, 3, [2.0, 1.0])
    """

    def __init__(self, window: int | None = None) -> None:
        if window is not None:
            check_count("window", window)
        self.window = window
        self.seen = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._hidden: Tensor | None = None  # only once a padded token came

    def __len__(self) -> int:
        return self.seen if self.window is None else min(self.seen, self.window)

    @property
    def keys(self) -> Tensor:
        """Those taken in so far, without a copy; ValueError while there are none."""
        return self._filled(self._keys)

    @property
    def values(self) -> Tensor:
        """Those taken in so far, without a copy; ValueError while there are none."""
        return self._filled(self._values)

    @property
    def hidden(self) -> Tensor | None:
        """True where a cached token is padding; None if none is."""
        return None if self._hidden is None else self._hidden[..., : len(self)]

    def _filled(self, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            raise ValueError("the cache is empty")
        return buffer[..., : len(self), :]

    def append(
        self,
        k: Float[Tensor, "*batch Hkv n E"],
        v: Float[Tensor, "*batch Hkv n Ev"],
        hidden: Bool[Tensor, "*batch n"] | None = None,
    ) -> None:
        """Remember pairs without gradients. Raises ValueError if their shape does not fit what is there."""
        if k.shape[:-1] != v.shape[:-1]:
            raise ValueError(f"v must have k's heads and length {tuple(k.shape[:-1])}, got {tuple(v.shape[:-1])}")
        for name, new, buffer in (("k", k, self._keys), ("v", v, self._values)):
            if buffer is None:
                continue
            if new.shape[:-2] + new.shape[-1:] != buffer.shape[:-2] + buffer.shape[-1:] or new.dtype != buffer.dtype:
                raise ValueError(
                    f"{name} must continue a cache of {buffer.dtype} and shape {tuple(buffer.shape)} apart from the"
                    f" length, got {new.dtype} and {tuple(new.shape)}"
                )
        if hidden is not None and hidden.shape != (*k.shape[:-3], k.shape[-2]):
            raise ValueError(f"hidden must have shape {(*k.shape[:-3], k.shape[-2])}, got {tuple(hidden.shape)}")
        k, v = k.detach(), v.detach()
        places = self._places(k.shape[-2], k.device)
        kept = len(places)
        self._keys = self._room(self._keys, k)
        self._values = self._room(self._values, v)
        self._keys.index_copy_(-2, places, k[..., k.shape[-2] - kept :, :])
        self._values.index_copy_(-2, places, v[..., v.shape[-2] - kept :, :])
        if hidden is not None or self._hidden is not None:
            self._note_padding(places, hidden, k)
        self.seen += k.shape[-2]

    def _places(self, count: int, device: torch.device) -> Tensor:
        first = self.seen
        if self.window is not None and count > self.window:
            first, count = first + count - self.window, self.window
        places = torch.arange(first, first + count, device=device)
        return places if self.window is None else places % self.window

    def _room(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        needed = self.seen + new.shape[-2]
        if self.window is not None:
            needed = min(needed, self.window)
        have = 0 if buffer is None else buffer.shape[-2]
        if buffer is not None and needed <= have:
            return buffer
        size = max(needed, 2 * have) if self.window is None else min(max(needed, 2 * have), self.window)
        larger = new.new_empty(*new.shape[:-2], size, new.shape[-1])
        if buffer is not None:
            larger[..., :have, :] = buffer
        return larger

    def _note_padding(self, places: Tensor, hidden: Tensor | None, k: Tensor) -> None:
        assert self._keys is not None
        size = self._keys.shape[-2]
        if self._hidden is None or self._hidden.shape[-1] < size:
            larger = torch.zeros(*k.shape[:-3], size, dtype=torch.bool, device=k.device)
            if self._hidden is not None:
                larger[..., : self._hidden.shape[-1]] = self._hidden
            self._hidden = larger
        new = self._hidden.new_zeros(len(places)) if hidden is None else hidden[..., k.shape[-2] - len(places) :]
        self._hidden[..., places] = new

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, as `safetensors` stores them."""
        state = {"seen": torch.tensor(self.seen)}
        if self.seen:
            state |= {"keys": self.keys.contiguous(), "values": self.values.contiguous()}
        if self.hidden is not None:
            state["hidden"] = self.hidden.contiguous()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken; the window must be the same. Raises ValueError if it does not fit."""
        seen = int(state["seen"])
        length = state["keys"].shape[-2] if seen else 0
        expected = seen if self.window is None else min(seen, self.window)
        if length != expected:
            raise ValueError(f"state holds {length} pairs, but {expected} follow from {seen} tokens and this window")
        self.seen = seen
        self._keys = state["keys"].clone() if seen else None
        self._values = state["values"].clone() if seen else None
        self._hidden = state["hidden"].clone() if "hidden" in state else None


@torch.no_grad()
def lla_decode(
    q: Float[Tensor, "*batch H n E"],
    k: Float[Tensor, "*batch Hkv n E"],
    v: Float[Tensor, "*batch Hkv n Ev"],
    cache: KeyValueCache,
    *,
    hidden: Bool[Tensor, "*batch n"] | None = None,
    **options: Any,
) -> Float[Tensor, "*batch H n Ev"]:
    """Append n new tokens (1, or a whole prompt) to the cache and attend from each to everything up to itself.

    Equals the last n rows of `local_linear_attention` over all tokens. `options` are that function's, with `ridge` and
    `scale` for the new rows only. For one token and E <= 128, A_i is formed in one pass over the keys; otherwise
    conjugate gradients make two passes an iteration. No gradients.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    >>> cache = KeyValueCache()
    >>> steps = [lla_decode(*(x[..., t : t + 1, :] for x in (q, k, v)), cache) for t in range(5)]
    >>> torch.allclose(torch.cat(steps, -2), local_linear_attention(q, k, v), atol=1e-4)
    True
    """
    n = q.shape[-2]
    if k.shape[-2] != n:
        raise ValueError(f"k must have one row a new token, {n}, got {k.shape[-2]}")
    if n > 1 and cache.window is not None:  # each row has a window of its own
        rows = []
        for t in range(n):
            here = {name: x[..., t : t + 1] if varies(x, n) else x for name, x in options.items()}
            padded = None if hidden is None else hidden[..., t : t + 1]
            new_q, new_k, new_v = (x[..., t : t + 1, :] for x in (q, k, v))
            rows.append(lla_decode(new_q, new_k, new_v, cache, hidden=padded, **here))
        return torch.cat(rows, -2)
    cache.append(k, v, hidden)
    return local_linear_attention(
        q, cache.keys, cache.values, is_causal=n > 1, key_padding_mask=cache.hidden, **options
    )


def varies(option: Any, n: int) -> bool:
    """Whether an option has one entry a new token."""
    return isinstance(option, Tensor) and option.ndim > 0 and option.shape[-1] == n
