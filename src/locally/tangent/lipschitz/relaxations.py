"""Linear bounds on what is not linear: the Clarke product of the chain rule, absolute values, squares.

The product J = g s of a gradient g in [gl, gu] with a slope s in [sl, su] lies between min(sl g, su g), which is
concave in g, and max(sl g, su g), which is convex; so the best linear bounds over [gl, gu] are the chords of these two
envelopes (Shi et al., arXiv 2210.07394, section 3.3). Whatever slope a line is given here, its intercept is taken from
both ends of the interval, so that rounding costs tightness and not soundness.
"""

from dataclasses import dataclass, fields
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from locally.tangent.lipschitz.intervals import EPS, dot


@dataclass(frozen=True)
class Lines:
    """lower_slope y + lower_intercept <= f(y) <= upper_slope y + upper_intercept, entry by entry."""

    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor

    def take(self, index: Tensor) -> "Lines":
        return Lines(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def magnitude(self) -> tuple[Tensor, Tensor]:
        """Largest |slope| and |intercept|."""
        return (
            torch.maximum(self.lower_slope.abs(), self.upper_slope.abs()),
            torch.maximum(self.lower_intercept.abs(), self.upper_intercept.abs()),
        )

    def reach(self, size: Tensor) -> Tensor:
        """What an error of relative size 1 could cost, for |y| <= size; optimised slopes go up to 1."""
        slope, intercept = self.magnitude
        return slope.clamp(min=1.0) * size + intercept

    def pull(self, A: Tensor, slack: Tensor, lower: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows (b, t, *shape) on f(y), bounded from above: rows on y and what to add. `lower` replaces lower slopes."""
        up, down = A.clamp(min=0), A.clamp(max=0)
        own = self.lower_slope[:, None] if lower is None else lower
        shift = dot(up, self.upper_intercept + slack) + dot(down, self.lower_intercept - slack)
        return up * self.upper_slope[:, None] + down * own, shift

    def gap(self, y: Tensor) -> Tensor:
        """Distance between the two lines at y."""
        return (self.upper_slope - self.lower_slope) * y + self.upper_intercept - self.lower_intercept


class Relaxation(StrEnum):
    """How the product of gradient and slope is bounded, from tight to loose."""

    CHORD = "chord"
    RECURJAC = "recurjac"  # constants where the sign of the gradient is open (Zhang et al., arXiv 1810.11783)
    INTERVAL = "interval"  # constants everywhere


def clarke_product(
    gl: Float[Tensor, "*n"],
    gu: Float[Tensor, "*n"],
    sl: Float[Tensor, "*n"],
    su: Float[Tensor, "*n"],
    relaxation: Relaxation = Relaxation.CHORD,
) -> Lines:
    """Linear bounds in g on g s, for g in [gl, gu] and s in [sl, su]; exact where s is known.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> lines = clarke_product(-one, 3 * one, 0 * one, one)  # ReLU, sign of the gradient open
    >>> lines.upper_slope.item(), lines.lower_slope.item()
    (0.75, 0.25)
    """
    at_gl, at_gu = (sl * gl, su * gl), (sl * gu, su * gu)
    top = torch.maximum(*at_gl), torch.maximum(*at_gu)
    bottom = torch.minimum(*at_gl), torch.minimum(*at_gu)
    width = gu - gl
    wide = torch.where(width > 0, width, 1.0)
    upper = torch.minimum(torch.maximum((top[1] - top[0]) / wide, sl), su)
    lower = torch.minimum(torch.maximum((bottom[1] - bottom[0]) / wide, sl), su)
    flat = width <= 0
    if relaxation is Relaxation.RECURJAC:
        flat = flat | ((gl < 0) & (gu > 0))
    elif relaxation is Relaxation.INTERVAL:
        flat = torch.ones_like(flat)
    zero = torch.zeros_like(upper)
    upper, lower = torch.where(flat, zero, upper), torch.where(flat, zero, lower)
    slack = 4 * EPS * torch.maximum(gl.abs(), gu.abs()) * torch.maximum(sl.abs(), su.abs())
    over = torch.maximum(top[0] - upper * gl, top[1] - upper * gu) + slack
    under = torch.minimum(bottom[0] - lower * gl, bottom[1] - lower * gu) - slack
    if relaxation is Relaxation.INTERVAL:
        return Lines(lower, under, upper, over)
    known = sl == su
    over, under = torch.where(known, zero, over), torch.where(known, zero, under)
    return Lines(torch.where(known, sl, lower), under, torch.where(known, su, upper), over)


def product_range(
    gl: Float[Tensor, "*n"], gu: Float[Tensor, "*n"], sl: Float[Tensor, "*n"], su: Float[Tensor, "*n"]
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Smallest and largest g s, rounded outwards."""
    corners = torch.stack([sl * gl, sl * gu, su * gl, su * gu])
    low, high = corners.amin(0), corners.amax(0)
    return low - EPS * low.abs(), high + EPS * high.abs()


def absolute_value(gl: Float[Tensor, "*n"], gu: Float[Tensor, "*n"]) -> tuple[Tensor, Tensor]:
    """Slope and intercept of the chord over |g|, which bounds it from above on [gl, gu]."""
    return _chord_over(gl, gu, gl.abs(), gu.abs(), torch.sign(gl + gu), torch.ones_like(gl))


def square(gl: Float[Tensor, "*n"], gu: Float[Tensor, "*n"]) -> tuple[Tensor, Tensor]:
    """Slope and intercept of the chord over g^2."""
    steepest = 2 * torch.maximum(gl.abs(), gu.abs())
    return _chord_over(gl, gu, gl.square(), gu.square(), gl + gu, steepest)


def _chord_over(
    gl: Tensor, gu: Tensor, at_gl: Tensor, at_gu: Tensor, at_point: Tensor, steepest: Tensor
) -> tuple[Tensor, Tensor]:
    """Chord of a convex function from its values at both ends; `at_point` is the slope where gl = gu."""
    width = gu - gl
    slope = torch.where(width > 0, (at_gu - at_gl) / torch.where(width > 0, width, 1.0), at_point)
    slope = slope.clamp(-steepest, steepest)
    intercept = torch.maximum(at_gl - slope * gl, at_gu - slope * gu)
    size = torch.maximum(at_gl, at_gu) + slope.abs() * torch.maximum(gl.abs(), gu.abs())
    return slope, intercept + 2 * EPS * size
