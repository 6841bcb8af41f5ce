"""Cached blocks that this worker pushes to others, for prompts that begin with them.

The orchestrator says what and to whom (an inbox message with a capability). Blocks that only lower tiers have come back into
the pool first; that takes at most half of the time that the target waits, so that something is left to push them in. The blocks
are pinned in the engine's cache while they are on their way and stay this worker's: the request itself has nothing to do with
it. Nobody waits for the outcome here, so a push ends by itself: with the target's commit, its refusal, or the time after which
the target has gone on without.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import grpc.aio

from protos.contract.block_hash import unpack_names
from protos.contract.errors import AutanError, EngineFailure, InvalidRequest
from protos.wire import common
from workers.engine_api.types import EngineRequest, Phase, PrefixTicket
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.handoff_job import Ending, SendContext
from workers.kv_transfer.ledger import Entry, Key, Ledger, Side
from workers.kv_transfer.lifecycle import SendState
from workers.kv_transfer.prefix_push import PrefixJob, PrefixPush
from workers.kv_transfer.push_calls import StreamChannels
from workers.service.engine_thread import EngineThread
from workers.service.membership import Membership
from workers.service.push_wire import host_of
from workers.service.request_spec import engine_request
from workers.service.store import InboxEntry
from workers.service.task_set import TaskSet

logger = logging.getLogger(__name__)

MAX_LENDINGS = 16  # at once; who comes on top is told that nothing is here
_OPEN_PATIENCE_S = 0.5
_TELL_TIMEOUT_S = 1.0
_MARGIN_S = 1.0  # the target gives up first
_RECALL_SHARE = 0.5  # of the target's patience: for bringing blocks back, before the first one is pushed


class Lendings:
    """One task for each push."""

    def __init__(
        self,
        *,
        me: Membership,
        engine: EngineThread,
        ledger: Ledger,
        context: SendContext,
        channels: Callable[[str], StreamChannels],
        fingerprint: common.Fingerprint,
    ) -> None:
        self._me = me
        self._engine = engine
        self._ledger = ledger
        self._context = replace(context, open_patience_s=_OPEN_PATIENCE_S, on_progress=self._on_progress)
        self._channels = channels
        self._fingerprint = fingerprint
        self._running: dict[Key, asyncio.Task[None]] = {}
        self._tasks = TaskSet()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, entry: InboxEntry) -> None:
        """Pushes what the message says; told twice it is one push."""
        key = Key(entry.request_id, entry.epoch, Side.LEND)
        if key not in self._running:
            self._running[key] = self._tasks.spawn(self._lend(key, entry))

    def cancel_key(self, request_id: str, epoch: int) -> bool:
        """Stops a push; False when there is none."""
        task = self._running.get(Key(request_id, epoch, Side.LEND))
        if task is not None:
            task.cancel()
        return task is not None

    def cancel_all(self) -> None:
        """Stops every push; blocks are given back in the background."""
        for task in self._running.values():
            task.cancel()

    async def close(self) -> None:
        """Stops everything."""
        await self._tasks.cancel()
        await self._tasks.settle()

    async def _lend(self, key: Key, entry: InboxEntry) -> None:
        ends_s = time.monotonic() + entry.source_wait_s + _MARGIN_S
        try:
            request = engine_request(entry, Phase.PREFILL)
            names = unpack_names(sequence_hashes(self._fingerprint, request))[: entry.source_blocks]
            ticket = await self._pin(names, entry.source_wait_s)
            await self._push_pinned(key, entry, request, ticket, ends_s - time.monotonic())
        except TimeoutError:
            logger.warning("%s: nothing is lent: the engine did not answer in %.1f s", entry.request_id, entry.source_wait_s)
        except InvalidRequest as error:
            logger.warning("%s: nothing is lent: %s", entry.request_id, error)
        except EngineFailure:
            logger.warning("%s: the engine was gone before its blocks were lent", entry.request_id)
        finally:
            del self._running[key]

    async def _pin(self, names: list[bytes], wait_s: float) -> PrefixTicket:
        """Raises TimeoutError, nothing being pinned, when the engine lets the target's patience run out."""
        wanted = names if len(self._running) <= MAX_LENDINGS else []
        lent: asyncio.Future[PrefixTicket] = asyncio.get_running_loop().create_future()
        asked = self._engine.recall(wanted, wait_s * _RECALL_SHARE, lent)
        try:
            async with asyncio.timeout(wait_s + _MARGIN_S):
                await asyncio.shield(asked)
                return await lent
        except (asyncio.CancelledError, TimeoutError):
            asked.add_done_callback(self._end_recall)
            raise

    def _end_recall(self, asked: asyncio.Future[int]) -> None:
        if not asked.cancelled() and asked.exception() is None:
            ticket_id = asked.result()
            self._engine.post(lambda engine: engine.export_prefix_end(ticket_id))

    async def _push_pinned(
        self, key: Key, entry: InboxEntry, request: EngineRequest, ticket: PrefixTicket, limit_s: float
    ) -> None:
        """Ends with the pins given back and the ledger's entry released, whatever happens."""
        push = self._new(entry, request, len(ticket.block_ids))
        self._note(key, push)
        failed: Exception | None = None
        try:
            async with asyncio.timeout(limit_s):
                if ticket.block_ids:
                    await self._push(push, request, ticket)
                else:
                    await push.say_nothing_is_here(_TELL_TIMEOUT_S)
        except (AutanError, TimeoutError, grpc.RpcError) as error:
            failed = error
            self._context.counters.handoffs_failed += 1
            logger.info("%s at epoch %d: its blocks did not go: %r", entry.request_id, entry.epoch, error)
        except asyncio.CancelledError:
            self._tasks.spawn(push.close("CANCELLED"))  # the target need not wait
            raise
        finally:
            self._give_back(key, push, ticket)
        if failed is not None:
            await push.close(failed.reason if isinstance(failed, AutanError) else type(failed).__name__)

    async def _push(self, push: PrefixPush, request: EngineRequest, ticket: PrefixTicket) -> None:
        ending = Ending(
            next_token_ids=(),
            first_output_index=len(request.output),
            timeline=common.Timeline(),
            prefill_ended_s=time.monotonic(),
        )
        push.blocks_ready(push.job.num_tokens, ticket.block_ids)
        push.end(ending, ticket.block_ids)
        await push.run()

    def _give_back(self, key: Key, push: PrefixPush, ticket: PrefixTicket) -> None:
        """The command is queued at once; the entry lives until the engine has carried it out."""

        def released(_: object) -> None:
            if push.lifecycle.state is not SendState.COMMITTED:
                push.lifecycle.move(SendState.ABORTED)
            push.lifecycle.move(SendState.RELEASED)
            self._ledger.release(key)

        ended = self._engine.call(lambda engine: engine.export_prefix_end(ticket.ticket_id))
        ended.add_done_callback(released)
        ended.add_done_callback(lambda future: future.exception())

    def _new(self, entry: InboxEntry, request: EngineRequest, blocks: int) -> PrefixPush:
        job = PrefixJob(
            request=request,
            source_instance=self._me.instance_id,
            source_incarnation=self._me.number,
            target_instance=entry.peer_instance,
            target_incarnation=entry.peer_incarnation,
            fingerprint=self._fingerprint,
            capability=entry.capability,
            blocks=blocks,
        )
        return PrefixPush(job, self._channels(entry.peer_address), self._context, host_of(entry.peer_address))

    def _note(self, key: Key, push: PrefixPush) -> None:
        self._ledger.open(
            Entry(
                key=key,
                owner=self._me.instance_id,
                writer=self._me.instance_id,
                blocks=push.num_blocks,
                deadline_s=self._deadline_s(),
                state=lambda: push.lifecycle.state.value,
            )
        )

    def _on_progress(self, request_id: str, epoch: int) -> None:
        key = Key(request_id, epoch, Side.LEND)
        if self._ledger.is_open(key):
            self._ledger.touch(key, self._deadline_s())

    def _deadline_s(self) -> float:
        return time.monotonic() + 2 * (self._context.progress_timeout_s + self._context.open_patience_s)
