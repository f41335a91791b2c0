"""Faults to order, for drills: a node that dies, freezes, lags, is cut off, lies, or sends no message at all."""

import os
import pickle
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from locally.checks import check_choice, check_nonnegative
from locally.training.byzantine.attacks import Attack, Sight, tell_lies
from locally.training.byzantine.collaboration import Collaboration, Problem
from locally.training.byzantine.processes.messages import HEADER, MAGIC, greeting
from locally.training.byzantine.processes.node import exchanges_per_step
from locally.training.byzantine.processes.sockets import Membership, SocketTransport, TooFewPeers

GARBAGE = ("wrong length", "wrong dtype", "wrong sender", "pickle", "noise", "stalled message", "stranger")


@dataclass(frozen=True)
class Crash:
    """Takes part honestly and ends itself by SIGKILL before it sends the vector of this step."""

    step: int

    def before_exchange(self, step: int, transport: SocketTransport) -> None:
        """Kill this process if it is the step."""
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Freeze:
    """Takes part honestly and stops itself by SIGSTOP at this step: its connections stay open, and silent."""

    step: int

    def before_exchange(self, step: int, transport: SocketTransport) -> None:
        """Stop this process if it is the step."""
        if step == self.step:
            os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True)
class Slow:
    """Takes part honestly, `seconds` late in every step."""

    seconds: float

    def __post_init__(self) -> None:
        check_nonnegative("seconds", self.seconds)

    def before_exchange(self, step: int, transport: SocketTransport) -> None:
        """Sleep, in every step."""
        time.sleep(self.seconds)


@dataclass(frozen=True)
class CutOff:
    """From this step on nothing passes between this node and the `others`: one side of a partitioned network."""

    step: int
    others: tuple[int, ...]

    def before_exchange(self, step: int, transport: SocketTransport) -> None:
        """Close the links to the others, once, if it is the step."""
        if step == self.step:
            transport.cut_off(self.others)


@dataclass(frozen=True)
class Lie:
    """Waits for the honest vectors of every round and answers with an attack on them, other lies to other nodes."""

    attack: Attack
    seed: int = 0


@dataclass(frozen=True)
class Garbage:
    """Sends every peer what is no message of the protocol, again and again: one of `GARBAGE`."""

    kind: Literal["wrong length", "wrong dtype", "wrong sender", "pickle", "noise", "stalled message", "stranger"]

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, GARBAGE)


Drill = Crash | Freeze | Slow | CutOff | Lie | Garbage
LIARS = (Lie, Garbage)  # need no data and count as faulty from the start


def lie_to_all(
    transport: SocketTransport, collaboration: Collaboration, problem: Problem, steps: int, drill: Lie, liars: list[int]
) -> None:
    """The adversary's part in a training: sees all honest vectors of a round before it sends its own.

    All liars run this with the same attack and seed, so that they agree on what to send without a word.
    """
    c = collaboration
    honest = [peer for peer in range(transport.n) if peer not in liars]
    mine = liars.index(transport.rank)
    exchanges = exchanges_per_step(c)
    for round in range(steps * exchanges):
        step, k = divmod(round, exchanges)
        try:
            heard = transport.gather(round, len(honest), honest)
        except TooFewPeers:
            return  # they have finished, or are gone
        vectors = torch.stack([heard[peer] for peer in honest])
        rule = c.gradient_rule if c.gradient_rule is not None and k == 0 else c.mixing
        before = vectors.mean(0).repeat(len(honest), 1)
        rate = 1.0 if rule is c.gradient_rule else c.learning_rate(step)
        flipped = lambda b=before, t=step, r=rate: r * problem.gradients(b, t, honest, flipped=True).mean(0)
        rng = np.random.default_rng([drill.seed, round])
        sight = Sight(vectors, len(liars), step, rule.damage(vectors, len(liars)), flipped, rng)
        lies = tell_lies(drill.attack, sight)
        if lies is not None:
            for row, peer in enumerate(honest):
                transport.send(peer, round, lies[mine] if lies.ndim == 2 else lies[row, mine])


@dataclass
class _Unpickled:
    """What a careless receiver would run."""

    path: str = field(default="")

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def send_garbage(membership: Membership, drill: Garbage, entries: int, trace: str, until: float) -> None:
    """Until the monotonic time `until`; `trace` is a folder that a receiver would make which unpickles."""
    n, rank = membership.n, membership.rank
    message = {
        "wrong length": HEADER.pack(MAGIC, 1, rank, 0, 1 << 60) + b"\0" * 4096,
        "wrong dtype": HEADER.pack(MAGIC, 99, rank, 0, entries) + b"\0" * 4096,
        "wrong sender": HEADER.pack(MAGIC, 1, (rank + 1) % n, 0, entries) + b"\0" * (4 * entries),
        "pickle": pickle.dumps(_Unpickled(trace)) * 10,
        "noise": np.random.default_rng(0).bytes(4096),
        "stalled message": HEADER.pack(MAGIC, 1, rank, 0, entries) + b"\0",
        "stranger": b"",
    }[drill.kind]
    open_connections = []
    while time.monotonic() < until:
        for peer in range(n):
            if peer == rank:
                continue
            with suppress(OSError):
                connection = socket.create_connection(membership.addresses[peer], timeout=1)
                key = membership.keys_out[peer] if drill.kind != "stranger" else b"\0" * 16
                connection.sendall(greeting(rank if drill.kind != "stranger" else (rank + 1) % n, key) + message)
                open_connections.append(connection)  # left open: a stalled message has no end
        time.sleep(0.05)
        for connection in open_connections[: -4 * n]:
            connection.close()
        del open_connections[: -4 * n]
