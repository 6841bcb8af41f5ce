"""Frames and messages without a socket: whatever the cuts between reads, the same messages come out, byte for byte."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.h2_peer import pieces_of, prefixed
from workers.engine_api.memory_views import copy_into
from workers.kv_wire.h2_frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    LARGEST_FRAME_BYTES,
    PADDED,
    PREFACE,
    Code,
    FrameHead,
    Kind,
    Setting,
    WireFault,
    frame,
    head,
    read_head,
    read_settings,
    settings,
)
from workers.kv_wire.header_blocks import HeaderReader, HeaderWriter
from workers.kv_wire.message_reader import CallFault, MessageReader
from workers.kv_wire.peer_limits import IdleBudget, PeerLimits
from workers.kv_wire.pieces import cut, drop, first_of

MOST_BYTES = 300_000


@dataclass
class Heard:
    """A handler that writes everything down."""

    controls: list[tuple[int, bytes]] = field(default_factory=list)
    ended: list[FrameHead] = field(default_factory=list)
    faults: list[CallFault] = field(default_factory=list)
    wanted_stream: int = 1

    def data_begins(self, head: FrameHead) -> bool:
        return head.stream == self.wanted_stream

    def data_ended(self, head: FrameHead) -> None:
        self.ended.append(head)

    def control(self, head: FrameHead, payload: memoryview) -> None:
        self.controls.append((head.kind, bytes(payload)))

    def call_failed(self, fault: CallFault) -> None:
        self.faults.append(fault)


def reader_of(heard: Heard, *, expects_preface: bool = False) -> MessageReader:
    return MessageReader(heard, MOST_BYTES, LARGEST_FRAME_BYTES, expects_preface=expects_preface)


class Socket:
    """Bytes that come in reads of random sizes."""

    def __init__(self, wire: bytes, rng: random.Random) -> None:
        self._wire = memoryview(wire)
        self._rng = rng

    def recv_into(self, views: Sequence[memoryview]) -> int:
        """Fills the beginning of the views; 0 when nothing more comes."""
        room = sum(view.nbytes for view in views)
        assert room > 0
        count = min(room, len(self._wire), self._rng.choice([1, 2, 7, 100, 5_000, 400_000]))
        copy_into(first_of(views, count), self._wire)
        self._wire = self._wire[count:]
        return count

    def fill(self, reader: MessageReader) -> bool:
        """Goes through what is in the small buffer, then reads more into it; false when nothing more comes."""
        if reader.parse():
            return True
        count = self.recv_into([reader.buffer()])
        reader.filled(count)
        return count > 0


def read_some(reader: MessageReader, socket: Socket, rng: random.Random, size: int) -> bytes:
    """The next `size` bytes of the message, in all the ways there are to read them; fewer when nothing more comes."""
    memory = memoryview(bytearray(size))
    at = 0
    while at < size:
        here = reader.here()[: size - at]
        if here:
            count = rng.choice([1, len(here), rng.randint(1, len(here))])
            memory[at : at + count] = here[:count]
            reader.consume(count)
            at += count
        elif reader.direct_bytes and rng.random() < 0.8:
            views = first_of(pieces_of(memory[at:], rng), reader.direct_bytes)
            count = socket.recv_into([*views, reader.ahead])
            if not count:
                break
            direct = min(count, sum(view.nbytes for view in views))
            reader.received(direct, count - direct)
            at += direct
        elif not socket.fill(reader):
            break
    return bytes(memory[:at])


def take_all(reader: MessageReader, wire: bytes, rng: random.Random, *, all_of_it: bool = True) -> list[bytes]:
    """What was read of each message: everything, or as much as `rng` draws before it goes on to the next one."""
    found: list[bytes] = []
    socket = Socket(wire, rng)
    reader.parse()
    while True:
        while not reader.has_message:
            if not socket.fill(reader):
                return found
        size = reader.left_bytes
        found.append(read_some(reader, socket, rng, size if all_of_it else rng.choice([0, size, rng.randint(0, size)])))
        reader.finish()
        assert not reader.has_message
        reader.parse()


def wire_of(messages: list[bytes], rng: random.Random) -> tuple[bytes, int, int]:
    """The messages in frames of random sizes, with pings and frames of another call in between; how many of these."""
    body = b"".join(map(prefixed, messages))
    wire, pings, foreign = bytearray(PREFACE), 0, 0
    while body:
        size = rng.choice([1, 5, 9, 300, 16_384, 100_000, len(body)])
        wire += frame(Kind.DATA, body[:size], stream=1)
        body = body[size:]
        if rng.random() < 0.3:
            wire += frame(Kind.PING, pings.to_bytes(8, "big"))
            pings += 1
        if rng.random() < 0.2:
            wire += frame(Kind.DATA, rng.randbytes(rng.randint(0, 20_000)), stream=3)
            foreign += 1
    wire += frame(Kind.DATA, flags=END_STREAM, stream=1)
    return bytes(wire), pings, foreign


@pytest.mark.parametrize("all_of_it", [True, False], ids=["whole", "in part"])
@pytest.mark.parametrize("seed", range(60))
def test_any_cut_of_frames_and_reads_gives_the_same_messages(seed: int, all_of_it: bool) -> None:
    rng = random.Random(seed)
    messages = [rng.randbytes(rng.choice([0, 1, 20, 3_000, 70_000, MOST_BYTES])) for _ in range(rng.randint(1, 8))]
    wire, pings, foreign = wire_of(messages, rng)
    heard = Heard()
    found = take_all(reader_of(heard, expects_preface=True), wire, rng, all_of_it=all_of_it)
    assert len(found) == len(messages)
    assert all(message.startswith(part) for message, part in zip(messages, found, strict=True))
    assert not all_of_it or found == messages
    assert [payload for _, payload in heard.controls] == [number.to_bytes(8, "big") for number in range(pings)]
    assert heard.ended[-1].flags == END_STREAM and sum(head.stream == 3 for head in heard.ended) == foreign


@pytest.mark.parametrize("seed", range(30))
def test_after_a_call_was_dropped_its_bytes_are_passed_over_and_the_next_one_begins_anew(seed: int) -> None:
    rng = random.Random(seed)
    first, second = rng.randbytes(rng.choice([10, 9_000, 50_000])), rng.randbytes(rng.choice([0, 10, 50_000]))
    rest = prefixed(first)
    wire = b""
    while rest:
        size = rng.choice([1, 3, 7, 16_384, len(rest)])
        wire += frame(Kind.DATA, rest[:size], stream=1)
        rest = rest[size:]
    heard = Heard()
    reader = reader_of(heard)
    cut = rng.randint(1, len(wire))
    socket = Socket(wire[:cut], rng)
    while not reader.has_message and socket.fill(reader):
        pass
    if reader.has_message:
        read_some(reader, socket, rng, rng.randint(0, reader.left_bytes))
    while not reader.has_message and socket.fill(reader):
        pass
    heard.wanted_stream = 3
    reader.drop_call()
    assert not reader.has_message
    behind = bytes(socket._wire) + wire[cut:] + frame(Kind.DATA, prefixed(second), END_STREAM, 3)
    assert take_all(reader, behind, rng) == [second]


def test_a_length_that_is_announced_costs_no_memory() -> None:
    reader = MessageReader(Heard(), 2**31, LARGEST_FRAME_BYTES, expects_preface=False)
    socket = Socket(frame(Kind.DATA, b"\0" + (2**31).to_bytes(4, "big") + b"begin", stream=1), random.Random(0))
    tracemalloc.start()
    while socket.fill(reader):
        pass
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reader.left_bytes == 2**31 and reader.here() == b"begin" and most_bytes < 64 * 1024


@pytest.mark.parametrize(
    ("body", "status"), [(b"\1" + (5).to_bytes(4, "big") + b"hello", 12), (b"\0" + (MOST_BYTES + 1).to_bytes(4, "big"), 8)]
)
def test_what_is_no_message_here_ends_the_call_and_not_the_connection(body: bytes, status: int) -> None:
    heard = Heard()
    wire = frame(Kind.DATA, body + b"rest" * 1000, stream=1) + frame(Kind.PING, b"12345678")
    assert take_all(reader_of(heard), wire, random.Random(0)) == []
    assert [fault.status for fault in heard.faults] == [status] and len(heard.controls) == 1


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", Code.PROTOCOL_ERROR),
        (PREFACE + frame(Kind.DATA, b"\3abc\0\0\0", PADDED, 1), Code.PROTOCOL_ERROR),
        (PREFACE + head(16_385, Kind.HEADERS, 0, 1), Code.FRAME_SIZE_ERROR),
        (PREFACE + head(2**24 - 1, Kind.SETTINGS), Code.FRAME_SIZE_ERROR),
    ],
)
def test_a_broken_protocol_is_named(wire: bytes, code: Code) -> None:
    with pytest.raises(WireFault) as caught:
        take_all(reader_of(Heard(), expects_preface=True), wire, random.Random(0))
    assert caught.value.code is code


@given(st.binary(max_size=400), st.integers(0, 2**32))
def test_garbage_is_refused_or_waits(garbage: bytes, seed: int) -> None:
    with suppress(WireFault):
        take_all(reader_of(Heard()), garbage, random.Random(seed))


@given(st.integers(0, LARGEST_FRAME_BYTES), st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**31 - 1))
def test_heads_read_as_they_were_written(size: int, kind: int, flags: int, stream: int) -> None:
    assert read_head(memoryview(head(size, kind, flags, stream))) == FrameHead(size, kind, flags, stream)


def test_settings_are_read_and_bounded() -> None:
    wire = memoryview(settings({Setting.MAX_FRAME_SIZE: 20_000, Setting.INITIAL_WINDOW_SIZE: 7}))[9:]
    assert read_settings(wire) == {5: 20_000, 4: 7}
    bad: list[bytes] = [b"12345", settings({Setting.MAX_FRAME_SIZE: 5})[9:], settings({Setting.INITIAL_WINDOW_SIZE: 2**31})[9:]]
    bad += [settings({Setting.ENABLE_PUSH: 2})[9:], settings({Setting.MAX_FRAME_SIZE: 20_000})[9:] * 33]
    for payload in bad:
        with pytest.raises(WireFault):
            read_settings(memoryview(payload))


def test_header_lists_come_back_whole_from_any_number_of_frames() -> None:
    pairs = [(":path", "/x"), ("te", "trailers"), ("long", "y" * 500)]
    whole = HeaderWriter().frame(5, pairs)[9:]
    reader = HeaderReader()
    assert reader.take(FrameHead(0, Kind.HEADERS, 0, 5), memoryview(whole[:20])) is None and reader.is_open
    first, headers = reader.take(FrameHead(0, Kind.CONTINUATION, END_HEADERS, 5), memoryview(whole[20:])) or pytest.fail("open")
    assert first.stream == 5 and headers == dict(pairs) and not reader.is_open


def test_header_bombs_are_refused() -> None:
    reader = HeaderReader()
    reader.take(FrameHead(0, Kind.HEADERS, 0, 1), memoryview(b""))
    with pytest.raises(WireFault, match="8 frames"):
        for _ in range(100):
            reader.take(FrameHead(0, Kind.CONTINUATION, 0, 1), memoryview(b""))
    with pytest.raises(WireFault, match="8192"):
        HeaderReader().take(FrameHead(0, Kind.HEADERS, END_HEADERS, 1), memoryview(b"x" * 9000))
    # one literal of 3000 bytes enters the table, then it is named a thousand times by one byte each
    literal = b"\x40\x01a\x7f" + bytes([3000 - 127 & 0x7F | 0x80, 3000 - 127 >> 7]) + b"v" * 3000
    with pytest.raises(WireFault, match="header list"):
        HeaderReader().take(FrameHead(0, Kind.HEADERS, END_HEADERS, 1), memoryview(literal + b"\xbe" * 1000))
    with pytest.raises(WireFault, match="decoded"):
        HeaderReader().take(FrameHead(0, Kind.HEADERS, END_HEADERS, 1), memoryview(b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"))
    with pytest.raises(WireFault, match="padding"):
        HeaderReader().take(FrameHead(0, Kind.HEADERS, END_HEADERS | PADDED, 1), memoryview(b"\x09abc"))


def test_windows_do_not_overflow_and_may_be_negative() -> None:
    limits = PeerLimits()
    limits.begin_call()
    limits.spend(60_000)
    limits.apply({Setting.INITIAL_WINDOW_SIZE: 1_000})
    assert limits.room_bytes == 65_535 - 60_000 - (65_535 - 1_000)
    limits.widen(100_000, is_stream=True)
    assert limits.room_bytes == 5_535
    with pytest.raises(WireFault):
        limits.widen(2**31 - 1, is_stream=False)


def test_frames_that_carry_nothing_are_counted_and_forgiven_with_time() -> None:
    budget = IdleBudget(0.0)
    for _ in range(256):
        budget.spend(0.0)
    budget.spend(1.0)
    with pytest.raises(WireFault):
        for _ in range(70):
            budget.spend(1.0)
    assert ACK == END_STREAM == 1


@given(st.lists(st.binary(max_size=9), max_size=6), st.integers(0, 60))
def test_pieces_are_cut_and_dropped_as_if_joined(parts: list[bytes], size: int) -> None:
    whole = b"".join(parts)
    size = min(size, len(whole))
    first, rest = cut([memoryview(part) for part in parts], size)
    assert (b"".join(first), b"".join(rest)) == (whole[:size], whole[size:])
    assert b"".join(drop(parts, size)) == whole[size:]
    assert b"".join(first_of([memoryview(part) for part in parts], size)) == whole[:size]
    memory = bytearray(len(whole))
    views, at = [], 0
    for part in parts:
        views.append(memoryview(memory)[at : at + len(part)])
        at += len(part)
    assert copy_into(views, memoryview(whole)[:size]) == size and memory == whole[:size] + bytes(len(whole) - size)
    assert copy_into(views, memoryview(whole + b"more")) == len(whole) and memory == whole
