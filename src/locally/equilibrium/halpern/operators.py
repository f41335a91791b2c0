"""Finite-sum operators F = (1/n) sum_i F_i: the interface of everything that the solvers solve.

How components are drawn belongs to the operator (F = E F_q with q ~ Q, arXiv 2310.02987), and so do the constants that
follow from it: `sampling="uniform"` draws without replacement, "importance" in proportion to squared norms.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.linalg import eigvalsh

from locally.checks import check_count, check_finite, check_positive, check_shape
from locally.equilibrium.halpern.kernels import Components, add_difference, shuffle_prefixes
from locally.equilibrium.halpern.resolvents import ResolventLike

UNIFORM, IMPORTANCE = "uniform", "importance"


@dataclass(frozen=True)
class Constants:
    """What step sizes are computed from.

    Attributes:
        lipschitz: L_F, ||F(u) - F(v)|| <= L_F ||u - v||.
        expected: L_Q, E ||F_q(u) - F_q(v)||^2 <= L_Q^2 ||u - v||^2.
        cocoercive: L with <F(u) - F(v), u - v> >= E ||F_q(u) - F_q(v)||^2 / L, None where there is none.
    """

    lipschitz: float
    expected: float
    cocoercive: float | None = None

    def __post_init__(self) -> None:
        check_positive("lipschitz", self.lipschitz)
        check_positive("expected", self.expected)
        if self.cocoercive is not None:
            check_positive("cocoercive", self.cocoercive)


class FiniteSumOperator(ABC):
    """A monotone operator that is an average of n components; subclass it with `batch`, or use one of the ready ones.

    Vectors are NumPy arrays of shape (dim,), or torch tensors where the subclass works on tensors.

    Attributes:
        n: number of components, which is also what a full evaluation costs.
        dim: number of coordinates.
        cocoercive: whether the components are cocoercive on average, which the single-loop algorithm needs.
        resolvent: the G that belongs to the problem, None for G = 0.
        dtype: of NumPy vectors; None where the vectors are not NumPy's.
    """

    n: int
    dim: int
    cocoercive: bool = False
    resolvent: ResolventLike | None = None
    dtype: Any = np.dtype(np.float64)

    @abstractmethod
    def batch(self, u: Any, idx: Int[ndarray, "..."]) -> Any:
        """Mean of F_i(u) over the drawn components `idx` (first axis)."""

    def full(self, u: Any) -> Any:
        """F(u)."""
        return self.batch(u, np.arange(self.n))

    def diff(self, u: Any, v: Any, idx: Int[ndarray, "..."]) -> Any:
        """Mean of F_i(u) - F_i(v) over the drawn components."""
        return self.batch(u, idx) - self.batch(v, idx)

    def start(self, u0: Any) -> Any:
        """A checked copy of u0 of the kind of vectors that the operator takes."""
        if self.dtype is None or type(u0).__module__.startswith("torch"):
            raise TypeError(f"u0 must be an array that {type(self).__name__} works on, got {type(u0).__name__}")
        return vector("u0", u0, self.dim, self.dtype).copy()

    def draw(self, rng: np.random.Generator, steps: int, b: int) -> Int[ndarray, "steps b ..."]:
        """`steps` independent batches of b components each; the mean over a batch must be unbiased for F."""
        return draw_without_replacement(rng, self.n, steps, b)

    def constants(self) -> Constants | None:
        """Known constants; None makes the solvers ask for L or eta."""
        return None

    def compiled(self) -> Components | None:
        """The same components for the kernels, None where there is no such form."""
        return None


class FunctionOperator(FiniteSumOperator):
    """Wraps plain functions.

    Args:
        batch: (u, idx) -> mean of F_i(u) over idx.
        n, dim: numbers of components and coordinates.
        full: u -> F(u), by default `batch` over all components.
        constants: for step sizes, if known.
        cocoercive: whether the components are cocoercive on average.
        resolvent: the problem's own G.

    >>> rotation = np.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> FunctionOperator(lambda u, idx: rotation @ u, n=1, dim=2).full(np.array([1.0, 0.0]))
    array([ 0., -1.])
    """

    def __init__(
        self,
        batch: Callable[[Any, ndarray], Any],
        *,
        n: int,
        dim: int,
        full: Callable[[Any], Any] | None = None,
        constants: Constants | None = None,
        cocoercive: bool = False,
        resolvent: ResolventLike | None = None,
    ) -> None:
        check_count("n", n)
        check_count("dim", dim)
        if not callable(batch):
            raise TypeError(f"batch must be callable, got {type(batch).__name__}")
        self.n, self.dim, self.cocoercive, self.resolvent = n, dim, cocoercive, resolvent
        self._batch, self._full, self._constants = batch, full, constants

    def batch(self, u: Any, idx: Int[ndarray, "..."]) -> Any:
        return self._batch(u, idx)

    def full(self, u: Any) -> Any:
        return super().full(u) if self._full is None else self._full(u)

    def constants(self) -> Constants | None:
        return self._constants


class CompiledOperator(FiniteSumOperator):
    """Components stored as vectors, which the compiled steps read."""

    _components: Components

    def diff(
        self, u: Float[ndarray, " dim"], v: Float[ndarray, " dim"], idx: Int[ndarray, "..."]
    ) -> Float[ndarray, " dim"]:
        for name, point in (("u", u), ("v", v)):
            check_shape(name, point, (self.dim,))
        out = np.zeros_like(u)
        add_difference(self._components, u, v, self._in_range(idx), out)
        return out

    def compiled(self) -> Components:
        return self._components

    def _in_range(self, idx: Int[ndarray, "..."]) -> Int[ndarray, "b indices"]:
        """The kernels trust their indices, so a caller's are checked here."""
        drawn = idx[:, None] if idx.ndim == 1 else idx
        sizes = [len(b.vectors) for b in self._components[:2] if len(b.vectors)]
        if drawn.ndim != 2 or drawn.shape[1] not in ({1, len(sizes)} if len(set(sizes)) == 1 else {len(sizes)}):
            raise ValueError(f"idx must have shape (b,) or (b, {len(sizes)}), one index for each size in {sizes}")
        if drawn.size == 0 or drawn.min() < 0 or (drawn >= sizes[: drawn.shape[1]]).any():
            raise ValueError(f"idx must hold at least one component, each index from 0 to below {sizes}")
        return drawn


