r"""Normalisation by the values' own spread (LayerNorm, RMSNorm), as bounds see it.

Both are an affine map c (for LayerNorm the deviations from the mean), then y = c / sigma with
sigma^2 = q + eps, q = mean(c^2) over one group, then an affine map. The affine parts are exact; this room bounds what
is between them. With l <= c <= u from the propagation, and [a, b] for q + eps:

* the mean square. Entry by entry, w c - w^2 / 4 <= c^2 <= the chord over [l, u], both with slope w = l + u. The sums
  of these lines are pulled back to the input like any other row of coefficients, which keeps what the entries have
  in common: the width of q is then right to first order in the width of the box, with one row for each side. The
  lower line holds for every multiple theta w, too; wide boxes take the best theta <= 1. The sum of the extreme squares
  holds as well; the better of the two is taken.
* the values. For a fixed rest r_i = q + eps - c_i^2 / d the value c_i / sqrt(c_i^2 / d + r_i) rises with c_i and
  shrinks with r_i, which over a box varies independently of c_i. So its extremes are at u_i and l_i, with the
  smallest rest where the sign of c_i points that way and else the largest. c_i / sqrt(a) and c_i / sqrt(b) hold too,
  and where the sum of c is 0 the others' squares are at least c_i^2 / (d - 1).
* lines. With s = 1 / sigma in [s_m - s_r, s_m + s_r] and c_i in [m_i - r_i, m_i + r_i],

      y_i = m_i s + s_m (c_i - m_i) + (c_i - m_i) (s - s_m),    the last term in [-r_i s_r, r_i s_r].

  s is convex and falling in q: between its tangent (at the middle) and its chord over [a, b], and there q is replaced
  by the lines above. So each y_i has lines in c_i and in the one sum w . c: right to second order, at the cost of a
  rank-one product. On wide boxes the chords over s c_i, or constants, can be better: each line is the one of the
  three that is best at the centre of the box.

The Jacobian (I - y y^T / d) / sigma is bounded in `normalised_gradients`.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from locally.tangent.lipschitz.intervals import EPS, centre_radius, dot, magnitude
from locally.tangent.lipschitz.relaxations import clarke_product, square

HUGE = 1e150  # whose square is still finite


@dataclass(frozen=True)
class Normalisation:
    """c / sqrt(mean(c^2) + eps) over the last `dims` dimensions; `centred` says that c sums to 0 there. Needs eps > 0.

    >>> op, c = Normalisation(1, 1.0, False, "RMSNorm"), torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    >>> known = op.within(c - 0.1, c + 0.1)
    >>> [[round(v, 2) for v in end[0].tolist()] for end in (known.values[0], op(c), known.values[1])]
    [[1.2, -0.46], [1.22, -0.41], [1.24, -0.36]]
    """

    dims: int
    eps: float
    centred: bool
    name: str

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(-self.dims, 0))

    def mean(self, v: Tensor) -> Tensor:
        return v.mean(self.axes, keepdim=True)

    def sum(self, v: Tensor) -> Tensor:
        return v.sum(self.axes, keepdim=True)

    def count(self, shape: tuple[int, ...]) -> int:
        """Entries of one group."""
        return int(torch.Size(shape[-self.dims :]).numel())

    def scale(self, c: Tensor) -> Tensor:
        """1 / sigma."""
        return (self.mean(c.square()) + self.eps).rsqrt()

    def __call__(self, c: Tensor) -> Tensor:
        return c * self.scale(c)

    def backward(self, g: Tensor, c: Tensor) -> Tensor:
        """Rows g (n, s, *shape) times the Jacobian at the points c (n, *shape)."""
        scale, y = self.scale(c)[:, None], self(c)[:, None]
        return scale * (g - y * self.mean(y * g))

    def split_point(self, l: Tensor, u: Tensor) -> Tensor:
        return (l + u) / 2

    def within(self, l: Tensor, u: Tensor, mean_square: tuple[Tensor, Tensor] | None = None) -> "Enclosure":
        """Everything known for l <= c <= u; `mean_square` bounds q where that is known better than from the box."""
        d = self.count(tuple(l.shape))
        slack = (d + 8) * EPS
        near = torch.maximum(l, -u).clamp(min=0, max=HUGE).square()
        far = magnitude(l, u).square()
        least, most = self.sum(near), self.sum(far)
        low, high = least / d * (1 - slack), most / d * (1 + slack)
        if mean_square is not None:
            low = torch.maximum(low, mean_square[0].nan_to_num(nan=0.0))
            high = torch.minimum(high, mean_square[1].nan_to_num(nan=torch.inf, posinf=torch.inf))
            # crossed by rounding, or infeasible
            low, high = torch.minimum(low, high).clamp(min=0), torch.maximum(low, high).clamp(min=0)
        low, high = (low + self.eps) * (1 - EPS), (high + self.eps) * (1 + EPS)
        rest_low = (least - near - slack * least).clamp(min=0) / d + self.eps
        rest_high = ((most - far).clamp(min=0) / d + slack * most + self.eps).nan_to_num(
            nan=torch.inf, posinf=torch.inf
        )

        def top(end: Tensor) -> Tensor:
            """Largest value of the units whose c is at most `end`."""
            own = end.square()
            smallest = torch.maximum(own / d + rest_low, low)
            if self.centred and d > 1:
                smallest = torch.maximum(smallest, own / (d - 1) + self.eps)
            largest = torch.minimum(own / d + rest_high, high)
            value = end / torch.where(end > 0, smallest, largest).sqrt()
            value = torch.where(end >= HUGE, d**0.5, torch.where(end <= -HUGE, 0.0, value))
            return value + 16 * EPS * value.abs()

        scale = high.rsqrt() * (1 - 4 * EPS), low.rsqrt() * (1 + 4 * EPS)
        return Enclosure(self, l, u, (low, high), scale, (-top(-l), top(u)))


@dataclass(frozen=True)
class Enclosure:
    """What a box says about one normalisation: bounds on q + eps, on 1 / sigma, and on the values."""

    op: Normalisation
    l: Tensor
    u: Tensor
    square: tuple[Tensor, Tensor]
    scale: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (batch, 2, *shape) on what the Jacobian is made of: values, then 1 / sigma."""
        lower, upper = (torch.stack([y, s.expand_as(y)], dim=1) for y, s in zip(self.values, self.scale))
        return lower, upper

    def lines(self) -> "CoupledLines":
        coupled = self._coupled()
        slowest, fastest = (s.expand_as(self.l) for s in self.scale)
        chords = clarke_product(self.l, self.u, slowest, fastest)
        zero = torch.zeros_like(self.l)
        lower = [
            (coupled.lower_slope, coupled.lower_cross, coupled.lower_intercept),
            (chords.lower_slope, zero, chords.lower_intercept),
            (zero, zero, self.values[0]),
        ]
        upper = [
            (coupled.upper_slope, coupled.upper_cross, coupled.upper_intercept),
            (chords.upper_slope, zero, chords.upper_intercept),
            (zero, zero, self.values[1]),
        ]
        centre = self.l / 2 + self.u / 2  # whose sum may be too large for a float
        # finite, so that 0 times it is 0: where squares overflow, the coupled lines are not taken
        direction = coupled.direction.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        along = self.op.sum(direction * centre).nan_to_num()

        def best(candidates: list[tuple[Tensor, Tensor, Tensor]], sign: float) -> list[Tensor]:
            at_centre = torch.stack(
                [
                    torch.where((a + x + k).isfinite(), sign * (a * centre + x * along + k), torch.inf)
                    for a, x, k in candidates
                ]
            )
            choice = at_centre.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
            return [torch.stack(part).gather(0, choice)[0] for part in zip(*candidates)]

        return CoupledLines(self.op, direction, *best(lower, -1.0), *best(upper, 1.0))

    def _coupled(self) -> "CoupledLines":
        op, (a, b) = self.op, self.square
        d = op.count(tuple(self.l.shape))
        m, r = centre_radius(self.l, self.u)
        s_m, s_r = centre_radius(*self.scale)
        w, chord_intercept = square(self.l, self.u)
        direction = w / d
        # 1 / sqrt(q) <= chord q + over and >= tangent q + under, for q in [a, b]; under is exact for any slope < 0
        width, at_a, at_b = b - a, a.rsqrt(), b.rsqrt()
        tangent = -0.5 * ((a + b) / 2) ** -1.5
        chord = torch.where(width > 0, (at_b - at_a) / torch.where(width > 0, width, 1.0), tangent)
        chord = torch.minimum(torch.maximum(chord, -0.5 * a**-1.5), -0.5 * b**-1.5)
        over = torch.maximum(at_a - chord * a, at_b - chord * b)
        under = 1.5 * (-2 * tangent) ** (1 / 3)
        # and q >= direction . c + bottom, q <= direction . c + top
        bottom = op.eps - op.mean(w.square()) / 4
        top = op.eps + op.mean(chord_intercept)
        highest, lowest = chord * bottom + over, tangent * top + under
        rising = m > 0
        cross = m * torch.where(rising, chord, tangent), m * torch.where(rising, tangent, chord)
        shift = m * torch.where(rising, highest, lowest), m * torch.where(rising, lowest, highest)
        size = over - chord * bottom.abs() + under - tangent * (op.eps + op.mean(chord_intercept.abs()))
        size = size - (chord + tangent) * op.mean(w.square())
        slack = 8 * (d + 16) * EPS * (m.abs() * (size + s_m) + r * s_r) + r * s_r * (1 + 4 * EPS)
        slope = s_m.expand_as(m)
        return CoupledLines(
            op, direction, slope, cross[1], shift[1] - s_m * m - slack, slope, cross[0], shift[0] - s_m * m + slack
        )


