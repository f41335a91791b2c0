"""The compiled steps: component differences, resolvents, and runs of steps between two full evaluations.

Every ready-made operator is a sum of stored vectors times scalars that depend on u, and every ready-made resolvent acts
on consecutive coordinates; `Components` and `Pieces` write both down as arrays, so that one kernel serves them all.
Vectors are copied entry by entry, since compiling a slice assignment takes seconds (for its error message). Everything
lives in one file because Numba's cache does not notice that a function called from another file has changed.
`no_type_check` keeps run-time shape checkers from wrapping a function before it is compiled.
"""

from typing import Any, NamedTuple, no_type_check

import numpy as np
from numba import njit

COORDINATE, SQUARE, LOGISTIC = range(3)  # coefficient of vector a_i: u_i, a_i.u - t_i, -t_i / (1 + exp(t_i a_i.u))
SIMPLEX, BOX, BALL, SHRINK = range(4)
REORDER = {"reassoc", "contract"}  # sums may be vectorised; NaN and infinity keep their meaning


class Bundle(NamedTuple):
    """Component i adds scale[i] * coefficient_i(u) * vectors[i] to the coordinates offset, ..., offset + width - 1."""

    vectors: Any  # (components, width), C order
    scale: Any  # (components,): makes a drawn component an unbiased estimate
    offset: int
    link: int
    first: int  # COORDINATE: coefficient i is u[first + i]
    targets: Any  # (components,) for SQUARE and LOGISTIC


class Components(NamedTuple):
    """A drawn component takes one vector of `left` and, where it has any, one of `right`; plus ridge * u."""

    left: Bundle
    right: Bundle
    ridge: float


class Pieces(NamedTuple):
    """Piece p acts on the coordinates start[p], ..., stop[p] - 1; the others are left as they are."""

    kind: Any
    start: Any
    stop: Any
    size: Any  # radius of a simplex or ball, weight of a shrinkage
    lower: Any  # (dim,): lower bounds of a box, centre of a ball
    upper: Any  # (dim,): upper bounds of a box


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def shuffle_prefixes(uniforms, order, sets):
    """Write b entries of a partial shuffle of `order` (n,) into each row of `sets`, from uniforms (steps, b)."""
    n = order.size
    steps, b = uniforms.shape
    for s in range(steps):
        for j in range(b):
            other = j + int(uniforms[s, j] * (n - j))
            order[j], order[other] = order[other], order[j]
            sets[s, j] = order[j]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def add_to(bundle, i, u, v, share, out):
    a = bundle.vectors[i]
    if bundle.link == COORDINATE:
        gap = u[bundle.first + i] - v[bundle.first + i]
    elif bundle.link == SQUARE:
        gap = u[0] * 0
        for j in range(a.size):
            gap += a[j] * (u[j] - v[j])
    else:
        at_u, at_v = u[0] * 0, u[0] * 0
        for j in range(a.size):
            at_u += a[j] * u[j]
            at_v += a[j] * v[j]
        t = bundle.targets[i]
        gap = t / (1 + np.exp(t * at_v)) - t / (1 + np.exp(t * at_u))
    if gap == 0:  # as in games, where most strategies are not played
        return
    factor = share * bundle.scale[i] * gap
    for j in range(a.size):
        out[bundle.offset + j] += factor * a[j]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def add_difference(components, u, v, drawn, out):
    """out += mean of F_i(u) - F_i(v) over `drawn` (b, indices): one index for both bundles, or one for each."""
    b, last = drawn.shape[0], drawn.shape[1] - 1
    share = 1 / b
    paired = components.right.vectors.shape[0] > 0
    for s in range(b):
        add_to(components.left, drawn[s, 0], u, v, share, out)
        if paired:
            add_to(components.right, drawn[s, last], u, v, share, out)
    if components.ridge > 0:
        for j in range(u.size):
            out[j] += components.ridge * (u[j] - v[j])


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def project_simplex(z, radius):
    """Newton's method on sum(max(z - level, 0)) = radius, from below: exact once the support repeats."""
    total, top = 0.0, z[0]
    for value in z:
        total += value
        top = value if value > top else top
    level = (total - radius) / z.size
    level = top - radius if top - radius > level else level
    for _ in range(z.size):
        mass, count = 0.0, 0
        for value in z:
            mass += value if value > level else 0.0
            count += 1 if value > level else 0
        if count == 0 or not (mass - radius) / count > level:
            break
        level = (mass - radius) / count
    for j in range(z.size):
        z[j] = 0.0 if z[j] < level else z[j] - level  # in this order NaN stays NaN


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def resolve(z, eta, pieces):
    """z <- J_{eta G}(z), in place."""
    for p in range(pieces.kind.size):
        start, stop, size = pieces.start[p], pieces.stop[p], pieces.size[p]
        if pieces.kind[p] == SIMPLEX:
            project_simplex(z[start:stop], size)
        elif pieces.kind[p] == BOX:
            for j in range(start, stop):
                if z[j] < pieces.lower[j]:
                    z[j] = pieces.lower[j]
                elif z[j] > pieces.upper[j]:
                    z[j] = pieces.upper[j]
        elif pieces.kind[p] == BALL:
            squares = 0.0
            for j in range(start, stop):
                squares += (z[j] - pieces.lower[j]) ** 2
            if squares > size * size:
                shrink = size / np.sqrt(squares)
                for j in range(start, stop):
                    z[j] = pieces.lower[j] + shrink * (z[j] - pieces.lower[j])
        else:
            threshold = eta * size
            for j in range(start, stop):
                if z[j] > threshold:
                    z[j] -= threshold
                elif z[j] < -threshold:
                    z[j] += threshold
                elif abs(z[j]) <= threshold:
                    z[j] = 0.0


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def anchored_step(pieces, anchor, u, estimate, argument, k, eta):
    """u <- J(lambda_k anchor + (1 - lambda_k) u - eta estimate); `argument` keeps what J was applied to."""
    pull = 2 / (k + 4)
    for j in range(u.size):
        argument[j] = pull * anchor[j] + (1 - pull) * u[j] - eta * estimate[j]
        u[j] = argument[j]
    resolve(u, eta, pieces)


