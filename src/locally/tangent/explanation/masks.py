"""Neighbourhoods of masks: features, or groups of them, present or removed.

LIME, KernelSHAP and Occlusion differ only in how they weight the masks. Source: Han, Srinivas, Lakkaraju, arXiv
2206.01254, Table 1; the Shapley kernel is that of Lundberg and Lee, arXiv 1705.07874.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from locally.checks import check_choice, check_positive
from locally.tangent.explanation.neighbourhoods import (
    Draws,
    Estimator,
    MultiplicativeNeighbourhood,
    shared_draws,
)


@dataclass(frozen=True, eq=False)
class BinaryMask(MultiplicativeNeighbourhood):
    """xi in {0, 1}^q: features (or groups) present or removed. Neighbourhood of LIME and KernelSHAP.

    Args:
        kernel: "exponential" (LIME), "shapley" (KernelSHAP, with g pinned to f at no and at all features), "uniform".
        width: kernel width of the exponential kernel, in the units that the convention measures distances in.
        convention: what the exponential kernel means by its width: exp(-D^2/width^2) with the distance D over x
            ("paper"), exp(-D^2 / (2 width^2)) ("captum"), or sqrt(exp(-D^2/width^2)) with D^2 the number of removed
            features ("lime"; that package takes width = 0.75 sqrt(d)).
        groups: group number of each feature, 0..q-1.
        importance: draw from the kernel itself with (nearly) equal weights (True) or, like the authors' code, draw fair
            coins and weight them (False). Both have the same limit; the second loses effective samples where the
            kernel is far from uniform, with the Shapley kernel nearly all of them.
        paired: draw each mask with its complement, which cancels interactions of even order.
    """

    kernel: str = "uniform"
    width: float = 1.0
    convention: str = "paper"
    groups: Int[ndarray, " d"] | None = field(default=None)
    importance: bool = True
    paired: bool = True

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, ("exponential", "shapley", "uniform"))
        check_choice("convention", self.convention, ("paper", "captum", "lime"))
        check_positive("width", self.width)
        check_groups(self.groups)

    def draw(self, x0, baseline, n, generator):
        q = self.noise_size(x0.shape[1])
        if self.kernel == "shapley" and q == 1:
            return self._empty(x0)
        if self.kernel == "shapley" and self.importance:
            return self._from_shapley_kernel(x0, q, n, generator)
        pairs = (n + 1) // 2 if self.paired else n
        uniform = torch.rand(pairs, q, generator=generator, dtype=torch.float64).to(x0.device)
        if self.paired:
            uniform = torch.stack([uniform, 1 - uniform], 1).reshape(-1, q)[:n]
        if self.kernel == "exponential" and self.importance:
            return self._from_exponential_kernel(x0, baseline, uniform)
        masks = (uniform < 0.5).double()
        log_weight = self._log_kernel(x0, baseline, masks)
        return Draws(masks[None], log_weight, self._pins(x0, q), 2 if self.paired else 1)

    def enumerate(self, x0, baseline, budget):
        """All 2^q masks."""
        q = self.noise_size(x0.shape[1])
        if q > 40 or 2**q > budget:
            return None
        if self.kernel == "shapley" and q == 1:
            return self._empty(x0)
        codes = torch.arange(2**q, device=x0.device)
        masks = ((codes[:, None] >> torch.arange(q, device=x0.device)) & 1).double()
        if self.kernel == "shapley":
            masks = masks[1:-1]
        log_weight = self._log_kernel(x0, baseline, masks)
        return Draws(masks[None], log_weight, self._pins(x0, q), estimator=Estimator.ENUMERATED)

    def _from_exponential_kernel(self, x0: Tensor, baseline: Tensor, uniform: Float[Tensor, "n q"]) -> Draws:
        """The squared distance adds up over removed groups, so the kernel is a product: one coin for each group."""
        q = uniform.shape[1]
        cost = self._removal_cost(x0, baseline)[:, None]
        # A group far from the baseline would never be removed and so not be identified: remove each with probability
        # at least 1/q (about one a mask) and let weights make up for it.
        remove = torch.sigmoid(-cost).clamp_min(min(0.25, 1 / q))
        removed = uniform >= 1 - remove
        ratio = torch.where(
            removed,
            torch.nn.functional.logsigmoid(-cost) - remove.log(),
            torch.nn.functional.logsigmoid(cost) - torch.log1p(-remove),
        )
        masks = (~removed).double()
        return Draws(masks, ratio.sum(2), masks.new_zeros(0, q), 2 if self.paired else 1)

    def _from_shapley_kernel(self, x0: Tensor, q: int, n: int, generator: torch.Generator) -> Draws:
        """Coalition sizes k with probability ~ 1/(k (q-k)), stratified, and a uniform subset of each size."""
        sizes = torch.arange(1, q, dtype=torch.float64)
        cumulative = torch.cumsum(1 / (sizes * (q - sizes)), 0)
        subsets = (n + 1) // 2 if self.paired else n
        strata = (torch.randperm(subsets, generator=generator) + torch.rand(1, generator=generator)) / subsets
        k = 1 + torch.searchsorted(cumulative / cumulative[-1], strata.double()).clamp_max(q - 2)
        ranks = torch.rand(subsets, q, generator=generator).argsort(1).argsort(1)
        masks = (ranks < k[:, None]).double()
        if self.paired:
            masks = torch.stack([masks, 1 - masks], 1).reshape(-1, q)[:n]
        return shared_draws(x0, masks, pinned=self._pins(x0, q), block=2 if self.paired else 1)

    def _log_kernel(self, x0: Tensor, baseline: Tensor, masks: Tensor) -> Float[Tensor, "weighted n"]:
        if self.kernel == "uniform":
            return masks.new_zeros(1, masks.shape[0])
        if self.kernel == "exponential":
            return -self._removal_cost(x0, baseline) @ (1 - masks).T
        q, k = masks.shape[1], masks.sum(1)
        log_choose = math.lgamma(q + 1) - torch.lgamma(k + 1) - torch.lgamma(q - k + 1)
        log_weight = math.log(q - 1) - log_choose - k.log() - (q - k).log()
        # No and all features have infinite weight: they are pinned, not sampled.
        return log_weight.masked_fill((k == 0) | (k == q), -math.inf)[None]

    def _removal_cost(self, x0: Tensor, baseline: Tensor) -> Float[Tensor, "batch q"]:
        """What removing each group adds to minus the logarithm of the exponential kernel."""
        if self.convention == "lime":
            q = self.noise_size(x0.shape[1])
            return torch.full((x0.shape[0], q), 0.5 / self.width**2, dtype=torch.float64, device=x0.device)
        squared = self._sum_groups((x0 - baseline).double() ** 2)
        return squared / (self.width**2 * (2 if self.convention == "captum" else 1))

    def _pins(self, x0: Tensor, q: int) -> Float[Tensor, "pins q"]:
        if self.kernel != "shapley":
            return torch.zeros(0, q, dtype=torch.float64, device=x0.device)
        return torch.stack([torch.zeros(q, dtype=torch.float64), torch.ones(q, dtype=torch.float64)]).to(x0.device)

    def _empty(self, x0: Tensor) -> Draws:
        """One feature: the two pins say everything."""
        nothing = torch.zeros(1, 0, 1, dtype=torch.float64, device=x0.device)
        return Draws(nothing, nothing[..., 0], self._pins(x0, 1), estimator=Estimator.ENUMERATED)


@dataclass(frozen=True, eq=False)
class LeaveOneOut(MultiplicativeNeighbourhood):
    """Masks with exactly one feature (or group) removed, all alike likely. Neighbourhood of Occlusion.

    g is pinned to f at x0 itself. That is the paper's regression of f(x0) - f(x0 without i) on one-hot vectors without
    intercept, written in the mask coordinates of the other binary methods.
    """

    groups: Int[ndarray, " d"] | None = field(default=None)

    def __post_init__(self) -> None:
        check_groups(self.groups)

    def draw(self, x0, baseline, n, generator):
        q = self.noise_size(x0.shape[1])
        removed = torch.randint(q, (n,), generator=generator)
        masks = 1 - torch.nn.functional.one_hot(removed, q).double()
        return shared_draws(x0, masks, pinned=torch.ones(1, q, dtype=torch.float64))

    def enumerate(self, x0, baseline, budget):
        """All q masks, whatever the budget: with fewer, the weights are not identified."""
        q = self.noise_size(x0.shape[1])
        masks = 1 - torch.eye(q, dtype=torch.float64)
        pin = torch.ones(1, q, dtype=torch.float64)
        return shared_draws(x0, masks, pinned=pin, estimator=Estimator.ENUMERATED)


def check_groups(groups: Int[ndarray, " d"] | None) -> None:
    if groups is None:
        return
    if not isinstance(groups, np.ndarray) or not np.issubdtype(groups.dtype, np.integer):
        raise TypeError(f"groups must be an array of integers, got {groups!r}")
    if not np.array_equal(np.unique(groups), np.arange(groups.max() + 1)):
        raise ValueError("groups must use every number from 0 to its largest")
