"""What one would otherwise fit to labelled environments: IRMv1, invariant causal prediction and anchor regression.

Written from the literature, on the same moments as the invariant representations. Pooled least squares (ERM) is
scikit-learn's `LinearRegression`.
"""

from itertools import combinations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats
from scipy.optimize import minimize

from locally.causal.invariance.moments import EnvironmentMoments, SingularCovariance
from locally.causal.invariance.regressor import EnvironmentRegressor
from locally.causal.invariance.search import COLLINEAR, class_size
from locally.checks import check_between, check_count, check_nonnegative

SUBSET_LIMIT = 200_000
BLOCK = 5_000  # subsets tested at once


class InvariantRiskMinimization(EnvironmentRegressor):
    """IRMv1 with a linear predictor: mean risk + penalty * mean squared derivative of the risk in a scalar head.

    The derivative is 2 (v' S_e v - v' s_e): only the gradient along v itself, so that invariance on the rest of the
    representation is not asked for. Not convex: L-BFGS from pooled least squares, the penalty growing tenfold.

    Parameters
    ----------
    penalty : weight, at least 0; 0 is pooled least squares.
    max_iter : steps at every weight.
    fit_intercept, standardize : see `InvariantSubsetRegressor`.

    Attributes
    ----------
    coef_, intercept_, risk_ : predictor, and its mean risk on the training environments.
    penalty_ : the squared derivative, mean over environments, at the end.
    converged_ : whether the last L-BFGS run met its tolerance within max_iter steps.

    References
    ----------
    Arjovsky, Bottou, Gulrajani, Lopez-Paz: Invariant Risk Minimization, 2019, arXiv 1907.02893, equation (IRMv1).
    """

    def __init__(
        self, penalty: float = 1e3, *, max_iter: int = 1000, fit_intercept: bool = True, standardize: bool = True
    ) -> None:
        self.penalty = penalty
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept
        self.standardize = standardize

    def _fit(self, moments: EnvironmentMoments) -> None:
        check_nonnegative("penalty", self.penalty)
        check_count("max_iter", self.max_iter)
        v = _pooled_least_squares(moments)
        self.converged_ = True
        weights = [w for w in 10.0 ** np.arange(-2, 12) if w < self.penalty] + [self.penalty]
        for weight in weights if self.penalty else []:

            def objective(v: Float[ndarray, " d"], weight: float = float(weight)) -> tuple[float, Float[ndarray, " d"]]:
                g = moments.gradients(v)
                slope = 2 * g @ v
                value = moments.risks(v).mean() + weight * (slope**2).mean()
                by_slope = 2 * weight * slope / len(slope)
                gradient = 2 * g.mean(axis=0) + 2 * by_slope @ g + 2 * np.einsum("n,nij,j->i", by_slope, moments.xx, v)
                return value / (1 + weight), gradient / (1 + weight)

            options = {"maxiter": self.max_iter, "ftol": 1e-15, "gtol": 1e-10}
            found = minimize(objective, v, jac=True, method="L-BFGS-B", options=options)
            v, self.converged_ = found.x, bool(found.success)
        self.penalty_ = float(((2 * moments.gradients(v) @ v) ** 2).mean())
        self._keep(v)


class InvariantCausalPrediction(EnvironmentRegressor):
    """ICP: covariates in every subset whose pooled residuals look alike in all environments.

    A subset is accepted where no environment's residuals differ from those of the rest in mean (Welch's t) or in
    variance (F), at level alpha with a Bonferroni factor 2 N. The intersection of the accepted subsets is, with
    probability 1 - alpha, among the parents of Y. Prediction is pooled least squares on the intersection.

    Parameters
    ----------
    alpha : level in (0, 1).
    max_size : largest subset that is tested; None for all.
    standardize : scale columns before solving.

    Attributes
    ----------
    parents_ : the intersection, empty where no subset was accepted.
    accepted_ : accepted subsets.
    p_values_ : subset -> corrected p-value.
    coef_, intercept_, risk_ : least squares on `parents_`.

    References
    ----------
    Peters, Buehlmann, Meinshausen: Causal inference by using invariant prediction, JRSS B 78 (2016), Method II.
    """

    fit_intercept = True

    def __init__(self, alpha: float = 0.05, *, max_size: int | None = None, standardize: bool = True) -> None:
        self.alpha = alpha
        self.max_size = max_size
        self.standardize = standardize

    def _rows_needed(self, features: int) -> int:
        if self.max_size is not None:
            check_count("max_size", self.max_size, at_least=0)
        return (features if self.max_size is None else min(self.max_size, features)) + 2

    def _fit(self, moments: EnvironmentMoments) -> None:
        check_between("alpha", self.alpha, 0.0, 1.0)
        if np.isinf(moments.rows).any() or not moments.has_constant:
            raise ValueError("rows must be finite and centred: tests on residuals need samples, so use fit(X, y, ...)")
        d = moments.features
        largest = d if self.max_size is None else min(self.max_size, d)
        if class_size(d, largest) > SUBSET_LIMIT:
            raise ValueError(
                f"max_size must leave at most {SUBSET_LIMIT} subsets to test, got {class_size(d, largest)}"
            )
        self.p_values_: dict[tuple[int, ...], float] = {}
        for size in range(largest + 1):
            subsets = list(combinations(range(d), size))
            for start in range(0, len(subsets), BLOCK):
                block = subsets[start : start + BLOCK]
                columns = np.array(block, dtype=np.int64).reshape(len(block), size)
                self.p_values_ |= zip(block, self._p_values(moments, columns).tolist())
        self.accepted_ = [subset for subset, p in self.p_values_.items() if p > self.alpha]
        common = set.intersection(*map(set, self.accepted_)) if self.accepted_ else set()
        self.parents_ = tuple(sorted(common))
        self._keep(_row_weighted_least_squares(moments, np.array([self.parents_], dtype=np.int64))[0])

    @staticmethod
    def _p_values(moments: EnvironmentMoments, subsets: Int[ndarray, "b m"]) -> Float[ndarray, " b"]:
        """Smallest of the 2 N tests of each subset, times their number."""
        v = _row_weighted_least_squares(moments, subsets)
        n = moments.rows[:, None]
        predicted = moments.xx @ v.T
        mean = predicted[:, 0] - moments.xy[:, :1]
        square = moments.yy[:, None] - 2 * moments.xy @ v.T + np.einsum("bd,ndb->nb", v, predicted)
        rest = n.sum() - n
        mean_rest = ((n * mean).sum(axis=0) - n * mean) / rest
        square_rest = ((n * square).sum(axis=0) - n * square) / rest
        variance = (square - mean**2) * n / (n - 1)
        variance_rest = (square_rest - mean_rest**2) * rest / (rest - 1)
        if (exact := (np.minimum(variance, variance_rest) <= 1e-14).any(axis=0)).any():
            raise SingularCovariance(
                f"columns {subsets[exact.argmax()].tolist()} of X fit an environment exactly: nothing is left to test"
            )
        by_mean = stats.ttest_ind_from_stats(
            mean, np.sqrt(variance), n, mean_rest, np.sqrt(variance_rest), rest, equal_var=False
        ).pvalue
        below = stats.f.cdf(variance / variance_rest, n - 1, rest - 1)
        smallest = np.minimum(by_mean, 2 * np.minimum(below, 1 - below)).min(axis=0)
        return np.minimum(1.0, 2 * len(n) * smallest)


