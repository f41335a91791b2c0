"""What clients and server agree on beforehand: bounds, budget, and the vectors that a record turns into.

Three protocols of arXiv 2310.07367: `MomentProtocol` sends noisy second moments of (x, y) once (NLDP-LR),
`PublicFeatureProtocol` only the product x y, for a server that has unlabelled features already, and `GradientProtocol`
a gradient at the server's iterate in one of T rounds (LDP-IHT). A protocol is plain public data: it travels as JSON,
and its fingerprint stands in every report.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from locally.checks import check_count, check_finite, check_positive, check_shape
from locally.privacy.regression.calibration import (
    analytic_gaussian_sigma,
    check_budget,
    classical_gaussian_sigma,
    gaussian_delta,
    lattice_loss,
)
from locally.privacy.regression.mechanisms import GaussianRelease, L2BallRandomizer, Release

MAX_ROUNDS = 2**16  # the round's number has two bytes in a report


class Calibration(StrEnum):
    """How noise follows from the budget where a client sends two vectors or one."""

    JOINT = "joint"  # one exact Gaussian calibration over everything that is sent
    ANALYTIC = "analytic"  # exact calibration of each vector at (epsilon / 2, delta / 2), the paper's split
    CLASSICAL = "classical"  # the paper's constants; refused where they do not deliver the budget
    PURE = "pure"  # delta = 0 by the l2-ball randomiser


class Beyond(StrEnum):
    """What a client does with a record beyond the declared bounds."""

    CLIP = "clip"
    REFUSE = "refuse"


class OutOfBounds(ValueError):
    """A record beyond the declared bounds, where the protocol says to refuse."""


@dataclass(frozen=True)
class Budget:
    """What one client spends: (epsilon, delta) in all, over so many releases."""

    epsilon: float
    delta: float
    releases: int
    mechanism: str


@dataclass(frozen=True)
class Vectors:
    """One row a user: what is to be randomised, and whose records were clipped on the way (only the client knows)."""

    parts: tuple[Float[ndarray, "n _"], ...]
    clipped: Bool[ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """What the three have in common.

    Args:
        n_features: d, width of x.
        epsilon: privacy of one report, positive and finite.
        clip_x, clip_y: bounds on every |x_j| and on |y| (tau_1, tau_2 of the paper).
        beyond: clip records to the bounds, or refuse them. Refusing tells the server who holds such a record unless
            the bounds hold by construction.
    """

    n_features: int
    epsilon: float
    clip_x: float
    clip_y: float
    beyond: Beyond = Beyond.CLIP

    def __post_init__(self) -> None:
        check_count("n_features", self.n_features)
        check_budget(self.epsilon)
        check_positive("clip_x", self.clip_x)
        check_positive("clip_y", self.clip_y)
        object.__setattr__(self, "beyond", Beyond(self.beyond))

    @property
    @abstractmethod
    def budget(self) -> Budget:
        """What one user spends in all, whatever the number of users."""

    @property
    @abstractmethod
    def releases(self) -> tuple[Release, ...]:
        """The randomiser of each vector that a report holds."""
        ...

    @abstractmethod
    def vectors(
        self, X: Float[ndarray, "n d"], y: Float[ndarray, " n"], theta: Float[ndarray, " d"] | None = None
    ) -> Vectors:
        """Clip the records and compute what is to be randomised; `theta` where the protocol is interactive."""
        ...

    @cached_property
    def width(self) -> int:
        """Integers in a report."""
        return sum(r.dimension for r in self.releases)

    @cached_property
    def limits(self) -> Int[ndarray, " width"]:
        """Magnitude that no honest client exceeds, for each integer of a report."""
        return np.concatenate([np.full(r.dimension, r.limit, np.int32) for r in self.releases])

    @cached_property
    def fingerprint(self) -> bytes:
        """Eight bytes that differ between any two protocols."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).digest()

    def to_json(self) -> str:
        """All that devices and server must agree on, keys in order; `from_json` reads it back."""
        return json.dumps({"protocol": type(self).__name__, **asdict(self)}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Protocol":
        """The protocol that `to_json` wrote; ValueError where it is not one."""
        try:
            fields: dict[str, Any] = json.loads(text)
            kind = PROTOCOLS[fields.pop("protocol")]
            return kind(**{name: ENUMS.get(name, lambda value: value)(value) for name, value in fields.items()})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"text must be a protocol as to_json writes it: {error}") from None

    def bounded(
        self, X: Float[ndarray, "n d"], y: Float[ndarray, " n"]
    ) -> tuple[Float[ndarray, "n d"], Float[ndarray, " n"], Bool[ndarray, " n"]]:
        """Records within clip_x and clip_y, and which ones were not."""
        outside = (np.abs(X) > self.clip_x).any(axis=1) | (np.abs(y) > self.clip_y)
        if self.beyond is Beyond.REFUSE and outside.any():
            raise OutOfBounds(
                f"{int(outside.sum())} of {len(y)} records exceed |x_j| <= {self.clip_x:g} or |y| <= {self.clip_y:g}, "
                "and this protocol refuses them"
            )
        return np.clip(X, -self.clip_x, self.clip_x), np.clip(y, -self.clip_y, self.clip_y), outside

    def check_records(self, X: Float[ndarray, "n d"], y: Float[ndarray, " n"]) -> None:
        """Refuse, with a ValueError, records of another width, of unequal number, or with NaN or infinity."""
        check_shape("X", X, (None, self.n_features))
        check_shape("y", y, (len(X),))
        check_finite("X", X)
        check_finite("y", y)


