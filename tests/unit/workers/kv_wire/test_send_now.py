"""Messages whose sending begins at once: what the kernel does not take follows in order, whatever else goes out meanwhile."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from tests.support.h2_peer import METHOD, prefixed
from tests.support.worker_world import until
from workers.kv_transfer.push_stream import PushStream
from workers.kv_wire.h2_frames import ACK, HEAD_BYTES, PREFACE, Kind, frame, greeting, read_head, settings, window_update
from workers.kv_wire.push_client import PushCall, dial

SMALL_BYTES = 4096


@dataclass
class SlowServer:
    """Reads little at a time, and asks for answers in between; grants room as it is told."""

    rng: random.Random
    is_wide: bool
    may_read: asyncio.Event = field(default_factory=asyncio.Event)
    seen: bytearray = field(default_factory=bytearray)
    pings: list[bytes] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting(8192, is_client=False) if self.is_wide else settings({}))
        try:
            while part := await self._part(reader):
                self.seen += part
                if not self.is_wide:
                    writer.write(window_update(len(part)) + window_update(len(part), 1))
                if self.rng.random() < 0.1 and len(self.pings) < 40:
                    self.pings.append(self.rng.randbytes(8))
                    writer.write(frame(Kind.PING, self.pings[-1]))
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _part(self, reader: asyncio.StreamReader) -> bytes:
        await self.may_read.wait()
        return await reader.read(self.rng.choice([100, 3_000, 30_000]))

    def frames(self) -> list[tuple[int, int, bytes]]:
        """The whole frames that came, with their kinds and flags."""
        found, rest = [], memoryview(bytes(self.seen)).toreadonly()
        assert PREFACE.startswith(bytes(rest[: len(PREFACE)]))
        rest = rest[len(PREFACE) :]
        while len(rest) >= HEAD_BYTES:
            head = read_head(rest)
            if len(rest) < HEAD_BYTES + head.size_bytes:
                break
            found.append((head.kind, head.flags, bytes(rest[HEAD_BYTES : HEAD_BYTES + head.size_bytes])))
            rest = rest[HEAD_BYTES + head.size_bytes :]
        return found

    def body(self) -> bytes:
        """What came of the call."""
        return b"".join(payload for kind, _, payload in self.frames() if kind == Kind.DATA)

    def answers(self) -> list[bytes]:
        """To pings."""
        return [payload for kind, flags, payload in self.frames() if kind == Kind.PING and flags & ACK]


@asynccontextmanager
async def dialled(seed: int, *, is_wide: bool) -> AsyncIterator[tuple[SlowServer, PushCall[Any]]]:
    """A call to a slow server through small buffers of the kernel."""
    slow = SlowServer(random.Random(seed), is_wide)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
    server = await asyncio.start_server(slow, sock=listener, limit=SMALL_BYTES)
    async with asyncio.timeout(10):
        call = await dial("127.0.0.1", listener.getsockname()[1], METHOD, bytes, 5.0)
        call._connection._link._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BYTES)
        try:
            yield slow, call
        finally:
            call.cancel()
            slow.may_read.set()
            server.close()
            await server.wait_closed()


@pytest.mark.parametrize("is_wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_begun_at_once_goes_out_whole_and_in_order(seed: int, is_wide: bool) -> None:
    async def run() -> None:
        rng = random.Random(seed)
        messages = [rng.randbytes(rng.choice([0, 1, 900, 20_000, 60_000])) for _ in range(25)]
        begun = finished = 0
        async with dialled(seed, is_wide=is_wide) as (slow, call):
            slow.may_read.set()
            last: asyncio.Task[None] | None = None
            for message in messages:
                cut = rng.randint(0, len(message))
                pieces = [message[:cut], memoryview(message)[cut:]]
                if last is not None:
                    await last
                    last = None
                if rng.random() < 0.2:
                    await call.write(pieces)
                    continue
                left = call.write_now(pieces)
                finished += left is None
                begun += left is not None
                if left is not None:
                    last = asyncio.ensure_future(left)
                    await asyncio.sleep(0)
            if last is not None:
                await last
            expected = b"".join(map(prefixed, messages))
            await until(lambda: slow.body() == expected, "all came, in order", 8.0)
            await until(lambda: slow.answers() == slow.pings, "every ping was answered", 8.0)
            assert slow.pings
        assert begun > 3 and finished > 0, "both ways were gone"

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(4))
def test_frames_that_want_out_meanwhile_wait_for_the_end_of_the_one_that_has_begun(seed: int) -> None:
    """Answers to pings, another message and the end of the call, all while the kernel takes nothing."""

    async def run() -> None:
        rng = random.Random(seed)
        first, second = rng.randbytes(5_000_000), rng.randbytes(rng.choice([5, 50_000]))
        async with dialled(seed, is_wide=True) as (slow, call):
            await call.write([b"begin"])
            left = call.write_now([first])
            assert left is not None, "the kernel took all of it"
            rest = asyncio.ensure_future(left)
            await asyncio.sleep(0)
            behind = call.write_now([second])
            assert behind is not None
            others = [asyncio.ensure_future(behind)]
            await asyncio.sleep(0)
            others.append(asyncio.ensure_future(call.done_writing()))
            await asyncio.sleep(0)
            assert not rest.done() and not any(other.done() for other in others)
            slow.may_read.set()
            await asyncio.gather(rest, *others)
            await until(lambda: slow.body() == b"".join(map(prefixed, (b"begin", first, second))), "all came", 8.0)
            assert slow.frames()[-1][0] in (Kind.DATA, Kind.PING)
            await until(lambda: slow.answers() == slow.pings, "every ping was answered", 8.0)

    asyncio.run(run())


def test_a_call_that_is_cancelled_in_the_middle_reads_nothing_more_and_says_so() -> None:
    async def run() -> None:
        async with dialled(1, is_wide=True) as (_, call):
            await call.write([b"begin"])
            memory = bytearray(5_000_000)
            left = call.write_now([memoryview(memory)])
            assert left is not None
            rest = asyncio.ensure_future(left)
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(grpc.RpcError):
                await rest
            late = call.write_now([b"late"])
            assert late is not None, "it raises nothing itself"
            with pytest.raises(grpc.RpcError):
                await late

    asyncio.run(run())


class TimedOut:
    """A socket whose peer has been silent for too long, as the kernel tells it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendmsg(self, pieces: object) -> int:
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")


