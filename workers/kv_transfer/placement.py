"""From a data frame to verified bytes in the pool.

Writes happen on the event loop, in the same step as the check that the transfer is still open, so nothing is ever written into
blocks that were given back. Packed groups are unpacked on other threads before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from protos.contract.errors import BadFrame
from workers.kv_transfer.attachment import Attachment
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.push_codec import DataFrame
from workers.kv_transfer.references import References
from workers.kv_transfer.stripe import Stripe
from workers.kv_transfer.transfer import Transfer


class Placement:
    """Puts what arrives where it belongs, and counts it."""

    def __init__(self, port: EnginePort, counters: TransferCounters) -> None:
        self._port = port
        self._counters = counters
        self._references = References(port, counters)

    async def place_all(self, at: Attachment, frames: Sequence[DataFrame]) -> None:
        """The frames of one message, in order: those with bytes at once, those that name bytes of a shared pool in turns.

        Raises as `place` and `References.land` do.
        """
        for is_reference, run in groupby(frames, key=lambda frame: frame.pool_bytes > 0):
            if is_reference:
                await self._references.land(at, tuple(run))
                continue
            for frame in run:
                await self.place(at, frame)

    async def place(self, at: Attachment, frame: DataFrame) -> None:
        """Checks credit, place and digest of one frame of a stream and writes its bytes; those of a packed group with its last
        frame.

        Raises BadFrame or DigestMismatch, after either of which nothing of the transfer may be used, and what
        `Attachment.check_current` raises when the transfer ended, or got another stream, while a group was unpacked.
        """
        transfer, stripe = at.transfer, at.stripe
        if transfer.lifecycle.state is not ReceiveState.RECEIVING:
            raise BadFrame(f"{transfer.request_id}: a block after the end")
        stripe.spend(len(frame.payload))
        whole = await stripe.unpacker.take(frame)
        if whole is not None:
            at.check_current()
            self._write(transfer, stripe, whole)
        self._counters.kv_bytes_received += len(frame.payload)

    def _write(self, transfer: Transfer, stripe: Stripe, frame: DataFrame) -> None:
        accepted = stripe.reassembly.accept(frame)
        block_id = transfer.ticket.block_ids[accepted.block_index]
        self._port.import_kv(block_id, accepted.group, accepted.offset_bytes, accepted.payload)
        if stripe.reassembly.next_block != accepted.block_index:
            self._counters.kv_blocks_received += 1
            if transfer.is_ending:
                transfer.news.ring()
