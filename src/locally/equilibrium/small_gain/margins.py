"""Monotonicity margins and Lipschitz constants in a block-weighted inner product.

The metric is M(w) = blockdiag(w_1 I, ..., w_N I), ||v||_M^2 = v^T M v. A pseudo-gradient F whose Jacobians J satisfy
sym(M^{1/2} J M^{-1/2}) >= alpha I on a convex region is alpha-strongly monotone there in that inner product, even
where it is not monotone in the Euclidean one. Source: arXiv 2512.06791, small-gain matrix C(w) and margin alpha_*(w).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse.linalg import eigsh, svds

from locally.checks import check_finite, check_shape

Coupling: TypeAlias = Float[ndarray, "players players"] | sp.sparray


@dataclass(frozen=True)
class GameBounds:
    """What the block certificate knows of a game on a region.

    Args:
        mu: lower bounds on the curvature of each player's cost in its own block, any sign.
        coupling: L_ij >= sup ||J_ij||_2 for i != j, dense or sparse; the diagonal is ignored and stored as zero.
        own_lipschitz: upper bounds on ||J_ii||_2; without them no Lipschitz constant, hence no step size, follows.

    Raises:
        ValueError: shapes disagree, an entry is not finite, or a coupling or Lipschitz bound is negative.
    """

    mu: Float[ndarray, " players"]
    coupling: Coupling
    own_lipschitz: Float[ndarray, " players"] | None = None

    def __post_init__(self) -> None:
        coupling = self.coupling
        check_coupling(self.mu, coupling)
        if self.own_lipschitz is not None:
            check_shape("own_lipschitz", self.own_lipschitz, (len(self.mu),))
            check_finite("own_lipschitz", self.own_lipschitz)
            if (self.own_lipschitz < self.mu - 1e-9 * np.abs(self.mu)).any():
                raise ValueError("own_lipschitz must be at least mu: ||J_ii||_2 is never below the curvature")
        object.__setattr__(self, "coupling", off_diagonal(coupling))

    def combine(self, other: "GameBounds") -> "GameBounds":
        """Bounds that hold where either holds: what workers that sampled different points reduce with."""
        own = None
        if self.own_lipschitz is not None and other.own_lipschitz is not None:
            own = np.maximum(self.own_lipschitz, other.own_lipschitz)
        coupling = (
            self.coupling.maximum(other.coupling)
            if isinstance(self.coupling, sp.sparray)
            else np.maximum(self.coupling, other.coupling)
        )
        return GameBounds(np.minimum(self.mu, other.mu), coupling, own)


def check_coupling(mu: ndarray, coupling: Coupling) -> None:
    check_shape("mu", mu, (None,))
    check_shape("coupling", coupling, (len(mu), len(mu)))
    if len(mu) == 0:
        raise ValueError("mu must name at least one player, got none")
    check_finite("mu", mu)
    values = coupling.data if isinstance(coupling, sp.sparray) else coupling
    check_finite("coupling", values)
    if values.size and values.min() < 0:
        raise ValueError(f"coupling must be non-negative (it bounds norms), got {values.min():g}")


def check_weights(weights: ndarray, players: int) -> None:
    check_shape("weights", weights, (players,))
    check_finite("weights", weights)
    if (weights <= 0).any():
        raise ValueError(f"weights must be positive, got {weights.min():g}")


def check_jacobians(jacobians: ndarray, block_sizes: Sequence[int]) -> None:
    d = sum(block_sizes)
    check_shape("jacobians", jacobians, (None, d, d))
    check_finite("jacobians", jacobians)


def owners(block_sizes: Sequence[int]) -> Int[ndarray, " d"]:
    """The player that each coordinate belongs to.

    >>> owners((2, 1))
    array([0, 0, 1])
    """
    return np.repeat(np.arange(len(block_sizes)), block_sizes)


def off_diagonal(matrix: Coupling) -> Coupling:
    if isinstance(matrix, sp.sparray):
        without = sp.csr_array(matrix - sp.diags_array(matrix.diagonal()))
        without.eliminate_zeros()
        return without
    return matrix - np.diag(np.diag(matrix))


def comparison_matrix(mu: Float[ndarray, " players"], coupling: Coupling) -> Coupling:
    """diag(mu) - L: the scalar game whose margin in any weights is a lower bound on the margin of the real one."""
    if isinstance(coupling, sp.sparray):
        return sp.csr_array(sp.diags_array(mu) - off_diagonal(coupling))
    return np.diag(mu) - off_diagonal(coupling)


def rescale(matrix: Float[ndarray, "*batch n n"] | sp.sparray, scale: Float[ndarray, " n"]) -> Any:
    """D A D^{-1} for D = diag(scale); dense in, dense out."""
    if isinstance(matrix, sp.sparray):
        return sp.csr_array(sp.diags_array(scale) @ matrix @ sp.diags_array(1 / scale))
    return matrix * (scale[:, None] / scale)


def margin(mu: Float[ndarray, " players"], coupling: Coupling, weights: Float[ndarray, " players"]) -> float:
    """alpha_*(w), the small-gain margin: half the smallest eigenvalue of D^{-1/2} C(w) D^{-1/2}, D = diag(w).

    C(w)_ii = 2 w_i mu_i, C(w)_ij = -(w_i L_ij + w_j L_ji). Positive means that every game with these bounds is
    strongly monotone in M(w) with that modulus. Does not change when all weights are multiplied by one number.

    Args:
        mu, coupling: as in `GameBounds`; a SciPy sparse coupling is never made dense.
        weights: positive.

    Returns:
        The margin, negative where the weights certify nothing. O(N^3) dense, a few products a Lanczos step sparse.

    >>> round(margin(np.array([1.0, 1.0]), np.array([[0.0, 10.0], [0.05, 0.0]]), np.array([1.0, 200.0])), 5)
    0.29289
    """
    check_coupling(mu, coupling)
    check_weights(weights, len(mu))
    scaled = rescale(comparison_matrix(mu, coupling), np.sqrt(weights))
    return smallest_eigenvalue((scaled + scaled.T) / 2)


def lipschitz_from_blocks(bounds: GameBounds, weights: Float[ndarray, " players"]) -> float:
    """Upper bound on the Lipschitz constant in M(w) from block norms: ||[sqrt(w_i / w_j) L_ij]||_2 with L_ii.

    Infinite where the own-block Lipschitz bounds are unknown.
    """
    check_weights(weights, len(bounds.mu))
    if bounds.own_lipschitz is None:
        return np.inf
    if isinstance(bounds.coupling, sp.sparray):
        return largest_singular_value(rescale(bounds.coupling + sp.diags_array(bounds.own_lipschitz), np.sqrt(weights)))
    return largest_singular_value(rescale(bounds.coupling + np.diag(bounds.own_lipschitz), np.sqrt(weights)))


def signed_margin(
    jacobians: Float[ndarray, "samples d d"], block_sizes: Sequence[int], weights: Float[ndarray, " players"]
) -> float:
    """Worst margin over explicit Jacobians: min over samples of the smallest eigenvalue of sym(M^{1/2} J M^{-1/2}).

    Knows rotations and cancellations that block norms lose, so it is never below the `margin` of the same Jacobians'
    block bounds. O(samples d^3).
    """
    return float(signed_margins(jacobians, block_sizes, weights).min())


def signed_margins(
    jacobians: Float[ndarray, "samples d d"], block_sizes: Sequence[int], weights: Float[ndarray, " players"]
) -> Float[ndarray, " samples"]:
    """`signed_margin` of each Jacobian by itself."""
    check_jacobians(jacobians, block_sizes)
    check_weights(weights, len(block_sizes))
    scaled = rescale(jacobians, np.sqrt(weights)[owners(block_sizes)])
    return np.linalg.eigvalsh((scaled + np.swapaxes(scaled, 1, 2)) / 2)[:, 0]


def euclidean_margin(jacobians: Float[ndarray, "samples d d"]) -> float:
    """Rosen's test: the smallest eigenvalue of the symmetric part of the Jacobian, worst over the samples."""
    return signed_margin(jacobians, (jacobians.shape[1],), np.ones(1))


