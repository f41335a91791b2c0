"""A certificate that an explanation fails somewhere: the no-free-lunch theorem made computable.

If f is not in the class G, every g that fits f near x0 is at least d(f, G) = min_g max_x loss away from it in some
other neighbourhood. The certificate bounds d(f, G) from below by a Chebyshev fit and finds such a neighbourhood.
Source: Han, Srinivas, Lakkaraju, arXiv 2206.01254, Theorem 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from locally.checks import check_count
from locally.tangent.explanation.approximation import FLOOR, Explanation
from locally.tangent.explanation.black_box import BlackBox, Gradient, Output, Points, Target
from locally.tangent.explanation.interpretable import LinearModel, LogisticModel
from locally.tangent.explanation.neighbourhoods import Segment


@dataclass(frozen=True, eq=False)
class NoFreeLunchCertificate:
    """Where an explanation fails, and by how much every explanation of its class has to fail.

    Attributes:
        lower_bound: of d(f, G) in squared error, over the box: no g in the class has a smaller worst case.
        best_slopes, best_intercept: the minimax g that attains it on the sampled points (over x).
        best_worst: its largest squared error that was found in the box; d(f, G) lies between lower_bound and the true
            largest error of this g.
        x_adv: input in the box where the explanation's g is worst, as far as found.
        loss_at_adv: its squared error there, never below lower_bound.
        neighbourhood: the segment from x0 to x_adv, the adversarial neighbourhood of the proof.
    """

    lower_bound: float
    best_slopes: Float[ndarray, " d"]
    best_intercept: float
    best_worst: float
    x_adv: Float[Tensor, " d"]
    loss_at_adv: float
    neighbourhood: Segment

    @property
    def holds(self) -> bool:
        """Whether the theorem's inequality is met, up to the rounding of the linear program."""
        return self.loss_at_adv >= self.lower_bound * (1 - 1e-6) - 1e-12


def nfl_certificate(
    f: Callable[[Any], Any],
    X: Points,
    explanation: Explanation,
    bounds: tuple[float | Sequence[float] | ndarray, float | Sequence[float] | ndarray],
    *,
    point: int = 0,
    n: int = 512,
    exchanges: int = 4,
    ascent_steps: int = 60,
    target: Target = None,
    grad: Gradient = None,
    output: Output | str = Output.IDENTITY,
    floor: float = FLOOR,
    seed: int = 0,
) -> NoFreeLunchCertificate:
    """Bound what any explanation of this class can do on a box, and show where the given one fails.

    The minimax program sees n low-discrepancy points of the box; each exchange adds the points where its solution is
    worst (Remez), so the bound rises towards d(f, G). A maximum over finitely many points never exceeds the one over
    the box: the bound is valid whatever n is.

    Args:
        f, X, target, grad, output: see `BlackBox`. A NumPy callable is differentiated numerically for the search.
        explanation: of the points X; linear or logistic.
        bounds: lower and upper corner of the box, numbers or (d,).
        point: which of the points.
        n: sampled points, at least d + 2.
        exchanges, ascent_steps: effort of the search.
        floor: see `Explanation.predict_at`.

    Raises:
        ValueError: the box is empty, or the class of g is neither linear nor logistic.

    >>> from locally.tangent.explanation import explain
    >>> f = lambda x: x[:, 0] ** 2
    >>> X = torch.tensor([[0.5]], dtype=torch.float64)
    >>> found = nfl_certificate(f, X, explain(f, X, "gradient"), (-1.0, 1.0))
    >>> round(found.lower_bound, 4), found.x_adv, round(found.loss_at_adv, 4)
    (0.25, tensor([-1.], dtype=torch.float64), 5.0625)
    """
    if type(explanation.model) not in (LinearModel, LogisticModel):
        raise ValueError(f"explanation must have a linear or logistic g, got {type(explanation.model).__name__}")
    check_count("point", point, at_least=0)
    if point >= len(explanation):
        raise ValueError(f"point must be less than {len(explanation)}, got {point}")
    numeric = "numeric" if grad is None and isinstance(X, np.ndarray) and not isinstance(f, torch.nn.Module) else grad
    one = X[point : point + 1]
    if isinstance(target, Tensor | np.ndarray | Sequence) and not isinstance(target, str):
        target = int(target[point])
    box = BlackBox(f, one, target=target, grad=numeric, output=output)
    g = explanation[point]
    if not torch.equal(g.x0.to(box.x0), box.x0):
        raise ValueError("explanation is not of the points X")
    d = box.x0.shape[1]
    check_count("n", n, at_least=d + 2)
    low, high = corners(bounds, box.x0)
    link = type(explanation.model) is LogisticModel

    with box.evaluating():
        points = torch.cat([spread(low, high, n, seed), box.x0.clamp(low, high)])
        values = box.values(points[None])[0]
        for round_ in range(exchanges + 1):
            theta, bound = minimax_fit(points.double(), values, link)
            best = partial(apply, theta, logistic=link)
            far = ascend(box, best, points, values, low, high, ascent_steps)
            if round_ == exchanges:
                break
            points = torch.cat([points, far])
            values = torch.cat([values, box.values(far[None])[0]])
        explained = lambda x: g.predict_at(x[None], floor=floor)[0]
        worst = ascend(box, explained, points, values, low, high, ascent_steps)
        candidates = torch.cat([points, worst])
        at = box.values(candidates[None])[0]
        with torch.no_grad():
            errors = (at - explained(candidates)) ** 2
            reached = torch.cat([(values - best(points)) ** 2, (box.values(far[None])[0] - best(far)) ** 2])
    i = int(errors.argmax())
    x_adv = candidates[i]
    return NoFreeLunchCertificate(
        lower_bound=bound**2,
        best_slopes=theta[:-1].numpy(),
        best_intercept=float(theta[-1]),
        best_worst=float(reached.max()),
        x_adv=x_adv,
        loss_at_adv=float(errors[i]),
        neighbourhood=Segment(x_adv),
    )


