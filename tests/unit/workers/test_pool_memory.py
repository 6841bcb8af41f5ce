"""The memory of KV pools, whichever kind: zeros of the size that was asked for, from the beginning of a page on."""

from __future__ import annotations

import mmap

import pytest

from workers.engine_api.pool_memory import PoolMemory


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size_bytes", [1, 4097, 3_000_000])
def test_a_pool_is_zeros_and_begins_at_a_page(shared: bool, size_bytes: int) -> None:
    memory = PoolMemory(shared=shared)
    pool = memory.allocate(size_bytes)
    assert pool.nbytes == size_bytes and not pool.any() and pool.flags.c_contiguous
    assert pool.__array_interface__["data"][0] % mmap.PAGESIZE == 0
    assert (memory.segment is not None) is shared
    memory.close()
