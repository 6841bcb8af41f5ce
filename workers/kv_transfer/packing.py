"""Packing layer groups on their way out, and unpacking them as they arrive, beside the event loop.

A packed group travels as a group that is not packed does: in frames, in order, with a digest in the last one. The receiver
gathers it, no further than its longest packed form, unpacks it on another thread and passes it on as one frame of the group's
own bytes, which then takes the way of every frame: its place is checked, its digest compared, its bytes written.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from protos.contract.errors import BadFrame, DigestMismatch
from workers.engine_api.types import KvLayout
from workers.kv_transfer.digest import DIGEST_BYTES, DigestScope
from workers.kv_transfer.encodings import Encoding, codec_of
from workers.kv_transfer.push_codec import BlockHead, DataFrame

MAX_GATHERED = 16  # groups of one transfer that have begun to arrive


class GroupPacker:
    """The sending side of one hand-off. `scope` is that of the digests over the groups' own bytes."""

    def __init__(self, encoding: Encoding, layout: KvLayout, scope: DigestScope) -> None:
        self.encoding = encoding
        self._codec = codec_of(encoding, layout)
        self._scope = scope
        self._packed_scope = scope.packed(encoding.name)

    @property
    def passes_through(self) -> bool:
        """True where nothing is packed."""
        return self._codec is None

    async def pack(self, block_index: int, group: int, data: memoryview) -> tuple[memoryview, bytes]:
        """What travels of a layer group, and its digest. `data` may be read until this returns, or is cancelled, and a
        moment longer."""
        if self._codec is None:
            return data, self._scope.of(block_index, group, data)
        return await asyncio.to_thread(self._pack, block_index, group, data)

    def _pack(self, block_index: int, group: int, data: memoryview) -> tuple[memoryview, bytes]:
        assert self._codec is not None
        packed = memoryview(self._codec.pack(data))
        if self.encoding.is_exact:
            return packed, self._scope.of(block_index, group, data)
        return packed, self._packed_scope.of(block_index, group, packed)


class GroupUnpacker:
    """The receiving side of one transfer."""

    def __init__(self, encoding: Encoding, layout: KvLayout, scope: DigestScope) -> None:
        self.encoding = encoding
        self._codec = codec_of(encoding, layout)
        self._layout = layout
        self._scope = scope
        self._packed_scope = scope.packed(encoding.name)
        self._gathered: dict[tuple[int, int], bytearray] = {}

    @property
    def passes_through(self) -> bool:
        """True where nothing is packed: the bytes that come are those of the groups."""
        return self._codec is None

    def rewind(self) -> None:
        """Forgets groups that are not whole: the sender starts again with them."""
        self._gathered.clear()

    def check(self, frames: Sequence[BlockHead | DataFrame]) -> None:
        """Raises BadFrame for a frame of another encoding."""
        wanted = self.encoding.value
        for frame in frames:
            if frame.encoding != wanted:
                raise BadFrame(f"{_place(frame)}: encoding {frame.encoding}, this transfer has {self.encoding.name}")

    async def take(self, frame: DataFrame) -> DataFrame | None:
        """The frame itself where nothing is packed. Otherwise the whole group as one frame, once its last frame is here.

        Raises BadFrame for a frame of another encoding, or that is not the next of its group, and DigestMismatch for a group
        that does not unpack, or whose packed bytes are not those that were sent. Other frames may be taken meanwhile.
        """
        self.check((frame,))
        if self._codec is None:
            return frame
        packed = self._gather(frame, self._codec.most_bytes(self._raw_bytes(frame)))
        return None if packed is None else await asyncio.to_thread(self._unpack, frame, packed)

    def _raw_bytes(self, frame: DataFrame) -> int:
        try:
            return self._layout.group_bytes(frame.layer_group)
        except IndexError as error:
            raise BadFrame(str(error)) from error

    def _gather(self, frame: DataFrame, most_bytes: int) -> memoryview | None:
        """The packed group when this frame is its last one. One that comes in one frame is not copied."""
        place = (frame.block_index, frame.layer_group)
        known = self._gathered.get(place, b"")
        size = len(known) + frame.payload.nbytes
        if frame.offset_bytes != len(known) or not frame.payload or size > most_bytes:
            raise BadFrame(
                f"{_place(frame)}: {frame.payload.nbytes} packed bytes at {frame.offset_bytes}, "
                f"{len(known)} are here and {most_bytes} may come"
            )
        if len(frame.digest) not in (0, DIGEST_BYTES):
            raise BadFrame(f"{_place(frame)}: digest of {len(frame.digest)} bytes")
        if frame.digest and not known:
            return frame.payload
        if not known and len(self._gathered) == MAX_GATHERED:
            raise BadFrame(f"{_place(frame)}: {MAX_GATHERED} packed groups have begun and are not whole")
        gathered = self._gathered.setdefault(place, bytearray())
        gathered += frame.payload
        if not frame.digest:
            return None
        return memoryview(self._gathered.pop(place)).toreadonly()

    def _unpack(self, last: DataFrame, packed: memoryview) -> DataFrame:
        assert self._codec is not None
        index, group, digest = last.block_index, last.layer_group, last.digest
        if not self.encoding.is_exact and not hmac.compare_digest(self._packed_scope.of(index, group, packed), digest):
            raise DigestMismatch(f"{_place(last)}: the packed bytes are not those that were sent")
        try:
            raw = self._codec.unpack(packed, self._layout.group_bytes(group))
        except ValueError as error:
            # Changed bytes may not unpack. Bytes that are known to be the sender's do not because the sender is wrong.
            kind = DigestMismatch if self.encoding.is_exact else BadFrame
            raise kind(f"{_place(last)}: {error}") from error
        if not self.encoding.is_exact:
            digest = self._scope.of(index, group, raw)
        return DataFrame(index, group, 0, raw, digest)


def _place(frame: BlockHead | DataFrame) -> str:
    return f"block {frame.block_index} group {frame.layer_group}"
