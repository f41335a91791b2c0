"""Tables that ship with scikit-learn as linear models want them: rows of norm 1, by ranges that are no secret."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.datasets import load_breast_cancer, load_digits


def breast_cancer() -> tuple[Float[ndarray, "n d"], Float[ndarray, " n"]]:
    X, y = load_breast_cancer(return_X_y=True)
    return unit_rows(X, X.min(0), X.max(0)), y.astype(float)  # the ranges are printed in the table's description


def even_digits() -> tuple[Float[ndarray, "n d"], Float[ndarray, " n"]]:
    X, y = load_digits(return_X_y=True)
    return unit_rows(X, np.zeros(64), np.full(64, 16.0)), (y % 2 == 0).astype(float)


def unit_rows(X: Float[ndarray, "n d"], low: ndarray, high: ndarray) -> Float[ndarray, "n d+1"]:
    """Columns mapped from their documented ranges to [-1, 1], a constant appended, each row scaled to norm 1."""
    X = np.column_stack([2 * (X - low) / np.where(high > low, high - low, 1) - 1, np.ones(len(X))])
    return X / np.linalg.norm(X, axis=1)[:, None]


TABLES = {"digits, even or odd": even_digits, "breast cancer": breast_cancer}
