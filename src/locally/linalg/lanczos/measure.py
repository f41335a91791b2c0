"""Spectral measures: what stochastic Lanczos quadrature returns."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.checks import check_between, check_count, check_positive


@dataclass(frozen=True)
class Estimate:
    """A mean over independent probes; the standard error is NaN for a single one."""

    value: float
    stderr: float


@dataclass(frozen=True)
class SpectralMeasure:
    """The eigenvalue distribution of a p x p matrix, as `probes` Gauss quadratures of total weight 1 each.

    Attributes:
        nodes, weights: Ritz values of each probe in ascending order, and squared first components of the eigenvectors.
        steps: Lanczos steps behind each probe; past an exhausted space nodes are zero and weigh nothing.
        size: p.
    """

    nodes: Float[Tensor, "probes m"]
    weights: Float[Tensor, "probes m"]
    steps: Int[Tensor, " probes"]
    size: int

    @property
    def largest(self) -> float:
        """The largest Ritz value: never above the largest eigenvalue, and close to it after some tens of steps."""
        return float(self._seen().max())

    @property
    def smallest(self) -> float:
        """The smallest Ritz value: never below the smallest eigenvalue."""
        return float(self._seen().min())

    def trace(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """tr f(A), for a function of a tensor of eigenvalues, element by element.

        Raises:
            ValueError: `function` is not finite at a node that has weight.

        >>> from locally.linalg.lanczos import spectral_measure
        >>> measure = spectral_measure(torch.diag(torch.arange(1.0, 11.0)), steps=10, probes=2)
        >>> round(measure.trace(torch.log).value, 3)  # log 10!
        15.104
        """
        weigh = self.weights > 0
        values = torch.where(weigh, function(torch.where(weigh, self.nodes, self._seen().max())), 0)
        if not values.isfinite().all():
            bad = self.nodes[~values.isfinite()][0]
            raise ValueError(f"function is not finite at the Ritz value {float(bad):.6g}")
        each = self.size * (self.weights * values).sum(1)
        stderr = float(each.std() / len(each) ** 0.5) if len(each) > 1 else math.nan
        return Estimate(float(each.mean()), stderr)

    def moment(self, order: int) -> Estimate:
        """tr(A^order) / p; exact for each probe up to order 2 m - 1."""
        check_count("order", order, at_least=0)
        found = self.trace(lambda x: x**order)
        return Estimate(found.value / self.size, found.stderr / self.size)

    def density(self, grid: Float[Tensor, " g"], width: float | None = None) -> Float[Tensor, " g"]:
        """The density at `grid`, each node spread to a normal of standard deviation `width`: 1 % of the range."""
        if width is None:
            width = max(0.01 * (self.largest - self.smallest), 1e-12 * max(abs(self.largest), 1e-300))
        check_positive("width", width)
        z = (grid.double()[:, None] - self.nodes.flatten()) / width
        bells = torch.exp(-z.square() / 2) / (width * math.sqrt(2 * math.pi))
        return bells @ self.weights.flatten() / len(self.nodes)

    def cumulative(self, x: float) -> float:
        """The fraction of eigenvalues at or below x."""
        return float(self.weights[self.nodes <= x].sum() / len(self.nodes))

    def quantile(self, q: float) -> float:
        """The smallest node with at least the fraction q of the eigenvalues at or below it, q in [0, 1]."""
        check_between("q", q, 0, 1)
        nodes, order = self._seen_sorted()
        total = order.cumsum(0) / len(self.nodes)
        at = int(torch.searchsorted(total, torch.tensor(q * (1 - 1e-12), dtype=total.dtype, device=total.device)))
        return float(nodes[min(at, len(nodes) - 1)])

    def _seen(self) -> Tensor:
        """Nodes that stand for Lanczos steps, not for the padding after an exhausted space."""
        padded = self.steps < self.nodes.shape[1]
        return self.nodes[~padded[:, None] | (self.weights > 0)]

    def _seen_sorted(self) -> tuple[Tensor, Tensor]:
        seen = self.weights > 0
        nodes, order = self.nodes[seen].sort()
        return nodes, self.weights[seen][order]
