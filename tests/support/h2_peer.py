"""A peer of the Push port that writes its HTTP/2 byte by byte, as no client does."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

from workers.kv_wire.h2_frames import PREFACE, Kind, frame, settings
from workers.kv_wire.header_blocks import HeaderWriter
from workers.kv_wire.incoming import Incoming

METHOD = "/autan.v1.KvTransfer/Push"
HELLO = PREFACE + settings({})


def headers(stream: int = 1, flags: int = 0, **changed: str) -> bytes:
    """The beginning of a call, with other values in some headers."""
    pairs = {":method": "POST", ":scheme": "http", ":path": METHOD, "te": "trailers", "content-type": "application/grpc"}
    pairs |= {name.replace("_", "-"): value for name, value in changed.items()}
    return HeaderWriter().frame(stream, list(pairs.items()), flags)


def data(body: bytes, stream: int = 1, flags: int = 0) -> bytes:
    """A message in one frame."""
    return frame(Kind.DATA, prefixed(body), flags, stream)


def prefixed(message: bytes) -> bytes:
    """A message as gRPC has it in its stream of bytes."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def in_frames(body: bytes, rng: random.Random, sizes: tuple[int, ...], *, pings: float = 0.0) -> bytes:
    """The bytes of a call in frames of these sizes, pings between some of them."""
    wire = bytearray()
    while body:
        size = rng.choice([*sizes, -(-len(body) // 2)])  # so the last frames are small
        wire += frame(Kind.DATA, body[:size], stream=1)
        body = body[size:]
        if rng.random() < pings:
            wire += frame(Kind.PING, rng.randbytes(8))
    return bytes(wire)


def pieces_of(memory: memoryview, rng: random.Random, most: int = 60) -> list[memoryview]:
    """Views that follow each other and are all of it, unless there are too many."""
    views: list[memoryview] = []
    while memory and len(views) < most:
        count = rng.randint(1, len(memory))
        views.append(memory[:count])
        memory = memory[count:]
    return views


async def wholes(messages: AsyncIterator[Incoming]) -> AsyncIterator[memoryview]:
    """Messages that are read in one piece."""
    async for message in messages:
        yield await message.whole()