class AnchorRegression(EnvironmentRegressor):
    """Least squares with the part of the residuals that the environments explain weighted by gamma.

    (within + gamma * between) where between is the squared mean residual of each environment: gamma 1 is ordinary least
    squares on all rows, gamma 0 least squares within environments, gamma to infinity two-stage least squares with the
    environments as instruments. It protects against shifts of means up to sqrt(gamma) times those of training.

    Parameters
    ----------
    gamma : at least 0.
    standardize : scale columns before solving.

    Attributes
    ----------
    coef_, intercept_, risk_ : predictor, and its mean risk on the training environments.

    References
    ----------
    Rothenhaeusler, Meinshausen, Buehlmann, Peters: Anchor regression, JRSS B 83 (2021), arXiv 1801.06229.
    """

    fit_intercept = True

    def __init__(self, gamma: float = 10.0, *, standardize: bool = True) -> None:
        self.gamma = gamma
        self.standardize = standardize

    def _fit(self, moments: EnvironmentMoments) -> None:
        check_nonnegative("gamma", self.gamma)
        if not moments.has_constant:
            raise ValueError("covariances hold no means, which anchor regression works with: use fit(X, y, ...)")
        share = moments.rows / moments.rows.sum()
        means = np.column_stack([moments.xx[:, 0, 1:], moments.xy[:, 0]])  # relative to the pooled centre
        off = means - share @ means
        second = np.einsum("n,nij->ij", share, moments.second()[:, 1:, 1:])
        between = np.einsum("n,ni,nj->ij", share, off, off)
        total = second - np.outer(share @ means, share @ means)
        weighted = (total - between) + self.gamma * between
        slopes = _solve(weighted[:-1, :-1], weighted[:-1, -1])
        centre = share @ means
        self._keep(np.append(centre[-1] - centre[:-1] @ slopes, slopes))


def _pooled_least_squares(moments: EnvironmentMoments) -> Float[ndarray, " d"]:
    S, s, _ = moments.pooled()
    return _solve(S, s)


def _row_weighted_least_squares(moments: EnvironmentMoments, subsets: Int[ndarray, "b m"]) -> Float[ndarray, "b d"]:
    """Least squares on all rows with the constant and these covariates, for many subsets of one size at once."""
    share = moments.rows / moments.rows.sum()
    columns = np.concatenate([np.zeros((len(subsets), 1), dtype=np.int64), subsets + 1], axis=1)
    S, s = np.einsum("n,nij->ij", share, moments.xx), share @ moments.xy
    v = np.zeros((len(subsets), len(s)))
    v[np.arange(len(subsets))[:, None], columns] = _solve(S[columns[:, :, None], columns[:, None, :]], s[columns])
    return v


def _solve(S: Float[ndarray, "*b r r"], s: Float[ndarray, "*b r"]) -> Float[ndarray, "*b r"]:
    scale = np.sqrt(np.diagonal(S, axis1=-2, axis2=-1))
    correlation = S / (scale[..., :, None] * scale[..., None, :])
    if np.linalg.eigvalsh(correlation)[..., 0].min() < COLLINEAR:
        raise SingularCovariance("columns of X depend on each other linearly: leave some out")
    return np.linalg.solve(correlation, (s / scale)[..., None])[..., 0] / scale
