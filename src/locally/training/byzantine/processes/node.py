"""One honest node's training, on whatever transport: the algorithm as each process runs it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from locally.training.byzantine.collaboration import Collaboration, Problem


class NonFiniteModel(RuntimeError):
    """This node's own parameters are no longer finite; it stops before it sends them."""


@runtime_checkable
class Transport(Protocol):
    rank: int
    n: int

    def exchange(
        self, round: int, vector: Float[Tensor, " D"], prefer: Iterable[int] | None = None
    ) -> Float[Tensor, "m D"]:
        """Send the vector to all and return n - f of the round, one's own among them."""
        ...


@dataclass(frozen=True)
class Trained:
    """Where one node arrived."""

    parameters: Float[Tensor, " D"]
    momentum: Float[Tensor, " D"]
    gradients_used: int


def exchanges_per_step(collaboration: Collaboration) -> int:
    return collaboration.rounds + (collaboration.gradient_rule is not None)


def train(
    transport: Transport,
    collaboration: Collaboration,
    problem: Problem,
    steps: int,
    *,
    honest: list[int] | None = None,
    before_exchange: Callable[[int], None] | None = None,
    callback: Callable[[int], object] | None = None,
) -> Trained:
    """Train node `transport.rank` together with its peers.

    Args:
        transport: to the peers.
        collaboration, problem: the same at every node; the problem gives this node's gradients by its rank.
        steps: to make.
        honest: in drills, the honest ranks: the node then prefers to hear those that a simulation with the same seed
            would let it hear, instead of whoever is first.
        before_exchange: sees every step before its vectors are sent.
        callback: sees the steps done.

    Raises:
        NonFiniteModel: the node's own vector is not finite.
        TooFewPeers: fewer than n - f nodes answered in time.
    """
    c, rank = collaboration, transport.rank
    parameters = problem.start()[None]
    momentum = torch.zeros_like(parameters)
    used, round = 0, 0

    def exchange(vector: Tensor, at: tuple[int, ...]) -> Tensor:
        nonlocal round
        if not bool(vector.isfinite().all()):
            raise NonFiniteModel(f"node {rank} has NaN or infinity in its vector at step {at[0]}")
        prefer = None if honest is None else preferred(c, honest, rank, at)
        received = transport.exchange(round, vector[0], prefer)
        round += 1
        return received

    for step in range(steps):
        gradient = problem.gradients(parameters, step, [rank])
        if before_exchange is not None:
            before_exchange(step)
        if c.gradient_rule is not None:
            gradient = c.gradient_rule(exchange(gradient, (step, 0, 1)), gradient[0])[None]
        momentum = c.momentum(momentum, gradient)
        parameters = c.half_step(parameters, momentum, step)
        for k in range(c.rounds):
            parameters = c.mixing(exchange(parameters, (step, k)), parameters[0])[None]
        used += problem.batch_size(step)
        if callback is not None:
            callback(step + 1)
    return Trained(parameters[0], momentum[0], used)


def preferred(collaboration: Collaboration, honest: list[int], rank: int, at: tuple[int, ...]) -> list[int]:
    """Ranks that the simulation lets this node hear in this exchange."""
    n = collaboration.n
    columns = [*honest, *(peer for peer in range(n) if peer not in honest)]
    heard = collaboration.heard(len(honest), at)[honest.index(rank)]
    return [columns[k] for k in np.flatnonzero(heard) if columns[k] != rank]
