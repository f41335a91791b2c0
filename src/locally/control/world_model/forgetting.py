"""A stream that drifts, and what a model that sees it once forgets."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_count, check_finite, check_positive

Rng = np.random.Generator | int | None


def piecewise_random_walk(
    steps: int, difficulty: float, *, hold: int = 100, rng: Rng = None
) -> tuple[Float[ndarray, "steps 1"], Float[ndarray, "steps 1"]]:
    """Inputs around a centre that jumps every `hold` steps, and y = sin(2 pi x^2).

    The centre is an autoregressive process; whatever the difficulty, x has mean 0 and variance 1/4 over the long run,
    so that it changes nothing but how long the stream stays in one place.

    Args:
        steps: length of the stream.
        difficulty: d in (0, 1); near 1 the inputs stay close to a centre that moves slowly.
        hold: steps between two moves of the centre.
        rng: seed or generator.

    References: Pan, White and White (2021), on whose stream arXiv 2401.13034 compares world models.

    >>> x, y = piecewise_random_walk(1000, 0.5, rng=0)
    >>> x.shape, bool(abs(y).max() <= 1)
    ((1000, 1), True)
    """
    check_count("steps", steps)
    check_positive("difficulty", difficulty, below=1)
    check_count("hold", hold)
    rng = np.random.default_rng(rng)
    d = difficulty
    pull, jump, spread = 1 - np.sqrt(1 - d), d / 2, np.sqrt(1 - d) / 2
    centres = np.empty(-(-steps // hold))
    centres[0] = np.sqrt(d) / 2 * rng.standard_normal()  # stationary: jump^2 / (1 - (1 - pull)^2) = d / 4
    for i in range(1, len(centres)):
        centres[i] = (1 - pull) * centres[i - 1] + jump * rng.standard_normal()
    x = np.repeat(centres, hold)[:steps] + spread * rng.standard_normal(steps)
    return x[:, None], np.sin(2 * np.pi * x**2)[:, None]


def forgetting_matrix(
    learn: Callable[[ndarray, ndarray], Any],
    predict: Callable[[ndarray], ndarray],
    X: Float[ndarray, "n n_inputs"],
    y: Float[ndarray, "n n_targets"],
    segments: int,
    *,
    threshold: float,
) -> Float[ndarray, "segments segments"]:
    """Entry (s, t): share of segment s whose squared error exceeds `threshold` once segments 0 ... t were learnt.

    A row that stays low from the diagonal on was remembered, one that rises was forgotten; entries with t < s say how
    well a segment is predicted before it was seen.

    Args:
        learn: called with the rows of each segment, in order.
        predict: targets (n, n_targets) for inputs (n, n_inputs).
        X, y: the stream.
        segments: how many pieces of equal length it is cut into.
        threshold: squared error from which a prediction counts as wrong, positive.

    Raises:
        ValueError, TypeError: fewer rows than segments, NaN or infinity, or a threshold that is not positive.

    Complexity: segments predictions of the whole stream.
    """
    check_count("segments", segments)
    check_positive("threshold", threshold)
    check_finite("X", X)
    check_finite("y", y)
    if len(X) < segments or len(X) != len(y):
        raise ValueError(f"X and y must have equally many rows, at least {segments}, got {len(X)} and {len(y)}")
    pieces: Sequence[ndarray] = np.array_split(np.arange(len(X)), segments)
    matrix = np.empty((segments, segments))
    for t, rows in enumerate(pieces):
        learn(X[rows], y[rows])
        wrong = ((predict(X) - y) ** 2).mean(axis=1) > threshold
        matrix[:, t] = [wrong[piece].mean() for piece in pieces]
    return matrix


def squared_losses(
    model: Any, X: Float[ndarray, "n n_inputs"], y: Float[ndarray, "n n_targets"]
) -> Float[ndarray, " n"]:
    """|W_t^T phi_t - y_t|^2 before each update with (x_t, y_t); zero weights predict the first.

    With `solver="full"` their running sum minus `hindsight_loss_` is the regret, ridge included, of O(log n).

    >>> from locally.control.world_model.regression import LosseFTLRegressor
    >>> x, y = piecewise_random_walk(300, 0.5, rng=0)
    >>> model = LosseFTLRegressor(n_grids=5, solver="full", eps=1.0, random_state=0)
    >>> losses = squared_losses(model, x, y)
    >>> bool(losses.sum() > model.hindsight_loss_ > 0)
    True
    """
    losses = np.empty(len(X))
    for t in range(len(X)):
        guess = model.predict(X[t : t + 1]) if t else np.zeros((1, y.shape[1]))
        losses[t] = np.sum((guess - y[t]) ** 2)
        model.partial_fit(X[t : t + 1], y[t : t + 1])
    return losses
