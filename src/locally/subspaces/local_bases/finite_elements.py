"""A heated plate with a hole in linear finite elements, of any size, written to disk as it is solved.

-Laplace u = f on the square (-1, 1)^2 less a disc of radius 0.3, u = 0 on the outer edge, insulated at the hole; f is a
narrow Gaussian somewhere on a circle around the hole whose strength spans decades. Inner product: the mass matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse.linalg import splu

from locally.checks import check_count


@dataclass(frozen=True)
class Mesh:
    """Attributes:
    nodes: (n, 2) positions.
    triangles: (t, 3) nodes of each.
    boundary: (n,) whether a node lies on the outer edge.
    """

    nodes: Float[ndarray, "n 2"]
    triangles: Int[ndarray, "t 3"]
    boundary: ndarray


def plate_with_hole(rings: int) -> Mesh:
    """Quadrilaterals between the hole and the square's edge, each cut in two; 4 rings * (rings + 1) nodes.

    >>> mesh = plate_with_hole(4)
    >>> mesh.nodes.shape, mesh.triangles.shape
    ((80, 2), (128, 3))
    """
    check_count("rings", rings, at_least=2)
    spokes = 4 * rings
    angle = 2 * np.pi * np.arange(spokes) / spokes
    direction = np.column_stack([np.cos(angle), np.sin(angle)])
    edge = direction / np.abs(direction).max(axis=1, keepdims=True)  # where the ray leaves the square
    t = np.linspace(0, 1, rings + 1)[:, None, None]
    nodes = ((1 - t) * 0.3 * direction + t * edge).reshape(-1, 2)
    ring, spoke = np.meshgrid(np.arange(rings), np.arange(spokes), indexing="ij")
    a, b = ring * spokes + spoke, ring * spokes + (spoke + 1) % spokes
    c, d = a + spokes, b + spokes
    triangles = np.concatenate([np.stack([a, c, d], axis=-1), np.stack([a, d, b], axis=-1)]).reshape(-1, 3)
    boundary = np.repeat(np.arange(rings + 1) == rings, spokes)
    return Mesh(nodes, triangles, boundary)


def stiffness_and_mass(mesh: Mesh) -> tuple[Any, Any]:
    """Matrices of the Laplacian and of the L2 product over all nodes."""
    corners = mesh.nodes[mesh.triangles]
    sides = np.roll(corners, -1, axis=1) - np.roll(corners, 1, axis=1)  # opposite to each corner
    area = 0.5 * np.abs(sides[:, 0, 0] * sides[:, 1, 1] - sides[:, 0, 1] * sides[:, 1, 0])
    local_stiffness = np.einsum("tid,tjd->tij", sides, sides) / (4 * area[:, None, None])
    local_mass = area[:, None, None] / 12 * (np.ones((3, 3)) + np.eye(3))
    rows = np.repeat(mesh.triangles, 3, axis=1).ravel()
    columns = np.tile(mesh.triangles, (1, 3)).ravel()
    shape = (len(mesh.nodes), len(mesh.nodes))
    return tuple(sp.csr_array(sp.coo_array((local.ravel(), (rows, columns)), shape=shape))
                 for local in (local_stiffness, local_mass))  # fmt: skip


@dataclass(frozen=True)
class StoredSimulations:
    """Attributes:
    snapshots: path of an .npy file of shape (n, n_dof).
    parameters: (n, 2) positions of the source.
    amplitude: (n,) its strength.
    product: (n_dof, n_dof) sparse mass matrix.
    """

    snapshots: Path
    parameters: Float[ndarray, "n 2"]
    amplitude: Float[ndarray, " n"]
    product: Any


def heated_plate(
    n: int,
    rings: int,
    rng: np.random.Generator,
    path: Path,
    *,
    block: int = 64,
    callback: Callable[[float], None] | None = None,
) -> StoredSimulations:
    """Solve n loads and write the solutions block by block; about 4 rings^2 unknowns.

    Args:
        path: .npy file to write.
        block: solutions in memory at a time.
        callback: called with the fraction done.
    """
    check_count("n", n)
    check_count("block", block)
    mesh = plate_with_hole(rings)
    inside = np.flatnonzero(~mesh.boundary)
    stiffness, mass = stiffness_and_mass(mesh)
    solver = splu(stiffness[inside][:, inside].tocsc())
    angle = rng.uniform(0, 2 * np.pi, n)
    position = 0.65 * np.column_stack([np.cos(angle), np.sin(angle)])
    strength = 10.0 ** rng.uniform(-1, 1, n) * rng.choice([-1.0, 1.0], n)
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(n, inside.size))
    for start in range(0, n, block):
        part = slice(start, start + block)
        offsets = mesh.nodes[None] - position[part, None]
        f = strength[part, None] * np.exp(-(offsets**2).sum(axis=2) / 0.008)
        stored[part] = solver.solve((mass @ f.T)[inside]).T
        if callback is not None:
            callback(min(start + block, n) / n)
    stored.flush()
    return StoredSimulations(path, position, strength, sp.csr_array(mass[inside][:, inside]))
