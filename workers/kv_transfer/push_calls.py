"""How the Push calls of one attempt begin: on the port that the receiver named for them, or else where Open went."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from protos.wire import kv

logger = logging.getLogger(__name__)

StreamChannels = Callable[[int], grpc.aio.Channel]  # the connection to the peer for the stream of this number
Dial = Callable[[str, int, str], Awaitable[Any]]  # (host, port, method) -> a call; OSError or TimeoutError when it cannot


class PushCalls:
    """`prepare`, then `open` once for each stream, and `close` at the end, which ends what was not opened."""

    def __init__(self, method: str, channels: StreamChannels, dial: Dial | None, host: str) -> None:
        self._method = method
        self._channels = channels
        self._dial = dial
        self._host = host
        self._dialled: dict[int, Any] = {}

    async def prepare(self, port: int, streams: int) -> None:
        """Connects all streams to the port, if there is one. When one of them fails, all go where Open went."""
        if not port or self._dial is None or not self._host:
            return
        dialling = [asyncio.ensure_future(self._dial(self._host, port, self._method)) for _ in range(streams)]
        try:
            await asyncio.wait(dialling)
        finally:
            failed = [error for number, task in enumerate(dialling) if (error := self._keep(number, task)) is not None]
        if failed:
            self.close()
            logger.warning("%s:%d takes no Push, it goes where Open went: %r", self._host, port, failed[0])
            unexpected = [error for error in failed if not isinstance(error, OSError)]
            if unexpected:
                raise unexpected[0]

    def _keep(self, number: int, task: asyncio.Future[Any]) -> BaseException | None:
        """Keeps what was dialled, or gives what went wrong; ends a task that still runs."""
        if not task.done():
            task.cancel()
            return None
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self._dialled[number] = task.result()
        return error

    def open(self, number: int) -> Any:
        """Begins the call of a stream, on a connection of its own. It writes messages as lists of pieces."""
        if number in self._dialled:
            return self._dialled.pop(number)
        method: Any = self._channels(number).stream_stream(
            self._method, request_serializer=b"".join, response_deserializer=kv.PushReply.FromString
        )
        return method()

    def close(self) -> None:
        """Ends the connections that no stream took. Idempotent."""
        for call in self._dialled.values():
            call.cancel()
        self._dialled.clear()