def stacked(drawn: Int[ndarray, "steps b ..."]) -> Int[ndarray, "steps b indices"]:
    """One or two indices a component, as the kernels take them."""
    return drawn if drawn.ndim == 3 else drawn[:, :, None]


def matrix(name: str, value: Any) -> Float[ndarray, "rows columns"]:
    """A finite, non-empty matrix in C order; float32 stays, any other number becomes float64."""
    array = _real_array(name, value)
    check_shape(name, array, (None, None))
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    check_finite(name, array)
    return np.ascontiguousarray(array)


def vector(name: str, value: Any, size: int, dtype: Any) -> Float[ndarray, " size"]:
    """A finite vector of the given size and dtype, zero where `value` is None."""
    if value is None:
        return np.zeros(size, dtype)
    array = _real_array(name, value)
    check_shape(name, array, (size,))
    check_finite(name, array)
    return np.ascontiguousarray(array, dtype)


def draw_without_replacement(rng: np.random.Generator, n: int, steps: int, b: int) -> Int[ndarray, "steps b"]:
    """Each row is uniform over the sets of b out of n; O(n + steps b)."""
    sets = np.empty((steps, b), np.int64)
    # any order will do to start a partial shuffle from, so it is never put back between the rows
    shuffle_prefixes(rng.random((steps, b)), np.arange(n), sets)
    return sets


def draw_with_replacement(
    rng: np.random.Generator, chances: Float[ndarray, " n"], steps: int, b: int
) -> Int[ndarray, "steps b"]:
    """Inverse transform; a component of probability zero is never drawn."""
    cumulative = np.cumsum(chances)
    return np.searchsorted(cumulative, cumulative[-1] * rng.random((steps, b)), side="right")


def spectral_norm(A: Float[ndarray, "rows columns"]) -> float:
    """Largest singular value, from the Gram matrix of the shorter side."""
    gram = A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A
    last = len(gram) - 1
    return float(np.sqrt(max(eigvalsh(gram, subset_by_index=[last, last])[0], 0.0)))


def _real_array(name: str, value: Any) -> ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