def minimax_fit(x: Float[Tensor, "n d"], f: Float[Tensor, " n"], logistic: bool) -> tuple[Float[Tensor, " p"], float]:
    """The g with the smallest largest error on the points, and a lower bound of that error.

    Linear: minimise t subject to |f_i - w.x_i - b| <= t. Logistic: the smallest t for which logit(f_i - t) <= w.x_i + b
    <= logit(f_i + t) has a solution, by bisection; the bound is the largest t known to have none.
    """
    from scipy.optimize import linprog

    points, values = x.cpu().numpy(), f.cpu().numpy()
    A = np.column_stack([points, np.ones(len(points))])
    p = A.shape[1]
    if not logistic:
        ones = np.ones((len(A), 1))
        found = linprog(
            np.r_[np.zeros(p), 1.0],
            A_ub=np.block([[A, -ones], [-A, -ones]]),
            b_ub=np.r_[values, -values],
            bounds=[(None, None)] * p + [(0, None)],
            method="highs",
        )
        if not found.success:
            raise ValueError(f"the minimax program has no solution: {found.message}")
        return torch.from_numpy(found.x[:p].copy()), float(found.fun)
    theta, below, above = np.zeros(p), 0.0, 0.5
    for _ in range(20):
        t = (below + above) / 2
        upper, lower = values + t < 1, values - t > 0
        rows = np.concatenate([A[upper], -A[lower]])
        limits = np.concatenate([logit(values[upper] + t), -logit(values[lower] - t)])
        found = linprog(np.zeros(p), rows, limits, bounds=[(None, None)] * p, method="highs")
        if found.success:
            theta, above = found.x, t
        elif found.status == 2:  # infeasible
            below = t
        else:
            break  # numerical trouble: what is known stays valid
        if above - below < 1e-5:
            break
    return torch.from_numpy(theta.copy()), below


def ascend(
    box: BlackBox,
    g: Callable[[Tensor], Tensor],
    points: Float[Tensor, "n d"],
    values: Float[Tensor, " n"],
    low: Tensor,
    high: Tensor,
    steps: int,
    starts: int = 16,
) -> Float[Tensor, "starts d"]:
    """Projected ascent on (f - g)^2 from the worst points; a step that does not climb is halved."""
    with torch.no_grad():
        errors = (values - g(points)) ** 2
    order = errors.argsort(descending=True)[:starts]
    x, error = points[order].clone(), errors[order]
    step = 0.25 * (high - low) * torch.ones_like(x)
    for _ in range(steps):
        value, gradient = (part[0] for part in box.values_and_gradients(x[None]))
        with torch.enable_grad():
            free = x.detach().requires_grad_(True)
            other = g(free)
            (slope,) = torch.autograd.grad(other.sum(), free)
        uphill = (2 * (value - other.detach()))[:, None] * (gradient - slope.double())
        trial = (x + step * torch.sign(uphill).to(x)).clamp(low, high)
        with torch.no_grad():
            trial_error = (box.values(trial[None])[0] - g(trial)) ** 2
        better = trial_error > error
        x = torch.where(better[:, None], trial, x)
        error = torch.where(better, trial_error, error)
        step = torch.where(better[:, None], step, step / 2)
    return x


def apply(theta: Tensor, x: Float[Tensor, "n d"], logistic: bool) -> Float[Tensor, " n"]:
    theta = theta.to(x.device)
    eta = x.double() @ theta[:-1] + theta[-1]
    return torch.sigmoid(eta) if logistic else eta


def spread(low: Tensor, high: Tensor, n: int, seed: int) -> Float[Tensor, "points d"]:
    """Sobol points of the box, its centre and (in at most 8 dimensions) its corners."""
    d = len(low)
    sobol = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(n)
    special = [torch.full((1, d), 0.5)]
    if d <= 8:
        special.append(torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * d).reshape(-1, d))
    unit = torch.cat([*special, sobol]).to(low)
    return low + unit * (high - low)


def corners(bounds: tuple[Any, Any], x0: Float[Tensor, "1 d"]) -> tuple[Tensor, Tensor]:
    low, high = (torch.as_tensor(b, dtype=x0.dtype, device=x0.device).expand(x0.shape[1]) for b in bounds)
    if not bool((low < high).all()) or not bool((high - low).isfinite().all()):
        raise ValueError("bounds must be finite with lower < upper for every feature")
    return low, high


def logit(p: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    return np.log(p) - np.log1p(-p)
