"""What a minimisation returns: a status, the last good iterate, and one record for every iterate on the way."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult

from locally.optimize.gradient_normalized.oracle import Oracle, Point

Callback = Callable[[OptimizeResult], object]


class Status(IntEnum):
    """How a minimisation ended; every status but NOT_FINITE at the very start comes with a usable x."""

    CONVERGED = 0
    ITERATION_LIMIT = 1
    SEARCH_FAILED = 2
    NOT_FINITE = 3
    UNBOUNDED = 4
    STOPPED = 5


MESSAGES = {
    Status.CONVERGED: "the dual norm of the gradient, or fun, is at its target",
    Status.ITERATION_LIMIT: "iteration limit",
    Status.SEARCH_FAILED: "no trial step made progress",
    Status.NOT_FINITE: "NaN or infinity",
    Status.UNBOUNDED: "fun falls without end",
    Status.STOPPED: "the callback raised StopIteration",
}


class Trace:
    """Fun, dual norm of the gradient, step parameter and costs so far, at every iterate from x0 on.

    Args:
        parameter: name of the step parameter: gamma, or the smoothness constant of a baseline.
    """

    def __init__(self, parameter: str = "gamma") -> None:
        self._columns = ("fun", "dual_norm", parameter, "nfev", "njev", "nhev", "nsolve")
        self._rows: list[tuple[float, ...]] = []
        self.nsolve = 0

    def add(self, point: Point, parameter: float, oracle: Oracle) -> None:
        self._rows.append((point.f, point.norm, parameter, oracle.nfev, oracle.njev, oracle.nhev, self.nsolve))

    @property
    def iterations(self) -> int:
        return max(len(self._rows) - 1, 0)

    def arrays(self) -> dict[str, np.ndarray]:
        columns = zip(*self._rows) if self._rows else [()] * len(self._columns)
        return {name: np.array(column) for name, column in zip(self._columns, columns)}

    def result(
        self, point: Point, parameter: float, oracle: Oracle, status: Status | None = None, message: str = ""
    ) -> OptimizeResult:
        """The present state; without a status, for a callback: `status` is then None."""
        found = OptimizeResult(
            x=point.x,
            fun=point.f,
            jac=point.g,
            dual_norm=point.norm,
            nit=self.iterations,
            nfev=oracle.nfev,
            njev=oracle.njev,
            nhev=oracle.nhev,
            nsolve=self.nsolve,
        )
        found[self._columns[2]] = parameter
        if status is not None:
            found.update(
                status=status,
                success=status is Status.CONVERGED,
                message=message or MESSAGES[status],
                history=self.arrays(),
            )
        return found

    def stopped_by(self, callback: Callback | None, point: Point, parameter: float, oracle: Oracle) -> bool:
        if callback is None:
            return False
        try:
            callback(self.result(point, parameter, oracle))
        except StopIteration:
            return True
        return False


def describe_non_finite(point: Point, where: str) -> Any:
    """Which of fun and jac is not finite at the point; None where both are."""
    if not np.isfinite(point.f):
        return f"fun is {point.f} {where}"
    if not np.isfinite(point.g).all():
        return f"jac holds NaN or infinity {where}"
    return None
