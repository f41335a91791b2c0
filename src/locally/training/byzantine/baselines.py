"""What nearest-neighbour averaging is measured against: trimmed mean, Krum and kin, geometric median, clipping."""

import itertools
import math
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from locally.checks import check_count, check_positive
from locally.training.byzantine import kernels
from locally.training.byzantine.aggregation import Damage, GramRule, Rule
from locally.training.byzantine.tolerance import TooFewVectors

SUBSETS = 200_000  # more than that are not tried one by one


class TrimmedMean(Rule):
    """Per coordinate, the mean without the f smallest and the f largest entries (CWTM; Yin et al., ICML 2018).

    The rule of BRIDGE, and of LEARN for gradients and parameters alike. O(n D log n).

    >>> TrimmedMean(f=1)(torch.tensor([[1.0], [2.0], [3.0], [90.0]]), torch.tensor([1.0]))
    tensor([2.5000])
    """

    breakdown = (3, 1)
    uses_pivot = False

    def mix(
        self, pool: Float[Tensor, "P D"], heard: Bool[ndarray, "H P"], own: Int[ndarray, " H"]
    ) -> Float[Tensor, "H D"]:
        finite = pool.isfinite().all(1).numpy(force=True)
        trim = np.maximum(self.f - (heard & ~finite).sum(1), 0)
        heard = heard & finite
        if (heard.sum(1) <= 2 * trim).any():
            raise TooFewVectors(f"vectors must hold more than {2 * trim.max()} finite ones, got {heard.sum(1).min()}")
        if pool.device.type == "cpu" and pool.dtype in (torch.float32, torch.float64):
            out = torch.empty(len(heard), pool.shape[1], dtype=pool.dtype)
            kernels.trimmed_means(pool.detach().nan_to_num().numpy(), heard, trim, out.numpy())
            return out
        received = [pool[torch.from_numpy(h).to(pool.device)].sort(dim=0).values for h in heard]
        return torch.stack([v[t : len(v) - t].mean(0) for v, t in zip(received, trim.tolist())])

    def damage(self, honest: Float[Tensor, "H D"], f: int) -> Damage:
        """As for `Rule`: the honest entries are sorted once, and the lie found its place among them."""
        ranked = honest.double().T.sort(dim=1).values.contiguous().numpy(force=True)
        mean = honest.double().mean(0).numpy(force=True)
        return lambda lie: kernels.squared_shift_of_trimmed_mean(
            ranked, mean, lie.double().numpy(force=True), f, self.f
        )


class Krum(GramRule):
    """The received vector whose m - f - 2 nearest others are nearest to it (Blanchard et al., NeurIPS 2017)."""

    breakdown = (3, 3)
    uses_pivot = False

    def weights(self, gram: ndarray, heard: ndarray, own: ndarray, f: ndarray) -> ndarray:
        squares = squared_distances(gram)
        weights = np.zeros(heard.shape)
        for row, received, faulty in zip(weights, heard, f):
            at = np.flatnonzero(received)
            row[at[self.chosen(squares[np.ix_(at, at)], int(faulty))]] = 1.0
        return weights / weights.sum(1, keepdims=True)

    def chosen(self, squares: Float[ndarray, "m m"], f: int) -> Int[ndarray, " k"]:
        """Which of the m received vectors are averaged, from their squared distances: here the best score's alone."""
        return np.argsort(krum_scores(squares, f), kind="stable")[:1]


class MultiKrum(Krum):
    """The mean of the m - f received vectors with the best scores of Krum (Blanchard et al., NeurIPS 2017)."""

    def chosen(self, squares: Float[ndarray, "m m"], f: int) -> Int[ndarray, " k"]:
        """The m - f vectors of best score."""
        return np.argsort(krum_scores(squares, f), kind="stable")[: len(squares) - f]


class MinimumDiameterAverage(Krum):
    """The mean of those m - f received vectors that lie closest together (MDA; El Mhamdi et al., ICML 2018).

    Tries every subset: ValueError where there are more than 200 000.
    """

    breakdown = (3, 1)

    def chosen(self, squares: Float[ndarray, "m m"], f: int) -> Int[ndarray, " k"]:
        """The m - f vectors whose largest distance is smallest; ValueError beyond 200 000 subsets."""
        m = len(squares)
        if math.comb(m, f) > SUBSETS:
            raise ValueError(f"f = {f} of m = {m} vectors leaves {math.comb(m, f)} subsets, more than {SUBSETS}")
        subsets = np.array(list(itertools.combinations(range(m), m - f)))
        widest = squares[subsets[:, :, None], subsets[:, None, :]].max(axis=(1, 2))
        return subsets[widest.argmin()]


