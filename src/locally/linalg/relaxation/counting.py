"""How many iterations SOR takes, tabulated over many shifted systems and relaxation parameters at once."""

from typing import Any, no_type_check

import numpy as np
from jaxtyping import Float, Int
from numba import njit
from numpy import ndarray

from locally.checks import check_count, check_finite, check_positive
from locally.linalg.relaxation.splitting import Splitting, check_omega


def sor_iteration_counts(
    A: Any,
    shifts: Float[ndarray, " instances"],
    B: Float[ndarray, "instances n"],
    omegas: Float[ndarray, " omegas"],
    *,
    rtol: float = 1e-8,
    max_iter: int = 10_000,
) -> Int[ndarray, "instances omegas"]:
    """Iterations that forward SOR from x = 0 needs on every (A + shifts[t] I) x = B[t] with every omega.

    Counts are those of `locally.solvers.omega_bandit.SOR`: the first k with ||r_k|| <= rtol ||b||, at most max_iter.
    128 solves advance together in vector registers and a finished one makes room for the next; with many more solves
    than that an iteration costs about a quarter of a lone solve's. Releases the interpreter lock: several threads can
    each tabulate a part.

    Raises:
        ValueError: a shape or value is out of range, or a shifted diagonal is not positive.

    >>> import scipy.sparse as sp
    >>> A = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(9, 9))
    >>> sor_iteration_counts(A, np.array([0.0, 0.5]), np.ones((2, 9)), np.array([1.0, 1.5])).tolist()
    [[184, 47], [35, 29]]
    """
    split = Splitting.of(A)
    check_positive("rtol", rtol, below=1.0)
    check_count("max_iter", max_iter)
    if B.shape != (shifts.size, split.n):
        raise ValueError(f"B must have shape ({shifts.size}, {split.n}), got {B.shape}")
    for name, values in (("shifts", shifts), ("B", B), ("omegas", omegas)):
        check_finite(name, values)
    for omega in omegas:
        check_omega(float(omega))
    smallest = float(split.diagonal.min(initial=np.inf)) + float(shifts.min(initial=np.inf))
    if not smallest > 0:
        raise ValueError(f"A + shifts[t] I must have a positive diagonal, but its smallest entry is {smallest}")
    counts = np.zeros((shifts.size, omegas.size), np.int64)
    arrays = (np.ascontiguousarray(v, np.float64) for v in (split.data, shifts, B, omegas))
    _count_batched(split.indptr, split.indices, split.diagonal_at, *arrays, rtol, max_iter, counts)
    return counts


# Inner loops this long are what the compiler vectorises; shorter ones it unrolls into scalar code, at half the speed.
_LANES = 128


@njit(cache=True, nogil=True, fastmath={"contract"})
@no_type_check
def _count_batched(indptr, indices, diagonal_at, data, shifts, B, omegas, rtol, max_iter, counts):
    """Residual recurrence r <- C_omega r in _LANES columns; a column that finishes takes the next (instance, omega)."""
    n = diagonal_at.size
    jobs = counts.size
    r = np.zeros((n, _LANES))
    d = np.zeros((n, _LANES))
    weight = np.zeros((n, _LANES))  # omega / (a_ii + shift)
    keep = np.zeros(_LANES)  # 1 - omega
    target = np.full(_LANES, -1.0)  # squared
    job = np.full(_LANES, -1)
    done = np.zeros(_LANES, np.int64)
    squares = np.zeros(_LANES)
    s = np.zeros(_LANES)
    next_job = 0
    active = 0
    for lane in range(_LANES):
        while next_job < jobs and job[lane] < 0:
            if _load(lane, next_job, indptr, diagonal_at, data, shifts, B, omegas, rtol, r, weight, keep, target):
                job[lane] = next_job
                active += 1
            next_job += 1
    while active > 0:
        # (D/omega + L) d = r; what remains of row i is (1/omega - 1) D d = (1 - omega)(r - L d), then minus U d
        for i in range(n):
            for w in range(_LANES):
                s[w] = r[i, w]
            for p in range(np.uintp(indptr[i]), np.uintp(diagonal_at[i])):
                entry, j = data[p], np.uintp(indices[p])
                for w in range(_LANES):
                    s[w] -= entry * d[j, w]
            for w in range(_LANES):
                d[i, w] = weight[i, w] * s[w]
                r[i, w] = keep[w] * s[w]
        squares[:] = 0.0
        for i in range(n):
            for w in range(_LANES):
                s[w] = r[i, w]
            for p in range(np.uintp(diagonal_at[i] + 1), np.uintp(indptr[i + 1])):
                entry, j = data[p], np.uintp(indices[p])
                for w in range(_LANES):
                    s[w] -= entry * d[j, w]
            for w in range(_LANES):
                r[i, w] = s[w]
                squares[w] += s[w] * s[w]
        for lane in range(_LANES):
            if job[lane] < 0:
                continue
            done[lane] += 1
            if not squares[lane] <= target[lane] and done[lane] < max_iter:
                continue
            counts[job[lane] // omegas.size, job[lane] % omegas.size] = done[lane]
            job[lane] = -1
            done[lane] = 0
            active -= 1
            while next_job < jobs and job[lane] < 0:
                if _load(lane, next_job, indptr, diagonal_at, data, shifts, B, omegas, rtol, r, weight, keep, target):
                    job[lane] = next_job
                    active += 1
                next_job += 1
            if job[lane] < 0:
                r[:, lane] = 0.0


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def _load(lane, job, indptr, diagonal_at, data, shifts, B, omegas, rtol, r, weight, keep, target):
    """Put a job into a lane; False if its right-hand side is zero, which takes no iteration."""
    t = job // omegas.size
    omega = omegas[job % omegas.size]
    total = 0.0
    for i in range(diagonal_at.size):
        r[i, lane] = B[t, i]
        weight[i, lane] = omega / (data[diagonal_at[i]] + shifts[t])
        total += B[t, i] * B[t, i]
    keep[lane] = 1 - omega
    target[lane] = rtol * rtol * total
    return total > 0
