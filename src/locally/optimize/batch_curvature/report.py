"""What was measured of a network's curvature, and what it says about batches of any size."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_choice, check_positive
from locally.linalg.lanczos import SpectralMeasure, Status
from locally.optimize.batch_curvature.random_matrices import (
    Regime,
    Shifted,
    effective_batch_size,
    spiked_covariance,
    spiked_wigner,
)
from locally.optimize.batch_curvature.rules import largest_learning_rate

MODELS = ("subspace", "direction", "iid", "covariance")
DRAWS = 512  # simulated batches in the subspace of the outliers: 0.5 % on their mean eigenvalue


@dataclass(frozen=True)
class Noise:
    """Scatter D = H_i - H of the examples' matrices along a unit vector u.

    Attributes:
        total: c = E ||D u||^2.
        along: E (u^T D u)^2, the part of it that stays on u.
        stderr: standard error of `total`.
    """

    total: float
    along: float
    stderr: float


@dataclass(frozen=True)
class BatchNoise:
    """Scatter of the examples' matrices, as far as the extreme eigenvalues of batches depend on it.

    Attributes:
        entry_variance: sigma^2, the mean variance of an entry of D.
        largest, smallest: scatter along both extreme eigenvectors.
        blocks: U^T D_i U of each sampled example on the k eigenvectors U of the largest eigenvalues, the first first.
        outside: E ||(1 - U U^T) D u_1||^2, what leaves this subspace.
    """

    entry_variance: float
    largest: Noise
    smallest: Noise
    blocks: Float[Tensor, "n k k"]
    outside: float


@dataclass(frozen=True)
class BatchPrediction:
    """The extreme eigenvalues that batches of one size show on average."""

    largest: Shifted
    smallest: Shifted


@dataclass(frozen=True, kw_only=True)
class CurvatureReport:
    """Curvature over all examples, the sampling noise, and the predictions that follow from both.

    Attributes:
        matrix: "hessian" or "gauss-newton".
        n_parameters, n_examples: P and N.
        outliers: the largest eigenvalues over all examples, in descending order.
        smallest: the smallest one.
        status: whether all of them converged.
        spectrum: quadrature of the whole spectrum.
        noise: scatter of single examples.
    """

    matrix: str
    n_parameters: int
    n_examples: int
    outliers: tuple[float, ...]
    smallest: float
    status: Status
    spectrum: SpectralMeasure
    noise: BatchNoise

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return self.outliers[0]

    @property
    def knee(self) -> float:
        """The batch size c / lambda^2 whose noise doubles the largest eigenvalue; above it the rate no longer grows."""
        return self.noise.largest.total / self.largest**2 if self.largest > 0 else math.inf

    def batch_eigenvalues(
        self, batch_size: int, *, model: str = "subspace", replacement: bool = False
    ) -> BatchPrediction:
        """The extreme eigenvalues of the matrix of a batch, expected over batches.

        Args:
            batch_size: B in [1, N].
            model: how the noise is described.
                "subspace": the largest by simulating batches of the sampled examples within the span of the outliers,
                and a shift for the noise that leaves it; the most accurate where outliers lie close to each other.
                "direction": each end by itself, shifted by c / (b lambda) with the noise along its own eigenvector.
                "iid": the theorem for noise of equal variance in all entries, P sigma^2 in place of c.
                "covariance": its multiplicative counterpart for Gauss-Newton matrices, where the bulk is what the trace
                has beside the largest eigenvalue.
            replacement: whether a batch may hold an example twice.

        Raises:
            ValueError: B is out of range, or the covariance model is asked of a Hessian.
        """
        check_choice("model", model, MODELS)
        if model == "covariance" and self.matrix != "gauss-newton":
            raise ValueError(f'model="covariance" is for semidefinite matrices, this report is of a {self.matrix}')
        b = effective_batch_size(batch_size, self.n_examples, replacement=replacement)
        if math.isinf(b):
            return BatchPrediction(*(Shifted(v, 1.0, Regime.OUTLIER) for v in (self.largest, self.smallest)))
        match model:
            case "iid":
                return self._independent_entries(math.sqrt(self.n_parameters * self.noise.entry_variance / b))
            case "covariance":
                return self._sample_covariance(self.n_parameters / b)
            case "direction":
                return BatchPrediction(along_direction(self.largest, self.noise.largest.total / b), self._bottom(b))
            case _:
                return BatchPrediction(self._among_outliers(batch_size, b), self._bottom(b))

    def _independent_entries(self, radius: float) -> BatchPrediction:
        """The noise has two edges: an end on the wrong side of zero is drowned like a small one."""
        top, bottom = spiked_wigner(max(self.largest, 0.0), radius), spiked_wigner(min(self.smallest, -0.0), radius)
        return BatchPrediction(top, bottom)

    def _sample_covariance(self, ratio: float) -> BatchPrediction:
        trace = self.n_parameters * self.spectrum.moment(1).value
        bulk = max(trace - self.largest, 0.0) / max(self.n_parameters - 1, 1)
        bottom = bulk * max(1 - math.sqrt(ratio), 0.0) ** 2
        return BatchPrediction(spiked_covariance(self.largest, bulk, ratio), Shifted(bottom, 0.0, Regime.BULK))

    def _among_outliers(self, batch_size: int, b: float) -> Shifted:
        """Mean over simulated batches; counts of how often each example is drawn stand for the draws themselves."""
        blocks = self.noise.blocks
        n = len(blocks)
        counts = np.random.default_rng(0).multinomial(batch_size, np.full(n, 1 / n), size=DRAWS)
        # without replacement the noise is smaller by B / b
        weights = torch.from_numpy(counts / batch_size * math.sqrt(batch_size / b))
        noisy = torch.tensor(self.outliers, dtype=torch.float64).diag() + torch.tensordot(weights, blocks, 1)
        values, vectors = torch.linalg.eigh(noisy)
        top = float(values[:, -1].mean())
        # against the simulated value, not the noiseless one: noise outside meets what noise inside has made
        shifted = along_direction(top, self.noise.outside / b)
        return Shifted(shifted.value, shifted.overlap * float(vectors[:, 0, -1].square().mean()), shifted.regime)

    def _bottom(self, b: float) -> Shifted:
        """The smallest eigenvalue: in networks it lies near the bulk, whose noise is spread out, so it has a threshold.

        Semidefinite matrices stay so; theirs can only come closer to zero.
        """
        if self.smallest >= 0 or self.matrix == "gauss-newton":
            return Shifted(self.smallest, 0.0, Regime.BULK)
        return spiked_wigner(self.smallest, math.sqrt(self.noise.smallest.total / b))

    def max_learning_rate(
        self, batch_size: int, *, momentum: float = 0.0, model: str = "subspace", weight_decay: float = 0.0
    ) -> float:
        """The largest stable learning rate of SGD with batches of this size: 2 (1 + momentum) / lambda'.

        In proportion to b far below the knee, 2 / lambda far above it. A guide, not a limit: networks may survive more
        by moving to where the loss is flatter.

        Raises:
            ValueError: there is no positive curvature, or an argument is out of range.
        """
        sharpness = self.batch_eigenvalues(batch_size, model=model).largest.value + weight_decay
        if sharpness <= 0:
            raise ValueError(
                f"no positive curvature (largest eigenvalue {sharpness:.3g}): no learning rate is too large"
            )
        return largest_learning_rate(sharpness, momentum=momentum)

    def scale_learning_rate(self, lr: float, old_batch: int, new_batch: int, *, model: str = "subspace") -> float:
        """A learning rate of SGD that worked at one batch size, carried over to another: linear up to the knee."""
        check_positive("lr", lr)
        limits = [self.max_learning_rate(b, model=model) for b in (new_batch, old_batch)]
        return lr * limits[0] / limits[1]


def along_direction(eigenvalue: float, variance: float) -> Shifted:
    """Second-order perturbation: lambda + (c / b) / lambda with the overlap 1 - (c / b) / lambda^2, at least 0.

    There is no threshold as for independent entries: the noise of networks lies in few directions, and its edge grows
    like 1 / b, not like its root.
    """
    if eigenvalue == 0:
        return Shifted(0.0, 0.0, Regime.BULK)
    overlap = max(1 - variance / eigenvalue**2, 0.0)
    return Shifted(eigenvalue + variance / eigenvalue, overlap, Regime.OUTLIER if overlap else Regime.BULK)
