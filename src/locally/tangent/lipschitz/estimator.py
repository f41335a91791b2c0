"""Certified local Lipschitz constants of a network: the estimator and its result."""

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from locally.checks import check_choice, check_count, check_finite, check_positive
from locally.tangent.lipschitz.alpha import SlopeOptimiser
from locally.tangent.lipschitz.attained import Attained, search
from locally.tangent.lipschitz.baselines import product_of_norms
from locally.tangent.lipschitz.branching import Callback, Problem, Score, Search, Status
from locally.tangent.lipschitz.budget import Budget
from locally.tangent.lipschitz.exact import exact_row_norm
from locally.tangent.lipschitz.gradients import GradientBounds, gradient_bounds, repeat_heads
from locally.tangent.lipschitz.network import Network
from locally.tangent.lipschitz.norms import INF, largest_singular, matrix_norm, row_norms, spectral_norm
from locally.tangent.lipschitz.propagation import Box, Forward, ForwardBounds
from locally.tangent.lipschitz.reading import read_module
from locally.tangent.lipschitz.relaxations import Relaxation


class Method(StrEnum):
    """How the bound is found; chosen by the caller. See `LocalLipschitz`."""

    BOUND = "bound"  # linear bounds forward and backward, one pass
    BAB = "bab"  # the same, then branch and bound
    RECURJAC = "recurjac"  # Zhang et al. (2019), to compare with
    INTERVAL = "interval"  # interval arithmetic on the backward pass
    GLOBAL = "global"  # product of layer norms, without the box
    EXACT = "exact"  # mixed-integer programme, for small ReLU networks


RELAXATIONS = {Method.RECURJAC: Relaxation.RECURJAC, Method.INTERVAL: Relaxation.INTERVAL}


