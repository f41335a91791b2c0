"""The training itself, apart from who computes it: hyper-parameters, momentum, who hears whom, and what comes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from locally.checks import check_choice, check_count, check_positive
from locally.training.byzantine.aggregation import NearestNeighborAverage, Rule
from locally.training.byzantine.tolerance import check_network

RESPONDERS = ("worst case", "sampled")


@runtime_checkable
class Problem(Protocol):
    """What the honest nodes minimise together, each on data of its own. Both engines draw the same batches from it."""

    def start(self) -> Float[Tensor, " D"]:
        """The parameters that all nodes start from."""
        ...

    def gradients(
        self, parameters: Float[Tensor, "K D"], step: int, nodes: Sequence[int], *, flipped: bool = False
    ) -> Float[Tensor, "K D"]:
        """Stochastic gradients of these honest nodes (numbered from 0) at their parameters; `flipped`: on wrong
        labels, where the problem has labels."""
        ...

    def batch_size(self, step: int) -> int:
        """Stochastic gradients that one node computes at this step."""
        ...


class Status(StrEnum):
    """How a training ended; set by both engines, read from `Outcome.status`."""

    FINISHED = "finished"
    DIVERGED = "diverged: an honest node's parameters are no longer finite"
    STOPPED = "stopped by the callback"
    TOO_FEW_PEERS = "too few peers answered in time"  # for some honest node; processes only


@dataclass(frozen=True)
class Outcome:
    """What a training left behind.

    Attributes:
        parameters: last ones of every honest node that finished, a row each.
        nodes: the numbers of those nodes.
        status: FINISHED if every honest node made all steps.
        steps: made by the rows of `parameters`.
        gradients_used: stochastic gradients that one node has computed.
        spread: mean squared distance of honest parameters from their mean, after each step (simulation only).
        momenta: as `parameters`; what a simulation needs to go on.
        lost: honest nodes that did not finish, with the reason (processes only).
    """

    parameters: Float[Tensor, "H D"]
    nodes: tuple[int, ...]
    status: Status
    steps: int
    gradients_used: int
    spread: Float[ndarray, " steps"] = field(default_factory=lambda: np.empty(0))
    momenta: Float[Tensor, "H D"] | None = None
    lost: Mapping[int, str] = field(default_factory=dict)
    memory: Any = None  # of the adversary

    @property
    def consensus_distance(self) -> float:
        """Largest Euclidean distance between an honest node and the mean of all."""
        return float((self.parameters - self.parameters.mean(0)).norm(dim=1).max())


@dataclass(frozen=True, kw_only=True)
class Collaboration:
    """MoNNA: local momentum, then nearest-neighbour averaging of parameters (arXiv 2209.10931, Algorithm 1).

    Args:
        n: nodes, at least 2.
        f: how many of them may be faulty, below n / 2 and within what the rule stands.
        lr: learning rate, or a function of the step.
        beta: momentum in [0, 1), as an exponential moving average that starts at zero.
        rule: combines received parameters; `NearestNeighborAverage(f)` by default.
        rounds: of exchange in every step.
        gradient_rule: exchanges and combines gradients first, as LEARN does.
        correct_bias: divide the momentum by 1 - beta^t. Not in the paper; helps runs shorter than 1 / (1 - beta).
        responders: whom a node hears. "worst case": every faulty node and n - 2f honest ones drawn at random, itself
            among them; "sampled": itself and n - f - 1 nodes drawn from all.
        seed: of these draws.

    Raises:
        ValueError: an argument is out of range; BeyondBreakdown, a kind of it, where f is too large.

    >>> Collaboration(n=16, f=3, lr=0.5).rule
    NearestNeighborAverage(f=3)
    >>> Collaboration(n=10, f=5, lr=0.5)
    Traceback (most recent call last):
    locally.training.byzantine.tolerance.BeyondBreakdown: f must be below n / 2: at most 4 of n = 10 nodes ...
    """

    n: int
    f: int
    lr: float | Callable[[int], float]
    beta: float = 0.99
    rule: Rule | None = None
    rounds: int = 1
    gradient_rule: Rule | None = None
    correct_bias: bool = False
    responders: str = "worst case"
    seed: int = 0

    def __post_init__(self) -> None:
        check_network(self.n, self.f)
        if not callable(self.lr):
            check_positive("lr", self.lr)
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta!r}")
        check_count("rounds", self.rounds)
        check_count("seed", self.seed, at_least=0)
        check_choice("responders", self.responders, RESPONDERS)
        if self.rule is None:
            object.__setattr__(self, "rule", NearestNeighborAverage(self.f))
        for rule in (self.rule, self.gradient_rule):
            if rule is not None:
                rule.check_nodes(self.n)

    @property
    def mixing(self) -> Rule:
        """The rule, which the constructor has filled in where none was given."""
        assert self.rule is not None
        return self.rule

    def learning_rate(self, step: int) -> float:
        """The learning rate of this step, counted from 0."""
        return self.lr(step) if callable(self.lr) else self.lr

    def momentum(self, momenta: Float[Tensor, "K D"], gradients: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
        """m <- beta m + (1 - beta) g, in place."""
        return momenta.mul_(self.beta).add_(gradients, alpha=1 - self.beta)

    def half_step(
        self, parameters: Float[Tensor, "K D"], momenta: Float[Tensor, "K D"], step: int
    ) -> Float[Tensor, "K D"]:
        """x = theta - gamma_t m."""
        correction = 1 - self.beta ** (step + 1) if self.correct_bias else 1.0
        return parameters - self.learning_rate(step) / correction * momenta

    def heard(self, honest: int, exchange: tuple[int, ...], *, silent: bool = False) -> Bool[ndarray, "H n"]:
        """Whom each honest node hears in this exchange: columns are the honest nodes, then the faulty ones.

        The faulty nodes' messages always arrive in time unless they are silent; then all honest ones must be heard.
        """
        faulty = self.n - honest
        rng = np.random.default_rng([self.seed, *exchange])
        urgency = rng.random((honest, self.n))
        urgency[np.arange(honest), np.arange(honest)] = -1.0
        if silent:
            urgency[:, honest:] = np.inf
        elif self.responders == "worst case":
            urgency[:, honest:] = -0.5
        rank = urgency.argsort(axis=1, kind="stable").argsort(axis=1)
        heard = rank < self.n - self.f
        if silent and faulty:
            heard[:, honest:] = False
        return heard
