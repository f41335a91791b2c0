"""Fitting other people's learners: clones with their own seeds, probabilities of binary targets, one-sided cells."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.base import clone, is_classifier

Predictor = Callable[[Float[ndarray, "m d"]], Float[ndarray, " m"]]


def fit_learner(learner: Any, X: Float[ndarray, "n d"], target: Float[ndarray, " n"], seed: int) -> Predictor:
    """Fit E[target | X] and return its predictions: P(target = 1) of a classifier, the value of a regressor.

    A target that does not vary is predicted as it is, and one without rows as 0: with one-sided non-compliance
    the cell (A = 1, Z = 0) is empty and its variance, by which every use is multiplied, is 0.
    """
    if target.size == 0 or (target == target[0]).all():
        value = float(target[0]) if target.size else 0.0
        return lambda X_new: np.full(len(X_new), value)
    fitted = seeded(learner, seed)
    if is_classifier(learner):
        fitted.fit(X, target.astype(np.int64))
        column = list(fitted.classes_).index(1)
        return lambda X_new: np.asarray(fitted.predict_proba(X_new)[:, column], dtype=np.float64)
    fitted.fit(X, target)
    return lambda X_new: np.asarray(fitted.predict(X_new), dtype=np.float64)


def fit_predict(
    learner: Any,
    X: Float[ndarray, "n d"],
    target: Float[ndarray, " n"],
    X_new: Float[ndarray, "m d"],
    seed: int,
) -> Float[ndarray, " m"]:
    """Fit on some rows, predict at others."""
    return fit_learner(learner, X, target, seed)(X_new)


def out_of_fold(
    learner: Any, X: Float[ndarray, "n d"], target: Float[ndarray, " n"], fold: Int[ndarray, " n"], seed: int
) -> Float[ndarray, " n"]:
    """Predictions at the rows themselves, each from a fit without its fold."""
    predicted = np.empty(len(X))
    for s in np.unique(fold):
        out = fold == s
        predicted[out] = fit_predict(learner, X[~out], target[~out], X[out], seed + int(s))
    return predicted


def seeded(learner: Any, seed: int) -> Any:
    """A clone in which every `random_state` that was left None is set, so that the same seed gives the same fit."""
    copy = clone(learner)
    unset = {
        name: (seed + 7919 * i) % 2**32
        for i, (name, value) in enumerate(sorted(copy.get_params().items()))
        if name.split("__")[-1] == "random_state" and value is None
    }
    return copy.set_params(**unset) if unset else copy


def check_learner(name: str, learner: Any, *, probability: bool) -> None:
    """A scikit-learn learner that can be cloned and predicts; `probability` asks for a classifier."""
    needed = "predict_proba" if probability or is_classifier(learner) else "predict"
    if isinstance(learner, type):
        raise TypeError(f"{name} must be an instance of a learner, got the class {learner.__name__}")
    missing = [method for method in ("fit", needed, "get_params") if not hasattr(learner, method)]
    if missing:
        raise TypeError(f"{name} must have {', '.join(missing)}, got {type(learner).__name__}")


def name_of(learner: Any) -> str:
    """The class of a learner, of the last step of a pipeline."""
    steps = getattr(learner, "steps", None)
    return name_of(steps[-1][1]) if steps else type(learner).__name__
