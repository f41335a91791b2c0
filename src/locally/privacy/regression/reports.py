"""Reports as bytes: layout, writing, and the tally that a server keeps of them.

A report is a 24-byte header - magic, version, protocol kind, round, fingerprint of the protocol, number of integers -
then little-endian 32-bit integers, then a CRC-32. Sums are kept in 64-bit integers, so they do not depend on the order
or the grouping of reports; whatever does not parse, or no honest client can have sent, is counted and left out.
"""

import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from itertools import islice
from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int
from numba import njit
from numpy import ndarray

from locally.checks import check_shape
from locally.privacy.regression.mechanisms import L2BallRandomizer
from locally.privacy.regression.protocols import GradientProtocol, MomentProtocol, Protocol, PublicFeatureProtocol

MAGIC = b"LDPR"
VERSION = 1
HEADER = struct.Struct("<4sBBHI8sI")  # magic, version, kind, round, reserved, fingerprint, integers
CHECKSUM = struct.Struct("<I")
REQUEST = struct.Struct("<4sBBHI8sI")  # a server's request: the same header, then theta as doubles
REQUEST_MAGIC = b"LDPQ"
KIND: dict[type, int] = {MomentProtocol: 1, PublicFeatureProtocol: 2, GradientProtocol: 3}
CHUNK_BYTES = 1 << 20  # reports parsed at a time: what the memory of a server depends on


class Rejection(StrEnum):
    """Why a report was left out."""

    NOT_BYTES = "not bytes"
    LENGTH = "wrong length"
    MAGIC = "not a report"
    VERSION = "unknown version"
    PROTOCOL = "made for another protocol"
    ROUND = "made for another round"
    CHECKSUM = "checksum does not match"
    RANGE = "beyond what an honest client can send"


def header(protocol: Protocol, round_number: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, KIND[type(protocol)], round_number, 0, protocol.fingerprint, protocol.width)


def encode(protocol: Protocol, round_number: int, payloads: Int[ndarray, "n width"]) -> list[bytes]:
    """One report for each row of integers."""
    start = header(protocol, round_number)
    reports = []
    for row in np.ascontiguousarray(payloads, dtype="<i4"):
        body = start + row.tobytes()
        reports.append(body + CHECKSUM.pack(zlib.crc32(body)))
    return reports


