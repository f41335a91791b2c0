"""Gradient play: simultaneous Euler, Runge-Kutta, extragradient and optimistic steps, with certified step sizes.

The certificate's guarantees are for `euler` (also with projection), `rk4` and `extragradient` at its own steps; the
optimistic method is there as what a reader would otherwise run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_choice, check_count, check_finite, check_positive
from locally.equilibrium.small_gain.certificate import SGNCertificate
from locally.equilibrium.small_gain.games import Game
from locally.equilibrium.small_gain.regions import Projection

Field = Callable[[Float[ndarray, "*batch d"]], Float[ndarray, "*batch d"]]
METHODS = ("euler", "rk4", "extragradient", "optimistic")
DIVERGENCE = 1e8  # residuals beyond this multiple of the first mean that the run has blown up


class PlayStatus(StrEnum):
    """How a run ended; set by `GradientPlay`, for a batch by its worst point."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    DIVERGED = "diverged: the step is too large, or there is nothing to converge to"


@dataclass(frozen=True)
class Play:
    """Where a run ended.

    Attributes:
        x: the last point (or batch of points).
        residual_norms: at each step, the largest over the batch of ||x - P(x - F(x))||, which is ||F(x)|| without a
            projection; in the certificate's norm where one was given, else Euclidean.
        step: the step size that was used.
        trajectory: all points, if asked for.
    """

    x: Float[ndarray, "*batch d"]
    status: PlayStatus
    residual_norms: Float[ndarray, " iterations"]
    step: float
    trajectory: Float[ndarray, "iterations *batch d"] | None = None

    @property
    def steps(self) -> int:
        """Steps that were made."""
        return len(self.residual_norms) - 1


def euler(field: Field, x: ndarray, step: float, project: Projection | None = None) -> ndarray:
    """x+ = P(x - step F(x))."""
    return _project(x - step * field(x), project)


def rk4(field: Field, x: ndarray, step: float, project: Projection | None = None) -> ndarray:
    """Classical fourth-order Runge-Kutta on x' = -F(x); a projection comes after the whole step."""
    k1 = field(x)
    k2 = field(x - step / 2 * k1)
    k3 = field(x - step / 2 * k2)
    k4 = field(x - step * k3)
    return _project(x - step / 6 * (k1 + 2 * k2 + 2 * k3 + k4), project)


def extragradient(field: Field, x: ndarray, step: float, project: Projection | None = None) -> ndarray:
    """x+ = P(x - step F(P(x - step F(x))))."""
    return _project(x - step * field(euler(field, x, step, project)), project)


@dataclass(frozen=True, kw_only=True)
class GradientPlay:
    """Run simultaneous play until the pseudo-gradient vanishes.

    Args:
        method: "euler", "rk4", "extragradient" or "optimistic".
        step: a positive number, or "certified" for the certificate's step: the best Euler step, the largest rigorous
            Runge-Kutta step, the extragradient step, 1 / (4 beta) for optimistic.
        tol: stop when the residual is at most tol.
        max_steps: at least 1.
        record: keep the trajectory.

    Raises:
        ValueError: an option is out of range.

    >>> from locally.equilibrium.small_gain import QuadraticGame, SmallGainCertifier
    >>> game = QuadraticGame(np.array([[1.0, 10.0], [0.05, 1.0]]), (1, 1), np.array([-11.0, -1.05]))
    >>> found = GradientPlay().run(game, np.zeros(2), SmallGainCertifier().certify(game))
    >>> found.status.value, found.x.round(6)
    ('converged', array([1., 1.]))
    """

    method: str = "euler"
    step: float | str = "certified"
    tol: float = 1e-8
    max_steps: int = 10_000
    record: bool = False

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if isinstance(self.step, str):
            check_choice("step", self.step, ("certified",))
        else:
            check_positive("step", self.step)
        check_positive("tol", self.tol)
        check_count("max_steps", self.max_steps)

    def run(
        self,
        game: Game,
        x0: Float[ndarray, "*batch d"],
        certificate: SGNCertificate | None = None,
        *,
        projection: Projection | None = None,
        callback: Callable[[int, float], None] | None = None,
    ) -> Play:
        """Play from one start or from a batch of starts.

        Args:
            game: what is played.
            x0: starts.
            certificate: gives the certified step, and the norm in which residuals are reported.
            projection: onto the feasible set. The guarantees need it not to expand the M(w)-norm: any product over
                players of Euclidean projections does, other sets need their projection in that norm, as
                `Ball.projection` gives it.
            callback: sees (step, residual norm).

        Raises:
            ValueError: a certified step is asked for without a certificate that gives one, x0 does not fit the game.
        """
        x = np.array(x0, dtype=float)
        if x.shape[-1:] != (game.dimension,):
            raise ValueError(f"x0 must have {game.dimension} entries in its last axis, got shape {x.shape}")
        check_finite("x0", x)
        step = self._step(certificate)
        weighted = certificate is not None and sum(certificate.block_sizes) == game.dimension
        norm = certificate.norm if certificate is not None and weighted else lambda v: np.linalg.norm(v, axis=-1)
        field = game.pseudo_gradient
        advance = _Optimistic() if self.method == "optimistic" else _STEPS[self.method]

        residuals: list[float] = []
        points = [x]
        status = PlayStatus.ITERATION_LIMIT
        for k in range(self.max_steps + 1):
            # overflow is how a run that blows up ends, and the status says so
            with np.errstate(over="ignore", invalid="ignore"):
                residuals.append(float(np.max(norm(x - _project(x - field(x), projection)))))
            if callback is not None:
                callback(k, residuals[-1])
            if residuals[-1] <= self.tol:
                status = PlayStatus.CONVERGED
                break
            if not residuals[-1] <= DIVERGENCE * max(residuals[0], self.tol):
                status = PlayStatus.DIVERGED
                break
            if k < self.max_steps:
                with np.errstate(over="ignore", invalid="ignore"):
                    x = advance(field, x, step, projection)
                if self.record:
                    points.append(x)
        return Play(x, status, np.array(residuals), step, np.stack(points) if self.record else None)

    def _step(self, certificate: SGNCertificate | None) -> float:
        if not isinstance(self.step, str):
            return float(self.step)
        if certificate is None:
            raise ValueError('step "certified" needs a certificate, got None')
        step = {
            "euler": certificate.euler_step_opt,
            "rk4": certificate.rk4_step_rigorous,
            "extragradient": certificate.extragradient_step,
            "optimistic": certificate.optimistic_step,
        }[self.method]
        if step <= 0:
            raise ValueError(f'step "certified" needs a certificate that gives one: {certificate.reason}')
        return step


class _Optimistic:
    """x+ = P(x - 2 step F(x) + step F(previous x)); the first step is a plain one."""

    def __init__(self) -> None:
        self.previous: ndarray | None = None

    def __call__(self, field: Field, x: ndarray, step: float, project: Projection | None = None) -> ndarray:
        slope = field(x)
        correction = slope if self.previous is None else 2 * slope - self.previous
        self.previous = slope
        return _project(x - step * correction, project)


_STEPS = {"euler": euler, "rk4": rk4, "extragradient": extragradient}


def _project(x: ndarray, project: Projection | None) -> ndarray:
    return x if project is None else project(x)
