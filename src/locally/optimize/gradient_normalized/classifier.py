"""A scikit-learn logistic regression fitted by the method: the answer of newton-cholesky, sooner.

For tables with up to a few thousand features, dense or sparse. Beyond that the curvature is applied, not formed.
Source: arXiv 2506.13710; the metric is the Hessian at zero coefficients, which makes the path the same for every linear
recoding of the features.
"""

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from scipy.optimize import OptimizeResult
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from locally.checks import check_choice, check_count, check_nonnegative
from locally.optimize.gradient_normalized.method import GradientNormalizedNewton
from locally.optimize.gradient_normalized.outcome import Status
from locally.optimize.gradient_normalized.regressions import Logistic, Regression, Softmax

CURVATURES = ("hessian", "empirical_fisher")
DENSE_LIMIT = 3000
GAMMA0 = 4.0  # in the metric of the Hessian at zero: a step that moves the margins by about 8, root mean square
FLAT = 1e-12  # added to the metric, relative to its mean diagonal: constant or repeated features


class GNSLogisticRegression(ClassifierMixin, BaseEstimator):
    """Logistic regression, binary or multinomial, with an L2 penalty on the coefficients.

    Minimises mean loss + ||coef||^2 / (2 C n), n the sum of the sample weights: the objective of
    `sklearn.linear_model.LogisticRegression`.

    Parameters
    ----------
    C : inverse of the penalty, > 0; infinity for none.
    fit_intercept : whether to fit an unpenalised intercept.
    class_weight : None, "balanced" or a dict of weights.
    curvature : "hessian" or "empirical_fisher" (outer products of the examples' gradients; slow unless the classes are
        nearly separable).
    tol : stop when the dual norm of the gradient, in the metric of the Hessian at zero, is at most this; >= 0. Half its
        square is about how far the objective is from its minimum.
    max_iter : iterations, at least 1.

    Attributes
    ----------
    coef_, intercept_ : (1, d) and (1,) for two classes, (K, d) and (K,) for more.
    classes_ : the labels.
    n_iter_ : iterations taken.
    result_ : the solver's `OptimizeResult`.

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.preprocessing import scale
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> model = GNSLogisticRegression().fit(scale(X), y)
    >>> peer = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(scale(X), y)
    >>> bool(abs(model.coef_ - peer.coef_).max() < 1e-8)
    True

    References
    ----------
    arXiv 2506.13710.
    """

    def __init__(self, C=1.0, *, fit_intercept=True, class_weight=None, curvature="hessian", tol=1e-10, max_iter=100):
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.curvature = curvature
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "GNSLogisticRegression":
        """Fit to X (n, d), dense or sparse, and y (n,).

        Raises:
            ValueError: one class only, a parameter out of range, or data that are not finite.
        """
        if not isinstance(self.C, int | float | np.number) or not self.C > 0:
            raise ValueError(f"C must be positive, got {self.C!r}")
        check_choice("curvature", self.curvature, CURVATURES)
        check_nonnegative("tol", self.tol)
        check_count("max_iter", self.max_iter)
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(y)
        self.classes_, coded = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least 2 classes, got one class: {self.classes_[0]!r}")
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if self.class_weight is not None:
            weights = (
                weights
                * compute_class_weight(self.class_weight, classes=self.classes_, y=y, sample_weight=sample_weight)[
                    coded
                ]
            )
        if not weights.any():
            raise ValueError("sample_weight must not be all zero")
        options = {
            "l2": 1 / (self.C * weights.sum()),
            "fit_intercept": self.fit_intercept,
            "sample_weight": weights,
        }
        K = len(self.classes_)
        problem = Logistic(X, coded, **options) if K == 2 else Softmax(X, coded, K, anchored=True, **options)
        self.result_ = self._solve(problem)
        self.n_iter_ = self.result_.nit
        if self.result_.status is not Status.CONVERGED:
            warnings.warn(
                f"not converged after {self.n_iter_} iterations: {self.result_.message}",
                ConvergenceWarning,
                stacklevel=2,
            )
        theta = self.result_.x.reshape(1 if K == 2 else K, -1)
        d = self.n_features_in_
        self.coef_ = theta[:, :d].copy()
        self.intercept_ = theta[:, d].copy() if self.fit_intercept else np.zeros(len(theta))
        return self

    def decision_function(self, X: Any) -> Float[ndarray, " n"] | Float[ndarray, "n classes"]:
        """<coef_, x> + intercept_: for two classes one number, positive for the second class."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", reset=False, dtype=np.float64)
        scores = np.asarray(X @ self.coef_.T) + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: Any) -> Float[ndarray, "n classes"]:
        """Probabilities in the order of `classes_`; rows sum to 1."""
        scores = self.decision_function(X)
        return np.column_stack([expit(-scores), expit(scores)]) if scores.ndim == 1 else softmax(scores, axis=1)

    def predict_log_proba(self, X: Any) -> Float[ndarray, "n classes"]:
        """Their logarithms, right where a probability underflows."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return -np.logaddexp(0.0, np.column_stack([scores, -scores]))
        return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)

    def predict(self, X: Any) -> Shaped[ndarray, " n"]:
        """The likeliest class of each row, from `classes_`."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]

    def _solve(self, problem: Regression) -> OptimizeResult:
        dense = problem.size <= DENSE_LIMIT
        fisher = self.curvature == "empirical_fisher"
        solver = GradientNormalizedNewton(gamma0=GAMMA0, tol=self.tol, maxiter=self.max_iter)
        if dense:
            curvature = problem.fisher if fisher else problem.hess
        else:
            curvature = problem.fisher_operator if fisher else problem.hess_operator
        return solver.minimize(
            problem.fun_and_jac,
            np.zeros(problem.size),
            jac=True,
            curvature=curvature,
            metric=problem.metric_at_zero(dense=dense, flat=FLAT),
        )

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags
