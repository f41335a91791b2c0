"""Poisson systems of incompressible flow on grids with obstacles and free surfaces, without a stored matrix.

Unit-spaced 5-point (2-D) or 7-point (3-D) stencil. A fluid cell's row has the number of its neighbours that are not
solid on the diagonal and -1 for every fluid neighbour: solids let nothing through (Neumann), air holds the pressure at
zero (Dirichlet). Rows of cells that are not fluid are zero and stay in the numbering, so a vector is always a grid.
Source: arXiv 2205.10763, section on the matrices of the pressure projection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import ndimage
from torch import Tensor

from locally.checks import check_choice, check_count, check_positive
from locally.linalg.krylov import Operator


class Cell(IntEnum):
    """What a cell of the grid holds; the numbers are those in `Domain.cells`."""

    FLUID = 0  # has an unknown: the pressure
    SOLID = 1  # a wall: nothing flows through it (Neumann)
    AIR = 2  # open: the pressure is 0 (Dirichlet)


@dataclass(frozen=True, eq=False)
class Domain:
    """Which cells of a 2-D or 3-D grid are fluid, solid or air, and what lies beyond its edge.

    Args:
        cells: one `Cell` per grid cell, any integer dtype; the last axis varies fastest in the flat numbering.
        outside: Cell.AIR for open edges (Dirichlet) or Cell.SOLID for closed ones (Neumann). Mixed edges are cells.

    Raises:
        ValueError: other values, not two or three axes, no fluid cell.

    >>> Domain.box(2, 2).matrix().toarray()
    array([[ 4., -1., -1.,  0.],
           [-1.,  4.,  0., -1.],
           [-1.,  0.,  4., -1.],
           [ 0., -1., -1.,  4.]])
    """

    cells: Int[ndarray, "..."]
    outside: Cell = Cell.AIR

    def __post_init__(self) -> None:
        cells = np.array(self.cells, copy=True)
        if cells.ndim not in (2, 3):
            raise ValueError(f"cells must have two or three axes, got shape {cells.shape}")
        if not np.isin(cells, list(Cell)).all():
            raise ValueError("cells must hold 0 (fluid), 1 (solid) and 2 (air) only")
        check_choice("outside", self.outside, (Cell.AIR, Cell.SOLID))
        if not (cells == Cell.FLUID).any():
            raise ValueError("cells holds no fluid cell")
        cells = cells.astype(np.int8)
        cells.flags.writeable = False
        object.__setattr__(self, "cells", cells)
        object.__setattr__(self, "outside", Cell(self.outside))

    @classmethod
    def box(cls, *shape: int, outside: Cell = Cell.AIR) -> "Domain":
        """A grid full of fluid."""
        for size in shape:
            check_count("shape", size)
        return cls(np.zeros(shape, np.int8), outside)

    def with_ball(
        self, centre: Sequence[float | int] | Float[ndarray, " ndim"], radius: float | int, cell: Cell = Cell.SOLID
    ) -> "Domain":
        """This domain with a disc or ball of another kind: cells with |index - centre| < radius, in cells."""
        check_positive("radius", radius)
        if len(centre) != self.ndim:
            raise ValueError(f"centre must have {self.ndim} coordinates, got {len(centre)}")
        index = np.indices(self.shape)
        offsets = index - np.asarray(centre, float).reshape(-1, *[1] * self.ndim)
        return Domain(np.where((offsets**2).sum(0) < radius**2, cell, self.cells), self.outside)

    def with_surface(self, heights: Int[ndarray, "..."], axis: int = 0) -> "Domain":
        """This domain with air where the index along `axis` is `heights` or more; heights spans the other axes."""
        index = np.moveaxis(np.indices(self.shape)[axis], axis, 0)
        above = np.moveaxis(index >= np.asarray(heights), 0, axis)
        return Domain(np.where(above & (self.cells == Cell.FLUID), Cell.AIR, self.cells), self.outside)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the grid."""
        return tuple(self.cells.shape)

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return self.cells.ndim

    @property
    def n(self) -> int:
        """Cells of the grid, of whatever kind: the size of the matrix."""
        return self.cells.size

    @cached_property
    def fluid(self) -> Bool[ndarray, "..."]:
        """Which cells are fluid."""
        return self.cells == Cell.FLUID

    @cached_property
    def diagonal(self) -> Int[ndarray, "..."]:
        """Neighbours of each fluid cell that are not solid; 0 elsewhere."""
        padded = np.pad(self.cells, 1, constant_values=self.outside)
        inner = (slice(1, -1),) * self.ndim
        open_to = sum((np.roll(padded, s, axis) != Cell.SOLID)[inner] for axis in range(self.ndim) for s in (1, -1))
        return np.where(self.fluid, open_to, 0).astype(np.int8)

    def matrix(self) -> sp.csr_array:
        """The (n, n) matrix in float64; O(n)."""
        number = np.arange(self.n).reshape(self.shape)
        rows, columns = [], []
        for axis in range(self.ndim):
            near, far = _along(axis, slice(None, -1), self.ndim), _along(axis, slice(1, None), self.ndim)
            joined = self.fluid[near] & self.fluid[far]
            rows += [number[near][joined], number[far][joined]]
            columns += [number[far][joined], number[near][joined]]
        fluid = number[self.fluid]
        entries = [-np.ones(sum(map(len, rows))), self.diagonal[self.fluid].astype(float)]
        at = np.concatenate([*rows, fluid]), np.concatenate([*columns, fluid])
        return sp.coo_array((np.concatenate(entries), at), shape=(self.n, self.n)).tocsr()

    def operator(self, *, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu") -> "PoissonOperator":
        """The same matrix as an operator on tensors, on any device."""
        return PoissonOperator(self, dtype, torch.device(device))

    @cached_property
    def enclosed(self) -> list[Int[ndarray, " cells"]]:
        """Flat cell numbers of each connected part of the fluid that touches no air: A is singular there."""
        labels, count = ndimage.label(self.fluid)
        links = np.zeros(self.shape, np.int8)
        for axis in range(self.ndim):
            near, far = _along(axis, slice(None, -1), self.ndim), _along(axis, slice(1, None), self.ndim)
            joined = self.fluid[near] & self.fluid[far]
            links[near] += joined
            links[far] += joined
        touches_air = (self.diagonal > links) & self.fluid
        closed = ~np.isin(np.arange(1, count + 1), labels[touches_air])
        return [np.flatnonzero(labels == part + 1) for part in np.flatnonzero(closed)]

    def null_space(self, *, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu") -> Tensor | None:
        """Orthonormal rows: the constant on every enclosed part of the fluid; None where there is none.

        Solids and air are left out: their rows of A are zero too, and no direction ever leaves the fluid.
        """
        if not self.enclosed:
            return None
        basis = torch.zeros(len(self.enclosed), self.n, dtype=dtype, device=device)
        for row, part in zip(basis, self.enclosed):
            row[torch.as_tensor(part, device=device)] = len(part) ** -0.5
        return basis

    def divergence(self, *velocity: Float[ndarray, "..."]) -> Float[ndarray, "..."]:
        """-div u over fluid cells: the right-hand side whose pressure makes u free of divergence. 0 on other cells.

        Args:
            velocity: one array per axis, u on the faces across it: one entry more along that axis than the grid has.
                What goes through faces of solids is taken as 0.

        Raises:
            ValueError: not one array per axis, or of another shape.
        """
        if len(velocity) != self.ndim:
            raise ValueError(f"velocity must have {self.ndim} components, got {len(velocity)}")
        total = np.zeros(self.shape)
        solid = np.pad(self.cells, 1, constant_values=self.outside) == Cell.SOLID
        for axis, u in enumerate(velocity):
            expected = tuple(size + (a == axis) for a, size in enumerate(self.shape))
            if u.shape != expected:
                raise ValueError(f"velocity[{axis}] must have shape {expected}, got {u.shape}")
            inner = tuple(slice(None) if a == axis else slice(1, -1) for a in range(self.ndim))
            line = solid[inner]
            near, far = _along(axis, slice(None, -1), self.ndim), _along(axis, slice(1, None), self.ndim)
            total -= np.diff(np.where(line[near] | line[far], 0.0, u), axis=axis)
        return np.where(self.fluid, total, 0.0)

    def check_right_hand_side(self, b: Float[Tensor, "*batch n"]) -> None:
        """Raises ValueError unless b is as long as the grid and zero on solids and air."""
        if b.shape[-1] != self.n:
            raise ValueError(f"b must have {self.n} entries, one per cell of the grid {self.shape}, got {b.shape[-1]}")
        dry = torch.as_tensor(~self.fluid.reshape(-1), device=b.device)
        if (b[..., dry] != 0).any():
            raise ValueError("b must be zero on solid and air cells: no pressure there can balance it")


def _along(axis: int, part: slice, ndim: int) -> tuple[slice, ...]:
    return tuple(part if a == axis else slice(None) for a in range(ndim))


class PoissonOperator(Operator):
    """A v = diagonal * v - sum of the fluid neighbours, by shifted slices; differentiable in v by `apply`."""

    def __init__(self, domain: Domain, dtype: torch.dtype, device: torch.device):
        self.domain = domain
        self.diagonal = torch.as_tensor(domain.diagonal.copy(), dtype=dtype, device=device)
        self.fluid = torch.as_tensor(domain.fluid, dtype=dtype, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.diagonal.reshape(-1),)

    def product(self, v: Tensor, out: Tensor) -> None:
        out.copy_(self.apply(v.detach()))

    def apply(self, v: Tensor, *tensors: Tensor) -> Tensor:
        grid = v.reshape(-1, *self.domain.shape) * self.fluid
        result = self.diagonal * grid
        for axis in range(1, grid.ndim):
            size = grid.shape[axis] - 1
            result.narrow(axis, 0, size).sub_(grid.narrow(axis, 1, size))
            result.narrow(axis, 1, size).sub_(grid.narrow(axis, 0, size))
        return (result * self.fluid).reshape(v.shape)

    def select(self, index: Tensor) -> "PoissonOperator":
        return self
