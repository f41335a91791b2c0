"""Cross-fitted nuisances of every candidate learner: no row is used to train what is predicted at it.

Three ways to write the law of (Z, A, Y) given X, each with its libraries and the sets of nuisances that suffice:
cells (pi, p, mu), moments (pi, p, m and c) and the union (pi, p, beta, theta, omega), which alone keeps all four.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from joblib import Parallel, delayed
from numpy import ndarray
from sklearn.model_selection import StratifiedKFold

from locally.causal.selective_effect.influence import WorkingValues, keep_from_zero
from locally.causal.selective_effect.learners import fit_predict, out_of_fold, seeded
from locally.causal.selective_effect.observations import Observations

INNER_FOLDS = 2


@dataclass(frozen=True)
class Fits(ABC):
    """Predictions of all candidates at all rows, each from the folds without that row.

    `shape` counts the candidates of each nuisance, `sufficient` lists the sets of nuisances (as axes of `shape`) of
    which one being right makes the estimate consistent; axis 0 is pi.
    """

    fold: Int[ndarray, " n"]
    pi: Float[ndarray, "K n"]

    axes: ClassVar[tuple[str, ...]]
    sufficient: ClassVar[tuple[tuple[int, ...], ...]]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def values(self, index: tuple[int, ...], trim_z: float, trim_d: float) -> WorkingValues:
        """What one candidate of each nuisance says, pi clipped and v_1 - v_0 kept from zero."""


@dataclass(frozen=True)
class CellFits(Fits):
    """pi, p and mu[a, z]; right if p is and pi or mu is."""

    p: Float[ndarray, "L 2 n"]
    mu: Float[ndarray, "M 2 2 n"]

    axes = ("pi", "p", "mu")
    sufficient = ((0, 1), (1, 2))

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.pi), len(self.p), len(self.mu)

    def values(self, index: tuple[int, ...], trim_z: float, trim_d: float) -> WorkingValues:
        k, l, m = index
        pi = np.clip(self.pi[k], trim_z, 1 - trim_z)
        return WorkingValues.from_cells(pi, self.p[l], self.mu[m], trim_d=trim_d)


@dataclass(frozen=True)
class MomentFits(Fits):
    """pi, p (with its variance v), and m with the covariance c of residuals; A need not be binary."""

    p: Float[ndarray, "L 2 n"]
    v: Float[ndarray, "L 2 n"]
    m: Float[ndarray, "M 2 n"]
    c: Float[ndarray, "L M 2 n"]

    axes = ("pi", "p", "m")
    sufficient = ((0, 1), (1, 2))

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.pi), len(self.p), len(self.m)

    def values(self, index: tuple[int, ...], trim_z: float, trim_d: float) -> WorkingValues:
        k, l, m = index
        pi = np.clip(self.pi[k], trim_z, 1 - trim_z)
        return WorkingValues.from_moments(pi, self.p[l], self.v[l], self.m[m], self.c[l, m], trim_d=trim_d)


@dataclass(frozen=True)
class UnionFits(Fits):
    """pi, p, beta, theta (given beta) and omega (given p, beta, theta): right if one of four sets is."""

    p: Float[ndarray, "L 2 n"]
    beta: Float[ndarray, "J n"]
    theta: Float[ndarray, "J T 2 n"]
    omega: Float[ndarray, "L J T W n"]

    axes = ("pi", "p", "beta", "theta", "omega")
    sufficient = ((0, 1), (0, 2, 3), (1, 2, 4), (2, 3, 4))

    @property
    def shape(self) -> tuple[int, ...]:
        L, J, T, W = self.omega.shape[:4]
        return len(self.pi), L, J, T, W

    def values(self, index: tuple[int, ...], trim_z: float, trim_d: float) -> WorkingValues:
        k, l, j, t, w = index
        pi = np.clip(self.pi[k], trim_z, 1 - trim_z)
        p = self.p[l]
        v = p * (1 - p)
        D = keep_from_zero(v[1] - v[0], trim_d)
        return WorkingValues(pi, p, v, D, self.beta[j], self.omega[l, j, t, w], self.theta[j, t])


@dataclass(frozen=True)
class Libraries:
    """Candidates for each nuisance; `y` for cells and moments, `beta`, `theta`, `omega` for the union."""

    z: tuple[Any, ...]
    a: tuple[Any, ...]
    y: tuple[Any, ...] = ()
    beta: tuple[Any, ...] = ()
    theta: tuple[Any, ...] = ()
    omega: tuple[Any, ...] = ()
    outcome: str = "cells"

    @property
    def groups(self) -> tuple[tuple[Any, ...], ...]:
        """In the order of the axes of the fits."""
        if self.outcome == "union":
            return self.z, self.a, self.beta, self.theta, self.omega
        return self.z, self.a, self.y

    def only(self, index: tuple[int, ...]) -> "Libraries":
        """One candidate each."""
        chosen = [(group[i],) for group, i in zip(self.groups, index)]
        if self.outcome == "union":
            z, a, beta, theta, omega = chosen
            return Libraries(z, a, (), beta, theta, omega, "union")
        z, a, y = chosen
        return Libraries(z, a, y, outcome=self.outcome)


def split(obs: Observations, n_folds: int, seed: int) -> Int[ndarray, " n"]:
    """Fold of each row, stratified on the instrument and, where it is binary, the treatment."""
    binary = np.isin(obs.a, (0, 1)).all()
    strata = 2 * obs.z + obs.a if binary else obs.z
    fold = np.empty(obs.n, np.int64)
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(obs.X, strata)
    for s, (_, out) in enumerate(folds):
        fold[out] = s
    return fold


def cross_fit(obs: Observations, libraries: Libraries, n_folds: int, seed: int, n_jobs: int | None = None) -> Fits:
    """Fit every candidate on each fold's complement, in parallel over folds and learners."""
    fold = split(obs, n_folds, seed)
    match libraries.outcome:
        case "cells":
            return _cells(obs, libraries, fold, seed, n_jobs)
        case "moments":
            fit: Callable[..., Any] = _moments_of_fold
        case _:
            fit = _union_of_fold
    tasks = (delayed(fit)(obs[fold != s], obs.X[fold == s], libraries, seed + 1009 * s) for s in range(n_folds))
    parts = Parallel(n_jobs=n_jobs)(tasks)
    kind = MomentFits if libraries.outcome == "moments" else UnionFits
    order = np.argsort(np.argsort(fold, kind="stable"), kind="stable")  # parts lie fold by fold
    return kind(fold, *(np.concatenate(arrays, axis=-1)[..., order] for arrays in zip(*parts)))


