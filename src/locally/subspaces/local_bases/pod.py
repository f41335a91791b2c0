"""Proper orthogonal decomposition: the N directions that keep most of the energy of a set of snapshots.

Snapshots are rows in whitened coordinates. Four ways to the same basis: an exact thin SVD, the method of snapshots (an
eigenproblem of their Gram matrix; half of the digits), a randomised SVD, and an incremental SVD that sees one block of
snapshots at a time, for sets larger than memory.
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy import ndarray
from sklearn.utils.extmath import randomized_svd

from locally.checks import check_between, check_choice, check_count

Method = Literal["auto", "svd", "snapshots", "randomized", "incremental"]
METHODS = ("auto", "svd", "snapshots", "randomized", "incremental")
Modes = Float[ndarray, "modes n_dof"]
ROUNDING = 1e-13  # relative to the largest singular value: directions below it are noise


def check_truncation(n_modes: int | None, tol: float) -> None:
    if n_modes is not None:
        check_count("n_modes", n_modes)
    check_between("tol", tol, 0, 1)


def truncation(s: Float[ndarray, " k"], energy: float, n_modes: int | None, tol: float) -> int:
    """The smallest N with 1 - sum_{k<=N} s_k^2 / energy <= tol^2, at most n_modes and at least 1.

    >>> truncation(np.array([3.0, 2.0, 0.1]), 13.01, None, 0.1)
    2
    """
    rank = max(int((s > ROUNDING * s[0]).sum()), 1)
    tail = energy - np.cumsum(s**2)
    # what the sum loses to rounding is not energy; without this, tol = 0 would never be met before the last mode
    enough = np.flatnonzero(tail <= max(tol**2, 4 * np.finfo(float).eps) * energy) if tol > 0 else np.array([], int)
    needed = int(enough[0]) + 1 if enough.size else rank
    return min(needed, rank, n_modes if n_modes is not None else rank)


def pod(
    rows: Float[ndarray, "snapshots n_dof"],
    n_modes: int | None = None,
    tol: float = 0.0,
    *,
    method: Method = "svd",
    rng: int | np.random.Generator | None = 0,
) -> tuple[Modes, Float[ndarray, " modes"]]:
    """Orthonormal modes (as rows) and singular values of snapshots that are the rows.

    Args:
        rows: finite, not all zero.
        n_modes: at most so many; None for as many as `tol` asks for.
        tol: relative l2 error allowed, in [0, 1]; 0 for the whole span. The truncation error of N modes over the
            snapshots is sqrt(sum_{k>N} s_k^2), the least of all N-dimensional spaces (Eckart & Young, 1936).
        method: "svd" O(n_dof n^2) with n snapshots; "snapshots" the same with a smaller constant, but modes below 1e-8
            of the largest are lost; "randomized" O(n_dof n N), Halko, Martinsson & Tropp (2011); "incremental" by
            blocks; "auto" takes "randomized" where N is known and far below both dimensions, else "svd".

    >>> modes, s = pod(np.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), n_modes=1)
    >>> abs(modes).round(12), s
    (array([[0., 1., 0.]]), array([4.]))
    """
    check_truncation(n_modes, tol)
    check_choice("method", method, METHODS)
    if method == "auto":
        far_below = n_modes is not None and 10 * n_modes < min(rows.shape) and rows.size > 2_000_000
        method = "randomized" if far_below else "svd"
    if method == "incremental":
        width = max(2 * (n_modes or 16), 64)
        return incremental_pod((rows[i : i + width] for i in range(0, len(rows), width)), n_modes, tol)
    energy = float(np.einsum("ij,ij->", rows, rows))
    if method == "randomized":
        s, modes = _randomized(rows, energy, n_modes, tol, rng)
    elif method == "snapshots":
        s, modes = _of_snapshots(rows, n_modes)
    else:
        s, modes = _thin(rows, n_modes)
    keep = truncation(s, energy, n_modes, tol)
    return np.ascontiguousarray(modes[:keep]), s[:keep]


def incremental_pod(
    blocks: Iterable[Float[ndarray, "block n_dof"]], n_modes: int | None = None, tol: float = 0.0
) -> tuple[Modes, Float[ndarray, " modes"]]:
    """POD of snapshots that come in blocks of rows: each block is merged into the modes found so far (Brand, 2006).

    Between blocks, three times `n_modes` modes are carried (all of numerical rank where it is None), so that what a
    block cuts off stays far below the last mode kept. O(n_dof (r + b)^2) a block of b snapshots with r carried modes,
    and memory for r + b rows.
    """
    check_truncation(n_modes, tol)
    carried: ndarray | None = None
    energy = 0.0
    for block in blocks:
        energy += float(np.einsum("ij,ij->", block, block))
        most = None if n_modes is None else 3 * n_modes
        s, modes = _thin(block if carried is None else np.concatenate([carried, block]), most)
        keep = truncation(s, energy, most, 0.0)
        carried = modes[:keep] * s[:keep, None]
    if carried is None:
        raise ValueError("blocks are empty")
    keep = truncation(s, energy, n_modes, tol)
    return np.ascontiguousarray(modes[:keep]), s[:keep]


def _thin(
    rows: Float[ndarray, "n n_dof"], n_modes: int | None
) -> tuple[Float[ndarray, " k"], Float[ndarray, "modes n_dof"]]:
    """All singular values, and the first n_modes modes."""
    if rows.shape[1] > 2 * rows.shape[0]:  # long snapshots: a QR first, then the SVD of a small triangle
        Q, R = scipy.linalg.qr(rows.T, mode="economic", check_finite=False)
        U, s, _ = scipy.linalg.svd(R, full_matrices=False, check_finite=False)
        return s, (Q @ U[:, :n_modes]).T
    _, s, modes = scipy.linalg.svd(rows, full_matrices=False, check_finite=False)
    return s, modes[:n_modes]


def _of_snapshots(
    rows: Float[ndarray, "n n_dof"], n_modes: int | None
) -> tuple[Float[ndarray, " k"], Float[ndarray, "k n_dof"]]:
    tall = rows.shape[0] > rows.shape[1]
    values, vectors = np.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)  # the smaller of the two
    s = np.sqrt(np.maximum(values[::-1], 0))
    s = s[s > 1e-7 * s[0]][:n_modes]  # the square root of rounding: smaller ones are noise here
    vectors = vectors[:, ::-1][:, : s.size]
    return s, vectors.T if tall else (vectors / s).T @ rows


def _randomized(
    rows: Float[ndarray, "n n_dof"],
    energy: float,
    n_modes: int | None,
    tol: float,
    rng: int | np.random.Generator | None,
) -> tuple[Float[ndarray, " k"], Float[ndarray, "k n_dof"]]:
    """Without a number of modes the rank doubles until the energy that is left falls below the tolerance."""
    largest = min(rows.shape)
    rank = min(n_modes or 16, largest)
    seed = int(np.random.default_rng(rng).integers(2**31))
    while True:
        _, s, modes = randomized_svd(rows, rank, n_iter=3, random_state=seed)
        if n_modes is not None or rank == largest or energy - (s**2).sum() <= tol**2 * energy:
            return s, modes
        rank = min(2 * rank, largest)
