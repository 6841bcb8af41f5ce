"""From references into a shared pool to verified bytes in the own one.

Bytes are copied on the event loop, in the same step as the check that the transfer is still open, so nothing is ever written
into blocks that were given back. Digests are taken of the copy while it is in the processor's cache, never of the shared bytes,
which may change between a check and a use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from protos.contract.errors import BadFrame
from workers.kv_transfer.attachment import Attachment
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.push_codec import BlockHead
from workers.kv_transfer.transfer import Transfer

_TURN_BYTES = 2 * 1024 * 1024  # copied and digested in one turn of the event loop: less than a millisecond


class References:
    """Lands the references of one message at a time."""

    def __init__(self, port: EnginePort, counters: TransferCounters) -> None:
        self._port = port
        self._counters = counters
        self._in_place = True  # the engine shows what was written

    async def land(self, at: Attachment, frames: Sequence[BlockHead]) -> None:
        """Checks credit and place of all frames, then copies, verifies and counts their bytes one after another.

        Raises what `at.check_current` raises when the transfer ends or another stream takes over meanwhile: nothing more is
        written or counted then. Raises BadFrame, having written nothing, for a frame that is not exactly the next or names
        bytes outside of the pool, and DigestMismatch; after either nothing of the transfer may be used.
        """
        transfer, reassembly = at.transfer, at.stripe.reassembly
        if transfer.lifecycle.state is not ReceiveState.RECEIVING:
            raise BadFrame(f"{transfer.request_id}: a block after the end")
        pool = transfer.pool
        if pool is None:
            raise BadFrame(f"{transfer.request_id}: a frame names bytes of a shared pool, and none was agreed on")
        at.stripe.spend(sum(frame.pool_bytes for frame in frames))
        reassembly.check_references(frames)
        sources = [pool.view(frame.pool_offset, frame.pool_bytes) for frame in frames]
        turn_bytes = 0
        for frame, source in zip(frames, sources, strict=True):
            if turn_bytes >= _TURN_BYTES:
                turn_bytes = 0
                await asyncio.sleep(0)
                at.check_current()
            turn_bytes += frame.pool_bytes
            copied = self._copy(transfer, frame, source)
            reassembly.accept_reference(frame, reassembly.digest_of(frame, copied))
            self._count(at, frame)

    def _copy(self, transfer: Transfer, frame: BlockHead, source: memoryview) -> memoryview:
        """A copy that no other process can change; the same bytes are in the pool."""
        block_id = transfer.ticket.block_ids[frame.block_index]
        if self._in_place:
            written = self._port.import_kv(block_id, frame.layer_group, 0, source)
            if written is not None:
                return written
            self._in_place = False
        own = memoryview(bytes(source))
        self._port.import_kv(block_id, frame.layer_group, 0, own)
        return own

    def _count(self, at: Attachment, frame: BlockHead) -> None:
        self._counters.kv_bytes_received += frame.pool_bytes
        self._counters.kv_bytes_mapped += frame.pool_bytes
        if at.stripe.reassembly.next_block != frame.block_index:
            self._counters.kv_blocks_received += 1
            if at.transfer.is_ending:
                at.transfer.news.ring()
