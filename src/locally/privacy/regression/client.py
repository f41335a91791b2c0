"""What runs on a user's device: one record in, one private report out, and an account of what was spent."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_count
from locally.privacy.regression.protocols import Budget, GradientProtocol, Protocol
from locally.privacy.regression.reports import decode_request, encode
from locally.privacy.regression.samplers import Noise, SecureNoise

CELLS = 1 << 17  # numbers randomised at a time where many users are simulated: they stay in the cache


class BudgetSpent(RuntimeError):
    """A second report about the same record would cost its privacy a second time."""


class Client:
    """One user's device.

    Args:
        protocol: the agreement with the server; see `Protocol.from_json`.
        noise: source of randomness; the default is cryptographic and exact.
        reports_allowed: how many reports this device may send; each costs the protocol's whole epsilon and delta.

    Attributes:
        reports_sent: reports so far.
        clipped: how many of them were about a record beyond the bounds. This never leaves the device.

    >>> from locally.privacy.regression import MomentProtocol, MomentServer
    >>> protocol = MomentProtocol(n_features=2, epsilon=1.0, radius=2.0, clip_x=1.5, clip_y=1.5)
    >>> device = Client(protocol)
    >>> report = device.report(np.array([0.3, -1.0]), 0.7)
    >>> len(report)
    48
    >>> MomentServer(protocol).receive(report) is None  # accepted
    True
    >>> device.report(np.array([0.3, -1.0]), 0.7)
    Traceback (most recent call last):
        ...
    locally.privacy.regression.client.BudgetSpent: this device has sent its 1 report
    """

    def __init__(self, protocol: Protocol, noise: Noise | None = None, reports_allowed: int = 1) -> None:
        check_count("reports_allowed", reports_allowed)
        self.protocol = protocol
        self.noise = SecureNoise() if noise is None else noise
        self.reports_allowed = reports_allowed
        self.reports_sent = 0
        self.clipped = 0

    @property
    def spent(self) -> Budget:
        """Privacy spent so far by basic composition."""
        full = self.protocol.budget
        times = self.reports_sent
        return Budget(times * full.epsilon, times * full.delta, times * full.releases, full.mechanism)

    def report(self, x: Float[ndarray, " d"], y: float, request: bytes | None = None) -> bytes:
        """Randomise one record. O(d^2) for moments, O(d) otherwise.

        Args:
            x: features, finite.
            y: response, finite.
            request: the server's, where the protocol is interactive.

        Raises:
            BudgetSpent: this device has sent what it may.
            BadRequest: the request is malformed, or its iterate would void the privacy bound.
            OutOfBounds: the record exceeds the bounds, and the protocol says to refuse such.
            ValueError: x or y has the wrong shape or is not finite.
        """
        if self.reports_sent >= self.reports_allowed:
            plural = "s" if self.reports_allowed > 1 else ""
            raise BudgetSpent(f"this device has sent its {self.reports_allowed} report{plural}")
        X, Y = np.asarray(x, dtype=np.float64)[None], np.array([y], dtype=np.float64)
        round_number, theta = read_request(self.protocol, request)
        vectors = self.protocol.vectors(X, Y, theta)
        self.reports_sent += 1  # before the draw: a report that fails half-way counts as sent
        self.clipped += int(vectors.clipped[0])
        parts = zip(self.protocol.releases, vectors.parts, strict=True)
        payload = np.concatenate([release.randomise(part, self.noise) for release, part in parts], axis=1)
        return encode(self.protocol, round_number, payload)[0]


class Crowd:
    """Many users' devices simulated in one process, a row each: the same reports, made in batches.

    Attributes:
        reports_sent: how many users have reported.
        clipped: how many records were beyond the bounds.
    """

    def __init__(self, protocol: Protocol, noise: Noise | None = None) -> None:
        self.protocol = protocol
        self.noise = SecureNoise() if noise is None else noise
        self.reports_sent = 0
        self.clipped = 0

    def payloads(
        self, X: Float[ndarray, "n d"], y: Float[ndarray, " n"], request: bytes | None = None
    ) -> Iterator[Int[ndarray, "batch width"]]:
        """The integers of each user's report, in batches whose size does not depend on n."""
        _, theta = read_request(self.protocol, request)
        self.protocol.check_records(X, y)
        at_once = max(1, CELLS // self.protocol.width)
        for start in range(0, len(y), at_once):
            batch = slice(start, start + at_once)
            vectors = self.protocol.vectors(X[batch], y[batch], theta)
            self.reports_sent += len(vectors.clipped)
            self.clipped += int(vectors.clipped.sum())
            parts = zip(self.protocol.releases, vectors.parts, strict=True)
            yield np.concatenate([release.randomise(part, self.noise) for release, part in parts], axis=1)

    def reports(
        self, X: Float[ndarray, "n d"], y: Float[ndarray, " n"], request: bytes | None = None
    ) -> Iterator[bytes]:
        """One report a user, as `Client.report` writes it."""
        round_number, _ = read_request(self.protocol, request)
        for payload in self.payloads(X, y, request):
            yield from encode(self.protocol, round_number, payload)


def read_request(protocol: Protocol, request: bytes | None) -> tuple[int, Float[ndarray, " d"] | None]:
    """Round and iterate; (0, None) where the protocol has only one round."""
    if isinstance(protocol, GradientProtocol):
        if request is None:
            raise ValueError("request must be the server's request, got None: this protocol is interactive")
        return decode_request(protocol, request)
    if request is not None:
        raise ValueError("request must be None: this protocol is not interactive")
    return 0, None
