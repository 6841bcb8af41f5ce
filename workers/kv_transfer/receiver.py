"""The receiving side of hand-offs: the logic of the KvTransfer service, independent of Redis and of the transport.

A block counts when all its layer groups are verified; the sequence decodes when all blocks count and Redis has this instance
as the holder; everything else ends with the blocks back in the pool. Writes into the pool happen on the event loop, in the
same step as the check that the transfer is still open, so nothing is ever written into blocks that were given back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any
from weakref import WeakValueDictionary

from protos.contract.errors import (
    AutanError,
    AuthError,
    BadFrame,
    FenceError,
    HandoffTimeout,
    InternalError,
    PeerUnavailable,
    StaleEpoch,
)
from protos.wire import error_to_wire, fingerprint_key, kv
from workers.kv_transfer.authority import Authority, StoreClock
from workers.kv_transfer.claims import Addressee, Expectation, check_addressee, check_end, check_expected
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.frames import Reassembly
from workers.kv_transfer.hooks import ReceiveLimits, ReceiverHooks
from workers.kv_transfer.ledger import Entry, Ledger
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.push_codec import DataFrame, PushMessage
from workers.kv_transfer.transfer import Transfer, TransferTable

logger = logging.getLogger(__name__)


async def _pass(point: str) -> None:
    del point


class Receiver:
    """All incoming transfers of one process."""

    def __init__(
        self,
        *,
        port: EnginePort,
        hooks: ReceiverHooks,
        ledger: Ledger,
        counters: TransferCounters,
        limits: ReceiveLimits,
        reach: Callable[[str], Awaitable[None]] = _pass,
        authority: Authority | None = None,
    ) -> None:
        self._port = port
        self._hooks = hooks
        self._ledger = ledger
        self._counters = counters
        self._limits = limits
        self._reach = reach
        self._authority = authority or Authority(None, StoreClock())
        self._table = TransferTable()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._returning: dict[str, asyncio.Task[None]] = {}

    # -- the three calls ------------------------------------------------------------------------------------------------

    async def open(self, claim: kv.OpenRequest) -> kv.OpenReply:
        """Reserves blocks and grants credit, or answers a repeated open with the state of the same transfer.

        Raises Unauthenticated, BadFrame, FingerprintMismatch, StaleIncarnation, StaleEpoch, or OutOfBlocks with a time to
        come back.
        """
        try:
            here = self._hooks.here()
            known = self._table.of_request(claim.request_id)
            is_here = known is not None and known.epoch == claim.epoch
            self._authority.admit(claim, here.layout.block_bytes, is_here=is_here)
            check_addressee(claim, here)
            # A caller that hangs up must not leave a reservation that nobody knows of: the work goes on without it.
            return await asyncio.shield(self._spawn(self._open(claim, here)))
        except AuthError as error:
            logger.warning("an open of %.64r from %.64r is refused: %s", claim.request_id, claim.source_instance, error)
            raise
        except FenceError:
            self._counters.stale_refused += 1
            raise

    async def push(self, frames: AsyncIterator[PushMessage]) -> AsyncIterator[kv.PushReply]:
        """Takes frames until the end frame. The last reply is the commit or the refusal.

        A refused transfer keeps nothing, unless its stream just ended: then it can be opened again until it times out.
        """
        transfer: Transfer | None = None
        stream = 0
        try:
            frame = await self._first(frames)
            transfer, stream = self._attach(frame)
            while True:
                self._check_frame(transfer, stream, frame)
                if frame.end is not None:
                    yield kv.PushReply(commit=await self._end(transfer, frame.end))
                    return
                for part in frame.data:
                    self._write(transfer, part)
                if frame.data:
                    credit = transfer.regrant()
                    if credit:
                        yield kv.PushReply(credit_bytes=credit)
                frame = await self._next(transfer, stream, frames)
        except PeerUnavailable as error:
            # A connection that breaks may look like an end of the stream: the transfer waits for another open.
            yield kv.PushReply(refused=error_to_wire(error))
        except AutanError as error:
            self._counters.stale_refused += isinstance(error, FenceError)
            if transfer is not None and transfer.stream == stream:
                await self._abort(transfer, error)
            yield kv.PushReply(refused=error_to_wire(error))
        finally:
            if transfer is not None:
                self._detach(transfer, stream)

    async def close(self, message: kv.CloseRequest) -> None:
        """Ends an open transfer. Unknown, committed and committing transfers are left as they are."""
        transfer = self._table.of_id(message.transfer_id)
        if transfer is None or (transfer.request_id, transfer.epoch) != (message.request_id, message.epoch):
            return
        if transfer.lifecycle.state in (ReceiveState.OPEN, ReceiveState.RECEIVING):
            await self._abort(transfer, HandoffTimeout(f"{transfer.request_id}: closed by the sender"))
            self._authority.spend(transfer.request_id, transfer.epoch)

    # -- from the rest of the process -----------------------------------------------------------------------------------

    def abort_request(self, request_id: str, up_to_epoch: int, error: AutanError) -> None:
        """Ends the transfer of a request that is no longer expected, if its epoch is at most `up_to_epoch`."""
        transfer = self._table.of_request(request_id)
        if transfer is not None and transfer.epoch <= up_to_epoch:
            self._give_back(transfer, error)

    def abort_all(self, error: AutanError) -> None:
        """Ends every transfer and forgets the committed ones."""
        for transfer in self._table.all():
            self._give_back(transfer, error)

    async def run(self) -> None:
        """Ends transfers that make no progress and forgets committed ones in time. Until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._limits.progress_timeout_s / 8))
            now_s = time.monotonic()
            for transfer in self._table.all():
                idle_s = now_s - transfer.touched_s
                if transfer.lifecycle.state is ReceiveState.COMMITTED:
                    if idle_s > self._limits.remember_s:
                        self._table.remove(transfer)
                elif transfer.lifecycle.state is not ReceiveState.VERIFYING and idle_s > self._limits.progress_timeout_s:
                    self._give_back(transfer, HandoffTimeout(f"{transfer.request_id}: no frame for {idle_s:.1f} s"))

    async def settle(self) -> None:
        """Waits until everything under way inside the receiver is over."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- open -----------------------------------------------------------------------------------------------------------

    async def _open(self, claim: kv.OpenRequest, here: Addressee) -> kv.OpenReply:
        expected = await self._hooks.expect(claim.request_id, claim.epoch)
        check_expected(claim, expected, here)
        lock = self._locks.setdefault(claim.request_id, asyncio.Lock())
        async with lock:
            current = self._table.of_request(claim.request_id)
            if current is not None and current.expected == expected:
                if claim.num_tokens != current.room_tokens:
                    raise BadFrame(f"{claim.request_id}: opened with {current.room_tokens} tokens, now {claim.num_tokens}")
                return await self._open_again(current)
            if current is not None and current.epoch >= claim.epoch:
                raise StaleEpoch(f"{claim.request_id}: epoch {current.epoch} is here already")
            if current is not None:
                await self._abort(current, StaleEpoch(f"{claim.request_id}: epoch {claim.epoch} has begun"))
            return await self._reserve(expected, here, claim.num_tokens)

    async def _open_again(self, transfer: Transfer) -> kv.OpenReply:
        if transfer.committing is not None:
            await asyncio.shield(transfer.committing)
        transfer.touched_s = time.monotonic()
        transfer.stream += 1
        transfer.wake()
        if transfer.lifecycle.state is ReceiveState.RECEIVING:
            transfer.lifecycle.move(ReceiveState.OPEN)
        transfer.reassembly.rewind()
        first_block = transfer.reassembly.verified_blocks
        return kv.OpenReply(transfer_id=transfer.transfer_id, credit_bytes=transfer.reset_credit(), first_block=first_block)

    async def _reserve(self, expected: Expectation, here: Addressee, room_tokens: int) -> kv.OpenReply:
        request, known = expected.request, expected.num_tokens
        returning = self._returning.get(request.request_id)
        if returning is not None:
            await asyncio.shield(returning)
        ticket = await self._port.call(lambda engine: engine.import_begin(request, known, room_tokens - known))
        scope = DigestScope(fingerprint_key(here.fingerprint), request.request_id, request.epoch)
        transfer = Transfer(
            expected=expected,
            ticket=ticket,
            reassembly=Reassembly(here.layout, scope, ticket.reused_blocks, len(ticket.block_ids)),
            scope=scope,
            window_bytes=self._limits.window_bytes,
            room_tokens=room_tokens,
            touched_s=time.monotonic(),
        )
        self._ledger.open(
            Entry(
                key=transfer.key,
                owner=here.instance_id,
                writer=f"{expected.source_instance}/{expected.source_incarnation}",
                blocks=transfer.num_blocks,
                deadline_s=self._deadline_s(transfer),
                state=lambda: transfer.lifecycle.state.value,
            )
        )
        self._table.add(transfer)
        if not self._hooks.is_expected(request.request_id, request.epoch):
            error = StaleEpoch(f"{request.request_id}: epoch {request.epoch} was revoked meanwhile")
            await self._abort(transfer, error)
            raise error
        self._hooks.opened(request.request_id, request.epoch)
        return kv.OpenReply(
            transfer_id=transfer.transfer_id, credit_bytes=transfer.reset_credit(), first_block=ticket.reused_blocks
        )

    # -- push -----------------------------------------------------------------------------------------------------------

    async def _first(self, frames: AsyncIterator[PushMessage]) -> PushMessage:
        try:
            async with asyncio.timeout(self._limits.progress_timeout_s):
                return await anext(frames)
        except StopAsyncIteration:
            raise BadFrame("an empty stream") from None
        except TimeoutError:
            raise HandoffTimeout("no first frame") from None

    async def _next(self, transfer: Transfer, stream: int, frames: AsyncIterator[PushMessage]) -> PushMessage:
        self._check_current(transfer, stream)
        try:
            async with asyncio.timeout(None) as waiting:
                transfer.waiting = waiting
                return await anext(frames)
        except StopAsyncIteration:
            raise PeerUnavailable(f"{transfer.request_id}: the stream ended before the end frame") from None
        except TimeoutError:
            raise transfer.ended_by or StaleEpoch(f"{transfer.request_id}: another stream took over") from None
        finally:
            transfer.waiting = None

    def _attach(self, frame: PushMessage) -> tuple[Transfer, int]:
        transfer = self._table.of_id(frame.transfer_id)
        if transfer is None or transfer.epoch != frame.epoch:
            raise StaleEpoch(f"no transfer of that id is open at epoch {frame.epoch}")
        if transfer.lifecycle.state is ReceiveState.OPEN:
            transfer.lifecycle.move(ReceiveState.RECEIVING)
            transfer.stream += 1
        elif transfer.lifecycle.state is not ReceiveState.COMMITTED:
            raise StaleEpoch(f"{transfer.request_id}: another stream is attached")
        return transfer, transfer.stream

    def _detach(self, transfer: Transfer, stream: int) -> None:
        if transfer.stream == stream and transfer.lifecycle.state is ReceiveState.RECEIVING:
            transfer.lifecycle.move(ReceiveState.OPEN)

    @staticmethod
    def _check_current(transfer: Transfer, stream: int) -> None:
        if transfer.ended_by is not None:
            raise transfer.ended_by
        if transfer.stream != stream:
            raise StaleEpoch(f"{transfer.request_id}: another stream took over")

    def _check_frame(self, transfer: Transfer, stream: int, frame: PushMessage) -> None:
        self._check_current(transfer, stream)
        if frame.transfer_id != transfer.transfer_id or frame.epoch != transfer.epoch:
            raise BadFrame(f"{transfer.request_id}: a frame of another transfer")
        transfer.touched_s = time.monotonic()
        if self._ledger.is_open(transfer.key):
            self._ledger.touch(transfer.key, self._deadline_s(transfer))

    def _write(self, transfer: Transfer, frame: DataFrame) -> None:
        if transfer.lifecycle.state is not ReceiveState.RECEIVING:
            raise BadFrame(f"{transfer.request_id}: a block after the end")
        transfer.spend(len(frame.payload))
        before = transfer.reassembly.verified_blocks
        accepted = transfer.reassembly.accept(frame)
        block_id = transfer.ticket.block_ids[accepted.block_index]
        self._port.import_kv(block_id, accepted.group, accepted.offset_bytes, accepted.payload)
        self._counters.kv_bytes_received += len(accepted.payload)
        self._counters.kv_blocks_received += transfer.reassembly.verified_blocks - before

    async def _end(self, transfer: Transfer, end: kv.EndFrame) -> kv.Commit:
        if transfer.committing is None:
            here = self._hooks.here()
            transfer.scope.check_end(end)
            tokens = check_end(end, transfer.expected, here, transfer.room_tokens)
            num_blocks = -(-end.num_tokens // here.layout.block_tokens)
            if not transfer.reassembly.is_whole(num_blocks):
                verified = transfer.reassembly.verified_blocks
                raise BadFrame(f"{transfer.request_id}: ended with {verified} of {num_blocks} blocks")
            transfer.lifecycle.move(ReceiveState.VERIFYING)
            transfer.committing = self._spawn(self._commit(transfer, end, tokens))
        return await asyncio.shield(transfer.committing)

    async def _commit(self, transfer: Transfer, end: kv.EndFrame, tokens: tuple[int, ...]) -> kv.Commit:
        request_id, epoch = transfer.request_id, transfer.epoch
        started_s = time.monotonic()
        try:
            await self._reach("import.before_commit")
            # The engine computes while Redis is asked; what it samples waits for the answer and is dropped with a refusal.
            transfer.in_engine = True
            await self._port.call(lambda engine: engine.import_commit(request_id, epoch, tokens, end.num_tokens))
            await self._reach("import.in_engine")
            await self._hooks.commit(request_id, epoch)
            if transfer.ended_by is not None:
                raise transfer.ended_by
            self._hooks.arrived(transfer.arrival(end, tokens, time.monotonic() - started_s))
        except AutanError as error:
            await self._abort(transfer, error)
            raise
        except Exception as error:
            logger.exception("the commit of %s failed", request_id)
            failure = InternalError(f"{request_id}: the commit failed, see the log of {self._hooks.here().instance_id}")
            await self._abort(transfer, failure)
            raise failure from error
        transfer.lifecycle.move(ReceiveState.COMMITTED)
        self._authority.spend(request_id, epoch)
        self._ledger.release(transfer.key)
        transfer.touched_s = time.monotonic()
        return kv.Commit(epoch=epoch, blocks=transfer.num_blocks)

    # -- the end without a commit ---------------------------------------------------------------------------------------

    async def _abort(self, transfer: Transfer, error: AutanError) -> None:
        self._give_back(transfer, error)
        returning = self._returning.get(transfer.request_id)
        if returning is not None:
            await asyncio.shield(returning)

    def _give_back(self, transfer: Transfer, error: AutanError) -> None:
        self._table.remove(transfer)
        if transfer.lifecycle.ended:
            return
        transfer.lifecycle.move(ReceiveState.ABORTED)
        transfer.ended_by = error
        transfer.wake()
        request_id, epoch, decodes = transfer.request_id, transfer.epoch, transfer.in_engine
        dropped = self._port.call(
            lambda engine: engine.import_abort(request_id, epoch) or (decodes and engine.abort(request_id, epoch))
        )
        task = self._spawn(self._returned(transfer, dropped))
        self._returning[request_id] = task
        self._hooks.ended(request_id, epoch, error)

    async def _returned(self, transfer: Transfer, dropped: asyncio.Future[bool]) -> None:
        try:
            await dropped
        except AutanError:
            logger.warning("the engine was gone when %s was given back", transfer.request_id)
        finally:
            self._ledger.release(transfer.key)
            if self._returning.get(transfer.request_id) is asyncio.current_task():
                del self._returning[transfer.request_id]

    def _deadline_s(self, transfer: Transfer) -> float:
        return transfer.touched_s + 2 * self._limits.progress_timeout_s

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()
