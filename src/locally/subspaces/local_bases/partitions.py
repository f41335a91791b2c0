"""Clustering by projection error: assign each simulation to the basis that errs least, recompute the bases, repeat.

The strongest alternative to clustering by angles, since it lowers the very error that is reported; it needs N before it
starts, has no centres, and every iteration is K PODs. Source: Amsallem & Haasdonk, PEBL-ROM (2016).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.utils import check_random_state

from locally.checks import check_count
from locally.subspaces.local_bases.criterion import coordinates_of
from locally.subspaces.local_bases.medoids import RandomState, Status, check_clusters
from locally.subspaces.local_bases.pod import pod
from locally.subspaces.local_bases.products import Product
from locally.subspaces.local_bases.snapshots import Snapshots, SnapshotSet, snapshot_set


@dataclass(frozen=True)
class Partition:
    """Attributes:
    labels: (n,) cluster of each simulation.
    costs: sum of squared relative errors after each iteration of the start that was kept; never rises.
    """

    labels: Int[ndarray, " n"]
    costs: Float[ndarray, " iterations"]
    status: Status


def projection_error_clusters(
    snapshots: Snapshots,
    n_clusters: int,
    n_modes: int,
    *,
    product: Product = None,
    start: Int[ndarray, " n"] | None = None,
    n_init: int = 5,
    max_iter: int = 100,
    random_state: RandomState = None,
    callback: Callable[[int, float], None] | None = None,
) -> Partition:
    """Lloyd iterations with local POD bases of `n_modes` modes as centres; the best of `n_init` random starts.

    Args:
        snapshots, product: see `SnapshotSet`.
        start: labels to start from as well, for instance those of k-means.
        callback: called as callback(iteration, cost).

    An empty cluster is given the simulation that is approximated worst. O(n_dof r^2) once, r snapshots, then
    O(r^2 n) an iteration.

    >>> S = np.array([[1.0, 0.0], [-3.0, 0.1], [0.0, 2.0], [0.1, 9.0]])
    >>> projection_error_clusters(S, 2, 1, random_state=0).labels[[0, 2]].tolist() in ([0, 1], [1, 0])
    True
    """
    check_count("n_modes", n_modes)
    check_count("n_init", n_init, at_least=0 if start is not None else 1)
    check_count("max_iter", max_iter)
    simulations = snapshot_set(snapshots, product)
    check_clusters(n_clusters, simulations.n)
    if start is not None and (np.shape(start) != (simulations.n,) or not np.isin(start, np.arange(n_clusters)).all()):
        raise ValueError(f"start must hold {simulations.n} labels from 0 to {n_clusters - 1}")
    rows = coordinates_of(simulations)
    rng = check_random_state(random_state)
    given = [] if start is None else [np.array(start)]
    starts = given + [rng.permutation(simulations.n) % n_clusters for _ in range(n_init)]
    runs = [_lloyd(simulations, rows, labels, n_clusters, n_modes, max_iter, callback) for labels in starts]
    return min(runs, key=lambda run: run.costs[-1])


def _lloyd(
    simulations: SnapshotSet,
    rows: Float[ndarray, "snapshots r"],
    labels: Int[ndarray, " n"],
    K: int,
    n_modes: int,
    max_iter: int,
    callback: Callable[[int, float], None] | None,
) -> Partition:
    costs: list[float] = []
    for iteration in range(max_iter):
        squares = np.column_stack([
            _squared_errors(simulations, rows, np.flatnonzero(labels == k), n_modes) for k in range(K)
        ])  # fmt: skip
        least = squares.argmin(axis=1)
        own = squares[np.arange(simulations.n), labels]
        # stay where a move wins nothing but rounding
        new = np.where(squares.min(axis=1) < own - 1e-14, least, labels)
        errors = squares[np.arange(simulations.n), new]
        for k in np.setdiff1d(np.arange(K), new):
            crowded = np.bincount(new, minlength=K)[new] > 1
            new[np.where(crowded, errors, -1).argmax()] = k
        costs.append(float(errors.sum()))
        if callback is not None:
            callback(iteration, costs[-1])
        if (new == labels).all():
            return Partition(labels, np.array(costs), Status.CONVERGED)
        labels = new
    return Partition(labels, np.array(costs), Status.ITERATION_LIMIT)


def _squared_errors(
    simulations: SnapshotSet, rows: Float[ndarray, "snapshots r"], members: Int[ndarray, " k"], n_modes: int
) -> Float[ndarray, " n"]:
    if members.size == 0:
        return np.full(simulations.n, np.inf)
    modes = pod(rows[simulations.rows_of(members)], n_modes, method="snapshots")[0]
    left = (rows**2).sum(axis=1) - ((rows @ modes.T) ** 2).sum(axis=1)
    return np.maximum(np.add.reduceat(left, simulations.offsets[:-1]), 0)
