"""Packed groups from end to end of the wire: what arrives is what was sent, or what fp8 makes of it, or nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from protos.contract.errors import BadFrame, DigestMismatch
from protos.wire import kv
from tests.support.push_frames import frames_of
from workers.engine_api.types import KvLayout
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.encodings import Encoding, agreed, chosen, codec_of, offered
from workers.kv_transfer.frames import Reassembly, split
from workers.kv_transfer.packing import MAX_GATHERED, GroupPacker, GroupUnpacker
from workers.kv_transfer.push_codec import DataFrame, decode_push, encode_data

LAYOUT = KvLayout(block_tokens=4, num_layers=5, row_bytes=64, dtype="bfloat16", name="test", target_group_bytes=512)
BYTES = replace(LAYOUT, dtype="bytes")
SCOPE = DigestScope("model=x", "r1", 7)
BLOCKS = 2
TRIES = 25
PACKED = (Encoding.LOSSLESS, Encoding.FP8)
Place = tuple[int, int]


def content(seed: int) -> dict[Place, bytes]:
    """Numbers of a few scales, and a row of arbitrary bits."""
    rng = random.Random(seed)
    groups = {}
    for block in range(BLOCKS):
        for group in range(LAYOUT.num_groups):
            count = LAYOUT.group_bytes(group) // 2
            values = [rng.choice((0x3F80, 0x3F00, 0xBF80, 0x4000)) | rng.randrange(128) for _ in range(count)]
            values[:32] = [rng.randrange(1 << 16) for _ in range(32)]
            groups[block, group] = b"".join(value.to_bytes(2, "little") for value in values)
    return groups


async def sent(groups: dict[Place, bytes], encoding: Encoding, frame_bytes: int) -> list[DataFrame]:
    packer = GroupPacker(encoding, LAYOUT, SCOPE)
    frames = []
    for (block, group), raw in groups.items():
        payload, digest = await packer.pack(block, group, memoryview(raw))
        frames += split(block, group, payload, digest, frame_bytes, encoding.value)
    return [frames_of(decode_push(encode_data("t", 7, [frame])))[0] for frame in frames]


async def arrived(frames: list[DataFrame], encoding: Encoding) -> dict[Place, bytes]:
    """As the receiver does it: unpack, check the place and the digest, write."""
    unpacker, reassembly = GroupUnpacker(encoding, LAYOUT, SCOPE), Reassembly(LAYOUT, SCOPE, 0, BLOCKS)
    pool: dict[Place, bytes] = {}
    for frame in frames:
        whole = await unpacker.take(frame)
        if whole is not None:
            accepted = reassembly.accept(whole)
            pool[accepted.block_index, accepted.group] = bytes(accepted.payload)
    assert reassembly.complete
    return pool


def received(raw: bytes, encoding: Encoding) -> bytes:
    """What must arrive of a group."""
    codec = codec_of(encoding, LAYOUT)
    assert codec is not None
    return bytes(codec.unpack(memoryview(codec.pack(memoryview(raw))), len(raw)))


@pytest.mark.parametrize("encoding", PACKED)
@pytest.mark.parametrize("frame_bytes", [7, 64, 400, 10_000])
def test_groups_arrive_whole_in_frames_of_any_size(encoding: Encoding, frame_bytes: int) -> None:
    groups = content(frame_bytes)
    frames = asyncio.run(sent(groups, encoding, frame_bytes))
    pool = asyncio.run(arrived(frames, encoding))
    assert pool == {place: received(raw, encoding) for place, raw in groups.items()}
    assert (pool == groups) is encoding.is_exact


async def is_refused(frames: list[DataFrame], encoding: Encoding, right: dict[Place, bytes]) -> bool:
    """True when the frames are refused; what arrives otherwise is right."""
    try:
        pool = await arrived(frames, encoding)
    except (BadFrame, DigestMismatch):
        return True
    assert pool == right
    return False


def change_payload(rng: random.Random, frame: DataFrame) -> DataFrame:
    payload = bytearray(frame.payload)
    payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    return frame._replace(payload=memoryview(bytes(payload)))


def cut_payload(rng: random.Random, frame: DataFrame) -> DataFrame:
    return frame._replace(payload=frame.payload[: rng.randrange(len(frame.payload))])


def lengthen(rng: random.Random, frame: DataFrame) -> DataFrame:
    return frame._replace(payload=memoryview(bytes(frame.payload) + rng.randbytes(rng.randrange(1, 3000))))


def change_place(rng: random.Random, frame: DataFrame) -> DataFrame:
    field = rng.choice(("block_index", "layer_group", "offset_bytes"))
    change: dict[str, Any] = {field: getattr(frame, field) ^ (1 << rng.randrange(32))}
    return frame._replace(**change)


def change_encoding(rng: random.Random, frame: DataFrame) -> DataFrame:
    return frame._replace(encoding=rng.choice([one for one in (0, 1, 2, 3, 2**32 - 1) if one != frame.encoding]))


def change_digest(rng: random.Random, frame: DataFrame) -> DataFrame:
    return frame._replace(digest=rng.randbytes(rng.choice((0, 1, 15, 16, 17)) if frame.digest else 16))


CHANGES: list[Callable[[random.Random, DataFrame], DataFrame]] = [
    change_payload, cut_payload, lengthen, change_place, change_encoding, change_digest,
]  # fmt: skip


@pytest.mark.parametrize("encoding", PACKED)
@pytest.mark.parametrize("change", CHANGES)
def test_no_changed_frame_changes_what_arrives(
    encoding: Encoding, change: Callable[[random.Random, DataFrame], DataFrame]
) -> None:
    """Refused, but for bits of a zstd frame that mean nothing: the digest is over what they unpack to."""
    groups = content(3)
    right = {place: received(raw, encoding) for place, raw in groups.items()}
    refused = 0

    async def tries() -> None:
        nonlocal refused
        for seed in range(TRIES):
            rng = random.Random(seed)
            frames = await sent(groups, encoding, rng.choice((100, 10_000)))
            at = rng.randrange(len(frames))
            frames[at] = change(rng, frames[at])
            refused += await is_refused(frames, encoding, right)

    asyncio.run(tries())
    assert refused >= (20 if encoding.is_exact and change is change_payload else TRIES)


@pytest.mark.parametrize("encoding", PACKED)
def test_missing_and_repeated_frames_are_refused_and_swapped_ones_change_nothing(encoding: Encoding) -> None:
    groups = content(4)
    right = {place: received(raw, encoding) for place, raw in groups.items()}

    async def tries() -> None:
        frames = await sent(groups, encoding, 100)
        for seed in range(TRIES):
            rng = random.Random(seed)
            wrong = list(frames)
            at, other = rng.sample(range(len(wrong)), 2)
            match seed % 3:
                case 0:
                    del wrong[min(at, len(wrong) - 2)]
                case 1:
                    wrong.insert(at, wrong[at])
                case _:
                    wrong[at], wrong[other] = wrong[other], wrong[at]
            # Frames of two groups may come in turns, as long as the groups become whole in their order.
            assert await is_refused(wrong, encoding, right) or seed % 3 == 2

    asyncio.run(tries())


def test_packed_bytes_do_not_verify_as_plain_ones_nor_the_other_way_round() -> None:
    """A group whose fp8 form has the size of another group's plain form would fit: the digest is of another scope."""
    layout = replace(LAYOUT, dtype="bytes", num_layers=1, block_tokens=1, row_bytes=9, target_group_bytes=9)
    packed = memoryview(bytes([127]) + bytes(range(8)))
    assert SCOPE.packed("FP8").of(0, 0, packed) != SCOPE.of(0, 0, packed)
    frame = DataFrame(0, 0, 0, packed, SCOPE.packed("FP8").of(0, 0, packed))
    with pytest.raises(DigestMismatch):
        Reassembly(layout, SCOPE, 0, 1).accept(frame)


