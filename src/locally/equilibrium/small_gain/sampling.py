"""Bounds of a game over a region from its Jacobians at sample points, streamed, and rigorous where that can be had."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.linalg import LinearOperator, eigsh

from locally.equilibrium.small_gain.games import Game
from locally.equilibrium.small_gain.margins import (
    GameBounds,
    block_bounds,
    check_jacobians,
    euclidean_margin,
    lipschitz,
    owners,
    rescale,
    signed_margin,
    signed_margins,
)
from locally.equilibrium.small_gain.signed import SignedOptimum, optimal_signed_weights

Weights = Float[ndarray, " players"]


@dataclass(frozen=True)
class Deviation:
    """How far a Jacobian in the region can be from the nearest sample's, as block norms (N x N)."""

    blocks: Float[ndarray, "players players"]
    whole: float | None = None  # norm of the whole difference, where that is what is known

    def norm(self, weights: Weights) -> float:
        """Bound on ||M^{1/2} (J - J_p) M^{-1/2}||_2."""
        if self.whole is not None:
            return self.whole * float(np.sqrt(weights.max() / weights.min()))
        return float(np.linalg.norm(rescale(self.blocks, np.sqrt(weights)), 2))

    def widen(self, bounds: GameBounds) -> GameBounds:
        own = bounds.own_lipschitz
        return GameBounds(
            bounds.mu - np.diag(self.blocks),
            bounds.coupling + self.blocks,
            None if own is None else own + np.diag(self.blocks),
        )


def deviation(jacobian_lipschitz: float | ndarray, covering_radius: float, players: int) -> Deviation:
    """From a Lipschitz constant of the Jacobian, of the whole or of each block, and the covering radius."""
    if isinstance(jacobian_lipschitz, ndarray):
        return Deviation(jacobian_lipschitz * covering_radius)
    whole = float(jacobian_lipschitz) * covering_radius
    return Deviation(np.full((players, players), whole), whole)


def inflate(bounds: GameBounds, safety: float) -> GameBounds:
    """Every bound made worse by the factor `safety` >= 1."""
    own = bounds.own_lipschitz
    return replace(
        bounds,
        mu=bounds.mu - (safety - 1) * np.abs(bounds.mu),
        coupling=bounds.coupling * safety,
        own_lipschitz=None if own is None else own * safety,
    )


class SampledJacobians:
    """The Jacobians of a game at sample points, formed a batch at a time and never kept all at once."""

    def __init__(
        self,
        game: Game,
        points: Float[ndarray, "samples d"],
        batch_size: int,
        callback: Callable[[int, int], None] | None = None,
    ) -> None:
        self.game, self.points, self.batch_size, self.callback = game, points, batch_size, callback
        self.sizes = game.tangent_sizes

    def __len__(self) -> int:
        return len(self.points)

    def batches(self) -> Iterator[Float[ndarray, "batch d d"]]:
        for start in range(0, len(self.points), self.batch_size):
            jacobians = self.game.jacobian(self.points[start : start + self.batch_size])
            check_jacobians(jacobians, self.sizes)
            yield jacobians
            if self.callback is not None:
                self.callback(min(start + self.batch_size, len(self.points)), len(self.points))

    def bounds(self) -> tuple[GameBounds, float]:
        """Block bounds and the Euclidean margin in one pass."""
        found: GameBounds | None = None
        rosen = np.inf
        for jacobians in self.batches():
            here = block_bounds(jacobians, self.sizes)
            found = here if found is None else found.combine(here)
            rosen = min(rosen, euclidean_margin(jacobians))
        assert found is not None  # there is at least one point
        return found, rosen

    def lipschitz(self, weights: Weights) -> float:
        return max(lipschitz(jacobians, self.sizes, weights) for jacobians in self.batches())

    def signed_margin(self, weights: Weights) -> float:
        return min(signed_margin(jacobians, self.sizes, weights) for jacobians in self.batches())

    def optimal_signed(self, start: Weights, tol: float = 1e-8, max_rounds: int = 30) -> tuple[SignedOptimum, ndarray]:
        """Maximise the worst signed margin, keeping only the Jacobians that some round found to be the worst.

        Returns the optimum over all samples and the kept Jacobians. The optimum over fewer Jacobians bounds that over
        all from above, so the loop ends where the worst sample is no worse than the kept ones.
        """
        worst, kept = self._worst(start)
        working = kept[None]
        best, best_margin = start, worst
        upper, weights = np.inf, start
        for _ in range(max_rounds):
            found = optimal_signed_weights(working, self.sizes, start=weights, tol=tol)
            weights, upper = found.weights, min(upper, found.upper_bound)
            worst, kept = self._worst(weights)
            if worst > best_margin:
                best, best_margin = weights, worst
            scale = float(np.linalg.norm(working, axis=(1, 2)).max())
            if worst >= found.margin - tol * scale:
                return SignedOptimum(best, best_margin, max(upper, best_margin), found.converged), working
            working = np.concatenate([working, kept[None]])
        return SignedOptimum(best, best_margin, max(upper, best_margin), False), working

    def steepest(self, weights: Weights) -> ndarray:
        """The Jacobian of largest norm in these weights."""
        largest, kept = -np.inf, None
        scale = np.sqrt(weights)[owners(self.sizes)]
        for jacobians in self.batches():
            norms = np.linalg.norm(rescale(jacobians, scale), 2, axis=(1, 2))
            if norms.max() > largest:
                largest, kept = float(norms.max()), np.array(jacobians[norms.argmax()])
        assert kept is not None
        return kept

    def _worst(self, weights: Weights) -> tuple[float, ndarray]:
        worst, kept = np.inf, None
        for jacobians in self.batches():
            margins = signed_margins(jacobians, self.sizes, weights)
            if margins.min() < worst:
                worst, kept = float(margins.min()), np.array(jacobians[margins.argmin()])
        assert kept is not None
        return worst, kept


