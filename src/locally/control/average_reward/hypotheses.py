"""What LOOP asks of a class of hypotheses: learn from a step, choose a hypothesis, say when it no longer fits."""

from typing import Any, Protocol, runtime_checkable

import numpy as np

from locally.checks import check_between, check_count, check_positive
from locally.control.average_reward.planning import Plan
from locally.control.average_reward.walks import Trace, Walk
from locally.control.validity import check_index

STEP = "observation", "next_observation"


@runtime_checkable
class HypothesisClass(Protocol):
    """A set of hypotheses f = (Q_f, J_f), or of models that induce them, together with the data seen so far.

    `beta` turns the size of the class into the squared radius of the confidence set. `plan` picks the most optimistic
    hypothesis of the set and makes it current. `add` learns one step; `discrepancy` is Upsilon, how much worse the
    current hypothesis fits all data than the best, and `stale` whether that calls for a new plan. `advance` follows a
    policy through `add` until it is stale or the trace from `start` on is full, and returns how far it came.
    """

    n_states: int
    n_actions: int

    def beta(self, horizon: int, span: float, delta: float, scale: float) -> float:
        """Squared radius of the confidence set for `horizon` steps, V* of span at most `span`, failure delta."""

    def plan(self, beta: float, span: float, rng: np.random.Generator) -> Plan:
        """Make the most optimistic hypothesis within beta current, and return its greedy policy with its values."""

    def add(self, state: int, action: int, reward: float, following: int) -> None:
        """Take in one step; TypeError or ValueError for a state, action or reward outside [0, 1] that is none."""

    def discrepancy(self) -> float:
        """Upsilon of the current hypothesis on all data so far."""

    def stale(self, beta: float) -> bool:
        """Whether the data contradict the current hypothesis enough for a new plan."""

    def advance(self, walk: Walk, plan: Plan, beta: float, trace: Trace, start: int) -> int:
        """Follow the plan's policy through `add` until stale or the trace from `start` on is full; returns how far."""

    def estimated_span(self) -> float:
        """The span of V* that the data so far suggest, for span="auto"."""

    def state_dict(self) -> dict[str, Any]:
        """The data and the current hypothesis, as arrays and numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the class must have been constructed with the same arguments.

        Raises:
            ValueError: the state is of another problem; then nothing has changed.
        """


def squared_loss_beta(complexity: float, horizon: int, span: float, delta: float, scale: float) -> float:
    """scale * (1 + span)^2 / 4 * (complexity + 2 log(horizon / delta)).

    A target r + V(s') with r in [0, 1] and V in [0, span] has noise of scale (1 + span) / 2 (Hoeffding). The paper
    writes beta as c log(T N^2 / delta) sp(V*), for spans of at least 1: the square is what squared losses of that noise
    need, and the 1 is the reward's own noise, which stays when the span is small. `scale` 1 is the theory's order.

    >>> round(squared_loss_beta(12.0, 80000, 6.31, 0.05, 0.01), 2)
    5.42
    """
    return float(scale * (1 + span) ** 2 / 4 * (complexity + 2 * np.log(horizon / delta)))


def check_settings(horizon: int, span: float, delta: float, scale: float) -> None:
    check_count("horizon", horizon)
    check_positive("span", span)
    check_positive("delta", delta, below=1)
    check_positive("beta_scale", scale)


def check_step(
    of: Any, state: Any, action: Any, reward: Any, following: Any, names: tuple[str, str] = STEP
) -> tuple[int, int, float, int]:
    """A step of a finite process with a reward in [0, 1]; `names` are those of the two states in what is raised."""
    check_between("reward", reward, 0, 1)
    return (
        check_index(names[0], state, of.n_states),
        check_index("action", action, of.n_actions),
        float(reward),
        check_index(names[1], following, of.n_states),
    )


def check_transition(of: Any, state: Any, action: Any, reward: Any, following: Any) -> tuple[int, int, float, int]:
    """As `check_step`, with the names of `HypothesisClass.add`."""
    return check_step(of, state, action, reward, following, ("state", "following"))