@dataclass(frozen=True, kw_only=True)
class NonInteractiveProtocol(Protocol):
    """What the two one-shot protocols share: a budget that may have a delta, and the vector x y.

    Args:
        delta: in (0, 1); None for the pure calibration.
        calibration: how noise follows from the budget.
    """

    delta: float | None = 1e-6
    calibration: Calibration = Calibration.JOINT

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "calibration", Calibration(self.calibration))
        check_delta(self.delta, self.calibration)

    @property
    def budget(self) -> Budget:
        """epsilon and delta, shared among the releases of the one report."""
        mechanism = "l2-ball randomiser" if self.calibration is Calibration.PURE else "discrete Gaussian"
        return Budget(self.epsilon, self.delta or 0.0, len(self.releases), mechanism)

    @property
    def cross_bound(self) -> float:
        """Bound on ||x y||_2 after clipping."""
        return math.sqrt(self.n_features) * self.clip_x * self.clip_y


@dataclass(frozen=True, kw_only=True)
class PublicFeatureProtocol(NonInteractiveProtocol):
    """Users send x y with noise from their whole budget; the covariance comes from public unlabelled features.

    Arguments as for the two classes above; joint and analytic calibration are the same here, where one vector is sent.
    """

    @classmethod
    def for_users(cls, n_users: int, n_features: int, epsilon: float, **options: Any) -> "PublicFeatureProtocol":
        """Bounds of the paper for n users with standardised features: clip_x = clip_y = sqrt(log n)."""
        return cls(n_features=n_features, epsilon=epsilon, **(automatic_clip(n_users) | options))

    @cached_property
    def releases(self) -> tuple[Release, ...]:
        d, sensitivity = self.n_features, 2 * self.cross_bound
        if self.calibration is Calibration.PURE:
            return (L2BallRandomizer(self.epsilon, self.cross_bound, d),)
        sigma = gaussian_sigma(self.calibration, self.epsilon, self.delta, d)
        return (GaussianRelease(d, sensitivity, self.cross_bound, sensitivity * sigma),)

    def vectors(
        self, X: Float[ndarray, "n d"], y: Float[ndarray, " n"], theta: Float[ndarray, " d"] | None = None
    ) -> Vectors:
        self.check_records(X, y)
        X, y, outside = self.bounded(X, y)
        return Vectors((X * y[:, None],), outside)


