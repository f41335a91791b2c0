"""The compiled loops: triangular sweeps, the SOR and SSOR-CG iterations, checks that one pass over A can make.

All take the CSR arrays of A with ascending columns and the positions of its diagonal; callers check everything first.
They live in one file because Numba's cache does not notice that a function called from another file has changed.

Column indices and row limits are cast to unsigned integers: Numba then drops its test for Python's negative indices, a
quarter of a sweep's time. In every row the entry that waits for the row just finished comes last, so that the rest of
the sum overlaps with it. Both together take about 0.6 of the time of a loop in storage order. `no_type_check` keeps
run-time shape checkers from wrapping a function before it is compiled.
"""

from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def locate_diagonal(indptr, indices, data, positions):
    """Fill positions; returns the first row without a positive diagonal entry, or -1."""
    for i in range(positions.size):
        p, stop = np.uintp(indptr[i]), np.uintp(indptr[i + 1])
        while p < stop and indices[p] < i:
            p += np.uintp(1)
        if p == stop or indices[p] != i or not data[p] > 0:
            return i
        positions[i] = p
    return -1


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
@no_type_check
def symmetric(indptr, indices, data, diagonal_at, tolerance):
    """Rows are visited in ascending order, so row j meets its upper entries (j, i) in ascending order of i."""
    n = diagonal_at.size
    upper = diagonal_at + 1  # next unmatched upper entry of each row
    for i in range(n):
        for p in range(indptr[i], diagonal_at[i]):
            j = indices[p]
            q = upper[j]
            # an entry that is stored on one side only may still be zero
            while q < indptr[j + 1] and indices[q] < i and abs(data[q]) <= tolerance:
                q += 1
            if q < indptr[j + 1] and indices[q] == i:
                if abs(data[p] - data[q]) > tolerance:
                    return False
                q += 1
            elif abs(data[p]) > tolerance:
                return False
            upper[j] = q
    for j in range(n):
        for q in range(upper[j], indptr[j + 1]):
            if abs(data[q]) > tolerance:
                return False
    return True


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
@no_type_check
def sweep_forward(indptr, indices, data, diagonal_at, x, b, omega):
    for i in range(x.size):
        residual = b[i]
        for p in range(np.uintp(diagonal_at[i]), np.uintp(indptr[i + 1])):
            residual -= data[p] * x[np.uintp(indices[p])]
        for p in range(np.uintp(indptr[i]), np.uintp(diagonal_at[i])):
            residual -= data[p] * x[np.uintp(indices[p])]
        x[i] += omega / data[diagonal_at[i]] * residual


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
@no_type_check
def sweep_backward(indptr, indices, data, diagonal_at, x, b, omega):
    for i in range(x.size - 1, -1, -1):
        residual = b[i]
        for p in range(np.uintp(indptr[i]), np.uintp(diagonal_at[i] + 1)):
            residual -= data[p] * x[np.uintp(indices[p])]
        for p in range(indptr[i + 1] - 1, diagonal_at[i], -1):
            residual -= data[np.uintp(p)] * x[np.uintp(indices[np.uintp(p)])]
        x[i] += omega / data[diagonal_at[i]] * residual


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
@no_type_check
def ssor_backward_first(indptr, indices, data, diagonal_at, r, z, omega):
    """z = omega (2 - omega) X^-1 D X^-T r for symmetric A; z may be r. Returns r . z where z is not r."""
    n = z.size
    for i in range(n - 1, -1, -1):  # X^T y = r, y kept in z
        y = r[i]
        for p in range(indptr[i + 1] - 1, diagonal_at[i], -1):
            y -= omega * data[np.uintp(p)] * z[np.uintp(indices[np.uintp(p)])]
        z[i] = (1 / data[diagonal_at[i]]) * y
    scale = omega * (2 - omega)
    product = 0.0
    for i in range(n):  # X z = omega (2 - omega) D y
        s = z[i] * 0
        for p in range(np.uintp(indptr[i]), np.uintp(diagonal_at[i])):
            s += data[p] * z[np.uintp(indices[p])]
        z[i] = scale * z[i] - omega / data[diagonal_at[i]] * s
        product += r[i] * z[i]
    return product


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
@no_type_check
def ssor_forward_first(indptr, indices, data, diagonal_at, r, z, omega):
    """z = omega (2 - omega) X^-T D X^-1 r for symmetric A; z may be r. Returns r . z where z is not r."""
    n = z.size
    for i in range(n):
        y = r[i]
        for p in range(np.uintp(indptr[i]), np.uintp(diagonal_at[i])):
            y -= omega * data[p] * z[np.uintp(indices[p])]
        z[i] = (1 / data[diagonal_at[i]]) * y
    scale = omega * (2 - omega)
    product = 0.0
    for i in range(n - 1, -1, -1):
        s = z[i] * 0
        for p in range(indptr[i + 1] - 1, diagonal_at[i], -1):
            s += data[np.uintp(p)] * z[np.uintp(indices[np.uintp(p)])]
        z[i] = scale * z[i] - omega / data[diagonal_at[i]] * s
        product += r[i] * z[i]
    return product


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
@no_type_check
def residual(indptr, indices, data, x, b, r):
    """r = b - A x; returns ||r||^2."""
    squares = 0.0
    for i in range(x.size):
        s = b[i]
        for p in range(np.uintp(indptr[i]), np.uintp(indptr[i + 1])):
            s -= data[p] * x[np.uintp(indices[p])]
        r[i] = s
        squares += s * s
    return squares


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
@no_type_check
def sor_steps(indptr, indices, data, diagonal_at, x, r, d, omega, target, ceiling, steps):
    """Up to `steps` iterations x += d, r <- r - A d with (D/omega + L) d = r, until ||r||^2 leaves (target, ceiling).

    Since r - A d = (1/omega - 1) D d - U d, both halves of an iteration together read A only once.
    Returns (iterations done, ||r||^2).
    """
    n = x.size
    squares = 0.0
    for k in range(steps):
        for i in range(n):
            s = r[i]
            for p in range(np.uintp(indptr[i]), np.uintp(diagonal_at[i])):
                s -= data[p] * d[np.uintp(indices[p])]
            d[i] = omega / data[diagonal_at[i]] * s
            r[i] = (1 - omega) * s  # (1/omega - 1) a_ii d_i
        squares = 0.0
        for i in range(n):
            s = r[i]
            for p in range(np.uintp(diagonal_at[i] + 1), np.uintp(indptr[i + 1])):
                s -= data[p] * d[np.uintp(indices[p])]
            r[i] = s
            x[i] += d[i]
            squares += s * s
        if not target < squares < ceiling:
            return k + 1, squares
    return steps, squares


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
@no_type_check
def ssor_cg_steps(indptr, indices, data, diagonal_at, x, r, z, p, q, rz, omega, backward_first, target, steps):
    """Up to `steps` iterations of preconditioned conjugate gradients, until ||r||^2 <= target.

    `rz` is r . z of the current r. Returns (iterations done, ||r||^2, r . z, curvature): a curvature p . A p that is
    not positive ended the iteration before it changed x.
    """
    n = x.size
    squares = 0.0
    for k in range(steps):
        curvature = 0.0
        for i in range(n):
            s = p[i] * 0
            for e in range(np.uintp(indptr[i]), np.uintp(indptr[i + 1])):
                s += data[e] * p[np.uintp(indices[e])]
            q[i] = s
            curvature += p[i] * s
        if not curvature > 0:
            return k, squares, rz, curvature
        alpha = rz / curvature
        squares = 0.0
        for i in range(n):
            x[i] += alpha * p[i]
            r[i] -= alpha * q[i]
            squares += r[i] * r[i]
        if squares <= target:
            return k + 1, squares, rz, curvature
        if backward_first:
            product = ssor_backward_first(indptr, indices, data, diagonal_at, r, z, omega)
        else:
            product = ssor_forward_first(indptr, indices, data, diagonal_at, r, z, omega)
        beta = product / rz
        rz = product
        for i in range(n):
            p[i] = z[i] + beta * p[i]
    return steps, squares, rz, 1.0
