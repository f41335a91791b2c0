"""Rules that turn received vectors into one, and nearest-neighbour averaging among them (arXiv 2209.10931).

Nodes of one simulation receive from a common pool of vectors, each its own subset. All rules but the trimmed mean
answer with combinations of the pool whose weights follow from inner products alone: one product of the pool with
itself gives them for all nodes, a second one with the weights gives the results.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from locally.checks import check_count
from locally.training.byzantine import kernels
from locally.training.byzantine.tolerance import TooFewVectors, check_breakdown

COLUMNS = 1 << 14  # parameters at a time: a block of a hundred vectors stays in the cache while it is used

Damage = Callable[[Tensor], float]


class Rule(ABC):
    """How a node that stands at `pivot` combines n - f received vectors, its own among them.

    Args:
        f: how many of them may be arbitrary.

    Subclasses say by `breakdown` = (factor, extra) that they need n >= factor * f + extra nodes.
    """

    breakdown: ClassVar[tuple[int, int]] = (2, 1)
    uses_pivot: ClassVar[bool] = True

    def __init__(self, f: int = 0) -> None:
        check_count("f", f, at_least=0)
        self.f = f

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def check_nodes(self, n: int) -> None:
        """BeyondBreakdown if this rule cannot stand its f faulty ones among n nodes."""
        check_breakdown(type(self).__name__, n, self.f, *self.breakdown)

    def __call__(self, vectors: Float[Tensor, "m D"], pivot: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """The combination of m = n - f vectors at a node that stands at `pivot`; non-finite vectors count as lies.

        Raises:
            ValueError: shapes or dtypes do not match, or the pivot is not finite.
            BeyondBreakdown: m + f nodes are too few for f faulty ones.
            TooFewVectors: too few of the vectors are finite.
        """
        check_vectors(vectors, pivot)
        self.check_nodes(len(vectors) + self.f)
        pool = torch.cat([vectors, pivot[None]])
        heard = np.ones((1, len(pool)), dtype=bool)
        heard[0, -1] = False
        return self.mix(pool, heard, np.array([len(vectors)]))[0]

    @abstractmethod
    def mix(
        self, pool: Float[Tensor, "P D"], heard: Bool[ndarray, "H P"], own: Int[ndarray, " H"]
    ) -> Float[Tensor, "H D"]:
        """At once for H nodes: node h stands at pool[own[h]] and received pool[heard[h]]."""

    def damage(self, honest: Float[Tensor, "H D"], f: int) -> Damage:
        """What an omniscient adversary maximises: how far the mean of the nodes' results is from the honest mean,
        squared, if every node received all honest vectors and f copies of the one in question."""
        mean = honest.mean(0)
        heard = np.ones((len(honest) if self.uses_pivot else 1, len(honest) + f), dtype=bool)
        own = np.arange(len(heard))

        def measure(lie: Tensor) -> float:
            pool = torch.cat([honest, lie.expand(f, -1)])
            return float((self.mix(pool, heard, own).mean(0) - mean).square().sum())

        return measure


class GramRule(Rule):
    """A rule whose weights on the received vectors follow from their inner products."""

    needs_origin: ClassVar[bool] = False  # the weights' last column belongs to the zero vector

    @abstractmethod
    def weights(
        self, gram: Float[ndarray, "P P"], heard: Bool[ndarray, "H P"], own: Int[ndarray, " H"], f: Int[ndarray, " H"]
    ) -> Float[ndarray, "H P"]:
        """Rows sum to one. `gram` is of vectors shifted by a common one; f is what may still be wrong at each node."""

    def mix(
        self, pool: Float[Tensor, "P D"], heard: Bool[ndarray, "H P"], own: Int[ndarray, " H"]
    ) -> Float[Tensor, "H D"]:
        if self.needs_origin:
            pool = torch.cat([pool, torch.zeros_like(pool[:1])])
            heard = np.pad(heard, ((0, 0), (0, 1)))
        reference = pool[own[0]]
        gram = centred_gram(pool, reference)
        weights = self._checked_weights(gram, heard, own)
        # a zero weight does not silence an infinite entry
        loud = ~np.isfinite(gram.diagonal())
        return centred_combination(pool, reference, weights, torch.from_numpy(loud) if loud.any() else None)

    def _checked_weights(self, gram: ndarray, heard: ndarray, own: ndarray) -> ndarray:
        finite = np.isfinite(gram.diagonal())
        if not finite[own].all():
            raise OverflowError("honest vectors are so far apart that their squared distances overflow")
        if not finite.all():  # known liars leave fewer unknown ones
            f = np.maximum(self.f - (heard & ~finite).sum(1), 0)
            gram = np.where(finite[:, None] & finite, gram, 0.0)
            return self.weights(gram, heard & finite, own, f)
        return self.weights(gram, heard, own, np.full(len(own), self.f))

    def damage(self, honest: Float[Tensor, "H D"], f: int) -> Damage:
        """As for `Rule`, in the span of the honest vectors: one product with them for each vector in question."""
        count = len(honest)
        mean = honest.mean(0)
        points = torch.cat([honest, torch.zeros_like(honest[:1])]) if self.needs_origin else honest
        centred = (points - mean).double()
        inner = (centred @ centred.T).numpy(force=True)
        # order of rows: honest, f copies of the lie, origin
        rows = np.concatenate([np.arange(count), np.full(f, len(points)), np.arange(count, len(points))])
        heard = np.ones((count if self.uses_pivot else 1, len(rows)), dtype=bool)
        heard[:, count + f :] = False
        own = np.arange(len(heard))
        gram = np.empty((len(points) + 1, len(points) + 1))
        gram[:-1, :-1] = inner

        def measure(lie: Tensor) -> float:
            shifted = (lie - mean).double()
            gram[-1, :-1] = gram[:-1, -1] = (centred @ shifted).numpy(force=True)
            gram[-1, -1] = float(shifted @ shifted)
            full = gram[np.ix_(rows, rows)]
            shift = self._checked_weights(full, heard, own).mean(0)
            return float(shift @ full @ shift)

        return measure


class Mean(GramRule):
    """Plain averaging, as in decentralised SGD: one liar moves it anywhere.

    >>> Mean()(torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([1.0]))
    tensor([3.])
    """

    uses_pivot = False

    def weights(self, gram: ndarray, heard: ndarray, own: ndarray, f: ndarray) -> ndarray:
        return heard / heard.sum(1, keepdims=True)


class NearestNeighborAverage(GramRule):
    """The mean of the n - 2f received vectors nearest to the node's own, itself among them (NNA, arXiv 2209.10931).

    With n <= 3f + 1 the faulty ones could fill every place but the node's own by copies of it: nothing would mix.
    O(n D) at one node, O(n^2 D) for all.

    Args:
        f: how many of the n nodes may be faulty; of the n - f vectors received, the f farthest are dropped.

    >>> received = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1e9, float("nan")]])
    >>> NearestNeighborAverage(f=1)(received, pivot=received[0])
    tensor([0.3333, 0.6667])
    """

    breakdown = (3, 2)

    def __call__(self, vectors: Float[Tensor, "m D"], pivot: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        check_vectors(vectors, pivot)
        self.check_nodes(len(vectors) + self.f)
        squares = vectors.new_zeros(len(vectors))
        blocks = list(zip(vectors.split(COLUMNS, dim=1), pivot.split(COLUMNS)))
        for block, centre in blocks:
            squares += (block - centre).square_().sum(1)
        squares = squares.nan_to_num(nan=math.inf, posinf=math.inf)
        keep = len(vectors) - self.f
        if int(squares.isfinite().sum()) < keep:
            raise TooFewVectors(f"vectors must hold at least {keep} finite ones, got {int(squares.isfinite().sum())}")
        kept = squares.argsort(stable=True)[:keep].sort().values
        return torch.cat([centre + (block[kept] - centre).mean(0) for block, centre in blocks])

    def damage(self, honest: Float[Tensor, "H D"], f: int) -> Damage:
        """As for `Rule`: honest distances are ranked once, so that a vector in question costs O(H D) alone."""
        mean = honest.mean(0)
        centred = (honest - mean).double()
        gram = (centred @ centred.T).numpy(force=True)
        squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
        np.fill_diagonal(squares, -1.0)
        order = squares.argsort(axis=1, kind="stable")
        ranked = np.take_along_axis(squares, order, axis=1)
        keep = len(honest) + f - self.f

        def measure(lie: Tensor) -> float:
            shifted = (lie - mean).double()
            inner, square = (centred @ shifted).numpy(force=True), float(shifted @ shifted)
            return kernels.squared_shift_of_nearest_mean(gram, order, ranked, inner, square, f, keep)

        return measure

    def weights(self, gram: ndarray, heard: ndarray, own: ndarray, f: ndarray) -> ndarray:
        squares = gram.diagonal()[own, None] + gram.diagonal() - 2 * gram[own]
        squares[np.arange(len(own)), own] = -1.0  # rounding must not put another vector before one's own
        squares[~heard] = math.inf
        keep = heard.sum(1) - f
        order = squares.argsort(axis=1, kind="stable")
        weights = np.zeros(heard.shape)
        nearest = np.arange(heard.shape[1]) < keep[:, None]
        np.put_along_axis(weights, order, nearest / keep[:, None], axis=1)
        return weights


def check_vectors(vectors: Tensor, pivot: Tensor) -> None:
    if vectors.ndim != 2 or pivot.ndim != 1 or vectors.shape[1] != len(pivot) or len(vectors) == 0:
        raise ValueError(
            f"vectors must have shape (m, D) and pivot (D,), got {tuple(vectors.shape)} and {tuple(pivot.shape)}"
        )
    if vectors.dtype != pivot.dtype or not vectors.dtype.is_floating_point:
        raise TypeError(f"vectors and pivot must share one floating dtype, got {vectors.dtype} and {pivot.dtype}")
    if not bool(pivot.isfinite().all()):
        raise ValueError("pivot holds NaN or infinity")


def centred_gram(pool: Float[Tensor, "P D"], reference: Float[Tensor, " D"]) -> Float[ndarray, "P P"]:
    """Inner products of pool - reference. Around a honest vector they keep the digits that tell neighbours apart,
    which models far from the origin would lose in float32."""
    gram = pool.new_zeros(len(pool), len(pool))
    for block, centre in zip(pool.split(COLUMNS, dim=1), reference.split(COLUMNS)):
        centred = block - centre
        gram.addmm_(centred, centred.T)
    return gram.double().numpy(force=True)


def centred_combination(
    pool: Float[Tensor, "P D"],
    reference: Float[Tensor, " D"],
    weights: Float[ndarray, "H P"],
    silenced: Bool[Tensor, " P"] | None = None,
) -> Float[Tensor, "H D"]:
    """reference + weights (pool - reference): equal vectors give that very vector, without rounding."""
    factors = torch.from_numpy(weights).to(pool)
    out = pool.new_empty(len(weights), pool.shape[1])
    for block, centre, result in zip(pool.split(COLUMNS, dim=1), reference.split(COLUMNS), out.split(COLUMNS, dim=1)):
        centred = block - centre
        if silenced is not None:
            centred[silenced] = 0
        torch.addmm(centre, factors, centred, out=result)
    return out