@dataclass(frozen=True, kw_only=True)
class MomentProtocol(NonInteractiveProtocol):
    """NLDP-LR, Algorithm 1: users send x x^T (upper triangle) and x y, both noisy, half of the budget each.

    Args:
        radius: r, bound on ||x||_2 in the first of the two; longer records are shortened (or refused).
    """

    radius: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("radius", self.radius)

    @classmethod
    def for_users(cls, n_users: int, n_features: int, epsilon: float, **options: Any) -> "MomentProtocol":
        """Bounds of the paper: radius = sqrt(d log n), clip_x = clip_y = sqrt(log n)."""
        automatic = automatic_clip(n_users)
        automatic["radius"] = math.sqrt(n_features) * automatic["clip_x"]
        return cls(n_features=n_features, epsilon=epsilon, **(automatic | options))

    @cached_property
    def releases(self) -> tuple[Release, ...]:
        d, r = self.n_features, self.radius
        triangle = d * (d + 1) // 2
        if self.calibration is Calibration.PURE:
            half = self.epsilon / 2
            return L2BallRandomizer(half, r * r, triangle), L2BallRandomizer(half, self.cross_bound, d)
        # ||x x^T - z z^T||_F is largest, sqrt(2) r^2, where x and z are orthogonal; the paper bounds it by 2 r^2.
        covariance = (2.0 if self.calibration is Calibration.CLASSICAL else math.sqrt(2.0)) * r * r
        cross = 2 * self.cross_bound
        if self.calibration is Calibration.JOINT:
            # Two Gaussians with D_1/s_1 = D_2/s_2 = mu / sqrt(2) lose what one with D/s = mu loses.
            sigma = math.sqrt(2) * gaussian_sigma(self.calibration, self.epsilon, self.delta, triangle + d)
        else:
            assert self.delta is not None
            sigma = gaussian_sigma(self.calibration, self.epsilon / 2, self.delta / 2, triangle + d)
        return (
            GaussianRelease(triangle, covariance, r * r, covariance * sigma),
            GaussianRelease(d, cross, self.cross_bound, cross * sigma),
        )

    def vectors(
        self, X: Float[ndarray, "n d"], y: Float[ndarray, " n"], theta: Float[ndarray, " d"] | None = None
    ) -> Vectors:
        self.check_records(X, y)
        norms = np.linalg.norm(X, axis=1)
        long = norms > self.radius
        if self.beyond is Beyond.REFUSE and long.any():
            raise OutOfBounds(f"{int(long.sum())} of {len(y)} records exceed ||x||_2 <= {self.radius:g}")
        shortened = X * (self.radius / np.maximum(norms, self.radius))[:, None]
        clipped_x, clipped_y, outside = self.bounded(X, y)
        return Vectors((upper_products(shortened), clipped_x * clipped_y[:, None]), outside | long)


