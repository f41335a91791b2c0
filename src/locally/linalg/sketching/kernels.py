"""The compiled loops: Kaczmarz projections over dense and sparse rows, and over freshly sketched blocks.

They live in one file because Numba's cache does not notice that a function called from another file has changed.
`reassoc` lets dense inner products run in vector registers (sparse ones get up to 2.5 times slower by it); NaN and
infinity keep their meaning, so that a residual which is not finite ends the loop. Sparse indices are cast to unsigned
integers, which drops the test for Python's negative ones. `no_type_check` keeps run-time shape checkers from wrapping
a function before it is compiled.

A Kaczmarz step waits for the one before it, and so would the memory that its row comes from. The sweeps therefore ask
for rows before their turn: `prefetch` is a hint to the processor, which reads nothing that the program could see.
"""

from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FAST = {"reassoc", "contract", "nsz"}
SPARSE = {"contract"}
LINE = 8  # entries of a cache line in float64
LONGEST = 4096  # entries of a dense row that are asked for at once: half of a small first-level cache
AHEAD = 8  # steps between asking for a sparse row and using it


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Fetch the cache line of array[index]; an index outside the array is allowed and does nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, index_type = signature.args
        data = context.make_array(array_type)(context, builder, arguments[0]).data
        place = context.cast(builder, arguments[1], index_type, types.uintp)
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        hint = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, hint, "llvm.prefetch.p0")
        read, keep, of_data = word(0), word(3), word(1)
        builder.call(function, [builder.bitcast(builder.gep(data, [place]), byte), read, keep, of_data])
        return context.get_dummy_value()

    return types.void(array, index), generate


@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
@no_type_check
def sweep_dense(A, b, x, rows, inverse_squares):
    """x <- x - (a_i . x - b_i) / ||a_i||^2 a_i for each i in rows.

    The update along a row and the inner product with the next one share a loop: memory then streams the next row while
    the present one comes from cache. Two loops a row take up to 1.7 times as long on rows that memory has to deliver.
    """
    if rows.size == 0:
        return
    row = A[rows[0]]
    gap = 0.0
    for j in range(x.size):
        gap += row[j] * x[j]
    for t in range(rows.size - 1):
        step = (gap - b[rows[t]]) * inverse_squares[rows[t]]
        following = A[rows[t + 1]]
        for j in range(0, min(x.size, LONGEST), LINE):
            prefetch(following, j)
        gap = 0.0
        for j in range(x.size):
            moved = x[j] - step * row[j]
            x[j] = moved
            gap += following[j] * moved
        row = following
    last = rows[rows.size - 1]
    step = (gap - b[last]) * inverse_squares[last]
    for j in range(x.size):
        x[j] -= step * row[j]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=SPARSE)
@no_type_check
def sweep_sparse(indptr, indices, data, b, x, rows, inverse_squares):
    """As sweep_dense.

    Four sums make up an inner product, so that an addition need not wait for the one before it. At each four entries
    the loop asks for those at the same place of the row AHEAD steps later: in storage order, and in any other.
    """
    one, two, three, four = np.uintp(1), np.uintp(2), np.uintp(3), np.uintp(4)
    for t in range(rows.size):
        i = np.uintp(rows[t])
        start, stop = np.uintp(indptr[i]), np.uintp(indptr[i + one])
        ahead = np.uintp(0)
        if t + 2 * AHEAD < rows.size:
            prefetch(indptr, rows[t + 2 * AHEAD])
            k = np.uintp(rows[t + AHEAD])
            first = np.uintp(indptr[k])
            prefetch(b, k)
            prefetch(inverse_squares, k)
            prefetch(data, first)
            prefetch(indices, first)
            ahead = first - start + four
        p = start
        gap, gap1, gap2, gap3 = 0.0, 0.0, 0.0, 0.0
        while p + four <= stop:
            prefetch(data, p + ahead)
            prefetch(indices, p + ahead)
            gap += data[p] * x[np.uintp(indices[p])]
            gap1 += data[p + one] * x[np.uintp(indices[p + one])]
            gap2 += data[p + two] * x[np.uintp(indices[p + two])]
            gap3 += data[p + three] * x[np.uintp(indices[p + three])]
            p += four
        gap = (gap + gap1) + (gap2 + gap3)
        for q in range(p, stop):
            gap += data[q] * x[np.uintp(indices[q])]
        step = (gap - b[i]) * inverse_squares[i]
        for q in range(start, stop):
            x[np.uintp(indices[q])] -= step * data[q]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
