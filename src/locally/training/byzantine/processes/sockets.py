"""Point-to-point links over TCP on which no peer can make another wait, grow or stop.

A collective operation ends when its slowest member does, so one dead node stops all. Here each node has one outgoing
and one incoming connection per peer, served by threads of their own: a peer that dies, stalls in the middle of a
message or sends garbage costs its own link and nothing else.
"""

import hmac
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_count, check_positive
from locally.training.byzantine.processes.messages import (
    DTYPES,
    MalformedMessage,
    greeting,
    pack,
    read_greeting,
    read_message,
)

MEMORY = 1 << 28  # bytes kept for one peer at most, each way
RETRY = 0.1  # seconds between attempts to reach a peer
Address = tuple[str, int]


class TooFewPeers(RuntimeError):
    """Fewer nodes than n - f answered within the timeout: more are silent than the method may lose."""


@dataclass(frozen=True)
class Membership:
    """Who takes part, as one node sees it.

    Attributes:
        rank: of this node, from 0.
        addresses: where each node listens.
        keys_in: for each node the 16 bytes by which it proves who it is to this one.
        keys_out: for each node the 16 bytes by which this one proves who it is there.
        listener: bound and listening on addresses[rank].
    """

    rank: int
    addresses: Sequence[Address]
    keys_in: Sequence[bytes] = field(repr=False)
    keys_out: Sequence[bytes] = field(repr=False)
    listener: socket.socket = field(repr=False)

    @property
    def n(self) -> int:
        """Number of nodes."""
        return len(self.addresses)

    @classmethod
    def local(cls, n: int) -> list["Membership"]:
        """All n nodes on this machine, with listeners that are open already and keys that only the pair knows."""
        check_count("n", n, at_least=2)
        listeners = [socket.create_server(("127.0.0.1", 0), backlog=2 * n) for _ in range(n)]
        addresses = [listener.getsockname()[:2] for listener in listeners]
        keys = [[secrets.token_bytes(16) for _ in range(n)] for _ in range(n)]  # [from][to]
        return [cls(rank, addresses, [row[rank] for row in keys], keys[rank], listeners[rank]) for rank in range(n)]

    @classmethod
    def from_environment(cls) -> "Membership":
        """Under torchrun, or with MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE set by hand.

        Addresses and keys are exchanged through the store at MASTER_ADDR, which must be honest and is not needed
        afterwards: whoever can read it can speak in another's name.
        """
        from torch.distributed import rendezvous

        store, rank, n = next(rendezvous("env://"))
        listener = socket.create_server(("", 0), backlog=2 * n)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: asks which way leads there
            probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
            host = probe.getsockname()[0]
        keys_in = [secrets.token_bytes(16) for _ in range(n)]
        for peer in range(n):
            store.set(f"monna/key/{peer}/{rank}", keys_in[peer].hex())
        store.set(f"monna/address/{rank}", f"{host} {listener.getsockname()[1]}")
        addresses = []
        for peer in range(n):
            name, port = store.get(f"monna/address/{peer}").decode().split()
            addresses.append((name, int(port)))
        keys_out = [bytes.fromhex(store.get(f"monna/key/{rank}/{peer}").decode()) for peer in range(n)]
        return cls(rank, addresses, keys_in, keys_out, listener)


