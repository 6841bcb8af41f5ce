"""Messages that are read while they come, over real connections: any mix of reads and any cut of frames, the same bytes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from protos.contract.errors import BadFrame, PeerUnavailable
from tests.support.h2_peer import HELLO, METHOD, headers, in_frames, pieces_of, prefixed
from tests.support.worker_world import until
from workers.engine_api.memory_views import unguarded
from workers.kv_wire.h2_frames import END_STREAM, Code, Kind, frame, reset
from workers.kv_wire.incoming import Incoming
from workers.kv_wire.push_client import dial
from workers.kv_wire.push_server import PushServer, ServerLimits

MOST_BYTES = 300_000
LENGTH_BYTES = 2


def made(rng: random.Random) -> bytes:
    """A message that begins with the length of its head."""
    head = rng.randbytes(rng.choice([0, 1, 30, 5_000]))
    return len(head).to_bytes(LENGTH_BYTES, "big") + head + rng.randbytes(rng.choice([0, 1, 20, 9_000, 70_000, 200_000]))


def head_of(message: bytes) -> bytes:
    return message[: LENGTH_BYTES + int.from_bytes(message[:LENGTH_BYTES], "big")]


class Reads:
    """A handler that reads each message in another way, and writes down what it got; whether it wanted all of it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.found: list[tuple[bytes, bool]] = []

    async def __call__(self, messages: AsyncIterator[Incoming]) -> AsyncGenerator[bytes, None]:
        async for message in messages:
            if self._rng.random() < 0.1:
                self.found.append((b"", False))
                continue
            asked = 0

            def measure(begin: memoryview) -> int | None:
                nonlocal asked
                assert len(begin) > asked, "shown more each time"
                asked = len(begin)
                if len(begin) < LENGTH_BYTES:
                    return None
                size = LENGTH_BYTES + int.from_bytes(begin[:LENGTH_BYTES], "big")
                return size if size <= len(begin) else None

            size = message.size_bytes
            head = bytes(await message.head(measure))
            assert head == head_of(head)
            left = size - len(head)
            if self._rng.random() < 0.3:
                self.found.append((head + bytes(await message.whole()), True))
                continue
            wanted = left if self._rng.random() < 0.7 else self._rng.randint(0, left)
            self.found.append((head + await self._in_pieces(message, wanted), wanted == left))
        yield b"done"

    async def _in_pieces(self, message: Incoming, wanted: int) -> bytes:
        memory = memoryview(bytearray(wanted))
        at = 0
        while at < wanted:
            count = message.receive(pieces_of(memory[at:], self._rng), unguarded)
            if not count:
                await message.more()
            at += count
        return bytes(memory)


@asynccontextmanager
async def serving(handler: Callable[[AsyncIterator[Incoming]], AsyncGenerator[bytes, None]]) -> AsyncIterator[PushServer]:
    server = PushServer({METHOD: handler}, ServerLimits(MOST_BYTES, idle_s=5.0))
    server.listen("127.0.0.1")
    async with asyncio.timeout(10):
        yield server
        await server.close()


async def write_cut(writer: asyncio.StreamWriter, wire: bytes, rng: random.Random) -> None:
    """In pieces that mostly arrive one by one."""
    while wire:
        size = rng.choice([1, 9, 500, 20_000, len(wire)])
        writer.write(wire[:size])
        wire = wire[size:]
        for _ in range(rng.randint(0, 3)):
            await asyncio.sleep(0)
    await writer.drain()


@pytest.mark.parametrize("seed", range(40))
def test_any_mix_of_reads_gives_the_bytes_that_were_sent(seed: int) -> None:
    """Nothing is sent behind the last message until it was read: what is here already is enough."""

    async def run() -> None:
        rng = random.Random(seed)
        messages = [made(rng) for _ in range(rng.randint(1, 8))]
        reads = Reads(random.Random(seed))
        async with serving(reads) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            wire = in_frames(b"".join(map(prefixed, messages)), rng, (1, 40, 300, 16_384), pings=0.01)
            await write_cut(writer, HELLO + headers() + wire, rng)
            await until(lambda: len(reads.found) == len(messages), "all of them were read", 5.0)
            writer.close()
        for message, (found, is_whole) in zip(messages, reads.found, strict=True):
            assert found == message if is_whole else message.startswith(found)

    asyncio.run(run())


