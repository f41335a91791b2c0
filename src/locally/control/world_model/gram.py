"""The Gram matrix A = sum of phi phi^T of sparse codes: dense, or by rows that hold the pairs seen and no others.

Both add one outer product, and hand out a block A[S, S] together with A[S, :] W, at a cost that does not depend on how
many products were added. Rows keep their columns sorted, in one pool of segments that grow by half and are used again.
"""

from typing import Protocol, no_type_check, runtime_checkable

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numba import njit
from numpy import ndarray

PAIR_BYTES = 12  # a column number in 32 bits, a value in 64
FIRST_SEGMENT = 16
SEGMENTS = np.array([int(FIRST_SEGMENT * 1.5**k) for k in range(48)], np.int64)


@runtime_checkable
class Gram(Protocol):
    """What the follow-the-leader updates ask of either form."""

    @property
    def nbytes(self) -> int: ...

    def add(self, indices: Int[ndarray, " K"], values: Float[ndarray, " K"]) -> None: ...

    def block(
        self, indices: Int[ndarray, " S"], W: Float[ndarray, "D targets"]
    ) -> tuple[Float[ndarray, "S S"], Float[ndarray, "S targets"]]: ...

    def to_csr(self) -> sp.csr_array: ...

    def load_csr(self, matrix: sp.csr_array) -> None: ...


class DenseGram:
    """All D^2 entries.

    Args:
        size: D.
        memory_limit: MiB; a larger matrix is refused.

    Raises:
        MemoryError: 8 D^2 bytes are more than the limit.

    >>> gram = DenseGram(3)
    >>> gram.add(np.array([0, 2]), np.array([1.0, 2.0]))
    >>> gram.block(np.array([0, 2]), np.ones((3, 1)))[1].ravel()
    array([3., 6.])
    """

    def __init__(self, size: int, memory_limit: float | int = np.inf) -> None:
        _refuse_beyond(8 * size**2, memory_limit, f"a dense Gram matrix of {size} x {size} entries")
        self.matrix = np.zeros((size, size))

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def add(self, indices: Int[ndarray, " K"], values: Float[ndarray, " K"]) -> None:
        _add_dense(self.matrix, indices, values)

    def block(
        self, indices: Int[ndarray, " S"], W: Float[ndarray, "D targets"]
    ) -> tuple[Float[ndarray, "S S"], Float[ndarray, "S targets"]]:
        """A[S, S] and A[S, :] W."""
        return _block_dense(self.matrix, indices, W)

    def to_csr(self) -> sp.csr_array:
        return sp.csr_array(self.matrix)

    def load_csr(self, matrix: sp.csr_array) -> None:
        self.matrix[:] = matrix.toarray()


