"""The outgoing hand-offs of this worker: engine progress goes in, exactly one release comes out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import grpc.aio

from protos.contract.errors import AutanError, Cancelled, EngineFailure, InternalError
from protos.rpc import Dialer
from protos.wire import common
from workers.kv_transfer.handoff_job import Ending, HandoffJob, HandoffResult, SendContext
from workers.kv_transfer.ledger import Entry, Key, Ledger, Side
from workers.kv_transfer.lifecycle import SendState
from workers.kv_transfer.push_calls import StreamChannels
from workers.kv_transfer.sender import Handoff, is_fence
from workers.service.assignments import Assignment
from workers.service.engine_thread import EngineThread
from workers.service.membership import Membership
from workers.service.push_wire import host_of
from workers.service.task_set import TaskSet

_MAX_PEERS = 64


class HandoffOutcomes(Protocol):
    """Who hears how a hand-off went, before its blocks are given back."""

    def handed_over(self, assignment: Assignment, result: HandoffResult) -> None:
        """The peer is the holder."""
        ...

    def handoff_overtaken(self, assignment: Assignment, error: AutanError) -> None:
        """This epoch is over: somebody else decides what becomes of the request."""
        ...

    def handoff_failed(self, assignment: Assignment, error: AutanError) -> None:
        """The request has to be computed again, or fails."""
        ...


@dataclass(slots=True, eq=False)
class _Running:
    address: str
    handoff: Handoff
    inner: asyncio.Task[HandoffResult]


class HandoffTasks:
    """One task for each request that this worker prefills for another one."""

    def __init__(
        self,
        *,
        me: Membership,
        engine: EngineThread,
        ledger: Ledger,
        context: SendContext,
        dialer: Dialer,
        reach: Callable[[str], Awaitable[None]],
    ) -> None:
        self._me = me
        self._engine = engine
        self._ledger = ledger
        self._context = context
        self._dialer = dialer
        self._reach = reach
        self._running: dict[Key, _Running] = {}
        self._channels: dict[str, dict[int, grpc.aio.Channel]] = {}  # by address and stream
        self._generation = dialer.generation
        self._tasks = TaskSet()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, assignment: Assignment, fingerprint: common.Fingerprint, outcomes: HandoffOutcomes) -> None:
        """Begins a hand-off; it opens when the first blocks are ready."""
        job = HandoffJob(
            request=assignment.request,
            source_instance=self._me.instance_id,
            source_incarnation=self._me.number,
            target_instance=assignment.peer_instance,
            target_incarnation=assignment.peer_incarnation,
            fingerprint=fingerprint,
            capability=assignment.capability,
        )
        address = assignment.peer_address
        handoff = Handoff(job, self.channels(address), self._context, host_of(address))
        running = _Running(assignment.peer_address, handoff, asyncio.create_task(handoff.run()))
        self._running[_key(assignment)] = running
        self._tasks.spawn(self._carry(assignment, running, outcomes))

    def blocks_ready(self, assignment: Assignment, computed_tokens: int, block_ids: tuple[int, ...]) -> None:
        """The engine finished another chunk."""
        running = self._running.get(_key(assignment))
        if running is not None and not running.inner.done():
            self._note(assignment, running, len(block_ids))
            running.handoff.blocks_ready(computed_tokens, block_ids)

    def end(self, assignment: Assignment, ending: Ending, block_ids: tuple[int, ...]) -> None:
        """The engine sampled the first token."""
        running = self._running.get(_key(assignment))
        if running is not None and not running.inner.done():
            self._note(assignment, running, len(block_ids))
            running.handoff.end(ending, block_ids)

    def is_ending(self, assignment: Assignment) -> bool:
        """True when everything was sent and only the commit, or the release after it, is awaited."""
        running = self._running.get(_key(assignment))
        return running is not None and running.handoff.lifecycle.state in (SendState.ENDING, SendState.COMMITTED)

    def touch(self, request_id: str, epoch: int) -> None:
        """The hand-off made progress: its ledger entry lives on."""
        key = Key(request_id, epoch, Side.SEND)
        if self._ledger.is_open(key):
            self._ledger.touch(key, self._deadline_s())

    def cancel(self, assignment: Assignment) -> None:
        """Stops a hand-off; its blocks are given back in the background. Idempotent."""
        running = self._running.get(_key(assignment))
        if running is not None:
            running.inner.cancel()

    def keys(self) -> tuple[tuple[str, int], ...]:
        """Request and epoch of every hand-off that has not given its blocks back yet."""
        return tuple((key.request_id, key.epoch) for key in self._running)

    def cancel_key(self, request_id: str, epoch: int) -> bool:
        """As `cancel`, by name; False when no such hand-off runs."""
        running = self._running.get(Key(request_id, epoch, Side.SEND))
        if running is not None:
            running.inner.cancel()
        return running is not None

    async def close(self) -> None:
        """Stops everything and closes the connections to the peers."""
        for running in self._running.values():
            running.inner.cancel()
        await self._tasks.settle()
        channels, self._channels = [channel for of in self._channels.values() for channel in of.values()], {}
        await asyncio.gather(*(channel.close() for channel in channels))

    async def _carry(self, assignment: Assignment, running: _Running, outcomes: HandoffOutcomes) -> None:
        handoff = running.handoff
        error = await self._outcome(running.inner)
        if error is None:
            await self._reach("handoff.after_commit")
            outcomes.handed_over(assignment, running.inner.result())
        else:
            handoff.lifecycle.move(SendState.ABORTED)
            if is_fence(error):
                self._context.counters.stale_refused += 1
                outcomes.handoff_overtaken(assignment, error)
            elif not isinstance(error, Cancelled):
                self._context.counters.handoffs_failed += 1
                outcomes.handoff_failed(assignment, error)
        with suppress(EngineFailure):
            await self._engine.let_go(assignment.request_id, assignment.epoch)
        handoff.lifecycle.move(SendState.RELEASED)
        key = _key(assignment)
        if self._ledger.is_open(key):
            self._ledger.release(key)
        del self._running[key]
        if error is not None:
            await handoff.close(error.reason)

    async def _outcome(self, inner: asyncio.Task[HandoffResult]) -> AutanError | None:
        await asyncio.wait({inner})
        if inner.cancelled():
            return Cancelled("the request was dropped here")
        error = inner.exception()
        if error is None or isinstance(error, AutanError):
            return error
        return InternalError(f"the hand-off failed: {type(error).__name__}: {error}")

    def _note(self, assignment: Assignment, running: _Running, blocks: int) -> None:
        key = _key(assignment)
        if self._ledger.is_open(key):
            self._ledger.touch(key, self._deadline_s(), blocks)
            return
        self._ledger.open(
            Entry(
                key=key,
                owner=self._me.instance_id,
                writer=self._me.instance_id,
                blocks=blocks,
                deadline_s=self._deadline_s(),
                state=lambda: running.handoff.lifecycle.state.value,
            )
        )

    def _deadline_s(self) -> float:
        # Opening may wait for room, and one stream may break: more than that is a leak.
        return time.monotonic() + 2 * (self._context.progress_timeout_s + self._context.open_patience_s)

    def channels(self, address: str) -> StreamChannels:
        """The connections to a peer, one for each stream of a hand-off; closed with the others.

        Who was given one keeps it: when other certificates come into force, a connection ends with its last user.
        """
        if self._generation != self._dialer.generation:
            self._channels.clear()
            self._generation = self._dialer.generation
        if address not in self._channels:
            self._close_unused_channels()
        held: dict[int, grpc.aio.Channel] = {}

        def channel_of(stream: int) -> grpc.aio.Channel:
            if stream not in held:
                channels = self._channels.setdefault(address, {})
                if stream not in channels:
                    channels[stream] = self._dialer.open(address)
                held[stream] = channels[stream]
            return held[stream]

        return channel_of

    def _close_unused_channels(self) -> None:
        """Peers come back under other addresses; the channels to their old ones end here."""
        if len(self._channels) < _MAX_PEERS:
            return
        used = {running.address for running in self._running.values()}
        for address in [address for address in self._channels if address not in used]:
            for channel in self._channels.pop(address).values():
                self._tasks.spawn(channel.close())


def _key(assignment: Assignment) -> Key:
    return Key(assignment.request_id, assignment.epoch, Side.SEND)