@pytest.mark.parametrize("how", ["broken pipe", "timed out"])
def test_a_peer_that_is_gone_is_told_by_what_is_awaited_and_not_by_the_beginning(how: str) -> None:
    async def run() -> None:
        async with dialled(2, is_wide=True) as (slow, call):
            await call.write([b"begin"])
            slow.may_read.set()
            await until(lambda: bool(slow.body()), "it came")
            if how == "timed out":
                call._connection._link._sock = TimedOut(call._connection._link._sock)  # type: ignore[assignment]
            else:
                call._connection._link._sock.shutdown(socket.SHUT_WR)  # so the kernel refuses what is written, as after a reset
            left = call.write_now([b"x" * 100_000])
            assert left is not None
            with pytest.raises(grpc.RpcError):
                await left

    asyncio.run(run())


def test_a_stream_of_a_hand_off_keeps_the_order_of_its_messages() -> None:
    """As the sender does it: the next message is made while the kernel has not taken all of the one before."""

    async def run() -> None:
        rng = random.Random(3)
        messages = [rng.randbytes(rng.choice([10, 3_000, 80_000])) for _ in range(40)]
        async with dialled(3, is_wide=True) as (slow, call):
            slow.may_read.set()
            stream = PushStream(call, 1 << 30, 5.0, lambda: None)
            for message in messages:
                await stream.send([message], len(message))
            expected = b"".join(map(prefixed, messages))
            await until(lambda: slow.body() == expected, "all came, in order", 8.0)
            await stream.close()

    asyncio.run(run())
