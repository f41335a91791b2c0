"""From bounds on Jacobian entries to bounds on norms.

Row norms (one output): the l_1 norm that belongs to l_inf inputs, the l_2 norm, and the largest entry for l_1 inputs.
The first two go through bound propagation once more, behind the chord over |g| or g^2, which keeps what the entries
have in common. Matrix norms: row and column sums, and for l_2 the spectral bounds below.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from locally.tangent.lipschitz.gradients import GradientBounds, push_rows
from locally.tangent.lipschitz.intervals import EPS, centre_radius, magnitude
from locally.tangent.lipschitz.network import Network
from locally.tangent.lipschitz.relaxations import absolute_value, square

INF = math.inf


def row_norms(
    net: Network, b: GradientBounds, ord: float, kept: dict[int, Tensor] | None = None, second_pass: bool = True
) -> Float[Tensor, " heads"]:
    """Upper bounds on the dual norm of the gradient of each head: l_1 for ord inf, l_2 for 2, l_inf for 1."""
    lower, upper = b.lower[0], b.upper[0]
    size = magnitude(lower, upper).flatten(1)
    n = size.shape[1]
    up = 1 + 2 * (n + 8) * EPS  # sums of n non-negative numbers
    if ord == 1:
        if kept is not None:
            push_rows(net, 0, widest_entry(lower, upper)[:, None], b, kept)
        return size.amax(1)
    plain = size.sum(1) * up if ord == INF else size.square().sum(1).sqrt() * up
    if not second_pass:
        return plain
    slope, intercept = absolute_value(lower, upper) if ord == INF else square(lower, upper)
    joint = push_rows(net, 0, slope[:, None], b, kept)[:, 0]
    constant = intercept.flatten(1)
    joint = joint + constant.sum(1) + net.gamma * (constant.abs().sum(1) + joint.abs())
    if ord == 2:
        joint = joint.clamp(min=0).sqrt() * up
    return torch.minimum(plain, joint.clamp(min=0))


def widest_entry(lower: Tensor, upper: Tensor) -> Tensor:
    """The row that picks the entry of largest magnitude, with its sign."""
    size = magnitude(lower, upper).flatten(1)
    row = torch.zeros_like(size)
    best = size.argmax(1, keepdim=True)
    sign = torch.where(upper.flatten(1).abs() >= lower.flatten(1).abs(), 1.0, -1.0).to(size.dtype)
    row.scatter_(1, best, sign.gather(1, best))
    return row.view_as(lower)


def matrix_norm(
    lower: Float[Tensor, "b k d"], upper: Float[Tensor, "b k d"], rows: Float[Tensor, "b k"], ord: float
) -> Float[Tensor, " b"]:
    """Upper bound on the operator norm l_ord -> l_ord of every matrix in [lower, upper] whose row norms obey `rows`."""
    if ord == INF:
        return rows.amax(1)
    size = magnitude(lower, upper)
    if ord == 1:
        return size.sum(1).amax(1) * (1 + 2 * (size.shape[1] + 8) * EPS)
    up = 1 + 2 * (size.shape[1] + 8) * EPS
    frobenius = rows.square().sum(1).sqrt() * up
    return torch.minimum(spectral_norm(lower, upper), frobenius)


def spectral_norm(lower: Float[Tensor, "b k d"], upper: Float[Tensor, "b k d"]) -> Float[Tensor, " b"]:
    """max ||J||_2 over an interval matrix, from above.

    The smaller of ||C|| + ||R|| (centre and radius) and the norm of the largest magnitudes: a matrix with |D| <= R
    entrywise has ||D|| <= ||R||, since R is non-negative (Perron). And of the same with one norm of the Gram matrix:
    J J^T = C C^T + E with |E| <= |C| R^T + R |C|^T + R R^T, so ||J||^2 <= ||C||^2 + ||that||.
    """
    centre, radius = centre_radius(lower, upper)
    outer = largest_singular(magnitude(lower, upper))
    middle = largest_singular(centre)
    apart = middle + largest_singular(radius)
    cross = centre.abs() @ radius.mT
    excess = cross + cross.mT + radius @ radius.mT
    gram = (middle.square() + largest_singular(excess)).sqrt()
    best = torch.minimum(torch.minimum(outer, apart), gram)
    return best * (1 + 8 * (sum(lower.shape[1:]) + 8) * EPS)


def largest_singular(matrix: Float[Tensor, "b k d"]) -> Float[Tensor, " b"]:
    """||M||_2 from above: LAPACK's value with its backward error, at most 1 ulp times a low-order term of the size."""
    k, d = matrix.shape[-2:]
    gram = matrix @ matrix.mT if k <= d else matrix.mT @ matrix
    if k == 1 or d == 1:
        return matrix.square().sum((-1, -2)).sqrt() * (1 + 2 * (k * d + 8) * EPS)
    top = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (top + 8 * (k + d) * EPS * trace).sqrt() * (1 + 4 * EPS)
