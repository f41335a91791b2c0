"""Intervals as centre and radius, and rows of coefficients against vectors that each item of a batch has its own of."""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


def centre_radius(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and a radius that reaches both ends in spite of rounding."""
    centre = (lower + upper) / 2
    return centre, torch.maximum(upper - centre, centre - lower) * (1 + 2 * EPS)


def magnitude(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.maximum(lower.abs(), upper.abs())


def dot(rows: Tensor, vector: Tensor) -> Tensor:
    """(b, t, *shape) with (b, *shape) or (*shape): (b, t)."""
    flat = rows.flatten(2)
    if vector.ndim < rows.ndim - 1:
        return flat @ vector.reshape(-1)
    if len(flat) == 1 < len(vector):
        return vector.flatten(1) @ flat[0].T
    return torch.bmm(flat, vector.flatten(1)[:, :, None].expand(len(flat), -1, 1))[..., 0]
