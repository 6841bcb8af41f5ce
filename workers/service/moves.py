"""Requests that decode here and move to another worker: their KV travels while they decode on.

    COPYING ──► PAUSED ──► MOVED                    (the target took over in Redis; everything is given back here)
       │           │
       └───────────┴──► SETTLING ──► STAYED         (Redis says that nobody takes over by this move: it decodes on)
                            └──────► MOVED, DROPPED

Copying follows the sequence as it grows; when at most one block is behind, or the room at the target is nearly used up, the
sequence pauses, and the rest of its KV goes together with the tokens that Redis did not know of when the move began. Grammar
and sampling follow from the tokens. A move that fails never lets the sequence go on before Redis has closed it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum

from protos.contract.errors import AutanError, EngineFailure, HandoffTimeout, InternalError, InvalidRequest, OutOfBlocks
from protos.wire import common
from workers.engine_api.types import EngineRequest, TokenOut
from workers.kv_transfer.handoff_job import Ending, HandoffJob, HandoffResult, SendContext
from workers.kv_transfer.ledger import Entry, Key, Ledger, Side
from workers.kv_transfer.lifecycle import Lifecycle, SendState
from workers.kv_transfer.push_calls import StreamChannels
from workers.kv_transfer.sender import Handoff
from workers.service.assignments import Assignment, Stage
from workers.service.engine_thread import EngineThread
from workers.service.membership import Membership
from workers.service.outbox import Outbox
from workers.service.push_wire import host_of
from workers.service.request_spec import journal_of
from workers.service.store import InboxEntry, WorkerStore
from workers.service.task_set import TaskSet

logger = logging.getLogger(__name__)

AHEAD_TOKENS = 256  # rows that the target makes room for beyond those that are there when the move begins
_UNSEEN_TOKENS = 96  # rows that the engine may compute before it hears that it shall pause
_LAST_BLOCKS = 1  # behind by no more than this: the rest is worth a pause
_COPY_PATIENCE_S = 120.0
_SETTLE_BACKOFF_S = 0.1


class MoveState(StrEnum):
    """Where the leaving side of a move is."""

    COPYING = "copying"
    PAUSED = "paused"
    SETTLING = "settling"
    MOVED = "moved"
    STAYED = "stayed"
    DROPPED = "dropped"


MOVE_MOVES: Mapping[MoveState, frozenset[MoveState]] = {
    MoveState.COPYING: frozenset({MoveState.PAUSED, MoveState.SETTLING, MoveState.DROPPED}),
    MoveState.PAUSED: frozenset({MoveState.MOVED, MoveState.SETTLING, MoveState.DROPPED}),
    MoveState.SETTLING: frozenset({MoveState.STAYED, MoveState.MOVED, MoveState.DROPPED}),
    MoveState.MOVED: frozenset(),
    MoveState.STAYED: frozenset(),
    MoveState.DROPPED: frozenset(),
}


@dataclass(slots=True, eq=False)
class _Move:
    assignment: Assignment
    known: EngineRequest  # as Redis knew it when the move began, at the move's epoch
    handoff: Handoff
    lifecycle: Lifecycle[MoveState] = field(default_factory=lambda: Lifecycle(MOVE_MOVES, MoveState.COPYING))
    rows: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    inner: asyncio.Task[HandoffResult] | None = None

    @property
    def key(self) -> Key:
        # The blocks are pinned under the epoch at which the source has them.
        return Key(self.known.request_id, self.assignment.epoch, Side.SEND)

    @property
    def may_pause(self) -> bool:
        """True when what is left is little, or there is hardly room for more."""
        job = self.handoff.job
        most = len(self.known.prompt) + self.known.sampling.max_tokens - 1
        if job.num_tokens < most and self.rows + _UNSEEN_TOKENS >= job.num_tokens:
            return True
        return self.handoff.lifecycle.state is SendState.STREAMING and self.handoff.blocks_behind <= _LAST_BLOCKS


class Moves:
    """One task for each request that leaves this worker."""

    def __init__(
        self,
        *,
        me: Membership,
        engine: EngineThread,
        store: WorkerStore,
        ledger: Ledger,
        outbox: Outbox,
        context: SendContext,
        channels: Callable[[str], StreamChannels],
        fingerprint: common.Fingerprint,
        on_moved: Callable[[Assignment], None],
        pause_patience_s: float,
    ) -> None:
        self._me = me
        self._engine = engine
        self._store = store
        self._ledger = ledger
        self._outbox = outbox
        self._context = replace(context, on_progress=self._on_progress)
        self._channels = channels
        self._fingerprint = fingerprint
        self._on_moved = on_moved
        self._pause_patience_s = pause_patience_s
        self._running: dict[str, _Move] = {}
        self._tasks = TaskSet()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, assignment: Assignment | None, entry: InboxEntry) -> None:
        """Begins a move that Redis has opened; one that cannot be carried out is closed there. Told twice it is one move."""
        if entry.request_id in self._running:
            return
        move = None
        if assignment is not None and assignment.stage is Stage.DECODING and assignment.epoch < entry.epoch:
            with suppress(InvalidRequest):
                move = self._new(assignment, entry)
        if move is None:
            self._tasks.spawn(self._refuse(entry))
            return
        self._running[entry.request_id] = move
        self._note(move)
        self._tasks.spawn(self._carry(move))

    def on_token(self, assignment: Assignment, token: TokenOut, block_ids: tuple[int, ...] | None) -> None:
        """The sequence grew by a row; its blocks are pinned when it is moving."""
        move = self._running.get(assignment.request_id)
        if move is None or move.assignment is not assignment or block_ids is None:
            return
        move.rows = len(move.known.prompt) + token.index
        move.handoff.blocks_ready(min(move.rows, move.handoff.job.num_tokens), block_ids)
        move.news.set()

    def cancel(self, assignment: Assignment) -> None:
        """The request ended here, or was dropped. Idempotent."""
        move = self._running.get(assignment.request_id)
        if move is not None and move.assignment is assignment and move.inner is not None:
            move.inner.cancel()

    def close_move(self, request_id: str, epoch: int) -> None:
        """Redis has closed the move of this epoch: the sequence need not wait for the target any longer."""
        move = self._running.get(request_id)
        if move is not None and move.known.epoch == epoch and move.inner is not None:
            move.inner.cancel()

    def is_settling(self, assignment: Assignment) -> bool:
        """True while only Redis knows whether the target took over."""
        move = self._running.get(assignment.request_id)
        return move is not None and move.lifecycle.state in (MoveState.PAUSED, MoveState.SETTLING)

    async def close(self) -> None:
        """Stops everything."""
        await self._tasks.cancel()

    def _new(self, assignment: Assignment, entry: InboxEntry) -> _Move | None:
        known = replace(assignment.request, epoch=entry.epoch, output=journal_of(entry))
        num_known = len(known.prompt) + len(known.output)
        most = len(known.prompt) + known.sampling.max_tokens - 1
        rows = len(known.prompt) + self._outbox.end_of(assignment.request_id)
        ahead = min(most, rows + AHEAD_TOKENS) - num_known
        if ahead < 1:
            return None
        job = HandoffJob(
            request=known,
            source_instance=self._me.instance_id,
            source_incarnation=self._me.number,
            target_instance=entry.peer_instance,
            target_incarnation=entry.peer_incarnation,
            fingerprint=self._fingerprint,
            capability=entry.capability,
            ahead_tokens=ahead,
            source_epoch=assignment.epoch,
            is_exact=assignment.is_exact,
        )
        address = entry.peer_address
        return _Move(assignment, known, Handoff(job, self._channels(address), self._context, host_of(address)))

    async def _carry(self, move: _Move) -> None:
        request_id, epoch = move.assignment.request_id, move.assignment.epoch
        move.inner = asyncio.create_task(move.handoff.run())
        feeding = asyncio.create_task(self._feed(move))
        try:
            await asyncio.wait({move.inner, feeding}, return_when=asyncio.FIRST_COMPLETED)
            if not move.inner.done() and feeding.exception() is None:
                await asyncio.wait({move.inner}, timeout=self._pause_patience_s)
            error = _error_of(move.inner) or _error_of(feeding)
            if error is None and not move.inner.done():
                error = HandoffTimeout(f"{request_id}: paused for {self._pause_patience_s} s, the target did not take over")
            for task in (feeding, move.inner):
                task.cancel()
            await asyncio.gather(feeding, move.inner, return_exceptions=True)
            if error is None:
                move.lifecycle.move(MoveState.MOVED)
            else:
                await self._settle(move, error)
            await self._let_go(move)
            logger.info("the move of %s at epoch %d: %s", request_id, epoch, move.lifecycle.state.value)
        finally:
            feeding.cancel()
            move.inner.cancel()
            del self._running[request_id]
            if self._ledger.is_open(move.key):
                self._ledger.release(move.key)
        if error is not None:
            await move.handoff.close(error.reason)

    async def _feed(self, move: _Move) -> None:
        """Follows the sequence until little is left, pauses it and hands the rest over."""
        assignment, known = move.assignment, move.known
        await self._engine.watch(assignment.request_id, assignment.epoch)
        async with asyncio.timeout(_COPY_PATIENCE_S):
            while not move.may_pause:
                await move.news.wait()
                move.news.clear()
        paused = await self._engine.call(lambda engine: engine.pause(assignment.request_id, assignment.epoch))
        if paused is None:
            raise OutOfBlocks(f"{assignment.request_id}: it was preempted while it moved")
        move.lifecycle.move(MoveState.PAUSED)
        if paused.num_tokens > move.handoff.job.num_tokens:
            raise OutOfBlocks(f"{assignment.request_id}: it grew beyond the room at the target")
        first = len(known.output)
        rest = paused.output[first:]
        logprobs = self._outbox.logprobs_of(assignment.request_id, first, len(rest))
        timeline = common.Timeline()
        if assignment.timeline is not None:
            timeline.CopyFrom(assignment.timeline)
        move.handoff.end(
            Ending(
                next_token_ids=rest,
                first_output_index=first,
                timeline=timeline,
                prefill_ended_s=time.monotonic(),
                next_logprobs=logprobs,
                num_tokens=paused.num_tokens,
            ),
            paused.block_ids,
        )

    async def _settle(self, move: _Move, error: AutanError) -> None:
        """Closes the move in Redis, however long that takes: until then the target may take over."""
        move.lifecycle.move(MoveState.SETTLING)
        request_id = move.assignment.request_id
        logger.info("the move of %s failed: %s", request_id, error)
        while not move.assignment.ended:
            try:
                stays = await self._store.stay(request_id, move.known.epoch, self._me.instance_id, self._me.number)
            except AutanError:
                await asyncio.sleep(_SETTLE_BACKOFF_S)
                continue
            move.lifecycle.move(MoveState.STAYED if stays else MoveState.MOVED)
            return
        move.lifecycle.move(MoveState.DROPPED)

    async def _let_go(self, move: _Move) -> None:
        """Gives the pins back; the sequence decodes on, or ends here."""
        request_id, epoch = move.assignment.request_id, move.assignment.epoch
        with suppress(EngineFailure):
            if move.lifecycle.state is MoveState.STAYED:
                await self._engine.keep(request_id, epoch)
                return
            if not move.assignment.ended:
                self._on_moved(move.assignment)
            await self._engine.let_go(request_id, epoch)

    async def _refuse(self, entry: InboxEntry) -> None:
        with suppress(AutanError):
            await self._store.stay(entry.request_id, entry.epoch, self._me.instance_id, self._me.number)

    def _on_progress(self, request_id: str, epoch: int) -> None:
        move = self._running.get(request_id)
        if move is not None and move.known.epoch == epoch:
            move.assignment.progress_s = time.monotonic()
            self._note(move)
            move.news.set()

    def _note(self, move: _Move) -> None:
        deadline_s = time.monotonic() + 2 * (self._context.progress_timeout_s + self._context.open_patience_s)
        if self._ledger.is_open(move.key):
            self._ledger.touch(move.key, deadline_s)
            return
        self._ledger.open(
            Entry(
                key=move.key,
                owner=self._me.instance_id,
                writer=self._me.instance_id,
                blocks=move.handoff.num_blocks,
                deadline_s=deadline_s,
                state=lambda: move.lifecycle.state.value,
            )
        )


def _error_of(task: asyncio.Task[HandoffResult] | asyncio.Task[None]) -> AutanError | None:
    """What a task ended with; none when it runs or succeeded."""
    if not task.done():
        return None
    if task.cancelled():
        return HandoffTimeout("the move was given up here")
    error = task.exception()
    if error is None or isinstance(error, AutanError):
        return error
    return InternalError(f"the move failed: {type(error).__name__}: {error}")
