"""Frames and digests: whatever is cut arrives whole, whatever is changed on the way is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.contract.errors import BadFrame, DigestMismatch, HandoffError
from protos.wire import kv
from tests.support.push_frames import Part, frames_of, message_of, parts_of
from workers.engine_api.types import KvLayout
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.frames import Batch, Reassembly, split
from workers.kv_transfer.push_codec import MAX_PARTS, DataFrame, decode_push, encode_data

LAYOUT = KvLayout(block_tokens=4, num_layers=5, row_bytes=8, dtype="bytes", name="test", target_group_bytes=64)
SCOPE = DigestScope("model=x", "r1", 7)
BLOCKS = 3


def content(blocks: int = BLOCKS, seed: int = 0) -> list[list[bytes]]:
    rng = random.Random(seed)
    return [[rng.randbytes(LAYOUT.group_bytes(g)) for g in range(LAYOUT.num_groups)] for _ in range(blocks)]


def cut(data: list[list[bytes]], frame_bytes: int, first: int = 0, scope: DigestScope = SCOPE) -> list[Part]:
    frames: list[Part] = []
    for block in range(first, len(data)):
        for group, raw in enumerate(data[block]):
            view = memoryview(raw)
            for frame in split(block, group, view, scope.of(block, group, view), frame_bytes):
                frames += parts_of(kv.PushFrame.FromString(encode_data("t", 7, [frame])))
    return frames


def received(frame: Part) -> DataFrame:
    """As the receiver's codec reads what protobuf wrote."""
    (data,) = frames_of(decode_push(message_of("t", 7, [frame]).SerializeToString()))
    return data


def put_together(frames: list[Part], first: int = 0, blocks: int = BLOCKS) -> tuple[Reassembly, dict[tuple[int, int], bytes]]:
    reassembly, pool = Reassembly(LAYOUT, SCOPE, first, blocks), dict[tuple[int, int], bytes]()
    for frame in frames:
        accepted = reassembly.accept(received(frame))
        key = (accepted.block_index, accepted.group)
        assert accepted.offset_bytes == len(pool.get(key, b""))
        pool[key] = pool.get(key, b"") + bytes(accepted.payload)
    return reassembly, pool


def test_the_layout_has_a_short_last_group() -> None:
    assert LAYOUT.num_groups == 3
    assert [LAYOUT.group_bytes(g) for g in range(3)] == [64, 64, 32]


@given(st.integers(1, 200), st.integers(0, BLOCKS - 1))
def test_what_is_cut_arrives_whole(frame_bytes: int, first: int) -> None:
    data = content()
    frames = cut(data, frame_bytes, first)
    assert all(1 <= len(frame.payload) <= frame_bytes for frame in frames)
    reassembly, pool = put_together(frames, first)
    assert reassembly.complete and reassembly.verified_blocks == BLOCKS
    assert pool == {(b, g): data[b][g] for b in range(first, BLOCKS) for g in range(LAYOUT.num_groups)}


def test_a_block_counts_only_when_all_its_groups_are_verified() -> None:
    reassembly = Reassembly(LAYOUT, SCOPE, 0, BLOCKS)
    counts = []
    for frame in cut(content(), 1000):
        reassembly.accept(received(frame))
        counts.append(reassembly.verified_blocks)
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2, 3]


