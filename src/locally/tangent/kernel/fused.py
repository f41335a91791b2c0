"""The recursion on covariances, compiled: a tile of pairs stays in the cache while all layers pass over it.

One read of the inner products and one write of each kernel, instead of several passes over memory for each layer. A
tile is a matrix: for vectors one row and many second examples as columns; where only equal pixels meet, one row a
pixel; where all pixels meet, one pair of images with the pixels of either as rows and columns. `reference.py` has the
same steps on tensors; the tests hold the two together; `tiles.py` prepares what is read here. All that is compiled
stays in one file, since the compiler's cache does not see changes in others. Numbers are copied one by one, since
compiling a slice assignment takes seconds; `no_type_check` keeps run-time shape checkers from wrapping a function
before it is compiled.
"""

from typing import no_type_check

import numpy as np
from numba import njit

REORDER = {"reassoc", "contract", "arcp", "nsz"}
HALF_PI, TWO_PI = np.pi / 2, 2 * np.pi


def _arcsine_polynomial(degree: int = 14) -> tuple[float, ...]:
    """Coefficients of asin(sqrt z) / sqrt z on [0, 1/4] in powers of 8 z - 1, to the last bit or so."""
    nodes = np.cos(np.pi * (np.arange(4 * degree) + 0.5) / (4 * degree))
    z = np.sqrt((nodes + 1) / 8)
    series = np.polynomial.chebyshev.chebfit(nodes, np.arcsin(z) / z, degree)
    return tuple(np.polynomial.chebyshev.cheb2poly(series).tolist())


P0, P1, P2, P3, P4, P5, P6, P7, P8, P9, P10, P11, P12, P13, P14 = _arcsine_polynomial()