def test_bytes_that_the_sender_digested_and_that_do_not_unpack_are_its_fault() -> None:
    """Sending them again would not help: BadFrame, not DigestMismatch."""
    group_bytes = LAYOUT.group_bytes(0)
    for packed in (bytes(group_bytes // 2 + 8), bytes([127] * 7) + bytes(group_bytes // 2), b"\x7f"):
        digest = SCOPE.packed("FP8").of(0, 0, packed)
        with pytest.raises(BadFrame):
            asyncio.run(
                GroupUnpacker(Encoding.FP8, LAYOUT, SCOPE).take(
                    DataFrame(0, 0, 0, memoryview(packed), digest, Encoding.FP8.value)
                )
            )


@pytest.mark.parametrize("encoding", PACKED)
def test_what_is_gathered_has_a_bound(encoding: Encoding) -> None:
    async def endless() -> int:
        unpacker = GroupUnpacker(encoding, LAYOUT, SCOPE)
        size = 0
        while True:
            frame = DataFrame(0, 0, size, memoryview(bytes(64)), b"", encoding.value)
            assert await unpacker.take(frame) is None
            size += 64

    with pytest.raises(BadFrame, match="may come"):
        asyncio.run(endless())

    async def wide() -> None:
        unpacker = GroupUnpacker(encoding, LAYOUT, SCOPE)
        for block in range(MAX_GATHERED + 1):
            await unpacker.take(DataFrame(block, 0, 0, memoryview(bytes(64)), b"", encoding.value))

    with pytest.raises(BadFrame, match=f"{MAX_GATHERED} packed groups"):
        asyncio.run(wide())


@pytest.mark.parametrize("encoding", PACKED)
def test_after_a_rewind_groups_begin_anew(encoding: Encoding) -> None:
    async def again() -> dict[Place, bytes]:
        groups = content(6)
        frames = await sent(groups, encoding, 100)
        unpacker = GroupUnpacker(encoding, LAYOUT, SCOPE)
        assert await unpacker.take(frames[0]) is None
        unpacker.rewind()
        assert await unpacker.take(frames[0]) is None
        return await arrived(frames, encoding)

    assert len(asyncio.run(again())) == BLOCKS * LAYOUT.num_groups


def test_the_receiver_chooses_what_it_is_configured_for_of_what_is_offered() -> None:
    lossless, fp8 = kv.KV_ENCODING_LOSSLESS, kv.KV_ENCODING_FP8
    assert offered("none", LAYOUT) == offered("lossless", LAYOUT) == offered("fp8", BYTES) == (Encoding.LOSSLESS,)
    assert offered("fp8", LAYOUT) == (Encoding.LOSSLESS, Encoding.FP8), "fp8 needs the word of both sides"
    for configured, can, expected in (
        ("none", [lossless, fp8], Encoding.NONE),
        ("lossless", [lossless], Encoding.LOSSLESS),
        ("lossless", [], Encoding.NONE),
        ("lossless", [fp8, 77], Encoding.NONE),
        ("fp8", [lossless], Encoding.NONE),
        ("fp8", [lossless, fp8, 77], Encoding.FP8),
    ):
        assert chosen(configured, can, LAYOUT) is expected
    assert chosen("fp8", [fp8], BYTES) is Encoding.NONE


def test_a_sender_takes_no_encoding_that_it_did_not_offer() -> None:
    assert agreed(kv.KV_ENCODING_NONE, ()) is Encoding.NONE
    assert agreed(kv.KV_ENCODING_LOSSLESS, (Encoding.LOSSLESS,)) is Encoding.LOSSLESS
    for reply, offers in ((kv.KV_ENCODING_FP8, (Encoding.LOSSLESS,)), (99, tuple(PACKED))):
        with pytest.raises(BadFrame, match="not offered"):
            agreed(reply, offers)
