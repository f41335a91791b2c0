"""Domains whose activation pattern is fixed: is there a point in the box with that pattern?

The pattern is an intersection of halfspaces, exact because every activation before a split one is fixed too. A linear
programme looks for the point deepest inside. "No" is believed only with a certificate: multipliers whose combination of
the constraints is negative on the whole box, evaluated here with the float slack and not by the solver.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from locally.tangent.lipschitz.propagation import Box, Halfspaces, concretise


@dataclass(frozen=True)
class Leaf:
    """`empty` is proven; `point` lies strictly inside the pattern, as far as the solver can tell, or is None."""

    empty: bool
    point: Tensor | None


def inspect(halfspaces: Halfspaces | None, box: Box, gamma: float) -> Leaf:
    """Of one domain (a batch of one)."""
    if halfspaces is None:
        return Leaf(False, box.centre[0])
    normal, offset = halfspaces.normal[0].cpu().numpy(), halfspaces.offset[0].cpu().numpy()
    length = np.linalg.norm(normal, axis=1)
    used = (length > 0) | (offset < 0)
    if not used.any():
        return Leaf(False, box.centre[0])
    scale = np.where(length > 0, length, 1.0)[used]
    normal, offset = normal[used] / scale[:, None], offset[used] / scale
    low, high = box.lower[0].flatten().cpu().numpy(), box.upper[0].flatten().cpu().numpy()
    d = low.size
    # maximise t with n.x + o >= t: the depth, in units of distance
    solved = linprog(
        np.append(np.zeros(d), -1.0),
        A_ub=np.column_stack([-normal, np.ones(len(offset))]),
        b_ub=offset,
        bounds=[*zip(low, high), (None, None)],
        method="highs",
    )
    if solved.status != 0:
        return Leaf(False, None)
    multipliers = torch.as_tensor(np.maximum(-solved.ineqlin.marginals, 0.0) / scale)[None, None].to(box.lower.device)
    kept = torch.as_tensor(np.flatnonzero(used)).to(box.lower.device)
    row, shift = multipliers @ halfspaces.normal[:, kept], (multipliers @ halfspaces.offset[:, kept, None])[..., 0]
    reach = multipliers @ (
        halfspaces.normal[:, kept].abs() @ box.upper.abs().maximum(box.lower.abs()).flatten(1)[..., None]
    )
    slack = 2 * gamma * (reach[..., 0] + (multipliers @ halfspaces.offset[:, kept, None].abs())[..., 0])
    if float(concretise(row, shift + slack, box, gamma)) < 0:
        return Leaf(True, None)
    point = torch.as_tensor(solved.x[:d]).to(box.lower.device).view(box.lower.shape[1:])
    return Leaf(False, point if solved.x[d] > 0 else None)
