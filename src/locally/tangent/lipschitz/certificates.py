"""What Jacobian bounds prove: entries and directional derivatives over a box, monotonicity, radii without an attack."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from locally.checks import check_choice, check_count, check_finite, check_positive
from locally.tangent.lipschitz.budget import Budget
from locally.tangent.lipschitz.estimator import (
    LocalLipschitz,
    as_network,
    check_points,
    check_spec,
    forward_bounds,
    heads_of,
    make_box,
)
from locally.tangent.lipschitz.gradients import gradient_bounds, push_rows
from locally.tangent.lipschitz.network import Network
from locally.tangent.lipschitz.norms import INF
from locally.tangent.lipschitz.propagation import Box
from locally.tangent.lipschitz.relaxations import Relaxation


def jacobian_bounds(
    model: nn.Module | Network,
    x: Float[Tensor, "batch *shape"] | None = None,
    eps: float | int | Float[Tensor, "..."] | None = None,
    *,
    x_lower: Float[Tensor, "batch *shape"] | None = None,
    x_upper: Float[Tensor, "batch *shape"] | None = None,
    spec: Float[Tensor, "rows outputs"] | None = None,
    alpha_iters: int = 0,
    memory: int = 2**30,
) -> tuple[Float[Tensor, "batch rows *shape"], Float[Tensor, "batch rows *shape"]]:
    """Lower and upper bounds on every entry of the Clarke Jacobian over each box; arguments as for `LocalLipschitz`.

    O(K n^2 m^3) for K outputs, width m, depth n. Source: arXiv 2210.07394, section 3.3.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> lower, upper = jacobian_bounds(net, torch.zeros(5, 2), eps=0.1)
    >>> lower.shape, bool((lower <= upper).all())
    (torch.Size([5, 1, 2]), True)
    """
    check_count("alpha_iters", alpha_iters, at_least=0)
    check_count("memory", memory)
    box = make_box(x, eps, x_lower, x_upper)
    net = as_network(model, box)
    C = check_spec(spec, net, box)
    budget = Budget(memory, net.widest)
    lower, upper = [], []
    with torch.no_grad():
        for items in torch.arange(len(box), device=box.lower.device).split(budget.batch(2 * len(C))):
            part = box.take(items)
            b = heads_of(net, forward_bounds(net, part, budget, alpha_iters), C, budget)
            lower.append(b.lower[0].view(len(part), len(C), *part.lower.shape[1:]))
            upper.append(b.upper[0].view(len(part), len(C), *part.lower.shape[1:]))
    return torch.cat(lower), torch.cat(upper)


def jvp_bounds(
    model: nn.Module | Network,
    x: Float[Tensor, "batch *shape"],
    v: Float[Tensor, "batch *shape"],
    eps: float | int | Float[Tensor, "..."],
    *,
    spec: Float[Tensor, "rows outputs"] | None = None,
    alpha_iters: int = 0,
    memory: int = 2**30,
) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows"]]:
    """Lower and upper bounds on the directional derivative J v over each box: tighter than the entries times v.

    >>> net = nn.Linear(3, 2, bias=False)
    >>> x = torch.zeros(1, 3, dtype=torch.float64)
    >>> lower, upper = jvp_bounds(net, x, torch.ones_like(x), eps=1.0)
    >>> torch.allclose(lower[0], net.weight.double().sum(1)) and torch.allclose(upper, lower)
    True
    """
    check_count("alpha_iters", alpha_iters, at_least=0)
    check_count("memory", memory)
    box = make_box(x, eps, None, None)
    check_points("v", v)
    if v.shape != x.shape:
        raise ValueError(f"v must have the shape of x, {tuple(x.shape)}, got {tuple(v.shape)}")
    net = as_network(model, box)
    C = check_spec(spec, net, box)
    budget = Budget(memory, net.widest)
    lower, upper = [], []
    with torch.no_grad():
        for items in torch.arange(len(box), device=box.lower.device).split(budget.batch(2 * len(C))):
            part = box.take(items)
            b = heads_of(net, forward_bounds(net, part, budget, alpha_iters), C, budget)
            rows = v[items].to(torch.float64).repeat_interleave(len(C), 0)[:, None]
            high, low = push_rows(net, 0, torch.cat([rows, -rows], dim=1), b).split(1, dim=1)
            lower.append(-low.view(len(part), len(C)))
            upper.append(high.view(len(part), len(C)))
    return torch.cat(lower), torch.cat(upper)


@dataclass(frozen=True)
class MonotonicityTable:
    """One row per instance, one column per feature.

    Attributes:
        features: flat indices of the features.
        lower, upper: bounds on the target's partial derivative while the feature runs through its range.
    """

    features: tuple[int, ...]
    lower: Float[Tensor, "instances features"]
    upper: Float[Tensor, "instances features"]

    @property
    def increasing(self) -> Bool[Tensor, "instances features"]:
        """Proven: the target does not fall as the feature rises."""
        return self.lower >= 0

    @property
    def decreasing(self) -> Bool[Tensor, "instances features"]:
        """Proven: the target does not rise as the feature rises."""
        return self.upper <= 0

    @property
    def proven(self) -> float:
        """Share of pairs that are proven monotone one way or the other."""
        return (self.increasing | self.decreasing).double().mean().item()


def monotonicity(
    model: nn.Module | Network,
    X: Float[Tensor, "instances *shape"],
    features: Sequence[int],
    target: int,
    ranges: tuple[float, float] | Float[Tensor, "features 2"] = (0.0, 1.0),
    *,
    method: str = "bound",
    alpha_iters: int = 0,
    memory: int = 2**30,
) -> MonotonicityTable:
    """Is output `target` monotone in a feature, for each instance with all other features held?

    Args:
        features: flat indices into one instance.
        target: which output.
        ranges: (low, high) that a feature runs through, one pair for all or one row for each.
        method: "bound", or "recurjac" or "interval" to compare with.

    Raises:
        ValueError, TypeError: an index or range is out of bounds, or as for `LocalLipschitz`.

    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.constant_(net[0].weight, 2.0)
    >>> table = monotonicity(net, torch.rand(3, 2), features=[0, 1], target=0)
    >>> table.proven, bool(table.increasing.all())
    (1.0, True)
    """
    check_points("X", X)
    check_choice("method", method, ("bound", "recurjac", "interval"))
    check_count("memory", memory)
    check_count("alpha_iters", alpha_iters, at_least=0)
    points = X.to(torch.float64)
    size = points[0].numel()
    if not features or any(not isinstance(k, int) or not 0 <= k < size for k in features):
        raise ValueError(f"features must be flat indices in [0, {size}), at least one, got {list(features)!r}")
    net = as_network(model, Box(points, points))
    if not isinstance(target, int) or not 0 <= target < net.outputs:
        raise ValueError(f"target must be an output in [0, {net.outputs}), got {target!r}")
    span = torch.as_tensor(ranges, dtype=torch.float64, device=X.device)
    check_finite("ranges", span)
    if span.shape not in ((2,), (len(features), 2)) or (span[..., 0] > span[..., 1]).any():
        raise ValueError("ranges must be (low, high) or one row (low, high) per feature, with low <= high")
    span = span.expand(len(features), 2)
    budget = Budget(memory, net.widest)
    spec = points.new_zeros(1, net.outputs)
    spec[0, target] = 1.0
    relaxation = Relaxation.CHORD if method == "bound" else Relaxation(method)
    pairs = torch.cartesian_prod(torch.arange(len(X)), torch.arange(len(features))).to(X.device)
    lower, upper = [], []
    with torch.no_grad():
        for some in pairs.split(budget.batch(2)):
            unit = torch.tensor(features, device=X.device)[some[:, 1], None]
            base = points[some[:, 0]].flatten(1)
            low, high = (base.scatter(1, unit, span[some[:, 1], side, None]) for side in (0, 1))
            box = Box(low.view(-1, *points.shape[1:]), high.view(-1, *points.shape[1:]))
            forward = forward_bounds(net, box, budget, alpha_iters)
            heads = spec.expand(len(some), -1)
            b = gradient_bounds(net, forward.slopes, heads, budget, relaxation, refine_input=False)
            plain_low, plain_high = (t.flatten(1).gather(1, unit)[:, 0] for t in (b.lower[0], b.upper[0]))
            if method != "interval":
                rows = torch.zeros_like(base).scatter(1, unit, 1.0).view(-1, 1, *points.shape[1:])
                up, down = push_rows(net, 0, torch.cat([rows, -rows], dim=1), b).unbind(1)
                plain_low, plain_high = torch.maximum(plain_low, -down), torch.minimum(plain_high, up)
            lower.append(plain_low)
            upper.append(plain_high)
    table = (torch.cat(part).view(len(X), len(features)) for part in (lower, upper))
    return MonotonicityTable(tuple(features), *table)


@dataclass(frozen=True)
class RobustRadius:
    """Per instance: no point within `radius` (in the norm `ord`) changes the predicted class.

    Attributes:
        radius: (batch,), 0 where `labels` is not the network's own answer.
        margin: (batch,), smallest difference between the label's output and another.
        lipschitz: (batch, classes), the constants of the differences on the box that gave the radius.
    """

    radius: Float[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    lipschitz: Float[Tensor, "batch classes"]


def robust_radius(
    model: nn.Module | Network,
    x: Float[Tensor, "batch *shape"],
    labels: Int[Tensor, " batch"],
    max_radius: float | int,
    *,
    estimator: LocalLipschitz | None = None,
    rtol: float = 1e-2,
) -> RobustRadius:
    """Certified radii from margins: within rho <= eps, if rho L(eps) < margin then the class stays.

    The largest such rho is where eps L(eps) crosses the margin: bisection on eps, each step one call of the estimator
    on the boxes of radius eps around x, with the output differences e_y - e_j as rows.

    Args:
        labels: the class to keep, one per instance.
        max_radius: largest radius of interest, > 0.
        estimator: default `LocalLipschitz()`; its `ord` is the norm of the radius.
        rtol: stop when the bracket is this narrow beside max_radius, in (0, 1).

    Raises:
        ValueError, TypeError: as for `LocalLipschitz.certify`.

    >>> net = nn.Linear(1, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> robust_radius(net, torch.tensor([[0.5]]), torch.tensor([0]), max_radius=2.0).radius.round(decimals=2)
    tensor([0.5000], dtype=torch.float64)
    """
    check_positive("max_radius", max_radius)
    check_positive("rtol", rtol, below=1.0)
    box = make_box(x, 0.0, None, None)
    net = as_network(model, box)
    k = net.outputs
    if k < 2:
        raise ValueError("model must have at least two outputs")
    if labels.shape != (len(x),) or labels.is_floating_point() or ((labels < 0) | (labels >= k)).any():
        raise ValueError(f"labels must be {len(x)} integers in [0, {k})")
    estimator = estimator or LocalLipschitz(samples=0)
    with torch.no_grad():
        point = forward_bounds(net, box, Budget(estimator.memory, net.widest), 0)
    low, high = point.lower[-1], point.upper[-1]
    margins = low.gather(1, labels[:, None]) - high
    margins.scatter_(1, labels[:, None], INF)
    margin = margins.amin(1)
    radius, constants = torch.zeros_like(margin), torch.full_like(margins, INF)
    for label in labels[margin > 0].unique().tolist():
        items = ((labels == label) & (margin > 0)).nonzero()[:, 0]
        spec = -torch.eye(k, dtype=torch.float64, device=x.device)
        spec[:, label] += 1.0
        spec = spec[[j for j in range(k) if j != label]]
        others = [j for j in range(k) if j != label]
        bottom, top = torch.zeros_like(margin[items]), torch.full_like(margin[items], max_radius)
        eps = top
        while True:
            wide = eps.view(-1, *[1] * (x.ndim - 1))
            found = estimator.certify(net, x[items].to(torch.float64), wide, spec=spec)
            # strictly below the margin, and rounded down
            safe = (margins[items][:, others] / found.per_output.clamp(min=1e-300)).amin(1) * (1 - 1e-12)
            rho = torch.minimum(eps, safe)
            better = rho > radius[items]
            radius[items] = torch.where(better, rho, radius[items])
            rows = constants[items]
            rows[:, others] = torch.where(better[:, None], found.per_output, rows[:, others])
            constants[items] = rows
            bottom, top = torch.where(safe >= eps, eps, torch.maximum(bottom, rho)), torch.where(safe >= eps, top, eps)
            if bool((top - bottom <= rtol * max_radius).all()):
                break
            eps = (bottom + top) / 2
    return RobustRadius(radius, margin, constants)
