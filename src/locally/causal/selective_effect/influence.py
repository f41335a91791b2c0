"""The efficient influence function of the average treatment effect when the instrument may act on the outcome.

With a binary instrument Z, a treatment A and covariates X let p_z, v_z be mean and variance of A, m_z the mean of Y and
c_z the covariance of A and Y, all given Z = z and X. If neither the effect of A nor the confounding of A and Y changes
with Z on the additive scale, the part omega of the covariance that confounding causes is the same in both arms, and

    beta(X) = (c_1 - c_0) / (v_1 - v_0),    omega = c_z - beta v_z,    theta_z = m_z - beta p_z,    ATE = E[beta(X)].

Nothing is said of Z and Y: the instrument may act on the outcome directly. What must differ between its arms is the
variance of the treatment, D = v_1 - v_0. Source: arXiv 1907.11882; the constant-effect case is arXiv 1709.07779.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

# where D is 0 and was not to be kept from it, infinities travel to the estimate, whose status then says so
UNIDENTIFIED = np.errstate(divide="ignore", invalid="ignore")


@dataclass(frozen=True)
class WorkingValues:
    """Values of the nuisances at n units; row z of a (2, n) array belongs to instrument arm z.

    Attributes:
        pi: P(Z = 1 | X), strictly between 0 and 1.
        p, v: mean and variance of A given Z and X.
        D: v_1 - v_0, kept away from 0 where that was asked for.
        beta, omega: effect and confounding covariance given X.
        theta: E[Y - beta A | Z, X].
    """

    pi: Float[ndarray, " n"]
    p: Float[ndarray, "2 n"]
    v: Float[ndarray, "2 n"]
    D: Float[ndarray, " n"]
    beta: Float[ndarray, " n"]
    omega: Float[ndarray, " n"]
    theta: Float[ndarray, "2 n"]

    @classmethod
    @UNIDENTIFIED
    def from_moments(
        cls,
        pi: Float[ndarray, " n"],
        p: Float[ndarray, "2 n"],
        v: Float[ndarray, "2 n"],
        m: Float[ndarray, "2 n"],
        c: Float[ndarray, "2 n"],
        *,
        trim_d: float = 0.0,
    ) -> "WorkingValues":
        """From first and second moments of (A, Y) in each arm."""
        D = keep_from_zero(v[1] - v[0], trim_d)
        beta = (c[1] - c[0]) / D
        # equal in both arms wherever D was left alone; the mean keeps the choice symmetric where it was not
        omega = (c - beta * v).mean(axis=0)
        return cls(pi, p, v, D, beta, omega, m - beta * p)

    @classmethod
    def from_cells(
        cls,
        pi: Float[ndarray, " n"],
        p: Float[ndarray, "2 n"],
        mu: Float[ndarray, "2 2 n"],
        *,
        trim_d: float = 0.0,
    ) -> "WorkingValues":
        """From mu[a, z] = E[Y | A = a, Z = z, X] of a binary treatment: c_z = v_z (mu_1z - mu_0z)."""
        v = p * (1 - p)
        gap = mu[1] - mu[0]
        return cls.from_moments(pi, p, v, mu[0] + p * gap, v * gap, trim_d=trim_d)

    @classmethod
    def gather(cls, parts: Sequence[tuple[Int[ndarray, " rows"], "WorkingValues"]]) -> "WorkingValues":
        """One set of values for all units from values of disjoint groups of rows."""
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        return cls(
            *(
                np.concatenate([getattr(values, f.name) for _, values in parts], axis=-1)[..., order]
                for f in fields(cls)
            )
        )

    @UNIDENTIFIED
    def instrument_weight(self, z: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        """(2Z - 1) / (f(Z|X) D(X)): what a residual product counts in the score."""
        return signed_inverse_density(z, self.pi) / self.D

    @UNIDENTIFIED
    def correction(
        self, z: Float[ndarray, " n"], a: Float[ndarray, " n"], y: Float[ndarray, " n"]
    ) -> Float[ndarray, " n"]:
        """{(A - p)(Y - beta A - theta) - omega} / D: the score is beta + (2Z - 1) / f(Z|X) times this, free of pi."""
        product = residual_product(a, y, at_arm(self.p, z), self.beta, at_arm(self.theta, z))
        return (product - self.omega) / self.D

    @UNIDENTIFIED
    def scores(self, z: Float[ndarray, " n"], a: Float[ndarray, " n"], y: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        """Uncentred efficient influence function at these values."""
        return self.beta + signed_inverse_density(z, self.pi) * self.correction(z, a, y)

    @UNIDENTIFIED
    def tilted(
        self, z: Float[ndarray, " n"], a: Float[ndarray, " n"], y: Float[ndarray, " n"], delta: float, trim_d: float
    ) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
        """Scores of the effect when confounding differs between the arms, and the gap that they divide by.

        With omega_1 - omega_0 = delta mean(omega_z), sum_z s_z (c_z - beta v_z) = 0 for s_1 = 1 - delta/2 and
        s_0 = -(1 + delta/2): beta is the ratio of the two contrasts, and its influence function has the same form with
        s_Z in the place of 2Z - 1.
        """
        s = np.array([-(1 + delta / 2), 1 - delta / 2])[:, None]
        c = self.omega + self.beta * self.v
        shift = self.v[1] - self.v[0] - self.D  # non-zero only where D was kept from zero
        D = keep_from_zero((s * self.v).sum(axis=0) - shift, trim_d)
        beta = ((s * c).sum(axis=0) - self.beta * shift) / D
        theta = self.theta + (self.beta - beta) * self.p
        product = residual_product(a, y, at_arm(self.p, z), beta, at_arm(theta, z))
        expected = at_arm(c, z) - beta * at_arm(self.v, z)
        weight = np.where(z == 1, s[1] / self.pi, s[0] / (1 - self.pi)) / D
        return beta + weight * (product - expected), D


def efficient_influence(
    z: Float[ndarray, " n"],
    a: Float[ndarray, " n"],
    y: Float[ndarray, " n"],
    pi: Float[ndarray, " n"],
    p: Float[ndarray, "2 n"],
    mu: Float[ndarray, "2 2 n"],
    *,
    trim_d: float = 0.0,
) -> Float[ndarray, " n"]:
    """Uncentred efficient influence function of the ATE for binary A and Z: its mean is the one-step estimate.

    Args:
        z, a, y: instrument and treatment (0 or 1) and outcome of n units.
        pi: P(Z = 1 | X), in (0, 1).
        p: P(A = 1 | Z = z, X), row z.
        mu: E[Y | A = a, Z = z, X] at [a, z].
        trim_d: least |v_1 - v_0|; smaller ones are replaced by it with the sign that most units have.

    O(n) time and memory. Source: arXiv 1907.11882.

    >>> pi, p = np.array([0.5, 0.5]), np.array([[0.1, 0.1], [0.5, 0.5]])
    >>> mu = np.array([[[0.0, 1.0], [1.0, 2.0]], [[1.5, 2.5], [2.5, 3.5]]])
    >>> efficient_influence(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.array([0.1, 3.4]), pi, p, mu).round(4)
    array([1.625, 0.875])
    """
    return WorkingValues.from_cells(pi, p, mu, trim_d=trim_d).scores(z, a, y)


def residual_product(
    a: Float[ndarray, " n"],
    y: Float[ndarray, " n"],
    p: Float[ndarray, " n"],
    beta: Float[ndarray, " n"],
    theta: Float[ndarray, " n"],
) -> Float[ndarray, " n"]:
    """(A - p)(Y - beta A - theta), whose mean given Z and X is omega(X) in either arm."""
    return (a - p) * (y - beta * a - theta)


def at_arm(values: Float[ndarray, "2 n"], z: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """The row of each unit's own instrument arm."""
    return np.where(z == 1, values[1], values[0])


def signed_inverse_density(z: Float[ndarray, " n"], pi: Float[ndarray, "*batch n"]) -> Float[ndarray, "*batch n"]:
    """(2Z - 1) / f(Z|X)."""
    return np.where(z == 1, 1 / pi, -1 / (1 - pi))


def keep_from_zero(D: Float[ndarray, " n"], least: float) -> Float[ndarray, " n"]:
    """D with entries below `least` in size replaced by it, all with the sign of the median.

    The sign is shared because a variance gap that changes sign between units passes through zero.
    """
    if least == 0:
        return D
    sign = 1.0 if np.median(D) >= 0 else -1.0
    return np.where(np.abs(D) < least, sign * least, D)
