"""DoubleML, in an environment of its own: it brings pandas, plotly and optuna."""

from collections.abc import Callable
from typing import Any

from benchmarks.peers import answer, ask_in


def doubleml() -> Callable[..., Any] | None:
    """`ask("effect", model=, file=, learner=, folds=)`; None, with the reason printed, where it cannot be installed."""
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return ask_in("doubleml", ["doubleml==0.11.4"], __name__, one_thread, like_ours=True)


def learners(name: str) -> tuple[Any, Any]:
    """Classifier and regressor, the same on both sides."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.linear_model import LinearRegression, LogisticRegression

    if name == "linear":
        return LogisticRegression(), LinearRegression()
    options: dict[str, Any] = {"max_iter": 60, "max_leaf_nodes": 8, "random_state": 0}
    return HistGradientBoostingClassifier(**options), HistGradientBoostingRegressor(**options)


def effect(model: str, file: str, learner: str, folds: int) -> dict[str, float]:
    """Fit one of DoubleML's models to columns y, a, z, X of a file."""
    import warnings

    import numpy as np
    from doubleml import DoubleMLData, DoubleMLIIVM, DoubleMLIRM, DoubleMLPLIV

    warnings.simplefilter("ignore")
    np.random.seed(0)  # noqa: NPY002 - DoubleML splits by the global state
    table = np.load(file, allow_pickle=False)
    y, a, z, X = table[:, 0], table[:, 1], table[:, 2], table[:, 3:]
    classifier, regressor = learners(learner)
    if model == "IRM":  # the instrument is one more covariate
        data = DoubleMLData.from_arrays(np.column_stack([z, X]), y, a)
        fitted = DoubleMLIRM(data, regressor, classifier, n_folds=folds)
    elif model == "PLIV":
        data = DoubleMLData.from_arrays(X, y, a, z)
        fitted = DoubleMLPLIV(data, regressor, regressor, regressor, n_folds=folds)
    else:
        data = DoubleMLData.from_arrays(X, y, a, z)
        fitted = DoubleMLIIVM(data, regressor, classifier, classifier, n_folds=folds)
    fitted.fit()
    return {"estimate": float(fitted.coef[0]), "standard_error": float(fitted.se[0])}


if __name__ == "__main__":
    answer(effect)
