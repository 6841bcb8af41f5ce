"""A socket that whole frames are written to, and that is lost once.

OPEN -> LOST    the peer hung up, the socket broke, a frame was cut, or this side closed; whoever waits hears ConnectionLost
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

from workers.kv_wire.h2_frames import Code, WireFault
from workers.kv_wire.pieces import Piece, drop

_MOST_QUEUED_BYTES = 64 * 1024  # answers to a peer that reads none of them


class ConnectionLost(Exception):
    """The connection is over; the text says why."""


class Link:
    """`on_readable` is called while `watch` is on and bytes are there, `on_lost` once."""

    def __init__(self, sock: socket.socket, on_readable: Callable[[], None], on_lost: Callable[[], None]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock, self._fd = sock, sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._on_readable, self._on_lost = on_readable, on_lost
        self._queued = bytearray()  # control frames that wait for the end of the frame that is being written
        self._is_writing = False
        self._is_watching = False
        self._writable: asyncio.Future[None] | None = None
        self._news = asyncio.Event()
        self.lost: str | None = None  # why

    # -- state ----------------------------------------------------------------------------------------------------------

    def close(self, why: str) -> None:
        """Ends the connection at once. Idempotent; nothing is read from any message that was being written."""
        if self.lost is not None:
            return
        self.lost = why
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._sock.close()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._news.set()
        self._on_lost()

    def notify(self) -> None:
        """Something has changed."""
        self._news.set()

    async def changed(self) -> None:
        """Returns when something may have changed. Raises ConnectionLost."""
        self.check()
        self._news.clear()
        await self._news.wait()

    def check(self) -> None:
        """Raises ConnectionLost when it is lost."""
        if self.lost is not None:
            raise ConnectionLost(self.lost)

    # -- in -------------------------------------------------------------------------------------------------------------

    def watch(self, on: bool) -> None:
        """Whether `on_readable` is wanted."""
        if on is self._is_watching or self.lost is not None:
            return
        self._is_watching = on
        if on:
            self._loop.add_reader(self._fd, self._on_readable)
        else:
            self._loop.remove_reader(self._fd)

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Moves what is there into the buffers; 0 when nothing is there now. Raises ConnectionLost."""
        self.check()
        try:
            count = self._sock.recvmsg_into(buffers)[0]
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self.close(f"the connection broke: {error}")
            count = 0
        if not count:
            self.close("the peer hung up")
            self.check()
        return count

    # -- out ------------------------------------------------------------------------------------------------------------

    @property
    def is_writing(self) -> bool:
        """True in the middle of a frame."""
        return self._is_writing

    def queue(self, control: bytes) -> None:
        """Control frames, to be written with what is written next. Raises WireFault when the peer lets too many pile up."""
        self._queued += control
        if len(self._queued) > _MOST_QUEUED_BYTES:
            raise WireFault(Code.ENHANCE_YOUR_CALM, "the peer asks and does not read the answers")

    def flush(self) -> None:
        """Writes control frames as far as the socket takes them now; the rest goes with what is written next, or read next."""
        if self._is_writing or not self._queued or self.lost is not None:
            return
        try:
            sent = self._sock.send(self._queued)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"the connection broke: {error}")
            return
        del self._queued[:sent]

    async def write(self, pieces: list[Piece]) -> None:
        """Hands whole frames to the kernel, one writer after another. Raises ConnectionLost; cancelled in the middle of them it
        ends the connection."""
        while self._is_writing:
            await self.changed()
        self._is_writing = True
        rest: list[Piece] = pieces
        if self._queued:
            rest = [bytes(self._queued), *pieces]
            self._queued.clear()
        await self._finish(rest)

    @property
    def can_write_now(self) -> bool:
        """True when nothing has to be written before the next frame."""
        return not (self._is_writing or self._queued or self.lost is not None)

    def write_now(self, pieces: list[Piece]) -> Awaitable[None] | None:
        """As `write`, begun at once while `can_write_now`: None when the kernel has taken everything, else what takes it the
        rest, to be awaited unless the link is closed."""
        assert self.can_write_now, "in the middle of a frame"
        rest = pieces
        try:
            rest = drop(pieces, self._sock.sendmsg(pieces))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.close(f"the connection broke: {error}")
        if not rest:
            return None
        self._is_writing = True
        return self._finish(rest)

    async def _finish(self, rest: list[Piece]) -> None:
        try:
            while rest:
                self.check()
                try:
                    sent = self._sock.sendmsg(rest)
                except (BlockingIOError, InterruptedError):
                    await self._until_writable()
                    continue
                except OSError as error:
                    self.close(f"the connection broke: {error}")
                    continue
                rest = drop(rest, sent)
        finally:
            self._is_writing = False
            if rest:
                self.close("cut in the middle of a frame")
        self._news.set()
        self.flush()

    async def _until_writable(self) -> None:
        self._writable = self._loop.create_future()
        writable = self._writable
        self._loop.add_writer(self._fd, lambda: None if writable.done() else writable.set_result(None))
        try:
            await writable
        finally:
            self._writable = None
            if self.lost is None:
                self._loop.remove_writer(self._fd)
