"""What every private method of this folder returns."""

from dataclasses import dataclass
from enum import StrEnum

from jaxtyping import Float
from torch import Tensor

from locally.privacy.stationary.accounting import PrivacyStatement


class Status(StrEnum):
    """Whether a private run went as planned; set by every method of this room, read from `PrivateResult.status`."""

    FINISHED = "finished"
    STATIONARY = "stopped early: the released gradient is below the stopping level"
    STEP_LIMIT = "completed, but max_steps kept an inner solver from the steps that its analysis asks for"
    DIVERGED = "diverged: a released estimate is not finite"


@dataclass(frozen=True)
class Trace:
    """The released path. All of it is covered by the privacy statement; nothing in it was read off the data directly.

    Attributes:
        iterates: points at which gradients were released, in order.
        estimates: the noisy gradient estimate at each of the first points; one row fewer where the last point was
            reached but not visited.
    """

    iterates: Float[Tensor, "points d"]
    estimates: Float[Tensor, "releases d"]


@dataclass(frozen=True)
class PrivateResult:
    """A private answer and its privacy statement.

    Attributes:
        w: the released parameters.
        status: whether the method ran as planned.
        privacy: the guarantee for `w` and `trace` together. It is that of the planned run, also after an early stop.
        steps: updates made.
        gradient_evaluations: per-example gradients computed (expected number under Poisson sampling).
        chosen: index into the path of the point that was returned.
        trace: the whole released path, if it was asked for.
    """

    w: Float[Tensor, " d"]
    status: Status
    privacy: PrivacyStatement
    steps: int
    gradient_evaluations: int
    chosen: int
    trace: Trace | None = None
