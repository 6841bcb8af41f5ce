"""Acknowledgements on their way to one worker: the latest of each request, however slowly the worker reads."""

from __future__ import annotations

import asyncio

from protos.wire import tokens

_MAX_ACKS_PER_MESSAGE = 1024


class AckBox:
    """Collects acknowledgements for one connection. Bounded by the requests that the worker sent tokens of."""

    def __init__(self) -> None:
        self._pending: dict[tuple[str, int], tokens.TokenAck] = {}
        self._news = asyncio.Event()
        self.is_open = True

    def put(self, request_id: str, epoch: int, next_index: int, *, finished: bool = False, stale: bool = False) -> None:
        """Adds an acknowledgement, in place of an older one of the same request and epoch. No effect once closed."""
        if not self.is_open:
            return
        self._pending[request_id, epoch] = tokens.TokenAck(
            request_id=request_id, epoch=epoch, next_index=next_index, finished=finished, stale=stale
        )
        self._news.set()

    async def take(self) -> tokens.TokenAcks | None:
        """Waits for acknowledgements and takes them; None when the box is closed."""
        await self._news.wait()
        if not self.is_open:
            return None
        keys = list(self._pending)[:_MAX_ACKS_PER_MESSAGE]
        acks = [self._pending.pop(key) for key in keys]
        if not self._pending:
            self._news.clear()
        return tokens.TokenAcks(acks=acks)

    def close(self) -> None:
        """Ends `take`. Idempotent."""
        self.is_open = False
        self._pending.clear()
        self._news.set()
