"""The compiled loops of one step, for tensors in the memory of the CPU.

A step of conjugate gradients on a small system costs less than the dispatch of a dozen tensor operations; here it is
two passes. Each function mirrors a method of the same name in `cg` or `minres`, which other devices use and the tests
compare it with. Rows are systems; rows whose code is not RUNNING stay as they are. Dot products accumulate in double
precision. They live in one file because Numba's cache does not notice that a function called from another file has
changed; `no_type_check` keeps run-time shape checkers from wrapping a function before it is compiled.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit

RUNNING, CONVERGED, ITERATION_LIMIT, STAGNATED = -1, 0, 1, 2
INDEFINITE, NOT_SYMMETRIC, INCONSISTENT, BAD_PRECONDITIONER, NOT_FINITE = 3, 4, 5, 6, 7
NO_CURVATURE = 8  # p'Ap is not positive: indefinite or singular, which the caller finds out

# sums may be reordered, which lets them use vector registers; NaN and infinity keep their meaning
COMPILE = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp"}}


@njit(**COMPILE)
@no_type_check
def csr_product(indptr, indices, data, v, out):
    """out = v A^T: four systems at a time share the reading of A. Unsigned indices spare a test for negative ones."""
    batch, n = v.shape
    for j in range(0, batch - 3, 4):
        v0, v1, v2, v3 = v[j], v[j + 1], v[j + 2], v[j + 3]
        for i in range(n):
            s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
            for k in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
                a, column = data[k], np.uint64(indices[k])
                s0 += a * v0[column]
                s1 += a * v1[column]
                s2 += a * v2[column]
                s3 += a * v3[column]
            out[j, i], out[j + 1, i], out[j + 2, i], out[j + 3, i] = s0, s1, s2, s3
    for j in range(batch - batch % 4, batch):
        row, result = v[j], out[j]
        for i in range(n):
            s = 0.0
            for k in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
                s += data[k] * row[np.uint64(indices[k])]
            result[i] = s


@njit(**COMPILE)
@no_type_check
def cg_advance(codes, iterations, p, q, y, r, rz, pp, top, norms, targets, tiny):
    """y += alpha p, r -= alpha q; returns how many systems go on."""
    batch, n = p.shape
    running = 0
    for j in range(batch):
        if codes[j] != RUNNING:
            continue
        pj, qj, yj, rj = p[j], q[j], y[j], r[j]
        curvature = 0.0
        for i in range(n):
            curvature += pj[i] * qj[i]
        if not np.isfinite(curvature):
            codes[j] = NOT_FINITE
            continue
        top[j] = max(top[j], abs(curvature) / pp[j])
        if curvature <= tiny * top[j] * pp[j]:
            codes[j] = NO_CURVATURE
            continue
        alpha = p.dtype.type(rz[j] / curvature)
        rr = 0.0
        for i in range(n):
            yj[i] += alpha * pj[i]
            residual = rj[i] - alpha * qj[i]
            rj[i] = residual
            rr += residual * residual
        norms[j] = np.sqrt(rr)
        iterations[j] += 1
        if not np.isfinite(rr):
            codes[j] = NOT_FINITE
        elif norms[j] <= targets[j]:
            codes[j] = CONVERGED
        else:
            running += 1
    return running


@njit(**COMPILE)
@no_type_check
def cg_turn(codes, r, z, p, rz, pp):
    """p = z + beta p; returns how many systems go on."""
    batch, n = p.shape
    running = 0
    for j in range(batch):
        if codes[j] != RUNNING:
            continue
        rj, zj, pj = r[j], z[j], p[j]
        rz_next = 0.0
        for i in range(n):
            rz_next += rj[i] * zj[i]
        if not rz_next > 0:
            codes[j] = BAD_PRECONDITIONER if np.isfinite(rz_next) else NOT_FINITE
            continue
        beta = p.dtype.type(rz_next / rz[j])
        for i in range(n):
            pj[i] = zj[i] + beta * pj[i]
        pp[j] = rz_next + beta * beta * pp[j]
        rz[j] = rz_next
        running += 1
    return running


@njit(**COMPILE)
@no_type_check
def cg_dense(matrices, history, codes, iterations, p, q, y, r, rz, pp, top, norms, targets, tiny):
    """As many steps as `history` has rows, one system after the other: its matrix stays in the cache meanwhile.

    Returns how many systems go on; rows of `history` are norms after a step, up to the last one of each system.
    """
    running = 0
    for j in range(p.shape[0]):
        one = slice(j, j + 1)
        for step in range(history.shape[0]):
            if codes[j] != RUNNING:
                break
            np.dot(matrices[j], p[j], q[j])
            cg_advance(
                codes[one],
                iterations[one],
                p[one],
                q[one],
                y[one],
                r[one],
                rz[one],
                pp[one],
                top[one],
                norms[one],
                targets[one],
                tiny,
            )
            cg_turn(codes[one], r[one], r[one], p[one], rz[one], pp[one])
            history[step, j] = norms[j]
        running += codes[j] == RUNNING
    return running


@njit(**COMPILE)
@no_type_check
def cg_sparse(indptr, indices, data, history, codes, iterations, p, q, y, r, rz, pp, top, norms, targets, tiny):
    """As `cg_dense`, with one sparse matrix for all systems, which take their steps together."""
    running = 0
    for step in range(history.shape[0]):
        csr_product(indptr, indices, data, p, q)
        running = cg_advance(codes, iterations, p, q, y, r, rz, pp, top, norms, targets, tiny)
        running = running and cg_turn(codes, r, r, p, rz, pp)
        history[step] = norms
        if not running:
            break
    return running


@njit(**COMPILE)
@no_type_check
def cg_at_once(matrix, b, rtol, atol, aim, tiny, x, history):
    """A whole solve of one dense system from zero, in as many steps as `history` has entries after its first.

    Returns the steps taken and ||b - A x||, from x itself; -1 steps where it did not converge, whatever the cause.
    """
    n = b.shape[0]
    largest = 0.0
    for i in range(n):
        largest = max(largest, abs(b[i]))
    if not np.isfinite(largest):
        return -1, largest
    scale = b.dtype.type(math.ldexp(0.5, math.frexp(largest)[1])) if largest > 0 else b.dtype.type(1.0)
    r = np.empty((1, n), b.dtype)
    bb = 0.0
    for i in range(n):
        r[0, i] = b[i] / scale
        bb += r[0, i] * r[0, i]
    history[0] = scale * np.sqrt(bb)
    target = max(rtol * np.sqrt(bb), atol / scale)
    y = np.zeros((1, n), b.dtype)
    iterations = np.zeros(1, np.int64)
    if np.sqrt(bb) > target:
        codes = np.full(1, RUNNING, np.int8)
        squares, squares_too = np.full(1, bb), np.full(1, bb)
        seen = np.zeros((history.shape[0] - 1, 1))
        norms, targets, top = np.full(1, np.sqrt(bb)), np.full(1, aim * target), np.zeros(1)
        q, p = np.empty_like(r), r.copy()
        matrices = matrix.reshape(1, n, n)
        cg_dense(matrices, seen, codes, iterations, p, q, y, r, squares, squares_too, top, norms, targets, tiny)
        if codes[0] != CONVERGED:
            return -1, largest
        for step in range(iterations[0]):
            history[step + 1] = scale * seen[step, 0]
    np.dot(matrix, y[0], x)
    rr = 0.0
    for i in range(n):
        residual = b[i] / scale - x[i]
        rr += residual * residual
        x[i] = scale * y[0, i]
    return (iterations[0] if np.sqrt(rr) <= target else -1), scale * np.sqrt(rr)


@njit(**COMPILE)
@no_type_check
def lanczos_step(codes, q, v, u, u_old, alpha, beta):
    """q -= beta u_old, then q -= alpha u with alpha = <v, q>."""
    batch, n = q.shape
    for j in range(batch):
        if codes[j] != RUNNING:
            continue
        qj, vj, uj, oldj = q[j], v[j], u[j], u_old[j]
        back = q.dtype.type(beta[j])
        a = 0.0
        for i in range(n):
            entry = qj[i] - back * oldj[i]
            qj[i] = entry
            a += vj[i] * entry
        alpha[j] = a
        a = q.dtype.type(a)
        for i in range(n):
            qj[i] -= a * uj[i]


@njit(**COMPILE)
@no_type_check
def minres_advance(
    codes,
    iterations,
    q,
    z,
    v,
    u,
    u_old,
    w,
    w_old,
    y,
    r,
    best_y,
    rotation,
    alpha,
    beta,
    norms,
    targets,
    anorm,
    best,
    patience,
    eps,
    plain,
):
    """Rotate, y += phi w, and move on to the next Lanczos vectors; returns how many systems go on.

    `rotation` holds cs, sn, dbar, epsln, phibar of every system, `best` the smallest ||A r|| / ||r|| and the phibar
    there, `patience` is that of `MinimumResiduals`, `plain` says that there is no preconditioner.
    """
    batch, n = q.shape
    running = 0
    for j in range(batch):
        if codes[j] != RUNNING:
            continue
        qj, zj, vj, uj, oldj, wj, woldj, yj, rj = q[j], z[j], v[j], u[j], u_old[j], w[j], w_old[j], y[j], r[j]
        qz = 0.0
        qq = 0.0
        for i in range(n):
            qz += qj[i] * zj[i]
            qq += qj[i] * qj[i]
        if not np.isfinite(qz + qq + alpha[j]):
            codes[j] = NOT_FINITE
            continue
        if qz < 0 or (qz == 0 and qq > 0):
            codes[j] = BAD_PRECONDITIONER
            continue
        beta_next = np.sqrt(qz)
        cs, sn, dbar, epsln, phibar = rotation[j]
        anorm[j] = max(anorm[j], np.sqrt(alpha[j] ** 2 + beta[j] ** 2 + qz))
        delta = cs * dbar + sn * alpha[j]
        gbar = sn * dbar - cs * alpha[j]
        dbar = -cs * beta_next

        gradient = np.hypot(gbar, dbar)
        if gradient <= (eps**0.75 if patience[j] else eps**0.5) * anorm[j]:
            codes[j] = INCONSISTENT
            continue
        if not patience[j]:
            if gradient < min(best[j, 0], eps**0.25 * anorm[j]):
                best[j] = gradient, phibar
                best_y[j] = yj
            elif gradient > 100 * best[j, 0] and abs(phibar) > 0.99 * abs(best[j, 1]):
                yj[:] = best_y[j]
                codes[j] = INCONSISTENT
                continue

        gamma = np.hypot(gbar, beta_next)
        oldeps, epsln = epsln, sn * beta_next
        cs, sn = gbar / gamma, beta_next / gamma
        phi, phibar = cs * phibar, sn * phibar
        rotation[j] = cs, sn, dbar, epsln, phibar
        scale, c_old, c_delta = q.dtype.type(1 / gamma), q.dtype.type(oldeps), q.dtype.type(delta)
        step = q.dtype.type(phi)
        for i in range(n):
            direction = (vj[i] - c_old * woldj[i] - c_delta * wj[i]) * scale
            woldj[i] = wj[i]
            wj[i] = direction
            yj[i] += step * direction

        ended = beta_next <= eps * anorm[j]
        inverse = q.dtype.type(0.0 if ended else 1 / beta_next)
        if plain:
            for i in range(n):
                oldj[i] = uj[i]
                uj[i] = qj[i] * inverse
            norms[j] = abs(phibar)
        else:
            keep, add = q.dtype.type(sn * sn), q.dtype.type(cs * phibar)
            rr = 0.0
            for i in range(n):
                oldj[i] = uj[i]
                uj[i] = qj[i] * inverse
                vj[i] = zj[i] * inverse
                residual = keep * rj[i] - add * uj[i]
                rj[i] = residual
                rr += residual * residual
            norms[j] = np.sqrt(rr)
        beta[j] = beta_next
        iterations[j] += 1
        if norms[j] <= targets[j]:
            codes[j] = CONVERGED
        elif ended or (patience[j] and iterations[j] >= patience[j]):
            codes[j] = INCONSISTENT
        else:
            running += 1
    return running
