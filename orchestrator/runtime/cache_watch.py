"""Keeps the prefix index true: one stream of cache news from every instance that is alive.

    CONNECTING ──news──► FOLLOWING ──gap, broken stream──► CONNECTING (after a pause that doubles up to two seconds)
    either ──gone, another incarnation──► ended, and its names leave the index

A stream that breaks goes on behind the last event that was applied, when the worker still knows it; after a gap it begins
with a snapshot. While a stream is broken what is known stays: it may be as old as the break, which a refused or failed fetch
shows, and is void after `stale_s`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from orchestrator.control.prefix_index import Applied, PrefixIndex
from orchestrator.domain.ids import Incarnation, InstanceId
from orchestrator.domain.instance import ALIVE_STATES, InstanceView
from protos.contract.block_hash import unpack_names
from protos.contract.errors import AutanError, BadFrame, FenceError
from protos.rpc import Dialer, error_of, worker_pb2_grpc
from protos.wire import worker

logger = logging.getLogger(__name__)

_BACKOFF_FIRST_S = 0.05
_BACKOFF_LAST_S = 2.0
_STALE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Whom:
    """One incarnation of one instance, where it listens."""

    instance_id: InstanceId
    incarnation: Incarnation
    address: str


class CacheWatch:
    """One task for each instance; used from one event loop."""

    def __init__(self, index: PrefixIndex, dialer: Dialer | None = None, stale_s: float = _STALE_S) -> None:
        self._index = index
        self._dialer = dialer or Dialer()
        self._stale_s = stale_s
        self._tasks: dict[_Whom, asyncio.Task[None]] = {}
        self.gaps = 0  # since the start

    def follow(self, instances: Iterable[InstanceView]) -> None:
        """These are all instances that there are: follows those that are alive and forgets the others."""
        wanted = {
            _Whom(one.instance_id, one.incarnation, one.address)
            for one in instances
            if one.state in ALIVE_STATES and one.capabilities is not None
        }
        for whom in self._tasks.keys() - wanted:
            self._tasks.pop(whom).cancel()
            self._index.forget(whom.instance_id)
        for whom in wanted - self._tasks.keys():
            self._tasks[whom] = asyncio.create_task(self._keep_up(whom), name=f"cache-of-{whom.instance_id}")

    async def close(self) -> None:
        """Ends every stream. Idempotent."""
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_up(self, whom: _Whom) -> None:
        delay_s, heard_s = _BACKOFF_FIRST_S, time.monotonic()
        while True:
            before = self._index.position(whom.instance_id, whom.incarnation)
            async with self._dialer.open(whom.address) as channel:  # a fresh one: certificates may have been replaced
                stub: Any = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
                error = await self._stream(stub, whom)
            if self._index.position(whom.instance_id, whom.incarnation) != before:
                delay_s, heard_s = _BACKOFF_FIRST_S, time.monotonic()
            if isinstance(error, FenceError) or time.monotonic() - heard_s > self._stale_s:
                self._index.forget(whom.instance_id)
            logger.info("the cache of %s is not followed: %s", whom.instance_id, error)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _BACKOFF_LAST_S)

    async def _stream(self, stub: Any, whom: _Whom) -> AutanError:
        """Follows one stream to its end, and says why it ended."""
        position = self._index.position(whom.instance_id, whom.incarnation)
        call = stub.WatchCache(worker.WatchCacheRequest(incarnation=whom.incarnation, after_event=position))
        try:
            async for news in call:
                if self._take(whom, news) is Applied.GAP:
                    self.gaps += 1
                    return BadFrame(f"{whom.instance_id}: an event of its cache is missing; asks for a snapshot")
        except grpc.RpcError as error:
            return error_of(error)
        except ValueError as error:
            self._index.forget(whom.instance_id)
            return BadFrame(f"{whom.instance_id}: {error}")
        finally:
            call.cancel()
        return BadFrame(f"{whom.instance_id} ended the stream")

    def _take(self, whom: _Whom, news: worker.CacheNews) -> Applied:
        name, incarnation = whom.instance_id, whom.incarnation
        if news.incarnation != incarnation:
            return Applied.GAP
        if news.HasField("snapshot"):
            part = news.snapshot
            return self._index.snapshot(
                name, incarnation, part.event, unpack_names(part.names), first=part.first, last=part.last
            )
        for number, change in enumerate(news.events.changes, news.events.first_event):
            stored, removed = unpack_names(change.stored), unpack_names(change.removed)
            if self._index.apply(name, incarnation, number, stored, removed) is Applied.GAP:
                return Applied.GAP
        return Applied.OK
