"""What may be drawn as a sketch: each class gives the rows of S^T, one block of `block_size` after the other."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_choice, check_count


@runtime_checkable
class Sketch(Protocol):
    """A distribution of sketching matrices S with `block_size` columns."""

    block_size: int

    def draw(self, blocks: int, n: int, rng: np.random.Generator) -> ndarray | sp.csr_array:
        """S_1^T, ..., S_blocks^T stacked: (blocks * block_size, n), dense or sparse."""
        ...


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Independent normal entries; with `block_size` 1 the Gaussian vector sketch.

    A sketch costs block_size products with the rows of A: n^2 block_size operations for a dense A.
    """

    block_size: int = 1

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)

    def draw(self, blocks: int, n: int, rng: np.random.Generator) -> Float[ndarray, "rows n"]:
        """Dense standard normal rows."""
        return rng.standard_normal((blocks * self.block_size, n))


@dataclass(frozen=True, kw_only=True)
class CountSketch:
    """Every row of A is added, with a random sign, to one of `block_size` buckets: one pass over A a sketch.

    Source: Charikar, Chen and Farach-Colton (2002); Clarkson and Woodruff (2013).
    """

    block_size: int = 16

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)

    def draw(self, blocks: int, n: int, rng: np.random.Generator) -> sp.csr_array:
        """Sparse: each of the n columns has one entry +-1 in every block."""
        buckets = rng.integers(self.block_size, size=(blocks, n)) + self.block_size * np.arange(blocks)[:, None]
        signs = rng.choice([-1.0, 1.0], size=blocks * n)
        columns = np.tile(np.arange(n), blocks)
        return sp.csr_array((signs, (buckets.ravel(), columns)), shape=(blocks * self.block_size, n))


@dataclass(frozen=True, kw_only=True)
class SparseSketch:
    """Each column of S adds up `nonzeros` entries +-1 at random places: nonzeros * block_size rows of A a sketch.

    Places are drawn with replacement: a row that is drawn twice counts twice, or not at all.
    """

    block_size: int = 16
    nonzeros: int = 8

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)
        check_count("nonzeros", self.nonzeros)

    def draw(self, blocks: int, n: int, rng: np.random.Generator) -> sp.csr_array:
        """Sparse: each row has `nonzeros` entries +-1."""
        count = blocks * self.block_size
        columns = rng.integers(n, size=count * self.nonzeros)
        signs = rng.choice([-1.0, 1.0], size=columns.size)
        return sp.csr_array((signs, columns, np.arange(0, columns.size + 1, self.nonzeros)), shape=(count, n))


class Sampling(StrEnum):
    """How randomised Kaczmarz draws rows.

    Attributes:
        UNIFORM: every row equally often. Contracts by 1 - sigma_min(D^-1 A)^2 / n with D the row lengths.
        NORM: with probability ||a_i||^2 / ||A||_F^2 (Strohmer and Vershynin, 2009): 1 - sigma_min(A)^2 / ||A||_F^2.
        NORMALISED: uniform draws on the system D^-1 A x = D^-1 b; also the stopping test is that system's, so that rows
            of very different length count alike.
        CYCLIC: rows in order, Kaczmarz's own method (1937); nothing is random.
    """

    UNIFORM = "uniform"
    NORM = "norm"
    NORMALISED = "normalised"
    CYCLIC = "cyclic"


@dataclass(frozen=True, kw_only=True)
class Kaczmarz:
    """Columns of the identity: a step reads `block_size` rows of A and projects onto their equations.

    Needs the rows of A, so it takes arrays and sparse matrices but no operators.
    """

    sampling: str = Sampling.UNIFORM
    block_size: int = 1

    def __post_init__(self) -> None:
        check_choice("sampling", self.sampling, tuple(map(str, Sampling)))
        check_count("block_size", self.block_size)

    def rows(
        self, count: int, squares: Float[ndarray, " n"], rng: np.random.Generator, start: int = 0
    ) -> Int[ndarray, " count"]:
        """`count` row numbers; `squares` are the squared row lengths, `start` where a cyclic order goes on."""
        n = len(squares)
        if self.sampling == Sampling.CYCLIC:
            return (start + np.arange(count)) % n
        if self.sampling == Sampling.NORM:
            upto = np.cumsum(squares)
            return np.minimum(np.searchsorted(upto, rng.random(count) * upto[-1], side="right"), n - 1)
        return rng.integers(n, size=count)