@given(st.data())
def test_any_single_change_is_refused(data: st.DataObject) -> None:
    """Bits, order, repetition, omission, ranges: a frame that is not exactly the next one never counts."""
    frames = cut(content(), data.draw(st.integers(5, 70)))
    at = data.draw(st.integers(0, len(frames) - 1))
    kind = data.draw(st.sampled_from(["flip", "repeat", "omit", "swap", "digest", "empty", "longer", "number"]))
    if kind == "flip":
        payload = bytearray(frames[at].payload)
        bit = data.draw(st.integers(0, 8 * len(payload) - 1))
        payload[bit // 8] ^= 1 << bit % 8
        frames[at] = frames[at].beside(bytes(payload))
    elif kind == "repeat":
        frames.insert(at, frames[at])
    elif kind == "omit":
        del frames[at]
    elif kind == "swap":
        other = data.draw(st.integers(0, len(frames) - 1).filter(lambda i: i != at))
        frames[at], frames[other] = frames[other], frames[at]
    elif kind == "digest":
        frames[at] = frames[at].saying(digest=b"" if frames[at].head.digest else b"x" * 16)
    elif kind == "empty":
        frames[at] = frames[at].with_bytes(b"")
    elif kind == "longer":
        frames[at] = frames[at].with_bytes(frames[at].payload + b"\0" * 64)
    else:
        field = data.draw(st.sampled_from(["block_index", "layer_group", "offset_bytes"]))
        other_value = st.integers(0, 2**32 - 1).filter(lambda v: v != getattr(frames[at].head, field))
        frames[at] = frames[at].saying(**{field: data.draw(other_value)})
    try:
        reassembly, _ = put_together(frames)
    except HandoffError:
        return
    assert kind == "omit" and not reassembly.complete


def test_payloads_of_two_blocks_swapped_do_not_verify() -> None:
    frames = cut(content(), 1000)
    one, other = frames[0], frames[3]
    frames[0] = one.with_bytes(other.payload, digest=other.head.digest)
    frames[3] = other.with_bytes(one.payload, digest=one.head.digest)
    with pytest.raises(DigestMismatch):
        put_together(frames)


@pytest.mark.parametrize("foreign", [("model=y", "r1", 7), ("model=x", "r2", 7), ("model=x", "r1", 8)])
def test_blocks_of_another_model_request_or_epoch_do_not_verify(foreign: tuple[str, str, int]) -> None:
    with pytest.raises(DigestMismatch):
        put_together(cut(content(), 1000, scope=DigestScope(*foreign)))


def test_field_boundaries_count_in_a_digest() -> None:
    one, two = DigestScope("ab", "c", 1), DigestScope("a", "bc", 1)
    assert one.of(0, 0, b"x") != two.of(0, 0, b"x")


def test_after_a_rewind_the_open_block_comes_again() -> None:
    frames = cut(content(), 40)
    reassembly = Reassembly(LAYOUT, SCOPE, 0, BLOCKS)
    second = next(i for i, frame in enumerate(frames) if frame.head.block_index == 1)
    for frame in frames[: second + 2]:
        reassembly.accept(received(frame))
    reassembly.rewind()
    assert reassembly.verified_blocks == 1
    for frame in frames[second:]:
        reassembly.accept(received(frame))
    assert reassembly.complete


def test_nothing_is_taken_after_the_last_block() -> None:
    frames = cut(content(), 1000)
    reassembly, _ = put_together(frames)
    with pytest.raises(BadFrame):
        reassembly.accept(received(frames[-1]))


@given(st.integers(1, 400), st.integers(1, 60))
def test_batches_keep_order_and_bounds(limit_bytes: int, blocks: int) -> None:
    data = content(blocks)
    batch, messages, completed = Batch(limit_bytes), list[bytes](), list[int]()

    def flush() -> None:
        frames, done = batch.take()
        assert 1 <= len(frames) <= MAX_PARTS and sum(len(frame.payload) for frame in frames) <= limit_bytes
        messages.append(encode_data("t", 7, frames))
        completed.extend(done)

    for block, groups in enumerate(data):
        for group, raw in enumerate(groups):
            for frame in split(block, group, memoryview(raw), SCOPE.of(block, group, raw), limit_bytes):
                if not batch.offer(frame):
                    flush()
                    assert batch.offer(frame)
        batch.completed.append(block)
    flush()
    assert batch.take() == ([], []) and completed == list(range(blocks))
    reassembly, pool = Reassembly(LAYOUT, SCOPE, 0, blocks), b""
    for message in messages:
        for frame in frames_of(decode_push(message)):
            pool += bytes(reassembly.accept(frame).payload)
    assert reassembly.complete and pool == b"".join(raw for groups in data for raw in groups)


Verdict = type[HandoffError] | None


def by_accept(reassembly: Reassembly, message: list[Part]) -> Verdict:
    """The slow twin: frame by frame, each when its bytes are there."""
    try:
        for frame in message:
            reassembly.accept(received(frame))
    except HandoffError as error:
        return type(error)
    return None


def by_heads(reassembly: Reassembly, message: list[Part]) -> Verdict:
    """All heads before any bytes; then the bytes where they lie."""
    decoded = decode_push(message_of("t", 7, message).SerializeToString())
    try:
        reassembly.check_heads(decoded.heads)
        for head, frame in zip(decoded.heads, message, strict=True):
            reassembly.verify(head, memoryview(bytearray(frame.payload)))
    except HandoffError as error:
        return type(error)
    return None


def _damage(rng: random.Random, frames: list[Part], at: int) -> None:
    """One thing that is wrong in one place."""
    kind, one = rng.randrange(7), frames[at]
    if kind == 0:
        payload = bytearray(one.payload)
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
        frames[at] = one.beside(bytes(payload))
    elif kind == 1:
        frames[at] = one.saying(digest=rng.randbytes(rng.choice([1, 15, 16, 17])))
    elif kind == 2:
        frames[at] = one.with_bytes(one.payload + bytes(rng.randint(1, 70)))
    elif kind == 3:
        frames[at] = one.with_bytes(one.payload[: rng.randrange(len(one.payload))])
    elif kind == 4:
        field = rng.choice(["block_index", "layer_group", "offset_bytes"])
        frames[at] = one.saying(**{field: getattr(one.head, field) ^ 1 << rng.randrange(32)})
    elif kind == 5:
        frames.insert(at, one)
    elif at + 1 < len(frames):
        del frames[at]


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_heads_before_bytes_give_what_frame_by_frame_gives(seed: int, is_damaged: bool) -> None:
    rng = random.Random(seed)
    first, stride = rng.randint(0, 1), rng.randint(1, 2)
    frames = cut(content(5, seed), rng.randint(1, 80), first)
    frames = [frame for frame in frames if (frame.head.block_index - first) % stride == 0]
    if is_damaged:
        _damage(rng, frames, rng.randrange(len(frames)))
    slow, fast = (Reassembly(LAYOUT, SCOPE, first, 5, stride) for _ in range(2))
    verdicts: list[tuple[Verdict, Verdict]] = []
    while frames and (not verdicts or verdicts[-1] == (None, None)):
        size = rng.randint(1, MAX_PARTS)
        message, frames = frames[:size], frames[size:]
        verdicts.append((by_accept(slow, message), by_heads(fast, message)))
        if verdicts[-1] == (None, None):
            assert (slow.next_block, slow.complete) == (fast.next_block, fast.complete)
            assert (slow._block, slow._group, slow._offset) == (fast._block, fast._group, fast._offset)
        if rng.random() < 0.1 and not is_damaged:
            frames = _from_the_open_block(slow, fast, frames, message)
    assert verdicts[-1][0] is verdicts[-1][1]
    assert (verdicts[-1][0] is None and slow.complete and fast.complete) is not is_damaged


def _from_the_open_block(slow: Reassembly, fast: Reassembly, frames: list[Part], message: list[Part]) -> list[Part]:
    """Both forget the block that is not complete, if all of it that came was in the last message: it comes again."""
    again = [frame for frame in message if frame.head.block_index == slow.next_block]
    if again and (again[0].head.layer_group or again[0].head.offset_bytes):
        return frames
    slow.rewind()
    fast.rewind()
    return [*again, *frames]


def test_heads_that_are_refused_change_nothing() -> None:
    frames = cut(content(), 40)
    reassembly = Reassembly(LAYOUT, SCOPE, 0, BLOCKS)
    heads = decode_push(message_of("t", 7, [*frames[:3], frames[4]]).SerializeToString()).heads
    with pytest.raises(BadFrame):
        reassembly.check_heads(heads)
    assert by_heads(reassembly, frames[:20]) is None
    with pytest.raises(BadFrame):
        reassembly.check_heads(heads)
    assert by_heads(reassembly, frames[20:]) is None and reassembly.complete
