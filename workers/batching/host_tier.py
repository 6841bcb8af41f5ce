"""Blocks that the pool had to give up, kept in the memory of the host under their names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from workers.batching.runner import Runner


class HostTier:
    """At most `capacity_bytes` of whole blocks, least recently used first out. One thread at a time.

    Memory is taken from the system as blocks come in, never beyond the capacity, and reused afterwards.
    """

    def __init__(self, runner: Runner, capacity_bytes: int) -> None:
        self._runner = runner
        layout = runner.layout
        self._spans: list[tuple[int, int]] = []
        start = 0
        for group in range(layout.num_groups):
            self._spans.append((start, start + layout.group_bytes(group)))
            start += layout.group_bytes(group)
        self._capacity = capacity_bytes // layout.block_bytes
        # Pages are handed out by the system when they are first written.
        self._slots = np.empty((self._capacity, layout.block_bytes), dtype=np.uint8)
        self._unused = list(range(self._capacity - 1, -1, -1))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._slot_of)

    @property
    def capacity(self) -> int:
        """Blocks that can be kept."""
        return self._capacity

    def save(self, name: bytes, block_id: int) -> None:
        """Copies a block of the pool; one of this name that is here already stays, as the most recently used."""
        if not self._capacity:
            return
        if name in self._slot_of:
            self._slot_of.move_to_end(name)
            return
        slot = self._unused.pop() if self._unused else self._slot_of.popitem(last=False)[1]
        row = self._slots[slot]
        for group, (start, stop) in enumerate(self._spans):
            row[start:stop] = np.frombuffer(self._runner.read_block(block_id, group), dtype=np.uint8)
        self._slot_of[name] = slot

    def run(self, names: Sequence[bytes]) -> int:
        """How many leading names are here. Changes nothing."""
        for index, name in enumerate(names):
            if name not in self._slot_of:
                return index
        return len(names)

    def load(self, name: bytes, block_id: int) -> bool:
        """Copies the bytes of a name into a block of the pool; False, and nothing is written, when they are not here."""
        slot = self._slot_of.get(name)
        if slot is None:
            return False
        self._slot_of.move_to_end(name)
        data = memoryview(self._slots[slot])
        for group, (start, stop) in enumerate(self._spans):
            self._runner.write_block(block_id, group, 0, data[start:stop])
        return True
