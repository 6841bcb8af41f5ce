"""Who refers to which block of the KV pool. Pure bookkeeping: the bytes are the runner's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice

from protos.contract.errors import OutOfBlocks


class BlockPool:
    """Reference-counted blocks.

    A block is referenced (one or more owners), cached (no owner, kept for its content, least recently used first out)
    or free. `available` counts the last two: what `allocate` can hand out. A cached block is evicted only when no free
    one is left; `on_evict` hears of it before the block has a new owner.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be positive, got {num_blocks}")
        self._refs = [0] * num_blocks
        self._kept = [False] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, least recently used first
        self._on_evict = on_evict
        self._total_refs = 0

    @property
    def num_blocks(self) -> int:
        return len(self._refs)

    @property
    def available(self) -> int:
        """Blocks without an owner."""
        return len(self._free) + len(self._idle)

    @property
    def free(self) -> int:
        """Blocks without an owner and without content worth keeping."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks without an owner, kept for their content."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Blocks with an owner."""
        return len(self._refs) - self.available

    @property
    def total_refs(self) -> int:
        """The sum of all reference counts."""
        return self._total_refs

    def ref_count(self, block_id: int) -> int:
        return self._refs[block_id]

    def referenced(self) -> dict[int, int]:
        """Reference counts of all blocks that have an owner."""
        return {block_id: count for block_id, count in enumerate(self._refs) if count}

    def allocate(self, count: int) -> list[int]:
        """Hands out `count` blocks with one reference each. Raises OutOfBlocks, and hands out none, when they are not there."""
        if count > self.available:
            raise OutOfBlocks(f"{count} KV blocks asked for, {self.available} of {self.num_blocks} available")
        taken: list[int] = []
        for _ in range(count):
            if self._free:
                block_id = self._free.pop()
            else:
                block_id, _ = self._idle.popitem(last=False)
                self._kept[block_id] = False
                self._on_evict(block_id)
            self._refs[block_id] = 1
            taken.append(block_id)
        self._total_refs += count
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds one reference to each: of a block that has an owner, or of a cached one, which comes back to use."""
        for block_id in block_ids:
            if not self._refs[block_id]:
                assert block_id in self._idle, f"block {block_id} is free: there is nothing to share"
                del self._idle[block_id]
            self._refs[block_id] += 1
            self._total_refs += 1

    def free_blocks(self, block_ids: Iterable[int]) -> None:
        """Takes one reference from each, in this order; without an owner a block is cached if it is kept, else free."""
        for block_id in block_ids:
            assert self._refs[block_id] > 0, f"block {block_id} is freed twice"
            self._refs[block_id] -= 1
            self._total_refs -= 1
            if not self._refs[block_id]:
                if self._kept[block_id]:
                    self._idle[block_id] = None
                else:
                    self._free.append(block_id)

    def next_out(self, count: int) -> list[int]:
        """The cached blocks that are evicted next, at most so many."""
        return list(islice(self._idle, count))

    def keep(self, block_id: int) -> None:
        """From now on the content of this referenced block outlives its owners, until it is evicted."""
        assert self._refs[block_id] > 0, f"block {block_id} has no owner: its content is not defined"
        self._kept[block_id] = True

    def kept(self) -> set[int]:
        """All blocks whose content outlives their owners."""
        return {block_id for block_id, kept in enumerate(self._kept) if kept}

    def check_integrity(self) -> None:
        """Raises AssertionError when references, free list and cache disagree."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        for block_id, refs in enumerate(self._refs):
            places = (refs > 0) + (block_id in free) + (block_id in self._idle)
            assert refs >= 0, f"block {block_id} has {refs} references"
            assert places == 1, f"block {block_id} is in {places} of: referenced, free, cached"
            assert not (self._kept[block_id] and block_id in free), f"block {block_id} is kept, yet free"
            assert self._kept[block_id] or block_id not in self._idle, f"block {block_id} is cached, yet not kept"
        assert sum(self._refs) == self._total_refs, f"{sum(self._refs)} references, {self._total_refs} counted"