@dataclass(frozen=True)
class CoupledLines:
    """slope_i c_i + cross_i (direction . c) + intercept_i below and above y_i, with direction . c over the group."""

    op: Normalisation
    direction: Tensor
    lower_slope: Tensor
    lower_cross: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_cross: Tensor
    upper_intercept: Tensor

    def take(self, index: Tensor) -> "CoupledLines":
        return CoupledLines(self.op, *(getattr(self, field.name)[index] for field in fields(self)[1:]))

    def reach(self, size: Tensor) -> Tensor:
        """What an error of relative size 1 could cost, for |c| <= size."""
        slope = magnitude(self.lower_slope, self.upper_slope)
        cross = magnitude(self.lower_cross, self.upper_cross)
        along = self.op.sum(self.direction.abs() * size)
        return slope * size + cross * along + magnitude(self.lower_intercept, self.upper_intercept)

    def pull(self, A: Tensor, slack: Tensor, lower: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows (b, t, *shape) on y, bounded from above: rows on c and what to add. `lower` replaces the lower slope."""
        up, down = A.clamp(min=0), A.clamp(max=0)
        own = self.lower_slope[:, None] if lower is None else lower
        along = self.op.sum(up * self.upper_cross[:, None] + down * self.lower_cross[:, None])
        rows = up * self.upper_slope[:, None] + down * own + along * self.direction[:, None]
        return rows, dot(up, self.upper_intercept + slack) + dot(down, self.lower_intercept - slack)
