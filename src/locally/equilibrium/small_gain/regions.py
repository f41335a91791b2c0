"""Convex regions on which a game is certified: where to sample them, and how to project onto them.

A region hands out sample points with a covering radius: no point of the region is farther from its nearest sample. With
a Lipschitz constant of the Jacobian, that turns bounds over samples into bounds over the region.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import brentq
from scipy.stats import qmc

from locally.checks import check_count, check_finite, check_nonnegative, check_positive, check_shape
from locally.equilibrium.small_gain.margins import owners

GRID_DIMENSIONS = 10  # above, a tensor grid of two points a dimension passes a thousand points: Sobol instead
GRID_POINTS = 2**16

Projection = Callable[[Float[ndarray, "*batch d"]], Float[ndarray, "*batch d"]]


class Region(ABC):
    """A convex compact set with a centre."""

    centre: Float[ndarray, " d"]

    @property
    def dimension(self) -> int:
        """Entries of a point."""
        return len(self.centre)

    @abstractmethod
    def samples(
        self, points_per_dimension: int = 2, sobol_points: int = 1024, *, cells: bool = False, seed: int = 0
    ) -> tuple[Float[ndarray, "samples d"], float | None]:
        """Sample points and their covering radius (None where none is known).

        Up to 10 dimensions and 65 536 points a tensor grid that reaches the faces, or with `cells` the centres of equal
        cells, which cover better; above, scrambled Sobol points. The centre always belongs to them.
        """

    @abstractmethod
    def inner_radius(self, block_sizes: Sequence[int], weights: Float[ndarray, " players"]) -> float | None:
        """Radius of the largest ball of the M(w)-norm around the centre inside the region; None where unknown."""

    @abstractmethod
    def contains(self, x: Float[ndarray, "*batch d"]) -> bool:
        """Whether every point lies in the region, up to rounding."""


@dataclass(frozen=True)
class Box(Region):
    """|x_k - centre_k| <= half_width_k.

    Args:
        centre: finite.
        half_width: one positive number, or one for each coordinate.
    """

    centre: Float[ndarray, " d"]
    half_width: float | Float[ndarray, " d"]

    def __post_init__(self) -> None:
        check_shape("centre", self.centre, (None,))
        check_finite("centre", self.centre)
        width = np.broadcast_to(np.asarray(self.half_width, dtype=float), self.centre.shape).copy()
        check_finite("half_width", width)
        if (width <= 0).any():
            raise ValueError(f"half_width must be positive, got {width.min():g}")
        object.__setattr__(self, "half_width", width)

    def samples(
        self, points_per_dimension: int = 2, sobol_points: int = 1024, *, cells: bool = False, seed: int = 0
    ) -> tuple[Float[ndarray, "samples d"], float | None]:
        unit, covering = _unit_samples(self.dimension, points_per_dimension, sobol_points, cells, seed)
        return self.centre + unit * self.half_width, covering * float(np.linalg.norm(self.half_width))

    def inner_radius(self, block_sizes: Sequence[int], weights: Float[ndarray, " players"]) -> float | None:
        return float((np.sqrt(weights)[owners(block_sizes)] * self.half_width).min())

    def contains(self, x: Float[ndarray, "*batch d"]) -> bool:
        return bool((np.abs(x - self.centre) <= self.half_width * (1 + 1e-12)).all())

    def project(self, x: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch d"]:
        """Nearest point, in the Euclidean norm and in every block-weighted one, since a box is a product."""
        return np.clip(x, self.centre - self.half_width, self.centre + self.half_width)


@dataclass(frozen=True)
class Ball(Region):
    """||x - centre||_2 <= radius."""

    centre: Float[ndarray, " d"]
    radius: float

    def __post_init__(self) -> None:
        check_shape("centre", self.centre, (None,))
        check_finite("centre", self.centre)
        check_positive("radius", self.radius)

    def samples(
        self, points_per_dimension: int = 2, sobol_points: int = 1024, *, cells: bool = False, seed: int = 0
    ) -> tuple[Float[ndarray, "samples d"], float | None]:
        unit, covering = _unit_samples(self.dimension, points_per_dimension, sobol_points, cells, seed)
        # projection onto the ball shortens distances to its points, so the box's covering radius still holds
        unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1)
        covering = min(covering * np.sqrt(self.dimension), 1.0)  # the centre alone covers it with radius 1
        return self.centre + self.radius * unit, covering * self.radius

    def inner_radius(self, block_sizes: Sequence[int], weights: Float[ndarray, " players"]) -> float | None:
        return self.radius * float(np.sqrt(weights.min()))

    def contains(self, x: Float[ndarray, "*batch d"]) -> bool:
        return bool((np.linalg.norm(x - self.centre, axis=-1) <= self.radius * (1 + 1e-12)).all())

    def project(self, x: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch d"]:
        """Nearest point in the Euclidean norm."""
        away = x - self.centre
        length = np.linalg.norm(away, axis=-1, keepdims=True)
        return self.centre + away * np.minimum(1.0, self.radius / np.maximum(length, 1e-300))

    def projection(self, block_sizes: Sequence[int], weights: Float[ndarray, " players"]) -> Projection:
        """Projection in the M(w)-norm; a ball is no product, so it differs from the Euclidean one.

        The nearest point has blocks w_i v_i / (w_i + t), t >= 0 the root of ||.|| = radius.
        """
        w = weights[owners(block_sizes)]

        def nearest(point: ndarray) -> ndarray:
            away = point - self.centre
            if np.linalg.norm(away) <= self.radius:
                return point
            beyond = lambda t: float(np.linalg.norm(w * away / (w + t))) - self.radius
            high = float(w.max()) * float(np.linalg.norm(away)) / self.radius
            return self.centre + w * away / (w + brentq(beyond, 0.0, high, xtol=1e-15 * high))

        return lambda x: np.apply_along_axis(nearest, -1, x)


@dataclass(frozen=True)
class Samples(Region):
    """The convex hull of points that the caller chose, such as states visited by a run.

    Args:
        points: at least one; the first is taken as the centre.
        covering_radius: of the points within the hull, if known; without it no bound over the hull is rigorous.
    """

    points: Float[ndarray, "samples d"]
    covering_radius: float | None = None

    def __post_init__(self) -> None:
        check_shape("points", self.points, (None, None))
        if len(self.points) == 0:
            raise ValueError("points must hold at least one point, got none")
        check_finite("points", self.points)
        if self.covering_radius is not None:
            check_nonnegative("covering_radius", self.covering_radius)
        object.__setattr__(self, "centre", self.points[0])

    def samples(
        self, points_per_dimension: int = 2, sobol_points: int = 1024, *, cells: bool = False, seed: int = 0
    ) -> tuple[Float[ndarray, "samples d"], float | None]:
        return self.points, self.covering_radius

    def inner_radius(self, block_sizes: Sequence[int], weights: Float[ndarray, " players"]) -> float | None:
        return None

    def contains(self, x: Float[ndarray, "*batch d"]) -> bool:
        """Within the bounding box of the points, which contains their hull."""
        low, high = self.points.min(axis=0), self.points.max(axis=0)
        return bool(((x >= low - 1e-12 * np.abs(low)) & (x <= high + 1e-12 * np.abs(high))).all())


def project_simplices(shapes: Sequence[int]) -> Projection:
    """Block-wise Euclidean projection onto probability simplices of the given sizes (sort-based, O(n log n)).

    >>> project_simplices([2, 1])(np.array([2.0, 0.0, 7.0]))
    array([1., 0., 1.])
    """
    ends = np.cumsum(shapes)

    def project(x: ndarray) -> ndarray:
        return np.concatenate(
            [_project_simplex(x[..., end - size : end]) for end, size in zip(ends, shapes, strict=True)], axis=-1
        )

    return project


def _project_simplex(y: ndarray) -> ndarray:
    descending = -np.sort(-y, axis=-1)
    counts = np.arange(1, y.shape[-1] + 1)
    thresholds = (np.cumsum(descending, axis=-1) - 1) / counts
    support = (descending > thresholds).sum(axis=-1, keepdims=True)
    return np.maximum(y - np.take_along_axis(thresholds, support - 1, axis=-1), 0)


def _unit_samples(d: int, points: int, sobol_points: int, cells: bool, seed: int) -> tuple[ndarray, float]:
    """Points of [-1, 1]^d and their covering radius relative to the half diagonal sqrt(d)."""
    check_count("points_per_dimension", points)
    check_count("sobol_points", sobol_points)
    centre = np.zeros((1, d))
    if d > GRID_DIMENSIONS or points**d > GRID_POINTS:
        sampler = qmc.Sobol(d, scramble=True, rng=seed)
        unit = 2 * sampler.random_base2(int(np.ceil(np.log2(sobol_points))))[:sobol_points] - 1
        # nothing better than the centre's own radius is known at this density in this dimension
        return np.concatenate([centre, unit]), 1.0
    if points == 1:
        return centre, 1.0
    axis = (2 * np.arange(points) + 1) / points - 1 if cells else np.linspace(-1, 1, points)
    grid = np.stack(np.meshgrid(*[axis] * d, indexing="ij"), axis=-1).reshape(-1, d)
    covering = 1 / points if cells else 1 / (points - 1)
    return np.concatenate([centre, grid]), min(covering, 1.0)
