"""Peers that break HTTP/2 or lean on its limits: each is refused or cut, and the server goes on serving others."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from tests.support.h2_peer import HELLO, METHOD, data, headers, wholes
from workers.kv_wire.h2_frames import (
    END_HEADERS,
    END_STREAM,
    PADDED,
    PREFACE,
    Code,
    FrameHead,
    Kind,
    frame,
    head,
    read_head,
    reset,
    settings,
    window_update,
)
from workers.kv_wire.header_blocks import HeaderReader, HeaderWriter
from workers.kv_wire.incoming import Incoming
from workers.kv_wire.push_client import dial
from workers.kv_wire.push_server import PushServer, ServerLimits

MOST_BYTES = 1 << 20


async def digests(messages: AsyncIterator[Incoming]) -> AsyncGenerator[bytes, None]:
    async for message in wholes(messages):
        yield hashlib.sha256(message).digest()


def path_of(path: str) -> bytes:
    pairs = [(":method", "POST"), (":path", path), ("content-type", "application/grpc")]
    return HeaderWriter().frame(1, pairs)


async def frames_until_closed(reader: asyncio.StreamReader) -> list[tuple[FrameHead, bytes]]:
    """Everything that the server says until it hangs up."""
    found = []
    while True:
        try:
            first = read_head(memoryview(await reader.readexactly(9)))
            found.append((first, await reader.readexactly(first.size_bytes)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return found


async def attack(wire: bytes, *, idle_s: float = 5.0) -> list[tuple[FrameHead, bytes]]:
    """What a server answers to these bytes until it hangs up; another peer is served meanwhile and afterwards."""
    server = PushServer({METHOD: digests}, ServerLimits(MOST_BYTES, idle_s=idle_s))
    port = server.listen("127.0.0.1")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(wire)
    async with asyncio.timeout(10):
        await serves(port)
        found = await frames_until_closed(reader)
        await serves(port)
    writer.close()
    await server.close()
    assert not server.connections
    return found


async def serves(port: int) -> None:
    call = await dial("127.0.0.1", port, METHOD, bytes, 5.0)
    await call.write([b"hello"])
    await call.done_writing()
    assert [reply async for reply in call] == [hashlib.sha256(b"hello").digest()]
    call.cancel()


def goaway_code(found: list[tuple[FrameHead, bytes]]) -> Code | None:
    codes = [Code(struct.unpack_from(">L", payload, 4)[0]) for first, payload in found if first.kind == Kind.GOAWAY]
    return codes[0] if codes else None


PROTOCOL_BREAKS = {
    "no preface": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3, Code.PROTOCOL_ERROR),
    "no settings first": (PREFACE + frame(Kind.PING, b"x" * 8), Code.PROTOCOL_ERROR),
    "settings of a stream": (PREFACE + frame(Kind.SETTINGS, stream=1), Code.PROTOCOL_ERROR),
    "settings cut": (PREFACE + frame(Kind.SETTINGS, b"12345"), Code.FRAME_SIZE_ERROR),
    "an oversized control frame": (HELLO + head(1 << 20, Kind.HEADERS, END_HEADERS, 1), Code.FRAME_SIZE_ERROR),
    "data of stream 0": (HELLO + frame(Kind.DATA, b"x"), Code.PROTOCOL_ERROR),
    "data of no stream": (HELLO + data(b"x", stream=7), Code.PROTOCOL_ERROR),
    "an even stream": (HELLO + headers(2), Code.PROTOCOL_ERROR),
    "headers of stream 0": (HELLO + headers(0), Code.PROTOCOL_ERROR),
    "padded data": (HELLO + headers() + frame(Kind.DATA, b"\1abc\0", PADDED, 1), Code.PROTOCOL_ERROR),
    "a stream that goes back": (HELLO + headers(5, END_STREAM) + headers(3), Code.PROTOCOL_ERROR),
    "no hpack": (HELLO + frame(Kind.HEADERS, b"\xff" * 20, END_HEADERS, 1), Code.COMPRESSION_ERROR),
    "a frame inside of headers": (HELLO + frame(Kind.HEADERS, b"", 0, 1) + frame(Kind.PING, b"x" * 8), Code.PROTOCOL_ERROR),
    "continuation of nothing": (HELLO + frame(Kind.CONTINUATION, b"", 0, 1), Code.PROTOCOL_ERROR),
    "a window beyond the largest": (HELLO + window_update(2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "a window by nothing": (HELLO + window_update(0), Code.PROTOCOL_ERROR),
    "a ping of 7 bytes": (HELLO + frame(Kind.PING, b"x" * 7), Code.FRAME_SIZE_ERROR),
    "a promise": (HELLO + frame(Kind.PUSH_PROMISE, b"\0" * 8, END_HEADERS, 1), Code.PROTOCOL_ERROR),
    "a reset of no stream": (HELLO + reset(9, Code.CANCEL), Code.PROTOCOL_ERROR),
    "continuations without end": (HELLO + frame(Kind.HEADERS, b"", 0, 1) + frame(Kind.CONTINUATION, b"", 0, 1) * 500,
                                  Code.ENHANCE_YOUR_CALM),
    "pings without end": (HELLO + frame(Kind.PING, b"x" * 8) * 5000, Code.ENHANCE_YOUR_CALM),
    "settings without end": (HELLO + settings({}) * 5000, Code.ENHANCE_YOUR_CALM),
    "empty data without end": (HELLO + headers() + frame(Kind.DATA, b"", 0, 1) * 5000, Code.ENHANCE_YOUR_CALM),
    "unknown frames without end": (HELLO + frame(77, b"x") * 5000, Code.ENHANCE_YOUR_CALM),
    "streams that are reset at once": (
        HELLO + b"".join(headers(n) + reset(n, Code.CANCEL) for n in range(1, 4001, 2)), Code.ENHANCE_YOUR_CALM,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROTOCOL_BREAKS)
def test_a_broken_protocol_ends_the_connection_with_its_code(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A peer that goes on sending may miss the code: the kernel throws away what it has not read. The log has it."""
    wire, code = PROTOCOL_BREAKS[name]
    assert goaway_code(asyncio.run(attack(wire))) in (code, None)
    assert f"ends: {code.name}: " in caplog.text


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (path_of("/autan.v1.KvTransfer/Pull"), "12"),
        (path_of("/" + "x" * 3000), "12"),
        (headers(grpc_encoding="gzip"), "12"),
        (headers(content_type="text/plain"), "12"),
        (headers() + frame(Kind.DATA, b"\1\0\0\0\1x", 0, 1), "12"),
        (headers() + frame(Kind.DATA, b"\0" + (MOST_BYTES + 1).to_bytes(4, "big") + b"x" * 5000, 0, 1) + data(b"more"), "8"),
        (headers() + data(b"x", flags=END_STREAM), "0"),
    ],
)
def test_a_call_that_is_not_for_here_ends_in_trailers_and_an_idle_connection_is_closed(wire: bytes, status: str) -> None:
    found = asyncio.run(attack(HELLO + wire, idle_s=0.3))
    reader = HeaderReader()
    lists = [
        whole for first, payload in found if first.kind == Kind.HEADERS and (whole := reader.take(first, memoryview(payload)))
    ]
    first, last = lists[-1]
    assert last["grpc-status"] == status and first.flags & END_STREAM
    assert goaway_code(found) is None


