"""What a reader would otherwise use: adjusted least squares, two-stage least squares, GENIUS with a constant effect."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.causal.selective_effect.effect import Effect, Status
from locally.causal.selective_effect.working_models import Logistic, affine


def least_squares(
    y: Float[ndarray, " n"], a: Float[ndarray, " n"], z: Float[ndarray, " n"], X: Float[ndarray, "n d"]
) -> Effect:
    """Coefficient of A in Y on 1, A, Z, X, with robust error: trusts that nothing unseen acts on A and Y."""
    design = np.column_stack([a, z, affine(X)])
    return _instrumented(y, design, design, "least squares")


def two_stage_least_squares(
    y: Float[ndarray, " n"], a: Float[ndarray, " n"], z: Float[ndarray, " n"], X: Float[ndarray, "n d"]
) -> Effect:
    """Z as the instrument of A, X exogenous, robust error: trusts that Z acts on Y through A alone."""
    return _instrumented(y, np.column_stack([a, affine(X)]), np.column_stack([z, affine(X)]), "2SLS")


def genius(
    y: Float[ndarray, " n"], a: Float[ndarray, " n"], z: Float[ndarray, " n"], X: Float[ndarray, "n d"]
) -> Effect:
    """Constant effect from the variance of A: sum (Z - pi)(A - p) Y / sum (Z - pi)(A - p) A.

    pi and p are logistic in (1, X), p in each arm; Z may act on Y. The error treats them as known.
    Source: arXiv 1709.07779.
    """
    B = affine(X)
    ones = np.ones(len(y))
    pi = Logistic.fit(B, z, ones).predict(B)
    p = np.where(z == 1, Logistic.fit(B, a, ones * (z == 1)).predict(B), Logistic.fit(B, a, ones * (z == 0)).predict(B))
    return moment_ratio((z - pi) * (a - p), a, y, "GENIUS")


def lewbel(
    y: Float[ndarray, " n"], a: Float[ndarray, " n"], z: Float[ndarray, " n"], X: Float[ndarray, "n d"]
) -> Effect:
    """Two-stage least squares with the instrument (Z - mean)(A - linear first stage), Z and X exogenous.

    Source: Lewbel (2012), Journal of Business & Economic Statistics 30, 67-80.
    """
    exogenous = np.column_stack([z, affine(X)])
    residual = a - exogenous @ np.linalg.lstsq(exogenous, a, rcond=None)[0]
    made = (z - z.mean()) * residual
    return _instrumented(y, np.column_stack([a, exogenous]), np.column_stack([made, exogenous]), "Lewbel")


def moment_ratio(weight: Float[ndarray, " n"], a: Float[ndarray, " n"], y: Float[ndarray, " n"], label: str) -> Effect:
    """The beta that solves sum weight (Y - beta A) = 0."""
    denominator = float((weight * a).mean())
    estimate = float((weight * y).mean()) / denominator
    return Effect.from_scores((estimate + weight * (y - estimate * a) / denominator)[None], Status.IDENTIFIED, label)


def _instrumented(
    y: Float[ndarray, " n"], design: Float[ndarray, "n k"], instruments: Float[ndarray, "n k"], label: str
) -> Effect:
    """Just-identified instrumental variables; scores of the first coefficient by its influence function."""
    bread = np.linalg.inv(instruments.T @ design / len(y))
    coef = bread @ (instruments.T @ y / len(y))
    influence = (instruments * (y - design @ coef)[:, None]) @ bread[0]
    return Effect.from_scores((coef[0] + influence)[None], Status.IDENTIFIED, label)
