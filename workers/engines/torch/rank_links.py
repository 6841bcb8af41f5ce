"""Plain connections between rank 0 and every other rank: one for the steps, one for the bytes of KV blocks.

A frame is a header (kind, length of the payload) and the payload. Connections are refused without the group's token. A link
that fails once stays closed: half a frame may be on it.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from enum import IntEnum

from protos.contract.errors import EngineFailure

_HEADER = struct.Struct("<II")
_HELLO = struct.Struct("<16sII")
_MAX_PAYLOAD_BYTES = 1 << 30
_TOKEN_BYTES = 16
_HELLO_TIMEOUT_S = 1.0  # of one connection: a stranger that says nothing must not use up the wait for the ranks


class Frame(IntEnum):
    """Kinds of frames."""

    COLLECTIVES = 1  # where the collectives rendezvous: the port, as text
    STEP = 2  # a step plan
    END = 3  # rank 0 ends the group
    WRITE = 4  # bytes for a layer group of a block
    READ = 5  # asks for a layer group of a block
    BYTES = 6  # the answer to READ
    WRITTEN = 7  # the answer to WRITE


class Channel(IntEnum):
    """What a connection is for. KV bytes do not wait behind steps, nor steps behind them."""

    STEPS = 0
    BLOCKS = 1


class Link:
    """One connection. Sending and receiving raise EngineFailure, naming the other rank, when it is lost or too slow."""

    def __init__(self, connection: socket.socket, peer: int, timeout_s: float | None) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout_s)
        self._socket = connection
        self._peer = peer

    def send(self, kind: Frame, *parts: bytes | memoryview) -> None:
        """Sends one frame; `parts` are its payload."""
        header = _HEADER.pack(kind, sum(memoryview(part).nbytes for part in parts))
        try:
            # One small segment costs one wake-up of the other side; large payloads are not copied for it.
            if len(parts) == 1 and memoryview(parts[0]).nbytes <= 4096:
                self._socket.sendall(header + bytes(parts[0]))
                return
            self._socket.sendall(header)
            for part in parts:
                self._socket.sendall(part)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self) -> tuple[Frame, memoryview]:
        """The next frame."""
        kind, size = _HEADER.unpack(self._exactly(_HEADER.size))
        if size > _MAX_PAYLOAD_BYTES or kind not in Frame.__members__.values():
            self.close()
            raise EngineFailure(f"rank {self._peer} sent a frame of kind {kind} with {size} bytes")
        return Frame(kind), self._exactly(size)

    def expect(self, kind: Frame) -> memoryview:
        """The payload of the next frame, which must be of this kind."""
        found, payload = self.receive()
        if found is not kind:
            self.close()
            raise EngineFailure(f"rank {self._peer} answered {found.name} instead of {kind.name}")
        return payload

    def end(self, kind: Frame) -> None:
        """Sends a last frame, if the other side still takes it."""
        with suppress(EngineFailure):
            self.send(kind)

    def close(self) -> None:
        """Wakes whoever waits on it. Idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, size: int) -> memoryview:
        buffer = memoryview(bytearray(size))
        filled = 0
        try:
            while filled < size:
                count = self._socket.recv_into(buffer[filled:])
                if count == 0:
                    raise ConnectionResetError("the connection ended")
                filled += count
        except OSError as error:
            raise self._lost(error) from error
        return buffer

    def _lost(self, error: OSError) -> EngineFailure:
        self.close()
        return EngineFailure(f"rank {self._peer} is lost: {error}")


class LinkDoor:
    """Rank 0's listener. Implements the address and token of GroupDoor."""

    def __init__(self, host: str, ranks: int, timeout_s: float, link_timeout_s: float) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host.strip("[]"), 0), family=family)
        self._host = host
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._link_timeout_s = link_timeout_s
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self.address = f"{host}:{self._listener.getsockname()[1]}"

    def accept_all(self) -> dict[Channel, list[Link]]:
        """Both links of every other rank, in the order of ranks; closes the listener. Raises EngineFailure."""
        found: dict[tuple[int, int], Link] = {}
        deadline_s = time.monotonic() + self._timeout_s
        while len(found) < len(Channel) * (self._ranks - 1):
            key, connection = self._accept(deadline_s)
            if key is None or key in found:
                connection.close()
                continue
            found[key] = Link(connection, key[0], self._link_timeout_s)
        self.close()
        return {channel: [found[rank, channel] for rank in range(1, self._ranks)] for channel in Channel}

    def close(self) -> None:
        """No further connections. Idempotent."""
        self._listener.close()

    def _accept(self, deadline_s: float) -> tuple[tuple[int, int] | None, socket.socket]:
        self._listener.settimeout(max(deadline_s - time.monotonic(), 0.001))
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            raise EngineFailure(f"not all of {self._ranks} ranks connected within {self._timeout_s} s: {error}") from error
        connection.settimeout(_HELLO_TIMEOUT_S)
        try:
            token, rank, channel = _HELLO.unpack(connection.recv(_HELLO.size, socket.MSG_WAITALL))
        except (OSError, struct.error):
            return None, connection
        known = hmac.compare_digest(token, self.token) and 0 < rank < self._ranks and channel in Channel.__members__.values()
        return (rank, channel) if known else None, connection


def open_links(address: str, token: bytes, rank: int, timeout_s: float) -> Iterator[Link]:
    """The links of rank `rank` to rank 0, in the order of Channel. They wait for ever for a frame: rank 0 may be idle."""
    host, _, port = address.rpartition(":")
    for channel in Channel:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
            connection.sendall(_HELLO.pack(token, rank, channel))
        except OSError as error:
            raise EngineFailure(f"rank 0 at {address} cannot be reached: {error}") from error
        yield Link(connection, 0, None)
