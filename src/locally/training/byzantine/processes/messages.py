"""What travels between nodes: a fixed header and raw numbers. Nothing that a peer sends is unpickled or believed.

The receiver knows dtype, length and sender beforehand and only compares; no allocation depends on a peer's word.
"""

import socket
import struct

import torch
from jaxtyping import Float
from torch import Tensor

# in native byte order on purpose: a peer of the other order fails the first comparison instead of sending garbage
GREETING = struct.Struct("=IHH16s")  # magic, version, rank, key
HEADER = struct.Struct("=IHHQQ")  # magic, dtype, sender, round, number of entries
MAGIC, VERSION = 0x4D6F4E4E, 1
DTYPES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}


class MalformedMessage(ValueError):
    """A peer broke the protocol: its connection is closed, since what follows cannot be read either."""


def greeting(rank: int, key: bytes) -> bytes:
    return GREETING.pack(MAGIC, VERSION, rank, key)


def read_greeting(connection: socket.socket) -> tuple[int, bytes]:
    """Who calls, and the key by which to believe it."""
    magic, version, rank, key = GREETING.unpack(read_exactly(connection, GREETING.size))
    if (magic, version) != (MAGIC, VERSION):
        raise MalformedMessage("not a greeting of this protocol and version")
    return rank, key


def pack(sender: int, round: int, vector: Float[Tensor, " D"]) -> tuple[bytes, memoryview]:
    """Header and payload. A vector on the CPU is sent from where it lies, so it must not change afterwards."""
    payload = vector.detach().cpu().contiguous()
    header = HEADER.pack(MAGIC, DTYPES[payload.dtype], sender, round, payload.numel())
    return header, payload.view(torch.uint8).numpy().data


def read_message(
    connection: socket.socket, sender: int, entries: int, dtype: torch.dtype
) -> tuple[int, Float[Tensor, " D"]]:
    """The round and the vector of the next message.

    Raises:
        MalformedMessage: other magic, sender, dtype or length than agreed.
        ConnectionError: the stream ends.
    """
    magic, code, claimed, round, count = HEADER.unpack(read_exactly(connection, HEADER.size))
    if magic != MAGIC:
        raise MalformedMessage("no header where one was due")
    if claimed != sender:
        raise MalformedMessage(f"claims to come from node {claimed}")
    if (code, count) != (DTYPES[dtype], entries):
        raise MalformedMessage(f"holds {count} entries of dtype code {code}, not {entries} of {DTYPES[dtype]}")
    vector = torch.empty(entries, dtype=dtype)
    fill(connection, vector.view(torch.uint8).numpy().data)
    return round, vector


def read_exactly(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    fill(connection, memoryview(buffer))
    return bytes(buffer)


def fill(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionError("the peer closed the connection")
        view = view[count:]
