"""Bounds on every value of a network over a box: intervals, tightened by linear bound propagation (CROWN).

A row of coefficients at some node is pulled back to the input; on the way each activation is replaced by the line that
the sign of its coefficient calls for (for normalisations see `normalisation`). Only upper bounds are propagated: the
lower bound of z is minus the upper one of -z. Zhang et al., arXiv 1811.00866 (CROWN); Xu et al., arXiv 2011.13824
(optimised slopes); Wang et al., arXiv 2103.06624 (multipliers of split constraints).

Soundness in floating point: every step adds gamma |A| (|M| |z|) to the bound, which is more than what rounding can have
taken from it (`Network.gamma`), so all bounds hold for the network in exact arithmetic with its double-precision
weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.tangent.lipschitz.activations import Activation, PiecewiseLinear
from locally.tangent.lipschitz.budget import Budget
from locally.tangent.lipschitz.intervals import centre_radius, dot, magnitude
from locally.tangent.lipschitz.network import NONLINEAR, Network, Node, Sum, gather, is_affine
from locally.tangent.lipschitz.normalisation import CoupledLines, Normalisation
from locally.tangent.lipschitz.relaxations import Lines, square

# Lower slopes per row of coefficients, for the nodes that have them: (batch, rows, *shape)
Slopes = dict[int, Tensor]


@dataclass(frozen=True)
class Box:
    """lower <= x <= upper, (batch, *shape)."""

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        c, r = centre_radius(self.lower, self.upper)
        object.__setattr__(self, "centre", c)
        object.__setattr__(self, "radius", r)

    centre: Tensor = None  # type: ignore[assignment]
    radius: Tensor = None  # type: ignore[assignment]

    def take(self, index: Tensor) -> "Box":
        return Box(self.lower[index], self.upper[index])

    def __len__(self) -> int:
        return len(self.lower)


@dataclass(frozen=True)
class Splits:
    """What branching has decided: below <= z <= above for the units of each activation node, (batch, *shape)."""

    below: dict[int, Tensor]
    above: dict[int, Tensor]


@dataclass(frozen=True)
class Halfspaces:
    """normal . x + offset >= 0 holds on the whole domain, (batch, constraints, d) and (batch, constraints)."""

    normal: Tensor
    offset: Tensor

    def joined(self, other: "Halfspaces") -> "Halfspaces":
        return Halfspaces(torch.cat([self.normal, other.normal], dim=1), torch.cat([self.offset, other.offset], dim=1))


@dataclass
class ForwardBounds:
    """Of every node over a batch of boxes.

    Attributes:
        lower, upper: (batch, *shape) per node. For the input of an activation they include the splits.
        lines: per activation node.
        slopes: per activation node, the range of its derivative, (batch, *shape) each; per normalisation, of its
            values and of 1 / sigma, (batch, 2, *shape) each.
        reach: per node, what an error of relative size 1 in one step would cost.
        infeasible: (batch,), where the splits are proven to contradict each other.
        halfspaces: linear constraints on the input that the splits imply.
    """

    lower: list[Tensor]
    upper: list[Tensor]
    lines: dict[int, Lines | CoupledLines]
    slopes: dict[int, tuple[Tensor, Tensor]]
    reach: list[Tensor]
    infeasible: Tensor
    halfspaces: Halfspaces | None = None

    def take(self, index: Tensor) -> "ForwardBounds":
        return ForwardBounds(
            [t[index] for t in self.lower],
            [t[index] for t in self.upper],
            {v: lines.take(index) for v, lines in self.lines.items()},
            {v: (a[index], b[index]) for v, (a, b) in self.slopes.items()},
            [t[index] for t in self.reach],
            self.infeasible[index],
        )


Optimiser = Callable[["Forward", int, Tensor], Tensor]


class Forward:
    """One pass over the network; `bounds` is complete when the constructor returns.

    Args:
        root: bounds on a superset of each box, intersected with; only units that are open there get rows.
        splits: restrict the inputs of activations.
        optimise: replaces the plain upper bounds of a block of rows by better ones (see `alpha`).
    """

    def __init__(
        self,
        net: Network,
        box: Box,
        budget: Budget,
        *,
        root: ForwardBounds | None = None,
        splits: Splits | None = None,
        optimise: Optimiser | None = None,
        crown: bool = True,
    ) -> None:
        self.net, self.box, self.budget = net, box, budget
        self.root, self.splits, self.optimise = root, splits, optimise
        none = torch.zeros(len(box), dtype=torch.bool, device=box.lower.device)
        self.bounds = ForwardBounds([box.lower], [box.upper], {}, {}, [torch.zeros_like(box.lower)], none)
        self.linear = {0}  # nodes that no activation comes before
        for v, node in enumerate(net.nodes[1:], start=1):
            if isinstance(node.op, NONLINEAR):
                self._activate(v, node, crown)
            else:
                self._interval(v, node)
        del self.optimise, self.root

    def _interval(self, v: int, node: Node) -> None:
        b, gamma = self.bounds, self.net.gamma
        if isinstance(node.op, Sum):
            pairs = list(zip(node.op.signs, node.inputs))
            lower = torch.stack([b.lower[u] if s > 0 else -b.upper[u] for s, u in pairs]).sum(0)
            upper = torch.stack([b.upper[u] if s > 0 else -b.lower[u] for s, u in pairs]).sum(0)
            reach = torch.stack([magnitude(b.lower[u], b.upper[u]) for u in node.inputs]).sum(0)
            slack = gamma * reach
        else:
            (u,) = node.inputs
            centre, radius = centre_radius(b.lower[u], b.upper[u])
            middle, spread = node.op.push(centre), node.op.spread(radius)
            reach = node.op.spread(magnitude(b.lower[u], b.upper[u]))
            if node.op.bias is not None:
                middle = middle + node.op.bias
                reach = reach + node.op.bias.abs()
            slack = gamma * reach
            lower, upper = middle - spread, middle + spread
        b.lower.append(lower - slack)
        b.upper.append(upper + slack)
        b.reach.append(reach)
        if all(u in self.linear for u in node.inputs):
            self.linear.add(v)

    def _activate(self, v: int, node: Node, crown: bool) -> None:
        b, (u,), op = self.bounds, node.inputs, node.op
        if self.root is not None:
            b.lower[u] = torch.maximum(b.lower[u], self.root.lower[u])
            b.upper[u] = torch.minimum(b.upper[u], self.root.upper[u])
        below = above = None
        if self.splits is not None:
            below, above = self.splits.below[v], self.splits.above[v]
        if crown:
            self._refine(v, u, op, below, above)
        if below is not None and above is not None:
            b.infeasible |= ((b.upper[u] < below) | (b.lower[u] > above)).flatten(1).any(1)
            b.lower[u], b.upper[u] = torch.maximum(b.lower[u], below), torch.minimum(b.upper[u], above)
        crossed = b.lower[u] > b.upper[u]
        b.infeasible |= crossed.flatten(1).any(1) if self.splits is not None else False
        # rounding may cross the two by less than the slack: a point interval then; infeasible items are dropped anyway
        low, high = torch.minimum(b.lower[u], b.upper[u]), torch.maximum(b.lower[u], b.upper[u])
        b.lower[u], b.upper[u] = low, high
        if isinstance(op, Normalisation):
            known = op.within(low, high, self._mean_square(u, op, low, high) if crown else None)
            b.lines[v], b.slopes[v], (lower, upper) = known.lines(), known.slopes, known.values
        else:
            b.lines[v] = op.lines(low, high)
            b.slopes[v] = op.slopes(low, high) if below is None else op.sides(low, high, below, above)
            lower, upper = op.interval(low, high)
        b.reach.append(b.lines[v].reach(magnitude(low, high)))
        b.lower.append(lower)
        b.upper.append(upper)

    def _mean_square(self, u: int, op: Normalisation, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds on the mean of c^2 over each group of node u, from the lines around each square (`normalisation`)."""
        d = op.count(self.net.nodes[u].shape)
        slope, intercept = square(low, high)
        groups = low[0].numel() // d
        owner = torch.arange(groups, device=low.device).repeat_interleave(d)
        found = low.new_empty(2, len(low), groups)
        for some in self.budget.chunks(torch.arange(groups, device=low.device), len(low), 2):
            rows = torch.where(owner == some[:, None], (slope / d).flatten(1)[:, None], 0.0)
            rows = rows.view(len(low), len(some), *low.shape[1:])
            normal, offset = pull_rows(self.net, u, torch.cat([rows, -rows], dim=1), self.bounds)
            values = concretise(normal, offset, self.box, self.net.gamma)
            found[1][:, some], found[0][:, some] = values.split(len(some), dim=1)
        shape = op.sum(low).shape
        curve, above = op.mean(slope.square()) / 4, op.mean(intercept)
        # for every theta, mean(c^2) >= theta least - theta^2 curve: on wide boxes the best theta is below 1
        least = -found[0].view(shape)
        theta = (least / (2 * curve).clamp(min=1e-300)).clamp(0, 1)
        slack = self.net.gamma * (curve + least.abs() + above.abs() + op.mean(intercept.abs()))
        return theta * least - theta.square() * curve - slack, found[1].view(shape) + above + slack

    def _refine(
        self, v: int, u: int, op: Activation | Normalisation, below: Tensor | None, above: Tensor | None
    ) -> None:
        """Tighten the input of activation v where that can matter; with splits, collect what they say about x."""
        b = self.bounds
        if self.splits is None and u in self.linear and len(self._sources(u)) == 1:
            return  # one affine map of the box: the interval is exact
        open_ = (b.lower[u] < 0) & (b.upper[u] > 0) if isinstance(op, PiecewiseLinear) else b.upper[u] > b.lower[u]
        if below is not None and above is not None:
            open_ = open_ | (below > -torch.inf) | (above < torch.inf)
        units = open_.flatten(1).any(0).nonzero()[:, 0]
        for some in self.budget.chunks(units, len(self.box), 2):
            normal, offset = self.forms(u, some)
            if self.optimise is not None and u not in self.linear:
                values = self.optimise(self, u, some)
            else:
                values = concretise(normal, offset, self.box, self.net.gamma)
            if b.halfspaces is not None:
                values = with_halfspaces(normal, offset, values, self.box, b.halfspaces, self.net.gamma)
            high, low = values.split(len(some), dim=1)
            flat_low, flat_high = b.lower[u].flatten(1).clone(), b.upper[u].flatten(1).clone()
            flat_high[:, some] = torch.minimum(flat_high[:, some], high)
            flat_low[:, some] = torch.maximum(flat_low[:, some], -low)
            b.lower[u], b.upper[u] = flat_low.view_as(b.lower[u]), flat_high.view_as(b.upper[u])
            if below is not None and above is not None:
                self._constrain(normal, offset, below.flatten(1)[:, some], above.flatten(1)[:, some])

    def forms(self, u: int, units: Int[Tensor, " t"], slopes: Slopes | None = None) -> tuple[Tensor, Tensor]:
        """z_u <= normal . x + offset for the units, then the same for -z_u: (batch, 2 t, d) and (batch, 2 t)."""
        rows = one_hot(units, self.net.nodes[u].shape, self.box.lower)
        return pull_rows(self.net, u, torch.cat([rows, -rows], dim=1), self.bounds, slopes)

    def _sources(self, u: int) -> list[int]:
        """Affine maps with weights, or sums, between the input and node u."""
        seen, todo = set(), [u]
        while todo:
            v = todo.pop()
            node = self.net.nodes[v]
            if v and v not in seen:
                todo.extend(node.inputs)
                if isinstance(node.op, Sum) or not moves_values(node.op):
                    seen.add(v)
        return list(seen) or [u]

    def _constrain(self, normal: Tensor, offset: Tensor, below: Tensor, above: Tensor) -> None:
        """z >= below with z <= n.x + o gives n.x + o - below >= 0; z <= above likewise from -z."""
        active = torch.cat([below > -torch.inf, above < torch.inf], dim=1)
        most = int(active.sum(1).max())
        if most == 0:
            return
        first = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        used = active.gather(1, first)
        limit = torch.cat([-below, above], dim=1).gather(1, first)
        rows = normal.expand(len(active), -1, -1).gather(1, first[..., None].expand(-1, -1, normal.shape[-1]))
        shift = offset.expand(len(active), -1).gather(1, first) + torch.where(used, limit, 0.0)
        new = Halfspaces(torch.where(used[..., None], rows, 0.0), torch.where(used, shift, 0.0))
        old = self.bounds.halfspaces
        self.bounds.halfspaces = new if old is None else old.joined(new)


