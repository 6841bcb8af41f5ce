"""The codec and protobuf read each other; garbage is a ValueError, never anything else."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import kv
from tests.support.push_frames import Part, frames_of, head_of, message_of, part, parts_of
from workers.kv_transfer.body import MemoryBody
from workers.kv_transfer.push_codec import (
    MAX_PARTS,
    DataFrame,
    HeadScan,
    PushMessage,
    data_pieces,
    decode_push,
    encode_data,
    encode_other,
)

U32 = st.integers(0, 2**32 - 1)
ENCODINGS = st.sampled_from([*kv.KvEncoding.values(), 99])


def carried(payload: bytes) -> st.SearchStrategy[DataFrame]:
    """Frames with these bytes."""
    digests, empty = st.binary(max_size=16), st.just(0)
    return st.builds(DataFrame, U32, U32, U32, st.just(memoryview(payload)), digests, ENCODINGS, empty, empty)


CARRIED = st.binary(max_size=100).flatmap(carried)
NAMED = st.builds(
    DataFrame, U32, U32, st.just(0), st.just(memoryview(b"")), st.binary(max_size=16), st.just(0),
    st.integers(0, 2**64 - 1), st.integers(1, 2**32 - 1),
)  # fmt: skip
PARTS = st.one_of(st.lists(CARRIED, min_size=1, max_size=6), st.lists(NAMED, min_size=1, max_size=6))


@given(st.text(max_size=40), st.integers(0, 2**64 - 1), PARTS, U32)
def test_protobuf_and_the_codec_read_each_other(transfer_id: str, epoch: int, frames: list[DataFrame], stream: int) -> None:
    message = encode_data(transfer_id, epoch, frames, stream)
    parsed = kv.PushFrame.FromString(message)
    heads = [
        kv.BlockFrame(
            block_index=one.block_index, layer_group=one.layer_group, offset_bytes=one.offset_bytes,
            payload_bytes=len(one.payload), digest=one.digest, encoding=one.encoding,  # type: ignore[arg-type]
            pool_offset=one.pool_offset, pool_bytes=one.pool_bytes,
        )
        for one in frames
    ]  # fmt: skip
    assert parts_of(parsed) == [Part(head, bytes(one.payload)) for head, one in zip(heads, frames, strict=True)]
    assert parsed == message_of(transfer_id, epoch, parts_of(parsed), stream), "and nothing else is in it"
    assert message == parsed.SerializeToString(), "the payload is the last field in either"
    back = decode_push(message)
    assert (back.transfer_id, back.epoch, back.end, back.stream) == (transfer_id, epoch, None, stream)
    assert back.heads == tuple(map(head_of, frames)) and back.payload_bytes == sum(len(one.payload) for one in frames)
    assert frames_of(back) == frames


def test_ends_and_signs_of_life() -> None:
    end = kv.EndFrame(num_tokens=7, next_token_ids=b"\1\0\0\0")
    message = decode_push(encode_other("t", 3, end))
    assert (message.transfer_id, message.epoch, message.heads, message.end) == ("t", 3, (), end)
    beat = decode_push(encode_other("t", 3))
    assert (beat.transfer_id, beat.epoch, beat.heads, beat.end) == ("t", 3, (), None)


def test_payloads_are_not_copied_on_either_side() -> None:
    payload = b"x" * 100
    pieces = data_pieces("t", 1, [DataFrame(n, 0, 0, memoryview(payload), b"") for n in range(3)])
    assert [isinstance(one, memoryview) and one.obj is payload for one in pieces] == [False, True, True, True]
    message = b"".join(pieces)
    assert [frame.payload.obj is message for frame in frames_of(decode_push(message))] == [True] * 3


def some(count: int) -> list[DataFrame]:
    rng = random.Random(count)
    return [DataFrame(n, n % 3, 8 * n, memoryview(rng.randbytes(n % 7)), rng.randbytes(16 * (n % 2))) for n in range(count)]


@pytest.mark.parametrize("count", [1, 2, 9, MAX_PARTS])
def test_parts_keep_their_order(count: int) -> None:
    message = encode_data("t", 3, some(count))
    assert frames_of(decode_push(message)) == some(count)
    parsed = kv.PushFrame.FromString(message)
    assert [one.block_index for one in parsed.blocks.parts] == list(range(count))
    assert frames_of(decode_push(parsed.SerializeToString())) == some(count)


@pytest.mark.parametrize("parts", [MAX_PARTS + 1, 1000, 5000])
def test_more_parts_than_a_message_takes_are_refused(parts: int) -> None:
    with pytest.raises(ValueError, match=r"at most 64|0 bytes follow"):
        decode_push(message_of("t", 3, [part()] * parts).SerializeToString())
    # The same in several fields, which protobuf puts together.
    half = kv.PushFrame(blocks=kv.BlockFrames(parts=[kv.BlockFrame()] * (MAX_PARTS // 2 + 1))).SerializeToString()
    with pytest.raises(ValueError, match="at most 64"):
        decode_push(half + half)


@given(st.lists(CARRIED, min_size=1, max_size=3), st.lists(CARRIED, min_size=1, max_size=3))
def test_heads_in_several_fields_are_those_of_one(one: list[DataFrame], other: list[DataFrame]) -> None:
    """As protobuf has it."""
    pieces = [b"", b""]
    for at, frames in enumerate((one, other)):
        pieces[at] = kv.PushFrame(blocks=kv.PushFrame.FromString(encode_data("t", 3, frames)).blocks).SerializeToString()
    payload = b"".join(frame.payload for frame in (*one, *other))
    message = b"".join(pieces) + kv.PushFrame(payload=payload).SerializeToString()
    assert frames_of(decode_push(message)) == [*one, *other]


PAYLOAD = kv.PushFrame(payload=b"abc").SerializeToString()
HEAD = kv.PushFrame(transfer_id="t", epoch=3, blocks=kv.BlockFrames(parts=[kv.BlockFrame(payload_bytes=3)])).SerializeToString()
END = kv.PushFrame(end=kv.EndFrame(num_tokens=1)).SerializeToString()
BEAT = kv.PushFrame(transfer_id="t", epoch=3).SerializeToString()


def test_the_pieces_of_the_cases_below_are_a_message() -> None:
    assert frames_of(decode_push(HEAD + PAYLOAD)) == [DataFrame(0, 0, 0, memoryview(b"abc"), b"")]
    assert decode_push(BEAT + END).end is not None and not decode_push(BEAT).heads


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(PAYLOAD + HEAD, id="payload first"),
        pytest.param(BEAT + PAYLOAD + HEAD[len(BEAT) :], id="payload in the middle"),
        pytest.param(HEAD + PAYLOAD + BEAT, id="payload not last"),
        pytest.param(HEAD + PAYLOAD + b"\x30\x00", id="stream behind the payload"),
        pytest.param(HEAD + PAYLOAD + PAYLOAD, id="two payloads"),
        pytest.param(HEAD + b"\x42\x01a" + b"\x42\x02bc", id="the payload in two fields"),
        pytest.param(HEAD + b"\x42\x00" + PAYLOAD, id="an empty payload first"),
        pytest.param(HEAD, id="no payload"),
        pytest.param(HEAD + b"\x42\x00", id="empty payload"),
        pytest.param(HEAD + b"\x42\x02ab", id="payload too short"),
        pytest.param(HEAD + b"\x42\x04abcd", id="payload too long"),
        pytest.param(HEAD + b"\x42\x03ab", id="payload cut"),
        pytest.param(HEAD + b"\x42\xff\xff\xff\xff\x0fabc", id="payload of 4 GiB"),
        pytest.param(HEAD + b"\x42\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01abc", id="payload of 2^64"),
        pytest.param(HEAD + b"\x40\x03", id="payload that is a number"),
        pytest.param(BEAT + PAYLOAD, id="payload of nothing"),
        pytest.param(END + PAYLOAD, id="payload of the end"),
        pytest.param(HEAD + END + PAYLOAD, id="end beside blocks"),
        pytest.param(END + message_of("t", 3, []).SerializeToString(), id="end beside no blocks"),
        pytest.param(HEAD + b"\x42", id="cut in the length"),
    ],
)
def test_a_payload_that_is_not_the_last_field_or_not_that_of_the_parts_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError):
        decode_push(message)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([part(b"x", pool_bytes=1)], "names bytes"),
        ([part(payload_bytes=1, pool_bytes=1).beside(b"x")], "names bytes"),
        ([part(b"x", pool_offset=1)], "names a place"),
        ([part(pool_bytes=1, encoding=1)], "names bytes"),
        ([part(b"x"), part(pool_bytes=1)], "beside frames"),
        ([part(pool_bytes=1), part(b"x")], "beside frames"),
        ([part(pool_bytes=1), part(pool_bytes=1), part()], "beside frames"),
    ],
)
def test_parts_carry_their_bytes_or_name_them(parts: list[Part], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode_push(message_of("t", 3, parts).SerializeToString())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_parts_that_lie_about_their_bytes_are_refused(sizes: list[int], data: st.DataObject) -> None:
    """Unless the lies cancel out: then the bytes are cut as the parts say, and no digest fits."""
    parts = [part(bytes([n]) * size, block_index=n) for n, size in enumerate(sizes)]
    lies = data.draw(st.lists(st.integers(0, 8), min_size=len(sizes), max_size=len(sizes)))
    message = message_of("t", 3, [one.saying(payload_bytes=lie) for one, lie in zip(parts, lies, strict=True)])
    if sum(lies) == sum(sizes):
        assert [len(frame.payload) for frame in frames_of(decode_push(message.SerializeToString()))] == lies
        return
    with pytest.raises(ValueError, match="for frames of"):
        decode_push(message.SerializeToString())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",  # cut in a number
        b"\xff" * 12,  # a number without an end
        b"\x0a\x05ab",  # longer than the message
        b"\x0a\x01\xff",  # no UTF-8
        b"\x10" + b"\xff" * 10 + b"\x7f",  # more than 64 bits
        b"\x0d\0\0\0\0",  # a wire type that no field has
        b"\x13\x14",  # a group
        b"\x10\x01" * 17,  # too many fields
        b"\x22\x02\xff\xff",  # an end that is none
        b"\x3a\x02\xff\xff",  # blocks that are none
        b"\x3a\x04\x0a\x02\xff\xff",  # a part that is none
        b"\x3a\x05ab",  # blocks that are cut
        b"\x3a\xff\xff\xff\xff\x0f",  # 4 GiB of heads
        b"\x00\x00",  # field 0
    ],
)
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises((ValueError, DecodeError)):
        decode_push(garbage)


def outcome(message: bytes) -> tuple[PushMessage, bytes] | None:
    """The message and its payload, which is as long as the heads say; None for what is refused."""
    try:
        found = decode_push(message)
    except (ValueError, DecodeError):
        return None
    frames = frames_of(found)
    assert [len(frame.payload) for frame in frames] == [head.payload_bytes for head in found.heads]
    return found, b"".join(frame.payload for frame in frames)


def test_seeded_damage_raises_nothing_else() -> None:
    rng = random.Random(7)
    whole = encode_data("t" * 32, 5, [DataFrame(n, 1, 64, memoryview(b"y" * 40), b"d" * 16) for n in (3, 4)])
    refused = 0
    for _ in range(1000):
        damaged = bytearray(whole[: rng.randint(1, len(whole))])
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        refused += outcome(bytes(damaged)) is None
    assert refused > 500


def test_no_flipped_bit_of_a_head_means_something_that_protobuf_does_not_read_in_it() -> None:
    whole = encode_data("t" * 8, 5, [DataFrame(n, 1, 64, memoryview(b"y" * 9), b"d" * 16) for n in (3, 4)])
    taken = 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        told = outcome(bytes(changed))
        if told is None:
            continue
        taken += 1
        found, payload = told
        parsed = kv.PushFrame.FromString(bytes(changed))
        assert (found.transfer_id, found.epoch, found.stream) == (parsed.transfer_id, parsed.epoch, parsed.stream)
        assert [head.payload_bytes for head in found.heads] == [one.payload_bytes for one in parsed.blocks.parts]
        assert payload == parsed.payload
    assert taken > 8 * 2 * 9, "a flipped bit of the payload is for the digest to find"


@given(PARTS | st.none(), st.booleans(), st.data())
def test_every_beginning_of_a_message_gives_the_length_of_its_head_or_asks_for_more(
    frames: list[DataFrame] | None, is_end: bool, data: st.DataObject
) -> None:
    message = encode_other("t", 5, kv.EndFrame(num_tokens=9) if is_end else None, 2)
    if frames is not None:
        message = encode_data("t", 5, frames, data.draw(U32))
    size = len(message)
    whole, scan = decode_push(message), HeadScan(size)
    expected = size - whole.payload_bytes
    for seen in range(size + 1):
        found = scan.measure(memoryview(message)[:seen])
        assert found == expected if seen >= expected else found is None
    view = memoryview(message)
    again = scan.decode(view[:expected], MemoryBody(view[expected:]))
    assert (again.heads, again.end, again.payload_bytes) == (whole.heads, whole.end, whole.payload_bytes)
    assert frames_of(again) == frames_of(whole)
    for longer in (size - 1, size + 1):
        wrong = HeadScan(longer)
        known = next(
            (found for seen in range(size + 1) if (found := wrong.measure(view[: min(seen, longer)])) is not None), size
        )
        with pytest.raises(ValueError):
            wrong.decode(view[:known], MemoryBody(view[known:]))


@given(st.binary(max_size=60), st.data())
def test_whatever_begins_it_the_head_is_known_once_everything_is(message: bytes, data: st.DataObject) -> None:
    """It never changes once it is known, and it never is beyond what was seen: a reader may ask with any beginning."""
    size = len(message)
    scan, known = HeadScan(size), None
    for seen in range(size + 1):
        found = scan.measure(memoryview(message)[:seen])
        if known is not None:
            assert found == known
        assert found is None or found <= seen
        known = found
    assert known is not None
    outcome(message)


@given(st.integers(0, 2**32 - 1))
def test_the_number_of_the_stream_travels_in_every_kind(stream: int) -> None:
    frame = DataFrame(1, 2, 3, memoryview(b"x"), b"")
    messages = [
        encode_data("t", 1, [frame], stream),
        encode_other("t", 1, kv.EndFrame(), stream),
        encode_other("t", 1, None, stream),
    ]
    for message in messages:
        assert decode_push(message).stream == kv.PushFrame.FromString(message).stream == stream
