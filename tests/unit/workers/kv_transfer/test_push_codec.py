"""The codec by hand and protobuf read each other; garbage is a ValueError, never anything else."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import kv
from workers.kv_transfer.push_codec import MAX_PARTS, DataFrame, decode_push, encode_data, encode_other

U32 = st.integers(0, 2**32 - 1)


ENCODINGS = st.sampled_from([*kv.KvEncoding.values(), 99])


@given(
    st.text(max_size=40), st.integers(0, 2**64 - 1), U32, U32, U32, st.binary(max_size=300), st.binary(max_size=16), ENCODINGS
)
def test_protobuf_and_the_codec_read_each_other(
    transfer_id: str, epoch: int, block: int, group: int, offset: int, payload: bytes, digest: bytes, encoding: int
) -> None:
    message = encode_data(transfer_id, epoch, [DataFrame(block, group, offset, memoryview(payload), digest, encoding)])
    parsed = kv.PushFrame.FromString(message)
    assert (parsed.transfer_id, parsed.epoch, parsed.WhichOneof("body")) == (transfer_id, epoch, "data")
    expected = kv.BlockFrame(
        block_index=block, layer_group=group, offset_bytes=offset, payload=payload, digest=digest, encoding=encoding
    )
    assert parsed.data == expected
    for encoded in (message, parsed.SerializeToString()):
        back = decode_push(encoded)
        assert (back.transfer_id, back.epoch, back.end) == (transfer_id, epoch, None)
        assert back.data == (DataFrame(block, group, offset, memoryview(payload), digest, encoding),)


def test_ends_and_signs_of_life() -> None:
    end = kv.EndFrame(num_tokens=7, next_token_ids=b"\1\0\0\0")
    message = decode_push(encode_other("t", 3, end))
    assert (message.transfer_id, message.epoch, message.data, message.end) == ("t", 3, (), end)
    beat = decode_push(encode_other("t", 3))
    assert (beat.transfer_id, beat.epoch, beat.data, beat.end) == ("t", 3, (), None)


def test_the_payload_is_a_view_of_the_message() -> None:
    message = encode_data("t", 1, [DataFrame(n, 0, 0, memoryview(b"x" * 100), b"") for n in range(3)])
    assert [frame.payload.obj is message for frame in decode_push(message).data] == [True] * 3


def some(count: int) -> list[DataFrame]:
    rng = random.Random(count)
    return [DataFrame(n, n % 3, 8 * n, memoryview(rng.randbytes(n % 7)), rng.randbytes(16 * (n % 2))) for n in range(count)]


@pytest.mark.parametrize("count", [1, 2, 9, MAX_PARTS])
def test_parts_keep_their_order(count: int) -> None:
    message = encode_data("t", 3, some(count))
    assert decode_push(message).data == tuple(some(count))
    parsed = kv.PushFrame.FromString(message)
    assert [part.block_index for part in (parsed.data, *parsed.more)] == list(range(count))
    assert decode_push(parsed.SerializeToString()).data == tuple(some(count))


def test_more_parts_than_a_message_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 64"):
        decode_push(encode_data("t", 3, some(MAX_PARTS)) + kv.PushFrame(more=[kv.BlockFrame()]).SerializeToString())
    many = encode_data("t", 3, some(1)) + kv.PushFrame(more=[kv.BlockFrame()] * 1000).SerializeToString()
    with pytest.raises(ValueError, match="fields"):
        decode_push(many)


@pytest.mark.parametrize("body", [{}, {"end": kv.EndFrame(num_tokens=1)}])
def test_further_parts_without_a_first_one_are_refused(body: dict[str, kv.EndFrame]) -> None:
    with pytest.raises(ValueError, match="without a first"):
        decode_push(kv.PushFrame(transfer_id="t", epoch=3, more=[kv.BlockFrame(block_index=1)], **body).SerializeToString())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",  # cut in a number
        b"\xff" * 12,  # a number without an end
        b"\x0a\x05ab",  # longer than the message
        b"\x0a\x01\xff",  # no UTF-8
        b"\x10" + b"\xff" * 9 + b"\x7f",  # more than 64 bits
        b"\x12\x01a",  # bytes where a number belongs
        b"\x18\x01",  # a number where a message belongs
        b"\x1a\x02\x20\x01",  # a number where the payload belongs
        b"\x1a\x06\x08\xff\xff\xff\xff\x7f",  # more than 32 bits
        b"\x0d\0\0\0\0",  # a wire type that no field has
        b"\x10\x01" * 17,  # too many fields
        b"\x22\x02\xff\xff",  # an end that is none
    ],
)
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises((ValueError, DecodeError)):
        decode_push(garbage)


def test_seeded_damage_raises_nothing_else() -> None:
    rng = random.Random(7)
    whole = encode_data("t" * 32, 5, [DataFrame(n, 1, 64, memoryview(b"y" * 40), b"d" * 16) for n in (3, 4)])
    refused = 0
    for _ in range(1000):
        damaged = bytearray(whole[: rng.randint(1, len(whole))])
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            decode_push(bytes(damaged))
        except (ValueError, DecodeError):
            refused += 1
    assert refused > 500


@given(st.integers(0, 2**32 - 1))
def test_the_number_of_the_stream_travels_in_every_kind(stream: int) -> None:
    part = DataFrame(1, 2, 3, memoryview(b"x"), b"")
    messages = [
        encode_data("t", 1, [part], stream),
        encode_other("t", 1, kv.EndFrame(), stream),
        encode_other("t", 1, None, stream),
    ]
    for message in messages:
        assert decode_push(message).stream == kv.PushFrame.FromString(message).stream == stream
