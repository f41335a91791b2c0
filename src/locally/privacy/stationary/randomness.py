"""Where noise and samples come from: a seeded generator for experiments, the operating system for real data.

A guarantee is void if the noise can be guessed, so the default everywhere is the operating system's cryptographic
source. A seed makes a run repeatable and the guarantee worthless against whoever knows it.
"""

import math
import os
import secrets

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Randomness:
    """Draws from a `torch.Generator`, on its device, moved to where they are needed."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, like: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Standard normals with the shape, dtype and device of `like`."""
        device = self.generator.device
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=device).to(like.device)

    def uniform(self, count: int) -> Float[Tensor, " count"]:
        """Double-precision uniforms in [0, 1)."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64, device=self.generator.device).cpu()

    def integer(self, low: int, high: int) -> int:
        """Uniform in {low, ..., high - 1}."""
        return int(torch.randint(low, high, (), generator=self.generator, device=self.generator.device))

    def permutation(self, n: int) -> Int[Tensor, " n"]:
        """0, ..., n - 1 in a uniformly random order."""
        return self.uniform(n).argsort()

    def subset(self, n: int, size: int) -> Int[Tensor, " size"]:
        """`size` distinct indices below n, every subset equally likely."""
        return self.permutation(n)[:size]

    def poisson_sample(self, n: int, rate: float) -> Int[Tensor, " picked"]:
        """Each index below n independently with probability `rate`."""
        return torch.nonzero(self.uniform(n) < rate).squeeze(1)


class SecureRandomness(Randomness):
    """Draws from the operating system's cryptographic generator; cannot be seeded."""

    def __init__(self) -> None:
        pass

    def normal(self, like: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        count = like.numel()
        pairs = (count + 1) // 2
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(pairs)))  # Box-Muller; 1 - u is never 0
        angle = 2 * math.pi * self.uniform(pairs)
        drawn = torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
        return drawn.reshape(like.shape).to(like)

    def uniform(self, count: int) -> Float[Tensor, " count"]:
        if count == 0:
            return torch.zeros(0, dtype=torch.float64)
        bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
        return (bits & (2**53 - 1)).double() / 2**53

    def integer(self, low: int, high: int) -> int:
        return low + secrets.randbelow(high - low)


def as_randomness(rng: int | torch.Generator | Randomness | None) -> Randomness:
    """A seed, a generator, a source as it is, or None for the operating system's."""
    if rng is None:
        return SecureRandomness()
    if isinstance(rng, Randomness):
        return rng
    if isinstance(rng, torch.Generator):
        return Randomness(rng)
    return Randomness(torch.Generator().manual_seed(int(rng)))
