"""Neighbourhoods: the perturbations of a point under which an explanation has to be faithful.

A neighbourhood draws noise xi and says which input x it stands for: x0 + xi in the additive family, b + xi * (x0 - b)
in the multiplicative one, with a baseline b. Where the expectation over xi can be had without sampling (all masks of a
few features, quadrature along a line), it offers the exact draws too. Source: Han, Srinivas, Lakkaraju, arXiv
2206.01254, Table 1.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from locally.checks import check_between, check_count, check_nonnegative


class Space(StrEnum):
    """The coordinates in which an explanation has its slopes.

    For a linear f = w.x, slopes over the input are w and slopes over multiplicative noise are w * (x0 - b): comparing
    the two is the classic error, so every result carries its space.
    """

    INPUT = "input"
    NOISE = "noise"


class Estimator(StrEnum):
    """How the expectation over a neighbourhood was taken."""

    SAMPLED = "sampled"
    ENUMERATED = "enumerated"
    QUADRATURE = "quadrature"


@dataclass(frozen=True)
class Draws:
    """Noise with its weights; a leading dimension of 1 means that all points of the batch share it.

    Attributes:
        noise: xi.
        log_weight: logarithm of the unnormalised weights, so that far perturbations cannot underflow together.
        pinned: noise of infinite weight, at which g has to equal f.
        block: rows drawn together (2 for antithetic pairs): standard errors count blocks, not rows.
        estimator: whether the draws are a sample or stand for the whole neighbourhood.
    """

    noise: Float[Tensor, "shared n q"]
    log_weight: Float[Tensor, "weighted n"]
    pinned: Float[Tensor, "pins q"]
    block: int = 1
    estimator: Estimator = Estimator.SAMPLED

    def weights(self) -> Float[Tensor, "weighted n"]:
        """Weights that sum to one.

        Raises:
            ValueError: all weights of a point are zero.
        """
        if self.log_weight.shape[1] and bool((self.log_weight == -math.inf).all(1).any()):
            raise ValueError("all weights of the neighbourhood are zero")
        return torch.softmax(self.log_weight, 1)


class Neighbourhood(ABC):
    """What to subclass for perturbations of one's own: `draw` and `perturb`; the rest has defaults.

    `AdditiveNeighbourhood` and `MultiplicativeNeighbourhood` bring `perturb` along and leave only `draw`.
    """

    space: Space = Space.INPUT

    @abstractmethod
    def draw(
        self, x0: Float[Tensor, "batch d"], baseline: Float[Tensor, "batch d"], n: int, generator: torch.Generator
    ) -> Draws:
        """n draws of the noise, in float64, from a generator on the CPU (so that every device sees the same ones)."""

    @abstractmethod
    def perturb(
        self, x0: Float[Tensor, "batch d"], baseline: Float[Tensor, "batch d"], noise: Float[Tensor, "shared n q"]
    ) -> Float[Tensor, "batch n d"]:
        """The inputs that the noise stands for."""

    def noise_size(self, d: int) -> int:
        """q, the number of coordinates of the noise."""
        return d

    def enumerate(self, x0: Float[Tensor, "batch d"], baseline: Float[Tensor, "batch d"], budget: int) -> Draws | None:
        """Weighted noise that stands for the whole neighbourhood, if at most `budget` evaluations do."""
        return None

    def pullback(
        self,
        x0: Float[Tensor, "batch d"],
        baseline: Float[Tensor, "batch d"],
        noise: Float[Tensor, "shared n q"],
        gradient: Float[Tensor, "batch n d"],
    ) -> Float[Tensor, "batch n q"]:
        """Chain rule: a gradient over x becomes one over the noise."""
        with torch.enable_grad():
            free = noise.detach().expand(x0.shape[0], -1, -1).clone().requires_grad_(True)
            x = self.perturb(x0, baseline, free)
            (pulled,) = torch.autograd.grad(x, free, gradient.to(x.dtype))
        return pulled.double()

    def noise_at(
        self,
        x0: Float[Tensor, "batch d"],
        baseline: Float[Tensor, "batch d"],
        x: Float[Tensor, "batch n d"],
        floor: float,
    ) -> Float[Tensor, "batch n q"]:
        """The noise that leads from x0 to x, so that g can be evaluated at any input."""
        raise TypeError(f"{type(self).__name__} cannot say which noise leads to a given input: define noise_at")

    def input_slopes(
        self,
        x0: Float[Tensor, "batch d"],
        baseline: Float[Tensor, "batch d"],
        slopes: Float[Tensor, "batch q"],
        floor: float,
    ) -> Float[Tensor, "batch d"]:
        """Slopes over the noise as slopes over the input."""
        with torch.enable_grad():
            x = x0[:, None].detach().double().requires_grad_(True)
            u = self.noise_at(x0, baseline, x, floor)
            (over_input,) = torch.autograd.grad((u * slopes[:, None]).sum(), x)
        return over_input[:, 0]


class AdditiveNeighbourhood(Neighbourhood):
    """x = x0 + xi: continuous noise on the features. Slopes over xi are slopes over the input."""

    space = Space.INPUT

    def perturb(self, x0, baseline, noise):
        return x0[:, None] + noise.to(x0.dtype)

    def pullback(self, x0, baseline, noise, gradient):
        return gradient

    def noise_at(self, x0, baseline, x, floor):
        return (x - x0[:, None]).double()


class MultiplicativeNeighbourhood(Neighbourhood):
    """x = b + xi * (x0 - b): features scaled towards a baseline b. Slopes over xi carry a factor x0 - b.

    `groups` gives each feature the number of the group that is scaled as one (superpixels, one-hot columns); features
    stand alone without it.
    """

    space = Space.NOISE
    groups: Int[ndarray, " d"] | None = None

    def noise_size(self, d: int) -> int:
        if self.groups is None:
            return d
        if len(self.groups) != d:
            raise ValueError(f"groups names {len(self.groups)} features, but x0 has {d}")
        return int(self.groups.max()) + 1

    def perturb(self, x0, baseline, noise):
        per_feature = noise if self.groups is None else noise[..., self._group_index(noise.device)]
        return baseline[:, None] + per_feature.to(x0.dtype) * (x0 - baseline)[:, None]

    def pullback(self, x0, baseline, noise, gradient):
        return self._sum_groups((x0 - baseline).double()[:, None] * gradient)

    def noise_at(self, x0, baseline, x, floor):
        # Least squares over each group: the scale that best leads from the baseline to x. Where x0 has hardly left the
        # baseline (within `floor`), no scaling moves the feature and the slope over x fades to zero.
        away = (x0 - baseline).double()
        scale = self._sum_groups(away**2).clamp_min(max(floor, torch.finfo(torch.float64).tiny) ** 2)
        return self._sum_groups(away[:, None] * (x - baseline[:, None]).double()) / scale[:, None]

    def _group_index(self, device: torch.device) -> Tensor:
        return torch.as_tensor(self.groups, device=device)

    def _sum_groups(self, v: Tensor) -> Tensor:
        if self.groups is None:
            return v
        sums = v.new_zeros(*v.shape[:-1], self.noise_size(v.shape[-1]))
        return sums.index_add(-1, self._group_index(v.device), v)


@dataclass(frozen=True, eq=False)
class GaussianNoise(AdditiveNeighbourhood):
    """Additive N(0, sigma^2): sensor noise. Neighbourhood of C-LIME, SmoothGrad and, at sigma = 0, the gradient.

    Args:
        sigma: standard deviation, one for all features or one for each, in the units of the input; 0 is the limit in
            which only x0 itself remains.
        antithetic: draw xi together with -xi, which removes the sampling error of all even parts of f.
    """

    sigma: float | Shaped[ndarray, " d"] | Float[Tensor, " d"] = 0.1
    antithetic: bool = True

    def __post_init__(self) -> None:
        if np.ndim(self.sigma) == 0:
            check_nonnegative("sigma", self.sigma)  # type: ignore[arg-type]
        elif not bool((torch.as_tensor(self.sigma) >= 0).all()):
            raise ValueError("sigma must be non-negative for every feature")

    @property
    def sigma_is_zero(self) -> bool:
        """Whether this is the limit in which only x0 remains."""
        return bool((torch.as_tensor(self.sigma) == 0).all())

    def draw(self, x0, baseline, n, generator):
        d = x0.shape[1]
        sigma = self._scale(d)
        if not self.antithetic:
            return shared_draws(x0, sigma * torch.randn(n, d, generator=generator, dtype=torch.float64))
        half = sigma * torch.randn((n + 1) // 2, d, generator=generator, dtype=torch.float64)
        return shared_draws(x0, torch.stack([half, -half], 1).reshape(-1, d)[:n], block=2)

    def enumerate(self, x0, baseline, budget):
        """The point itself at sigma = 0; a Gauss-Hermite product rule in at most three dimensions."""
        d = x0.shape[1]
        sigma = self._scale(d)
        if self.sigma_is_zero:
            return shared_draws(x0, torch.zeros(1, d, dtype=torch.float64), estimator=Estimator.QUADRATURE)
        nodes = math.floor(budget ** (1 / d) + 1e-9)
        if d > 3 or nodes < 3:
            return None
        at, weight = gauss_hermite(min(nodes, 64))
        grid = torch.cartesian_prod(*[torch.from_numpy(at)] * d).reshape(-1, d)
        logs = torch.cartesian_prod(*[torch.from_numpy(np.log(weight))] * d).reshape(-1, d).sum(1)
        return shared_draws(x0, sigma * grid, logs, estimator=Estimator.QUADRATURE)

    def _scale(self, d: int) -> Float[Tensor, " d"]:
        sigma = torch.as_tensor(self.sigma, dtype=torch.float64).cpu()
        if sigma.ndim and sigma.shape != (d,):
            raise ValueError(f"sigma must be one number or one for each of the {d} features, got {tuple(sigma.shape)}")
        return sigma.expand(d)


@dataclass(frozen=True, eq=False)
class ScaleNoise(MultiplicativeNeighbourhood):
    """xi = alpha * 1 with alpha ~ U(low, high): the whole input fades towards the baseline.

    Neighbourhood of integrated gradients (low = 0) and, at low = high = 1, of gradient x input.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_between("high", self.high, -1e300, 1e300)
        check_between("low", self.low, -1e300, self.high)

    def draw(self, x0, baseline, n, generator):
        half = torch.rand((n + 1) // 2, generator=generator, dtype=torch.float64)
        alpha = self.low + (self.high - self.low) * torch.stack([half, 1 - half], 1).reshape(-1)[:n]
        return shared_draws(x0, alpha[:, None].expand(-1, x0.shape[1]), block=2)

    def enumerate(self, x0, baseline, budget):
        """Gauss-Legendre quadrature in alpha; one node where low = high."""
        at, weight = gauss_legendre(1 if self.low == self.high else budget)
        alpha = torch.from_numpy(self.low + (self.high - self.low) * at)
        noise = alpha[:, None].expand(-1, x0.shape[1])
        return shared_draws(x0, noise, torch.from_numpy(np.log(weight)), estimator=Estimator.QUADRATURE)


@dataclass(frozen=True, eq=False)
class Segment(AdditiveNeighbourhood):
    """Uniform on the segment from x0 to `end`, (d,): where a no-free-lunch certificate points."""

    end: Float[Tensor, " d"]

    def draw(self, x0, baseline, n, generator):
        half = torch.rand((n + 1) // 2, generator=generator, dtype=torch.float64)
        t = torch.stack([half, 1 - half], 1).reshape(-1)[:n]
        return self._at(x0, t, torch.zeros(n, dtype=torch.float64), 2, Estimator.SAMPLED)

    def enumerate(self, x0, baseline, budget):
        at, weight = gauss_legendre(budget)
        return self._at(x0, torch.from_numpy(at), torch.from_numpy(np.log(weight)), 1, Estimator.QUADRATURE)

    def _at(self, x0: Tensor, t: Tensor, log_weight: Tensor, block: int, estimator: Estimator) -> Draws:
        towards = self.end.to(x0.device, torch.float64) - x0.double()
        noise = t.to(x0.device)[None, :, None] * towards[:, None]
        return Draws(noise, log_weight[None].to(x0.device), noise.new_zeros(0, x0.shape[1]), block, estimator)


def shared_draws(
    x0: Float[Tensor, "batch d"],
    noise: Float[Tensor, "n q"],
    log_weight: Float[Tensor, " n"] | None = None,
    *,
    pinned: Float[Tensor, "pins q"] | None = None,
    block: int = 1,
    estimator: Estimator = Estimator.SAMPLED,
) -> Draws:
    """Draws that all points share (common random numbers), on the device of x0."""
    n, q = noise.shape
    log_weight = noise.new_zeros(n) if log_weight is None else log_weight
    pinned = noise.new_zeros(0, q) if pinned is None else pinned
    device = x0.device
    return Draws(noise.to(device)[None], log_weight.to(device)[None], pinned.to(device), block, estimator)


@lru_cache(maxsize=32)
def gauss_legendre(nodes: int) -> tuple[Float[ndarray, " nodes"], Float[ndarray, " nodes"]]:
    """Nodes in (0, 1) and weights that sum to one."""
    from scipy.special import roots_legendre

    check_count("nodes", nodes)
    at, weight = roots_legendre(nodes)
    return (at + 1) / 2, weight / 2


@lru_cache(maxsize=32)
def gauss_hermite(nodes: int) -> tuple[Float[ndarray, " nodes"], Float[ndarray, " nodes"]]:
    """Nodes and weights for the standard normal distribution."""
    from scipy.special import roots_hermitenorm

    at, weight = roots_hermitenorm(nodes)
    return at, weight / weight.sum()
