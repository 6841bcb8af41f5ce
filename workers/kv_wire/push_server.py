"""The server of Push calls: a listener, its connections, one call at a time on each.

    IDLE -> CALLED -> IDLE   headers of a known method, then its trailers; anything else is answered in trailers at once
    any -> LOST              the peer hung up, broke the protocol, was idle for too long, or this side closed

A handler is an async generator: messages in, replies out. A message is given as soon as it has begun, and is valid until the
next one is asked for. When the connection breaks, whoever asks for a message, or reads one, hears PeerUnavailable.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from protos.contract.errors import PeerUnavailable
from protos.rpc import status_of, told_error
from workers.kv_wire.connection import Connection
from workers.kv_wire.grpc_status import trailers
from workers.kv_wire.h2_frames import Code, WireFault, reset
from workers.kv_wire.header_blocks import Headers
from workers.kv_wire.incoming import Incoming
from workers.kv_wire.link import ConnectionLost
from workers.kv_wire.message_reader import PREFIX_BYTES, CallFault

logger = logging.getLogger(__name__)

_BACKLOG = 128
_UNIMPLEMENTED = 12
_ANSWER = [(":status", "200"), ("content-type", "application/grpc")]

Handler = Callable[[AsyncIterator[Incoming]], AsyncGenerator[bytes, None]]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """`idle_s` bounds a connection without a call, and how long the peer may take no reply."""

    most_message_bytes: int
    most_connections: int = 128
    idle_s: float = 10.0


class PushServer:
    """Serves `handlers`, by method path. Everything happens on the event loop on which `listen` is called."""

    def __init__(self, handlers: Mapping[str, Handler], limits: ServerLimits) -> None:
        self.handlers = handlers
        self.limits = limits
        self.calls_begun = 0
        self.port = 0  # while it listens
        self._listener: socket.socket | None = None
        self._connections: set[_ServerConnection] = set()
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    def listen(self, host: str) -> int:
        """Binds a free port and serves on it; gives the port. Raises OSError."""
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        listener.setblocking(False)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)
        self.port = listener.getsockname()[1]
        return self.port

    async def close(self) -> None:
        """Ends everything, calls by cancelling them. Idempotent."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        for connection in list(self._connections):
            connection.close("this side is stopping")

    def spawn(self, connection: _ServerConnection, handler: Handler) -> None:
        """Runs one call."""
        self.calls_begun += 1
        task = asyncio.create_task(connection.serve(handler))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    def forget(self, connection: _ServerConnection) -> None:
        """It is over."""
        self._connections.discard(connection)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if not isinstance(error, (BlockingIOError, ConnectionError)):
                logger.warning("the KV wire cannot accept a connection: %s", error)
            return
        if len(self._connections) >= self.limits.most_connections:
            logger.warning("the KV wire refuses a connection: %d are open", len(self._connections))
            sock.close()
            return
        connection = _ServerConnection(sock, self)
        if not connection.is_lost:
            self._connections.add(connection)