@dataclass(frozen=True, kw_only=True)
class GradientProtocol(Protocol):
    """LDP-IHT, Algorithm 2: in each round one group of users sends a private gradient; pure epsilon.

    Args:
        sparsity: k', coefficients that the server keeps; k or 2 k in practice.
        n_rounds: T, groups that the users are split into.
        theta_bound: bound on the l2 norm of every iterate.
    """

    sparsity: int
    n_rounds: int
    theta_bound: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sparsity", self.sparsity)
        check_count("n_rounds", self.n_rounds)
        if self.n_rounds > MAX_ROUNDS:
            raise ValueError(f"n_rounds must be at most {MAX_ROUNDS}, got {self.n_rounds}")
        check_positive("theta_bound", self.theta_bound)
        if self.sparsity > self.n_features:
            raise ValueError(f"sparsity must be at most n_features = {self.n_features}, got {self.sparsity}")

    @classmethod
    def for_users(
        cls, n_users: int, n_features: int, epsilon: float, sparsity: int, **options: Any
    ) -> "GradientProtocol":
        """Bounds and rounds of the paper: clip_x = clip_y = sqrt(log n), T = ceil(log n)."""
        automatic: dict[str, Any] = automatic_clip(n_users)
        automatic["n_rounds"] = automatic_rounds(n_users)
        return cls(n_features=n_features, epsilon=epsilon, sparsity=sparsity, **(automatic | options))

    @property
    def budget(self) -> Budget:
        """epsilon once, in the one round that a user is asked in; delta is 0."""
        return Budget(self.epsilon, 0.0, 1, "l2-ball randomiser")

    @property
    def gradient_bound(self) -> float:
        """||x (<x, theta> - y)||_2 after clipping: |<x, theta>| <= clip_x ||theta||_1 <= clip_x sqrt(k') bound."""
        residual = math.sqrt(self.sparsity) * self.clip_x * self.theta_bound + self.clip_y
        return math.sqrt(self.n_features) * self.clip_x * residual

    @cached_property
    def releases(self) -> tuple[Release, ...]:
        return (L2BallRandomizer(self.epsilon, self.gradient_bound, self.n_features),)

    def vectors(
        self, X: Float[ndarray, "n d"], y: Float[ndarray, " n"], theta: Float[ndarray, " d"] | None = None
    ) -> Vectors:
        self.check_records(X, y)
        if theta is None:
            raise ValueError("theta must be the iterate of the server's request, got None")
        self.check_iterate(theta)
        X, y, outside = self.bounded(X, y)
        return Vectors((X * (X @ theta - y)[:, None],), outside)

    def check_iterate(self, theta: Float[ndarray, " d"]) -> None:
        """The gradient bound, and with it the guarantee, holds for sparse iterates in the ball only."""
        check_shape("theta", theta, (self.n_features,))
        check_finite("theta", theta)
        if np.count_nonzero(theta) > self.sparsity:
            raise ValueError(f"theta must have at most {self.sparsity} nonzero entries, got {np.count_nonzero(theta)}")
        norm = math.hypot(*theta.tolist())  # no overflow, whatever the server sends
        if norm > self.theta_bound * (1 + 1e-9):
            raise ValueError(f"theta must have l2 norm at most {self.theta_bound:g}, got {norm:g}")


ENUMS: dict[str, Any] = {"beyond": Beyond, "calibration": Calibration}
PROTOCOLS: dict[str, Any] = {c.__name__: c for c in (MomentProtocol, PublicFeatureProtocol, GradientProtocol)}


def check_delta(delta: float | None, calibration: Calibration) -> None:
    if calibration is Calibration.PURE:
        if delta:
            raise ValueError(f"delta must be None or 0 where the calibration is pure, got {delta!r}")
    elif delta is None:
        raise ValueError("delta must be in (0, 1), got None; only the pure calibration does without")
    else:
        check_positive("delta", delta, below=1.0)


def gaussian_sigma(calibration: Calibration, epsilon: float, delta: float | None, dimension: int) -> float:
    """Noise for a query of sensitivity 1 in so many numbers, after the cost of sending integers."""
    assert delta is not None
    left_epsilon, left_delta = lattice_loss(epsilon, delta, dimension)
    if calibration is not Calibration.CLASSICAL:
        return analytic_gaussian_sigma(left_epsilon, left_delta)
    sigma = classical_gaussian_sigma(left_epsilon, left_delta)
    if gaussian_delta(sigma, left_epsilon) > left_delta:
        raise ValueError(
            f"the classical constants do not deliver epsilon = {epsilon:g} at delta = {delta:g}: "
            "use another calibration"
        )
    return sigma


def automatic_clip(n_users: int) -> dict[str, float]:
    check_count("n_users", n_users)
    bound = math.sqrt(max(math.log(n_users), 1.0))
    return {"clip_x": bound, "clip_y": bound}


def automatic_rounds(n_users: int) -> int:
    """T = ceil(log n)."""
    check_count("n_users", n_users)
    return max(math.ceil(math.log(n_users)), 1)


def upper_products(X: Float[ndarray, "n d"]) -> Float[ndarray, "n triangle"]:
    """Upper triangle of x x^T, row by row."""
    n, d = X.shape
    out = np.empty((n, d * (d + 1) // 2))
    at = 0
    for j in range(d):
        np.multiply(X[:, j : j + 1], X[:, j:], out=out[:, at : at + d - j])
        at += d - j
    return out


def symmetric(triangle: Float[ndarray, " triangle"], d: int) -> Float[ndarray, "d d"]:
    """The symmetric matrix with this upper triangle."""
    matrix = np.zeros((d, d))
    matrix[np.triu_indices(d)] = triangle
    return matrix + np.triu(matrix, 1).T
