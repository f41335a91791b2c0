"""The design loop: all designs at once, both losses in closed form, one forward pass of the model a step.

Each step takes the features h of the designs, the losses and the auxiliary score as functions of h alone, and pulls
their gradients back to the logits together; then the weight moves, Adam turns, the rate is set, the designs step.
Source: arXiv 2301.02931, Algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from locally.design.bidirectional.adaptive import Adam, AdaptiveRate, AdaptiveWeight
from locally.design.bidirectional.heads import Head

Embedding = Callable[[Tensor], Tensor]  # (designs, *shape) to features (designs, p), designs independent of each other
Callback = Callable[[int, "Step"], bool | None]


@runtime_checkable
class Auxiliary(Protocol):
    """A score that is higher where a design is better, as a function of the features."""

    def predict(self, features: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """Its score of every row."""

    def gradient(self, features: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """The derivative of each row's score in that row."""


class Status(StrEnum):
    """How an ascent ended; set by `Ascent.run`."""

    FINISHED = "finished"  # all steps are done
    STOPPED = "stopped by the callback"
    NOT_FINITE = "not finite: the designs are those before the step that failed"


@dataclass(frozen=True)
class Step:
    """What one step saw and chose, one number for each design.

    Attributes:
        forward, backward, auxiliary: losses and score before the step; NaN without an auxiliary model.
        gamma, eta: weight and rate with which the step was taken.
    """

    forward: Float[Tensor, " designs"]
    backward: Float[Tensor, " designs"]
    auxiliary: Float[Tensor, " designs"]
    gamma: Float[Tensor, " designs"]
    eta: Float[Tensor, " designs"]


@dataclass
class AscentState:
    """Everything that the next step depends on; `Ascent.run` goes on from it."""

    theta: Float[Tensor, "designs *shape"]
    gamma: Float[Tensor, " designs"]
    adam: Adam
    gamma_adam: Adam
    step: int = 0

    @classmethod
    def start(cls, theta: Float[Tensor, "designs *shape"], gamma: float) -> "AscentState":
        """The state before step 0: these designs, and the same weight gamma for all."""
        weights = torch.full((len(theta),), gamma, dtype=theta.dtype, device=theta.device)
        return cls(theta.clone(), weights, Adam.like(theta), Adam.like(weights))

    def copy(self) -> "AscentState":
        """One that shares no tensor with this."""
        return AscentState(self.theta.clone(), self.gamma.clone(), self.adam.copy(), self.gamma_adam.copy(), self.step)


@dataclass(frozen=True)
class AscentResult:
    state: AscentState
    status: Status
    trace: list[Step] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Descend gamma L_f + (1 - gamma) L_b by Adam on the logits.

    Args:
        steps: in all, counted from the state that `run` starts with at step 0.
        weight: gamma, fixed in [0, 1] or adaptive. 1 is gradient ascent on the proxy, 0 the backward mapping alone.
        rate: eta, fixed > 0 or adaptive.
    """

    steps: int
    weight: float | AdaptiveWeight = field(default_factory=AdaptiveWeight)
    rate: float | AdaptiveRate = 0.1

    @property
    def first_gamma(self) -> float:
        """gamma at step 0."""
        return self.weight.start if isinstance(self.weight, AdaptiveWeight) else float(self.weight)

    @property
    def adapts(self) -> bool:
        """Whether weight or rate is adaptive, which needs an auxiliary model."""
        return isinstance(self.weight, AdaptiveWeight) or isinstance(self.rate, AdaptiveRate)

    @torch.no_grad()  # of the model's own parameters; what is differentiated is differentiated by torch.func
    def run(
        self,
        embed: Embedding,
        head: Head,
        auxiliary: Auxiliary | None,
        start: Float[Tensor, "designs *shape"] | AscentState,
        callback: Callback | None = None,
    ) -> AscentResult:
        """Step until `steps`; `callback(step, what)` sees every step and ends the run by returning True.

        The state that is handed in stays as it is. One forward pass a step and a backward pass for each gradient that
        is needed: one where both weight and rate are fixed, two with an adaptive rate, three with an adaptive weight.

        Raises:
            ValueError: weight or rate is adaptive and there is no auxiliary model.
        """
        if auxiliary is None and self.adapts:
            raise ValueError("auxiliary must be a model where weight or rate is adaptive, got None")
        state = start.copy() if isinstance(start, AscentState) else AscentState.start(start, self.first_gamma)
        trace: list[Step] = []
        while state.step < self.steps:
            kept = state.copy()
            seen = self._advance(embed, head, auxiliary, state)
            if not (state.theta.isfinite().all() and state.gamma.isfinite().all()):
                return AscentResult(kept, Status.NOT_FINITE, trace)
            trace.append(seen)
            if callback is not None and callback(state.step, seen):
                return AscentResult(state, Status.STOPPED, trace)
        return AscentResult(state, Status.FINISHED, trace)

    def _advance(self, embed: Embedding, head: Head, auxiliary: Auxiliary | None, state: AscentState) -> Step:
        theta = state.theta
        h, pull = vjp(embed, theta)[:2]
        losses = head.losses(h)
        back = lambda cotangent: pull(cotangent.to(h.dtype))[0]
        aux = back(auxiliary.gradient(h)) if auxiliary is not None and self.adapts else None

        if isinstance(self.weight, AdaptiveWeight):
            assert aux is not None
            g_forward, g_backward = back(losses.forward_gradient), back(losses.backward_gradient)
            state.gamma = self.weight.update(state.gamma, state.gamma_adam, aux, g_forward, g_backward)
            gamma = per_design(state.gamma, theta)
            gradient = gamma * g_forward + (1 - gamma) * g_backward
        else:
            gamma = state.gamma[:, None].to(h.dtype)
            gradient = back(gamma * losses.forward_gradient + (1 - gamma) * losses.backward_gradient)

        direction = state.adam.direction(gradient)
        if isinstance(self.rate, AdaptiveRate):
            assert aux is not None
            # before the first step Adam has no history for the auxiliary model to judge
            first = torch.full_like(state.gamma, self.rate.base)
            eta = self.rate(aux, direction) if state.step else first
        else:
            eta = torch.full_like(state.gamma, self.rate)
        state.theta = theta - per_design(eta, theta) * direction
        state.step += 1
        judged = torch.full_like(losses.forward, torch.nan) if auxiliary is None else auxiliary.predict(h)
        return Step(losses.forward, losses.backward, judged, state.gamma, eta)


def per_design(values: Float[Tensor, " designs"], like: Float[Tensor, "designs *shape"]) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
