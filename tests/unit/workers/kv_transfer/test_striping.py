"""The rule of the stripes: every block on exactly one stream, and numbers that say the same as lists."""

from __future__ import annotations

import random

import pytest

from workers.kv_transfer.striping import (
    count_between,
    first_at,
    granted_streams,
    is_sound,
    leading_blocks,
    wanted_streams,
)


def blocks_of(stream: int, streams: int, from_block: int, to_block: int) -> list[int]:
    """The slow twin: the rule, block by block."""
    return [block for block in range(from_block, to_block) if block % streams == stream]


def test_the_numbers_are_those_of_the_list() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        streams, low = rng.randint(1, 9), rng.randint(0, 40)
        stream, high = rng.randrange(streams), low + rng.randint(0, 40)
        blocks = blocks_of(stream, streams, low, high)
        assert count_between(stream, streams, low, high) == len(blocks)
        assert first_at(stream, streams, low) == blocks_of(stream, streams, low, low + streams)[0]


def test_every_block_is_on_one_stream() -> None:
    for streams in range(1, 7):
        found = sorted(block for stream in range(streams) for block in blocks_of(stream, streams, 3, 50))
        assert found == list(range(3, 50))


def test_leading_blocks_are_there_and_the_next_one_is_not() -> None:
    rng = random.Random(2)
    for _ in range(1000):
        streams, first = rng.randint(1, 6), rng.randint(0, 9)
        next_blocks = [first_at(stream, streams, first) + streams * rng.randint(0, 5) for stream in range(streams)]
        missing = {block for stream, block in enumerate(next_blocks) for block in blocks_of(stream, streams, block, 99)}
        leading = leading_blocks(next_blocks)
        assert leading in missing and not missing & set(range(leading))


@pytest.mark.parametrize(
    ("total_bytes", "expected"), [(0, 1), (99, 1), (100, 1), (199, 1), (200, 2), (399, 3), (400, 4), (10**9, 4)]
)
def test_a_stream_for_each_full_share(total_bytes: int, expected: int) -> None:
    assert wanted_streams(total_bytes, 100, 4) == expected


@pytest.mark.parametrize(
    ("asked", "most", "left", "expected"), [(0, 4, 9, 1), (1, 4, 9, 1), (3, 4, 9, 3), (99, 4, 9, 4), (4, 4, 2, 2), (4, 4, 0, 1)]
)
def test_never_more_streams_than_asked_for_allowed_or_of_use(asked: int, most: int, left: int, expected: int) -> None:
    assert granted_streams(asked, most, left) == expected


@pytest.mark.parametrize(
    ("next_blocks", "sound"),
    [
        ((6, 4, 5), True),
        ((9, 7, 5), True),
        ((12, 10, 11), True),  # all of them are there
        ((10,), True),
        ((6, 1, 5), False),  # stream 1 is behind the blocks that are there already
        ((6, 5, 4), False),
        ((15, 4, 5), False),
        ((4, 5, 6), False),
        ((11,), False),
        ((4, 5, 6, 7), False),  # more than were asked for
        ((), False),
    ],
)
def test_a_grant_that_breaks_the_rule_is_no_grant(next_blocks: tuple[int, ...], sound: bool) -> None:
    assert is_sound(next_blocks, 3, 4, 10) == sound


def test_whatever_a_rule_abiding_receiver_answers_is_sound() -> None:
    rng = random.Random(3)
    for _ in range(1000):
        streams, num_blocks = rng.randint(1, 6), rng.randint(1, 40)
        first = rng.randint(0, num_blocks)
        next_blocks = []
        for stream in range(streams):
            blocks = blocks_of(stream, streams, first, num_blocks)
            next_blocks.append(rng.choice([*blocks, first_at(stream, streams, num_blocks)]))
        assert is_sound(next_blocks, streams, leading_blocks(next_blocks), num_blocks)
