"""What is cached here, for those who route by it: a snapshot, then every change, numbered without gaps.

The engine numbers its events; this feed is their one consumer. It keeps the set of names as of the last event, and a ring of
the last events, which all subscribers share: a subscriber is a position in the ring and nothing else. Whoever falls behind the
ring, however slow, begins again with a snapshot. Everything runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from itertools import islice

from protos.contract.errors import EngineFailure, QueueFull, StaleIncarnation
from protos.wire import worker
from workers.engine_api.protocol import Engine
from workers.engine_api.types import CacheEvent
from workers.kv_transfer.port import EnginePort
from workers.service.task_set import TaskSet

logger = logging.getLogger(__name__)

MAX_SUBSCRIBERS = 16
RING_EVENTS = 4096
RING_NAMES = 262_144  # 4 MiB
MESSAGE_NAMES = 4096  # 64 KiB; one event may have more
MESSAGE_EVENTS = 256
_COALESCE_S = 0.01  # a decoding engine changes its cache in most steps: several changes travel together
_LOOK_S = 0.5  # how soon an idle stream ends when its incarnation does
_RETRY_AFTER_S = 1.0


class CacheFeed:
    """The names that the prefix cache of one engine has, and who is told of their changes."""

    def __init__(self, port: EnginePort, incarnation: Callable[[], int | None]) -> None:
        self._port = port
        self._incarnation = incarnation
        self._names: dict[bytes, None] = {}
        self._last_event = 0
        self._ring: deque[CacheEvent] = deque()
        self._ring_names = 0
        self._news = asyncio.Event()
        self._subscribers = 0
        self._is_healing = False
        self._is_closed = False
        self._tasks = TaskSet()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def subscribers(self) -> int:
        """Streams that are open."""
        return self._subscribers

    def take(self, events: tuple[CacheEvent, ...]) -> None:
        """The engine's next events, in order.

        Numbers that are missing are made up for: names that the engine does not have any more are dropped, those that it
        has and nobody heard of stay unknown here.
        """
        for event in events:
            if event.sequence != self._last_event + 1:
                logger.error("events %d to %d of the cache are missing", self._last_event + 1, event.sequence - 1)
                self._forget_ring()
                self._heal()
            for name in event.removed:
                self._names.pop(name, None)
            self._names.update(dict.fromkeys(event.stored))
            self._last_event = event.sequence
            self._keep(event)
        self._tell()

    async def watch(self, incarnation: int, after_event: int) -> AsyncIterator[worker.CacheNews]:
        """The stream of one subscriber, from `after_event` on when that is still known here.

        Raises StaleIncarnation when `incarnation` is not, or is no longer, that of this instance, QueueFull when too many
        watch already.
        """
        if self._subscribers >= MAX_SUBSCRIBERS:
            raise QueueFull(f"{MAX_SUBSCRIBERS} streams watch the cache already; close one", _RETRY_AFTER_S)
        self._check(incarnation)
        self._subscribers += 1
        try:
            position = after_event if 0 < after_event <= self._last_event else None
            while not self._is_closed:
                news, at = self._news, position
                if self._is_healing:
                    await self._wait(news)
                elif at is None or self._is_behind(at):
                    position = self._last_event
                    for part in self._snapshot(incarnation):
                        yield part
                elif at < self._last_event:
                    batch = self._batch(at)
                    position = at + len(batch.changes)
                    yield worker.CacheNews(incarnation=incarnation, events=batch)
                else:
                    await self._wait(news)
                self._check(incarnation)
        finally:
            self._subscribers -= 1

    async def close(self) -> None:
        """Ends every stream and what runs in the background."""
        self._is_closed = True
        self._tell()
        await self._tasks.cancel()

    def _check(self, incarnation: int) -> None:
        if self._incarnation() != incarnation:
            raise StaleIncarnation(f"this is incarnation {self._incarnation()}, not {incarnation}: look it up again")

    async def _wait(self, news: asyncio.Event) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await news.wait()
            if not self._is_closed:
                await asyncio.sleep(_COALESCE_S)

    def _is_behind(self, position: int) -> bool:
        """True when the event after `position` has happened and is not in the ring."""
        return position < self._last_event and (not self._ring or position + 1 < self._ring[0].sequence)

    def _snapshot(self, incarnation: int) -> Iterator[worker.CacheNews]:
        names, event = tuple(self._names), self._last_event
        for start in range(0, max(1, len(names)), MESSAGE_NAMES):
            part = names[start : start + MESSAGE_NAMES]
            yield worker.CacheNews(
                incarnation=incarnation,
                snapshot=worker.CacheSnapshot(
                    event=event, names=b"".join(part), first=start == 0, last=start + MESSAGE_NAMES >= len(names)
                ),
            )

    def _batch(self, position: int) -> worker.CacheEvents:
        found = worker.CacheEvents(first_event=position + 1)
        first, size = position + 1 - self._ring[0].sequence, 0
        for event in islice(self._ring, first, first + MESSAGE_EVENTS):
            size += len(event.stored) + len(event.removed)
            if found.changes and size > MESSAGE_NAMES:
                break
            found.changes.add(stored=b"".join(event.stored), removed=b"".join(event.removed))
        return found

    def _keep(self, event: CacheEvent) -> None:
        self._ring.append(event)
        self._ring_names += len(event.stored) + len(event.removed)
        while self._ring and (len(self._ring) > RING_EVENTS or self._ring_names > RING_NAMES):
            oldest = self._ring.popleft()
            self._ring_names -= len(oldest.stored) + len(oldest.removed)

    def _forget_ring(self) -> None:
        self._ring.clear()
        self._ring_names = 0

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _heal(self) -> None:
        if not self._is_healing:
            self._is_healing = True
            self._tasks.spawn(self._ask_engine())

    async def _ask_engine(self) -> None:
        """Drops the names that the engine does not have. What changes after it was asked comes as an event after its answer."""
        asked = tuple(self._names)

        def missing(engine: Engine) -> list[bytes]:
            known = engine.known_names()
            return [name for name in asked if name not in known]

        with suppress(EngineFailure):
            for name in await self._port.call(missing):
                self._names.pop(name, None)
        self._is_healing = False
        self._forget_ring()
        self._tell()
