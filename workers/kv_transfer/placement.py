"""From a data frame to verified bytes in the pool.

Writes happen on the event loop, in the same step as the check that the transfer is still open, so nothing is ever written into
blocks that were given back. Where the process can look into its pool, the transport writes there itself and the digest is taken
of what lies there; nobody reads a block before all its groups are verified. Packed groups are unpacked on other threads before
they are written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from protos.contract.errors import BadFrame
from workers.engine_api.protocol import KvRoom
from workers.engine_api.types import KvPlace
from workers.kv_transfer.attachment import Attachment
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.push_codec import BlockHead, DataFrame, PushMessage
from workers.kv_transfer.references import References

_TURN_BYTES = 2 * 1024 * 1024  # received in one turn of the event loop: about a millisecond


class Placement:
    """Puts what arrives where it belongs, and counts it."""

    def __init__(self, port: EnginePort, counters: TransferCounters) -> None:
        self._port = port
        self._counters = counters
        self._references = References(port, counters)

    async def place_all(self, at: Attachment, message: PushMessage) -> None:
        """Checks credit, places and digests of the frames of one message of a stream, and writes their bytes; those of a packed
        group with its last frame.

        Raises BadFrame or DigestMismatch, after either of which nothing of the transfer may be used, PeerUnavailable when the
        stream breaks, and what `Attachment.check_current` raises when the transfer ended, or got another stream, meanwhile.
        """
        heads = message.heads
        if not heads:
            return
        if heads[0].pool_bytes:
            await self._references.land(at, heads)
            return
        if at.transfer.lifecycle.state is not ReceiveState.RECEIVING:
            raise BadFrame(f"{at.transfer.request_id}: a block after the end")
        at.stripe.spend(message.payload_bytes)
        room = self._room(at, heads)
        if room is not None:
            await self._receive(at, message, room)
            return
        for frame in await at.frames(message):
            at.check_current()
            await self._place(at, frame)

    def _room(self, at: Attachment, heads: Sequence[BlockHead]) -> KvRoom | None:
        """Where these frames belong in the pool, after a check of all that can be checked before their bytes are here."""
        stripe = at.stripe
        stripe.unpacker.check(heads)
        if not stripe.unpacker.passes_through:
            return None
        stripe.reassembly.check_heads(heads)
        block_ids = at.transfer.ticket.block_ids
        return self._port.import_room(
            tuple([KvPlace(block_ids[index], group, offset, size) for index, group, offset, size, *_ in heads])
        )

    async def _receive(self, at: Attachment, message: PushMessage, room: KvRoom) -> None:
        """Lets the transport write into the pool, and verifies each frame as soon as all of it is there."""
        body, heads, views = message.body, message.heads, list(room.views)
        at_frame = turn_bytes = 0
        while at_frame < len(heads):
            count = body.receive(views, room.write)
            if not count:
                await at.more(body)
                turn_bytes = 0
                continue
            turn_bytes += count
            whole = 0
            while whole < len(views) and count >= views[whole].nbytes:
                count -= views[whole].nbytes
                whole += 1
            for place, head in zip(room.views[at_frame : at_frame + whole], heads[at_frame : at_frame + whole], strict=True):
                at.stripe.reassembly.verify(head, place)
                self._count_block(at, head.block_index)
                self._counters.kv_bytes_received += head.payload_bytes
            at_frame += whole
            del views[:whole]
            if count:
                views[0] = views[0][count:]
            if turn_bytes >= _TURN_BYTES:
                turn_bytes = 0
                await asyncio.sleep(0)
                at.check_current()

    async def _place(self, at: Attachment, frame: DataFrame) -> None:
        """One frame whose bytes are here, in memory of their own."""
        whole = await at.stripe.unpacker.take(frame)
        if whole is not None:
            at.check_current()
            accepted = at.stripe.reassembly.accept(whole)
            block_id = at.transfer.ticket.block_ids[accepted.block_index]
            self._port.import_kv(block_id, accepted.group, accepted.offset_bytes, accepted.payload)
            self._count_block(at, accepted.block_index)
        self._counters.kv_bytes_received += frame.payload.nbytes

    def _count_block(self, at: Attachment, block_index: int) -> None:
        if at.stripe.reassembly.next_block != block_index:
            self._counters.kv_blocks_received += 1
            if at.transfer.is_ending:
                at.transfer.news.ring()
