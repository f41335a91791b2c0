"""Second moments of every environment: all that risks, gaps and their sampling error need to know of the data.

With S_e = E_e[x x'], s_e = E_e[x y] and a linear predictor v the risk is E_e[y^2] - 2 v' s_e + v' S_e v. A
representation Phi and a head w, v = Phi' w, are eps-approximately invariant where the gap ||Phi (S_e v - s_e)||_2, half
the norm of the gradient of the risk in w, is at most eps. A gap is in the units of the rows of Phi: of single columns
for a subset, of unit variance for a linear map. Source: arXiv 2205.15196.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count, check_finite, check_shape


class TooFewEnvironments(ValueError):
    """One environment, in which everything is invariant."""


class TooFewRows(ValueError):
    """An environment with so few rows that some candidate fits it exactly."""


class ConstantColumn(ValueError):
    """A covariate, or the target, that never varies."""


class SingularCovariance(ValueError):
    """Covariates of which one is a linear combination of others: no head on them is unique."""


@dataclass(frozen=True, eq=False)
class EnvironmentMoments:
    """Moments of N environments in standard units.

    Attributes:
        xx, xy, yy: E_e[x x'], E_e[x y] and E_e[y^2]. Where `has_constant`, x_0 is 1 and in every representation.
        rows: rows behind each environment; infinite for population moments.
        labels: what the environments are called.
        has_constant: whether x_0 is the constant 1.
        centre, scale: what was taken off the covariates and the target (last), and what they were divided by.
    """

    xx: Float[ndarray, "N d d"]
    xy: Float[ndarray, "N d"]
    yy: Float[ndarray, " N"]
    rows: Float[ndarray, " N"]
    labels: tuple[Any, ...]
    has_constant: bool
    centre: Float[ndarray, " features_plus_1"]
    scale: Float[ndarray, " features_plus_1"]

    def __len__(self) -> int:
        return len(self.yy)

    @property
    def features(self) -> int:
        """Number of covariates, the constant apart."""
        return self.xy.shape[1] - self.has_constant

    @classmethod
    def from_rows(
        cls,
        X: Float[ndarray, "n d"],
        y: Float[ndarray, " n"],
        environments: Any,
        *,
        intercept: bool = True,
        standardize: bool = True,
    ) -> "EnvironmentMoments":
        """From rows with an environment label each, O(n d^2).

        Args:
            X, y: covariates and target, finite.
            environments: n labels, strings or numbers.
            intercept: centre by the mean over environments and put a constant into every representation, so that
                environments may shift means; otherwise moments are about zero.
            standardize: divide every column by its standard deviation pooled over environments.

        Raises:
            ConstantColumn: a column or the target never varies.
            ValueError: NaN or infinity, lengths that differ, labels that are no vector.
        """
        table, names, groups = _grouped(X, y, environments)
        _refuse_constant_columns(table)
        centre = np.mean([g.mean(axis=0) for g in groups], axis=0) if intercept else np.zeros(table.shape[1])
        rows = np.array([len(g) for g in groups], dtype=np.float64)
        return cls._build(_second_moments(groups, centre, intercept), rows, names, intercept, centre, standardize)

    @classmethod
    def from_covariances(
        cls,
        covariances: Float[ndarray, "N p p"],
        target: int,
        *,
        rows: Any = math.inf,
        standardize: bool = False,
        labels: Sequence[Any] | None = None,
    ) -> "EnvironmentMoments":
        """From a stack of covariance (or second-moment) matrices, of which index `target` is Y.

        `rows` is the number behind each, one for all or one each; infinite for population moments.
        """
        check_shape("covariances", covariances, (None, None, None))
        check_finite("covariances", covariances)
        N, p, width = covariances.shape
        if p != width or not 0 <= target < p:
            raise ValueError(f"covariances must be square with a column {target}, got shape {covariances.shape}")
        if np.abs(covariances - covariances.transpose(0, 2, 1)).max() > 1e-8 * np.abs(covariances).max():
            raise ValueError("covariances must be symmetric")
        order = np.append(np.delete(np.arange(p), target), target)
        second = covariances[:, order][:, :, order]
        variances = np.diagonal(second, axis1=1, axis2=2)
        if (variances < 0).any():
            raise ValueError("covariances must have non-negative diagonals")
        counts = np.broadcast_to(np.asarray(rows, dtype=np.float64), (N,))
        if not (counts >= 1).all():
            raise ValueError(f"rows must be at least 1, got {counts.min()}")
        names = tuple(range(N)) if labels is None else tuple(labels)
        if len(names) != N:
            raise ValueError(f"labels must name {N} environments, got {len(names)}")
        if (dead := np.flatnonzero(variances.max(axis=0) == 0)).size:
            raise ConstantColumn(f"covariances must vary somewhere, but columns {order[dead].tolist()} are zero")
        return cls._build(second, counts, names, False, np.zeros(p), standardize)

    @classmethod
    def _build(
        cls,
        second: Float[ndarray, "N p p"],
        rows: Float[ndarray, " N"],
        labels: tuple[Any, ...],
        has_constant: bool,
        centre: Float[ndarray, " features_plus_1"],
        standardize: bool,
    ) -> "EnvironmentMoments":
        pooled = second.mean(axis=0)
        scale = np.sqrt(np.diagonal(pooled)) if standardize else np.ones(len(pooled))  # 1 for the constant
        return cls._scaled(second, rows, labels, has_constant, centre, scale[int(has_constant) :])

    @classmethod
    def _scaled(
        cls,
        second: Float[ndarray, "N p p"],
        rows: Float[ndarray, " N"],
        labels: tuple[Any, ...],
        has_constant: bool,
        centre: Float[ndarray, " features_plus_1"],
        scale: Float[ndarray, " features_plus_1"],
    ) -> "EnvironmentMoments":
        every = np.append(1.0, scale) if has_constant else scale
        second = second / np.outer(every, every)
        d = len(every) - 1
        xx, xy, yy = second[:, :d, :d], second[:, :d, d], second[:, d, d]
        return cls(xx, xy, yy, rows, labels, has_constant, centre, scale)

    def like_rows(self, X: Float[ndarray, "n d"], y: Float[ndarray, " n"], environments: Any) -> "EnvironmentMoments":
        """Moments of other rows, centred and scaled as these were."""
        _, names, groups = _grouped(X, y, environments)
        check_shape("X", X, (None, self.features))
        rows = np.array([len(g) for g in groups], dtype=np.float64)
        second = _second_moments(groups, self.centre, self.has_constant)
        return self._scaled(second, rows, names, self.has_constant, self.centre, self.scale)

    def like_covariances(
        self, covariances: Float[ndarray, "N p p"], target: int, rows: Any = math.inf
    ) -> "EnvironmentMoments":
        """Moments from other covariance matrices, scaled as these were; only where there is no constant."""
        if self.has_constant:
            raise ValueError("covariances cannot stand for rows where moments hold a constant: leave the intercept out")
        other = self.from_covariances(covariances, target, rows=rows)
        if other.features != self.features:
            raise ValueError(f"covariances must have {self.features + 1} columns, got {other.features + 1}")
        return self._scaled(other.second(), other.rows, other.labels, False, self.centre, self.scale)

    def select(self, which: Int[ndarray, " M"]) -> "EnvironmentMoments":
        """Some of the environments, in the same units."""
        labels = tuple(self.labels[i] for i in which)
        some = self.xx[which], self.xy[which], self.yy[which], self.rows[which]
        return EnvironmentMoments(*some, labels, self.has_constant, self.centre, self.scale)

    def pooled(self) -> tuple[Float[ndarray, "d d"], Float[ndarray, " d"], float]:
        """Means over environments, each counting the same: their risk is the mean risk."""
        return self.xx.mean(axis=0), self.xy.mean(axis=0), float(self.yy.mean())

    def second(self) -> Float[ndarray, "N p p"]:
        """The moments of (x, y) as one stack of matrices, the target last."""
        N, d = self.xy.shape
        full = np.empty((N, d + 1, d + 1))
        full[:, :d, :d], full[:, :d, d], full[:, d, :d], full[:, d, d] = self.xx, self.xy, self.xy, self.yy
        return full

    def risks(self, v: Float[ndarray, " d"]) -> Float[ndarray, " N"]:
        """Mean squared error of v in every environment, in squared units of the scaled target."""
        return self.yy - 2 * self.xy @ v + np.einsum("i,nij,j->n", v, self.xx, v)

    def gradients(self, v: Float[ndarray, " d"]) -> Float[ndarray, "N d"]:
        """S_e v - s_e, half the gradient of every risk."""
        return self.xx @ v - self.xy

    def gaps(self, Phi: Float[ndarray, "r d"], w: Float[ndarray, " r"]) -> Float[ndarray, " N"]:
        """||Phi (S_e Phi' w - s_e)||_2 for every environment."""
        return np.linalg.norm(self.gradients(Phi.T @ w) @ Phi.T, axis=1)

    def sampling_radius(self, Phi: Float[ndarray, "r d"], w: Float[ndarray, " r"], eta: float) -> Float[ndarray, " N"]:
        """How far the gaps of a fixed (Phi, w) may lie off those of the population, at confidence 1 - eta for all N.

        For Gaussian rows entry j of the gradient has variance (S_jj risk + g_j^2) / n; a union bound over entries and
        environments. A normal approximation: exact only as n grows. Zero for population moments.
        """
        v = Phi.T @ w
        g = self.gradients(v) @ Phi.T
        diagonal = np.einsum("ri,nij,rj->nr", Phi, self.xx, Phi)
        return gaussian_radius(diagonal, g, self.risks(v), self.rows, eta)


def gaussian_radius(
    diagonal: Float[ndarray, "*batch N r"],
    gradient: Float[ndarray, "*batch N r"],
    risk: Float[ndarray, "*batch N"],
    rows: Float[ndarray, " N"],
    eta: float,
) -> Float[ndarray, "*batch N"]:
    """sqrt(2 log(2 r N / eta) / n sum_j (S_jj risk + g_j^2)), batched over candidates."""
    N, r = gradient.shape[-2:]
    if r == 0:
        return np.zeros(risk.shape)
    spread = diagonal.sum(axis=-1) * np.maximum(risk, 0) + (gradient**2).sum(axis=-1)
    return np.sqrt(2 * math.log(2 * r * N / eta) / rows * spread)


def bootstrap_radius(
    Z: Float[ndarray, "n r"],
    residual: Float[ndarray, " n"],
    eta: float,
    rng: np.random.Generator,
    draws: int = 999,
) -> float:
    """The same for one environment by the multiplier bootstrap, for rows that are not Gaussian.

    Args:
        Z: the representation of each row, x Phi'.
        residual: prediction minus target.
        eta: one minus the confidence, for this environment alone.
    """
    check_count("draws", draws, at_least=99)
    scores = Z * residual[:, None]
    scores = scores - scores.mean(axis=0)
    lengths = np.empty(draws)
    block = max(1, 4_000_000 // len(Z))
    for start in range(0, draws, block):
        weights = rng.standard_normal((min(block, draws - start), len(Z)))
        lengths[start : start + block] = np.linalg.norm(weights @ scores, axis=1) / len(Z)
    return float(np.quantile(lengths, 1 - eta))


def _grouped(
    X: Float[ndarray, "n d"], y: Float[ndarray, " n"], environments: Any
) -> tuple[Float[ndarray, "n p"], tuple[Any, ...], list[Float[ndarray, "_ p"]]]:
    """The table (X, y), the names of the environments, and the rows of each."""
    check_shape("X", X, (None, None))
    check_shape("y", y, (len(X),))
    check_finite("X", X)
    check_finite("y", y)
    labels = np.asarray(environments)
    check_shape("environments", labels, (len(X),))
    if labels.dtype.kind == "f":
        check_finite("environments", labels)
    names, which = np.unique(labels, return_inverse=True)
    order = np.argsort(which, kind="stable")
    cuts = np.searchsorted(which[order], np.arange(1, len(names)))
    table = np.column_stack([X, y]).astype(np.float64, copy=False)[order]
    return table, tuple(names.tolist()), np.split(table, cuts)


def _second_moments(
    groups: list[Float[ndarray, "_ p"]], centre: Float[ndarray, " p"], constant: bool
) -> Float[ndarray, "N q q"]:
    """About `centre`, with a constant in front if asked for."""
    means = np.array([g.mean(axis=0) for g in groups])
    off = means - centre
    within = np.array([(g - m).T @ (g - m) / len(g) for g, m in zip(groups, means)])
    second = within + off[:, :, None] * off[:, None, :]
    if not constant:
        return second
    full = np.empty((len(groups), second.shape[1] + 1, second.shape[1] + 1))
    full[:, 1:, 1:], full[:, 0, 1:], full[:, 1:, 0], full[:, 0, 0] = second, off, off, 1.0
    return full


def _refuse_constant_columns(table: Float[ndarray, "n p"]) -> None:
    size = np.abs(table).max(axis=0)
    dead = np.flatnonzero(np.ptp(table, axis=0) <= 1e-12 * size)
    if not dead.size:
        return
    if dead[-1] == table.shape[1] - 1:
        raise ConstantColumn("y must vary, but it is the same in every row")
    raise ConstantColumn(f"X must vary in every column, but columns {dead.tolist()} are constant: drop them")
