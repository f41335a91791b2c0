r"""The backward pass of a normalisation, bounded: h = (I - y y^T / d) g / sigma.

As a chain of products with uncertain factors, each of them relaxed as the product of gradient and slope is
(`relaxations.clarke_product`), because bounds on y and 1 / sigma are known from the forward pass:

    t = mean(y g)        one number per group
    z = g - y t
    h = z / sigma

Sums stay exact between the products, so a row of coefficients keeps its cancellations: the uncertainty of 1 / sigma
meets the projected gradient z and not g, and that of y meets the one number t and not d terms of it. Where y and sigma
are known, so at a point, nothing is lost. Intervals of t and z come from bound propagation and are cut with what holds
for every y: |y|^2 <= d and 0 <= I - y y^T / d <= I give |t| <= |g| / sqrt(d) and |z| <= |g| in the l_2 norm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from locally.tangent.lipschitz.intervals import EPS, magnitude
from locally.tangent.lipschitz.normalisation import Normalisation
from locally.tangent.lipschitz.relaxations import Lines, Relaxation, clarke_product, product_range


@dataclass(frozen=True)
class MeanProduct:
    """t = mean(y g): lines on each y_i g_i in terms of g_i."""

    op: Normalisation
    lines: Lines
    reach: Tensor

    def push(self, a: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """Coefficients a (b, t, *groups) on t, bounded from above: rows on g and what to add."""
        d = self.op.count(tuple(self.reach.shape))
        return self.lines.pull((a / d).expand(*a.shape[:2], *self.reach.shape[1:]), gamma * self.reach)


@dataclass(frozen=True)
class Projection:
    """z = g - y t: lines on each y_i t in terms of t."""

    mean: MeanProduct
    lines: Lines
    reach: Tensor

    def push(self, B: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """Rows B on z, bounded from above: rows on g and what to add."""
        each, shift = self.lines.pull(-B, gamma * self.reach)
        through, more = self.mean.push(self.mean.op.sum(each), gamma)
        return B + through, shift + more


@dataclass(frozen=True)
class NormalisedProduct:
    """h = z / sigma: lines on h in terms of z."""

    projection: Projection
    lines: Lines
    reach: Tensor
    middle: Tensor  # of z
    mean_middle: Tensor  # of t
    gradient_middle: Tensor
    share: Tensor  # of each unit in what is not known of sigma, up to a factor

    def push(self, A: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """Rows A on h, bounded from above: rows on g and what to add."""
        B, shift = self.lines.pull(A, gamma * self.reach)
        rows, more = self.projection.push(B, gamma)
        return rows, shift + more

    def cost(self, A: Tensor) -> Tensor:
        """What not knowing each c_i may cost the bound with coefficients A (b, *shape) on h: gaps between the lines."""
        op, mean = self.projection.mean.op, self.projection.mean
        B = A * (self.lines.upper_slope + self.lines.lower_slope) / 2
        a = op.sum(B * (self.projection.lines.upper_slope + self.projection.lines.lower_slope) / 2)
        d = op.count(tuple(A.shape))
        own = B.abs() * self.projection.lines.gap(self.mean_middle)
        own = own + a.abs() / d * mean.lines.gap(self.gradient_middle)
        common = op.sum(A.abs() * self.lines.gap(self.middle))
        return own + common * self.share / op.sum(self.share).clamp(min=1e-300)


def mean_product(
    op: Normalisation, g: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], gamma: float, relaxation: Relaxation
) -> tuple[MeanProduct, Tensor, Tensor]:
    """With the interval of t."""
    lines = clarke_product(*g, *y, relaxation)
    low, high = product_range(*g, *y)
    slack = gamma * op.mean(magnitude(low, high))
    limit = length(op, *g) / op.count(tuple(low.shape)) ** 0.5 * (1 + 4 * EPS)
    low = torch.maximum(op.mean(low) - slack, -limit)
    high = torch.minimum(op.mean(high) + slack, limit)
    return MeanProduct(op, lines, lines.reach(magnitude(*g))), low, high


def projection(
    mean: MeanProduct,
    g: tuple[Tensor, Tensor],
    t: tuple[Tensor, Tensor],
    y: tuple[Tensor, Tensor],
    gamma: float,
    relaxation: Relaxation,
) -> tuple[Projection, Tensor, Tensor]:
    """With the interval of z."""
    tl, tu = (end.expand_as(g[0]) for end in t)
    lines = clarke_product(tl, tu, *y, relaxation)
    low, high = product_range(tl, tu, *y)
    size = magnitude(*g)
    slack = gamma * (size + magnitude(low, high))
    limit = length(mean.op, *g)
    bottom = torch.maximum(g[0] - high - slack, -limit)
    top = torch.minimum(g[1] - low + slack, limit)
    return Projection(mean, lines, lines.reach(magnitude(tl, tu)) + size), bottom, top


def length(op: Normalisation, gl: Tensor, gu: Tensor) -> Tensor:
    """|g| in the l_2 norm, per group, from above."""
    d, size = op.count(tuple(gl.shape)), magnitude(gl, gu)
    unit = size.amax(op.axes, keepdim=True)  # whose square may be too small or too large for a float
    unit = torch.where((unit > 0) & unit.isfinite(), unit, 1.0)
    return op.sum((size / unit).square()).sqrt() * unit * (1 + (d + 8) * EPS)


def normalised_product(
    inner: Projection,
    g: tuple[Tensor, Tensor],
    t: tuple[Tensor, Tensor],
    z: tuple[Tensor, Tensor],
    y: tuple[Tensor, Tensor],
    scale: tuple[Tensor, Tensor],
    relaxation: Relaxation,
) -> tuple[NormalisedProduct, Tensor, Tensor]:
    """With the interval of h."""
    lines = clarke_product(*z, *scale, relaxation)
    low, high = product_range(*z, *scale)
    middle, mean_middle, gradient_middle = ((end[0] + end[1]) / 2 for end in (z, t, g))
    share = magnitude(*y) * (y[1] - y[0])
    product = NormalisedProduct(
        inner, lines, lines.reach(magnitude(*z)), middle, mean_middle.expand_as(middle), gradient_middle, share
    )
    return product, low, high