def lipschitz(
    jacobians: Float[ndarray, "samples d d"], block_sizes: Sequence[int], weights: Float[ndarray, " players"]
) -> float:
    """Largest ||M^{1/2} J M^{-1/2}||_2 over the samples. O(samples d^3)."""
    check_jacobians(jacobians, block_sizes)
    check_weights(weights, len(block_sizes))
    scaled = rescale(jacobians, np.sqrt(weights)[owners(block_sizes)])
    return float(np.linalg.norm(scaled, 2, axis=(1, 2)).max())


def block_bounds(jacobians: Float[ndarray, "samples d d"], block_sizes: Sequence[int]) -> GameBounds:
    """Smallest own curvature and largest block norms over the samples.

    The Jacobian of a pseudo-gradient has symmetric own blocks; where one is not (a field that is no gradient in its own
    block), its symmetric part is what counts.
    """
    check_jacobians(jacobians, block_sizes)
    players, ends = len(block_sizes), np.cumsum(block_sizes)
    if len(set(block_sizes)) == 1:
        b = block_sizes[0]
        blocks = jacobians.reshape(-1, players, b, players, b).swapaxes(2, 3)
        norms = np.linalg.norm(blocks, 2, axis=(3, 4)).max(axis=0) if b > 1 else np.abs(blocks[..., 0, 0]).max(axis=0)
        own = blocks[:, np.arange(players), np.arange(players)]
        mu = np.linalg.eigvalsh((own + own.swapaxes(2, 3)) / 2)[..., 0].min(axis=0)
        return GameBounds(mu, norms, np.diag(norms).copy())
    slices = [slice(end - size, end) for end, size in zip(ends, block_sizes, strict=True)]
    norms, mu = np.empty((players, players)), np.empty(players)
    for i, rows in enumerate(slices):
        own = jacobians[:, rows, rows]
        mu[i] = np.linalg.eigvalsh((own + own.swapaxes(1, 2)) / 2)[:, 0].min()
        for j, columns in enumerate(slices):
            norms[i, j] = np.linalg.norm(jacobians[:, rows, columns], 2, axis=(1, 2)).max()
    return GameBounds(mu, norms, np.diag(norms).copy())


def smallest_eigenvalue(symmetric: Coupling) -> float:
    n = symmetric.shape[0]
    if isinstance(symmetric, sp.sparray) and n > 32:
        # the comparison matrix has non-positive off-diagonal entries, so its extreme eigenvector has one sign
        return float(eigsh(symmetric, k=1, which="SA", v0=np.ones(n), maxiter=100 * n, return_eigenvectors=False)[0])
    dense = symmetric.toarray() if isinstance(symmetric, sp.sparray) else symmetric
    return float(np.linalg.eigvalsh(dense)[0])


def largest_singular_value(matrix: Coupling) -> float:
    n = matrix.shape[0]
    if isinstance(matrix, sp.sparray) and n > 32:
        return float(svds(matrix, k=1, v0=np.ones(n), maxiter=100 * n, return_singular_vectors=False)[0])
    dense = matrix.toarray() if isinstance(matrix, sp.sparray) else matrix
    return float(np.linalg.norm(dense, 2))
