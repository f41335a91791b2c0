"""The stacked estimating equations of the parametric estimator, their solution and its influence function."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from locally.causal.selective_effect.effect import Status
from locally.causal.selective_effect.influence import WorkingValues, at_arm, keep_from_zero, signed_inverse_density
from locally.causal.selective_effect.observations import Observations
from locally.causal.selective_effect.working_models import ArmBasis, Basis, Logistic, beside


@dataclass(frozen=True)
class Propensities:
    """pi and p at every unit, and the logistic models behind them; none where they were known."""

    raw_pi: Float[ndarray, " n"]  # before clipping
    pi: Float[ndarray, " n"]
    p: Float[ndarray, "2 n"]
    of_z: tuple[Logistic, ...] = ()
    of_a: tuple[Logistic, ...] = ()  # arm 0, arm 1

    @property
    def converged(self) -> bool:
        return all(model.converged for model in (*self.of_z, *self.of_a))


@dataclass(frozen=True)
class ParametricFit:
    """One solution of the stacked estimating equations; NaN where the status says that there is none."""

    estimate: float
    plug_in: float  # mean of beta(X), without the correction
    beta_coef: Float[ndarray, " kb"]
    scores: Float[ndarray, " n"]
    values: WorkingValues
    status: Status
    propensities: Propensities
    derivative: Float[ndarray, "k k"]  # M of the linear system M (b, t, w) = d
    trimmed: Bool[ndarray, " n"]  # units whose pi was clipped
    moved: Bool[ndarray, " n"]  # units whose v_1 - v_0 was kept from zero


@dataclass(frozen=True)
class EstimatingEquations:
    """Working models of one data set, solved for any weights of its units.

    B, T, W are the columns of beta, theta, omega, Q and P those of the logistic models; known pi or p take their place.
    """

    obs: Observations
    B: Float[ndarray, "n kb"]
    T_arms: tuple[Float[ndarray, "n kt"], Float[ndarray, "n kt"]]  # in arm 0 and in arm 1
    W: Float[ndarray, "n kw"]
    Q: Float[ndarray, "n kq"]
    P: Float[ndarray, "n kp"]
    known_pi: Float[ndarray, " n"] | None = None
    known_p: Float[ndarray, "2 n"] | None = None
    trim_z: float = 0.0
    trim_d: float = 0.0

    @classmethod
    def of(
        cls, obs: Observations, beta: Basis, theta: ArmBasis, omega: Basis, pi: Basis, p: Basis
    ) -> "EstimatingEquations":
        X = obs.X
        arms = theta(np.zeros(obs.n), X), theta(np.ones(obs.n), X)
        return cls(obs, beta(X), arms, omega(X), pi(X), p(X))

    @property
    def T(self) -> Float[ndarray, "n kt"]:
        """Columns of theta in each unit's own arm."""
        return np.where(self.obs.z[:, None] == 1, self.T_arms[1], self.T_arms[0])

    def solve(self, weight: Float[ndarray, " n"]) -> ParametricFit:
        """Fit every working model and average the scores. O(n k^2) for k parameters."""
        y, a, z = self.obs.y, self.obs.a, self.obs.z
        share = weight / weight.sum()
        fitted = self._propensities(weight)
        M, target = self._linear_system(fitted, share)
        solution, _, rank, _ = np.linalg.lstsq(M, target, rcond=None)
        kb, kt = self.B.shape[1], self.T_arms[0].shape[1]
        b, t, w = np.split(solution, [kb, kb + kt])

        v = fitted.p * (1 - fitted.p)
        gap = v[1] - v[0]
        D = keep_from_zero(gap, self.trim_d)
        theta = np.stack([arm @ t for arm in self.T_arms])
        values = WorkingValues(fitted.pi, fitted.p, v, D, self.B @ b, self.W @ w, theta)
        trimmed, moved = fitted.pi != fitted.raw_pi, gap != D

        if rank < len(M) or not D.all() or not np.isfinite(solution).all():
            status, scores = Status.SINGULAR, np.full(self.obs.n, np.nan)
        else:
            weak = Status.WEAK if moved.mean() > 0.5 else Status.IDENTIFIED
            status = weak if fitted.converged else Status.NOT_CONVERGED
            scores = values.scores(z, a, y)
        estimate, plug_in = float(share @ scores), float(share @ values.beta)
        return ParametricFit(estimate, plug_in, b, scores, values, status, fitted, M, trimmed, moved)

    def influence(self, fit: ParametricFit) -> Float[ndarray, " n"]:
        """Influence of each unit on the estimate, all weights one, with every working model's own uncertainty.

        The centred score, plus the derivative of the mean score in every parameter times that parameter's influence.
        It is right whichever set of models is right.
        """
        if fit.status is Status.SINGULAR:
            return fit.scores
        (y, a, z), T, values, fitted = (self.obs.y, self.obs.a, self.obs.z), self.T, fit.values, fit.propensities
        share = np.full(self.obs.n, 1 / self.obs.n)
        tilt, residual = z - fitted.pi, a - at_arm(fitted.p, z)
        r = y - values.beta * a - at_arm(values.theta, z)
        product = residual * r - values.omega
        multiplier = values.instrument_weight(z)

        # (b, t, w) solve equations whose derivative is -M: their part is the equations times an adjoint solution
        core = multiplier * share
        by_b, by_t, by_w = (share - core * residual * a) @ self.B, -(core * residual) @ T, -core @ self.W
        adjoint = np.linalg.lstsq(fit.derivative.T, np.concatenate([by_b, by_t, by_w]), rcond=None)[0]
        in_T, in_B, in_W = np.split(adjoint, [T.shape[1], T.shape[1] + self.B.shape[1]])
        by_tilt = self.B @ in_B
        by_product = tilt * by_tilt + self.W @ in_W
        influence = fit.scores - fit.estimate + r * (T @ in_T) + product * by_product

        # pi and p enter scores and equations; values that were clipped or replaced do not move with their model
        by_pi = -product * (signed_inverse_density(z, fitted.pi) * multiplier + by_tilt) * ~fit.trimmed
        for model in fitted.of_z:
            everyone = np.ones(self.obs.n, bool)
            influence += _through_logistic(self.Q, z, fitted.raw_pi, by_pi, share, everyone, model)
        by_gap = -multiplier * product / values.D * ~fit.moved
        for arm, model in enumerate(fitted.of_a):
            p, own = fitted.p[arm], z == arm
            by_p = (2 * arm - 1) * (1 - 2 * p) * by_gap - (multiplier + by_product) * r * own
            influence += _through_logistic(self.P, a, p, by_p, share, own, model)
        return influence

    def _propensities(self, weight: Float[ndarray, " n"]) -> Propensities:
        z, a = self.obs.z, self.obs.a
        of_z: tuple[Logistic, ...] = ()
        of_a: tuple[Logistic, ...] = ()
        raw_pi, p = self.known_pi, self.known_p
        if raw_pi is None:
            of_z = (Logistic.fit(self.Q, z, weight),)
            raw_pi = of_z[0].predict(self.Q)
        if p is None:
            of_a = tuple(Logistic.fit(self.P, a, weight * (z == arm)) for arm in (0, 1))
            p = np.stack([model.predict(self.P) for model in of_a])
        return Propensities(raw_pi, np.clip(raw_pi, self.trim_z, 1 - self.trim_z), p, of_z, of_a)

    def _linear_system(
        self, fitted: Propensities, share: Float[ndarray, " n"]
    ) -> tuple[Float[ndarray, "k k"], Float[ndarray, " k"]]:
        """M and d of M (b, t, w) = d, which says with r = Y - A B b - T t that

        sum T r = 0,  sum B (Z - pi) {(A - p) r - W w} = 0,  sum W {(A - p) r - W w} = 0.
        """
        y, a, z = self.obs.y, self.obs.a, self.obs.z
        T, W = self.T, self.W
        residual = a - at_arm(fitted.p, z)
        G = beside(self.B * (z - fitted.pi)[:, None], W) * share[:, None]
        G_residual, T_share = G * residual[:, None], T * share[:, None]
        outcome = beside(self.B * a[:, None], T)
        M = np.block([[T_share.T @ outcome, np.zeros((T.shape[1], W.shape[1]))], [G_residual.T @ outcome, G.T @ W]])
        return M, np.concatenate([y @ T_share, y @ G_residual])


def _through_logistic(
    basis: Float[ndarray, "n k"],
    target: Float[ndarray, " n"],
    fitted: Float[ndarray, " n"],
    by_fitted: Float[ndarray, " n"],
    share: Float[ndarray, " n"],
    used: Bool[ndarray, " n"],
    model: Logistic,
) -> Float[ndarray, " n"]:
    """Influence that reaches the estimate through fitted probabilities: `by_fitted` is its derivative in them."""
    if model.constant is not None:
        return np.zeros(len(target))
    spread = share * fitted * (1 - fitted)
    hessian = (basis * (spread * used)[:, None]).T @ basis
    return used * (target - fitted) * (basis @ np.linalg.lstsq(hessian, (spread * by_fitted) @ basis, rcond=None)[0])
