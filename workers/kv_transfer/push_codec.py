"""Push messages as bytes. The wire is that of `PushFrame` in kv.proto; the codec is by hand, so a payload is copied once.

A message is small heads, each followed by its payload: it is made as a list of pieces, which a transport joins or writes one
after another, and decoding gives views into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from protos.wire import kv

_VARINT, _BYTES = 0, 2
_MAX_VARINT_BYTES = 10
MAX_PARTS = 64  # data frames in one message
_MAX_FIELDS = 16  # of one message or data frame, further data frames apart; ours have seven at most
_MAX_PUSH_FIELDS = MAX_PARTS + _MAX_FIELDS

_PUSH = {name: field.number for name, field in kv.PushFrame.DESCRIPTOR.fields_by_name.items()}
_BLOCK = {name: field.number for name, field in kv.BlockFrame.DESCRIPTOR.fields_by_name.items()}


@dataclass(frozen=True, slots=True)
class DataFrame:
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


@dataclass(frozen=True, slots=True)
class PushMessage:
    """One message of a Push stream: data frames, in order, or the end; neither is a sign of life."""

    transfer_id: str
    epoch: int
    data: tuple[DataFrame, ...] = ()
    end: kv.EndFrame | None = None
    stream: int = 0


def encode_data(transfer_id: str, epoch: int, frames: Sequence[DataFrame], stream: int = 0) -> bytes:
    """The message of 1 to `MAX_PARTS` data frames. Each payload is copied once, into the result."""
    return b"".join(data_pieces(transfer_id, epoch, frames, stream))


def data_pieces(transfer_id: str, epoch: int, frames: Sequence[DataFrame], stream: int = 0) -> list[bytes | memoryview]:
    """The same message in pieces; payloads are among them, not copied."""
    assert 1 <= len(frames) <= MAX_PARTS, len(frames)
    pieces: list[bytes | memoryview] = [kv.PushFrame(transfer_id=transfer_id, epoch=epoch, stream=stream).SerializeToString()]
    field = _PUSH["data"]
    for frame in frames:
        fields = kv.BlockFrame(
            block_index=frame.block_index,
            layer_group=frame.layer_group,
            offset_bytes=frame.offset_bytes,
            digest=frame.digest,
            encoding=cast("kv.KvEncoding", frame.encoding),
            pool_offset=frame.pool_offset,
            pool_bytes=frame.pool_bytes,
        )
        size = frame.payload.nbytes
        inner = fields.SerializeToString() + (b"" if frame.pool_bytes else _head(_BLOCK["payload"], size))
        pieces += (_head(field, len(inner) + size), inner, frame.payload)
        field = _PUSH["more"]
    return pieces


def encode_other(transfer_id: str, epoch: int, end: kv.EndFrame | None = None, stream: int = 0) -> bytes:
    """The message of the end frame, or of a sign of life."""
    return kv.PushFrame(transfer_id=transfer_id, epoch=epoch, end=end, stream=stream).SerializeToString()


def decode_push(message: bytes | memoryview) -> PushMessage:
    """Reads a message; payloads are views into it. Raises ValueError, or DecodeError, for anything malformed."""
    transfer_id, epoch, stream = "", 0, 0
    data: DataFrame | None = None
    more: list[DataFrame] = []
    end: kv.EndFrame | None = None
    fields = _fields(memoryview(message), _MAX_PUSH_FIELDS)
    if sum(number != _PUSH["more"] for number, _ in fields) > _MAX_FIELDS:
        raise ValueError(f"more than {_MAX_FIELDS} fields")
    for number, value in fields:
        if number == _PUSH["transfer_id"]:
            transfer_id = bytes(_bytes(value)).decode("utf-8")
        elif number == _PUSH["epoch"]:
            epoch = _number(value, 64)
        elif number == _PUSH["stream"]:
            stream = _number(value, 32)
        elif number == _PUSH["data"]:
            data, end = _decode_block(_bytes(value)), None
        elif number == _PUSH["more"]:
            more.append(_decode_block(_bytes(value)))
        elif number == _PUSH["end"]:
            data, end = None, kv.EndFrame.FromString(bytes(_bytes(value)))
    if data is None and more:
        raise ValueError("more data frames without a first one")
    if len(more) >= MAX_PARTS:
        raise ValueError(f"{1 + len(more)} data frames, at most {MAX_PARTS} go into one message")
    return PushMessage(transfer_id, epoch, () if data is None else (data, *more), end, stream)


def _decode_block(view: memoryview) -> DataFrame:
    block_index = layer_group = offset_bytes = encoding = pool_offset = pool_bytes = 0
    payload, digest = view[:0], b""
    for number, value in _fields(view, _MAX_FIELDS):
        if number == _BLOCK["block_index"]:
            block_index = _number(value, 32)
        elif number == _BLOCK["layer_group"]:
            layer_group = _number(value, 32)
        elif number == _BLOCK["offset_bytes"]:
            offset_bytes = _number(value, 32)
        elif number == _BLOCK["payload"]:
            payload = _bytes(value)
        elif number == _BLOCK["digest"]:
            digest = bytes(_bytes(value))
        elif number == _BLOCK["encoding"]:
            encoding = _number(value, 32)
        elif number == _BLOCK["pool_offset"]:
            pool_offset = _number(value, 64)
        elif number == _BLOCK["pool_bytes"]:
            pool_bytes = _number(value, 32)
    if (pool_bytes and (payload or encoding)) or (pool_offset and not pool_bytes):
        raise ValueError("a frame names bytes of a pool and carries others, or packed ones")
    return DataFrame(block_index, layer_group, offset_bytes, payload, digest, encoding, pool_offset, pool_bytes)


def _fields(view: memoryview, limit: int) -> list[tuple[int, int | memoryview]]:
    found: list[tuple[int, int | memoryview]] = []
    at, size = 0, len(view)
    while at < size:
        if len(found) == limit:
            raise ValueError(f"more than {limit} fields")
        tag, at = _varint(view, at)
        value, at = _varint(view, at)
        if tag & 7 == _VARINT:
            found.append((tag >> 3, value))
        elif tag & 7 == _BYTES and value <= size - at:
            found.append((tag >> 3, view[at : at + value]))
            at += value
        else:
            raise ValueError(f"field {tag >> 3}: wire type {tag & 7} does not fit in {size} bytes")
    return found


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    if at < len(view) and view[at] < 0x80:  # nearly all of them
        return view[at], at + 1
    value = 0
    for shift in range(_MAX_VARINT_BYTES):
        if at == len(view):
            raise ValueError("cut in a number")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than {_MAX_VARINT_BYTES} bytes")


def _number(value: int | memoryview, bits: int) -> int:
    if not isinstance(value, int) or value >> bits:
        raise ValueError(f"not a number of {bits} bits")
    return value


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _head(number: int, size: int) -> bytes:
    head = bytearray([number << 3 | _BYTES])
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head)
