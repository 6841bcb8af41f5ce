"""Cutting layer groups into frames, and checking frames on arrival.

Frames of a stream travel in one order only: block by block, group by group, offset by offset. So the receiving side needs a
single cursor for each stream, a gap is seen at once, and nothing that a peer claims leads to an allocation.
"""

from __future__ import annotations

import copy
import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import xxhash

from protos.contract.errors import BadFrame, DigestMismatch
from protos.wire import kv
from workers.engine_api.types import KvLayout
from workers.kv_transfer.digest import DIGEST_BYTES, DigestScope
from workers.kv_transfer.push_codec import MAX_PARTS, BlockHead, DataFrame


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

    Bytes of a shared pool do not travel: with them it stands for `pool_limit_bytes` in all, by default for `limit_bytes`.
    `completed` are the blocks whose last frame is in it, or was in one before it.
    """

    limit_bytes: int
    pool_limit_bytes: int = 0
    frames: list[DataFrame] = field(default_factory=list)
    completed: list[int] = field(default_factory=list)
    most_bytes: int = field(init=False)  # what one message stands for at most
    _payload_bytes: int = 0
    _size_bytes: int = 0

    def __post_init__(self) -> None:
        self.most_bytes = max(self.limit_bytes, self.pool_limit_bytes)

    @property
    def full(self) -> bool:
        """True when no frame fits any more."""
        is_full = self._payload_bytes >= self.limit_bytes or self._size_bytes >= self.most_bytes
        return is_full or len(self.frames) == MAX_PARTS

    def offer(self, frame: DataFrame) -> bool:
        """Takes the frame if it fits. One of `split` with the same limit fits into an empty batch; one that names bytes of a
        pool does not fit behind one that carries its own, nor the other way round."""
        carried, frames = frame.payload.nbytes, self.frames
        size = frame.pool_bytes or carried
        if self._payload_bytes + carried > self.limit_bytes or self._size_bytes + size > self.most_bytes:
            return False
        if frames and (len(frames) == MAX_PARTS or (frames[0].pool_bytes > 0) is not (frame.pool_bytes > 0)):
            return False
        frames.append(frame)
        self._payload_bytes += carried
        self._size_bytes += size
        return True

    def take(self) -> tuple[list[DataFrame], list[int]]:
        """The frames and the completed blocks; the batch is empty afterwards."""
        taken = self.frames, self.completed
        self.frames, self.completed, self._payload_bytes, self._size_bytes = [], [], 0, 0
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
        self._sizes = tuple(layout.group_bytes(group) for group in range(layout.num_groups))
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
        payload = frame.payload
        end, last = self._check_bytes(frame, payload.nbytes)
        accepted = Accepted(self._block, self._group, self._offset, payload, last)
        self._take(payload, frame.digest, end)
        return accepted

    def verify(self, head: BlockHead, payload: memoryview) -> None:
        """Takes the bytes of a frame whose head `check_heads` has passed, and moves on.

        Raises DigestMismatch when it ends a group that does not verify; nothing of the transfer may be used then.
        """
        self._take(payload, head.digest, head.offset_bytes + head.payload_bytes)

    def _take(self, payload: memoryview, told: bytes, end: int) -> None:
        """The bytes of the next frame, which was checked: it tells a digest exactly when its group ends with it."""
        digest = self._digest or self._scope.start(self._block, self._group)
        digest.update(payload)
        if told and not hmac.compare_digest(digest.digest(), told):
            raise DigestMismatch(f"block {self._block} group {self._group}: the bytes are not those that were sent")
        self._digest = digest
        self._advance(end, bool(told))

    def check_heads(self, heads: Sequence[BlockHead]) -> None:
        """Raises BadFrame, changing nothing, unless the frames of these heads are exactly the next ones: what `accept` checks
        before it reads a byte."""
        block, group, offset, sizes = self._block, self._group, self._offset, self._sizes
        for head in heads:
            end = offset + head.payload_bytes
            total = sizes[group]
            is_next = (head.block_index, head.layer_group, head.offset_bytes) == (block, group, offset)
            fits = offset < end <= total and len(head.digest) == (DIGEST_BYTES if end == total else 0)
            if not is_next or not fits or block >= self._num_blocks:
                self._refuse(heads)
            offset = end
            if end == total:
                offset, group = 0, group + 1
                if group == len(sizes):
                    block, group = block + self._stride, 0

    def _refuse(self, heads: Sequence[BlockHead]) -> None:
        """Raises what `accept` would raise for the first of these that is not the next one."""
        cursor = copy.copy(self)
        for head in heads:
            cursor._advance(*cursor._check_bytes(head, head.payload_bytes))
        raise AssertionError("frames that accept takes")

    def check_references(self, frames: Sequence[BlockHead]) -> None:
        """Raises BadFrame, changing nothing, unless these are exactly the next frames, a whole layer group each."""
        cursor = copy.copy(self)
        for frame in frames:
            cursor._check_reference(frame)
            cursor._advance(frame.pool_bytes, True)

    def accept_reference(self, frame: BlockHead, digest: bytes) -> None:
        """Moves on by a whole layer group whose copy here has this digest. Raises as `accept` does."""
        self._check_reference(frame)
        if not hmac.compare_digest(digest, frame.digest):
            raise DigestMismatch(
                f"block {self._block} group {self._group}: the bytes in the shared pool are not those that were sent"
            )
        self._advance(frame.pool_bytes, True)

    def digest_of(self, frame: BlockHead, data: memoryview) -> bytes:
        """The digest that this copy of the frame's layer group has. From any thread."""
        return self._scope.of(frame.block_index, frame.layer_group, data)

    def _check_bytes(self, frame: DataFrame | BlockHead, size: int) -> tuple[int, bool]:
        """Where its bytes end in the layer group, and whether the group ends there."""
        self._check_place(frame)
        total = self._sizes[self._group]
        end = self._offset + size
        if not size or end > total:
            raise BadFrame(f"block {self._block} group {self._group}: {size} bytes at {self._offset} of {total}")
        last = end == total
        if len(frame.digest) != (DIGEST_BYTES if last else 0):
            raise BadFrame(f"block {self._block} group {self._group}: digest of {len(frame.digest)} bytes at {end} of {total}")
        return end, last

    def _check_reference(self, frame: BlockHead) -> None:
        self._check_place(frame)
        total = self._sizes[self._group]
        if frame.offset_bytes or frame.pool_bytes != total or len(frame.digest) != DIGEST_BYTES:
            raise BadFrame(
                f"block {self._block} group {self._group}: a reference to {frame.pool_bytes} bytes at {frame.offset_bytes} "
                f"with a digest of {len(frame.digest)}; it must name all {total} bytes with their digest"
            )

    def _check_place(self, frame: DataFrame | BlockHead) -> None:
        if self.complete:
            raise BadFrame(f"block {frame.block_index}: all {self._num_blocks} blocks are here already")
        place = (frame.block_index, frame.layer_group, frame.offset_bytes)
        wanted = (self._block, self._group, self._offset)
        if place != wanted:
            raise BadFrame(f"frame (block, group, offset) {place} where {wanted} must come next")

    def _advance(self, end: int, last: bool) -> None:
        if not last:
            self._offset = end
            return
        self._offset, self._digest = 0, None
        self._group += 1
        if self._group == len(self._sizes):
            self._block, self._group = self._block + self._stride, 0
