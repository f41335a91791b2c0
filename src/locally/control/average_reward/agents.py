"""LOOP and MLE-LOOP: optimism over a confidence set, and a new policy only when the data contradict the old one.

Source: He, Zhong & Yang (ICLR 2024), arXiv 2404.12648, Algorithms 1 and 2. Each new hypothesis may cost the span of V*
in regret, on top of what Bellman errors cost: that is why it waits for a contradiction.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_choice, check_nonnegative
from locally.control.average_reward.hypotheses import HypothesisClass, check_settings, check_step
from locally.control.average_reward.planning import Plan
from locally.control.average_reward.walks import Trace, Walk, check_walk
from locally.control.validity import check_generator_state, check_index, checked_arrays, checked_policy

RandomSource = np.random.Generator | int | None


@dataclass(frozen=True)
class Epoch:
    """What was followed from step `start` on, and how well it fitted when it was chosen."""

    start: int
    plan: Plan
    beta: float
    discrepancy: float


class LOOP:
    """Local-fitted optimisation with optimism over any `HypothesisClass`.

    When the policy is due, the hypothesis of largest gain is chosen among those whose squared loss exceeds the best
    auxiliary one by at most beta; its greedy policy is followed until that excess, on all data, has grown to 4 beta.

    Args:
        hypotheses: a class without data; `TabularValue`, `LinearValue`, `KernelValue`, `LinearMixture`, `FiniteValue`.
        horizon: number of steps T that beta is set for. The agent may go on after it.
        span: bound on sp(V*), positive, or "auto": starts at 1 and grows to the span that the data suggest whenever a
            plan is made. A heuristic, without the theorem's guarantee. Too small a bound biases the plans, too large a
            one slows learning down.
        delta: failure probability, in (0, 1).
        beta: squared radius of the confidence set; default `beta_scale` times the class's own, see
            `squared_loss_beta`. 1 is of the theory's order, 0.01 what works in practice, without a guarantee.
        lazy: False makes a new plan before every step, which is the ablation, not the method.
        rng: of the planner's random starts.

    Attributes:
        policy_: action for each state; None before the first step.
        gain_: J of the hypothesis being followed.
        n_switches_, switch_times_: plans after the first, and the steps before which they were made. They are what the
            theorem counts: the value function of the regret's telescope changes, even where the greedy policy does not.
        epochs_: every plan, with its beta and its discrepancy at that moment.
        n_steps_: steps observed.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Regret is of order sp(V*) d sqrt(T beta) and the number of switches of order d log T, d from the class.
    A step costs O(1) for tables, O(d^2) for d features, O(size) for finite lists; a plan, see `optimistic_plan`.

    >>> from locally.control.average_reward import TabularValue, run_continuing
    >>> from locally.control.environments import riverswim
    >>> agent = LOOP(TabularValue(6, 2), horizon=20000, span=6.32, rng=0)
    >>> regret = run_continuing(riverswim(), agent, 20000, seed=0)
    >>> agent.policy_, agent.n_switches_ < 30
    (array([1, 1, 1, 1, 1, 1]), True)
    """

    default_beta_scale = 0.01

    def __init__(
        self,
        hypotheses: HypothesisClass,
        *,
        horizon: int,
        span: float | Literal["auto"],
        delta: float = 0.05,
        beta: float | None = None,
        beta_scale: float | None = None,
        lazy: bool = True,
        rng: RandomSource = None,
    ) -> None:
        if not isinstance(hypotheses, HypothesisClass):
            raise TypeError(f"hypotheses must be a HypothesisClass, got {type(hypotheses).__name__}")
        self.beta_scale = self.default_beta_scale if beta_scale is None else beta_scale
        if isinstance(span, str):
            check_choice("span", span, ("auto",))
        self.auto_span = isinstance(span, str)
        self.span: float = 1.0 if isinstance(span, str) else span
        check_settings(horizon, self.span, delta, self.beta_scale)
        if beta is not None:
            check_nonnegative("beta", beta)
        self.hypotheses = hypotheses
        self.horizon, self.delta, self.lazy = horizon, delta, lazy
        self._given_beta = beta
        self.rng = np.random.default_rng(rng)
        self.epochs_: list[Epoch] = []
        self.n_steps_ = 0
        self._due = True

    @property
    def n_states(self) -> int:
        """States of the hypotheses."""
        return self.hypotheses.n_states

    @property
    def n_actions(self) -> int:
        """Actions of the hypotheses."""
        return self.hypotheses.n_actions

    @property
    def beta_(self) -> float:
        """Squared radius that the next plan will take: `beta`, or the class's own for the present span."""
        if self._given_beta is not None:
            return self._given_beta
        return self.hypotheses.beta(self.horizon, self.span, self.delta, self.beta_scale)

    @property
    def policy_(self) -> Int[ndarray, " S"] | None:
        """Action for each state; None before the first plan."""
        return self.epochs_[-1].plan.policy if self.epochs_ else None

    @property
    def gain_(self) -> float:
        """J of the hypothesis being followed; NaN before the first plan."""
        return self.epochs_[-1].plan.gain if self.epochs_ else float("nan")

    @property
    def q_(self) -> Float[ndarray, "S A"] | None:
        """Q of the hypothesis being followed; None before the first plan."""
        return self.epochs_[-1].plan.w - self.gain_ if self.epochs_ else None

    @property
    def upsilon_(self) -> float:
        """Discrepancy of the hypothesis being followed, on all data so far."""
        return self.hypotheses.discrepancy()

    @property
    def switch_times_(self) -> list[int]:
        """Steps before which these plans were made."""
        return [epoch.start for epoch in self.epochs_[1:]]

    @property
    def n_switches_(self) -> int:
        """Plans after the first, whether or not their greedy policy differs from the one before."""
        return max(len(self.epochs_) - 1, 0)

    def act(self, observation: Any) -> int:
        """The greedy action of the current hypothesis, after a new plan where one is due."""
        s = check_index("observation", observation, self.n_states)
        return int(self._plan().policy[s])

    def observe(
        self,
        observation: Any,
        action: Any,
        reward: float,
        next_observation: Any,
        *,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        """Learn one step of a process that never ends.

        Raises:
            TypeError, ValueError: a state or action does not exist, the reward is outside [0, 1], `terminated`.
        """
        if terminated:
            raise ValueError("terminated must be False: average reward is of a process that never ends")
        step = check_step(self, observation, action, reward, next_observation)
        self.hypotheses.add(*step)
        self.n_steps_ += 1
        self._due = not self.lazy or self.hypotheses.stale(self.epochs_[-1].beta if self.epochs_ else self.beta_)

    def advance(self, walk: Walk, trace: Trace) -> None:
        """Walk as many steps as `trace` holds, as `act` and `observe` would; ValueError for a walk of other sizes."""
        check_walk(walk, self)
        done = 0
        while done < trace.rewards.size:
            plan, beta = self._plan(), self.epochs_[-1].beta
            part = trace if self.lazy else Trace(*trace.part(0, done + 1))
            stop = self.hypotheses.advance(walk, plan, beta, part, done)
            self.n_steps_ += stop - done
            done = stop
            self._due = not self.lazy or self.hypotheses.stale(beta)

    def _plan(self) -> Plan:
        if not self._due:
            return self.epochs_[-1].plan
        if self.auto_span:
            self.span = max(self.span, self.hypotheses.estimated_span())
        beta = self.beta_
        plan = self.hypotheses.plan(beta, self.span, self.rng)
        self.epochs_.append(Epoch(self.n_steps_, plan, beta, self.hypotheses.discrepancy()))
        self._due = False
        return plan

    def state_dict(self) -> dict[str, Any]:
        """Data, plans and random state: an agent made alike that loads it goes on as if nothing had happened."""
        return {
            "hypotheses": self.hypotheses.state_dict(),
            "span": self.span,
            "n_steps": self.n_steps_,
            "due": self._due,
            "rng": self.rng.bit_generator.state,
            "epochs": [
                {"start": e.start, "beta": e.beta, "discrepancy": e.discrepancy} | vars(e.plan) for e in self.epochs_
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the agent must have been constructed with the same arguments.

        Raises:
            ValueError: the state is of hypotheses of other sizes; then nothing has changed.
        """
        epochs = [self._epoch(e) for e in state["epochs"]]
        span, n_steps, due = float(state["span"]), int(state["n_steps"]), bool(state["due"])
        if not (due or epochs):
            raise ValueError("state must hold the plan that is followed, or be due for one, got no epochs")
        check_generator_state(self.rng, state["rng"])
        self.hypotheses.load_state_dict(state["hypotheses"])
        self.span, self.n_steps_, self._due, self.epochs_ = span, n_steps, due, epochs
        self.rng.bit_generator.state = state["rng"]

    def _epoch(self, saved: dict[str, Any]) -> Epoch:
        cells = np.zeros((self.n_states, self.n_actions))
        arrays = checked_arrays(saved, {"V": cells[:, 0], "w": cells, "bonus": cells})
        policy = checked_policy("policy of an epoch", saved["policy"], self.n_states, self.n_actions)
        converged, clipped = bool(saved["converged"]), bool(saved["clipped"])
        plan = Plan(policy=policy, gain=float(saved["gain"]), **arrays, converged=converged, clipped=clipped)
        return Epoch(int(saved["start"]), plan, float(saved["beta"]), float(saved["discrepancy"]))


class MLELOOP(LOOP):
    """The model-based version: confidence sets from likelihoods, `FiniteModels` as hypotheses.

    The model of largest gain is chosen among those whose log-likelihood is within beta of the largest, and followed
    until its total-variation distances from the likeliest model, summed over the steps, reach 3 sqrt(beta t).
    beta is log(number of models * T / delta), times `beta_scale`, 1 by default. Arguments as for `LOOP`.

    >>> from locally.control.average_reward import FiniteModels, run_continuing
    >>> from locally.control.environments import riverswim
    >>> models = [riverswim(up=up) for up in (0.1, 0.2, 0.35, 0.5)]
    >>> agent = MLELOOP(FiniteModels([m.P for m in models], [m.R for m in models]), horizon=4000, span=7.0, rng=0)
    >>> _ = run_continuing(riverswim(), agent, 4000, seed=0)
    >>> agent.hypotheses.likeliest()
    2
    """

    default_beta_scale = 1.0
