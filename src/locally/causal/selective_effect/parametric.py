"""Multiply robust and locally efficient: parametric working models, one linear system, a sandwich.

The estimate is consistent if any one of four sets of working models is right - pi and p; pi, beta and theta; p, beta
and omega; beta, theta and omega - without saying which. Source: arXiv 1907.11882.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from locally.causal.selective_effect.diagnostics import Overlap, overlap
from locally.causal.selective_effect.effect import Effect, Table
from locally.causal.selective_effect.equations import EstimatingEquations
from locally.causal.selective_effect.observations import Observations, check_binary
from locally.causal.selective_effect.working_models import ArmBasis, Basis, affine, affine_by_arm
from locally.checks import check_between, check_choice, check_count, check_finite, check_nonnegative, check_shape


class MultiplyRobustIVATE(BaseEstimator):
    """Average treatment effect with an instrument that may act on the outcome; parametric working models.

    Solves, with logistic pi and p, for linear beta = B b, theta = T t and omega = W w
        sum T (Y - beta A - theta) = 0
        sum B (Z - pi) {(A - p)(Y - beta A - theta) - omega} = 0
        sum W {(A - p)(Y - beta A - theta) - omega} = 0
    and averages the efficient influence function at these values.

    Args:
        beta_basis, omega_basis: X -> columns; default 1 and X.
        theta_basis: (z, X) -> columns; default 1, X, z, z X.
        pi_basis, p_basis: X -> columns of the logistic models of Z and, in each arm, of A; default 1 and X.
        cov: "sandwich" carries the uncertainty of every working model and is right if one of the four sets is;
            "bootstrap" resamples units; "influence" is right only if all the models are.
        n_bootstrap: resamples of "bootstrap", at least 2.
        trim_z: pi is clipped to [trim_z, 1 - trim_z], trim_z in [0, 0.5).
        trim_d: least size of v_1 - v_0, smaller ones are replaced by it; 0 leaves them.
        random_state: seed of the bootstrap.

    Attributes:
        coef_, se_: the effect and its standard error.
        effect_: the `Effect`, with its status.
        n_failed_: resamples whose equations had no solution, left out of the error ("bootstrap" alone).
        solution_: the `ParametricFit`: working values, coefficients, which units were trimmed.

    One fit costs O(n k^2) for k working parameters.

    >>> rng = np.random.default_rng(0)
    >>> X, u = rng.uniform(-1, 1, (4000, 1)), rng.uniform(-1, 1, 4000)
    >>> z = (rng.random(4000) < 0.5).astype(float)
    >>> a = (rng.random(4000) < 0.1 + 0.35 * z + 0.09 * u).astype(float)
    >>> y = 2 * a + z + X[:, 0] + 3 * u + rng.normal(0, 0.5, 4000)  # z acts on y, u is not seen
    >>> model = MultiplyRobustIVATE().fit(y, a, z, X)
    >>> print(model.summary())
         coef  std err        t        P>|t|    2.5 %   97.5 %
    a  2.217...
    """

    def __init__(
        self,
        *,
        beta_basis: Basis = affine,
        theta_basis: ArmBasis = affine_by_arm,
        omega_basis: Basis = affine,
        pi_basis: Basis = affine,
        p_basis: Basis = affine,
        cov: str = "sandwich",
        n_bootstrap: int = 200,
        trim_z: float = 0.01,
        trim_d: float = 0.0,
        random_state: int | None = None,
    ) -> None:
        self.beta_basis = beta_basis
        self.theta_basis = theta_basis
        self.omega_basis = omega_basis
        self.pi_basis = pi_basis
        self.p_basis = p_basis
        self.cov = cov
        self.n_bootstrap = n_bootstrap
        self.trim_z = trim_z
        self.trim_d = trim_d
        self.random_state = random_state

    def fit(self, y: Any, a: Any, z: Any, X: Any, *, pi: Any = None, p: Any = None) -> "MultiplyRobustIVATE":
        """Fit to columns or to names of columns of X (see `Observations.read`).

        Args:
            y, a, z, X: outcome, binary treatment, binary instrument, covariates.
            pi: known P(Z = 1 | X), (n,) in (0, 1), as in a randomised design; else it is fitted.
            p: known P(A = 1 | Z = z, X), (2, n) in [0, 1] with row z; else it is fitted.

        Raises:
            TypeError, ValueError: bad data, or an option out of range.
        """
        check_choice("cov", self.cov, ("sandwich", "bootstrap", "influence"))
        check_count("n_bootstrap", self.n_bootstrap, at_least=2)
        check_between("trim_z", self.trim_z, 0, 0.499)
        check_nonnegative("trim_d", self.trim_d)
        obs = self.observations_ = Observations.read(y, a, z, X)
        check_binary("a", obs.a)
        check_binary("z", obs.z)
        known_pi = None if pi is None else np.asarray(pi, dtype=np.float64)
        known_p = None if p is None else np.asarray(p, dtype=np.float64)
        for name, known, shape in (("pi", known_pi, (obs.n,)), ("p", known_p, (2, obs.n))):
            if known is None:
                continue
            check_shape(name, known, shape)
            check_finite(name, known)
            if ((known < 0) | (known > 1)).any() or (name == "pi" and ((known == 0) | (known == 1)).any()):
                raise ValueError(f"{name} must hold probabilities{' strictly' if name == 'pi' else ''} between 0 and 1")
        models = self.beta_basis, self.theta_basis, self.omega_basis, self.pi_basis, self.p_basis
        equations = replace(
            EstimatingEquations.of(obs, *models),
            known_pi=known_pi,
            known_p=known_p,
            trim_z=self.trim_z,
            trim_d=self.trim_d,
        )
        n = obs.n
        solution = self.solution_ = equations.solve(np.ones(n))
        scores = solution.scores if self.cov == "influence" else solution.estimate + equations.influence(solution)
        error = float(np.sqrt(((scores - solution.estimate) ** 2).mean() / n))
        if self.cov == "bootstrap":
            rng = np.random.default_rng(self.random_state)
            draws = (rng.multinomial(n, np.full(n, 1 / n)).astype(np.float64) for _ in range(self.n_bootstrap))
            estimates = np.array([equations.solve(weight).estimate for weight in draws])
            self.n_failed_ = int(np.isnan(estimates).sum())
            error = float(np.nanstd(estimates, ddof=1)) if self.n_failed_ < self.n_bootstrap - 1 else np.nan
        self.effect_ = Effect(solution.estimate, error, scores[None], solution.status, obs.names[1])
        self.coef_, self.se_ = self.effect_.estimate, self.effect_.standard_error
        return self

    def confint(self, level: float = 0.95) -> tuple[float, float]:
        """Bounds of the effect at this level, in (0, 1); needs `fit`."""
        return self.effect_.confint(level)

    def summary(self, level: float = 0.95) -> Table:
        """One row: effect, standard error, t, p-value and the bounds at this level; prints as text."""
        return self.effect_.summary(level)

    def overlap(self) -> Overlap:
        """Propensities, variance gap, weights, what was trimmed."""
        return overlap(self.observations_, [[(1.0, self.solution_.values)]], self.trim_z, self.trim_d)
