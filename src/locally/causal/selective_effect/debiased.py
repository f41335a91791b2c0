"""Multiply debiased machine learning of the effect: any learners, cross-fitted. Source: arXiv 1907.11882."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from locally.causal.selective_effect.crossfit import Libraries, cross_fit
from locally.causal.selective_effect.diagnostics import Overlap, Sensitivity, overlap, sensitivity
from locally.causal.selective_effect.effect import Effect, Status, Table
from locally.causal.selective_effect.influence import WorkingValues
from locally.causal.selective_effect.learners import check_learner
from locally.causal.selective_effect.observations import Observations, check_binary, check_cells
from locally.checks import check_between, check_choice, check_count, check_nonnegative

Mixture = list[tuple[float, WorkingValues]]  # weights that sum to one, and what the combinations say


class InvalidIVATE(BaseEstimator):
    """Average treatment effect with an instrument that may act on the outcome, by debiased machine learning.

    Each nuisance has one learner. The estimate is the mean of cross-fitted efficient scores, its variance theirs; it
    reaches root-n rates if products of the nuisances' errors vanish faster than that. `ml_a` is the one to get right:
    its model of the treatment enters every product.

    Args:
        ml_z: classifier of the instrument given X.
        ml_a: classifier of the treatment given X, fitted in each arm (a regressor if the treatment is not binary).
        ml_y: regressor of the outcome given X, fitted in each cell of arm and treatment or, with outcome="moments", in
            each arm, and there of the residual products too. A classifier will do for a binary outcome.
        ml_beta, ml_theta, ml_omega: instead of `ml_y`: a learner of the effect (`PlugInEffect`, `SieveEffect`),
            regressors of Y - beta A given arm and X, and of the product of residuals given X. These keep all four sets
            of nuisances that suffice: pi, p; pi, beta, theta; p, beta, omega; beta, theta, omega.
        outcome: "cells" or "moments"; a treatment that is not binary needs "moments".
        n_folds: at least 2.
        n_rep: repetitions of the split; the median over them is reported.
        trim_z: pi is clipped to [trim_z, 1 - trim_z], in [0, 0.5); `overlap()` counts.
        trim_d: least size of v_1 - v_0, in units of a squared treatment; smaller ones are replaced, `overlap()` counts.
        n_jobs: fits that run at a time, as in scikit-learn.
        random_state: seed of the splits and of learners that were given none.
        callback: called with (done, total) after each cross-fitting; raising stops the fit.

    Attributes:
        coef_, se_: the effect and its standard error.
        effect_: the `Effect`: status, scores.
        values_: for each repetition the working values behind it, as a weighted list.

    Raises:
        TypeError, ValueError: from `fit`, naming what is wrong with a learner, an option or the data.

    >>> from sklearn.linear_model import LinearRegression, LogisticRegression
    >>> rng = np.random.default_rng(0)
    >>> X, u = rng.uniform(-1, 1, (4000, 1)), rng.uniform(-1, 1, 4000)
    >>> z = (rng.random(4000) < 0.5).astype(float)
    >>> a = (rng.random(4000) < 0.1 + 0.35 * z + 0.09 * u).astype(float)
    >>> y = 2 * a + z + X[:, 0] + 3 * u + rng.normal(0, 0.5, 4000)  # z acts on y, u is not seen
    >>> model = InvalidIVATE(LogisticRegression(), LogisticRegression(), LinearRegression(), random_state=0)
    >>> low, high = model.fit(y, a, z, X).confint()
    >>> bool(low < 2 < high)
    True
    """

    def __init__(
        self,
        ml_z: Any,
        ml_a: Any,
        ml_y: Any = None,
        *,
        ml_beta: Any = None,
        ml_theta: Any = None,
        ml_omega: Any = None,
        outcome: str = "cells",
        n_folds: int = 5,
        n_rep: int = 1,
        trim_z: float = 0.01,
        trim_d: float = 0.03,
        n_jobs: int | None = None,
        random_state: int | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> None:
        self.ml_z = ml_z
        self.ml_a = ml_a
        self.ml_y = ml_y
        self.ml_beta = ml_beta
        self.ml_theta = ml_theta
        self.ml_omega = ml_omega
        self.outcome = outcome
        self.n_folds = n_folds
        self.n_rep = n_rep
        self.trim_z = trim_z
        self.trim_d = trim_d
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.callback = callback

    def fit(self, y: Any, a: Any, z: Any, X: Any) -> "InvalidIVATE":
        """Fit to columns, or to names of columns of X: `fit("wealth", "joined", "eligible", frame)`."""
        obs, libraries = self._prepare(y, a, z, X)
        mixtures = []
        for r, seed in enumerate(self._seeds(self.n_rep)):
            fits = cross_fit(obs, libraries, self.n_folds, seed, self.n_jobs)
            mixtures.append([(1.0, fits.values((0,) * len(fits.shape), self.trim_z, self.trim_d))])
            self._report(r + 1, self.n_rep)
        self._conclude(obs, mixtures)
        return self

    def confint(self, level: float = 0.95) -> tuple[float, float]:
        """Normal confidence interval of the effect."""
        return self.effect_.confint(level)

    def summary(self, level: float = 0.95) -> Table:
        """Coefficient, standard error, t, p, interval."""
        return self.effect_.summary(level)

    def overlap(self) -> Overlap:
        """How far the data carry the estimate: propensities, variance gap, weights, what was trimmed."""
        return overlap(self.observations_, self.values_, self.trim_z, self.trim_d)

    def sensitivity(self, deltas: Sequence[float] | None = None, level: float = 0.95) -> Sensitivity:
        """Effect and interval if confounding differs between the arms by the share delta of its mean.

        The estimate rests on the covariance omega that confounding causes being the same in both arms; here
        omega_1 - omega_0 = delta (omega_1 + omega_0) / 2, delta in [-2, 2]; default 41 values in [-0.5, 0.5].
        """
        return sensitivity(self.observations_, self.values_, deltas, level, self.trim_d)

    def _prepare(self, y: Any, a: Any, z: Any, X: Any) -> tuple[Observations, Libraries]:
        check_choice("outcome", self.outcome, ("cells", "moments"))
        check_count("n_folds", self.n_folds, at_least=2)
        check_count("n_rep", self.n_rep)
        check_between("trim_z", self.trim_z, 0, 0.499)
        check_nonnegative("trim_d", self.trim_d)
        obs = Observations.read(y, a, z, X)
        check_binary("z", obs.z)
        binary = bool(np.isin(obs.a, (0, 1)).all())
        libraries = self._libraries(binary)
        if libraries.outcome != "moments":
            check_binary('a (unless outcome="moments")', obs.a)
        check_cells(obs, self.n_folds)
        return obs, libraries

    def _libraries(self, binary: bool) -> Libraries:
        union = {name: getattr(self, name) for name in ("ml_beta", "ml_theta", "ml_omega")}
        given = [name for name, value in union.items() if value is not None]
        if self.ml_y is None and len(given) < 3:
            raise ValueError("ml_y must be given, or ml_beta, ml_theta and ml_omega in its place")
        if self.ml_y is not None and given:
            raise ValueError(f"{given[0]} must be left out where ml_y is given")
        return Libraries(
            z=self._library("ml_z", probability=True),
            a=self._library("ml_a", probability=binary),
            y=self._library("ml_y"),
            beta=self._library("ml_beta"),
            theta=self._library("ml_theta"),
            omega=self._library("ml_omega"),
            outcome="union" if given else self.outcome,
        )

    def _library(self, name: str, probability: bool = False) -> tuple[Any, ...]:
        value = getattr(self, name)
        if value is None:
            return ()
        check_learner(name, value, probability=probability)
        return (value,)

    def _seeds(self, count: int) -> list[int]:
        return [int(s) for s in np.random.SeedSequence(self.random_state).generate_state(count) % 2**31]

    def _report(self, done: int, total: int) -> None:
        if self.callback is not None:
            self.callback(done, total)

    def _conclude(self, obs: Observations, mixtures: list[Mixture]) -> None:
        """Scores, effect and status from the working values of each repetition."""
        self.observations_, self.values_ = obs, mixtures
        scores = np.stack([sum(w * v.scores(obs.z, obs.a, obs.y) for w, v in mixture) for mixture in mixtures])
        weak = np.mean([np.mean(np.abs(mixture[0][1].D) <= self.trim_d) for mixture in mixtures]) > 0.5
        status = Status.WEAK if weak or not np.isfinite(scores).all() else Status.IDENTIFIED
        if status is Status.WEAK:
            warnings.warn(str(status), stacklevel=3)
        self.effect_ = Effect.from_scores(scores, status, obs.names[1])
        self.coef_, self.se_ = self.effect_.estimate, self.effect_.standard_error