class SocketTransport:
    """One node's links to all others.

    Args:
        membership: who and where the nodes are.
        f: how many of them may stay silent.
        entries, dtype: of every vector that is exchanged; other messages end the link.
        timeout: seconds to wait for n - f vectors of a round, the node's own among them.
        patience: seconds to wait for particular peers, where some are preferred, before others will do.

    A peer may run ahead by as many messages as fit into 256 MiB, at most 1024; then it is not read until this node
    has caught up. Messages that a peer does not read in turn are dropped, oldest first, by the same bound. Non-finite
    vectors count as not sent. Close it after use, or use it as a context manager.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        f: int,
        entries: int,
        dtype: torch.dtype = torch.float32,
        timeout: float = 30.0,
        patience: float = 0.5,
    ) -> None:
        check_count("f", f, at_least=0)
        check_count("entries", entries)
        check_positive("timeout", timeout)
        check_positive("patience", patience)
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.rank, self.n, self.f = membership.rank, membership.n, f
        self.entries, self.dtype, self.timeout, self.patience = entries, dtype, timeout, patience
        self.refused: dict[int, str] = {}  # why a peer's link was closed or its vector not counted
        self._membership = membership
        self._window = max(2, min(1024, MEMORY // (entries * dtype.itemsize)))
        self._round = 0
        self._inbox: dict[int, dict[int, Tensor]] = {}
        self._suspects: set[int] = set()
        self._banned: set[int] = set()
        self._arrived = threading.Condition()
        self._closing = threading.Event()
        self._incoming: dict[int, socket.socket] = {}
        others = [peer for peer in range(self.n) if peer != self.rank]
        self._outboxes = {peer: _Outbox(self._window) for peer in others}
        self._senders = [threading.Thread(target=self._send_to, args=(peer,), daemon=True) for peer in others]
        for thread in [*self._senders, threading.Thread(target=self._accept, daemon=True)]:
            thread.start()

    def __enter__(self) -> "SocketTransport":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(
        self, round: int, vector: Float[Tensor, " D"], prefer: Iterable[int] | None = None
    ) -> Float[Tensor, "m D"]:
        """Send this node's vector to all and return the first n - f of the round, in the order of their ranks.

        Args:
            round: counts up from 0.
            vector: this node's own, which is among those returned.
            prefer: n - f - 1 peers to wait for instead, as long as patience lasts and they are not known to be silent.

        Raises:
            TooFewPeers: after `timeout`.
        """
        self.broadcast(round, vector)
        received = self.gather(round, self.n - self.f - 1, prefer)
        received[self.rank] = vector.detach().cpu()
        return torch.stack([received[peer] for peer in sorted(received)]).to(vector.device)

    def broadcast(self, round: int, vector: Float[Tensor, " D"]) -> None:
        """Queue the vector for every peer that is not cut off; does not wait."""
        message = pack(self.rank, round, vector.clone())
        for peer, outbox in self._outboxes.items():
            if peer not in self._banned:
                outbox.put(message)

    def send(self, peer: int, round: int, vector: Float[Tensor, " D"]) -> None:
        """Queue a vector for one peer that is not cut off, which may differ from what others get; does not wait."""
        if peer not in self._banned:
            self._outboxes[peer].put(pack(self.rank, round, vector.clone()))

    def gather(self, round: int, count: int, prefer: Iterable[int] | None = None) -> dict[int, Tensor]:
        """`count` vectors of this round from others; those of earlier rounds are forgotten."""
        start = time.monotonic()
        preferred = set() if prefer is None else set(prefer) - {self.rank}
        with self._arrived:
            self._round = round
            for old in [r for r in self._inbox if r < round]:
                del self._inbox[old]
            received = self._inbox.setdefault(round, {})
            self._arrived.notify_all()  # readers that waited for this round
            while True:
                waited = time.monotonic() - start
                missing = preferred - received.keys() - self._suspects
                if missing and waited >= self.patience:
                    self._suspects |= missing
                    missing = set()
                if not missing and len(received) >= count:
                    chosen = [p for p in received if p in preferred] + [p for p in received if p not in preferred]
                    return {peer: received[peer] for peer in chosen[:count]}
                if waited >= self.timeout:
                    raise TooFewPeers(
                        f"node {self.rank} heard {sorted(received)} in round {round}, needs {count} others;"
                        f" {self.timeout:g} s have passed"
                    )
                limit = min(self.patience, self.timeout) if missing else self.timeout
                self._arrived.wait(max(limit - waited, 0.001))

    def cut_off(self, peers: Iterable[int]) -> None:
        """Neither send to these peers nor listen to them from now on: an operator's ban, or a partition in a drill.

        What was queued for them before may still arrive.
        """
        with self._arrived:
            self._banned |= set(peers)
            self._suspects |= self._banned
            self._arrived.notify_all()

    def close(self, linger: float = 5.0) -> None:
        """Let peers that are still reading have what was sent, for at most `linger` seconds, and end all links."""
        deadline = time.monotonic() + linger
        for outbox in self._outboxes.values():
            outbox.close()
        for thread in self._senders:
            thread.join(max(deadline - time.monotonic(), 0))
        self._closing.set()
        self._membership.listener.close()
        with self._arrived:
            self._arrived.notify_all()
            connections = list(self._incoming.values())
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # threads: one accepts, one reads per incoming and one writes per outgoing connection

    def _send_to(self, peer: int) -> None:
        outbox, connection = self._outboxes[peer], None
        while (message := outbox.head()) is not None and not self._closing.is_set():
            try:
                if connection is None:
                    connection = socket.create_connection(self._membership.addresses[peer], timeout=self.timeout)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    connection.settimeout(None)
                    connection.sendall(greeting(self.rank, self._membership.keys_out[peer]))
                for part in message:
                    connection.sendall(part)
                outbox.done(message)
            except OSError:
                if connection is not None:
                    connection.close()
                connection = None
                if outbox.closed:
                    break
                self._closing.wait(RETRY)
        if connection is not None:
            connection.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._membership.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        peer = -1
        with connection:
            try:
                connection.settimeout(self.timeout)
                rank, key = read_greeting(connection)
                connection.settimeout(None)
                if rank >= self.n or rank == self.rank or not hmac.compare_digest(key, self._membership.keys_in[rank]):
                    return
                peer = rank
                with self._arrived:
                    self._incoming[peer] = connection
                while not self._closing.is_set():
                    self._keep(peer, *read_message(connection, peer, self.entries, self.dtype))
            except MalformedMessage as error:
                if peer >= 0:
                    self.refused[peer] = str(error)
            except OSError:
                pass
            with self._arrived:
                if peer >= 0 and self._incoming.get(peer) is connection:
                    self._suspects.add(peer)
                self._arrived.notify_all()

    def _keep(self, peer: int, round: int, vector: Tensor) -> None:
        finite = bool(vector.isfinite().all())
        with self._arrived:
            # a node that is ahead is not read on: its next messages wait in the network's buffers
            self._arrived.wait_for(lambda: round <= self._round + self._window or self._closing.is_set())
            if peer in self._banned:
                return
            if not finite:
                self.refused[peer] = f"sent NaN or infinity in round {round}"
                self._suspects.add(peer)
            elif round >= self._round:
                self._inbox.setdefault(round, {}).setdefault(peer, vector)
                self._suspects.discard(peer)
            self._arrived.notify_all()


Message = tuple[bytes, memoryview]


class _Outbox:
    """Messages for one peer, the oldest dropped when it does not read them."""

    def __init__(self, limit: int) -> None:
        self._messages: deque[Message] = deque(maxlen=limit)
        self._changed = threading.Condition()
        self.closed = False

    def put(self, message: Message) -> None:
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def head(self) -> Message | None:
        """The oldest message, once there is one; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self.closed)
            return self._messages[0] if self._messages else None

    def done(self, message: Message) -> None:
        with self._changed:
            if self._messages and self._messages[0] is message:
                self._messages.popleft()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify()
