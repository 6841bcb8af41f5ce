"""One Push call on a connection of its own, to a server of either kind.

It answers to what PushStream asks of a call of grpcio: `write`, iteration over the replies, `cancel`, and grpcio's errors.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import grpc
import grpc.aio

from workers.kv_wire.connection import Connection
from workers.kv_wire.grpc_status import failure, failure_of
from workers.kv_wire.h2_frames import Code, WireFault
from workers.kv_wire.header_blocks import Headers
from workers.kv_wire.link import ConnectionLost
from workers.kv_wire.message_reader import PREFIX_BYTES, CallFault
from workers.kv_wire.pieces import Piece

_STREAM = 1
_MOST_REPLY_BYTES = 64 * 1024

Reply = TypeVar("Reply")


class _ClientConnection(Connection):
    def __init__(self, sock: socket.socket) -> None:
        self.failed: grpc.aio.AioRpcError | None = None
        super().__init__(sock, _MOST_REPLY_BYTES, is_client=True)
        self.begin_call(_STREAM)

    def _is_unknown(self, stream: int) -> bool:
        return stream != _STREAM

    def headers_came(self, stream: int, headers: Headers, *, is_end: bool) -> None:
        if stream != _STREAM:
            raise WireFault(Code.PROTOCOL_ERROR, f"HEADERS of stream {stream}, which was never begun")
        if is_end or headers.get(":status") != "200":
            self._fail(failure_of(headers))

    def stream_reset(self, stream: int, code: int) -> None:
        if not self._has_ended:
            self._fail(failure(grpc.StatusCode.UNAVAILABLE, f"the peer reset the stream with code {code}"))

    def call_failed(self, fault: CallFault) -> None:
        self._fail(failure(grpc.StatusCode.INTERNAL, f"a reply that cannot be read: {fault}"))

    def _fail(self, error: grpc.aio.AioRpcError | None) -> None:
        self.failed = self.failed or error
        self.peer_is_deaf()


class PushCall(Generic[Reply]):
    """The call, made by `dial`. `cancel` it at the end, however it ended."""

    def __init__(self, connection: _ClientConnection, authority: str, method: str, decode: Callable[[bytes], Reply]) -> None:
        self._connection = connection
        self._headers: list[tuple[str, str]] | None = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "autan-kv-wire"),
        ]
        self._decode = decode
        self._begun = asyncio.Event()

    async def write(self, message: Sequence[Piece]) -> None:
        """Hands the pieces of one message to the kernel; they are not read any more when this returns, is cancelled or raises.

        Raises AioRpcError when the connection breaks or the peer has ended the call.
        """
        connection = self._connection
        try:
            if self._headers is not None:
                headers, self._headers = self._headers, None
                await connection.send_headers(headers)
                self._begun.set()
            if connection.failed is not None:
                raise connection.failed
            size = sum(len(piece) for piece in message)
            await connection.send_data([b"\0" + size.to_bytes(PREFIX_BYTES - 1, "big"), *message])
        except ConnectionLost as lost:
            raise self._broken(lost) from lost

    def write_now(self, message: Sequence[Piece]) -> Awaitable[None] | None:
        """As `write`, begun at once; raises nothing itself. None when the kernel has taken everything, else what to await,
        unless the call is cancelled."""
        if self._headers is not None or self._connection.failed is not None:
            return self.write(message)
        size = sum(len(piece) for piece in message)
        rest = self._connection.send_now([b"\0" + size.to_bytes(PREFIX_BYTES - 1, "big"), *message])
        return None if rest is None else self._finish(rest)

    async def _finish(self, rest: Awaitable[None]) -> None:
        try:
            await rest
        except ConnectionLost as lost:
            raise self._broken(lost) from lost

    async def done_writing(self) -> None:
        """Nothing more is written. Raises AioRpcError."""
        try:
            await self._connection.end_data()
        except ConnectionLost as lost:
            raise self._broken(lost) from lost

    def __aiter__(self) -> PushCall[Reply]:
        return self

    async def __anext__(self) -> Reply:
        """The next reply. Raises AioRpcError with the status of a call that did not end well."""
        try:
            incoming = await self._connection.next_message()
            message = None if incoming is None else await incoming.whole()
        except ConnectionLost as lost:
            raise self._broken(lost) from lost
        if message is not None:
            try:
                return self._decode(bytes(message))
            except ValueError as error:
                raise failure(grpc.StatusCode.INTERNAL, "a reply that cannot be read") from error
        if self._connection.failed is not None:
            raise self._connection.failed
        raise StopAsyncIteration

    def cancel(self) -> bool:
        """Ends the call and its connection at once; false when it was over. Nothing is read from what is being written."""
        if self._connection.is_lost:
            return False
        self._connection.close("the call was cancelled here")
        return True

    def _broken(self, lost: ConnectionLost) -> grpc.aio.AioRpcError:
        return self._connection.failed or failure(grpc.StatusCode.UNAVAILABLE, str(lost))


async def dial(host: str, port: int, method: str, decode: Callable[[bytes], Reply], timeout_s: float) -> PushCall[Reply]:
    """Connects and learns what the peer takes. Raises OSError, and TimeoutError after `timeout_s`."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        (family, kind, _, _, address), *_ = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        sock = socket.socket(family, kind)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        connection = _ClientConnection(sock)
        try:
            await connection.settled()
        except ConnectionLost as lost:
            raise ConnectionError(f"{host}:{port}: {lost}") from lost
        except BaseException:
            connection.close("given up")
            raise
        return PushCall(connection, f"{host}:{port}", method, decode)
