"""The client for code without an event loop: AsyncClient on a loop of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Generator, Sequence
from typing import Any, Self, TypeVar

from orchestrator.client.connection import AsyncClient
from orchestrator.client.messages import Completion, Event, Turn
from protos.wire import admin, inference

T = TypeVar("T")


class Client:
    """AsyncClient for code without an event loop; same arguments, same methods, iterators instead of async ones."""

    def __init__(self, endpoint: str | None = None, **options: Any) -> None:
        self._async = AsyncClient(endpoint, **options)
        self.endpoint = self._async.endpoint
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="autan-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See AsyncClient.close."""
        if not self._loop.is_closed():
            self._run(self._async.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def generate(self, text: str | None = None, **options: Any) -> Generator[Event, None, None]:
        """See AsyncClient.generate."""
        return self._iterate(self._async.generate(text, **options))

    def resume(self, request_id: str, from_index: int = 0) -> Generator[Event, None, None]:
        """See AsyncClient.resume."""
        return self._iterate(self._async.resume(request_id, from_index))

    def complete(self, text: str | None = None, **options: Any) -> Completion:
        """See AsyncClient.complete."""
        return self._run(self._async.complete(text, **options))

    def complete_all(self, text: str | None = None, **options: Any) -> list[Completion]:
        """See AsyncClient.complete_all."""
        return self._run(self._async.complete_all(text, **options))

    def cancel(self, request_id: str) -> str:
        """See AsyncClient.cancel."""
        return self._run(self._async.cancel(request_id))

    def tokenize(self, text: str | None = None, *, messages: Sequence[Turn] | None = None) -> list[int]:
        """See AsyncClient.tokenize."""
        return self._run(self._async.tokenize(text, messages=messages))

    def models(self) -> list[inference.Model]:
        """See AsyncClient.models."""
        return self._run(self._async.models())

    def status(self) -> admin.StatusReply:
        """See AsyncClient.status."""
        return self._run(self._async.status())

    def requests(self, limit: int = 100) -> list[admin.RequestStatus]:
        """See AsyncClient.requests."""
        return self._run(self._async.requests(limit))

    def cancel_any(self, request_id: str) -> str:
        """See AsyncClient.cancel_any."""
        return self._run(self._async.cancel_any(request_id))

    def shutdown(self, grace_s: float = 30.0) -> None:
        """See AsyncClient.shutdown."""
        self._run(self._async.shutdown(grace_s))

    def _iterate(self, events: AsyncGenerator[Event, None]) -> Generator[Event, None, None]:
        try:
            while True:
                event = self._run(anext(events, None))
                if event is None:
                    return
                yield event
        finally:
            self._run(events.aclose())

    def _run(self, work: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await work

        future = asyncio.run_coroutine_threadsafe(awaited(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C while waiting: the work ends as well
            raise
