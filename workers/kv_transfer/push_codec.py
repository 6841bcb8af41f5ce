"""Push messages as bytes. The wire is that of `PushFrame` in kv.proto, whose payload comes last.

A message is a small head and its payload: it is made as a list of pieces, which a transport joins or writes one after
another. What arrives is read in the same two parts, so the payload can be received into its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from protos.wire import kv
from workers.kv_transfer.body import Body, MemoryBody

MAX_PARTS = 64  # data frames in one message
_MAX_FIELDS = 16  # of one message; ours have six at most
_MAX_PART_BYTES = 128  # of one head on the wire; ours have 64 at most
_MAX_VARINT_BYTES = 10
_VARINT, _BYTES = 0, 2
_BLOCKS = kv.PushFrame.DESCRIPTOR.fields_by_name["blocks"].number
_PAYLOAD = kv.PushFrame.DESCRIPTOR.fields_by_name["payload"].number
_EMPTY = memoryview(b"")
_NOTHING = MemoryBody(_EMPTY)


class DataFrame(NamedTuple):
    """Part of one layer group; `digest` is that of the whole group, in its last frame only. `payload` is bytes `[n]`.

    With `pool_bytes` the payload is empty: the bytes of the whole group are at `pool_offset` of the pool that was agreed on.
    """

    block_index: int
    layer_group: int
    offset_bytes: int
    payload: memoryview
    digest: bytes
    encoding: int = kv.KV_ENCODING_NONE
    pool_offset: int = 0
    pool_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes that this frame stands for: those that it carries, or those that it names."""
        return self.pool_bytes or self.payload.nbytes


class BlockHead(NamedTuple):
    """What is said of a data frame before its payload comes."""

    block_index: int
    layer_group: int
    offset_bytes: int
    payload_bytes: int
    digest: bytes
    encoding: int = kv.KV_ENCODING_NONE
    pool_offset: int = 0
    pool_bytes: int = 0

    def with_payload(self, payload: memoryview) -> DataFrame:
        """The data frame."""
        return DataFrame(
            self.block_index,
            self.layer_group,
            self.offset_bytes,
            payload,
            self.digest,
            self.encoding,
            self.pool_offset,
            self.pool_bytes,
        )


@dataclass(frozen=True, slots=True)
class PushMessage:
    """One message of a Push stream: data frames, in order, or the end; neither is a sign of life.

    `body` brings the payloads of all data frames, one after another; it has nothing else.
    """

    transfer_id: str
    epoch: int
    heads: tuple[BlockHead, ...] = ()
    end: kv.EndFrame | None = None
    stream: int = 0
    body: Body = _NOTHING
    payload_bytes: int = 0  # of all data frames

    async def frames(self) -> list[DataFrame]:
        """The data frames with their payloads, in memory of their own. Once. Raises PeerUnavailable."""
        payload = await self.body.whole() if self.payload_bytes else _EMPTY
        found, at = [], 0
        for head in self.heads:
            found.append(head.with_payload(payload[at : at + head.payload_bytes]))
            at += head.payload_bytes
        return found


def encode_data(transfer_id: str, epoch: int, frames: Sequence[DataFrame], stream: int = 0) -> bytes:
    """The message of 1 to `MAX_PARTS` data frames. Each payload is copied once, into the result."""
    return b"".join(data_pieces(transfer_id, epoch, frames, stream))


def data_pieces(transfer_id: str, epoch: int, frames: Sequence[DataFrame], stream: int = 0) -> list[bytes | memoryview]:
    """The same message in pieces: the head, then the payloads, which are not copied."""
    assert 1 <= len(frames) <= MAX_PARTS, len(frames)
    message = kv.PushFrame(transfer_id=transfer_id, epoch=epoch, stream=stream)
    parts, size = message.blocks.parts, 0
    for index, group, offset, payload, digest, encoding, pool_offset, pool_bytes in frames:
        if pool_bytes:
            parts.add(block_index=index, layer_group=group, digest=digest, pool_offset=pool_offset, pool_bytes=pool_bytes)
            continue
        size += payload.nbytes
        part = parts.add(block_index=index, layer_group=group, offset_bytes=offset, payload_bytes=payload.nbytes, digest=digest)
        if encoding:
            part.encoding = cast("kv.KvEncoding", encoding)
    head = message.SerializeToString()
    if not size:
        return [head]
    return [head + _field_head(_PAYLOAD, size), *(frame.payload for frame in frames)]


