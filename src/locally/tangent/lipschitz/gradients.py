"""Bounds on gradients: the network's backward pass, bounded as the forward pass is.

The gradient at the output is a known row for each head; walking back, an affine map transposes, and an activation
multiplies by a slope in [sl, su] (the Clarke chain rule); a normalisation is a chain of such products
(`normalised_gradients`). Rows of coefficients at some gradient are pushed towards the output, where they meet the known
row; each product on the way is replaced by chords (`relaxations.clarke_product`). Shi et al., arXiv 2210.07394,
sections 3.2 and 3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locally.tangent.lipschitz.activations import Activation
from locally.tangent.lipschitz.budget import Budget
from locally.tangent.lipschitz.intervals import EPS, centre_radius, dot, magnitude
from locally.tangent.lipschitz.network import NONLINEAR, Network, Sum, gather
from locally.tangent.lipschitz.normalisation import Normalisation
from locally.tangent.lipschitz.normalised_gradients import (
    NormalisedProduct,
    mean_product,
    normalised_product,
    projection,
)
from locally.tangent.lipschitz.propagation import one_hot, through
from locally.tangent.lipschitz.relaxations import Lines, Relaxation, clarke_product, product_range

Push = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows on a value behind g_v: rows on g_v, and what to add


@dataclass
class GradientBounds:
    """Of the gradient at every node, for a batch of heads.

    Attributes:
        lower, upper: per node, (heads, *shape); those of node 0 bound the rows of the Jacobian.
        products: per activation node, lines on J = s g in terms of g; per normalisation, its chain of products.
        reach: per node that is not a sum or normalisation, what an error of relative size 1 in one step would cost.
        spec: (heads, outputs), the gradient at the output.
    """

    lower: dict[int, Tensor]
    upper: dict[int, Tensor]
    products: dict[int, Lines | NormalisedProduct]
    reach: dict[int, Tensor]
    spec: Tensor


def gradient_bounds(
    net: Network,
    slopes: dict[int, tuple[Tensor, Tensor]],
    spec: Float[Tensor, "heads outputs"],
    budget: Budget,
    relaxation: Relaxation = Relaxation.CHORD,
    refine_input: bool = True,
) -> GradientBounds:
    """Bound spec . J for every head; `slopes` are the ranges of the activations' derivatives, (heads, *shape).

    O(heads x open units x cost of one forward pass) time; rows go through in chunks of the memory budget.
    """
    last = len(net.nodes) - 1
    b = GradientBounds({last: spec}, {last: spec}, {}, {}, spec)
    for v in range(last, 0, -1):
        if v not in b.lower:
            continue  # nothing that reaches the output uses it
        node = net.nodes[v]
        lower, upper = b.lower[v], b.upper[v]
        if isinstance(node.op, Sum):
            for sign, u in zip(node.op.signs, node.inputs):
                add_interval(b, u, lower if sign > 0 else -upper, upper if sign > 0 else -lower, net.gamma)
        elif isinstance(node.op, Activation):
            sl, su = slopes[v]
            if relaxation is not Relaxation.INTERVAL:
                # a known slope needs no lines, and a known gradient no tighter interval
                refine(net, b, v, (su > sl) & is_wide(lower, upper), budget)
                lower, upper = b.lower[v], b.upper[v]
            lines = clarke_product(lower, upper, sl, su, relaxation)
            b.products[v], b.reach[v] = lines, lines.reach(magnitude(lower, upper))
            add_interval(b, node.inputs[0], *product_range(lower, upper, sl, su), net.gamma)
        elif isinstance(node.op, Normalisation):
            add_interval(b, node.inputs[0], *normalised(net, b, v, node.op, slopes[v], budget, relaxation), net.gamma)
        else:
            centre, radius = centre_radius(lower, upper)
            reach = node.op.spread_back(magnitude(lower, upper))
            middle, spread = node.op.pull(centre), node.op.spread_back(radius) + net.gamma * reach
            add_interval(b, node.inputs[0], middle - spread, middle + spread, net.gamma)
            b.reach[v] = reach
    if 0 not in b.lower:
        b.lower[0] = b.upper[0] = spec.new_zeros(len(spec), *net.nodes[0].shape)
    elif refine_input and relaxation is not Relaxation.INTERVAL:
        refine(net, b, 0, is_wide(b.lower[0], b.upper[0]), budget)
    return b


def normalised(
    net: Network,
    b: GradientBounds,
    v: int,
    op: Normalisation,
    slopes: tuple[Tensor, Tensor],
    budget: Budget,
    relaxation: Relaxation,
) -> tuple[Tensor, Tensor]:
    """Fill in the products of normalisation v; returns the interval of the gradient before it."""
    gamma = net.gamma
    y, scale = ((slopes[0][:, part], slopes[1][:, part]) for part in (0, 1))
    rows = relaxation is not Relaxation.INTERVAL
    if rows:
        refine(net, b, v, is_wide(b.lower[v], b.upper[v]), budget)
    g = b.lower[v], b.upper[v]
    mean, *t = mean_product(op, g, y, gamma, relaxation)
    if rows:
        t = tighten(net, b, v, t, lambda A: mean.push(A, gamma), is_wide(*t), budget)
    inner, *z = projection(mean, g, (t[0], t[1]), y, gamma, relaxation)
    if rows:
        z = tighten(net, b, v, z, lambda A: inner.push(A, gamma), is_wide(*z), budget)
    product, low, high = normalised_product(inner, g, (t[0], t[1]), (z[0], z[1]), y, scale, relaxation)
    b.products[v] = product
    return low, high


def is_wide(lower: Tensor, upper: Tensor) -> Tensor:
    """Where an interval holds more than rounding."""
    return upper - lower > 4 * EPS * magnitude(lower, upper)


def add_interval(b: GradientBounds, u: int, lower: Tensor, upper: Tensor, gamma: float) -> None:
    if u in b.lower:
        slack = gamma * (magnitude(lower, upper) + magnitude(b.lower[u], b.upper[u]))
        lower, upper = b.lower[u] + lower - slack, b.upper[u] + upper + slack
    b.lower[u], b.upper[u] = lower, upper


def refine(net: Network, b: GradientBounds, v: int, needed: Tensor, budget: Budget) -> None:
    """Tighten the interval of the gradient at node v, for the units needed in any head."""
    nothing = lambda A: (A, A.new_zeros(()))
    b.lower[v], b.upper[v] = tighten(net, b, v, [b.lower[v], b.upper[v]], nothing, needed, budget)


def tighten(
    net: Network, b: GradientBounds, v: int, interval: list[Tensor], push: Push, needed: Tensor, budget: Budget
) -> list[Tensor]:
    """Intersect the interval of a value that `push` expresses in g_v with what bound propagation gives."""
    units = needed.flatten(1).any(0).nonzero()[:, 0]
    if not len(units):
        return interval
    shape = interval[0].shape
    lower, upper = (end.flatten(1).clone() for end in interval)
    for some in budget.chunks(units, len(b.spec), 2):
        unit = one_hot(some, tuple(shape[1:]), b.spec)
        rows, shift = push(torch.cat([unit, -unit], dim=1))
        high, low = (push_rows(net, v, rows, b) + shift).split(len(some), dim=1)
        upper[:, some] = torch.minimum(upper[:, some], high)
        lower[:, some] = torch.maximum(lower[:, some], -low)
    low, high = torch.minimum(lower, upper), torch.maximum(lower, upper)  # a point, up to rounding
    return [low.view(shape), high.view(shape)]


def push_rows(
    net: Network,
    start: int,
    rows: Float[Tensor, "_ t *shape"],
    b: GradientBounds,
    kept: dict[int, Tensor] | None = None,
) -> Float[Tensor, "_ t"]:
    """Upper bounds on rows . g_start over everything that `b` allows, with the float slack.

    `kept` receives, for each activation, the coefficients on J before they are relaxed: branching scores them.
    """
    gamma, last = net.gamma, len(net.nodes) - 1
    users = {u: v for v in range(start + 1, last + 1) for u in net.nodes[v].inputs}  # the last to use each node
    coefficients = {start: rows}
    bound: Tensor = rows.new_zeros(len(b.spec), rows.shape[1])
    for v in range(start + 1, last + 1):
        node = net.nodes[v]
        present = [(k, u) for k, u in enumerate(node.inputs) if u in coefficients]
        if not present or v not in b.lower:
            continue
        if isinstance(node.op, Sum):
            for k, u in present:
                A = coefficients[u]
                bound = bound + gamma * dot(A.abs(), magnitude(b.lower[v], b.upper[v]))
                gather(coefficients, v, A if node.op.signs[k] > 0 else -A)
        elif isinstance(node.op, NONLINEAR):
            A = coefficients[node.inputs[0]]
            if kept is not None:
                kept[v] = A
            product = b.products[v]
            if isinstance(product, NormalisedProduct):
                coefficients[v], shift = product.push(A, gamma)
            else:
                coefficients[v], shift = product.pull(A, gamma * b.reach[v])
            bound = bound + shift
        else:
            A = coefficients[node.inputs[0]]
            bound = bound + gamma * dot(A.abs(), b.reach[v])
            coefficients[v] = through(node.op.push, A)
        for _, u in present:
            if users[u] == v:
                del coefficients[u]
    if last not in coefficients:
        return bound
    A = coefficients[last]
    return bound + dot(A, b.spec) + gamma * dot(A.abs(), b.spec.abs())


def repeat_heads(slopes: dict[int, tuple[Tensor, Tensor]], heads: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Each batch item's slopes once for every head of it."""
    if heads == 1:
        return slopes
    return {v: (a.repeat_interleave(heads, 0), b.repeat_interleave(heads, 0)) for v, (a, b) in slopes.items()}
