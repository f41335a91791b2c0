"""How differently two simulations point: dissimilarities of the subspaces that their snapshots span.

The principal angles theta_1 <= ... <= theta_m between spans with orthonormal bases U and V have cosines equal to the
singular values of U^T V. For single snapshots u, v there is one angle, and its sine is the relative error of
approximating u by multiples of v. Source: arXiv 2103.13683 (sine dissimilarity), arXiv 1911.10122 (Grassmann distance).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.spatial.distance import cdist

from locally.checks import check_choice
from locally.subspaces.local_bases.pod import check_truncation, pod
from locally.subspaces.local_bases.products import Product
from locally.subspaces.local_bases.snapshots import MEMORY_LIMIT, Snapshots, SnapshotSet, snapshot_set

Kind = Literal["chordal", "gap", "geodesic", "projection"]
KINDS = ("chordal", "gap", "geodesic", "projection")
DISSIMILARITIES = ("sine", *KINDS, "euclidean")
RESOLVED = 1e-3  # below it, 1 - cos^2 has lost too many digits of the sine


def sine_dissimilarity(
    snapshots: Snapshots,
    *,
    product: Product = None,
    kind: Kind = "chordal",
    n_modes: int | None = 10,
    tol: float = 1e-3,
    symmetrize: Literal["max", "mean"] = "max",
    memory_limit: int = MEMORY_LIMIT,
) -> Float[ndarray, "n n"]:
    """Dissimilarities of n simulations: symmetric, zero on the diagonal, blind to scale, sign and basis.

    Args:
        snapshots, product, memory_limit: see `SnapshotSet`.
        kind: "chordal" sqrt(sum_k sin^2 theta_k / m), a metric with values in [0, 1]; "gap" sin theta_m, the distance
            of the projectors in the spectral norm; "geodesic" sqrt(sum_k theta_k^2), the length of the shortest path on
            the Grassmann manifold, up to pi/2 sqrt(m); "projection" the relative error of projecting all snapshots of
            one simulation on the span of the other, which weighs directions by their energy and is no metric. For
            single snapshots the first, second and last are the sine of the angle.
        n_modes, tol: each trajectory is represented by so many POD modes at most, and by as few as leave a relative
            error of `tol` (energy 1 - tol^2). Where two numbers of modes differ, missing angles count as pi/2 and m is
            the larger number.
        symmetrize: for "projection": the larger of the two directions, or their mean.

    One matrix product of all modes, n^2 m^2 n_dof multiplications, then an SVD of n^2 blocks of m x m ("chordal" needs
    none). Angles below 1e-3 are computed again from residuals, so that small sines keep their digits.

    >>> sine_dissimilarity([[1.0, 0.0], [-5.0, 0.0], [2.0, 2.0]]).round(4)
    array([[0.    , 0.    , 0.7071],
           [0.    , 0.    , 0.7071],
           [0.7071, 0.7071, 0.    ]])
    """
    check_choice("kind", kind, KINDS)
    check_choice("symmetrize", symmetrize, ("max", "mean"))
    check_truncation(n_modes, tol)
    simulations = snapshot_set(snapshots, product, memory_limit)
    spans = spans_of(simulations, n_modes, tol)
    if kind == "projection":
        directed = projection_errors(simulations, spans)
        D = np.maximum(directed, directed.T) if symmetrize == "max" else (directed + directed.T) / 2
    else:
        D = subspace_distances(spans, spans, kind)
        D = np.maximum(D, D.T)  # the two halves differ by rounding
    np.fill_diagonal(D, 0.0)
    return D


def euclidean_dissimilarity(
    snapshots: Snapshots, *, product: Product = None, memory_limit: int = MEMORY_LIMIT
) -> Float[ndarray, "n n"]:
    """||S_i - S_j|| of whole simulations, the classic choice: sensitive to amplitude and sign.

    >>> euclidean_dissimilarity([[1.0, 0.0], [-5.0, 0.0]])
    array([[0., 6.],
           [6., 0.]])
    """
    simulations = snapshot_set(snapshots, product, memory_limit)
    if (simulations.widths != simulations.widths[0]).any():
        raise ValueError("Euclidean dissimilarities need the same number of snapshots in every simulation")
    whole = lambda block: (simulations.unit(block).reshape(block.size, -1).T * simulations.norms[block]).T
    D = np.zeros((simulations.n, simulations.n))
    for i in simulations.blocks():
        left = whole(i)
        for j in simulations.blocks(np.arange(i[0], simulations.n)):
            D[np.ix_(i, j)] = cdist(left, whole(j))
            D[np.ix_(j, i)] = D[np.ix_(i, j)].T
    np.fill_diagonal(D, 0.0)
    return D


def dissimilarities(
    name: str, simulations: SnapshotSet, n_modes: int | None = 10, tol: float = 1e-3
) -> Float[ndarray, "n n"]:
    """By name: "sine" (chordal), one of the other kinds of angle, or "euclidean"."""
    check_choice("dissimilarity", name, DISSIMILARITIES)
    if name == "euclidean":
        return euclidean_dissimilarity(simulations)
    kind: Kind = "chordal" if name == "sine" else name  # type: ignore[assignment]
    return sine_dissimilarity(simulations, kind=kind, n_modes=n_modes, tol=tol)


@dataclass(frozen=True)
class Spans:
    """Orthonormal bases of n subspaces, as rows, padded with zeros to the largest dimension."""

    bases: Float[ndarray, "n m n_dof"] | None  # None: single snapshots too large for memory, read from the set
    dims: Int[ndarray, " n"]
    simulations: SnapshotSet | None = None

    def __getitem__(self, indices: Int[ndarray, " k"]) -> Float[ndarray, "k m n_dof"]:
        if self.bases is None:
            assert self.simulations is not None
            return self.simulations.unit(indices)[:, None]
        return self.bases[indices]

    def blocks(self) -> Iterator[tuple[Int[ndarray, " k"], Float[ndarray, "k m n_dof"]]]:
        if self.bases is not None:
            yield np.arange(self.dims.size), self.bases
            return
        assert self.simulations is not None
        for block in self.simulations.blocks():
            yield block, self[block]


def spans_of(simulations: SnapshotSet, n_modes: int | None = 10, tol: float = 1e-3) -> Spans:
    """The POD modes of each simulation; single snapshots are their own.

    Raises:
        ValueError: the modes of all trajectories together exceed the memory limit.
    """
    dims = np.ones(simulations.n, np.int64)
    if simulations.steady:
        rows = simulations.unit()[:, None] if simulations.fits_in_memory else None
        return Spans(rows, dims, simulations)
    modes = []
    for block in simulations.blocks():
        rows, start = simulations.unit(block), 0
        for width in simulations.widths[block]:
            modes.append(pod(rows[start : start + width], n_modes, tol)[0])
            start += width
    dims = np.array([len(m) for m in modes])
    needed = 8 * simulations.n * int(dims.max()) * simulations.n_dof
    if needed > simulations.memory_limit:
        raise ValueError(
            f"the modes of {simulations.n} trajectories take {needed} bytes, more than the memory_limit of"
            f" {simulations.memory_limit}; ask for fewer modes (n_modes={n_modes}) or raise the limit"
        )
    bases = np.zeros((simulations.n, dims.max(), simulations.n_dof))
    for basis, m in zip(bases, modes):
        basis[: len(m)] = m
    return Spans(bases, dims)


def subspace_distances(left: Spans, right: Spans, kind: Kind = "chordal") -> Float[ndarray, "k n"]:
    """Dissimilarities of each subspace on the left to each on the right."""
    D = np.zeros((left.dims.size, right.dims.size))
    same = left is right
    for i, U in left.blocks():
        for j, V in right.blocks():
            if same and j[0] < i[0]:
                continue
            m = np.maximum(left.dims[i][:, None], right.dims[j][None, :])
            # G[a, p, b, q] = <u_p of a, v_q of b>
            G = (U.reshape(-1, U.shape[2]) @ V.reshape(-1, V.shape[2]).T).reshape(*U.shape[:2], *V.shape[:2])
            block = _from_products(G, m, kind)
            _resolve_small(block, U, V, m, kind, same and bool((i == j).all()) if i.size == j.size else False)
            D[np.ix_(i, j)] = block
            if same and j[0] != i[0]:
                D[np.ix_(j, i)] = block.T
    return D


def projection_errors(simulations: SnapshotSet, onto: Spans) -> Float[ndarray, "n k"]:
    """||S_i - P_j S_i|| / ||S_i|| for the projectors P_j on subspaces."""
    errors = np.zeros((simulations.n, onto.dims.size))
    for block in simulations.blocks():
        rows = simulations.unit(block)
        starts = simulations.offsets[block] - simulations.offsets[block[0]]
        for j, V in onto.blocks():
            coefficients = rows @ V.reshape(-1, V.shape[2]).T
            captured = np.add.reduceat((coefficients**2).reshape(len(rows), j.size, -1).sum(axis=2), starts)
            found = np.sqrt(np.clip(1 - captured, 0, 1))
            for a, b in zip(*np.nonzero(found < RESOLVED)):
                own = rows[starts[a] : starts[a] + simulations.widths[block[a]]]
                found[a, b] = np.linalg.norm(own - own @ V[b].T @ V[b])
            errors[np.ix_(block, j)] = found
    return errors


def _from_products(G: Float[ndarray, "k p n q"], m: Int[ndarray, "k n"], kind: Kind) -> Float[ndarray, "k n"]:
    if kind == "chordal" or (kind == "gap" and G.shape[1] == G.shape[3] == 1):
        return np.sqrt(np.clip(1 - np.einsum("apbq,apbq->ab", G, G) / m, 0, 1))
    cosines = np.linalg.svd(G.transpose(0, 2, 1, 3), compute_uv=False).clip(0, 1)
    return _combine(np.sqrt(1 - cosines**2), m, kind)


def _combine(sines: Float[ndarray, "*pairs r"], m: Int[ndarray, "*pairs"], kind: Kind) -> Float[ndarray, "*pairs"]:
    """From the sines of r angles, smallest first: those beyond m are padding, and those that lack are right angles."""
    r = sines.shape[-1]
    counted = np.arange(r) < m[..., None]
    missing = np.maximum(m - r, 0)
    if kind == "gap":
        return np.where(missing > 0, 1.0, np.where(counted, sines, 0).max(axis=-1))
    terms = sines**2 if kind == "chordal" else np.arcsin(sines.clip(0, 1)) ** 2
    total = np.where(counted, terms, 0).sum(axis=-1) + missing * (1.0 if kind == "chordal" else np.pi**2 / 4)
    return np.sqrt(total / m) if kind == "chordal" else np.sqrt(total)


def _resolve_small(
    D: Float[ndarray, "k n"],
    U: Float[ndarray, "k p n_dof"],
    V: Float[ndarray, "n q n_dof"],
    m: Int[ndarray, "k n"],
    kind: Kind,
    same: bool,
) -> None:
    """Sines of small angles as singular values of the residual V - P_U V, in place; subspaces there have equal dims."""
    small = np.sqrt(m) * RESOLVED > D
    if same:
        small = np.triu(small, 1)
    pairs = np.argwhere(small)
    room = max(2**24 // (U.shape[1] * U.shape[2]), 1)
    for start in range(0, len(pairs), room):
        a, b = pairs[start : start + room].T
        own, other = U[a], V[b]
        residual = other - (other @ own.transpose(0, 2, 1)) @ own
        if residual.shape[1] == 1:
            sines = np.linalg.norm(residual, axis=2)
        else:
            sines = np.linalg.svd(residual @ residual.transpose(0, 2, 1), compute_uv=False, hermitian=True)
            sines = np.sqrt(sines[:, ::-1])
            # padding has residual zero and comes first; m of the angles are real
            padding = residual.shape[1] - m[a, b]
            sines = np.take_along_axis(sines, (np.arange(sines.shape[1]) + padding[:, None]) % sines.shape[1], axis=1)
        D[a, b] = _combine(sines, m[a, b], kind)
        if same:
            D[b, a] = D[a, b]
