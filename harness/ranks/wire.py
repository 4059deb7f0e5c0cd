"""Messages over a pipe to a rank, with a deadline on both ways: a stopped rank takes no bytes, or sends half of them."""

from __future__ import annotations

import os
import socket
import struct
import time
from multiprocessing.connection import Connection

_LENGTH = struct.Struct("!Q")


def send(connection: Connection, payload: bytes, end: float | None = None) -> None:
    """Send one message, by `end` (of time.monotonic) if given. Raises TimeoutError, and OSError when nobody is there."""
    with _socket(connection) as pipe:
        try:
            pipe.settimeout(_left(end))
            pipe.sendall(_LENGTH.pack(len(payload)))
            pipe.settimeout(_left(end))
            pipe.sendall(payload)
        finally:
            pipe.settimeout(None)  # the mode belongs to the pipe, which outlives this socket object


def receive(connection: Connection, end: float | None = None) -> bytearray:
    """Receive one message, whole by `end` if given. Raises TimeoutError, EOFError and OSError."""
    with _socket(connection) as pipe:
        try:
            (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size, end))
            return _exactly(pipe, length, end)
        finally:
            pipe.settimeout(None)


def _exactly(pipe: socket.socket, length: int, end: float | None) -> bytearray:
    data = bytearray(length)
    left = memoryview(data)
    while left:
        pipe.settimeout(_left(end))
        if not (got := pipe.recv_into(left)):
            raise EOFError
        left = left[got:]
    return data


def _left(end: float | None) -> float | None:
    return None if end is None else max(end - time.monotonic(), 0.001)


def _socket(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))  # a two-way multiprocessing pipe is a pair of sockets
