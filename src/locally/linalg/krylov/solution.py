"""What a Krylov solve returns."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locally.linalg.krylov import kernels


class Status(StrEnum):
    """How the solve of one system ended; set by the solvers, read from `Solution`."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    STAGNATED = "stagnated: rounding keeps the residual above the tolerance"
    INDEFINITE = "breakdown: A is not positive definite"
    NOT_SYMMETRIC = "breakdown: A is not symmetric"
    INCONSISTENT = "breakdown: A is singular and b is not in its range"
    BAD_PRECONDITIONER = "breakdown: the preconditioner is not positive definite"
    NOT_FINITE = "breakdown: A or the preconditioner returned NaN or infinity"

    @property
    def code(self) -> int:
        """The number that stands for this status in `Solution.codes`."""
        return _CODES[self]


_CODES = {
    Status.CONVERGED: kernels.CONVERGED,
    Status.ITERATION_LIMIT: kernels.ITERATION_LIMIT,
    Status.STAGNATED: kernels.STAGNATED,
    Status.INDEFINITE: kernels.INDEFINITE,
    Status.NOT_SYMMETRIC: kernels.NOT_SYMMETRIC,
    Status.INCONSISTENT: kernels.INCONSISTENT,
    Status.BAD_PRECONDITIONER: kernels.BAD_PRECONDITIONER,
    Status.NOT_FINITE: kernels.NOT_FINITE,
}
_STATUS_OF = {code: status for status, code in _CODES.items()}


@dataclass(frozen=True, eq=False)
class Solution:
    """Answers of a batch of systems, and how each was reached.

    Attributes:
        x: the last iterates; differentiable where the right-hand side or the operator is. Where a system broke down
            with a larger residual than it started from, the start.
        codes: one `Status.code` per system; `status` and `statuses` read them.
        iterations: steps that each system took before it stopped.
        residual_norms: ||b - A x||_2, computed from x itself after the last step.
        history: ||b - A x_k||_2 for k = 0, 1, ... as the recurrence knows it, NaN after a system's last step.
    """

    x: Float[Tensor, "*batch n"]
    codes: Int[Tensor, "*batch"]
    iterations: Int[Tensor, "*batch"]
    residual_norms: Float[Tensor, "*batch"]
    history: Float[Tensor, "*batch steps"]

    @property
    def converged(self) -> Bool[Tensor, "*batch"]:
        """Which systems have the status CONVERGED."""
        return self.codes == kernels.CONVERGED

    @property
    def statuses(self) -> tuple[Status, ...]:
        """One status per system, in the order of the flattened batch."""
        return tuple(_STATUS_OF[code] for code in self.codes.flatten().tolist())

    @property
    def status(self) -> Status:
        """The status of the whole: CONVERGED if every system is, else that of the first that is not."""
        return next((status for status in self.statuses if status is not Status.CONVERGED), Status.CONVERGED)


def flat_norm(v: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
    """||v||_2 of each row, scaled so that squares neither overflow nor underflow."""
    scale = power_of_two(v)
    return scale * torch.linalg.vector_norm(v / scale[:, None], dim=1)


def power_of_two(v: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
    """The power of two next below the largest entry of each row, 1 for a zero row: dividing by it does not round."""
    largest = v.abs().amax(dim=1)
    return torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1.0)
