"""From received bytes to whole gRPC messages, without a copy of the large ones.

The socket writes where `buffer` says: the inside of a message straight into the memory in which it will be read, and in the
same call a few bytes of what follows, which are the next frame's head. All else is small and goes through a small buffer.
Memory of messages is mapped without being touched: what a peer announces costs nothing until it sends it.
"""

from __future__ import annotations

import mmap
from typing import Protocol

from workers.kv_wire.h2_frames import (
    HEAD_BYTES,
    MOST_CONTROL_BYTES,
    PADDED,
    PREFACE,
    Code,
    FrameHead,
    Kind,
    WireFault,
    read_head,
)

PREFIX_BYTES = 5  # of each gRPC message: a flag and its length
_AHEAD_BYTES = HEAD_BYTES + PREFIX_BYTES
_SMALLEST_BUFFER_BYTES = 64 * 1024
_KEPT_BUFFERS = 2  # one is read, one is filled


class CallFault(Exception):
    """A call cannot go on: it ends with this gRPC status, the connection stays."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class FrameHandler(Protocol):
    """Who hears of frames, in order. All of them may raise WireFault."""

    def data_begins(self, head: FrameHead) -> bool:
        """Whether the payload is of the call that runs; it is passed over otherwise."""
        ...

    def data_ended(self, head: FrameHead) -> None:
        """All of it is here, and its messages were taken."""
        ...

    def control(self, head: FrameHead, payload: memoryview) -> None:
        """Any other frame; `payload` is valid during the call only."""
        ...

    def call_failed(self, fault: CallFault) -> None:
        """What came is no message that is taken here; the rest of the frame is passed over."""
        ...


class MessageReader:
    """`buffer`, then `filled`, again and again, until `has_message`; then `take`, and `give_back` when it was read."""

    def __init__(self, handler: FrameHandler, most_message_bytes: int, most_frame_bytes: int, *, expects_preface: bool) -> None:
        self._handler = handler
        self._most_message_bytes = most_message_bytes
        self._most_frame_bytes = most_frame_bytes
        self._preface_due = expects_preface
        self._small = memoryview(bytearray(HEAD_BYTES + MOST_CONTROL_BYTES))
        self._at = self._have = 0  # of the small buffer, what is not parsed yet
        self._data: FrameHead | None = None  # the DATA frame that is coming
        self._data_left = 0
        self._is_wanted = False
        self._prefix = bytearray()
        self._body: memoryview | None = None
        self._body_at = self._body_bytes = 0
        self._direct_bytes = 0  # of the last `buffer`, what belongs to the message
        self._message: memoryview | None = None
        self._free: list[memoryview] = []

    @property
    def has_message(self) -> bool:
        """True when one is whole; nothing more is parsed until it is taken."""
        return self._message is not None

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty while there is no message."""
        self._direct_bytes = 0
        if self._have == 0 and self._body is not None and self._is_wanted:
            self._direct_bytes = min(self._data_left, self._body_bytes - self._body_at)
        if self._direct_bytes:
            assert self._body is not None
            return self._body[self._body_at : self._body_at + self._direct_bytes + _AHEAD_BYTES]
        return self._small[self._have :]

    def filled(self, count: int) -> None:
        """So many bytes came. Raises WireFault."""
        if self._direct_bytes:
            assert self._body is not None
            used = min(count, self._direct_bytes)
            ahead = count - used
            if ahead:
                begin = self._body_at + used
                self._small[:ahead] = self._body[begin : begin + ahead]
                self._have = ahead
            self._data_left -= used
            self._grow(used)
        else:
            self._have += count
        self.parse()

    def parse(self) -> None:
        """Goes on with what is here already. Raises WireFault."""
        while self._message is None and self._step():
            pass
        left = self._have - self._at
        if self._at and left:
            self._small[:left] = bytes(self._small[self._at : self._have])
        self._at, self._have = 0, left

    def take(self) -> memoryview:
        """The message. Give it back: it is memory that the one after the next will use."""
        assert self._message is not None, "no message"
        message, self._message = self._message, None
        return message

    def give_back(self, message: memoryview) -> None:
        """Nobody reads it any more."""
        memory = message.obj
        if len(self._free) < _KEPT_BUFFERS and isinstance(memory, mmap.mmap):
            self._free.append(memoryview(memory))

    def drop_call(self) -> None:
        """The call is over: what is left of its message, and of its frame, is passed over."""
        self._is_wanted = False
        self._prefix.clear()
        self._body = self._message = None

    def _step(self) -> bool:
        view = self._small[self._at : self._have]
        if self._preface_due:
            return self._read_preface(view)
        if self._data is not None:
            return self._read_data(view)
        if len(view) < HEAD_BYTES:
            return False
        head = read_head(view)
        if head.kind == Kind.DATA:
            self._begin_data(head)
            return True
        if head.size_bytes > MOST_CONTROL_BYTES:
            raise WireFault(Code.FRAME_SIZE_ERROR, f"a frame of type {head.kind} and {head.size_bytes} bytes")
        end = HEAD_BYTES + head.size_bytes
        if len(view) < end:
            return False
        self._at += end
        self._handler.control(head, view[HEAD_BYTES:end])
        return True

    def _read_preface(self, view: memoryview) -> bool:
        seen = bytes(view[: len(PREFACE)])
        if not PREFACE.startswith(seen):
            raise WireFault(Code.PROTOCOL_ERROR, "this is no HTTP/2")
        if len(seen) < len(PREFACE):
            return False
        self._at += len(PREFACE)
        self._preface_due = False
        return True

    def _begin_data(self, head: FrameHead) -> None:
        if head.size_bytes > self._most_frame_bytes:
            raise WireFault(Code.FRAME_SIZE_ERROR, f"DATA of {head.size_bytes} bytes, at most {self._most_frame_bytes}")
        if head.flags & PADDED:
            raise WireFault(Code.PROTOCOL_ERROR, "padded DATA is not taken here")
        self._at += HEAD_BYTES
        self._data, self._data_left = head, head.size_bytes
        self._is_wanted = self._handler.data_begins(head)

    def _read_data(self, view: memoryview) -> bool:
        if not self._data_left:
            assert self._data is not None
            ended, self._data = self._data, None
            self._handler.data_ended(ended)
            return True
        if not view:
            return False
        part = view[: self._data_left]
        try:
            used = self._put(part) if self._is_wanted else len(part)
        except CallFault as fault:
            used = len(part)
            self.drop_call()
            self._handler.call_failed(fault)
        self._at += used
        self._data_left -= used
        return True

    def _put(self, part: memoryview) -> int:
        if self._body is None:
            count = min(len(part), PREFIX_BYTES - len(self._prefix))
            self._prefix += part[:count]
            if len(self._prefix) == PREFIX_BYTES:
                self._begin_message()
            return count
        count = min(len(part), self._body_bytes - self._body_at)
        self._body[self._body_at : self._body_at + count] = part[:count]
        self._grow(count)
        return count

    def _begin_message(self) -> None:
        compressed, size = self._prefix[0], int.from_bytes(self._prefix[1:], "big")
        self._prefix.clear()
        if compressed:
            raise CallFault(12, "a compressed message; this method takes identity only")
        if size > self._most_message_bytes:
            raise CallFault(8, f"a message of {size} bytes, at most {self._most_message_bytes} are taken")
        self._body, self._body_at, self._body_bytes = self._memory(size + _AHEAD_BYTES), 0, size
        self._grow(0)

    def _grow(self, count: int) -> None:
        assert self._body is not None
        self._body_at += count
        if self._body_at == self._body_bytes:
            self._message, self._body = self._body[: self._body_bytes].toreadonly(), None

    def _memory(self, size: int) -> memoryview:
        while self._free:
            memory = self._free.pop()
            if len(memory) >= size:
                return memory
        return memoryview(mmap.mmap(-1, max(_SMALLEST_BUFFER_BYTES, 1 << (size - 1).bit_length())))
