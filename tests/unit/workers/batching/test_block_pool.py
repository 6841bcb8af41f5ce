"""The block pool: owners, eviction order, refusals that change nothing."""

from __future__ import annotations

import pytest

from protos.contract.errors import OutOfBlocks
from workers.batching.block_pool import BlockPool


def a_pool(num_blocks: int = 4) -> tuple[BlockPool, list[int]]:
    evicted: list[int] = []
    return BlockPool(num_blocks, evicted.append), evicted


def gauges(pool: BlockPool) -> tuple[int, int, int]:
    pool.check_integrity()
    assert pool.used + pool.cached + pool.free == pool.num_blocks
    return pool.used, pool.cached, pool.free


def test_blocks_are_handed_out_once() -> None:
    pool, _ = a_pool()
    taken = pool.allocate(3) + pool.allocate(1)
    assert sorted(taken) == [0, 1, 2, 3]
    assert gauges(pool) == (4, 0, 0)


def test_too_many_are_refused_whole() -> None:
    pool, _ = a_pool()
    pool.allocate(2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(3)
    assert gauges(pool) == (2, 0, 2)


def test_a_block_is_free_when_its_last_owner_leaves() -> None:
    pool, _ = a_pool()
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.free_blocks([block])
    assert gauges(pool) == (1, 0, 3)
    pool.free_blocks([block])
    assert gauges(pool) == (0, 0, 4)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free_blocks([block])


def test_a_free_block_cannot_be_shared_or_kept() -> None:
    pool, _ = a_pool()
    with pytest.raises(AssertionError):
        pool.share([0])
    with pytest.raises(AssertionError):
        pool.keep(0)
    assert gauges(pool) == (0, 0, 4)


def test_cached_blocks_go_last_and_the_longest_unused_first() -> None:
    pool, evicted = a_pool()
    blocks = pool.allocate(3)
    for block in blocks:
        pool.keep(block)
    pool.free_blocks([blocks[1], blocks[0], blocks[2]])
    assert gauges(pool) == (0, 3, 1)
    pool.share([blocks[1]])
    pool.free_blocks([blocks[1]])  # used again: youngest now
    pool.allocate(1)
    assert evicted == [], "there was a free one"
    pool.allocate(2)
    assert evicted == [blocks[0], blocks[2]]
    assert gauges(pool) == (3, 1, 0)


def test_an_evicted_block_is_ordinary_again() -> None:
    pool, evicted = a_pool(1)
    (block,) = pool.allocate(1)
    pool.keep(block)
    pool.free_blocks([block])
    assert pool.allocate(1) == [block]
    assert evicted == [block]
    pool.free_blocks([block])
    assert gauges(pool) == (0, 0, 1)


def test_integrity_sees_a_lost_reference() -> None:
    pool, _ = a_pool()
    pool.allocate(1)
    pool._refs[0] += 1
    with pytest.raises(AssertionError):
        pool.check_integrity()


def test_a_pool_has_blocks() -> None:
    with pytest.raises(ValueError, match="positive"):
        BlockPool(0, lambda _: None)
