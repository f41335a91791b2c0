"""Compiled sweeps of k-medoids over a matrix whose row j holds the dissimilarities of all points to candidate j."""

from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
@no_type_check
def inspect(D):
    """0 for a proper matrix, else what is wrong: 1 NaN or infinity, 2 negative; and whether it is symmetric."""
    n, tile = D.shape[0], 64
    symmetric = True
    for top in range(0, n, tile):
        for left in range(0, top + 1, tile):
            for i in range(top, min(top + tile, n)):
                for j in range(left, min(left + tile, i + 1)):
                    a, b = D[i, j], D[j, i]
                    if not (np.isfinite(a) and np.isfinite(b)):
                        return 1, False
                    if a < 0 or b < 0:
                        return 2, False
                    symmetric &= a == b
    return 0, symmetric


@njit(cache=True, nogil=True)
@no_type_check
def build(D, k):
    """BUILD: the point with the least row sum, then greedily the one that lowers the cost most."""
    n = D.shape[0]
    medoids = np.empty(k, np.int64)
    nearest = np.full(n, np.inf)
    chosen = np.zeros(n, np.bool_)
    for slot in range(k):
        best, best_cost = -1, np.inf
        for j in range(n):
            if chosen[j]:
                continue
            cost = 0.0
            for i in range(n):
                cost += min(D[j, i], nearest[i])
            if cost < best_cost:
                best, best_cost = j, cost
        medoids[slot] = best
        chosen[best] = True
        for i in range(n):
            nearest[i] = min(nearest[i], D[best, i])
    return medoids


@njit(cache=True, nogil=True)
@no_type_check
def _two_nearest(D, medoids, o, slot, second, d1, d2):
    """First and second medoid of point o, by slot."""
    a, b = -1, -1
    da, db = np.inf, np.inf
    for s in range(medoids.size):
        d = D[medoids[s], o]
        if d < da or (d == da and medoids[s] == o):
            b, db = a, da
            a, da = s, d
        elif d < db:
            b, db = s, d
    slot[o], second[o], d1[o], d2[o] = a, b, da, db


@njit(cache=True, nogil=True)
@no_type_check
def _removal_losses(slot, d1, d2, losses):
    """By how much the cost grows when a medoid is taken away: its points go to their second."""
    losses[:] = 0.0
    for o in range(slot.size):
        losses[slot[o]] += d2[o] - d1[o]


@njit(cache=True, nogil=True)
@no_type_check
def _exchange(D, medoids, out, candidate, slot, second, d1, d2, losses):
    """Put `candidate` into slot `out`; only points that lose a medoid look at all medoids again."""
    medoids[out] = candidate
    row = D[candidate]
    for o in range(slot.size):
        if slot[o] == out or second[o] == out:
            _two_nearest(D, medoids, o, slot, second, d1, d2)
        elif row[o] < d1[o] or o == candidate:
            second[o], d2[o] = slot[o], d1[o]
            slot[o], d1[o] = out, row[o]
        elif row[o] < d2[o]:
            second[o], d2[o] = out, row[o]
    _removal_losses(slot, d1, d2, losses)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
@no_type_check
def _best_exchange(row, slot, d1, d2, losses, gains):
    """The slot that `candidate` should take and by how much the cost changes, for all slots in one pass (FastPAM)."""
    shared = 0.0
    gains[:] = losses
    for o in range(row.size):
        d = row[o]
        if d < d2[o]:
            if d < d1[o]:
                shared += d - d1[o]
                gains[slot[o]] += d1[o] - d2[o]
            else:
                gains[slot[o]] += d - d2[o]
    out = np.argmin(gains)
    return out, gains[out] + shared


@njit(cache=True, nogil=True)
@no_type_check
def swap(D, medoids, eager, max_sweeps, tol):
    """SWAP until no exchange lowers the cost by more than tol; (medoids, slots, cost, swaps, sweeps, converged).

    eager: take every exchange that helps as soon as it is seen (FasterPAM); else the best one of each sweep (PAM).
    """
    n, k = D.shape[0], medoids.size
    medoids = medoids.copy()
    slot, second = np.empty(n, np.int64), np.empty(n, np.int64)
    d1, d2 = np.empty(n), np.empty(n)
    for o in range(n):
        _two_nearest(D, medoids, o, slot, second, d1, d2)
    swaps, sweeps, converged = 0, 0, k == n
    if k == 1:  # the least row sum
        best, best_cost = medoids[0], d1.sum()
        for j in range(n):
            cost = D[j].sum()
            if cost < best_cost - tol:
                best, best_cost = j, cost
        swaps, sweeps, converged = int(best != medoids[0]), 1, True
        medoids[0] = best
        for o in range(n):
            _two_nearest(D, medoids, o, slot, second, d1, d2)
    losses, gains = np.empty(k), np.empty(k)
    if not converged:
        _removal_losses(slot, d1, d2, losses)
    since_last, j = 0, 0
    while not converged and sweeps < max_sweeps:
        sweeps += 1
        best_change, best_out, best_in = -tol, -1, -1
        for _ in range(n):
            if medoids[slot[j]] != j:
                out, change = _best_exchange(D[j], slot, d1, d2, losses, gains)
                if change < best_change:
                    if eager:
                        _exchange(D, medoids, out, j, slot, second, d1, d2, losses)
                        swaps += 1
                        since_last = 0
                    else:
                        best_change, best_out, best_in = change, out, j
            since_last += 1
            j = (j + 1) % n
            if eager and since_last >= n:
                converged = True
                break
        if not eager:
            if best_in < 0:
                converged = True
            else:
                _exchange(D, medoids, best_out, best_in, slot, second, d1, d2, losses)
                swaps += 1
    return medoids, slot, d1.sum(), swaps, sweeps, converged