@njit(cache=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def arcsine_small(s, z):
    """asin(s) with s = sqrt(z) in [0, 1/2]."""
    y = 8.0 * z - 1.0
    p = P14
    p = p * y + P13
    p = p * y + P12
    p = p * y + P11
    p = p * y + P10
    p = p * y + P9
    p = p * y + P8
    p = p * y + P7
    p = p * y + P6
    p = p * y + P5
    p = p * y + P4
    p = p * y + P3
    p = p * y + P2
    p = p * y + P1
    return s * (p * y + P0)


@njit(cache=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def arcsine(c):
    """asin without branches, so that a loop over it becomes vector instructions; |c| above 1 counts as 1."""
    m = min(abs(c), 1.0)
    big = m > 0.5
    z = 0.5 - 0.5 * m if big else m * m
    s = np.sqrt(z) if big else m
    small = arcsine_small(s, z)
    value = HALF_PI - 2.0 * small if big else small
    return -value if c < 0 else value


# A row of duals: q and t are rows of the tile, (a1, b1) the features of the first example, (a2, b2) of the columns ----


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def rectifier(q, t, a1, b1, a2, b2, fold, half):
    for k in range(q.size):
        c = q[k] * (b1 * b2[k])
        m = min(abs(c), 1.0)
        prime = half - fold * (HALF_PI - arcsine(c))
        sine = np.sqrt((1.0 - m) * (1.0 + m))
        q[k] = fold * (a1 * a2[k]) * sine + prime * q[k]
        t[k] *= prime


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def erf(q, t, a1, a2):
    for k in range(q.size):
        scale = a1 * a2[k]
        c = 2.0 * q[k] * scale
        m = min(abs(c), 1.0)
        q[k] = (2.0 / np.pi) * arcsine(c)
        t[k] *= (4.0 / np.pi) * scale / np.sqrt((1.0 - m) * (1.0 + m))


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def gelu(q, t, a1, b1, a2, b2):
    for k in range(q.size):
        x = q[k]
        both = a1 * a2[k]
        outer = (1.0 + a1) * (1.0 + a2[k])
        square = outer - x * x
        root = np.sqrt(square)
        angle = arcsine(x * (b1 * b2[k]))
        q[k] = ((x * x + both * square) / (outer * root) + x * angle) / TWO_PI + 0.25 * x
        bracket = 1.0 / square + (1.0 - both) / outer + 1.0
        t[k] *= 0.25 + angle / TWO_PI + x / (TWO_PI * root) * bracket


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def exponentials(q, t, a1, a2, kind, c0, c1, c2):
    for k in range(q.size):
        x, mean = q[k], 0.5 * (a1 + a2[k])
        if kind == 3:  # sine
            near, far = np.exp(c1 * (x - mean)), np.exp(-c1 * (x + mean)) * c2
            q[k] = c0 * (near - far)
            t[k] *= c0 * c1 * (near + far)
        elif kind == 4:  # feature of the Gaussian kernel
            q[k] = np.exp(2.0 * c0 * (x - mean))
            t[k] *= 2.0 * c0 * q[k]
        elif kind == 6:  # exponential
            q[k] = c0 * np.exp(c1 * (x + mean))
            t[k] *= c1 * q[k]
        else:  # Gaussian
            square = (1.0 - 2.0 * c1 * a1) * (1.0 - 2.0 * c1 * a2[k]) - 4.0 * c1 * c1 * x * x
            q[k] = c0 / np.sqrt(square)
            t[k] *= 4.0 * c1 * c1 * x * q[k] / square


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def sign(q, t, b1, b2):
    for k in range(q.size):
        q[k] = (2.0 / np.pi) * arcsine(q[k] * (b1 * b2[k]))
        t[k] = 0.0


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def normalise(q, t, a1, a2):
    for k in range(q.size):
        scale = a1 * a2[k]
        q[k] *= scale
        t[k] *= scale


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def dual_row(kind, c, q, t, a1, b1, a2, b2):
    if kind == 0:
        rectifier(q, t, a1, b1, a2, b2, c[0], c[1])
    elif kind == 1:
        erf(q, t, a1, a2)
    elif kind == 2:
        gelu(q, t, a1, b1, a2, b2)
    elif kind == 5:
        sign(q, t, b1, b2)
    else:
        exponentials(q, t, a1, a2, kind, c[0], c[1], c[2])


# Windows over pixels --------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def clear(x, start, stop):
    for k in range(start, stop):
        x[k] = 0.0


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def copy(out, x, count):
    for k in range(count):
        out[k] = x[k]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def add_row(out, row):
    for k in range(out.size):
        out[k] += row[k]


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def source(o, i, stride, before, size, wraps):
    """Where output o reads at offset i of the window; -1 in the margin of zeros."""
    at = o * stride + i - before
    if wraps:
        return at % size
    return at if 0 <= at < size else -1


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def box_equal(x, out, k, lanes):
    """Sum over the window, rows are pixels; k = (kernel h, w, stride h, w, top, left, wraps, h, w, out h, out w)."""
    for oh in range(k[9]):
        for ow in range(k[10]):
            row = out[(oh * k[10] + ow) * lanes : (oh * k[10] + ow + 1) * lanes]
            clear(row, 0, lanes)
            for i in range(k[0]):
                h = source(oh, i, k[2], k[4], k[7], k[6])
                for j in range(k[1]):
                    w = source(ow, j, k[3], k[5], k[8], k[6])
                    if h >= 0 and w >= 0:
                        add_row(row, x[(h * k[8] + w) * lanes : (h * k[8] + w + 1) * lanes])


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def box_all(x, half, out, k):
    """Sum over the window, which both images share: first along the height into `half`, then along the width."""
    h, w, out_h, out_w = k[7], k[8], k[9], k[10]
    for oh in range(out_h):
        for w1 in range(w):
            start = (oh * w + w1) * out_h * w
            clear(half, start, start + out_h * w)
            for i in range(k[0]):
                h1 = source(oh, i, k[2], k[4], h, k[6])
                if h1 < 0:
                    continue
                for oh2 in range(out_h):
                    h2 = source(oh2, i, k[2], k[4], h, k[6])
                    if h2 >= 0:
                        at, to = ((h1 * w + w1) * h + h2) * w, start + oh2 * w
                        add_row(half[to : to + w], x[at : at + w])
    for oh in range(out_h):
        for ow in range(out_w):
            start = (oh * out_w + ow) * out_h * out_w
            clear(out, start, start + out_h * out_w)
            for j in range(k[1]):
                w1 = source(ow, j, k[3], k[5], w, k[6])
                if w1 < 0:
                    continue
                for oh2 in range(out_h):
                    at, to = ((oh * w + w1) * out_h + oh2) * w, start + oh2 * out_w
                    shift = j - k[5]
                    if k[3] == 1 and k[6] == 0:
                        low, high = max(0, -shift), min(out_w, w - shift)
                        add_row(out[to + low : to + high], half[at + low + shift : at + high + shift])
                        continue
                    for ow2 in range(out_w):
                        w2 = source(ow2, j, k[3], k[5], w, k[6])
                        if w2 >= 0:
                            out[to + ow2] += half[at + w2]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def pool_all(x, row, out, k):
    """Mean over windows of both images; k = (window h, w, stride h, w, -, -, -, h, w, out h, out w)."""
    h, w, out_h, out_w = k[7], k[8], k[9], k[10]
    columns = h * w
    scale = 1.0 / (k[0] * k[1]) ** 2
    for oh in range(out_h):
        for ow in range(out_w):
            clear(row, 0, columns)
            for h1 in range(oh * k[2], oh * k[2] + k[0]):
                for w1 in range(ow * k[3], ow * k[3] + k[1]):
                    add_row(row[:columns], x[(h1 * w + w1) * columns : (h1 * w + w1 + 1) * columns])
            for oh2 in range(out_h):
                for ow2 in range(out_w):
                    total = 0.0
                    for h2 in range(oh2 * k[2], oh2 * k[2] + k[0]):
                        for w2 in range(ow2 * k[3], ow2 * k[3] + k[1]):
                            total += row[h2 * w + w2]
                    out[((oh * out_w + ow) * out_h + oh2) * out_w + ow2] = scale * total


# The recursion on one tile --------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def affine(q, t, w2, b2, q_to_t, b_to_t, scale):
    for k in range(q.size):
        x = scale * q[k]
        t[k] = w2 * scale * t[k] + q_to_t * x + b_to_t
        q[k] = w2 * x + b2


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def walk(code, constants, full, lanes, rows, q, t, q_next, t_next, spare, kept, a1, b1, a2, b2):
    """All steps over a tile of `rows` x `lanes` numbers at the start of q and t; returns the arrays that hold the end.

    a1, b1: (reads, pixels) of the first example; a2, b2: (reads, pixels or 1, lanes) of the columns.
    """
    reads = level = 0
    scale = 1.0
    for s in range(len(code)):
        op, k, c = code[s, 0], code[s, 2:], constants[s]
        if op == 0:
            affine(q[: rows * lanes], t[: rows * lanes], c[0], c[1], c[2], c[3], scale)
            scale = 1.0
        elif op == 1:
            if full:
                box_all(q, spare, q_next, k)
                box_all(t, spare, t_next, k)
                lanes = k[9] * k[10]
            else:
                box_equal(q, q_next, k, lanes)
                box_equal(t, t_next, k, lanes)
            rows = k[9] * k[10]
            scale = 1.0 / (k[0] * k[1])  # a mean: left to the affine step that follows
            q, q_next, t, t_next = q_next, q, t_next, t
        elif op == 2 or op == 3:
            for r in range(rows):
                part = slice(r * lanes, (r + 1) * lanes)
                at = 0 if full else r
                if op == 2:
                    dual_row(code[s, 1], c, q[part], t[part], a1[reads, r], b1[reads, r], a2[reads, at], b2[reads, at])
                else:
                    normalise(q[part], t[part], a1[reads, r], a2[reads, at])
            reads += 1
        elif op == 4:
            if full:
                for x in (q, t):
                    total = 0.0
                    for r in range(rows):
                        total += x[r * lanes + r]
                    x[0] = total / rows
                lanes = 1
            else:
                for x in (q, t):
                    for r in range(1, rows):
                        add_row(x[:lanes], x[r * lanes : (r + 1) * lanes])
                    for n in range(lanes):
                        x[n] /= rows
            rows = 1
        elif op == 5:
            pool_all(q, spare, q_next, k)
            pool_all(t, spare, t_next, k)
            rows = lanes = k[9] * k[10]
            q, q_next, t, t_next = q_next, q, t_next, t
        elif op == 6:
            copy(kept[level, 0], q, rows * lanes)
            copy(kept[level, 1], t, rows * lanes)
            level += 1
        elif op == 7:
            # the two may differ in size: whole buffers change places
            for n in range(q.size):
                q[n], kept[level - 1, 0, n] = kept[level - 1, 0, n], q[n]
                t[n], kept[level - 1, 1, n] = kept[level - 1, 1, n], t[n]
            if full:
                lanes = k[7] * k[8]
            rows = k[7] * k[8]
        else:
            level -= 1
            add_row(q[: rows * lanes], kept[level, 0])
            add_row(t[: rows * lanes], kept[level, 1])
    return q, t


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def products(x1, x2, q, rows, lanes, full):
    """Inner products over channels of pixel r of x1 (channels, pixels) with row r, or the only one, of x2."""
    scale = 1.0 / len(x1)
    for r in range(rows):
        row = q[r * lanes : (r + 1) * lanes]
        clear(row, 0, lanes)
        for c in range(len(x1)):
            weight = scale * x1[c, r]
            other = x2[c, 0 if full else r]
            for k in range(lanes):
                row[k] += weight * other[k]


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def strip(code, constants, depth, full, size, x1, x2, nngp, ntk, first, step, same, a1, b1, a2, b2):
    """Rows first, first + step, ... of both kernels, from their diagonal on where `same`.

    x1: (N1, channels, pixels), or no channels where nngp holds the inner products on entry. x2: (tiles, channels, rows
    or 1, lanes). a1, b1: (N1, reads, pixels). a2, b2: (tiles, reads, rows or 1, lanes).
    """
    n1, n2 = nngp.shape
    wide = 1 if full else a2.shape[3]  # second examples in a tile
    lanes, rows = x2.shape[3], x1.shape[2]
    q, t, q_next, t_next, spare = np.empty(size), np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    kept = np.empty((depth, 2, size))
    for i in range(first, n1, step):
        for tile in range(i // wide if same else 0, len(a2)):
            j = tile * wide
            count = min(wide, n2 - j)
            if x1.shape[1]:
                products(x1[i], x2[tile], q, rows, lanes, full)
            else:
                copy(q, nngp[i, j:], count)
                clear(q, count, lanes)
            clear(t, 0, rows * lanes)
            end = walk(
                code, constants, full, lanes, rows, q, t, q_next, t_next, spare, kept, a1[i], b1[i], a2[tile], b2[tile]
            )
            copy(nngp[i, j:], end[0], count)
            copy(ntk[i, j:], end[1], count)


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def mirror(K, diagonal):
    """Complete a symmetric matrix whose entries right of the diagonal are there, in tiles that stay in the cache."""
    n, tile = len(K), 64
    for top in range(0, n, tile):
        for left in range(top, n, tile):
            for i in range(top, min(top + tile, n)):
                for j in range(max(left, i + 1), min(left + tile, n)):
                    K[j, i] = K[i, j]
    for i in range(n):
        K[i, i] = diagonal[i]
