"""Compiled: trimmed means, where one sort of a coordinate serves all nodes, and what the adversary's search repeats."""

from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True)
@no_type_check
def trimmed_means(pool, heard, trim, out):
    """out[h] = per coordinate the mean of pool[heard[h]] without its trim[h] smallest and trim[h] largest entries."""
    size, dimension = pool.shape
    values = np.empty(size, pool.dtype)
    order = np.empty(size, np.int64)
    counts = heard.sum(axis=1)
    for d in range(dimension):
        for p in range(size):
            value = pool[p, d]
            at = p
            while at > 0 and values[at - 1] > value:
                values[at] = values[at - 1]
                order[at] = order[at - 1]
                at -= 1
            values[at] = value
            order[at] = p
        for h in range(len(heard)):
            rank, total = 0, 0.0
            last = counts[h] - trim[h]
            for k in range(size):
                if heard[h, order[k]]:
                    if trim[h] <= rank < last:
                        total += values[k]
                    rank += 1
            out[h, d] = total / (last - trim[h])


@njit(cache=True)
@no_type_check
def squared_shift_of_trimmed_mean(ranked, mean, lie, copies, trim):
    """|| trimmed mean of the honest columns and `copies` of the lie - mean ||^2, honest entries sorted (D, H)."""
    dimension, honest = ranked.shape
    kept = honest + copies - 2 * trim
    total = 0.0
    for d in range(dimension):
        below = np.searchsorted(ranked[d], lie[d])
        # merged: `below` honest entries, the copies, other honest ones; ranks trim ... trim + kept - 1 stay
        value = 0.0
        for j in range(min(trim, below), min(below, trim + kept)):
            value += ranked[d, j] if j >= trim else 0.0
        for j in range(below, min(honest, trim + kept - copies)):
            value += ranked[d, j] if j + copies >= trim else 0.0
        value += lie[d] * max(min(below + copies, trim + kept) - max(below, trim), 0)
        total += (value / kept - mean[d]) ** 2
    return total


@njit(cache=True)
@no_type_check
def squared_shift_of_nearest_mean(gram, order, ranked, inner, square, copies, keep):
    """|| mean of all nodes' nearest-neighbour averages - honest mean ||^2 from inner products around that mean.

    gram: of the honest vectors; order, ranked: of each one's squared distances to all; inner, square: of the lie.
    """
    nodes = len(gram)
    weights = np.zeros(nodes)
    told = 0.0
    for i in range(nodes):
        distance = gram[i, i] - 2 * inner[i] + square
        nearer = np.searchsorted(ranked[i], distance, side="right")
        lies = min(copies, max(keep - nearer, 0))
        for j in range(keep - lies):
            weights[order[i, j]] += 1
        told += lies
    total = 0.0
    for i in range(nodes):
        row = 0.0
        for j in range(nodes):
            row += gram[i, j] * weights[j]
        total += weights[i] * row
    if told > 0:  # the lie may be infinite where nobody believes it
        for i in range(nodes):
            total += 2 * told * weights[i] * inner[i]
        total += told * told * square
    return total / (nodes * keep) ** 2
