"""The compiled loops for tensors in the memory of the CPU: one sweep x <- phi(gamma A x + b), and Picard iteration.

A is held by rows: row i has the entries `limits[i] .. limits[i + 1] - 1` of `columns` and of `weights`, one column of
weights for each head. They live in one file because Numba's cache does not notice that a function called from another
file has changed.
"""

from typing import no_type_check

import numpy as np
from numba import njit

IDENTITY, TANH, RELU, LEAKY_RELU = range(4)
LEAK = 0.01


@njit(cache=True)
@no_type_check
def compress(rows, n):
    """Limits of the rows and the order that sorts the entries by row, by counting: linear in entries and rows."""
    limits = np.zeros(n + 1, np.int64)
    for i in rows:
        limits[i + 1] += 1
    for i in range(n):
        limits[i + 1] += limits[i]
    free = limits[:-1].copy()
    order = np.empty(rows.size, np.int64)
    for e in range(rows.size):
        order[free[rows[e]]] = e
        free[rows[e]] += 1
    return limits, order


@njit(cache=True, nogil=True)
@no_type_check
def add_absolute(lines, weights, out):
    """out[line] += |weights| for every entry."""
    for e in range(lines.size):
        for h in range(weights.shape[1]):
            out[lines[e], h] += abs(weights[e, h])


@njit(cache=True, nogil=True)
@no_type_check
def sweep(limits, columns, weights, bias, gamma, activation, first, last, x, out):
    """out = phi(gamma A x + b) on the rows first .. last - 1.

    Sums are double: a row of a million single-precision terms could come out a per cent too large and not contract.
    """
    heads = x.shape[1]
    total = np.empty(heads)
    for i in range(first, last):
        total[:] = 0
        for e in range(limits[i], limits[i + 1]):
            j = columns[e]
            for h in range(heads):
                total[h] += weights[e, h] * x[j, h]
        for h in range(heads):
            out[i, h] = gamma * total[h] + bias[i, h]
        if activation == TANH:
            for h in range(heads):
                out[i, h] = np.tanh(out[i, h])
        elif activation == RELU:
            for h in range(heads):
                out[i, h] = max(out[i, h], 0)
        elif activation == LEAKY_RELU:
            for h in range(heads):
                if out[i, h] < 0:
                    out[i, h] *= LEAK


@njit(cache=True, nogil=True)
@no_type_check
def picard(limits, columns, weights, bias, gamma, activation, starts, summed, targets, most, x, steps, changes):
    """Sweep every graph from x until no head changes by more than its target times its norm.

    Graph g owns the rows starts[g] .. starts[g + 1] - 1. Changes are measured in the sum norm if `summed`, else in the
    maximum norm. Overwrites x; writes sweeps to `steps` and the last changes to `changes`.
    """
    heads = x.shape[1]
    other = np.empty_like(x)
    change = np.empty(heads)
    size = np.empty(heads)
    for g in range(starts.size - 1):
        first, last = starts[g], starts[g + 1]
        old, new = x, other
        k = 0
        done = first == last
        change[:] = 0
        while k < most and not done:
            sweep(limits, columns, weights, bias, gamma, activation, first, last, old, new)
            k += 1
            change[:] = 0
            size[:] = 0
            if summed:
                for i in range(first, last):
                    for h in range(heads):
                        change[h] += abs(new[i, h] - old[i, h])
                        size[h] += abs(new[i, h])
            else:
                for i in range(first, last):
                    for h in range(heads):
                        change[h] = max(change[h], abs(new[i, h] - old[i, h]))
                        size[h] = max(size[h], abs(new[i, h]))
            done = True
            for h in range(heads):
                if not change[h] <= targets[g, h] * size[h]:
                    done = False
            old, new = new, old
        if k % 2 == 1:
            x[first:last] = other[first:last]
        steps[g] = k
        changes[g] = change
