"""From received bytes to gRPC messages whose bytes go where their reader wants them.

Heads and control frames go through a small buffer. Once a message has begun, its bytes are handed out as they come: what is in
the small buffer already by `here` and `consume`, the rest straight from the socket, as far as `direct_bytes` allows. Nothing is
allocated for what a peer announces.

    no message -> begun    its length was read; `left_bytes` of it are to be given out
    begun -> no message    `finish`; what was not given out is passed over
    any -> no message      `drop_call`; the rest of the call is passed over
"""

from __future__ import annotations

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
_AHEAD_BYTES = 4096  # read with the end of what is received straight: the next frame's head, and that of the next message


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
        """All of it is here, and was given out."""
        ...

    def control(self, head: FrameHead, payload: memoryview) -> None:
        """Any other frame; `payload` is valid during the call only."""
        ...

    def call_failed(self, fault: CallFault) -> None:
        """What came is no message that is taken here; the rest of the frame is passed over."""
        ...


class MessageReader:
    """`buffer` and `filled` move bytes from the socket into the small buffer; `parse` goes through what is there."""

    def __init__(self, handler: FrameHandler, most_message_bytes: int, most_frame_bytes: int, *, expects_preface: bool) -> None:
        self._handler = handler
        self._most_message_bytes = most_message_bytes
        self._most_frame_bytes = most_frame_bytes
        self._preface_due = expects_preface
        self._small = memoryview(bytearray(HEAD_BYTES + MOST_CONTROL_BYTES))
        self._at = self._have = 0  # of the small buffer, what is not parsed or given out yet
        self._data: FrameHead | None = None  # the DATA frame that is coming
        self._data_left = 0
        self._is_wanted = False
        self._prefix = bytearray()
        self._left: int | None = None  # of the message, what was not given out yet
        self._is_passed_over = False

    @property
    def has_message(self) -> bool:
        """True from when one has begun until `finish`."""
        return self._left is not None and not self._is_passed_over

    @property
    def left_bytes(self) -> int:
        """Bytes of the message that were not given out yet."""
        assert self._left is not None, "no message"
        return self._left

    def buffer(self) -> memoryview:
        """Where the next bytes go; not empty once `parse` was called and nothing is `here`."""
        if self._at:
            left = self._have - self._at
            self._small[:left] = bytes(self._small[self._at : self._have])
            self._at, self._have = 0, left
        return self._small[self._have :]

    def filled(self, count: int) -> None:
        """So many bytes came into `buffer`. Raises WireFault."""
        self._have += count
        self.parse()

    def parse(self) -> bool:
        """Goes through what is here, up to bytes of a message; whether that was anything. Raises WireFault."""
        got_further = False
        while self._step():
            got_further = True
        return got_further

    def here(self) -> memoryview:
        """The bytes of the message that are in the small buffer; valid until the next call of anything else."""
        return self._small[self._at : self._at + min(self._have - self._at, self._room)]

    def consume(self, count: int) -> None:
        """So many of the bytes that are `here` were read."""
        self._at += count
        self._give(count)

    @property
    def direct_bytes(self) -> int:
        """How much may be received straight to where it belongs, with `ahead` behind it."""
        return self._room if self._at == self._have else 0

    @property
    def ahead(self) -> memoryview:
        """Memory for what follows bytes that are received straight."""
        return self._small[:_AHEAD_BYTES]

    def received(self, direct: int, ahead: int) -> None:
        """`direct` bytes of the message went straight, so many more lie in `ahead`."""
        self._at, self._have = 0, ahead
        self._give(direct)

    def finish(self) -> None:
        """Nobody reads the message any more."""
        if self._left == 0:
            self._left = None
        elif self._left is not None:
            self._is_passed_over = True

    def drop_call(self) -> None:
        """The call is over: what is left of its message, and of its frame, is passed over."""
        self._is_wanted = self._is_passed_over = False
        self._prefix.clear()
        self._left = None

    @property
    def _room(self) -> int:
        """Bytes of the message that are still to come of the frame that is coming."""
        if self._left is None or self._data is None or not self._is_wanted:
            return 0
        return min(self._data_left, self._left)

    def _give(self, count: int) -> None:
        assert self._left is not None and count <= self._room, (count, self._left)
        self._data_left -= count
        self._left -= count

    def _step(self) -> bool:
        view = self._small[self._at : self._have]
        if self._preface_due:
            return self._read_preface(view)
        if self._data is not None:
            return self._read_data(self._data, view)
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

    def _read_data(self, frame: FrameHead, view: memoryview) -> bool:
        if not self._data_left:
            self._data = None
            self._handler.data_ended(frame)
            return True
        if self._left == 0 and self._is_passed_over:
            self._left, self._is_passed_over = None, False
        if self._left is not None and self._is_wanted and not self._is_passed_over:
            return False  # for whoever reads the message
        if not view:
            return False
        if not self._is_wanted:
            self._skip(min(len(view), self._data_left))
        elif self._left is not None:
            count = min(len(view), self._room)
            self._left -= count
            self._skip(count)
        else:
            self._read_prefix(view)
        return True

    def _skip(self, count: int) -> None:
        self._at += count
        self._data_left -= count

    def _read_prefix(self, view: memoryview) -> None:
        count = min(len(view), self._data_left, PREFIX_BYTES - len(self._prefix))
        self._prefix += view[:count]
        self._skip(count)
        if len(self._prefix) == PREFIX_BYTES:
            compressed, size = self._prefix[0], int.from_bytes(self._prefix[1:], "big")
            self._prefix.clear()
            fault = self._fault_of(compressed, size)
            if fault is None:
                self._left = size
            else:
                self.drop_call()
                self._handler.call_failed(fault)

    def _fault_of(self, compressed: int, size: int) -> CallFault | None:
        if compressed:
            return CallFault(12, "a compressed message; this method takes identity only")
        if size > self._most_message_bytes:
            return CallFault(8, f"a message of {size} bytes, at most {self._most_message_bytes} are taken")
        return None
