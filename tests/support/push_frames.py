"""Push messages as parts that have their bytes beside them: to be taken apart, changed, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from protos.wire import kv
from workers.kv_transfer.body import MemoryBody
from workers.kv_transfer.push_codec import BlockHead, DataFrame, PushMessage


@dataclass(frozen=True, slots=True)
class Part:
    """What is said of a data frame, and the bytes that travel for it, which may be others than it says."""

    head: kv.BlockFrame
    payload: bytes = b""

    def with_bytes(self, payload: bytes, **fields: Any) -> Part:
        """A copy with other bytes, whose number its head says, and other values in some fields."""
        return self.saying(payload_bytes=len(payload), **fields).beside(payload)

    def saying(self, **fields: Any) -> Part:
        """A copy whose head says something else; the bytes are as they were."""
        head = kv.BlockFrame()
        head.CopyFrom(self.head)
        for name, value in fields.items():
            setattr(head, name, value)
        return Part(head, self.payload)

    def beside(self, payload: bytes) -> Part:
        """A copy with other bytes under the same head."""
        return Part(self.head, payload)


def part(payload: bytes = b"", **fields: Any) -> Part:
    """One that says how many bytes it has, unless a field says otherwise."""
    return Part(kv.BlockFrame(**({"payload_bytes": len(payload)} | fields)), payload)


def parts_of(frame: kv.PushFrame) -> list[Part]:
    """The parts of a message, each with the bytes that its head claims."""
    found, at = [], 0
    for head in frame.blocks.parts:
        found.append(Part(head, frame.payload[at : at + head.payload_bytes]))
        at += head.payload_bytes
    return found


def first_head(frame: kv.PushFrame) -> kv.BlockFrame:
    """What is said of the first part; nothing when there is none."""
    return frame.blocks.parts[0] if frame.blocks.parts else kv.BlockFrame()


def message_of(transfer_id: str, epoch: int, parts: Iterable[Part], stream: int = 0) -> kv.PushFrame:
    """The message of these parts: their bytes one after another, whatever the heads say."""
    return with_parts(kv.PushFrame(transfer_id=transfer_id, epoch=epoch, stream=stream), parts)


def with_parts(frame: kv.PushFrame, parts: Iterable[Part]) -> kv.PushFrame:
    """A copy of the message with other parts."""
    made, chosen = kv.PushFrame(), list(parts)
    made.CopyFrom(frame)
    made.blocks.CopyFrom(kv.BlockFrames(parts=[one.head for one in chosen]))
    made.payload = b"".join(one.payload for one in chosen)
    return made


def with_part(frame: kv.PushFrame, at: int, made: Part) -> kv.PushFrame:
    """A copy of the message with another part in one place."""
    parts: Sequence[Part] = parts_of(frame)
    return with_parts(frame, [*parts[:at], made, *parts[at + 1 :]])


def frames_of(message: PushMessage) -> list[DataFrame]:
    """The data frames of a message that is all here."""
    reading = message.frames()
    try:
        reading.send(None)
    except StopIteration as done:
        found: list[DataFrame] = done.value
        return found
    raise AssertionError("it waits for something")


def push_message(
    transfer_id: str, epoch: int, frames: Sequence[DataFrame], stream: int = 0
) -> PushMessage:  # fmt: skip
    """The message of these data frames as it is when it was received."""
    heads = tuple(head_of(frame) for frame in frames)
    payload = memoryview(b"".join(frame.payload for frame in frames))
    return PushMessage(transfer_id, epoch, heads, stream=stream, body=MemoryBody(payload), payload_bytes=payload.nbytes)


def head_of(frame: DataFrame) -> BlockHead:
    """What is said of a data frame before its payload comes."""
    index, group, offset, payload, digest, encoding, pool_offset, pool_bytes = frame
    return BlockHead(index, group, offset, payload.nbytes, digest, encoding, pool_offset, pool_bytes)


def flip(frame: kv.PushFrame, at: int = 0) -> kv.PushFrame:
    """A copy of the message with one bit changed in the middle of the bytes of one part."""
    changed = parts_of(frame)[at]
    payload = bytearray(changed.payload)
    payload[len(payload) // 2] ^= 1
    return with_part(frame, at, changed.beside(bytes(payload)))
