"""The receiving side of hand-offs: the logic of the KvTransfer service, independent of Redis and of the transport.

A block counts when all its layer groups are verified; the sequence decodes when all blocks count and Redis has this instance
as the holder; everything else ends with the blocks back in the pool. Writes into the pool happen on the event loop, in the
same step as the check that the transfer is still open, so nothing is ever written into blocks that were given back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from protos.contract.errors import (
    AutanError,
    AuthError,
    BadFrame,
    FenceError,
    HandoffTimeout,
    PeerUnavailable,
)
from protos.wire import error_to_wire, kv
from workers.kv_transfer.attachment import Attachment, attach
from workers.kv_transfer.authority import Authority, StoreClock
from workers.kv_transfer.claims import check_addressee
from workers.kv_transfer.commitment import Commitments
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.encodings import Compression
from workers.kv_transfer.hooks import ReceiveLimits, ReceiverHooks
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.placement import Placement
from workers.kv_transfer.pool_mappings import Mapped, PoolMappings
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.push_codec import PushMessage
from workers.kv_transfer.reservation import Reservations
from workers.kv_transfer.returns import ReceiverTasks, Returns
from workers.kv_transfer.transfer import Transfer, TransferTable

logger = logging.getLogger(__name__)


async def _pass(point: str) -> None:
    del point


class Receiver:
    """All incoming transfers of one process. Kinds of transfers differ in the three classes that begin and end them."""

    reservations: type[Reservations] = Reservations
    commitments: type[Commitments] = Commitments
    returns: type[Returns] = Returns

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
        compression: Compression = "none",
    ) -> None:
        self._reach = reach
        self._hooks = hooks
        self._ledger = ledger
        self._counters = counters
        self._limits = limits
        self._authority = authority or Authority(None, StoreClock())
        self._table = TransferTable()
        self._pools = PoolMappings(enabled=limits.shared_memory, idle_s=limits.remember_s)
        self._tasks = ReceiverTasks()
        self._placement = Placement(port, counters)
        self._returns = self.returns(port, hooks, ledger, self._table, self._tasks)
        self._reservations = self.reservations(
            port=port,
            hooks=hooks,
            ledger=ledger,
            limits=limits,
            table=self._table,
            returns=self._returns,
            compression=compression,
        )
        self._commitments = self.commitments(
            port=port,
            hooks=hooks,
            ledger=ledger,
            authority=self._authority,
            reach=self._pass_by,
            progress_timeout_s=limits.progress_timeout_s,
            returns=self._returns,
            tasks=self._tasks,
        )

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
            pool = self._map(claim)
            reply = await asyncio.shield(self._tasks.spawn(self._reservations.open(claim, here)))
            return self._with_pool(reply, pool)
        except AuthError as error:
            logger.warning("an open of %.64r from %.64r is refused: %s", claim.request_id, claim.source_instance, error)
            raise
        except FenceError:
            self._counters.stale_refused += 1
            raise

    async def push(self, frames: AsyncIterator[PushMessage]) -> AsyncIterator[kv.PushReply]:
        """Takes the frames of one stream until the end frame, here or on another stream. The last reply is the commit or the
        refusal.

        A refused transfer keeps nothing, unless its stream just ended: then it can be opened again until it times out.
        """
        at: Attachment | None = None
        try:
            first = await self._first(frames)
            at = attach(self._table, first)
            frame: PushMessage | None = first
            while frame is not None:
                at.check_frame(frame)
                self._touch(at.transfer)
                if frame.end is not None:
                    yield kv.PushReply(commit=await self._commitments.end(at, frame.end))
                    return
                await self._placement.place_all(at, frame)
                if frame.heads:
                    credit = at.stripe.regrant()
                    if credit:
                        yield kv.PushReply(credit_bytes=credit)
                frame = await at.next(frames)
            yield kv.PushReply(commit=await self._commitments.of(at.transfer))
        except PeerUnavailable as error:
            # A connection that breaks may look like an end of the stream: the transfer waits for another open.
            yield kv.PushReply(refused=error_to_wire(error))
        except AutanError as error:
            self._counters.stale_refused += isinstance(error, FenceError)
            if at is not None and at.is_current:
                await self._returns.abort(at.transfer, error)
            yield kv.PushReply(refused=error_to_wire(error))
        finally:
            if at is not None:
                at.detach()

    async def close(self, message: kv.CloseRequest) -> None:
        """Ends an open transfer. Unknown, committed and committing transfers are left as they are."""
        transfer = self._table.of_id(message.transfer_id)
        if transfer is None or (transfer.request_id, transfer.epoch) != (message.request_id, message.epoch):
            return
        if transfer.lifecycle.state in (ReceiveState.OPEN, ReceiveState.RECEIVING):
            await self._returns.abort(transfer, HandoffTimeout(f"{transfer.request_id}: closed by the sender"))
            self._authority.spend(transfer.request_id, transfer.epoch)

    # -- from the rest of the process -----------------------------------------------------------------------------------

    def abort_request(self, request_id: str, up_to_epoch: int, error: AutanError) -> None:
        """Ends the transfer of a request that is no longer expected, if its epoch is at most `up_to_epoch`."""
        transfer = self._table.of_request(request_id)
        if transfer is not None and transfer.epoch <= up_to_epoch:
            self._returns.give_back(transfer, error)

    def abort_all(self, error: AutanError) -> None:
        """Ends every transfer and forgets the committed ones."""
        for transfer in self._table.all():
            self._returns.give_back(transfer, error)

    async def run(self) -> None:
        """Ends transfers that make no progress and forgets committed ones in time. Until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._limits.progress_timeout_s / 8))
            now_s = time.monotonic()
            self._pools.forget_idle(now_s)
            for transfer in self._table.all():
                idle_s = now_s - transfer.touched_s
                if transfer.lifecycle.state is ReceiveState.COMMITTED:
                    transfer.pool = None
                    if idle_s > self._limits.remember_s:
                        self._table.remove(transfer)
                elif transfer.lifecycle.state is not ReceiveState.VERIFYING and idle_s > self._limits.progress_timeout_s:
                    self._returns.give_back(transfer, HandoffTimeout(f"{transfer.request_id}: no frame for {idle_s:.1f} s"))

    async def settle(self) -> None:
        """Waits until everything under way inside the receiver is over."""
        await self._tasks.settle()

    def _map(self, claim: kv.OpenRequest) -> Mapped | None:
        """The answer to the pool that the sender offers, None when it offers none."""
        if not claim.HasField("shared_pool"):
            return None
        mapped = self._pools.answer(claim.shared_pool)
        if mapped[0] is not None:
            claim.streams = 1  # references are small: what limits them is the event loop, which all streams share
            del claim.offer.encodings[:]  # and nothing is packed
        return mapped

    def _with_pool(self, reply: kv.OpenReply, mapped: Mapped | None) -> kv.OpenReply:
        """The reply with that answer. An earlier one for the same transfer is over."""
        transfer = self._table.of_id(reply.transfer_id)
        if transfer is not None:
            transfer.pool = None
            if mapped is not None:
                transfer.pool, answer = mapped
                reply.shared_pool.CopyFrom(answer)
        return reply

    # -- push -----------------------------------------------------------------------------------------------------------

    async def _first(self, frames: AsyncIterator[PushMessage]) -> PushMessage:
        try:
            async with asyncio.timeout(self._limits.progress_timeout_s):
                return await anext(frames)
        except StopAsyncIteration:
            raise BadFrame("an empty stream") from None
        except TimeoutError:
            raise HandoffTimeout("no first frame") from None

    async def _pass_by(self, point: str) -> None:
        await self._reach(point)

    def _touch(self, transfer: Transfer) -> None:
        transfer.touched_s = time.monotonic()
        if transfer.touched_s < transfer.booked_s + self._limits.progress_timeout_s / 16:
            return  # the deadline in the ledger is some of these later than an entry may be idle
        transfer.booked_s = transfer.touched_s
        if self._ledger.is_open(transfer.key):
            self._ledger.touch(transfer.key, self._limits.deadline_s(transfer.touched_s))
