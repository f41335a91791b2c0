"""Examples for recovery training from a local file: plain text, instructions (JSON), or token numbers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from locally.checks import check_between, check_count
from locally.errors import UsageError
from locally.sequence.gated_linearization.recovery import IGNORED, Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ".txt, .md (text), .json, .jsonl (records of instruction, input, output), .npy (token numbers)"


class BadText(UsageError, ValueError):
    """A file that gives no examples; the message names it."""


def read_examples(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    length: int = 1024,
    *,
    held_out: float = 0.0,
) -> tuple[Examples, Examples | None]:
    """Pack a file into sequences of `length` tokens; of instructions only the answers are targets.

    Args:
        path: by its ending plain text, records with "instruction", "input" and "output" (as in Alpaca's), or an array
            of token numbers, which needs no tokenizer.
        tokenizer: the model's.
        length: at least 2. What is left at the end is dropped.
        held_out: share of the sequences for validation, taken at equal distances, one at least; in [0, 0.5], 0 for
            none.

    Raises:
        BadText: the file is missing, cannot be read, or is shorter than one sequence. A `ValueError` too.
    """
    check_count("length", length, at_least=2)
    check_between("held_out", held_out, 0.0, 0.5)
    path = Path(path)
    if not path.is_file():
        raise BadText(f"there is no file {path}")
    ids, labels = flat(path, tokenizer)
    count = len(ids) // length
    if count == 0:
        raise BadText(f"{path} gives {len(ids)} tokens, fewer than one sequence of {length}")
    tokens = torch.from_numpy(ids[: count * length]).view(count, length)
    wanted = torch.from_numpy(labels[: count * length]).view(count, length)
    every = min(round(1 / held_out), count) if held_out else 0
    kept_out = torch.arange(count) % every == every - 1 if every else torch.zeros(count, dtype=torch.bool)
    if every == 1:
        raise BadText(f"{path} gives one sequence of {length} tokens: none can be held out")
    train = Examples(tokens[~kept_out], wanted[~kept_out])
    return train, Examples(tokens[kept_out], wanted[kept_out]) if every else None


def flat(path: Path, tokenizer: "PreTrainedTokenizerBase | None") -> tuple[np.ndarray, np.ndarray]:
    """All tokens one after another, and their labels."""
    if path.suffix == ".npy":
        try:
            ids = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadText(f"{path} is not an array of numbers: {error}") from None
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise BadText(f"{path} must hold one row of integers, got {ids.dtype} of shape {ids.shape}")
        return ids.astype(np.int64), ids.astype(np.int64)
    if path.suffix not in (".txt", ".md", ".json", ".jsonl"):
        raise BadText(f"{path} is none of {KINDS}")
    if tokenizer is None:
        raise BadText(f"{path} is text, but the model's folder has no tokenizer: give token numbers as .npy")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadText(f"{path} is not UTF-8 text: {error}") from None
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if path.suffix in (".txt", ".md"):
        ids = np.array([*tokenizer(text)["input_ids"], *end], dtype=np.int64)
        return ids, ids
    pieces, labels = [], []
    for prompt, answer in instructions(path, text):
        asked = tokenizer(prompt)["input_ids"]
        said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], *end]
        pieces += [*asked, *said]
        labels += [*[IGNORED] * len(asked), *said]
    return np.array(pieces, dtype=np.int64), np.array(labels, dtype=np.int64)


def instructions(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Prompts and answers of the records of a JSON array, or of one record a line."""
    try:
        records: list[Any] = (
            json.loads(text) if path.suffix == ".json" else [*map(json.loads, filter(str.strip, text.splitlines()))]
        )
    except json.JSONDecodeError as error:
        raise BadText(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list):
        raise BadText(f"{path} must hold a list of records, got a {type(records).__name__}")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("output"), str) or "instruction" not in record:
            raise BadText(f"record {number} of {path} must have the texts instruction and output")
        given = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
        yield f"### Instruction:\n{record['instruction']}\n\n{given}### Response:\n", record["output"]