def moves_values(op: object) -> bool:
    return bool(getattr(op, "moves_only", False))


def one_hot(units: Int[Tensor, " t"], shape: tuple[int, ...], like: Tensor) -> Float[Tensor, "1 t *shape"]:
    rows = like.new_zeros(1, len(units), math.prod(shape))
    rows[0, torch.arange(len(units), device=like.device), units] = 1.0
    return rows.view(1, len(units), *shape)


def through(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply a map on (n, *shape) to rows (b, t, *shape)."""
    out = function(rows.flatten(0, 1))
    return out.view(*rows.shape[:2], *out.shape[1:])


def pull_rows(
    net: Network, start: int, rows: Float[Tensor, "_ t *shape"], bounds: ForwardBounds, slopes: Slopes | None = None
) -> tuple[Float[Tensor, "_ t _"], Float[Tensor, "_ t"]]:
    """rows . z_start <= normal . x + offset on the domain of `bounds`, with the float slack in the offset.

    One product with every affine map for every row; O(rows x widest) memory.
    """
    gamma = net.gamma
    coefficients = {start: rows}
    offset: Tensor = rows.new_zeros(1, rows.shape[1])
    for v in range(start, 0, -1):
        if v not in coefficients:
            continue
        A, node = coefficients.pop(v), net.nodes[v]
        if isinstance(node.op, Sum):
            offset = offset + gamma * dot(A.abs(), bounds.reach[v])
            for sign, u in zip(node.op.signs, node.inputs):
                gather(coefficients, u, A if sign > 0 else -A)
        elif is_affine(node.op):
            if node.op.bias is not None:
                offset = offset + dot(A, node.op.bias)
            offset = offset + gamma * dot(A.abs(), bounds.reach[v])
            gather(coefficients, node.inputs[0], through(node.op.pull, A))
        else:
            back, shift = bounds.lines[v].pull(A, gamma * bounds.reach[v], slopes.get(v) if slopes else None)
            offset = offset + shift
            gather(coefficients, node.inputs[0], back)
    A = coefficients.get(0, rows.new_zeros(1, rows.shape[1], *net.nodes[0].shape))
    return A.flatten(2), offset


def concretise(normal: Tensor, offset: Tensor, box: Box, gamma: float) -> Float[Tensor, "b t"]:
    """max over the box of normal . x + offset."""
    size = normal.abs()
    reach = magnitude(box.lower, box.upper)
    return offset + dot(normal, box.centre) + dot(size, box.radius + 2 * gamma * reach) + gamma * offset.abs()


def with_halfspaces(
    normal: Tensor, offset: Tensor, plain: Tensor, box: Box, halfspaces: Halfspaces, gamma: float, steps: int = 12
) -> Float[Tensor, "b t"]:
    """Upper bounds that use constraints: for every beta >= 0, max over the box of the row plus beta . constraints.

    Any multipliers give a bound (weak duality); a few Adam steps look for good ones, and the best bound is kept.
    """
    batch, t = plain.shape
    C, c = halfspaces.normal, halfspaces.offset
    radius, centre = box.radius.flatten(1), box.centre.flatten(1)
    at_centre = c + dot(C, centre)
    scale = dot(C.abs(), radius)
    scale = torch.where(scale > 0, scale, 1.0)
    rows = normal.expand(batch, -1, -1)
    size = dot(rows.abs(), box.radius)
    base = offset + dot(normal, box.centre)
    reach = c.abs() + dot(C.abs(), magnitude(box.lower, box.upper))
    fixed = plain - base - size  # the slack of the plain bound
    fixed = fixed.clamp(min=0) + gamma * size
    beta = rows.new_zeros(batch, t, C.shape[1])
    best, first, second = plain, torch.zeros_like(beta), torch.zeros_like(beta)
    unit = (size[..., None] + 1e-30) / scale[:, None]
    tilted = rows
    for k in range(1, steps + 1):
        # subgradient: the constraint's value where the tilted row is largest over the box
        gradient = (at_centre[:, None] + torch.matmul(tilted.sign() * radius[:, None], C.mT)) / scale[:, None]
        first = 0.7 * first + 0.3 * gradient
        second = 0.9 * second + 0.1 * gradient.square()
        step = (first / (1 - 0.7**k)) / ((second / (1 - 0.9**k)).sqrt() + 1e-12)
        beta = (beta - 0.4 * 0.85**k * unit * step).clamp(min=0)
        tilted = rows + beta @ C
        value = base + dot3(beta, at_centre) + torch.matmul(tilted.abs(), radius[..., None])[..., 0]
        best = torch.minimum(best, value + fixed + 3 * gamma * dot3(beta, reach))
    return best


def dot3(beta: Tensor, values: Tensor) -> Tensor:
    return torch.matmul(beta, values[..., None])[..., 0]
