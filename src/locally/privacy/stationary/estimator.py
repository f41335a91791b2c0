"""A scikit-learn classifier whose coefficients are differentially private.

For whoever has a table and a budget: binary linear classification with any of the private methods, in the conventions
of `sklearn.linear_model`. Source of the methods: arXiv 2206.00846.
"""

import warnings
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from locally.checks import check_choice, check_count, check_positive
from locally.privacy.stationary.convex import RecursiveRegularization, Solver
from locally.privacy.stationary.glm import LOGISTIC, SIGMOID_SQUARE, JohnsonLindenstrauss, LinearModel, Method
from locally.privacy.stationary.objectives import Beyond
from locally.privacy.stationary.result import Status
from locally.privacy.stationary.spider import NoisyGradientDescent, PrivateSpiderBoost
from locally.privacy.stationary.tree import PrivateTreeSpider

LOSSES = {"logistic": LOGISTIC, "sigmoid_square": SIGMOID_SQUARE}
METHODS = ("spiderboost", "gradient_descent", "tree", "recursive", "recursive_one_pass")


class PrivateLinearClassifier(ClassifierMixin, BaseEstimator):
    """Binary linear classification under (epsilon, delta)-differential privacy, replacement adjacency.

    The two class labels and the number of rows are treated as public.

    Parameters
    ----------
    epsilon, delta : the budget of one `fit`; epsilon > 0, 0 < delta < 1.
    data_norm : public bound on the Euclidean norm of a row of X, > 0; never computed from the data.
    loss : "logistic" (convex) or "sigmoid_square" (nonconvex, robust to wrong labels).
    method : "spiderboost", "gradient_descent", "tree" (one pass), "recursive" or "recursive_one_pass" (convex).
    steps, phase : updates of the iterative methods, and how often SpiderBoost takes an anchor.
    learning_rate : by default 1 / (2 L1) for the model's smoothness L1.
    radius : bound on the norm of the solution, for the recursive methods.
    projection_dimension : random projection to this many dimensions before the method, or None.
    fit_intercept : append a constant feature of size `data_norm`.
    beyond : "clip" rows longer than data_norm, or "refuse" them.
    random_state : None draws noise from the operating system's secure source; a seed makes the fit repeatable and is
        for experiments only.

    Attributes
    ----------
    coef_, intercept_ : the released parameters.
    classes_ : the two labels.
    result_ : the `PrivateResult`, with its privacy statement.

    Examples
    --------
    >>> from sklearn.datasets import make_classification
    >>> X, y = make_classification(2000, 5, random_state=0)
    >>> model = PrivateLinearClassifier(epsilon=2.0, delta=1e-6, data_norm=3.0, beyond="clip", random_state=0)
    >>> model.fit(X, y).score(X, y) > 0.8
    True
    >>> round(model.result_.privacy.epsilon, 1)
    2.0

    References
    ----------
    arXiv 2206.00846, Algorithms 1 to 4.
    """

    def __init__(
        self,
        epsilon=1.0,
        delta=1e-5,
        data_norm=1.0,
        *,
        loss="logistic",
        method="spiderboost",
        steps=128,
        phase=16,
        learning_rate=None,
        radius=10.0,
        projection_dimension=None,
        fit_intercept=True,
        beyond="refuse",
        random_state=None,
    ):
        self.epsilon = epsilon
        self.delta = delta
        self.data_norm = data_norm
        self.loss = loss
        self.method = method
        self.steps = steps
        self.phase = phase
        self.learning_rate = learning_rate
        self.radius = radius
        self.projection_dimension = projection_dimension
        self.fit_intercept = fit_intercept
        self.beyond = beyond
        self.random_state = random_state

    def fit(self, X: Shaped[ndarray, "n d"], y: Shaped[ndarray, " n"]) -> "PrivateLinearClassifier":
        """Spend the budget on (X, y). Fitting again spends it again.

        Raises:
            ValueError: not two classes, a parameter out of range, or rows beyond `data_norm` under "refuse".
        """
        check_choice("loss", self.loss, tuple(LOSSES))
        check_choice("method", self.method, METHODS)
        check_choice("beyond", self.beyond, tuple(Beyond))
        check_positive("data_norm", self.data_norm)
        if self.projection_dimension is not None:
            check_count("projection_dimension", self.projection_dimension)
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        self.classes_, coded = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            got = "1 class" if len(self.classes_) == 1 else f"{len(self.classes_)} classes"
            raise ValueError(f"Only binary classification is supported: y must hold 2 classes, got {got}")
        if self.fit_intercept:
            X, data_norm = self._with_constant(X), float(np.sqrt(2) * self.data_norm)
        else:
            data_norm = self.data_norm
        model = LinearModel(
            X, coded.astype(X.dtype), data_norm=data_norm, loss=LOSSES[self.loss], beyond=Beyond(self.beyond)
        )
        base = self._method(model)
        method: Method | JohnsonLindenstrauss = base
        if self.projection_dimension is not None:
            method = JohnsonLindenstrauss(base, min(self.projection_dimension, model.dimension))
        rng = None
        if self.random_state is not None:
            rng = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31)))
        found = method.minimize(model, rng=rng)
        public = (*found.privacy.assumptions, "the two class labels and the number of rows are public")
        self.result_ = replace(found, privacy=replace(found.privacy, assumptions=public))
        if self.result_.status is Status.DIVERGED:
            warnings.warn(str(self.result_.status), ConvergenceWarning, stacklevel=2)
        w = self.result_.w.cpu().numpy()
        self.coef_ = w[None, : self.n_features_in_]
        self.intercept_ = w[self.n_features_in_ :] * self.data_norm if self.fit_intercept else np.zeros(1, X.dtype)
        return self

    def decision_function(self, X: Shaped[ndarray, "n d"]) -> Float[ndarray, " n"]:
        """<coef_, x> + intercept_; positive for the second class."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=(np.float64, np.float32))
        return X @ self.coef_[0] + self.intercept_[0]

    def predict_proba(self, X: Shaped[ndarray, "n d"]) -> Float[ndarray, "n 2"]:
        """The sigmoid of the decision function, for either class."""
        scores = self.decision_function(X)
        p = np.exp(-np.logaddexp(0, -scores))
        return np.column_stack([1 - p, p])

    def predict(self, X: Shaped[ndarray, "n d"]) -> Shaped[ndarray, " n"]:
        """The label of each row, from `classes_`; the second where the score is positive."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int)]

    def _with_constant(self, X: Float[ndarray, "n d"]) -> Float[ndarray, "n d_plus_1"]:
        """A constant feature of size data_norm; long rows are treated first, so that only features are scaled."""
        norms = np.linalg.norm(X, axis=1)
        if self.beyond == Beyond.CLIP:
            X = X * (self.data_norm / np.maximum(norms, self.data_norm))[:, None]
        elif norms.max() > self.data_norm * (1 + 4 * np.finfo(X.dtype).eps):
            raise ValueError(
                f"rows of X must have norm at most data_norm = {self.data_norm:g}, got one of {norms.max():.6g}"
            )
        return np.column_stack([X, np.full(len(X), self.data_norm, X.dtype)])

    def _method(self, model: LinearModel) -> Method:
        budget = {"epsilon": self.epsilon, "delta": self.delta}
        if self.method == "spiderboost":
            rate = self.learning_rate
            return PrivateSpiderBoost(**budget, steps=self.steps, phase=self.phase, learning_rate=rate)
        if self.method == "gradient_descent":
            return NoisyGradientDescent(**budget, steps=self.steps, learning_rate=self.learning_rate)
        if self.method == "tree":
            return PrivateTreeSpider.for_problem(model, **budget)
        solver = Solver.NOISY_GD if self.method == "recursive" else Solver.PHASED_SGD
        return RecursiveRegularization(**budget, radius=self.radius, solver=solver, max_steps=self.steps)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.classifier_tags.poor_score = True  # noise: a good score on a small table is not promised
        return tags