class RowGram:
    """Pairs of nodes that were active together, row by row: O(pairs) memory, whatever D is.

    A pair costs 12 bytes in either of its rows, a node that was ever active 13 bytes and every node of the code three
    untouched numbers; segments leave at most a third of the pool empty and moved rows leave room for later ones.

    Args:
        size: D, at most 2^31 - 1.
        memory_limit: MiB; the update that needs more is refused and leaves the matrix as it was.

    >>> gram = RowGram(1_000_000)
    >>> gram.add(np.array([5, 999_999]), np.array([1.0, 2.0]))
    >>> gram.n_pairs, gram.to_csr()[[999_999]].toarray().max()
    (4, np.float64(4.0))
    """

    def __init__(self, size: int, memory_limit: float | int = np.inf) -> None:
        self.size = size
        self.memory_limit = memory_limit
        self._clear(0)

    def _clear(self, capacity: int) -> None:
        # pages of zeros that nothing is written to take no memory
        self.start = np.zeros(self.size, np.int64)
        self.length = np.zeros(self.size, np.int32)
        self.segment = np.zeros(self.size, np.int8)  # 0: none yet, else 1 + index into SEGMENTS
        self.columns = np.empty(capacity, np.int32)
        self.values = np.empty(capacity)
        self.free = np.full(len(SEGMENTS), -1, np.int64)  # of each size, the segment that was given up last
        self.used = np.zeros(1, np.int64)

    @property
    def nbytes(self) -> int:
        """Of pool and row table, untouched pages included."""
        return sum(a.nbytes for a in (self.start, self.length, self.segment, self.columns, self.values))

    @property
    def n_pairs(self) -> int:
        return int(self.length.sum(dtype=np.int64))

    def add(self, indices: Int[ndarray, " K"], values: Float[ndarray, " K"]) -> None:
        self._reserve(_most_that_may_move(indices, self.length, self.segment, SEGMENTS))
        _add_rows(
            indices,
            values,
            self.start,
            self.length,
            self.segment,
            self.columns,
            self.values,
            self.free,
            self.used,
            SEGMENTS,
        )

    def _reserve(self, more: int) -> None:
        needed, capacity = int(self.used[0]) + more, len(self.columns)
        if needed <= capacity:
            return
        room = needed + capacity // 4
        bytes_after = self.nbytes + PAIR_BYTES * (room - capacity)
        _refuse_beyond(bytes_after, self.memory_limit, f"a Gram matrix of {self.n_pairs} pairs and their growth")
        self.columns.resize(room, refcheck=False)
        self.values.resize(room, refcheck=False)

    def block(
        self, indices: Int[ndarray, " S"], W: Float[ndarray, "D targets"]
    ) -> tuple[Float[ndarray, "S S"], Float[ndarray, "S targets"]]:
        """A[S, S] and A[S, :] W, at the cost of the pairs in the rows S; `indices` ascend."""
        return _block_rows(indices, W, self.start, self.length, self.columns, self.values)

    def to_csr(self) -> sp.csr_array:
        pointers = np.concatenate([[0], np.cumsum(self.length, dtype=np.int64)])
        columns, values = np.empty(pointers[-1], np.int64), np.empty(pointers[-1])
        _pack_rows(self.start, self.length, self.columns, self.values, pointers, columns, values)
        return sp.csr_array((values, columns, pointers), shape=(self.size, self.size))

    def load_csr(self, matrix: sp.csr_array) -> None:
        matrix.sort_indices()
        lengths = np.diff(matrix.indptr)
        segment = np.where(lengths > 0, 1 + np.searchsorted(SEGMENTS, lengths), 0)
        room = np.where(lengths > 0, SEGMENTS[segment - 1], 0)
        self._clear(int(room.sum()))
        self.used[0] = room.sum()
        self.start[:] = np.cumsum(room) - room
        self.length[:] = lengths
        self.segment[:] = segment
        _unpack_rows(self.start, self.length, self.columns, self.values, matrix.indptr, matrix.indices, matrix.data)


def _refuse_beyond(nbytes: int, memory_limit: float | int, what: str) -> None:
    if nbytes > memory_limit * 2**20:
        raise MemoryError(f"{what} needs {nbytes / 2**20:,.0f} MiB, memory_limit is {memory_limit:,.0f} MiB")


@njit(cache=True, nogil=True)
@no_type_check
def _add_dense(A, indices, values):
    for a in range(indices.size):
        row = A[indices[a]]
        for b in range(indices.size):
            row[indices[b]] += values[a] * values[b]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
@no_type_check
def _block_dense(A, indices, W):
    K, D, targets = indices.size, A.shape[0], W.shape[1]
    block, product = np.empty((K, K)), np.empty((K, targets))
    transposed = np.empty((targets, D))
    for j in range(D):
        for o in range(targets):
            transposed[o, j] = W[j, o]
    for a in range(K):
        row = A[indices[a]]
        for b in range(K):
            block[a, b] = row[indices[b]]
        for o in range(targets):
            column = transposed[o]
            total = 0.0
            for j in range(D):
                total += row[j] * column[j]
            product[a, o] = total
    return block, product


@njit(cache=True, nogil=True)
@no_type_check
def _segment_for(entries, sizes):
    s = 0
    while sizes[s] < entries:
        s += 1
    return s


@njit(cache=True, nogil=True)
@no_type_check
def _most_that_may_move(indices, length, segment, sizes):
    """Room in the pool that suffices even if no pair of `indices` was seen before."""
    total = 0
    for a in range(indices.size):
        i = indices[a]
        wanted = _segment_for(length[i] + indices.size, sizes)
        if wanted >= segment[i]:  # segment counts from one
            total += sizes[wanted]
    return total


@njit(cache=True, nogil=True)
@no_type_check
def _add_rows(indices, values, start, length, segment, columns, entries, free, used, sizes):
    K = indices.size
    place = np.empty(K, np.int64)
    for a in range(K):
        i = indices[a]
        n, s = length[i], start[i]
        p, missing = 0, 0
        for b in range(K):
            while p < n and columns[s + p] < indices[b]:
                p += 1
            if p < n and columns[s + p] == indices[b]:
                place[b] = s + p
            else:
                place[b] = -1
                missing += 1
        if missing == 0:
            for b in range(K):
                entries[place[b]] += values[a] * values[b]
            continue

        if segment[i] == 0 or n + missing > sizes[segment[i] - 1]:
            wanted = _segment_for(n + missing, sizes)
            if free[wanted] >= 0:
                target = free[wanted]
                free[wanted] = np.int64(entries[target])  # the list of free segments runs through themselves
            else:
                target = used[0]
                used[0] += sizes[wanted]
            for p in range(n):
                columns[target + p] = columns[s + p]
                entries[target + p] = entries[s + p]
            if segment[i] > 0:
                entries[s] = free[segment[i] - 1]
                free[segment[i] - 1] = s
            start[i] = s = target
            segment[i] = wanted + 1

        # merge from the end, so that nothing is overwritten before it has moved
        p, w, b = n - 1, n + missing - 1, K - 1
        while b >= 0:
            if p >= 0 and columns[s + p] > indices[b]:
                columns[s + w] = columns[s + p]
                entries[s + w] = entries[s + p]
                p -= 1
            elif p >= 0 and columns[s + p] == indices[b]:
                columns[s + w] = columns[s + p]
                entries[s + w] = entries[s + p] + values[a] * values[b]
                p -= 1
                b -= 1
            else:
                columns[s + w] = indices[b]
                entries[s + w] = values[a] * values[b]
                b -= 1
            w -= 1
        length[i] = n + missing


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
@no_type_check
def _block_rows(indices, W, start, length, columns, entries):
    K, targets = indices.size, W.shape[1]
    block, product = np.zeros((K, K)), np.zeros((K, targets))
    for a in range(K):
        first, last = start[indices[a]], start[indices[a]] + length[indices[a]]
        if targets == 1:
            total = 0.0
            for p in range(first, last):
                total += entries[p] * W[columns[p], 0]
            product[a, 0] = total
        else:
            for p in range(first, last):
                for o in range(targets):
                    product[a, o] += entries[p] * W[columns[p], o]
        p = first
        for b in range(K):
            while p < last and columns[p] < indices[b]:
                p += 1
            if p < last and columns[p] == indices[b]:
                block[a, b] = entries[p]
    return block, product


@njit(cache=True, nogil=True)
@no_type_check
def _pack_rows(start, length, columns, entries, pointers, packed_columns, packed_values):
    for i in range(length.size):
        for p in range(length[i]):
            packed_columns[pointers[i] + p] = columns[start[i] + p]
            packed_values[pointers[i] + p] = entries[start[i] + p]


@njit(cache=True, nogil=True)
@no_type_check
def _unpack_rows(start, length, columns, entries, pointers, packed_columns, packed_values):
    for i in range(length.size):
        for p in range(length[i]):
            columns[start[i] + p] = packed_columns[pointers[i] + p]
            entries[start[i] + p] = packed_values[pointers[i] + p]
