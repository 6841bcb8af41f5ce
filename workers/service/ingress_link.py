"""One Deliver stream to one ingress, kept open with back-off for as long as there is anything to tell it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from protos.rpc import Dialer, tokens_pb2_grpc
from protos.wire import tokens

logger = logging.getLogger(__name__)

_BACKOFF_S = (0.05, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkContext:
    """What all links share. `next_batch(address)` gives what the open stream lacks, none when there is nothing."""

    dialer: Dialer
    next_batch: Callable[[str], tokens.TokenBatch | None]
    on_open: Callable[[str], None]
    on_acks: Callable[[str, tokens.TokenAcks], None]
    is_needed: Callable[[str], bool]
    reach: Callable[[str], Awaitable[None]]
    write_timeout_s: float


class IngressLink:
    """Sends batches in order. After a break the stream is opened anew, if needed, and everything unacknowledged goes again."""

    def __init__(self, address: str, context: LinkContext) -> None:
        self.address = address
        self._context = context
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """There may be something to send."""
        self._news.set()

    async def close(self) -> None:
        """Ends the stream. Idempotent."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        delay_s, longest_s = _BACKOFF_S
        while True:
            await self._news.wait()
            worked = await self._stream()
            delay_s = _BACKOFF_S[0] if worked else min(2 * delay_s, longest_s)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))

    async def _stream(self) -> bool:
        """Serves one stream until it breaks; true when the ingress answered on it."""
        self._context.on_open(self.address)
        answered = False
        async with self._context.dialer.open(self.address) as channel:
            make: Any = tokens_pb2_grpc.TokenSinkStub
            call = make(channel).Deliver()
            writer = asyncio.create_task(self._write(call))
            try:
                async for acks in call:
                    answered = True
                    self._context.on_acks(self.address, acks)
            except grpc.RpcError as error:
                logger.info("the stream to ingress %s broke: %s", self.address, error)
            finally:
                writer.cancel()
                call.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        if self._context.is_needed(self.address):
            self._news.set()
        return answered

    async def _write(self, call: Any) -> None:
        try:
            while True:
                self._news.clear()
                while (batch := self._context.next_batch(self.address)) is not None:
                    await self._context.reach("emit.before_send")
                    async with asyncio.timeout(self._context.write_timeout_s):
                        await call.write(batch)
                await self._news.wait()
        except (TimeoutError, grpc.RpcError, asyncio.InvalidStateError):
            call.cancel()
        except Exception:
            logger.exception("sending to ingress %s failed", self.address)
            call.cancel()
