"""What a network's outputs say about its targets: the middle factor of the Fisher matrix, exactly or by sampling.

Each likelihood knows p(y | outputs) through the curvature and the score of -log p with respect to the outputs; leading
dimension of the outputs = examples.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from locally.checks import check_positive


@runtime_checkable
class Likelihood(Protocol):
    """Any object with these two methods serves as the likelihood of a `Fisher`."""

    def information(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """E_y[s s^T] tangent, example by example, s the gradient of -log p(y | outputs); shaped like the outputs."""

    def sample_scores(self, outputs: Tensor, count: int, generator: Generator) -> Tensor:
        """`count` draws of s with y drawn from the model itself; shape (count, *outputs.shape)."""


@dataclass(frozen=True)
class Categorical:
    """Softmax over dimension `dim` of the outputs (torch's class dimension is 1), one draw per remaining position."""

    dim: int = 1

    def information(self, outputs: Float[Tensor, "..."], tangent: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(diag(p) - p p^T) times the tangent, at every position."""
        p = outputs.softmax(self.dim)
        return p * (tangent - (p * tangent).sum(self.dim, keepdim=True))

    def sample_scores(
        self, outputs: Float[Tensor, "..."], count: int, generator: Generator
    ) -> Float[Tensor, "count ..."]:
        """p - e_y, with y drawn from p at every position."""
        p = outputs.softmax(self.dim).movedim(self.dim, -1)
        drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), count, replacement=True, generator=generator)
        hits = torch.nn.functional.one_hot(drawn.T, p.shape[-1]).to(p.dtype)
        return (p - hits.reshape(count, *p.shape)).movedim(-1, self.dim + 1 if self.dim >= 0 else self.dim)


@dataclass(frozen=True)
class Bernoulli:
    """Every output is the logit of an independent coin."""

    def information(self, outputs: Float[Tensor, "..."], tangent: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """p (1 - p) times the tangent, entry by entry."""
        p = outputs.sigmoid()
        return p * (1 - p) * tangent

    def sample_scores(
        self, outputs: Float[Tensor, "..."], count: int, generator: Generator
    ) -> Float[Tensor, "count ..."]:
        """p - y, with y = 1 with probability p."""
        p = outputs.sigmoid().expand(count, *outputs.shape)
        return p - torch.bernoulli(p, generator=generator)


@dataclass(frozen=True)
class Gaussian:
    """Every output is the mean of an independent normal variable of the given variance, > 0."""

    variance: float = 1.0

    def __post_init__(self) -> None:
        check_positive("variance", self.variance)

    def information(self, outputs: Float[Tensor, "..."], tangent: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The tangent over the variance."""
        return tangent / self.variance

    def sample_scores(
        self, outputs: Float[Tensor, "..."], count: int, generator: Generator
    ) -> Float[Tensor, "count ..."]:
        """Normal draws of variance 1 / variance."""
        shape = (count, *outputs.shape)
        noise = torch.randn(shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return noise / self.variance**0.5
