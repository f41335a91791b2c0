"""Parametric working models: bases of covariates, and logistic regression by maximum likelihood."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import expit

Basis = Callable[[Float[ndarray, "n d"]], Float[ndarray, "n k"]]
ArmBasis = Callable[[Float[ndarray, " n"], Float[ndarray, "n d"]], Float[ndarray, "n k"]]


def beside(*blocks: ndarray) -> Float[ndarray, "n k"]:
    """Vectors and matrices of n rows side by side, in column order: weighting and summing rows then run on vectors."""
    return np.concatenate([block.reshape(len(block), -1).T for block in blocks]).T


def affine(X: Float[ndarray, "n d"]) -> Float[ndarray, "n k"]:
    """1 and the covariates."""
    return beside(np.ones(len(X)), X)


def intercept(X: Float[ndarray, "n d"]) -> Float[ndarray, "n k"]:
    """1 alone."""
    return np.ones((len(X), 1))


def affine_by_arm(z: Float[ndarray, " n"], X: Float[ndarray, "n d"]) -> Float[ndarray, "n k"]:
    """1, X, z and z X."""
    once = affine(X)
    return beside(once, z[:, None] * once)


def arm_means(z: Float[ndarray, " n"], X: Float[ndarray, "n d"]) -> Float[ndarray, "n k"]:
    """1 and z."""
    return beside(np.ones(len(z)), z)


SATURATED = 30.0  # log-odds beyond which a fitted probability is 0 or 1 in double precision


@dataclass(frozen=True)
class Logistic:
    """P(target = 1 | basis row) = 1 / (1 + exp(-row @ coef)); a target that never varies gets its value instead."""

    coef: Float[ndarray, " k"]
    converged: bool
    constant: float | None = None

    @classmethod
    def fit(
        cls,
        B: Float[ndarray, "n k"],
        target: Float[ndarray, " n"],
        weight: Float[ndarray, " n"],
        *,
        tolerance: float = 1e-9,
        max_steps: int = 50,
    ) -> "Logistic":
        """Maximum likelihood by Newton steps, halved while they lower the likelihood. O(n k^2) a step.

        Without a finite maximum (separated classes) the result is the last step with `converged` false.
        """
        used = weight > 0
        if not used.all():
            B, target, weight = B[used], target[used], weight[used]
        if target.size == 0 or (target == target[0]).all():
            return cls(np.zeros(B.shape[1]), True, float(target[0]) if target.size else 0.0)
        signed = B * (2 * target - 1)[:, None]  # the likelihood is sum w log p, p = expit(signed @ coef)
        coef = np.zeros(B.shape[1])
        p = np.full(len(B), 0.5)
        value = weight.sum() * np.log(0.5)
        for _ in range(max_steps):
            slope = weight * (1 - p)
            gradient = slope @ signed
            if np.abs(gradient).max() <= tolerance * weight.sum():
                return cls(coef, bool(np.abs(signed @ coef).max() < SATURATED))
            hessian = (signed * (slope * p)[:, None]).T @ signed
            step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
            for halvings in range(20):
                trial = coef + 0.5**halvings * step
                p = expit(signed @ trial)
                trial_value = weight @ np.log(np.maximum(p, np.finfo(float).tiny))
                if trial_value >= value - 1e-12 * abs(value):
                    break
            coef, value = trial, trial_value
        return cls(coef, False)

    def predict(self, B: Float[ndarray, "n k"]) -> Float[ndarray, " n"]:
        return np.full(len(B), self.constant) if self.constant is not None else expit(B @ self.coef)