class _ServerConnection(Connection):
    def __init__(self, sock: socket.socket, server: PushServer) -> None:
        self._server = server
        self._last_stream = 0
        self._method = ""
        self._fault: CallFault | None = None
        self._call_is_reset = False
        self._idle_timer: asyncio.TimerHandle | None = None
        super().__init__(sock, server.limits.most_message_bytes, is_client=False)
        self._wait_idle()

    # -- what the peer does ---------------------------------------------------------------------------------------------

    def _is_unknown(self, stream: int) -> bool:
        return stream % 2 == 0 or stream > self._last_stream

    def headers_came(self, stream: int, headers: Headers, *, is_end: bool) -> None:
        if stream and stream == self.stream:
            self.peer_ended()  # trailers of a request
            return
        if not self._is_unknown(stream) or stream % 2 == 0:
            raise WireFault(Code.PROTOCOL_ERROR, f"HEADERS of stream {stream}, which cannot be begun")
        self._last_stream = stream
        if self.stream:
            self._queue(reset(stream, Code.REFUSED_STREAM))
            return
        refusal = _refusal(headers, self._server.handlers)
        if refusal is not None:
            self._queue(self._headers_out.frame(stream, [*_ANSWER, *trailers(_UNIMPLEMENTED, refusal)], 1))
            if not is_end:
                self._queue(reset(stream, Code.NO_ERROR))
            return
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._method, self._fault, self._call_is_reset = headers[":path"], None, False
        self.begin_call(stream)
        if is_end:
            self.peer_ended()
        self._server.spawn(self, self._server.handlers[self._method])

    def stream_reset(self, stream: int, code: int) -> None:
        if stream == self.stream:
            self._call_is_reset = True
            self.peer_is_deaf()

    def call_failed(self, fault: CallFault) -> None:
        self._fault = fault
        self.peer_ended()

    def was_lost(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._server.forget(self)

    # -- one call -------------------------------------------------------------------------------------------------------

    async def serve(self, handler: Handler) -> None:
        """The whole of a call; never raises but when it is cancelled."""
        stream, idle_s = self.stream, self._server.limits.idle_s
        try:
            end = await self._replies(handler)
            if not self._call_is_reset:
                async with asyncio.timeout(idle_s):
                    await self.send_headers(end, is_end=True)
        except ConnectionLost:
            pass
        except TimeoutError:
            self.close("the peer reads no replies")
        except BaseException:
            self.close("the call was cancelled here")
            raise
        finally:
            is_open = not self._has_ended
            if not self.is_lost:
                if (is_open or self._fault is not None) and not self._call_is_reset:
                    self._queue(reset(stream, Code.NO_ERROR))
                self.end_call()
                self._wait_idle()

    async def _replies(self, handler: Handler) -> list[tuple[str, str]]:
        """Runs the handler; gives the trailers. Raises ConnectionLost and TimeoutError when its replies do not go out."""
        first: list[tuple[str, str]] = _ANSWER
        try:
            async with aclosing(handler(self._messages())) as replies:
                async for reply in replies:
                    async with asyncio.timeout(self._server.limits.idle_s):
                        if first:
                            first = []
                            await self.send_headers(_ANSWER)
                        await self.send_data([b"\0" + len(reply).to_bytes(PREFIX_BYTES - 1, "big"), reply])
        except (ConnectionLost, TimeoutError):
            raise
        except Exception as error:
            if self._fault is None:
                status = status_of(told_error(error, self._method))
                return [*first, *trailers(status.code, status.message, status)]
        if self._fault is not None:
            return [*first, *trailers(self._fault.status, str(self._fault))]
        return [*first, *trailers(0)]

    async def _messages(self) -> AsyncIterator[Incoming]:
        while True:
            try:
                message = await self.next_message()
            except ConnectionLost as lost:
                raise self.loss_of_message() from lost
            if self._call_is_reset:
                raise self.loss_of_message()
            if message is None:
                return
            yield message

    def loss_of_message(self) -> Exception:
        if self._call_is_reset:
            return PeerUnavailable("the sender ended the stream")
        return PeerUnavailable(f"the stream broke: {super().loss_of_message()}")

    def _wait_idle(self) -> None:
        if not self.is_lost:
            self._idle_timer = asyncio.get_running_loop().call_later(self._server.limits.idle_s, self.close, "no call came")


def _refusal(headers: Headers, handlers: Mapping[str, Handler]) -> str | None:
    """Why such a call is not served here."""
    if headers.get(":method") != "POST" or not headers.get("content-type", "").startswith("application/grpc"):
        return "this is no gRPC call"
    if headers.get(":path") not in handlers:
        return f"no such method here: {headers.get(':path', '')[:100]}"
    if headers.get("grpc-encoding", "identity") != "identity":
        return "messages of this method are not compressed"
    return None