def test_what_was_read_whole_stays_as_it_is_while_the_next_one_comes() -> None:
    async def run() -> None:
        rng = random.Random(1)
        messages, taken = [rng.randbytes(100_000), rng.randbytes(100_000)], list[memoryview]()

        async def keep(incoming: AsyncIterator[Incoming]) -> AsyncGenerator[bytes, None]:
            async for message in incoming:
                taken.append(await message.whole())
            yield b"done"

        async with serving(keep) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(HELLO + headers() + in_frames(b"".join(map(prefixed, messages)), rng, (16_384,)))
            await until(lambda: len(taken) == 2, "both came")
            assert taken == messages
            with pytest.raises(TypeError):
                taken[0][0] = 0
            writer.close()

    asyncio.run(run())


def test_bytes_are_written_inside_of_the_guard_only_and_its_refusal_ends_the_call_and_not_the_connection() -> None:
    async def run() -> None:
        entries = received = 0
        memory = bytearray(50_000)

        def refuse(fill: Callable[[], int]) -> int:
            nonlocal entries
            if entries == 3:
                raise BadFrame("block 3 belongs to no open import")
            entries += 1
            before = bytes(memory)
            count = fill()
            assert memory != before
            return count

        async def guarded(messages: AsyncIterator[Incoming]) -> AsyncGenerator[bytes, None]:
            nonlocal received
            async for message in messages:
                while received < message.size_bytes:
                    count = message.receive([memoryview(memory)[received : received + 10_000]], refuse)
                    received += count
                    if not count:
                        await message.more()
                yield b"whole"

        async with serving(guarded) as server:
            sent = random.Random(2).randbytes(50_000)
            for _ in range(2):
                entries, received = 0, 0
                memory[:] = bytes(len(memory))
                call = await dial("127.0.0.1", server.port, METHOD, bytes, 5.0)
                await call.write([sent])
                with pytest.raises(Exception, match="block 3 belongs"):
                    await anext(call)
                call.cancel()
                assert entries == 3 and 0 < received < len(sent)
                assert memory == sent[:received] + bytes(len(sent) - received)

    asyncio.run(run())


ENDS = {
    "hangs up": b"",
    "resets the stream": reset(1, Code.CANCEL),
    "ends the stream": frame(Kind.DATA, b"", END_STREAM, 1),
    "breaks the protocol": frame(Kind.DATA, b"x", 0, 0),
}


@pytest.mark.parametrize("how", ["head", "whole", "receive"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("sent", [1, 20_000, 70_000])
def test_a_message_that_ends_in_the_middle_is_an_unreachable_peer(how: str, end: str, sent: int) -> None:
    async def run() -> None:
        ends: asyncio.Queue[BaseException] = asyncio.Queue()
        memory = memoryview(bytearray(100_000))

        async def handler(messages: AsyncIterator[Incoming]) -> AsyncGenerator[bytes, None]:
            try:
                async for message in messages:
                    if how == "head":
                        await message.head(lambda begin: None if len(begin) < 100_000 else 100_000)
                    elif how == "whole":
                        await message.whole()
                    else:
                        at = 0
                        while True:
                            count = message.receive([memory[at:]], unguarded)
                            at += count
                            if not count:
                                await message.more()
                yield b"no end"
            except PeerUnavailable as error:
                ends.put_nowait(error)
                raise

        async with serving(handler) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            whole = prefixed(random.Random(3).randbytes(100_000))
            writer.write(HELLO + headers() + frame(Kind.DATA, whole[:sent], stream=1) + ENDS[end])
            await writer.drain()
            if end == "hangs up":
                writer.close()
            if sent == 1:  # no message has begun: there is nobody to tell but who waits for one
                if end in ("hangs up", "resets the stream", "breaks the protocol"):
                    assert isinstance(await ends.get(), PeerUnavailable)
            else:
                assert isinstance(await ends.get(), PeerUnavailable)
            await until(lambda: server.connections == (end not in ("hangs up", "breaks the protocol")), "it is settled")
            writer.close()

    asyncio.run(run())