@pytest.mark.parametrize("wire", [b"", PREFACE[:10], PREFACE, HELLO, HELLO + headers()[:12]])
def test_a_peer_that_says_no_more_is_cut_when_its_time_is_over(wire: bytes) -> None:
    assert goaway_code(asyncio.run(attack(wire, idle_s=0.3))) is None


def test_one_call_at_a_time_and_no_more_connections_than_allowed() -> None:
    async def run() -> None:
        server = PushServer({METHOD: digests}, ServerLimits(MOST_BYTES, most_connections=2))
        port = server.listen("127.0.0.1")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HELLO + headers(1) + headers(3) + data(b"x", flags=END_STREAM))
        seen: list[tuple[FrameHead, bytes]] = []
        while not any(first.kind == Kind.HEADERS and first.flags & END_STREAM for first, _ in seen):
            first = read_head(memoryview(await reader.readexactly(9)))
            seen.append((first, await reader.readexactly(first.size_bytes)))
        refused = [payload for first, payload in seen if first.kind == Kind.RST_STREAM and first.stream == 3]
        assert refused == [Code.REFUSED_STREAM.to_bytes(4, "big")]
        await serves(port)
        more, more_writer = await asyncio.open_connection("127.0.0.1", port)
        await more.readexactly(9)  # it is let in
        extra, extra_writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(5):
            assert await frames_until_closed(extra) == []
        for other in (more_writer, extra_writer):
            other.close()
        writer.close()
        await server.close()

    asyncio.run(run())
