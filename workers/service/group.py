"""Ranks of one instance: those above 0 hold a stream open to rank 0, and the end of any stream is the end of all ranks.

Rank 0 alone is registered, so its incarnation fences the group. The group is complete when every rank has joined and has
loaded its share; only then are they told where to connect to compute, and the instance is READY when they are connected. A
rank that joined once never joins again: its process ends and is started anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio

from configs.worker_spec import WorkerSpec
from protos.contract.errors import (
    AutanError,
    ConfigError,
    EngineFailure,
    HandoffTimeout,
    InvalidRequest,
    ModelError,
    StaleIncarnation,
)
from protos.rpc import Dialer, error_of, worker_pb2_grpc
from protos.wire import worker
from workers.engine_api.group import GroupDoor, GroupPlace
from workers.service.lifecycle import ExitCode
from workers.service.rank_share import ShareThread
from workers.service.store import WorkerStore

logger = logging.getLogger(__name__)

_REJOIN_S = 0.2


def place_of(spec: WorkerSpec, host: str) -> GroupPlace:
    """Where this rank stands and how long it waits for the others."""
    timing = spec.timing
    return GroupPlace(
        rank=spec.rank,
        ranks=spec.ranks,
        host=host,
        step_timeout_s=timing.progress_timeout_s,
        link_timeout_s=timing.lease_s,
    )


def end_of_share(error: BaseException) -> ExitCode:
    """How a rank above 0 ends that can no longer compute."""
    if isinstance(error, ConfigError | ModelError):
        return ExitCode.BAD_SPEC
    return ExitCode.GROUP_BROKEN if isinstance(error, EngineFailure) else ExitCode.ENGINE_LOST


class GroupHead:
    """Rank 0's view of the group."""

    def __init__(
        self,
        *,
        group: str,
        ranks: int,
        lease_s: float,
        incarnation: Callable[[], int],
        on_broken: Callable[[], None],
        door: GroupDoor | None = None,
    ) -> None:
        self._group = group
        self._ranks = ranks
        self._lease_s = lease_s
        self._incarnation = incarnation
        self._on_broken = on_broken
        self._door = door
        self._is_broken = False
        self._joined: set[int] = set()
        self._loaded: set[int] = set()
        self._complete = asyncio.Event()
        if ranks == 1:
            self._complete.set()

    async def wait_complete(self) -> None:
        """Until every rank has joined and loaded."""
        await self._complete.wait()

    async def serve(self, beats: AsyncIterator[worker.RankBeat]) -> AsyncIterator[worker.GroupBeat]:
        """One rank's stream. Raises InvalidRequest for a rank that is not of this group, StaleIncarnation for a second one."""
        first = await self._next(beats)
        if first is None:
            return
        if first.group != self._group or not 0 < first.rank < self._ranks:
            raise InvalidRequest(f"rank {first.rank} of {first.group!r} is not of {self._group} with {self._ranks} ranks")
        if first.rank in self._joined:
            raise StaleIncarnation(f"rank {first.rank} of {self._group} has joined already")
        self._joined.add(first.rank)
        try:
            beat: worker.RankBeat | None = first
            while beat is not None and not self._is_broken:
                if beat.loaded:
                    self._has_loaded(first.rank)
                yield self._answer()
                beat = await self._next(beats)
        finally:
            self._is_broken = True
            logger.error("rank %d of %s is gone", first.rank, self._group)
            self._on_broken()

    def _has_loaded(self, rank: int) -> None:
        self._loaded.add(rank)
        if len(self._loaded) == self._ranks - 1:
            self._complete.set()

    def _answer(self) -> worker.GroupBeat:
        answer = worker.GroupBeat(incarnation=self._incarnation())
        if self._door is not None and self._complete.is_set():
            answer.link_address, answer.link_token = self._door.address, self._door.token
        return answer

    async def _next(self, beats: AsyncIterator[worker.RankBeat]) -> worker.RankBeat | None:
        try:
            async with asyncio.timeout(self._lease_s):
                return await anext(beats, None)
        except TimeoutError:
            raise HandoffTimeout(f"a rank of {self._group} did not beat for {self._lease_s} s") from None


class GroupFollower:
    """The life of a rank above 0: finds rank 0, joins, beats, lets its share connect, ends with rank 0."""

    def __init__(self, spec: WorkerSpec, store: WorkerStore, dialer: Dialer, share: ShareThread) -> None:
        self._spec = spec
        self._share = share
        self._store = store
        self._dialer = dialer

    async def run(self) -> ExitCode:
        """Until the group is broken. Before it has joined it looks for rank 0 again and again."""
        while True:
            address = await self._head_address()
            if address is not None and await self._follow(address):
                return ExitCode.GROUP_BROKEN
            await asyncio.sleep(_REJOIN_S)

    async def _head_address(self) -> str | None:
        if self._spec.head_address is not None:
            return self._spec.head_address
        try:
            record = await self._store.instance(self._spec.instance_id)
        except AutanError as error:
            logger.warning("rank 0 of %s cannot be looked up: %s", self._spec.instance_id, error)
            return None
        return record.address if record is not None else None

    async def _follow(self, address: str) -> bool:
        """One stream to rank 0; true when this rank had joined."""
        timing, joined = self._spec.timing, False
        async with self._dialer.open(address) as channel:
            make: Any = worker_pb2_grpc.WorkerStub
            call = make(channel).JoinGroup(self._beats())
            try:
                while True:
                    async with asyncio.timeout(timing.lease_s):
                        beat = await call.read()
                    if beat is grpc.aio.EOF:
                        return joined
                    joined = True
                    if beat.link_address:
                        self._share.connect(beat.link_address, beat.link_token)
            except (grpc.RpcError, TimeoutError) as error:
                reason = error_of(error) if isinstance(error, grpc.RpcError) else "no beat in time"
                logger.warning("rank %d of %s left rank 0: %s", self._spec.rank, self._spec.instance_id, reason)
                return joined
            finally:
                with suppress(grpc.RpcError):
                    call.cancel()

    async def _beats(self) -> AsyncIterator[worker.RankBeat]:
        while True:
            loaded = self._share.loaded
            yield worker.RankBeat(group=self._spec.instance_id, rank=self._spec.rank, pid=os.getpid(), loaded=loaded)
            await (asyncio.sleep if loaded else self._share.wait_loaded)(self._spec.timing.heartbeat_s)