class JacobianProducts:
    """The same bounds for games too large to form a Jacobian: Lanczos on products with J and its transpose.

    Lanczos approaches norms from below and curvatures from above, to the given relative tolerance: nothing here is
    rigorous.
    """

    def __init__(
        self,
        game: Game,
        points: Float[ndarray, "samples d"],
        tol: float = 1e-6,
        callback: Callable[[int, int], None] | None = None,
    ) -> None:
        self.game, self.points, self.tol, self.callback = game, points, tol, callback
        ends = np.cumsum(game.block_sizes)
        self.slices = [slice(end - size, end) for end, size in zip(ends, game.block_sizes, strict=True)]

    def __len__(self) -> int:
        return len(self.points)

    def operators(self) -> Iterator[LinearOperator]:
        for done, x in enumerate(self.points, start=1):
            yield self.game.jacobian_operator(x)
            if self.callback is not None:
                self.callback(done, len(self.points))

    def bounds(self) -> tuple[GameBounds, float]:
        players = self.game.players
        mu, norms, rosen = np.full(players, np.inf), np.zeros((players, players)), np.inf
        for J in self.operators():
            everything = slice(0, self.game.dimension)
            rosen = min(rosen, self._curvature(_block(J, everything, everything)))
            for i, rows in enumerate(self.slices):
                mu[i] = min(mu[i], self._curvature(_block(J, rows, rows)))
                for j, columns in enumerate(self.slices):
                    norms[i, j] = max(norms[i, j], self._norm(_block(J, rows, columns)))
        # Lanczos leaves the last digits open; the own norm is at least the curvature
        return GameBounds(mu, norms, np.maximum(np.diag(norms), mu)), rosen

    def lipschitz(self, weights: Weights) -> float:
        scale = np.sqrt(np.repeat(weights, self.game.block_sizes))
        return max(self._norm(_scaled(J, scale)) for J in self.operators())

    def signed_margin(self, weights: Weights) -> float:
        scale = np.sqrt(np.repeat(weights, self.game.block_sizes))
        return min(self._curvature(_scaled(J, scale)) for J in self.operators())

    def _norm(self, A: LinearOperator) -> float:
        if min(A.shape) < 3:
            return float(np.linalg.norm(A @ np.eye(A.shape[1]), 2))
        gram = LinearOperator(
            (A.shape[1], A.shape[1]), matvec=lambda v: A.rmatvec(A.matvec(np.ravel(v))), dtype=np.float64
        )
        v0 = np.random.default_rng(0).standard_normal(A.shape[1])
        if not np.any(gram @ v0):
            return 0.0
        return float(np.sqrt(max(eigsh(gram, k=1, v0=v0, tol=self.tol, return_eigenvectors=False)[0], 0.0)))

    def _curvature(self, A: LinearOperator) -> float:
        n = A.shape[0]
        if n < 3:
            dense = A @ np.eye(n)
            return float(np.linalg.eigvalsh((dense + dense.T) / 2)[0])
        symmetric = LinearOperator(
            (n, n), matvec=lambda v: (A.matvec(np.ravel(v)) + A.rmatvec(np.ravel(v))) / 2, dtype=np.float64
        )
        v0 = np.random.default_rng(0).standard_normal(n)
        return float(eigsh(symmetric, k=1, which="SA", v0=v0, tol=self.tol, return_eigenvectors=False)[0])


def _block(J: LinearOperator, rows: slice, columns: slice) -> LinearOperator:
    d = J.shape[0]

    def embed(v: ndarray, where: slice) -> ndarray:
        whole = np.zeros(d)
        whole[where] = np.ravel(v)
        return whole

    return LinearOperator(
        (rows.stop - rows.start, columns.stop - columns.start),
        matvec=lambda v: J.matvec(embed(v, columns))[rows],
        rmatvec=lambda v: J.rmatvec(embed(v, rows))[columns],
        dtype=np.float64,
    )


def _scaled(J: LinearOperator, scale: ndarray) -> LinearOperator:
    return LinearOperator(
        J.shape,
        matvec=lambda v: scale * J.matvec(np.ravel(v) / scale),
        rmatvec=lambda v: J.rmatvec(np.ravel(v) * scale) / scale,
        dtype=np.float64,
    )


def comparison_jacobian(bounds: GameBounds) -> tuple[ndarray, ndarray]:
    """Block bounds as one scalar game each for margin and Lipschitz constant, so that both modes share one search."""
    coupling = bounds.coupling.toarray() if isinstance(bounds.coupling, sp.sparray) else bounds.coupling
    own = np.zeros(len(bounds.mu)) if bounds.own_lipschitz is None else bounds.own_lipschitz
    return (np.diag(bounds.mu) - coupling)[None], (coupling + np.diag(own))[None]


def scalar_sizes(players: int) -> Sequence[int]:
    return (1,) * players
