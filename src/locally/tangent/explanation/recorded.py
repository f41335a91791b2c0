"""Neighbourhoods of the user's own: recorded perturbations and sampling functions.

For perturbations that no formula describes, such as the noise that a sensor was seen to have or the patterns in which
values go missing. The last step of the guiding principle of arXiv 2206.01254, section 5: if no method fits,
build the neighbourhood.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from locally.tangent.explanation.neighbourhoods import (
    AdditiveNeighbourhood,
    Draws,
    Estimator,
    MultiplicativeNeighbourhood,
    Space,
    shared_draws,
)


class Empirical:
    """Neighbourhoods made of recorded noise or of a sampling function: the perturbations that a user really sees."""

    @staticmethod
    def additive(
        noise: Float[ndarray, "m d"] | Float[Tensor, "m d"], weight: Sequence[float] | None = None
    ) -> "RecordedNoise":
        """x0 plus one of the m rows of `noise`, with probability proportional to `weight`."""
        return RecordedNoise(torch.as_tensor(noise, dtype=torch.float64), record_weight(noise, weight))

    @staticmethod
    def multiplicative(
        noise: Float[ndarray, "m d"] | Float[Tensor, "m d"], weight: Sequence[float] | None = None
    ) -> "RecordedScales":
        """b + row * (x0 - b), e.g. the patterns of missing values of a data set as rows of zeros and ones."""
        return RecordedScales(torch.as_tensor(noise, dtype=torch.float64), record_weight(noise, weight))

    @staticmethod
    def sampler(
        sample: Callable[[Tensor, int, torch.Generator], Tensor], space: Space | str = Space.INPUT
    ) -> "SampledNoise | SampledScales":
        """`sample(x0, n, generator)` returns noise of shape (1 or batch, n, d): additive in the input space, factors
        on x0 - b in the noise space."""
        return SampledNoise(sample) if Space(space) is Space.INPUT else SampledScales(sample)


@dataclass(frozen=True, eq=False)
class RecordedNoise(AdditiveNeighbourhood):
    """See `Empirical.additive`."""

    noise: Float[Tensor, "m d"]
    weight: Float[Tensor, " m"]

    def draw(self, x0, baseline, n, generator):
        return resample(x0, self.noise, self.weight, n, generator)

    def enumerate(self, x0, baseline, budget):
        return all_records(x0, self.noise, self.weight, budget)


@dataclass(frozen=True, eq=False)
class RecordedScales(MultiplicativeNeighbourhood):
    """See `Empirical.multiplicative`."""

    noise: Float[Tensor, "m d"]
    weight: Float[Tensor, " m"]

    def draw(self, x0, baseline, n, generator):
        return resample(x0, self.noise, self.weight, n, generator)

    def enumerate(self, x0, baseline, budget):
        return all_records(x0, self.noise, self.weight, budget)


@dataclass(frozen=True, eq=False)
class SampledNoise(AdditiveNeighbourhood):
    """See `Empirical.sampler`."""

    sample: Callable[[Tensor, int, torch.Generator], Tensor]

    def draw(self, x0, baseline, n, generator):
        return sampled(x0, self.sample(x0, n, generator), n)


@dataclass(frozen=True, eq=False)
class SampledScales(MultiplicativeNeighbourhood):
    """See `Empirical.sampler`."""

    sample: Callable[[Tensor, int, torch.Generator], Tensor]

    def draw(self, x0, baseline, n, generator):
        return sampled(x0, self.sample(x0, n, generator), n)


def resample(x0: Tensor, noise: Tensor, weight: Tensor, n: int, generator: torch.Generator) -> Draws:
    check_records(x0, noise)
    chosen = torch.multinomial(weight, n, replacement=True, generator=generator)
    return shared_draws(x0, noise[chosen])


def all_records(x0: Tensor, noise: Tensor, weight: Tensor, budget: int) -> Draws | None:
    check_records(x0, noise)
    if noise.shape[0] > budget:
        return None
    return shared_draws(x0, noise, weight.log(), estimator=Estimator.ENUMERATED)


def sampled(x0: Tensor, noise: Tensor, n: int) -> Draws:
    if noise.ndim != 3 or noise.shape[0] not in (1, x0.shape[0]) or noise.shape[1:] != (n, x0.shape[1]):
        raise ValueError(
            f"sample must return noise of shape (1 or {x0.shape[0]}, {n}, {x0.shape[1]}), got {tuple(noise.shape)}"
        )
    noise = noise.to(x0.device, torch.float64)
    return Draws(noise, noise.new_zeros(1, n), noise.new_zeros(0, x0.shape[1]))


def check_records(x0: Tensor, noise: Tensor) -> None:
    if noise.shape[1] != x0.shape[1]:
        raise ValueError(f"noise has {noise.shape[1]} features, but x0 has {x0.shape[1]}")


def record_weight(noise: ndarray | Tensor, weight: Sequence[float] | None) -> Float[Tensor, " m"]:
    m = len(noise)
    w = torch.ones(m, dtype=torch.float64) if weight is None else torch.as_tensor(weight, dtype=torch.float64)
    if w.shape != (m,) or not bool(w.isfinite().all()) or bool((w < 0).any()) or not bool(w.sum() > 0):
        raise ValueError(f"weight must be {m} non-negative numbers, not all zero")
    return w
