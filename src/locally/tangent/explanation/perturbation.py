"""Perturbation tests: how much f moves when the features ranked lowest or highest are changed.

If the ranking is right for that kind of change, the lowest-ranked features hardly matter and the highest-ranked ones
matter most. Source: Han, Srinivas, Lakkaraju, arXiv 2206.01254, section 6 (third experiment).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from locally.checks import check_choice, check_count, check_finite, check_positive
from locally.tangent.explanation.approximation import as_baseline, draw_seed
from locally.tangent.explanation.black_box import BlackBox, Output, Points, Target

KINDS = ("binary", "continuous")


@dataclass(frozen=True, eq=False)
class PerturbationTest:
    """Change of f, |f(x) - f(x~)|, by the number of changed features.

    Attributes:
        ks: numbers of features changed.
        order: "bottom" (low is good) or "top" (high is good).
        changes: for each kind of change, (batch, ks); continuous changes are averaged over the repeats.
    """

    ks: tuple[int, ...]
    order: str
    changes: Mapping[str, Float[Tensor, "batch ks"]]

    def mean(self, kind: str) -> Float[Tensor, " ks"]:
        """Mean over the points."""
        return self.changes[kind].mean(0)

    def std_error(self, kind: str) -> Float[Tensor, " ks"]:
        """Standard error of the mean over the points; NaN for a single point."""
        changes = self.changes[kind]
        if len(changes) < 2:
            return torch.full_like(changes[0], torch.nan)
        return changes.std(0) / len(changes) ** 0.5

    def average(self, kind: str) -> float:
        """Mean over the points and over ks: one number for a method."""
        return float(self.changes[kind].mean())


def perturbation_test(
    f: Callable[[Any], Any],
    X: Points,
    attributions: Float[ndarray, "batch d"] | Float[Tensor, "batch d"],
    *,
    kinds: Sequence[str] = KINDS,
    ks: Sequence[int] | None = None,
    order: str = "bottom",
    sigma: float = 0.1,
    repeats: int = 100,
    baseline: float | Sequence[float] | ndarray | Tensor = 0.0,
    target: Target = None,
    output: Output | str = Output.IDENTITY,
    input_shape: Sequence[int] | None = None,
    batch_size: int = 2**16,
    n_jobs: int = 1,
    generator: torch.Generator | None = None,
) -> PerturbationTest:
    """Change the k features of smallest (or largest) |attribution| and see how far f moves.

    Args:
        f, X, target, output, input_shape, batch_size, n_jobs: see `BlackBox`.
        attributions: (batch, d), one score for each feature; equal scores keep the order of the features.
        kinds: "binary" sets the features to the baseline, "continuous" adds N(0, sigma^2) noise to them.
        ks: numbers of features to change, each in [1, d]; default 1..d.
        order: "bottom" takes the smallest |attribution| first, "top" the largest.
        repeats: noise draws a point; all ks share them, so that a curve is not jittered by its own noise.
        generator: equal seeds compare several attributions under equal noise.

    Complexity: len(ks) (1 + repeats) evaluations of f for each point.

    >>> import numpy as np
    >>> X = np.array([[1.0, 2.0, 4.0]])
    >>> perturbation_test(lambda x: x.sum(1), X, X, kinds=["binary"]).mean("binary")
    tensor([1., 3., 7.], dtype=torch.float64)
    """
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    check_choice("order", order, ("bottom", "top"))
    check_positive("sigma", sigma)
    check_count("repeats", repeats)
    box = BlackBox(f, X, target=target, output=output, input_shape=input_shape, batch_size=batch_size, n_jobs=n_jobs)
    batch, d = box.x0.shape
    scores = torch.as_tensor(attributions, device=box.x0.device)
    if scores.shape != (batch, d):
        raise ValueError(f"attributions must have shape {(batch, d)} like X, got {tuple(scores.shape)}")
    check_finite("attributions", scores)
    counts = tuple(range(1, d + 1)) if ks is None else tuple(int(k) for k in ks)
    if not counts or not all(1 <= k <= d for k in counts):
        raise ValueError(f"ks must be numbers of features in [1, {d}], got {ks}")
    base = as_baseline(baseline, box.x0)
    rank = ranks(scores.abs(), descending=order == "top")
    draw = torch.Generator().manual_seed(draw_seed(generator))
    noise = sigma * torch.randn(repeats, batch, d, generator=draw, dtype=torch.float64).to(box.x0)

    changes = {kind: torch.empty(batch, len(counts), dtype=torch.float64) for kind in kinds}
    with box.evaluating():
        for column, k in enumerate(counts):
            changed = rank < k
            for kind in kinds:
                if kind == "binary":
                    x = torch.where(changed, base, box.x0)[:, None]
                else:
                    x = (box.x0 + changed * noise).transpose(0, 1)
                moved = (box.values(x) - box.f_x0[:, None]).abs().mean(1)
                changes[kind][:, column] = moved.cpu()
    return PerturbationTest(counts, order, changes)


def ranks(scores: Float[Tensor, "batch d"], *, descending: bool) -> Float[Tensor, "batch d"]:
    """Place of every feature, 0 first; ties in the order of the features."""
    order = torch.argsort(scores, dim=1, stable=True, descending=descending)
    return torch.argsort(order, dim=1).to(scores.dtype)