@njit(cache=True, nogil=True, error_model="numpy")
@no_type_check
def halpern_steps(components, pieces, anchor, u, u_before, estimate, argument, k, eta, drawn):
    """One anchored step per row of `drawn`, numbered k, k + 1, ..., each after a PAGE correction of the estimate."""
    for s in range(drawn.shape[0]):
        add_difference(components, u, u_before, drawn[s], estimate)
        for j in range(u.size):
            u_before[j] = u[j]
        anchored_step(pieces, anchor, u, estimate, argument, k + s, eta)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def forb_steps(components, pieces, centre, v, w, w_before, F_w, argument, eta, tau, alpha, drawn):
    """VR-FoRB steps on eta F + Id - centre while the snapshot w stays; w_before is the snapshot of the step before."""
    gap = np.empty_like(v)
    for s in range(drawn.shape[0]):
        gap.fill(0)
        add_difference(components, v, w_before, drawn[s], gap)
        for j in range(v.size):
            reflected = eta * (F_w[j] + gap[j]) + (w[j] - centre[j]) + (v[j] - w_before[j])
            argument[j] = alpha * v[j] + (1 - alpha) * w[j] - tau * reflected
            w_before[j] = w[j]
            v[j] = argument[j]
        resolve(v, tau * eta, pieces)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=REORDER)
@no_type_check
def extragradient_steps(components, pieces, u, w, F_w, argument, gamma, alpha, drawn):
    """Variance-reduced extragradient steps while the snapshot w stays."""
    half, gap = np.empty_like(u), np.empty_like(u)
    for s in range(drawn.shape[0]):
        for j in range(u.size):
            argument[j] = alpha * u[j] + (1 - alpha) * w[j]
            half[j] = argument[j] - gamma * F_w[j]
        resolve(half, gamma, pieces)
        gap.fill(0)
        add_difference(components, half, w, drawn[s], gap)
        for j in range(u.size):
            argument[j] -= gamma * (F_w[j] + gap[j])
            u[j] = argument[j]
        resolve(u, gamma, pieces)