class Tally:
    """Integer sums of the reports of one round, and counts of what was accepted and rejected.

    Memory is O(width), whatever the number of reports.
    """

    def __init__(self, protocol: Protocol, round_number: int = 0) -> None:
        self.protocol = protocol
        self.round_number = round_number
        self.total = np.zeros(protocol.width, np.int64)
        self.accepted = 0
        self.rejected: Counter[Rejection] = Counter()
        self._header = header(protocol, round_number)
        self._size = HEADER.size + 4 * protocol.width + CHECKSUM.size

    def add(self, report: bytes) -> Rejection | None:
        """Take in one report; the reason if it is rejected. O(width)."""
        before = self.rejected.copy()
        self.extend([report])
        new = self.rejected - before
        return next(iter(new), None)

    def extend(self, reports: Iterable[bytes]) -> None:
        """Take in any number of reports in one pass."""
        at_once = max(1, CHUNK_BYTES // self._size)
        remaining = iter(reports)
        while chunk := list(islice(remaining, at_once)):
            sound = [r for r in chunk if self._parses(r)]
            if sound:
                # Header and checksum are whole words: a batch is one matrix of integers, and nothing is copied again.
                words = np.frombuffer(b"".join(sound), "<i4").reshape(len(sound), self._size // 4)
                self._add_rows(words, HEADER.size // 4)

    def add_payloads(self, payloads: Int[ndarray, "n width"]) -> None:
        """Take in decoded integers: rows that no honest client can have sent are counted and left out.

        Raises:
            TypeError, ValueError: the payloads are no integers, or not as wide as the protocol's.
        """
        if payloads.dtype.kind != "i":
            raise TypeError(f"payloads must hold signed integers, got {payloads.dtype}")
        check_shape("payloads", payloads, (None, self.protocol.width))
        self._add_rows(np.ascontiguousarray(payloads), 0)

    def _add_rows(self, rows: Int[ndarray, "n columns"], first: int) -> None:
        """Add the `width` columns from `first` on of every admissible row."""
        sound = np.ones(len(rows), np.bool_)
        at = first
        for release in self.protocol.releases:
            if isinstance(release, L2BallRandomizer):
                sound &= release.on_sphere(rows[:, at : at + release.dimension])
            at += release.dimension
        n = add_rows(rows, first, self.protocol.limits, sound, self.total)
        self.accepted += n
        if n < len(rows):
            self.rejected[Rejection.RANGE] += len(rows) - n

    def merge(self, other: "Tally") -> None:
        """Add another server's tally of the same round; exact, whatever the order."""
        if (self._header, self._size) != (other._header, other._size):
            raise ValueError("other must be a tally of the same protocol and round")
        self.total += other.total
        self.accepted += other.accepted
        self.rejected += other.rejected

    def means(self) -> list[Float[ndarray, " _"]]:
        """Mean of each released vector in its own units. ValueError where nothing was accepted."""
        if not self.accepted:
            raise ValueError("no report was accepted")
        parts, at = [], 0
        for release in self.protocol.releases:
            parts.append(self.total[at : at + release.dimension] * (release.step / self.accepted))
            at += release.dimension
        return parts

    def _parses(self, report: object) -> bool:
        """Whether header, length and checksum are right; counts the reason where not."""
        if isinstance(report, bytes) and len(report) == self._size and report.startswith(self._header):
            if zlib.crc32(memoryview(report)[: -CHECKSUM.size]) == CHECKSUM.unpack_from(report, self._size - 4)[0]:
                return True
            self.rejected[Rejection.CHECKSUM] += 1
        else:
            self.rejected[self._diagnose(report)] += 1
        return False

    def _diagnose(self, report: object) -> Rejection:
        if not isinstance(report, bytes):
            return Rejection.NOT_BYTES
        if len(report) < HEADER.size:
            return Rejection.LENGTH
        magic, version, kind, round_number, reserved, fingerprint, _ = HEADER.unpack_from(report)
        if magic != MAGIC:
            return Rejection.MAGIC
        if version != VERSION or reserved:
            return Rejection.VERSION
        if (kind, fingerprint) != (KIND[type(self.protocol)], self.protocol.fingerprint):
            return Rejection.PROTOCOL
        if round_number != self.round_number:
            return Rejection.ROUND
        return Rejection.LENGTH


@njit(cache=True, nogil=True)
@no_type_check  # a run-time shape checker must not wrap what is compiled
def add_rows(rows, first, limits, sound, total):
    """Add the sound rows whose entries from column `first` on all lie within their limits; how many were added."""
    n = 0
    for i in range(rows.shape[0]):
        row = rows[i, first : first + limits.size]
        outside = 0 if sound[i] else 1
        for j in range(limits.size):  # no early end: a loop without a branch runs several entries at a time
            outside += (row[j] > limits[j]) | (row[j] < -limits[j])
        if outside == 0:
            for j in range(limits.size):
                total[j] += row[j]
            n += 1
    return n


def encode_request(protocol: GradientProtocol, round_number: int, theta: Float[ndarray, " d"]) -> bytes:
    """What a server asks of a group of users: the round and its iterate."""
    body = (
        REQUEST.pack(REQUEST_MAGIC, VERSION, KIND[type(protocol)], round_number, 0, protocol.fingerprint, theta.size)
        + theta.astype("<f8").tobytes()
    )
    return body + CHECKSUM.pack(zlib.crc32(body))


class BadRequest(ValueError):
    """A server's request that a client does not answer."""


def decode_request(protocol: GradientProtocol, request: bytes) -> tuple[int, Float[ndarray, " d"]]:
    """Round and iterate; `BadRequest` where the request is malformed or would void the privacy bound."""
    d = protocol.n_features
    expected = REQUEST.size + 8 * d + CHECKSUM.size
    if not isinstance(request, bytes) or len(request) != expected:
        raise BadRequest(f"request must be {expected} bytes for this protocol")
    if zlib.crc32(request[: -CHECKSUM.size]) != CHECKSUM.unpack_from(request, expected - 4)[0]:
        raise BadRequest("request is damaged: its checksum does not match")
    magic, version, kind, round_number, reserved, fingerprint, width = REQUEST.unpack_from(request)
    known = (REQUEST_MAGIC, VERSION, KIND[type(protocol)], 0, protocol.fingerprint, d)
    if (magic, version, kind, reserved, fingerprint, width) != known:
        raise BadRequest("request was made for another protocol or version")
    if round_number >= protocol.n_rounds:
        raise BadRequest(f"request names round {round_number}, but the protocol has {protocol.n_rounds}")
    theta = np.frombuffer(request, "<f8", count=d, offset=REQUEST.size).astype(np.float64)
    try:
        protocol.check_iterate(theta)
    except ValueError as error:
        raise BadRequest(f"request would void the privacy bound: {error}") from None
    return round_number, theta
