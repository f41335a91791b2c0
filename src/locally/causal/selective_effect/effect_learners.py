"""Learners of beta(X), the effect given the covariates: candidates of their own beside those of theta and omega."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from sklearn.base import BaseEstimator

from locally.causal.selective_effect.equations import EstimatingEquations
from locally.causal.selective_effect.influence import WorkingValues
from locally.causal.selective_effect.learners import Predictor, fit_learner
from locally.causal.selective_effect.observations import Observations
from locally.causal.selective_effect.working_models import Basis, affine


class PlugInEffect(BaseEstimator):
    """beta = (c_1 - c_0) / (v_1 - v_0) from a classifier of A in each arm and a regressor of Y in each cell.

    Args:
        classifier, regressor: scikit-learn learners.
        trim_d: least size of v_1 - v_0.
        random_state: seed of learners that were given none.
    """

    def __init__(self, classifier: Any, regressor: Any, trim_d: float = 0.03, random_state: int | None = None) -> None:
        self.classifier = classifier
        self.regressor = regressor
        self.trim_d = trim_d
        self.random_state = random_state

    def fit(self, obs: Observations) -> "PlugInEffect":
        """Fit p in each arm and mu for each treatment in each arm: six learners, each on its own rows of `obs`."""
        seed = self.random_state or 0

        def learn(learner: Any, target: Float[ndarray, " n"], rows: Bool[ndarray, " n"]) -> Predictor:
            return fit_learner(learner, obs.X[rows], target[rows], seed)

        arms = [obs.z == z for z in (0, 1)]
        self.p_ = [learn(self.classifier, obs.a, rows) for rows in arms]
        self.mu_ = [[learn(self.regressor, obs.y, rows & (obs.a == a)) for rows in arms] for a in (0, 1)]
        return self

    def predict(self, X: Float[ndarray, "m d"]) -> Float[ndarray, " m"]:
        """beta at the rows of X, in units of the outcome; |v_1 - v_0| counts as at least trim_d."""
        p = np.stack([arm(X) for arm in self.p_])
        mu = np.stack([np.stack([cell(X) for cell in of_treatment]) for of_treatment in self.mu_])
        return WorkingValues.from_cells(np.full(len(X), 0.5), p, mu, trim_d=self.trim_d).beta


class SieveEffect(BaseEstimator):
    """beta = B(X) b, with b from the multiply robust estimating equations on the same basis for omega.

    Args:
        basis: X -> columns, default 1 and X.
    """

    def __init__(self, basis: Basis = affine) -> None:
        self.basis = basis

    def fit(self, obs: Observations) -> "SieveEffect":
        """Solve the estimating equations of all units for the coefficients `coef_`; O(n k^2) for k columns."""

        def by_arm(z: Float[ndarray, " n"], X: Float[ndarray, "n d"]) -> Float[ndarray, "n k"]:
            return np.column_stack([self.basis(X), z[:, None] * self.basis(X)])

        equations = EstimatingEquations.of(obs, self.basis, by_arm, self.basis, self.basis, self.basis)
        self.coef_ = equations.solve(np.ones(obs.n)).beta_coef
        return self

    def predict(self, X: Float[ndarray, "m d"]) -> Float[ndarray, " m"]:
        """B(X) b, in units of the outcome."""
        return self.basis(X) @ self.coef_
