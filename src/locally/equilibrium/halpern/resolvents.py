"""Resolvents J_{eta G} = (Id + eta G)^{-1}: projections onto constraint sets, proximal maps, and products of them.

Each is called as J(z, eta) on a NumPy vector or a torch tensor (any device) and leaves z as it is. Any function with
that signature will do in their place, at the price of uncompiled steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_count, check_finite, check_nonnegative, check_positive
from locally.equilibrium.halpern.kernels import BALL, BOX, SHRINK, SIMPLEX, Pieces, resolve

ResolventLike = Callable[[Any, float], Any]


class Piece(NamedTuple):
    kind: int
    start: int
    stop: int
    size: float = 0.0
    lower: float | Float[ndarray, " width"] = 0.0
    upper: float | Float[ndarray, " width"] = 0.0


class Resolvent(ABC):
    """A resolvent that the compiled steps know. Called on z of shape (dim,) with eta > 0."""

    @abstractmethod
    def pieces(self, dim: int) -> list[Piece]:
        """What it does to which of `dim` coordinates; raises ValueError where it was made for another number."""

    @abstractmethod
    def apply_torch(self, z: Any, eta: float) -> Any:
        """J_{eta G}(z) for a torch tensor."""

    def __call__(self, z: Any, eta: float = 1.0) -> Any:
        if not isinstance(z, ndarray):
            return self.apply_torch(z, eta)
        out = z.copy()
        resolve(out, eta, tabulate(self, z.size, z.dtype))
        return out


@dataclass(frozen=True)
class Unconstrained(Resolvent):
    """G = 0: the identity."""

    def pieces(self, dim: int) -> list[Piece]:
        return []

    def apply_torch(self, z: Any, eta: float) -> Any:
        return z

    def __call__(self, z: Any, eta: float = 1.0) -> Any:
        return z


@dataclass(frozen=True)
class Simplex(Resolvent):
    """Projection onto {z >= 0, sum z = radius}: O(dim) per Newton step, of which a few suffice.

    >>> Simplex()(np.array([0.9, 0.5, -1.0])).round(3)
    array([0.7, 0.3, 0. ])
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        check_positive("radius", self.radius)

    def pieces(self, dim: int) -> list[Piece]:
        return [Piece(SIMPLEX, 0, dim, self.radius)]

    def apply_torch(self, z: Any, eta: float) -> Any:
        import torch

        ordered = z.sort(descending=True).values
        ranks = torch.arange(1, z.numel() + 1, dtype=z.dtype, device=z.device)
        levels = (ordered.cumsum(0) - self.radius) / ranks
        return (z - levels[(ordered > levels).sum() - 1]).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Box(Resolvent):
    """Projection onto lower <= z <= upper, scalars or one bound per coordinate; infinite bounds are allowed."""

    lower: float | Float[ndarray, " dim"] = -np.inf
    upper: float | Float[ndarray, " dim"] = np.inf

    def __post_init__(self) -> None:
        if not np.all(np.less_equal(self.lower, self.upper)):  # also where one of them is NaN
            raise ValueError(f"need lower <= upper in every coordinate, got {self.lower} and {self.upper}")

    def pieces(self, dim: int) -> list[Piece]:
        for name, bound in (("lower", self.lower), ("upper", self.upper)):
            if np.ndim(bound) and np.shape(bound) != (dim,):
                raise ValueError(f"{name} must be a number or have shape ({dim},), got shape {np.shape(bound)}")
        return [Piece(BOX, 0, dim, 0.0, self.lower, self.upper)]

    def apply_torch(self, z: Any, eta: float) -> Any:
        import torch

        lower, upper = (torch.as_tensor(bound, dtype=z.dtype, device=z.device) for bound in (self.lower, self.upper))
        return z.clamp(lower, upper)


@dataclass(frozen=True, eq=False)
class Ball(Resolvent):
    """Projection onto ||z - centre||_2 <= radius."""

    radius: float = 1.0
    centre: float | Float[ndarray, " dim"] = 0.0

    def __post_init__(self) -> None:
        check_positive("radius", self.radius)
        check_finite("centre", np.asarray(self.centre))

    def pieces(self, dim: int) -> list[Piece]:
        if np.ndim(self.centre) and np.shape(self.centre) != (dim,):
            raise ValueError(f"centre must be a number or have shape ({dim},), got shape {np.shape(self.centre)}")
        return [Piece(BALL, 0, dim, self.radius, self.centre)]

    def apply_torch(self, z: Any, eta: float) -> Any:
        import torch

        centre = torch.as_tensor(self.centre, dtype=z.dtype, device=z.device)
        distance = torch.linalg.vector_norm(z - centre)
        return torch.where(distance > self.radius, centre + (z - centre) * (self.radius / distance), z)


@dataclass(frozen=True)
class L1(Resolvent):
    """Proximal map of weight * ||z||_1: soft thresholding by eta * weight."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_nonnegative("weight", self.weight)

    def pieces(self, dim: int) -> list[Piece]:
        return [Piece(SHRINK, 0, dim, self.weight)]

    def apply_torch(self, z: Any, eta: float) -> Any:
        return z - z.clamp(-eta * self.weight, eta * self.weight)


@dataclass(frozen=True, eq=False)
class Product(Resolvent):
    """One resolvent per block of consecutive coordinates.

    Args:
        blocks: pairs (resolvent, number of coordinates), in order.

    >>> Product([(Simplex(), 2), (Box(0.0, 1.0), 1)])(np.array([3.0, 0.0, 3.0]))
    array([1., 0., 1.])
    """

    blocks: Sequence[tuple[Resolvent, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("blocks must hold at least one (resolvent, size) pair")
        for resolvent, size in self.blocks:
            if not isinstance(resolvent, Resolvent):
                raise TypeError(f"blocks must hold Resolvents, got {type(resolvent).__name__}")
            check_count("size of a block", size)
            resolvent.pieces(size)

    def pieces(self, dim: int) -> list[Piece]:
        total = sum(size for _, size in self.blocks)
        if total != dim:
            raise ValueError(f"blocks cover {total} coordinates, but the operator has {dim}")
        found, start = [], 0
        for resolvent, size in self.blocks:
            found += [p._replace(start=p.start + start, stop=p.stop + start) for p in resolvent.pieces(size)]
            start += size
        return found

    def apply_torch(self, z: Any, eta: float) -> Any:
        import torch

        parts = z.split([size for _, size in self.blocks])
        return torch.cat([J.apply_torch(part, eta) for (J, _), part in zip(self.blocks, parts)])


def tabulate(resolvent: Resolvent, dim: int, dtype: Any) -> Pieces:
    """The pieces as arrays, for the kernels."""
    pieces = resolvent.pieces(dim)
    lower, upper = np.zeros(dim, dtype), np.zeros(dim, dtype)
    for p in pieces:
        lower[p.start : p.stop], upper[p.start : p.stop] = p.lower, p.upper
    kind, start, stop = (np.array([p[c] for p in pieces], np.int64) for c in range(3))
    return Pieces(kind, start, stop, np.array([p.size for p in pieces], np.float64), lower, upper)
