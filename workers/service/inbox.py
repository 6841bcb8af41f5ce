"""Reads the instance's inbox: on a hint, when somebody waits for an entry, and every 200 ms anyhow.

An entry is acknowledged with the poll after the one that brought it, once `handle` has taken it into this process's state.
Until then it may come again, so handling is idempotent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from redis.exceptions import RedisError

from protos.cancellation import cancellable
from protos.contract.errors import AutanError, StaleIncarnation
from workers.service.store import InboxEntry, WorkerStore

logger = logging.getLogger(__name__)

POLL_S = 0.2
BATCH = 64
_HINT_TIMEOUT_S = 5.0
_RESUBSCRIBE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxContext:
    """Whose inbox it is and what to do with it."""

    instance_id: str
    incarnation: Callable[[], int | None]  # none while the instance is not registered: nothing is read then
    lease_s: float
    handle: Callable[[InboxEntry], None]
    on_stale: Callable[[], None]


class Inbox:
    """One reader of one inbox."""

    def __init__(self, store: WorkerStore, context: InboxContext) -> None:
        self._store = store
        self._context = context
        self._news = asyncio.Event()
        self._acked_seq = 0
        self._read_as: int | None = None

    def poll_soon(self) -> None:
        """Reads at once instead of at the next tick."""
        self._news.set()

    async def run(self) -> None:
        """Reads until cancelled; an unreachable store is asked again at the next tick."""
        hints = asyncio.create_task(self._listen())
        try:
            while True:
                more = await self._poll()
                if more:
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._news.wait()
                self._news.clear()
        finally:
            hints.cancel()
            await asyncio.gather(hints, return_exceptions=True)

    async def _poll(self) -> bool:
        """Reads one batch; true when there may be more."""
        incarnation = self._context.incarnation()
        if incarnation is None:
            return False
        if incarnation != self._read_as:
            self._read_as, self._acked_seq = incarnation, 0
        try:
            entries = await self._store.pick(
                self._context.instance_id, incarnation, self._acked_seq, BATCH, self._context.lease_s
            )
        except StaleIncarnation:
            self._context.on_stale()
            return False
        except AutanError as error:
            logger.warning("the inbox cannot be read: %s", error)
            return False
        if self._context.incarnation() != incarnation:
            return False
        for entry in entries:
            self._context.handle(entry)
            self._acked_seq = max(self._acked_seq, entry.seq)
        return bool(entries)

    async def _listen(self) -> None:
        while True:
            try:
                channel = await self._store.hints(self._context.instance_id)
            except AutanError:
                await asyncio.sleep(_RESUBSCRIBE_S)
                continue
            try:
                self._news.set()
                while True:
                    if await cancellable(channel.get_message(timeout=_HINT_TIMEOUT_S)) is not None:
                        self._news.set()
            except (RedisError, OSError, TimeoutError):
                await asyncio.sleep(_RESUBSCRIBE_S)
            finally:
                with suppress(RedisError, OSError):
                    await channel.aclose()  # type: ignore[no-untyped-call]
