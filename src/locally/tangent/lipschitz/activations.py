"""Activation functions as bounds see them: values, lines around them, and the range of their slope.

Piecewise linear ones (ReLU, leaky ReLU) have the usual triangle. Smooth ones get the line of least area: it supports
the concave (for the lower line: convex) envelope at the midpoint. Its slope is found on a grid; its intercept is the
true extremum of f(z) - slope z, found by bisection on the pieces where f' is monotone, so the line is sound for any
slope.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from locally.tangent.lipschitz.intervals import EPS
from locally.tangent.lipschitz.relaxations import Lines

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PiecewiseLinear:
    """z for z >= 0 and negative_slope z below; ReLU has slope 0. Needs negative_slope <= 1, where it is convex."""

    negative_slope: float = 0.0
    name: str = "ReLU"

    def __call__(self, z: Tensor) -> Tensor:
        return torch.where(z >= 0, z, self.negative_slope * z)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, torch.ones_like(z), self.negative_slope)

    def interval(self, l: Float[Tensor, "*n"], u: Float[Tensor, "*n"]) -> tuple[Tensor, Tensor]:
        if self.negative_slope >= 0:
            return self(l), self(u)
        ends = torch.stack([self(l), self(u)])
        return torch.where((l < 0) & (u > 0), 0.0, ends.amin(0)), ends.amax(0)

    def is_open(self, l: Tensor, u: Tensor) -> Tensor:
        """Where both slopes are possible: also where an end is exactly 0, since the Clarke set is [slope, 1] there."""
        return (l <= 0) & (u >= 0)

    def slopes(self, l: Float[Tensor, "*n"], u: Float[Tensor, "*n"]) -> tuple[Tensor, Tensor]:
        """Range of the (Clarke) derivative on [l, u]."""
        one, a = torch.ones_like(l), torch.full_like(l, self.negative_slope)
        return torch.where(l > 0, one, a), torch.where(u < 0, a, one)

    def sides(self, l: Tensor, u: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        """`slopes` where splits said below <= z <= above: on the branch z >= 0 the slope is 1, on z <= 0 the other.

        Both together cover every element of the product set, whose extreme points have each slope at an end.
        """
        sl, su = self.slopes(l, u)
        a = self.negative_slope
        sl, su = torch.where(below >= 0, 1.0, sl), torch.where(below >= 0, 1.0, su)
        return torch.where(above <= 0, a, sl), torch.where(above <= 0, a, su)

    def backward(self, g: Tensor, z: Tensor) -> Tensor:
        """Rows g (n, s, *shape) times the derivative at the points z (n, *shape)."""
        return g * self.derivative(z)[:, None]

    def split_point(self, l: Tensor, u: Tensor) -> Tensor:
        return torch.zeros_like(l)

    def lines(self, l: Float[Tensor, "*n"], u: Float[Tensor, "*n"]) -> Lines:
        """Upper: the chord. Lower: slope z, with slope 1 if that leaves the smaller area, else negative_slope."""
        a = self.negative_slope
        open_ = (l < 0) & (u > 0)
        one = torch.ones_like(l)  # not the number 1.0: torch.where of two numbers is single precision
        closed = torch.where(l >= 0, one, a)
        width = torch.where(open_, u - l, 1.0)
        chord = ((u - a * l) / width).clamp(min(a, 1.0), 1.0)
        upper = torch.where(open_, chord, closed)
        # sound for any slope in [a, 1]: the line lies above the function at both ends, and the function is convex
        intercept = torch.maximum(a * l - upper * l, u - upper * u) * (1 + 8 * EPS)
        lower = torch.where(open_, torch.where(u > -l, one, a), closed)
        zero = torch.zeros_like(l)
        return Lines(lower, zero, upper, torch.where(open_, intercept, zero))


@dataclass(frozen=True)
class Smooth:
    """A twice differentiable activation.

    Attributes:
        value, derivative: on tensors.
        turns: where the derivative changes between rising and falling, in ascending order.
        minimum: where the function has its least value if it is not monotone, else None.
    """

    name: str
    value: Function
    derivative: Function
    turns: tuple[float, ...]
    minimum: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        return self.value(z)

    def interval(self, l: Float[Tensor, "*n"], u: Float[Tensor, "*n"]) -> tuple[Tensor, Tensor]:
        ends = torch.stack([self.value(l), self.value(u)])
        low, high = ends.amin(0), ends.amax(0)
        if self.minimum is not None:
            least = self.value(torch.full_like(l, self.minimum))
            low = torch.where((l < self.minimum) & (self.minimum < u), torch.minimum(low, least), low)
        slack = 16 * EPS * (1 + torch.maximum(l.abs(), u.abs()))
        return low - slack, high + slack

    def is_open(self, l: Tensor, u: Tensor) -> Tensor:
        return u > l

    def slopes(self, l: Float[Tensor, "*n"], u: Float[Tensor, "*n"]) -> tuple[Tensor, Tensor]:
        """Range of the derivative: it is monotone between the ends and the turns inside."""
        points = [l, u, *(torch.minimum(torch.maximum(torch.full_like(l, t), l), u) for t in self.turns)]
        values = torch.stack([self.derivative(p) for p in points])
        slack = 16 * EPS * (1 + torch.maximum(l.abs(), u.abs()).clamp(max=40.0))
        return values.amin(0) - slack, values.amax(0) + slack

    def sides(self, l: Tensor, u: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        return self.slopes(l, u)

    def backward(self, g: Tensor, z: Tensor) -> Tensor:
        """Rows g (n, s, *shape) times the derivative at the points z (n, *shape)."""
        return g * self.derivative(z)[:, None]

    def split_point(self, l: Tensor, u: Tensor) -> Tensor:
        return (l + u) / 2

    def lines(self, l: Float[Tensor, "*n"], u: Float[Tensor, "*n"]) -> Lines:
        upper = self._envelope_slope(l, u, 1.0)
        lower = self._envelope_slope(l, u, -1.0)
        return Lines(lower, -self._gap(l, u, lower, -1.0), upper, self._gap(l, u, upper, 1.0))

    def _envelope_slope(self, l: Tensor, u: Tensor, side: float) -> Tensor:
        """Slope of the line that supports the envelope of side * f at the midpoint, from a grid of 17 points."""
        grid = torch.linspace(0, 1, 17, dtype=l.dtype, device=l.device)
        z = l[..., None] + (u - l)[..., None] * grid
        y = side * self.value(z)
        left, right = torch.arange(8, device=l.device), torch.arange(9, 17, device=l.device)
        i, j = torch.cartesian_prod(left, right).T
        over_mid = y[..., i] + (y[..., j] - y[..., i]) * ((grid[8] - grid[i]) / (grid[j] - grid[i]))
        best = over_mid.argmax(-1, keepdim=True)
        rise = torch.gather(y[..., j] - y[..., i], -1, best)[..., 0]
        run = torch.gather(z[..., j] - z[..., i], -1, best)[..., 0]
        touches = y[..., 8] >= torch.gather(over_mid, -1, best)[..., 0]
        tangent = self.derivative(z[..., 8])
        return torch.where(touches | (run <= 1e-9), tangent, side * rise / torch.where(run > 1e-9, run, 1.0))

    def _gap(self, l: Tensor, u: Tensor, slope: Tensor, side: float) -> Tensor:
        """max over [l, u] of side * (f(z) - slope z), rounded up."""
        gap = lambda z: side * (self.value(z) - slope * z)
        best = torch.maximum(gap(l), gap(u))
        edges = [l, *(torch.full_like(l, t) for t in self.turns), u]
        for a, b in pairwise(edges):
            a, b = torch.minimum(torch.maximum(a, l), u), torch.minimum(torch.maximum(b, l), u)
            rising = self.derivative(b) > self.derivative(a)
            for _ in range(52):  # f' is monotone between a and b: halve the bracket around f' = slope
                middle = (a + b) / 2
                beyond = (self.derivative(middle) > slope) == rising
                a, b = torch.where(beyond, a, middle), torch.where(beyond, middle, b)
            best = torch.maximum(best, torch.maximum(gap(a), gap(b)))
        reach = torch.maximum(l.abs(), u.abs())
        # the bracket's width, 2^-52 of the interval, times the largest |f' - slope|; and the rounding of f and slope z
        return best + 16 * EPS * (1 + reach) * (2 + slope.abs())


def relu() -> PiecewiseLinear:
    return PiecewiseLinear()


def leaky_relu(negative_slope: float) -> PiecewiseLinear:
    return PiecewiseLinear(float(negative_slope), "LeakyReLU")


def tanh() -> Smooth:
    return Smooth("Tanh", torch.tanh, lambda z: torch.cosh(z.clamp(-300, 300)) ** -2, (0.0,))


def sigmoid() -> Smooth:
    return Smooth("Sigmoid", torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z), (0.0,))


def softplus(beta: float = 1.0) -> Smooth:
    """log(1 + exp(beta z)) / beta, without torch's switch to z at large z, whose error is below 3e-9 / beta."""
    value = lambda z: torch.logaddexp(beta * z, torch.zeros_like(z)) / beta
    return Smooth("Softplus", value, lambda z: torch.sigmoid(beta * z), ())


def gelu() -> Smooth:
    """z Phi(z); its derivative Phi + z phi turns at +-sqrt(2)."""
    cdf = torch.special.ndtr
    density = lambda z: torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    root = math.sqrt(2)
    return Smooth("GELU", lambda z: z * cdf(z), lambda z: cdf(z) + z * density(z), (-root, root), -0.7517915246935645)


def gelu_tanh() -> Smooth:
    """z sigmoid(2 g), g = sqrt(2 / pi) (z + 0.044715 z^3): the approximation that torch and ONNX call "tanh"."""
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715

    def derivative(z: Tensor) -> Tensor:
        z = z.clamp(-30, 30)  # beyond, 0 and 1 in double precision
        gate = torch.sigmoid(scale * (z + cubic * z**3))
        return gate + z * gate * (1 - gate) * scale * (1 + 3 * cubic * z * z)

    value = lambda z: z * torch.sigmoid(scale * (z + cubic * z**3))
    turn, least = 1.4185040087908284, -0.7524614220710163
    return Smooth("GELU (tanh)", value, derivative, (-turn, turn), least)


Activation = PiecewiseLinear | Smooth
