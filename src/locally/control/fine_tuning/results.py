"""What a fine-tuning run leaves behind."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from jaxtyping import Float, Int
from numpy import ndarray


class Status(StrEnum):
    """Where elimination stands; set by `FTPedel`, read from it and from `FineTuningResult.status`."""

    EXPLORING = "exploring"  # still playing: there is no answer yet
    CERTIFIED = "certified"  # one policy is left, or the last phase is over
    EPISODE_LIMIT = "episode limit: the answer is not certified"


@dataclass(frozen=True)
class Phase:
    """One phase of elimination, or the warm-up (number 0).

    Attributes:
        number, accuracy, beta: l, eps_l and beta_l.
        episodes: played for each layer.
        alive: policies at its start.
        width: the largest ||phi^|| in the norm of Lambda^(-1) at its end; NaN for the warm-up.
    """

    number: int
    accuracy: float
    beta: float
    episodes: tuple[int, ...]
    alive: int
    width: float

    def to_dict(self) -> dict[str, Any]:
        """Its fields, as plain JSON data."""
        return asdict(self) | {"episodes": list(self.episodes)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Phase":
        """The phase that `to_dict` wrote."""
        return cls(**(data | {"episodes": tuple(data["episodes"])}))


@dataclass(frozen=True)
class Certificate:
    """What is known of the answer without knowing the process.

    Attributes:
        valid: the run came to its end.
        suboptimality: 2 eps_l of the last phase, or 0 if one policy is left: how far the answer can be below the best
            of the class, if the widths of `beta_scale` hold. Infinite if not valid.
        proved: an upper bound on the same with the constants of the proofs, which hold with probability at least
            1 - delta whatever beta_scale is; often too large to be of use.
        delta: probability that a bound fails.
        beta_scale: what the run was calibrated with.
        proved_beta_scale: from which on, with fresh data, `suboptimality` is proved as well.
        fresh_data: whether each phase and layer had data of its own, as proofs want it.
    """

    valid: bool
    suboptimality: float
    proved: float
    delta: float
    beta_scale: float
    proved_beta_scale: float
    fresh_data: bool


@dataclass(frozen=True)
class FineTuningResult:
    """Attributes:
    policy: the answer, probabilities of actions; `index` is its place in the class.
    value: its estimated value.
    status, certificate: how the run ended, and what that guarantees.
    n_episodes: online episodes played.
    alive: members of the class that were not eliminated.
    values: estimates for them.
    errors: sum over layers of sqrt(beta) ||phi^||, by which the estimates may be off.
    history: the phases.
    """

    policy: Float[ndarray, "H S A"]
    index: int
    value: float
    status: Status
    certificate: Certificate
    n_episodes: int
    alive: Int[ndarray, " k"]
    values: Float[ndarray, " k"]
    errors: Float[ndarray, " k"]
    history: tuple[Phase, ...]


def proved_beta_scale(horizon: int) -> float:
    """The beta_scale from which the theory covers fresh data: (H + 1)^2 / 8.

    Hoeffding gives |V^(pi) - V(pi)| <= sum_h (H - h) sqrt(log(.) / 2) w_h, h from 0, with widths
    w_h <= eps / (H sqrt(beta_scale log(.))) at the end of a phase: at most eps from this scale on, but for the ridge.

    >>> proved_beta_scale(2)
    1.125
    """
    return (horizon + 1) ** 2 / 8