class GeometricMedian(GramRule):
    """Three smoothed Weiszfeld steps from zero towards the point of least total distance (RFA; Pillutla et al., 2022).

    Args:
        f: only for the count of vectors; the median needs no bound on the faulty ones below half.
        iterations: Weiszfeld steps.
        smoothing: distances count as at least this.
    """

    uses_pivot = False
    needs_origin: ClassVar[bool] = True
    breakdown = (3, 1)

    def __init__(self, f: int = 0, *, iterations: int = 3, smoothing: float = 0.1) -> None:
        super().__init__(f)
        check_count("iterations", iterations)
        check_positive("smoothing", smoothing)
        self.iterations, self.smoothing = iterations, smoothing

    def weights(self, gram: ndarray, heard: ndarray, own: ndarray, f: ndarray) -> ndarray:
        weights = np.zeros(heard.shape)
        weights[:, -1] = 1.0  # the origin
        for _ in range(self.iterations):
            distances = np.sqrt(squares_to_combinations(gram, weights))
            weights = np.where(heard, 1 / np.maximum(distances, self.smoothing), 0.0)
            weights /= weights.sum(1, keepdims=True)
        return weights


class SelfCenteredClipping(GramRule):
    """v <- v + mean of the differences to the received vectors, each clipped to a radius (He et al., 2022).

    Args:
        f: bound on the faulty ones.
        radius: of the clipping; 2 and 5 in the paper's comparison on MNIST and CIFAR-10.
        iterations: from v = the node's own vector.
    """

    breakdown = (3, 1)

    def __init__(self, f: int = 0, *, radius: float = 2.0, iterations: int = 3) -> None:
        super().__init__(f)
        check_positive("radius", radius)
        check_count("iterations", iterations)
        self.radius, self.iterations = radius, iterations

    def weights(self, gram: ndarray, heard: ndarray, own: ndarray, f: ndarray) -> ndarray:
        weights = np.zeros(heard.shape)
        weights[np.arange(len(own)), own] = 1.0
        received = heard.sum(1, keepdims=True)
        for _ in range(self.iterations):
            distances = np.sqrt(squares_to_combinations(gram, weights))
            scale = np.where(heard, np.minimum(1, self.radius / np.maximum(distances, 1e-300)), 0.0) / received
            weights = weights * (1 - scale.sum(1, keepdims=True)) + scale
        return weights


class GeometricTrimmedSum(GramRule):
    """x <- x + step / m * the sum of all but the f longest differences to the m received vectors (GTS; Gaucher et
    al., 2025). Nearest-neighbour averaging with a shorter step."""

    breakdown = (3, 2)

    def __init__(self, f: int = 0, *, step: float = 1.0) -> None:
        super().__init__(f)
        check_positive("step", step)
        self.step = step

    def weights(self, gram: ndarray, heard: ndarray, own: ndarray, f: ndarray) -> ndarray:
        squares = squared_distances(gram)[own]
        squares[np.arange(len(own)), own] = -1.0
        squares[~heard] = math.inf
        received = heard.sum(1, keepdims=True)
        rank = squares.argsort(axis=1, kind="stable").argsort(axis=1)
        weights = np.where(rank < received - f[:, None], self.step / received, 0.0)
        weights[np.arange(len(own)), own] += 1 - weights.sum(1)
        return weights


def squared_distances(gram: Float[ndarray, "P P"]) -> Float[ndarray, "P P"]:
    return np.maximum(gram.diagonal()[:, None] + gram.diagonal() - 2 * gram, 0.0)


def squares_to_combinations(gram: Float[ndarray, "P P"], weights: Float[ndarray, "H P"]) -> Float[ndarray, "H P"]:
    """|| p_j - sum_k w_hk p_k ||^2 for rows of weights that sum to one."""
    products = weights @ gram
    return np.maximum(gram.diagonal() - 2 * products + (products * weights).sum(1, keepdims=True), 0.0)


def krum_scores(squares: Float[ndarray, "m m"], f: int) -> Float[ndarray, " m"]:
    """Sum of squared distances to the m - f - 2 nearest others."""
    neighbours = len(squares) - f - 2
    if neighbours < 1:
        raise TooFewVectors(f"vectors must number at least f + 3 = {f + 3}, got {len(squares)}")
    return np.sort(squares, axis=1)[:, 1 : 1 + neighbours].sum(1)
