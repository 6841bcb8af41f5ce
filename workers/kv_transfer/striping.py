"""Which block travels on which stream of a transfer: block `b` on stream `b % streams`, each stream in rising order.

So both sides know the place of every block without a word, the streams of a prefill that is still computing stay in step, and
what a stream has brought is one number: the block that it goes on with.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_at(stream: int, streams: int, from_block: int) -> int:
    """The first block of a stream that is not below `from_block`."""
    return from_block + (stream - from_block) % streams


def count_between(stream: int, streams: int, from_block: int, to_block: int) -> int:
    """How many blocks of a stream lie in `[from_block, to_block)`."""
    return max(0, -(-(to_block - first_at(stream, streams, from_block)) // streams))


def leading_blocks(next_blocks: Sequence[int]) -> int:
    """How many leading blocks are there when stream `k` goes on with `next_blocks[k]`."""
    return min(next_blocks)


def wanted_streams(total_bytes: int, stream_bytes: int, most: int) -> int:
    """Streams that are worth their connections: one for each full `stream_bytes`, from 1 to `most`."""
    return max(1, min(most, total_bytes // stream_bytes))


def granted_streams(asked: int, most: int, blocks_left: int) -> int:
    """What a receiver grants: no more than were asked for, than it allows, and than have a block to bring; at least one."""
    return max(1, min(asked, most, blocks_left))


def is_sound(next_blocks: Sequence[int], asked: int, first_block: int, num_blocks: int) -> bool:
    """True when what a receiver granted follows the rule, so that a sender can go by it."""
    streams = len(next_blocks)
    return 1 <= streams <= max(1, asked) and all(
        first_block <= block <= first_at(stream, streams, num_blocks) and block % streams == stream
        for stream, block in enumerate(next_blocks)
    )
