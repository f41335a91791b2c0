"""What all methods of this room say of bad input."""

import numbers
from typing import Any

import torch
from torch import Tensor


def check_sparsity(sparsity: float) -> None:
    if not isinstance(sparsity, numbers.Real) or isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity!r}")


def check_ids(name: str, ids: Tensor, config: Any) -> None:
    """Token ids of shape (sequences, length), at least one sequence of two tokens, all known to the model."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be a tensor of integers, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"{name} must have shape (sequences, length), at least (1, 2), got {tuple(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"{name} must be token ids in [0, {config.vocab_size}), got {low} to {high}: "
            "the tokenizer does not match the model"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(f"{name} must have at most the model's {limit} positions, got {ids.shape[1]}")
