"""Biological sequences as numbers: letters to indices and back, k-mers, distances between sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count

DNA = "ACGT"
RNA = "ACGU"
PROTEIN = "ACDEFGHIKLMNPQRSTVWY"
ALPHABETS = {"dna": DNA, "rna": RNA, "protein": PROTEIN}

Sequences = Sequence[str] | Int[ndarray, "n length"]


@dataclass(frozen=True)
class SequenceSpace:
    """All sequences of one length over one alphabet.

    Args:
        alphabet: "dna" (ACGT), "rna", "protein" (20 amino acids by one-letter code), or the letters themselves, at
            least two and all different. Their order is the order of the indices.
        length: letters in each sequence, at least 1.

    Raises:
        ValueError, TypeError: an argument is out of range.

    >>> space = SequenceSpace("dna", 4)
    >>> space.encode(["ACGT", "TTTT"])
    array([[0, 1, 2, 3],
           [3, 3, 3, 3]])
    >>> space.decode(space.encode(["GATC"]))
    ['GATC']
    """

    alphabet: str
    length: int

    def __post_init__(self) -> None:
        if not isinstance(self.alphabet, str):
            raise TypeError(f"alphabet must be a string, got {type(self.alphabet).__name__}")
        letters = ALPHABETS.get(self.alphabet.lower(), self.alphabet)
        if len(letters) < 2 or len(set(letters)) != len(letters):
            raise ValueError(f"alphabet must have at least two letters, all different, got {self.alphabet!r}")
        check_count("length", self.length)
        object.__setattr__(self, "alphabet", letters)

    @classmethod
    def of(cls, alphabet: str, sequences: Sequence[str]) -> "SequenceSpace":
        """The space that these sequences lie in, by the length of the first."""
        if not len(sequences):
            raise ValueError("sequences must hold at least one sequence, got none")
        return cls(alphabet, len(sequences[0]))

    @property
    def letters(self) -> int:
        """Size of the alphabet."""
        return len(self.alphabet)

    def encode(self, sequences: Sequences, name: str = "sequences") -> Int[ndarray, "n length"]:
        """Strings, or indices that are checked and copied, as indices into the alphabet.

        Raises:
            ValueError: none at all, a length other than the space's, or a letter that is not in the alphabet; the
                message says which sequence and where.
        """
        if not len(sequences):
            raise ValueError(f"{name} must hold at least one sequence, got none")
        if isinstance(sequences, ndarray) and sequences.dtype.kind in "iu":
            return self._checked(sequences, name)
        for i, s in enumerate(sequences):
            if not isinstance(s, str):
                raise TypeError(f"{name}[{i}] must be a string, got {type(s).__name__}")
            if len(s) != self.length:
                raise ValueError(f"{name}[{i}] must have {self.length} letters, got {len(s)}: {s[:40]!r}")
        text = "".join(sequences)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        table = np.full(max(codes.max(), max(map(ord, self.alphabet))) + 1, -1)
        table[[ord(letter) for letter in self.alphabet]] = np.arange(self.letters)
        indices = table[codes].reshape(-1, self.length)
        if (indices < 0).any():
            i, j = np.argwhere(indices < 0)[0]
            raise ValueError(
                f"{name}[{i}] has the letter {sequences[i][j]!r} at position {j}, which is not in {self.alphabet!r}"
            )
        return indices

    def decode(self, indices: Int[ndarray, "n length"]) -> list[str]:
        """Sequences as strings, from the indices of their letters."""
        letters = np.array(list(self.alphabet))
        return ["".join(row) for row in letters[indices]]

    def one_hot(self, indices: Int[ndarray, "n length"]) -> Float[ndarray, "n length letters"]:
        """1 at each letter, 0 elsewhere, in float64."""
        return np.eye(self.letters)[indices]

    def random(self, n: int, rng: np.random.Generator) -> Int[ndarray, "n length"]:
        """n sequences of letters drawn uniformly and independently."""
        return rng.integers(0, self.letters, (n, self.length))

    def _checked(self, indices: ndarray, name: str) -> ndarray:
        if indices.ndim != 2 or indices.shape[1] != self.length:
            raise ValueError(f"{name} must have shape (any, {self.length}), got {indices.shape}")
        if indices.min() < 0 or indices.max() >= self.letters:
            raise ValueError(f"{name} must hold indices in [0, {self.letters}), got {indices.min()} to {indices.max()}")
        return indices.astype(np.int64)


def words(indices: Int[ndarray, "n length"], letters: int, k: int) -> Int[ndarray, "n windows"]:
    """Overlapping k-mers as numbers in base `letters`, the first letter the most significant.

    >>> words(np.array([[0, 1, 2, 3]]), 4, 3)
    array([[ 6, 27]])
    """
    windows = indices.shape[1] - k + 1
    if windows < 1:
        raise ValueError(f"k-mers of {k} letters do not fit into sequences of {indices.shape[1]}")
    number = np.zeros((len(indices), windows), np.int64)
    for offset in range(k):
        number = number * letters + indices[:, offset : offset + windows]
    return number


def hamming(a: Int[ndarray, "n length"], b: Int[ndarray, "m length"]) -> Int[ndarray, "n m"]:
    """Positions in which each sequence of a differs from each of b; O(n m length), in blocks of rows."""
    block = max(1, 2**24 // max(1, b.size))
    parts = [(a[i : i + block, None] != b[None]).sum(2) for i in range(0, len(a), block)]
    return np.concatenate(parts)