def encode_other(transfer_id: str, epoch: int, end: kv.EndFrame | None = None, stream: int = 0) -> bytes:
    """The message of the end frame, or of a sign of life."""
    return kv.PushFrame(transfer_id=transfer_id, epoch=epoch, end=end, stream=stream).SerializeToString()


class HeadScan:
    """Divides one message of `size_bytes`, as its beginning becomes known: `measure` until it gives a size, then `decode`."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._fields_end = self._payload_bytes = 0

    def measure(self, begin: memoryview) -> int | None:
        """How much of the message precedes the bytes of its payload; None while that is not seen.

        Without a payload it is the whole message. Malformed ones have some head that `decode` refuses.
        """
        at, known = 0, len(begin)
        for _ in range(_MAX_FIELDS):
            if at == self._size_bytes:
                self._fields_end, self._payload_bytes = at, 0
                return at
            field_at = at
            tag, at = _varint(begin, at, known)
            value, at = _varint(begin, at, known)
            if at < 0:
                break
            kind = tag & 7
            if kind == _BYTES:
                if tag >> 3 == _PAYLOAD:
                    self._fields_end, self._payload_bytes = field_at, value
                    return at
                if tag >> 3 == _BLOCKS and value > MAX_PARTS * _MAX_PART_BYTES:
                    break
                at += value
            elif kind != _VARINT:
                break
            if at > known:
                break
        if known < self._size_bytes:
            return None
        self._fields_end, self._payload_bytes = known, -1
        return known

    def decode(self, head: memoryview, body: Body) -> PushMessage:
        """The message of a head that was measured; `body` brings what follows it.

        Raises ValueError, or DecodeError, for anything malformed.
        """
        follow = self._size_bytes - len(head)
        if self._payload_bytes != follow:
            raise ValueError(
                f"{follow} bytes follow the fields of {len(head)}: a payload must be the last one and end the message"
            )
        message = kv.PushFrame.FromString(bytes(head[: self._fields_end]))
        has_end = message.HasField("end")
        if has_end and message.HasField("blocks"):
            raise ValueError("blocks beside the end")
        heads = _heads(message.blocks, follow)
        end = message.end if has_end else None
        return PushMessage(message.transfer_id, message.epoch, heads, end, message.stream, body if follow else _NOTHING, follow)


def decode_push(message: bytes | memoryview) -> PushMessage:
    """Reads a message that is whole; its body is a view into it. Raises ValueError, or DecodeError, for anything malformed."""
    view = memoryview(message)
    scan = HeadScan(len(view))
    size = scan.measure(view)
    assert size is not None, "the whole message was seen"
    return scan.decode(view[:size], MemoryBody(view[size:]))


def _heads(blocks: kv.BlockFrames, payload_bytes: int) -> tuple[BlockHead, ...]:
    parts = blocks.parts
    if len(parts) > MAX_PARTS:
        raise ValueError(f"{len(parts)} data frames, at most {MAX_PARTS} go into one message")
    heads: list[BlockHead] = []
    carried = named = 0
    for part in parts:
        head = BlockHead(
            part.block_index,
            part.layer_group,
            part.offset_bytes,
            part.payload_bytes,
            part.digest,
            part.encoding,
            part.pool_offset,
            part.pool_bytes,
        )
        heads.append(head)
        carried += head.payload_bytes
        if head.pool_bytes:
            named += 1
            if head.payload_bytes or head.encoding:
                raise ValueError("a frame names bytes of a pool and carries others, or packed ones")
        elif head.pool_offset:
            raise ValueError("a frame names a place in a pool and no bytes there")
    if named not in (0, len(heads)):
        raise ValueError("frames that carry their bytes beside frames that name them")
    if carried != payload_bytes:
        raise ValueError(f"a payload of {payload_bytes} bytes for frames of {carried}")
    return tuple(heads)


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """The number and the place behind it, negative when it is cut or too long, or `at` was."""
    if 0 <= at < end:
        first = view[at]
        if first < 0x80:  # nearly all of them
            return first, at + 1
        value = 0
        for shift, byte in enumerate(view[at : at + _MAX_VARINT_BYTES]):
            value |= (byte & 0x7F) << 7 * shift
            if byte < 0x80:
                return value, at + shift + 1
    return 0, -1


def _field_head(number: int, size: int) -> bytes:
    head = bytearray([number << 3 | _BYTES])
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head)