@no_type_check
def residual_dense(A, b, x):
    """(||A x - b||^2, ||x||^2)."""
    squares = 0.0
    for i in range(b.size):
        row = A[i]
        gap = 0.0
        for j in range(x.size):
            gap += row[j] * x[j]
        squares += (gap - b[i]) ** 2
    return squares, square(x)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=SPARSE)
@no_type_check
def residual_sparse(indptr, indices, data, b, x):
    squares = 0.0
    for i in range(b.size):
        gap = 0.0
        for p in range(np.uintp(indptr[i]), np.uintp(indptr[i + 1])):
            gap += data[p] * x[np.uintp(indices[p])]
        squares += (gap - b[i]) ** 2
    return squares, square(x)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
@no_type_check
def square(x):
    total = 0.0
    for j in range(x.size):
        total += x[j] * x[j]
    return total


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def kaczmarz_dense(A, b, x, rows, inverse_squares, check_every, target, rounding):
    """Project until ||A x - b|| <= max(target, rounding ||x||); returns steps taken and the last ||A x - b||."""
    steps, squares = 0, np.inf
    while steps < rows.size:
        stop = min(steps + check_every, rows.size)
        sweep_dense(A, b, x, rows[steps:stop], inverse_squares)
        steps = stop
        squares, length = residual_dense(A, b, x)
        # a residual that is not a number stops the loop as well
        if not squares > max(target, rounding * np.sqrt(length)) ** 2 or squares == np.inf:
            break
    return steps, np.sqrt(squares)


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def kaczmarz_sparse(indptr, indices, data, b, x, rows, inverse_squares, check_every, target, rounding):
    steps, squares = 0, np.inf
    while steps < rows.size:
        stop = min(steps + check_every, rows.size)
        sweep_sparse(indptr, indices, data, b, x, rows[steps:stop], inverse_squares)
        steps = stop
        squares, length = residual_sparse(indptr, indices, data, b, x)
        if not squares > max(target, rounding * np.sqrt(length)) ** 2 or squares == np.inf:
            break
    return steps, np.sqrt(squares)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
@no_type_check
def project_blocks(V, c, x, block_size):
    """Project x onto {x: V_k x = c_k} for one block V_k of rows after the other. Overwrites V and c.

    Each block is made orthonormal first (Gram-Schmidt, a second time where a row lost half its length, with the
    residuals carried along), which leaves the projection what it is and turns it into one Kaczmarz step a row. A row
    that the rows before it already span is skipped: the sketch then has lower rank, as the pseudo-inverse of the
    definition has.
    """
    d = x.size
    for first in range(0, c.size, block_size):
        last = min(first + block_size, c.size)
        for i in range(first, last):
            gap = 0.0
            for j in range(d):
                gap += V[i, j] * x[j]
            c[i] = gap - c[i]
        for i in range(first, last):
            before = square(V[i])
            after = before
            for again in range(2 if i > first else 0):
                if again and after > 0.25 * before:
                    break
                for k in range(first, i):
                    overlap = 0.0
                    for j in range(d):
                        overlap += V[k, j] * V[i, j]
                    for j in range(d):
                        V[i, j] -= overlap * V[k, j]
                    c[i] -= overlap * c[k]
                after = square(V[i])
            if after <= 1e-24 * before or before == 0.0:
                V[i] = 0.0
                c[i] = 0.0
            else:
                scale = 1 / np.sqrt(after)
                for j in range(d):
                    V[i, j] *= scale
                c[i] *= scale
        for i in range(first, last):
            for j in range(d):
                x[j] -= c[i] * V[i, j]