@dataclass(frozen=True)
class LipschitzResult:
    """Of a batch of boxes.

    Attributes:
        value: (batch,), a proven upper bound on the local Lipschitz constant of each box.
        per_output: (batch, outputs), the same for each output (or row of `spec`) by itself.
        lower: (batch,), the largest norm of a true Jacobian that was seen: the constant lies in [lower, value].
        point: (batch, *shape), where that was.
        argmax_output: (batch,), the output with the largest bound.
        status: per box, why the work ended.
        n_domains: subdomains that were bounded.
        seconds: wall time.
        history: (seconds, largest bound, subdomains) as branching went on.
    """

    value: Float[Tensor, " batch"]
    per_output: Float[Tensor, "batch outputs"]
    lower: Float[Tensor, " batch"]
    point: Float[Tensor, "batch ..."]
    argmax_output: Int[Tensor, " batch"]
    status: tuple[Status, ...]
    n_domains: int
    seconds: float
    history: tuple[tuple[float, float, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class LocalLipschitz:
    """Upper bounds on ||f(x) - f(x')|| / ||x - x'|| over all x, x' in a box, proven for every network and box.

    The bound is the largest norm that an element of the Clarke Jacobian can have anywhere in the box. `method="bound"`
    propagates linear bounds forward and then through the backward pass, `"bab"` goes on with branch and bound until
    bound and attained value meet, which on piecewise linear networks they do unless the search is cut short.
    Everything is computed in double precision whatever the model's dtype, and all bounds contain their own rounding.

    Args:
        ord: norm of inputs and outputs: inf, 2 or 1. `per_output` uses it for inputs only.
        method: "bound", "bab", or, to compare with, "recurjac" (Zhang et al., 2019; forward bounds as here),
            "interval" (interval arithmetic on the backward pass), "global" (product of layer norms, no box) and
            "exact" (mixed-integer programme, small ReLU networks, ord=inf; as exact as the solver's tolerances).
        alpha_iters: steps that optimise the forward bounds' slopes, >= 0; 0 takes the default slopes.
        timeout: seconds of branch and bound, or of the solver for one output, > 0.
        max_domains, batch_size: subdomains in all, and split at a time, >= 1.
        rtol: branch and bound ends when value <= lower (1 + rtol), > 0.
        score, candidates: how branching chooses a unit, and how many of the best it tries by bounding, >= 1.
        samples: points tried per box for `lower`, >= 0.
        memory: bytes for coefficients, > 0: rows are cut to it; too small for a single one is an error.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Complexity: with widths m and depth n, O(n^2 m^3) forward and O(K n^2 m^3) for K outputs, less where units are
    stable: only open ones get rows. Source: Shi et al., arXiv 2210.07394; see the rooms of this folder.

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> plain = LocalLipschitz().certify(net, torch.zeros(1, 4), eps=0.2)
    >>> branched = LocalLipschitz(method="bab").certify(net, torch.zeros(1, 4), eps=0.2)
    >>> bool(branched.lower <= branched.value <= plain.value), branched.status[0].value
    (True, 'converged')
    """

    ord: float | int = INF
    method: Method | str = Method.BOUND
    alpha_iters: int = 0
    timeout: float | int = 60.0
    max_domains: int = 200_000
    batch_size: int = 64
    rtol: float = 1e-6
    score: Score | str = Score.GAP
    candidates: int = 1
    samples: int = 200
    memory: int = 2**30

    def __post_init__(self) -> None:
        check_choice("ord", self.ord, (INF, 2, 1))
        check_choice("method", self.method, tuple(Method))
        check_choice("score", self.score, tuple(Score))
        check_count("alpha_iters", self.alpha_iters, at_least=0)
        check_count("samples", self.samples, at_least=0)
        for name in ("max_domains", "batch_size", "candidates", "memory"):
            check_count(name, getattr(self, name))
        check_positive("timeout", self.timeout)
        check_positive("rtol", self.rtol)
        object.__setattr__(self, "ord", float(self.ord))
        if self.method == Method.EXACT and self.ord != INF:
            raise ValueError(f'method="exact" is for ord=inf, got ord={self.ord:g}')

    def certify(
        self,
        model: nn.Module | Network,
        x: Float[Tensor, "batch *shape"] | None = None,
        eps: float | int | Float[Tensor, "..."] | None = None,
        *,
        x_lower: Float[Tensor, "batch *shape"] | None = None,
        x_upper: Float[Tensor, "batch *shape"] | None = None,
        clip: tuple[float, float] | None = None,
        spec: Float[Tensor, "rows outputs"] | None = None,
        callback: Callback | None = None,
        generator: torch.Generator | None = None,
    ) -> LipschitzResult:
        """Bound the constant on each box of a batch.

        Args:
            model: a torch module in evaluation mode, or a network from `read_module` or `read_onnx`.
            x, eps: boxes [x - eps, x + eps], eps >= 0 a number or a tensor that broadcasts to x; or
            x_lower, x_upper: the boxes themselves.
            clip: the boxes are intersected with [low, high]; x must lie in it.
            spec: rows that the outputs are multiplied with, such as e_y - e_j for margins; default the identity.
            callback: sees (seconds, largest bound, subdomains) between the steps of branch and bound; True ends it.
                Ctrl-C does the same: the result then holds the best bounds so far.
            generator: draws the points for `lower`; default one with seed 0.

        Raises:
            ValueError, TypeError: bad shapes, eps < 0, crossed bounds, NaN, an unsupported layer (named by its path),
                or too little memory.
        """
        began = time.perf_counter()
        box = make_box(x, eps, x_lower, x_upper, clip)
        net = as_network(model, box)
        C = check_spec(spec, net, box)
        budget = Budget(self.memory, net.widest)
        generator = generator or torch.Generator().manual_seed(0)
        with torch.no_grad():
            chunks = torch.arange(len(box), device=box.lower.device).split(budget.batch(2 * len(C)))
            parts = [self._certify(net, box.take(items), C, budget, callback, generator) for items in chunks]
        return join(parts, time.perf_counter() - began)

    def _certify(
        self,
        net: Network,
        box: Box,
        spec: Tensor,
        budget: Budget,
        callback: Callback | None,
        generator: torch.Generator,
    ) -> LipschitzResult:
        began = time.perf_counter()
        method = Method(self.method)
        attained = search(net, box, spec, self.ord, budget, samples=max(1, self.samples), generator=generator)
        if method is Method.GLOBAL:
            value = product_of_norms(net, spec, self.ord).expand(len(box))
            rows = torch.stack([product_of_norms(net, row[None], self.ord) for row in spec]).expand(len(box), -1)
            return self._result(value, rows, attained, began)
        forward = forward_bounds(net, box, budget, self.alpha_iters)
        if method is Method.EXACT:
            return self._exact(net, box, forward, spec, budget, attained, began)
        relaxation = RELAXATIONS.get(method, Relaxation.CHORD)
        value, rows = self._propagate(net, forward, spec, budget, relaxation)
        if method is not Method.BAB or not net.activations:
            return self._result(value, rows, attained, began)
        problem = Problem(net, box, forward, spec, self.ord, budget, Score(self.score), self.candidates)
        work = Search(problem, attained, self.rtol)
        limits: dict[str, Any] = {
            "timeout": float(self.timeout),
            "max_domains": self.max_domains,
            "batch_size": self.batch_size,
        }
        status = work.run(callback=callback, **limits)
        value = torch.minimum(value, value.new_tensor([work.value(i) for i in range(len(box))]))
        rows = torch.minimum(rows, value.new_tensor([work.per_output(i) for i in range(len(box))]))
        return self._result(value, rows, attained, began, tuple(status), work.domains, tuple(work.history))

    def _propagate(
        self, net: Network, forward: ForwardBounds, spec: Tensor, budget: Budget, relaxation: Relaxation
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch rows"]]:
        """Without branching: bounds on the norm of the Jacobian and on the norms of its rows."""
        chords = relaxation is Relaxation.CHORD
        gradients = heads_of(net, forward, spec, budget, relaxation)
        lower, upper = (t.reshape(-1, len(spec), t[0].numel()) for t in (gradients.lower[0], gradients.upper[0]))
        rows = row_norms(net, gradients, self.ord, second_pass=chords).view(-1, len(spec))
        value = matrix_norm(lower, upper, rows, self.ord)
        if self.ord == 2 and chords and len(spec) > 1:
            value = torch.minimum(value, rotated_norm(net, forward, spec, budget, lower, upper))
        return value, rows

    def _exact(
        self,
        net: Network,
        box: Box,
        forward: ForwardBounds,
        spec: Tensor,
        budget: Budget,
        attained: Attained,
        began: float,
    ) -> LipschitzResult:
        values, lower, status = [], [], []
        for i in range(len(box)):
            item = torch.tensor([i], device=box.lower.device)
            found = [
                exact_row_norm(net, box.take(item), forward.take(item), row, budget, float(self.timeout))
                for row in spec
            ]
            values.append([row.bound for row in found])
            lower.append(max(row.value for row in found))
            status.append(Status.CONVERGED if all(row.optimal for row in found) else Status.SOLVER_LIMIT)
        rows = box.lower.new_tensor(values)
        attained.value = torch.maximum(attained.value, box.lower.new_tensor(lower))
        return self._result(rows.amax(1), rows, attained, began, tuple(status))

    def _result(
        self, value: Tensor, rows: Tensor, attained: Attained, began: float, status: tuple[Status, ...] | None = None,
        n_domains: int | None = None, history: tuple[tuple[float, float, int], ...] = (),
    ) -> LipschitzResult:  # fmt: skip
        return LipschitzResult(
            value=value,
            per_output=rows,
            lower=attained.value,
            point=attained.point,
            argmax_output=rows.argmax(1),
            status=status or (Status.BOUNDED,) * len(value),
            n_domains=len(value) if n_domains is None else n_domains,
            seconds=time.perf_counter() - began,
            history=history,
        )


# What all entry points share -----------------------------------------------------------------------------------------


def forward_bounds(net: Network, box: Box, budget: Budget, alpha_iters: int) -> ForwardBounds:
    optimise = SlopeOptimiser(alpha_iters) if alpha_iters else None
    return Forward(net, box, budget, optimise=optimise).bounds


def heads_of(
    net: Network, forward: ForwardBounds, spec: Tensor, budget: Budget, relaxation: Relaxation = Relaxation.CHORD
) -> GradientBounds:
    """Gradient bounds with every row of `spec` as a head of every box."""
    batch = len(forward.infeasible)
    slopes = repeat_heads(forward.slopes, len(spec))
    return gradient_bounds(net, slopes, spec.repeat(batch, 1), budget, relaxation)


def rotated_norm(
    net: Network, forward: ForwardBounds, spec: Tensor, budget: Budget, lower: Tensor, upper: Tensor
) -> Float[Tensor, " batch"]:
    """Spectral bound on the Jacobian with outputs rotated so that the middle of its interval has orthogonal rows.

    ||J|| = ||U^T J|| for orthogonal U; U is rounded, so the bound is divided by its smallest singular value.
    """
    U = torch.linalg.svd((lower + upper) / 2, full_matrices=True)[0]
    k = len(spec)
    heads = (U.mT @ spec).flatten(0, 1)
    gradients = gradient_bounds(net, repeat_heads(forward.slopes, k), heads, budget)
    entries = [t.reshape(len(U), k, -1) for t in (gradients.lower[0], gradients.upper[0])]
    defect = largest_singular(U.mT @ U - torch.eye(k, dtype=U.dtype, device=U.device)) + net.gamma
    rows = row_norms(net, gradients, 2.0).view(len(U), k)
    norm = torch.minimum(spectral_norm(entries[0], entries[1]), rows.square().sum(1).sqrt() * (1 + net.gamma))
    return norm * (1 + 2 * defect)


def as_network(model: nn.Module | Network, box: Box) -> Network:
    shape = tuple(box.lower.shape[1:])
    if isinstance(model, Network):
        if model.nodes[0].shape != shape:
            raise ValueError(f"x must have shape (batch, {str(model.nodes[0].shape)[1:]}, got (batch, {str(shape)[1:]}")
        return model
    return read_module(model, shape, box.lower.device)


def make_box(
    x: Tensor | None, eps: Any, x_lower: Tensor | None, x_upper: Tensor | None, clip: tuple[float, float] | None = None
) -> Box:
    """From a centre and a radius, or from two corners; everything is checked here."""
    if (x is None) != (eps is None) or (x is None) == (x_lower is None) or (x_lower is None) != (x_upper is None):
        raise ValueError("give x and eps, or x_lower and x_upper")
    if x is not None:
        check_points("x", x)
        radius = torch.as_tensor(eps, dtype=torch.float64, device=x.device)
        if radius.isnan().any() or (radius < 0).any() or radius.isinf().any():
            raise ValueError(f"eps must be non-negative and finite, got {eps!r}")
        if torch.broadcast_shapes(radius.shape, x.shape) != x.shape:
            raise ValueError(f"eps must broadcast to the shape of x, {tuple(x.shape)}, got {tuple(radius.shape)}")
        wide = x.to(torch.float64)
        x_lower, x_upper = wide - radius, wide + radius
    assert x_lower is not None
    assert x_upper is not None
    check_points("x_lower", x_lower)
    check_points("x_upper", x_upper)
    if x_lower.shape != x_upper.shape:
        raise ValueError(
            f"x_lower and x_upper must have one shape, got {tuple(x_lower.shape)} and {tuple(x_upper.shape)}"
        )
    lower, upper = x_lower.to(torch.float64), x_upper.to(torch.float64)
    if (lower > upper).any():
        raise ValueError("x_lower must not exceed x_upper")
    if clip is not None:
        low, high = clip
        if not low < high:
            raise ValueError(f"clip must be (low, high) with low < high, got {clip}")
        if ((upper < low) | (lower > high)).any() or (x is not None and ((x < low) | (x > high)).any()):
            raise ValueError(f"x must lie in clip = [{low:g}, {high:g}]")
        lower, upper = lower.clamp(low, high), upper.clamp(low, high)
    return Box(lower, upper)


def check_points(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (batch, *shape) with at least one entry, got {tuple(x.shape)}")
    check_finite(name, x)


def check_spec(spec: Tensor | None, net: Network, box: Box) -> Tensor:
    if spec is None:
        return torch.eye(net.outputs, dtype=torch.float64, device=box.lower.device)
    if not isinstance(spec, Tensor) or spec.ndim != 2 or spec.shape[1] != net.outputs or not len(spec):
        raise ValueError(f"spec must have shape (rows, {net.outputs}), got {tuple(getattr(spec, 'shape', ()))}")
    check_finite("spec", spec)
    return spec.to(dtype=torch.float64, device=box.lower.device)


def join(parts: list[LipschitzResult], seconds: float) -> LipschitzResult:
    cat = lambda name: torch.cat([getattr(part, name) for part in parts])
    return LipschitzResult(
        value=cat("value"),
        per_output=cat("per_output"),
        lower=cat("lower"),
        point=cat("point"),
        argmax_output=cat("argmax_output"),
        status=tuple(s for part in parts for s in part.status),
        n_domains=sum(part.n_domains for part in parts),
        seconds=seconds,
        history=tuple(h for part in parts for h in part.history),
    )
