"""Norms of true Jacobians inside the box: what no upper bound may fall below."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locally.tangent.lipschitz.budget import Budget
from locally.tangent.lipschitz.network import Network
from locally.tangent.lipschitz.norms import INF
from locally.tangent.lipschitz.propagation import Box


@dataclass
class Attained:
    """Largest norms seen: of the whole Jacobian (batch,), of each row (batch, outputs), and where, (batch, *shape)."""

    value: Tensor
    rows: Tensor
    point: Tensor


def true_norms(jacobian: Float[Tensor, "n s d"], ord: float) -> tuple[Float[Tensor, " n"], Float[Tensor, "n s"]]:
    """Operator norm and dual norms of the rows, rounded down by more than their evaluation errs."""
    size = jacobian.abs()
    down = 1 - 1e-12
    if ord == INF:
        rows = size.sum(2)
        return rows.amax(1) * down, rows * down
    if ord == 1:
        return size.sum(1).amax(1) * down, size.amax(2) * down
    return torch.linalg.matrix_norm(jacobian, 2) * down, jacobian.square().sum(2).sqrt() * down


def search(
    net: Network,
    box: Box,
    spec: Float[Tensor, "s outputs"],
    ord: float,
    budget: Budget,
    *,
    samples: int,
    rounds: int = 8,
    generator: torch.Generator | None = None,
) -> Attained:
    """Best of `samples` points per box: the centre, uniform points and corners, then moves of the best dozen.

    A move redraws a few coordinates, since a ReLU network's Jacobian is piecewise constant and has no slope to follow.
    """
    found = Attained(
        box.lower.new_full((len(box),), -INF),
        box.lower.new_full((len(box), len(spec)), -INF),
        box.centre.clone(),
    )
    items = torch.arange(len(box), device=box.lower.device)
    shape, like = box.lower.shape, box.lower
    draw = lambda n: torch.rand(n, *shape, generator=generator, dtype=like.dtype).to(like.device)
    first = max(1, samples // 2)
    moves = max(1, samples // (2 * rounds))
    elite, best = box.centre[None], box.lower.new_full((1, len(box)), -INF)
    for k in range(rounds + 1 if samples > 1 else 1):
        unit = draw(first if k == 0 else moves)
        unit[1::2] = unit[1::2].round()  # corners
        points = box.lower + unit * (box.upper - box.lower)
        if k == 0:
            points[0] = box.centre
        else:
            parent = torch.randint(len(elite), (moves,), generator=generator)
            few = draw(moves) < 0.6 / k + 1.0 / max(box.lower[0].numel(), 2)
            points = torch.where(few, points, elite[parent.to(like.device)])
        points = points.clamp(box.lower, box.upper)
        value = update(net, found, points, spec, ord, budget)
        pool, values = torch.cat([elite, points]), torch.cat([best, value])
        top = values.topk(min(12, len(values)), dim=0).indices
        elite, best = pool[top, items], values.gather(0, top)
    return found


def update(
    net: Network, found: Attained, points: Float[Tensor, "n b *shape"], spec: Tensor, ord: float, budget: Budget
) -> Float[Tensor, "n b"]:
    """Let `found` take what the points attain; returns their values."""
    n, batch = points.shape[:2]
    flat = points.flatten(0, 1)
    size = max(1, budget.memory // (budget.per_row * len(spec)))
    norms = [true_norms(net.jacobian(some, spec), ord) for some in flat.split(size)]
    value = torch.cat([a for a, _ in norms]).view(n, batch)
    rows = torch.cat([b for _, b in norms]).view(n, batch, -1)
    best = value.argmax(0)
    items = torch.arange(batch, device=best.device)
    better = value[best, items] > found.value
    found.value = torch.where(better, value[best, items], found.value)
    wide = better.view(-1, *[1] * (found.point.ndim - 1))
    found.point = torch.where(wide, points[best, items], found.point)
    found.rows = torch.maximum(found.rows, rows.amax(0))
    return value