def _cells(obs: Observations, libraries: Libraries, fold: ndarray, seed: int, n_jobs: int | None) -> CellFits:
    n = obs.n
    pi = np.empty((len(libraries.z), n))
    p = np.empty((len(libraries.a), 2, n))
    mu = np.empty((len(libraries.y), 2, 2, n))
    # the row of predictions that each fit fills, its learner, its training rows within a fold's complement, its target
    everyone = np.ones(n, bool)
    work: list[tuple[ndarray, Any, ndarray, ndarray]] = []
    for k, learner in enumerate(libraries.z):
        work.append((pi[k], learner, everyone, obs.z))
    for l, learner in enumerate(libraries.a):
        work.extend((p[l, z], learner, obs.z == z, obs.a) for z in (0, 1))
    for m, learner in enumerate(libraries.y):
        work.extend((mu[m, a, z], learner, (obs.z == z) & (obs.a == a), obs.y) for a in (0, 1) for z in (0, 1))
    jobs = [(s, item) for s in range(fold.max() + 1) for item in work]
    fitted = Parallel(n_jobs=n_jobs)(
        delayed(fit_predict)(
            learner,
            obs.X[rows & (fold != s)],
            target[rows & (fold != s)],
            obs.X[fold == s],
            seed + 1009 * s,
        )
        for s, (_, learner, rows, target) in jobs
    )
    for (s, (slot, *_)), predicted in zip(jobs, fitted):
        slot[fold == s] = predicted
    return CellFits(fold, pi, p, mu)


Shared = tuple[Float[ndarray, "K m"], Float[ndarray, "L 2 m"], Float[ndarray, "L n"], Int[ndarray, " n"]]


