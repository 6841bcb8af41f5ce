"""One HTTP/2 connection that carries one call at a time: the windows of both directions and the frames in between.

It reads by itself until a message has begun; from there on whoever takes the message says when, and where to. So a peer that is
ahead is held back by TCP itself. Windows are as large as HTTP/2 allows and given back now and then.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Sequence

from workers.engine_api.memory_views import Write, copy_into
from workers.kv_wire.h2_frames import (
    ACK,
    END_STREAM,
    LARGEST_FRAME_BYTES,
    LARGEST_WINDOW_BYTES,
    Code,
    FrameHead,
    Kind,
    WireFault,
    frame,
    goaway,
    greeting,
    head,
    read_number,
    read_settings,
    window_update,
)
from workers.kv_wire.header_blocks import MOST_LIST_BYTES, HeaderReader, Headers, HeaderWriter
from workers.kv_wire.incoming import Incoming
from workers.kv_wire.link import ConnectionLost, Link
from workers.kv_wire.message_reader import CallFault, MessageReader
from workers.kv_wire.peer_limits import IdleBudget, PeerLimits
from workers.kv_wire.pieces import Piece, cut, first_of

logger = logging.getLogger(__name__)

_READS_PER_TURN = 4  # of the event loop
_RETURN_BYTES = 64 * 1024 * 1024  # of window, in one update


class Connection:
    """Both sides of it. What differs is in `headers_came`, `stream_reset` and `call_failed`."""

    def __init__(self, sock: socket.socket, most_message_bytes: int, *, is_client: bool) -> None:
        self._link = Link(sock, self._on_readable, self._on_lost)
        self._reader = MessageReader(self, most_message_bytes, LARGEST_FRAME_BYTES, expects_preface=not is_client)
        self._headers_in, self._headers_out = HeaderReader(), HeaderWriter()
        self._owed_bytes = 0  # of window
        self._idle = IdleBudget(self._now_s())
        self._peer = PeerLimits()
        self._has_settings = False
        self.stream = 0  # of the call that runs; none: 0
        self._has_ended = False  # the peer sends no more on it
        self._is_deaf = False  # the peer takes no more on it
        self._is_reading_message = False  # somebody takes it
        self._more: asyncio.Future[None] | None = None  # of whoever waits for bytes of the message
        self._begin(is_client)

    # -- what the two sides do ------------------------------------------------------------------------------------------

    def headers_came(self, stream: int, headers: Headers, *, is_end: bool) -> None:
        """A header list of any stream. May raise WireFault."""
        raise NotImplementedError

    def stream_reset(self, stream: int, code: int) -> None:
        """The peer ended a stream."""
        raise NotImplementedError

    def call_failed(self, fault: CallFault) -> None:
        """What came on the stream is no message that is taken here."""
        raise NotImplementedError

    def was_lost(self) -> None:
        """The connection is over, once."""

    # -- state ----------------------------------------------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """True when nothing comes or goes any more."""
        return self._link.lost is not None

    def begin_call(self, stream: int) -> None:
        """From now on DATA of this stream is the call's."""
        self.stream, self._has_ended, self._is_deaf = stream, False, False
        self._peer.begin_call()

    def end_call(self) -> None:
        """What still comes of the call is passed over."""
        self.stream, self._is_reading_message = 0, False
        self._reader.drop_call()
        self._read_on()

    def close(self, why: str) -> None:
        """Ends the connection at once. Idempotent; nothing is read from any message that was being written."""
        self._link.close(why)

    def _on_lost(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)
        self.was_lost()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def settled(self) -> None:
        """Returns when the peer has said what it takes. Raises ConnectionLost."""
        while not self._has_settings:
            await self._link.changed()

    # -- in -------------------------------------------------------------------------------------------------------------

    async def next_message(self) -> Incoming | None:
        """The next message of the call, as soon as it has begun; none after its last one. Raises ConnectionLost."""
        if self._is_reading_message:
            self._is_reading_message = False
            self._reader.finish()
            self._read_on()
        while not self._reader.has_message:
            if self._has_ended:
                return None
            await self._link.changed()
        self._idle.message()
        self._is_reading_message = True
        return Incoming(self)

    @property
    def left_bytes(self) -> int:
        """See Source."""
        return self._reader.left_bytes

    def peek(self) -> memoryview:
        """See Source."""
        while not (here := self._reader.here()) and self._reader.left_bytes and self._fill_small():
            pass
        return here

    def consume(self, count: int) -> None:
        """See Source."""
        self._reader.consume(count)

    def receive(self, views: Sequence[memoryview], write: Write) -> int:
        """See Source."""
        reader = self._reader
        while True:
            if reader.here():
                count = write(lambda: copy_into(views, reader.here()))
                reader.consume(count)
                return count
            room = reader.direct_bytes
            if room:
                return self._receive_direct(first_of(views, room), write)
            if not self._fill_small():
                return 0

    def _receive_direct(self, views: Sequence[memoryview], write: Write) -> int:
        """Straight from the socket; the views are of the message, and of no other frame."""
        targets = [*views, self._reader.ahead]
        try:
            count = write(lambda: self._link.receive(targets))
        except ConnectionLost as lost:
            raise self.loss_of_message() from lost
        direct = min(count, sum(view.nbytes for view in views))
        if count:
            self._reader.received(direct, count - direct)
        return direct

    def _fill_small(self) -> bool:
        """Reads what is there, up to bytes of the message; false when nothing is there now."""
        if self._has_ended:
            raise self.loss_of_message()
        try:
            self._link.check()
            if not self._reader.parse():  # what came behind bytes that were given out since
                count = self._link.receive([self._reader.buffer()])
                if not count:
                    return False
                self._reader.filled(count)
        except ConnectionLost as lost:
            raise self.loss_of_message() from lost
        except WireFault as fault:
            self._refuse(fault)
            raise self.loss_of_message() from fault
        self._link.flush()
        return True

    async def more(self) -> None:
        """See Source."""
        if self._link.lost is not None:
            raise self.loss_of_message()
        self._more = asyncio.get_running_loop().create_future()
        self._link.watch(True)
        try:
            await self._more
        finally:
            self._more = None

    def loss_of_message(self) -> Exception:
        """What to raise to whoever reads a message that will not come whole."""
        return ConnectionLost(self._link.lost or "the peer ended the call in the middle of a message")

    def data_begins(self, head: FrameHead) -> bool:
        """See FrameHandler."""
        self._check_order(head)
        if not head.size_bytes:
            self._count_idle()
        self._owed_bytes += head.size_bytes
        if self._owed_bytes >= _RETURN_BYTES:
            self._queue(
                window_update(self._owed_bytes) + (window_update(self._owed_bytes, self.stream) if self.stream else b"")
            )
            self._owed_bytes = 0
        if head.stream == 0 or self._is_unknown(head.stream):
            raise WireFault(Code.PROTOCOL_ERROR, f"DATA of stream {head.stream}, which was never begun")
        return head.stream == self.stream and not self._has_ended

    def data_ended(self, head: FrameHead) -> None:
        """See FrameHandler."""
        if head.flags & END_STREAM and head.stream == self.stream:
            self.peer_ended()

    def peer_ended(self) -> None:
        """The peer sends nothing more on the call."""
        self._has_ended = True
        self._link.notify()

    def peer_is_deaf(self) -> None:
        """The peer sends nothing more on the call, and takes nothing more."""
        self._is_deaf = True
        self.peer_ended()

    def control(self, head: FrameHead, payload: memoryview) -> None:
        """See FrameHandler."""
        self._check_order(head)
        if head.kind in (Kind.HEADERS, Kind.CONTINUATION):
            self._count_idle()
            whole = self._headers_in.take(head, payload)
            if whole is not None:
                first, headers = whole
                self.headers_came(first.stream, headers, is_end=bool(first.flags & END_STREAM))
        elif head.kind == Kind.WINDOW_UPDATE:
            self._widen(head, payload)
        elif head.kind == Kind.GOAWAY:
            pass  # the call that runs may end; the peer closes then
        else:
            self._count_idle()
            self._other(head, payload)

    def _other(self, head: FrameHead, payload: memoryview) -> None:
        if head.kind == Kind.SETTINGS:
            self._apply(head, payload)
        elif head.kind == Kind.PING:
            if len(payload) != 8 or head.stream:
                raise WireFault(Code.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes on stream {head.stream}")
            if not head.flags & ACK:
                self._queue(frame(Kind.PING, bytes(payload), ACK))
        elif head.kind == Kind.RST_STREAM:
            if len(payload) != 4 or head.stream == 0 or self._is_unknown(head.stream):
                raise WireFault(Code.PROTOCOL_ERROR, f"RST_STREAM of {len(payload)} bytes on stream {head.stream}")
            self.stream_reset(head.stream, read_number(payload))
        elif head.kind == Kind.PUSH_PROMISE:
            raise WireFault(Code.PROTOCOL_ERROR, "PUSH_PROMISE was ruled out")

    def _is_unknown(self, stream: int) -> bool:
        """True for a stream that nobody has begun."""
        raise NotImplementedError

    def _check_order(self, head: FrameHead) -> None:
        if not self._has_settings and head.kind != Kind.SETTINGS:
            raise WireFault(Code.PROTOCOL_ERROR, "the first frame must be SETTINGS")
        if self._headers_in.is_open and head.kind != Kind.CONTINUATION:
            raise WireFault(Code.PROTOCOL_ERROR, "a frame in the middle of a header block")

    def _count_idle(self) -> None:
        self._idle.spend(self._now_s())

    def _apply(self, head: FrameHead, payload: memoryview) -> None:
        if head.stream:
            raise WireFault(Code.PROTOCOL_ERROR, "SETTINGS of a stream")
        if head.flags & ACK:
            if payload:
                raise WireFault(Code.FRAME_SIZE_ERROR, "an acknowledgement of SETTINGS with settings")
            return
        found = read_settings(payload)
        self._peer.apply(found)
        self._has_settings = True
        self._queue(frame(Kind.SETTINGS, flags=ACK))
        self._link.notify()

    def _widen(self, head: FrameHead, payload: memoryview) -> None:
        size = read_number(payload) & LARGEST_WINDOW_BYTES
        if len(payload) != 4 or not size:
            raise WireFault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        if head.stream in (0, self.stream):
            self._peer.widen(size, is_stream=head.stream != 0)
        elif self._is_unknown(head.stream):
            raise WireFault(Code.PROTOCOL_ERROR, f"WINDOW_UPDATE of stream {head.stream}, which was never begun")
        self._link.notify()

    # -- out ------------------------------------------------------------------------------------------------------------

    async def send_headers(self, headers: Sequence[tuple[str, str]], *, is_end: bool = False) -> None:
        """One header list of the call. Raises ConnectionLost."""
        await self._link.write([self._headers_out.frame(self.stream, headers, END_STREAM if is_end else 0)])

    async def send_data(self, pieces: Sequence[Piece]) -> None:
        """Hands these bytes to the kernel, in as few frames as the peer takes. Raises ConnectionLost; cancelled in the middle
        of a frame it ends the connection."""
        rest = [memoryview(piece) for piece in pieces if len(piece)]
        left, stream = sum(len(piece) for piece in rest), self.stream
        while left:
            if self._is_deaf:
                raise ConnectionLost("the peer has ended the call")
            size = min(left, self._peer.room_bytes)
            if size <= 0:
                await self._link.changed()
                continue
            part, rest = cut(rest, size)
            self._peer.spend(size)
            left -= size
            await self._link.write([head(size, Kind.DATA, stream=stream), *part])

    def send_now(self, pieces: Sequence[Piece]) -> Awaitable[None] | None:
        """As `send_data`, begun at once: None when the kernel has taken everything, else what takes it the rest, to be awaited
        unless the connection is closed."""
        size = sum(len(piece) for piece in pieces)
        if self._is_deaf or size > self._peer.room_bytes or not self._link.can_write_now:
            return self.send_data(pieces)
        self._peer.spend(size)
        return self._link.write_now([head(size, Kind.DATA, stream=self.stream), *pieces])

    async def end_data(self) -> None:
        """Nothing more comes on the call from here. Raises ConnectionLost."""
        await self._link.write([head(0, Kind.DATA, END_STREAM, self.stream)])

    # -- the socket -----------------------------------------------------------------------------------------------------

    def _begin(self, is_client: bool) -> None:
        self._queue(greeting(MOST_LIST_BYTES, is_client=is_client))
        self._link.flush()
        self._read_on()

    def _queue(self, control: bytes) -> None:
        self._link.queue(control)

    def _read_on(self) -> None:
        """Reads again, beginning with what is here already."""
        if self._link.lost is not None:
            return
        try:
            self._reader.parse()
        except WireFault as fault:
            self._refuse(fault)
            return
        if not self._reader.has_message:
            self._link.watch(True)
        self._link.flush()

    def _on_readable(self) -> None:
        if self._more is not None:
            if not self._more.done():
                self._more.set_result(None)
            return
        if self._reader.has_message:  # whoever takes it is busy
            self._link.watch(False)
            return
        try:
            for _ in range(_READS_PER_TURN):
                buffer = self._reader.buffer()
                count = self._link.receive([buffer])
                if count:
                    self._reader.filled(count)
                if count < len(buffer) or self._reader.has_message:
                    break
        except ConnectionLost:
            return
        except WireFault as fault:
            self._refuse(fault)
            return
        if self._reader.has_message:
            self._link.notify()
        self._link.flush()

    def _refuse(self, fault: WireFault) -> None:
        logger.warning("a connection of the KV wire ends: %s: %s", fault.code.name, fault)
        if not self._link.is_writing:
            self._link.queue(goaway(0, fault))
            self._link.flush()
        self.close(f"{fault.code.name}: {fault}")
