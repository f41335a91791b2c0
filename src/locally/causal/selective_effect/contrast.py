"""The same effect with an instrument of any number of values, through a contrast h(Z).

Weights (2Z - 1) / (f D) become {h - E[h|X]} / E[{h - E[h|X]} v(Z, X) | X]. Source: arXiv 1907.11882 for two values; any
h identifies the effect, so that estimates that differ by more than their errors speak against the assumptions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from joblib import Parallel, delayed
from numpy import ndarray
from sklearn.base import BaseEstimator
from sklearn.model_selection import KFold

from locally.causal.selective_effect.effect import Effect, Status, Table
from locally.causal.selective_effect.influence import keep_from_zero
from locally.causal.selective_effect.learners import check_learner, fit_predict, out_of_fold
from locally.causal.selective_effect.observations import Observations
from locally.checks import check_count, check_nonnegative


class ContrastIVATE(BaseEstimator):
    """Debiased effect of any treatment with any numeric instrument that may act on the outcome.

    Args:
        ml_z: regressor of h(Z) given X (or a classifier, for a binary contrast).
        ml_a: learner of A given (Z, X); a classifier if A is binary.
        ml_y: regressor of Y given (Z, X).
        ml_moment: regressor of the products of residuals given X.
        contrast: h, from the instrument column to a column; default the instrument itself. Which one is used decides
            the precision: take the values of Z between which the variance of A differs most.
        n_folds: at least 2.
        n_rep: repetitions of the split.
        trim_d: least |E[{h - E[h|X]} v | X]|, in units of Var(h) and a squared treatment.
        n_jobs: folds that run at a time.
        random_state: seed of the splits and of learners that were given none.

    Attributes:
        coef_, se_, effect_: the effect, its standard error, the `Effect`.
        n_stabilised_: rows (over repetitions) at which trim_d took hold.

    >>> from sklearn.linear_model import LinearRegression
    >>> rng = np.random.default_rng(0)
    >>> X, u, z = rng.uniform(-1, 1, (4000, 1)), rng.normal(size=4000), rng.integers(0, 3, 4000).astype(float)
    >>> a = z + u + (0.5 + z) * rng.normal(size=4000)  # the instrument moves the variance of the treatment
    >>> y = 2 * a + z**2 + X[:, 0] + u + rng.normal(0, 0.5, 4000)
    >>> ols = LinearRegression()
    >>> low, high = ContrastIVATE(ols, ols, ols, ols, random_state=0).fit(y, a, z, X).confint()
    >>> bool(low < 2 < high)
    True
    """

    def __init__(
        self,
        ml_z: Any,
        ml_a: Any,
        ml_y: Any,
        ml_moment: Any,
        *,
        contrast: Callable[[Float[ndarray, " n"]], Float[ndarray, " n"]] | None = None,
        n_folds: int = 5,
        n_rep: int = 1,
        trim_d: float = 0.03,
        n_jobs: int | None = None,
        random_state: int | None = None,
    ) -> None:
        self.ml_z = ml_z
        self.ml_a = ml_a
        self.ml_y = ml_y
        self.ml_moment = ml_moment
        self.contrast = contrast
        self.n_folds = n_folds
        self.n_rep = n_rep
        self.trim_d = trim_d
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, y: Any, a: Any, z: Any, X: Any) -> "ContrastIVATE":
        """Fit to columns, or to names of columns of X.

        Raises:
            TypeError, ValueError: naming the argument or column.
        """
        check_count("n_folds", self.n_folds, at_least=2)
        check_count("n_rep", self.n_rep)
        check_nonnegative("trim_d", self.trim_d)
        obs = Observations.read(y, a, z, X)
        for name in ("ml_z", "ml_a", "ml_y", "ml_moment"):
            check_learner(name, getattr(self, name), probability=False)
        if obs.n < 4 * self.n_folds:
            raise ValueError(f"n_folds is {self.n_folds}, which needs at least {4 * self.n_folds} rows, got {obs.n}")
        h = obs.z if self.contrast is None else np.asarray(self.contrast(obs.z), dtype=np.float64)
        if h.shape != obs.z.shape or not np.isfinite(h).all() or (h == h[0]).all():
            raise ValueError("contrast must turn the instrument into a finite column of its length that varies")
        least = self.trim_d * float(h.var())
        scores, small = np.empty((self.n_rep, obs.n)), np.empty((self.n_rep, obs.n), bool)
        for r, seed in enumerate(np.random.SeedSequence(self.random_state).generate_state(self.n_rep) % 2**31):
            folds = list(KFold(self.n_folds, shuffle=True, random_state=int(seed)).split(obs.X))
            done = Parallel(n_jobs=self.n_jobs)(
                delayed(self._fold_scores)(obs, h, train, out, least, int(seed) + 1009 * s)
                for s, (train, out) in enumerate(folds)
            )
            for (_, out), (of_fold, moved) in zip(folds, done):
                scores[r, out], small[r, out] = of_fold, moved
        self.n_stabilised_ = int(small.sum())
        status = Status.WEAK if small.mean() > 0.5 else Status.IDENTIFIED
        self.effect_ = Effect.from_scores(scores, status, obs.names[1])
        self.coef_, self.se_ = self.effect_.estimate, self.effect_.standard_error
        return self

    def confint(self, level: float = 0.95) -> tuple[float, float]:
        """Bounds of the effect at this level, in (0, 1); needs `fit`."""
        return self.effect_.confint(level)

    def summary(self, level: float = 0.95) -> Table:
        """One row: effect, standard error, t, p-value and the bounds at this level; prints as text."""
        return self.effect_.summary(level)

    def _fold_scores(
        self, obs: Observations, h: ndarray, train: ndarray, out: ndarray, least: float, seed: int
    ) -> tuple[ndarray, ndarray]:
        """Scores of the held-out rows, and where the variance contrast was kept from zero."""
        inner = np.random.default_rng(seed).permutation(train.size) % 2
        both = np.column_stack([obs.z, obs.X])
        residuals, fitted = [], []
        for learner, features, column in (
            (self.ml_z, obs.X, h),
            (self.ml_a, both, obs.a),
            (self.ml_y, both, obs.y),
        ):
            fitted.append(fit_predict(learner, features[train], column[train], features[out], seed))
            residuals.append(column[train] - out_of_fold(learner, features[train], column[train], inner, seed))
        tilt, of_a, of_y = residuals

        def regress(target: ndarray) -> ndarray:
            return fit_predict(self.ml_moment, obs.X[train], target, obs.X[out], seed)

        raw = regress(tilt * of_a**2)
        kappa = keep_from_zero(raw, least)
        beta = regress(tilt * of_a * of_y) / kappa
        # omega(X) is what is left of the covariance, whatever Z: mean of A-Y products less beta times that of A-A
        omega = regress(of_a * of_y) - beta * regress(of_a**2)
        e, p, m = fitted
        a, y = obs.a[out], obs.y[out]
        product = (a - p) * (y - m - beta * (a - p))
        return beta + (h[out] - e) / kappa * (product - omega), kappa != raw
