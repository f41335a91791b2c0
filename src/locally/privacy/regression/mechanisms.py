"""The two randomisers of arXiv 2310.07367: Gaussian noise for second moments, a random direction for bounded vectors.

Both turn rows of real numbers, one user each, into rows of 32-bit integers that are safe to send, and both are told
the bound that privacy rests on: a row beyond it is an error, since then the protocol failed to clip.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.special import gammaln

from locally.checks import check_count, check_positive, check_shape
from locally.privacy.regression.calibration import TAIL, LatticeScale, check_budget, lattice_scale
from locally.privacy.regression.samplers import Noise

ROUNDING = 1 + 1e-9  # what floating point may add to a clipped norm; the calibration has paid for it


class BoundExceeded(ValueError):
    """A vector beyond the bound that the noise was calibrated to: sending it would void the guarantee."""


@dataclass(frozen=True)
class GaussianRelease:
    """Discrete Gaussian noise on a vector of bounded l2 sensitivity, sent on an integer grid.

    Args:
        dimension: entries of the vector.
        sensitivity: largest l2 distance between the vectors of any two records.
        norm_bound: largest l2 norm of one record's vector.
        sigma: standard deviation that a continuous Gaussian would need.
    """

    dimension: int
    sensitivity: float
    norm_bound: float
    sigma: float

    def __post_init__(self) -> None:
        check_count("dimension", self.dimension)
        for name in ("sensitivity", "norm_bound", "sigma"):
            check_positive(name, getattr(self, name))

    @cached_property
    def lattice(self) -> LatticeScale:
        """The grid on which the noise is drawn; see `lattice_scale`."""
        return lattice_scale(self.sigma, self.sensitivity, self.dimension, self.norm_bound)

    @property
    def step(self) -> float:
        """What one unit of a sent integer stands for."""
        return self.lattice.step

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the noise in every entry."""
        return self.lattice.sigma

    @cached_property
    def limit(self) -> int:
        """No honest entry is larger."""
        return math.ceil(self.norm_bound / self.step + TAIL * 2.0**self.lattice.log2_scale)

    def randomise(self, vectors: Float[ndarray, "n dimension"], noise: Noise) -> Int[ndarray, "n dimension"]:
        """One report a row. O(n dimension)."""
        check_shape("vectors", vectors, (None, self.dimension))
        check_norms(vectors, self.norm_bound)
        sent = vectors / self.step
        np.rint(sent, out=sent)
        sent += noise.gaussian(vectors.shape, self.lattice.log2_scale)  # integers below 2^53: the sum is exact
        np.clip(sent, -self.limit, self.limit, out=sent)  # post-processing: costs no privacy
        return sent.astype(np.int32)


@dataclass(frozen=True)
class L2BallRandomizer:
    """Unbiased pure epsilon-private randomiser of vectors in a ball (Duchi, Jordan and Wainwright).

    Sends B w with w uniform on the half of the sphere that v points to, or on the other half with odds e^-epsilon. The
    record decides only between w and -w, and the coin behind that is exact: the guarantee survives floating point.

    Args:
        epsilon: positive.
        radius: bound on ||v||_2.
        dimension: entries of v.

    >>> round(L2BallRandomizer(epsilon=1.3, radius=2.0, dimension=6).magnitude, 6)
    10.303998
    """

    epsilon: float
    radius: float
    dimension: int

    UNIT = 2**30  # integers that stand for 1 on the sphere

    def __post_init__(self) -> None:
        check_budget(self.epsilon)
        check_positive("radius", self.radius)
        check_count("dimension", self.dimension)

    @property
    def magnitude(self) -> float:
        """B: the l2 norm of every output."""
        d = self.dimension
        surface = math.sqrt(math.pi) * math.exp(gammaln((d + 1) / 2) - gammaln(d / 2))
        return self.radius / math.tanh(self.epsilon / 2) * surface

    @property
    def step(self) -> float:
        """What one unit of a report's integers stands for."""
        return self.magnitude / self.UNIT

    @property
    def noise_scale(self) -> float:
        """Standard deviation of an entry of the output at v = 0; never more elsewhere by more than radius."""
        return self.magnitude / math.sqrt(self.dimension)

    @property
    def limit(self) -> int:
        """The largest integer that a report may hold."""
        return self.UNIT

    def randomise(self, vectors: Float[ndarray, "n dimension"], noise: Noise) -> Int[ndarray, "n dimension"]:
        """One report a row. O(n dimension)."""
        check_shape("vectors", vectors, (None, self.dimension))
        norms = check_norms(vectors, self.radius)
        n = len(vectors)
        towards = noise.coins(n, np.minimum(0.5 + norms / (2 * self.radius), 1.0))
        truthful = noise.coins(n, 1 / (1 + math.exp(-self.epsilon)))
        w = noise.directions(n, self.dimension)
        return np.rint(self.orient(vectors, norms, towards, truthful, w) * self.UNIT).astype(np.int32)

    def orient(
        self,
        vectors: Float[ndarray, "n dimension"],
        norms: Float[ndarray, " n"],
        towards: Bool[ndarray, " n"],
        truthful: Bool[ndarray, " n"],
        w: Float[ndarray, "n dimension"],
    ) -> Float[ndarray, "n dimension"]:
        """w or -w, by the coins: `towards` puts v on its own side of the ball, `truthful` tells which side that is."""
        # v = 0 has no side; any fixed one is as good, since `towards` is then a fair coin.
        u = np.where(norms[:, None] > 0, vectors, np.eye(1, self.dimension))
        side = np.where(towards, 1.0, -1.0) * np.where(truthful, 1.0, -1.0)
        return w * (side * np.where((w * u).sum(axis=1) >= 0, 1.0, -1.0))[:, None]

    def on_sphere(self, payloads: Int[ndarray, "n dimension"]) -> Bool[ndarray, " n"]:
        """Which rows have the one norm that an honest client sends, up to rounding."""
        norms = np.linalg.norm(payloads.astype(np.float64), axis=1)
        return np.abs(norms - self.UNIT) <= math.sqrt(self.dimension) + 1


Release = GaussianRelease | L2BallRandomizer


def check_norms(vectors: Float[ndarray, "n d"], bound: float) -> Float[ndarray, " n"]:
    """Norms of the rows; `BoundExceeded` where one exceeds `bound`."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    largest = float(norms.max(initial=0.0))
    if not largest <= bound * ROUNDING:
        raise BoundExceeded(f"a vector has l2 norm {largest:.6g}, beyond the bound {bound:.6g} that privacy rests on")
    return norms
