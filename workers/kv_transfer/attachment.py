"""One Push stream at its place in a transfer: what it may bring, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from protos.contract.errors import BadFrame, PeerUnavailable, StaleEpoch
from workers.kv_transfer.body import Body
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.push_codec import DataFrame, PushMessage
from workers.kv_transfer.stripe import Stripe
from workers.kv_transfer.transfer import Transfer, TransferTable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attachment:
    """A stream that brings the blocks of one stripe. `number` is the stripe's when this stream was attached."""

    transfer: Transfer
    stripe: Stripe
    number: int

    @property
    def is_current(self) -> bool:
        """False when another stream has this place, or an open has begun since."""
        return self.stripe.attachment == self.number

    def check_current(self) -> None:
        """Raises what ended the transfer, or StaleEpoch when another stream took over."""
        if self.transfer.ended_by is not None:
            raise self.transfer.ended_by
        if not self.is_current:
            raise StaleEpoch(f"{self.transfer.request_id}: another stream took over")

    def check_frame(self, frame: PushMessage) -> None:
        """Raises BadFrame when a frame does not belong to this stream, and what `check_current` raises."""
        self.check_current()
        transfer = self.transfer
        if frame.transfer_id != transfer.transfer_id or frame.epoch != transfer.epoch:
            raise BadFrame(f"{transfer.request_id}: a frame of another transfer")
        if frame.stream != self.stripe.number:
            raise BadFrame(f"{transfer.request_id}: a frame of stream {frame.stream} on stream {self.stripe.number}")

    async def next(self, frames: AsyncIterator[PushMessage]) -> PushMessage | None:
        """The next frame; none when the end came on another stream and the commit is on its way.

        Raises PeerUnavailable when the stream ends, and what `check_current` raises, in the middle of waiting too.
        """
        self.check_current()
        if self._is_over:
            return None
        try:
            return await self._unless_woken(anext(frames))
        except StopAsyncIteration:
            raise PeerUnavailable(f"{self.transfer.request_id}: the stream ended before the end frame") from None
        except TimeoutError:
            self.check_current()
            assert self._is_over, self.transfer.lifecycle.state
            return None

    async def more(self, body: Body) -> None:
        """Waits for bytes of the payload that is coming. Raises PeerUnavailable when the stream broke, and what `check_current`
        raises, in the middle of waiting too."""
        self.check_current()
        with suppress(TimeoutError):
            await self._unless_woken(body.more())
        self.check_current()

    async def frames(self, message: PushMessage) -> list[DataFrame]:
        """The data frames of a message with their payloads, in memory of their own. Raises as `more` does, and BadFrame when
        the commit is on its way without them."""
        try:
            return await self._unless_woken(message.frames())
        except TimeoutError:
            self.check_current()
            raise BadFrame(f"{self.transfer.request_id}: a block after the end") from None

    async def _unless_woken(self, awaitable: Awaitable[T]) -> T:
        """Raises TimeoutError when the stripe is woken meanwhile."""
        waiting = asyncio.timeout(None)
        try:
            async with waiting:
                self.stripe.waiting = waiting
                return await awaitable
        finally:
            if self.stripe.waiting is waiting:
                self.stripe.waiting = None

    def detach(self) -> None:
        """The stream is gone; without any stream the transfer waits for another open."""
        self.stripe.detach(self.number)
        if self.transfer.lifecycle.state is ReceiveState.RECEIVING and not self.transfer.is_attached:
            self.transfer.lifecycle.move(ReceiveState.OPEN)

    @property
    def _is_over(self) -> bool:
        return self.stripe.is_attached and self.transfer.committing is not None


def attach(table: TransferTable, frame: PushMessage) -> Attachment:
    """The place of a stream, by its first frame.

    Raises StaleEpoch when there is no such transfer or the place is taken, BadFrame when no such stream was granted; the
    transfer goes on. A committed transfer takes any stream, to tell it of the commit.
    """
    transfer = table.of_id(frame.transfer_id)
    if transfer is None or transfer.epoch != frame.epoch:
        raise StaleEpoch(f"no transfer of that id is open at epoch {frame.epoch}")
    if frame.stream >= len(transfer.stripes):
        raise BadFrame(f"{transfer.request_id}: stream {frame.stream} of {len(transfer.stripes)}")
    stripe = transfer.stripes[frame.stream]
    state = transfer.lifecycle.state
    if state is ReceiveState.COMMITTED:
        return Attachment(transfer, stripe, stripe.attachment)
    if state not in (ReceiveState.OPEN, ReceiveState.RECEIVING) or stripe.is_attached:
        raise StaleEpoch(f"{transfer.request_id}: another stream is attached")
    if state is ReceiveState.OPEN:
        transfer.lifecycle.move(ReceiveState.RECEIVING)
    return Attachment(transfer, stripe, stripe.attach())
