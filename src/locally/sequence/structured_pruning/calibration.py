"""Calibration text from a file of the user's, as windows of token ids."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from locally.checks import check_count
from locally.errors import UsageError

if TYPE_CHECKING:
    from locally.sequence.structured_pruning.network import Network


class BadText(UsageError, ValueError):
    """A text that cannot be read, is too short, or has tokens that the model does not know."""


def read_windows(
    file: str | Path, tokenizer: Any, network: "Network", *, length: int, sequences: int | None = None
) -> Int[Tensor, "sequences length"]:
    """Windows of a UTF-8 text file, spread evenly over it; all of them, one after the other, where `sequences` is None.

    Args:
        tokenizer: of Transformers, as the checkpoint has it.
        length: tokens in a window, at least 2.

    Raises:
        BadText: the file cannot be read, holds too few tokens, or the tokenizer is not the model's.
    """
    check_count("length", length, at_least=2)
    if sequences is not None:
        check_count("sequences", sequences)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadText(f"{file} cannot be read as UTF-8 text: {error}") from None
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // length
    needed = 1 if sequences is None else sequences
    if count < needed:
        raise BadText(
            f"the text {file} is too short: it has {len(tokens)} tokens, and {needed} sequences of {length} take "
            f"{needed * length}; give a longer text, or fewer or shorter sequences"
        )
    windows = torch.tensor(tokens[: count * length], dtype=torch.long).view(count, length)
    if int(windows.max()) >= network.config.vocab_size:
        raise BadText(
            f"the tokenizer does not match the model: it makes tokens up to {int(windows.max())}, "
            f"the model knows {network.config.vocab_size}"
        )
    return windows if sequences is None else windows[torch.linspace(0, count - 1, sequences).round().long()]
