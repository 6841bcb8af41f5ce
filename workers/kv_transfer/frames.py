"""Cutting layer groups into frames, and checking frames on arrival.

Frames of a stream travel in one order only: block by block, group by group, offset by offset. So the receiving side needs a
single cursor for each stream, a gap is seen at once, and nothing that a peer claims leads to an allocation.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from dataclasses import dataclass, field

import xxhash

from protos.contract.errors import BadFrame, DigestMismatch
from protos.wire import kv
from workers.engine_api.types import KvLayout
from workers.kv_transfer.digest import DIGEST_BYTES, DigestScope
from workers.kv_transfer.push_codec import MAX_PARTS, DataFrame


def split(
    block_index: int, group: int, data: memoryview, digest: bytes, frame_bytes: int, encoding: int = kv.KV_ENCODING_NONE
) -> Iterator[DataFrame]:
    """The frames of one layer group, in order; the digest is in the last one. A payload is a view of at most `frame_bytes`."""
    view = data.cast("B") if data.format != "B" or data.ndim != 1 else data
    total = len(view)
    for offset in range(0, total, frame_bytes):
        payload = view[offset : offset + frame_bytes]
        last = offset + len(payload) == total
        yield DataFrame(
            block_index=block_index,
            layer_group=group,
            offset_bytes=offset,
            payload=payload,
            digest=digest if last else b"",
            encoding=encoding,
        )


@dataclass(slots=True)
class Batch:
    """Data frames that will travel in one message: at most `limit_bytes` of payload and MAX_PARTS of them.

    `completed` are the blocks whose last frame is in it, or was in one before it.
    """

    limit_bytes: int
    frames: list[DataFrame] = field(default_factory=list)
    completed: list[int] = field(default_factory=list)
    _size_bytes: int = 0

    @property
    def full(self) -> bool:
        """True when no frame fits any more."""
        return self._size_bytes >= self.limit_bytes or len(self.frames) == MAX_PARTS

    def has_room(self, frame: DataFrame) -> bool:
        """True when this frame fits. A frame of `split` with the same limit fits into an empty batch."""
        return self._size_bytes + frame.payload.nbytes <= self.limit_bytes and len(self.frames) < MAX_PARTS

    def add(self, frame: DataFrame) -> None:
        """Takes a frame for which there is room."""
        assert self.has_room(frame), (self._size_bytes, frame.payload.nbytes)
        self.frames.append(frame)
        self._size_bytes += frame.payload.nbytes

    def take(self) -> tuple[list[DataFrame], list[int]]:
        """The frames and the completed blocks; the batch is empty afterwards."""
        taken = self.frames, self.completed
        self.frames, self.completed, self._size_bytes = [], [], 0
        return taken


@dataclass(frozen=True, slots=True)
class Accepted:
    """A frame that is in its place: write `payload` at `offset_bytes`; `group_done` when its group verified with it."""

    block_index: int
    group: int
    offset_bytes: int
    payload: memoryview
    group_done: bool


class Reassembly:
    """The cursor of one stream: which bytes must come next, and the running digest of the group they belong to.

    Its blocks are `first_block` and every `stride`-th one after it.
    """

    def __init__(self, layout: KvLayout, scope: DigestScope, first_block: int, num_blocks: int, stride: int = 1) -> None:
        self._layout = layout
        self._scope = scope
        self._num_blocks = num_blocks
        self._stride = stride
        self._block = first_block
        self._group = 0
        self._offset = 0
        self._digest: xxhash.xxh3_128 | None = None

    @property
    def next_block(self) -> int:
        """The block that must come next, or is coming: all of this stream below it are verified."""
        return self._block

    @property
    def verified_blocks(self) -> int:
        """Of the only stream of a transfer: leading blocks all of whose groups are verified, or were there before."""
        return self._block

    @property
    def complete(self) -> bool:
        """True when every block is verified that there is room for."""
        return self._block >= self._num_blocks

    def is_whole(self, num_blocks: int) -> bool:
        """True when of the first `num_blocks` blocks all of this stream are verified, and nothing beyond them came."""
        return num_blocks <= self._block < num_blocks + self._stride and not self._group and not self._offset

    def is_beyond(self, num_blocks: int) -> bool:
        """True when something came that is not of the first `num_blocks` blocks."""
        return self._block >= num_blocks and not self.is_whole(num_blocks)

    def rewind(self) -> None:
        """Forgets what came of the block that is not complete: the sender starts again with it."""
        self._group, self._offset, self._digest = 0, 0, None

    def accept(self, frame: DataFrame) -> Accepted:
        """Checks one frame and moves on.

        Raises BadFrame when it is not exactly the next one, DigestMismatch when it ends a group that does not verify.
        After either, nothing of the transfer may be used.
        """
        if self.complete:
            raise BadFrame(f"block {frame.block_index}: all {self._num_blocks} blocks are here already")
        place = (frame.block_index, frame.layer_group, frame.offset_bytes)
        wanted = (self._block, self._group, self._offset)
        if place != wanted:
            raise BadFrame(f"frame (block, group, offset) {place} where {wanted} must come next")
        payload = frame.payload
        total = self._layout.group_bytes(self._group)
        end = self._offset + len(payload)
        if not payload or end > total:
            raise BadFrame(f"block {self._block} group {self._group}: {len(payload)} bytes at {self._offset} of {total}")
        last = end == total
        if len(frame.digest) != (DIGEST_BYTES if last else 0):
            raise BadFrame(f"block {self._block} group {self._group}: digest of {len(frame.digest)} bytes at {end} of {total}")
        if self._digest is None:
            self._digest = self._scope.start(self._block, self._group)
        self._digest.update(payload)
        if last and not hmac.compare_digest(self._digest.digest(), frame.digest):
            raise DigestMismatch(f"block {self._block} group {self._group}: the bytes are not those that were sent")
        accepted = Accepted(self._block, self._group, self._offset, payload, last)
        self._advance(end, last)
        return accepted

    def _advance(self, end: int, last: bool) -> None:
        if not last:
            self._offset = end
            return
        self._offset, self._digest = 0, None
        self._group += 1
        if self._group == self._layout.num_groups:
            self._block, self._group = self._block + self._stride, 0
