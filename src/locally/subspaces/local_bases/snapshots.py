"""Snapshots of simulations, wherever they lie: arrays, files larger than memory, pyMOR's vector arrays.

A simulation is one row (steady problems) or a trajectory of several snapshots, never split. Methods read simulations by
blocks, in coordinates where the inner product is Euclidean and scaled to unit norm: a linear space approximates u
exactly as well as it approximates c u, so amplitudes carry no information about which basis to use.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count
from locally.subspaces.local_bases.products import InnerProduct, Product, inner_product

MEMORY_LIMIT = 2**30  # bytes

Snapshots = Any  # see SnapshotSet


class SnapshotSet:
    """n simulations of one problem.

    Args:
        source: (n, n_dof), one snapshot for each simulation; (n, n_dof, t), t snapshots for each; a list of
            (n_dof, t_i) matrices; a path to an .npy file with one of the first two, which is then memory-mapped; any
            other array-like that slices along its first axis, such as a zarr array; a pyMOR VectorArray of n vectors or
            a list of n VectorArrays. Real numbers.
        product: None for the Euclidean inner product, (n_dof,) positive weights, or a symmetric positive definite
            matrix, dense or sparse.
        memory_limit: bytes that blocks and caches may take; what is larger is read again and again.

    Attributes:
        n, n_dof: simulations, unknowns.
        widths: (n,) snapshots of each simulation.
        norms: (n,) norms, for trajectories the root of the sum over its snapshots.

    Raises:
        ValueError: no simulation, differing numbers of unknowns, NaN, a simulation of zero norm (it spans nothing, so
            it has no angle to another), a product that does not fit.
        TypeError: complex or non-numeric entries.

    >>> S = SnapshotSet([[3.0, 4.0], [0.0, 2.0]])
    >>> S.unit([0, 1])
    array([[0.6, 0.8],
           [0. , 1. ]])
    """

    def __init__(self, source: Snapshots, product: Product = None, memory_limit: int = MEMORY_LIMIT) -> None:
        check_count("memory_limit", memory_limit)
        self._source = _opened(source)
        self.n, self.n_dof, self.widths = _layout(self._source)
        self.product: InnerProduct = inner_product(product, self.n_dof)
        self.memory_limit = int(memory_limit)
        self._cache: ndarray | None = None
        self.offsets = np.concatenate([[0], np.cumsum(self.widths)])
        self.fits_in_memory = 8 * self.n_dof * int(self.offsets[-1]) <= self.memory_limit
        self.norms = np.empty(self.n)
        parts = []
        for block in self.blocks():
            rows = self.product.whiten(self.raw(block))
            starts = self.offsets[block] - self.offsets[block[0]]
            self.norms[block] = np.sqrt(np.add.reduceat(np.einsum("ij,ij->i", rows, rows), starts))
            self._refuse_zero(block)
            if self.fits_in_memory:
                parts.append(rows / np.repeat(self.norms[block], self.widths[block])[:, None])
        if self.fits_in_memory:
            self._cache = parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def steady(self) -> bool:
        """Whether every simulation is a single snapshot."""
        return bool((self.widths == 1).all())

    @property
    def columns(self) -> int:
        """Snapshots in all."""
        return int(self.offsets[-1])

    def blocks(self, indices: ndarray | None = None, share: float = 0.25) -> Iterator[Int[ndarray, " block"]]:
        """Consecutive pieces of `indices` (default all simulations), each within `share` of the memory limit."""
        chosen = np.arange(self.n) if indices is None else np.asarray(indices, dtype=np.intp)
        room = max(int(share * self.memory_limit) // (8 * self.n_dof), int(self.widths.max(initial=1)))
        start = 0
        while start < chosen.size:
            taken = int(np.searchsorted(np.cumsum(self.widths[chosen[start:]]), room, side="right"))
            yield chosen[start : start + taken]
            start += taken

    def raw(self, indices: Sequence[int] | ndarray) -> Float[ndarray, "rows n_dof"]:
        """The snapshots of these simulations as rows, as they came."""
        rows = _read(self._source, np.asarray(indices, dtype=np.intp))
        if rows.dtype.kind not in "fiu":
            raise TypeError(f"snapshots must be real numbers, got dtype {rows.dtype}; stack real and imaginary parts")
        rows = np.ascontiguousarray(rows, dtype=np.float64)
        if not np.isfinite(rows).all():
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]
            simulation = np.repeat(indices, self.widths[indices])[bad]
            raise ValueError(f"snapshots hold NaN or infinity in simulation {simulation}")
        return rows

    def unit(self, indices: Sequence[int] | ndarray | None = None) -> Float[ndarray, "rows n_dof"]:
        """The same in whitened coordinates, every simulation scaled to norm 1."""
        if self._cache is not None and indices is None:
            return self._cache
        chosen = np.arange(self.n) if indices is None else np.asarray(indices, dtype=np.intp)
        if self._cache is not None:
            return self._cache[self.rows_of(chosen)]
        return self.product.whiten(self.raw(chosen)) / np.repeat(self.norms[chosen], self.widths[chosen])[:, None]

    def rows_of(self, indices: Int[ndarray, " k"]) -> Int[ndarray, " rows"]:
        """Positions of the snapshots of these simulations among all snapshots."""
        if self.steady:
            return indices
        starts = np.repeat(self.offsets[indices], self.widths[indices])
        within = np.arange(starts.size) - np.repeat(
            np.cumsum(self.widths[indices]) - self.widths[indices], self.widths[indices]
        )
        return starts + within

    def _refuse_zero(self, block: Int[ndarray, " block"]) -> None:
        if not (self.norms[block] > 0).all():
            zero = block[np.flatnonzero(~(self.norms[block] > 0))[0]]
            raise ValueError(
                f"snapshots of simulation {zero} have zero norm: they span no direction; drop it (any basis is exact)"
            )


def snapshot_set(source: Snapshots, product: Product = None, memory_limit: int = MEMORY_LIMIT) -> SnapshotSet:
    """`source` itself where it is a SnapshotSet already."""
    return source if isinstance(source, SnapshotSet) else SnapshotSet(source, product, memory_limit)


def is_vector_array(value: object) -> bool:
    """Whether this is a pyMOR VectorArray; if pyMOR was never imported it cannot be."""
    interface = sys.modules.get("pymor.vectorarrays.interface")
    return interface is not None and isinstance(value, interface.VectorArray)


def _opened(source: Snapshots) -> Any:
    if isinstance(source, str | Path):
        return np.load(source, mmap_mode="r", allow_pickle=False)
    if is_vector_array(source):
        return source.to_numpy().T
    if isinstance(source, list | tuple) and source and not np.isscalar(source[0]):
        matrices = [s.to_numpy() if is_vector_array(s) else s for s in source]
        if all(np.ndim(m) == 2 for m in matrices):
            return matrices
        if {np.ndim(m) for m in matrices} == {1}:
            lengths = {len(m) for m in matrices}
            if len(lengths) > 1:
                raise ValueError(f"snapshots must all have the same number of unknowns, got {sorted(lengths)}")
            return np.array(matrices)
        raise ValueError("snapshots must be a list of (n_dof, t) matrices or of vectors, not a mixture")
    return source if hasattr(source, "shape") else np.asarray(source)


def _layout(source: Any) -> tuple[int, int, Int[ndarray, " n"]]:
    """Simulations, unknowns, snapshots of each."""
    if isinstance(source, list):
        unknowns = sorted({m.shape[0] for m in map(np.asanyarray, source)})
        if len(unknowns) != 1:
            raise ValueError(f"snapshots must all have the same number of unknowns, got {unknowns}")
        n, n_dof, widths = len(source), unknowns[0], np.array([np.shape(m)[1] for m in source])
    else:
        shape = tuple(source.shape)
        if len(shape) not in (2, 3):
            raise ValueError(f"snapshots must have shape (n, n_dof) or (n, n_dof, t), got {shape}")
        n, n_dof, widths = shape[0], shape[1], np.full(shape[0], 1 if len(shape) == 2 else shape[2])
    if n == 0 or n_dof == 0 or (widths == 0).any():
        raise ValueError(f"snapshots are empty: {n} simulations of {n_dof} unknowns, {widths.min(initial=0)} snapshots")
    return n, n_dof, widths


def _read(source: Any, indices: Int[ndarray, " k"]) -> ndarray:
    if isinstance(source, list):
        return np.concatenate([np.asarray(source[i]).T for i in indices])
    consecutive = indices.size > 0 and indices[-1] - indices[0] + 1 == indices.size and (np.diff(indices) == 1).all()
    if consecutive:  # a slice reads a file in one go, and is all that some array-likes offer
        taken = np.asarray(source[int(indices[0]) : int(indices[-1]) + 1])
    elif isinstance(source, ndarray):
        taken = np.asarray(source[indices])
    else:
        taken = np.concatenate([np.asarray(source[int(i) : int(i) + 1]) for i in indices])
    return taken if taken.ndim == 2 else taken.transpose(0, 2, 1).reshape(-1, taken.shape[1])