def _first_stage(obs: Observations, X: Float[ndarray, "m d"], libraries: Libraries, seed: int) -> Shared:
    """pi and p at new rows, p out of fold at the training rows (own arm), and the inner folds."""
    inner = split(obs, INNER_FOLDS, seed)
    arms = [obs.z == z for z in (0, 1)]
    pi = np.stack([fit_predict(g, obs.X, obs.z, X, seed) for g in libraries.z])
    p = np.stack([[fit_predict(g, obs.X[rows], obs.a[rows], X, seed) for rows in arms] for g in libraries.a])
    p_train = np.empty((len(libraries.a), obs.n))
    for l, g in enumerate(libraries.a):
        for rows in arms:
            p_train[l, rows] = out_of_fold(g, obs.X[rows], obs.a[rows], inner[rows], seed)
    return pi, p, p_train, inner


def _moments_of_fold(
    obs: Observations, X: Float[ndarray, "m d"], libraries: Libraries, seed: int
) -> tuple[ndarray, ...]:
    """pi, p, v, m, c at new rows X from the training rows `obs`."""
    pi, p, p_train, inner = _first_stage(obs, X, libraries, seed)
    arms = [obs.z == z for z in (0, 1)]
    L, M = len(libraries.a), len(libraries.y)
    v = p * (1 - p)
    if not np.isin(obs.a, (0, 1)).all():
        for l, z in np.ndindex(L, 2):
            rows = arms[z]
            square = (obs.a[rows] - p_train[l, rows]) ** 2
            v[l, z] = _variance(libraries.a[l], obs.X[rows], square, inner[rows], X, seed)
    m = np.empty((M, 2, len(X)))
    c = np.empty((L, M, 2, len(X)))
    for i, z in np.ndindex(M, 2):
        learner, rows = libraries.y[i], arms[z]
        m[i, z] = fit_predict(learner, obs.X[rows], obs.y[rows], X, seed)
        residual = obs.y[rows] - out_of_fold(learner, obs.X[rows], obs.y[rows], inner[rows], seed)
        for l in range(L):
            c[l, i, z] = fit_predict(learner, obs.X[rows], (obs.a[rows] - p_train[l, rows]) * residual, X, seed)
    return pi, p, v, m, c


def _variance(
    learner: Any,
    X: Float[ndarray, "n d"],
    square: Float[ndarray, " n"],
    fold: Int[ndarray, " n"],
    X_new: Float[ndarray, "m d"],
    seed: int,
) -> Float[ndarray, " m"]:
    """A positive variance: the logarithm of squared residuals is learnt, its exponential scaled to their mean."""
    floor = 1e-6 * square.mean() + np.finfo(float).tiny
    logs = np.log(square + floor)
    # the scale comes from predictions out of fold: in sample a flexible learner would fit the noise of the logarithm
    scale = np.mean(square * np.exp(-out_of_fold(learner, X, logs, fold, seed)))
    return scale * np.exp(fit_predict(learner, X, logs, X_new, seed))


def _union_of_fold(obs: Observations, X: Float[ndarray, "m d"], libraries: Libraries, seed: int) -> tuple[ndarray, ...]:
    """pi, p, beta, theta, omega at new rows X from the training rows `obs`."""
    pi, p, p_train, inner = _first_stage(obs, X, libraries, seed)
    arms = [obs.z == z for z in (0, 1)]
    L, J, T, W = len(libraries.a), len(libraries.beta), len(libraries.theta), len(libraries.omega)
    beta = np.empty((J, len(X)))
    theta = np.empty((J, T, 2, len(X)))
    omega = np.empty((L, J, T, W, len(X)))
    for j, effect in enumerate(libraries.beta):
        beta[j] = seeded(effect, seed).fit(obs).predict(X)
        beta_train = np.empty(obs.n)
        for s in range(INNER_FOLDS):
            beta_train[inner == s] = seeded(effect, seed + s).fit(obs[inner != s]).predict(obs.X[inner == s])
        target = obs.y - beta_train * obs.a
        for t, learner in enumerate(libraries.theta):
            residual = np.empty(obs.n)
            for z, rows in enumerate(arms):
                theta[j, t, z] = fit_predict(learner, obs.X[rows], target[rows], X, seed)
                residual[rows] = target[rows] - out_of_fold(learner, obs.X[rows], target[rows], inner[rows], seed)
            for l, w in np.ndindex(L, W):
                product = (obs.a - p_train[l]) * residual
                omega[l, j, t, w] = fit_predict(libraries.omega[w], obs.X, product, X, seed)
    return pi, p, beta, theta, omega
