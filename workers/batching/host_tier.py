"""Blocks that the pool gave up, or is about to, kept in the memory of the host under their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from workers.batching.runner import Runner
from workers.batching.tier_policy import Retention

Bytes = npt.NDArray[np.uint8]


class BlockCopier:
    """Moves whole blocks between the pool and rows of bytes, from any thread."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        layout = runner.layout
        self.block_bytes = layout.block_bytes
        self._spans: list[tuple[int, int]] = []
        start = 0
        for group in range(layout.num_groups):
            self._spans.append((start, start + layout.group_bytes(group)))
            start += layout.group_bytes(group)

    def out(self, block_id: int, row: Bytes) -> None:
        """Copies a block of the pool."""
        for group, (start, stop) in enumerate(self._spans):
            row[start:stop] = np.frombuffer(self._runner.read_block(block_id, group), dtype=np.uint8)

    def back(self, row: Bytes, block_id: int) -> None:
        """Overwrites a block of the pool."""
        data = row.data
        for group, (start, stop) in enumerate(self._spans):
            self._runner.write_block(block_id, group, 0, data[start:stop])


class HostTier:
    """At most `capacity_bytes` of whole blocks; `tier_policy.Retention` says which go. One thread at a time.

    A slot is unused, being filled (`reserve` until `filled` or `unfilled`), or holds a name. What somebody reads or writes
    from another thread is held and stays. Memory is taken from the system as blocks come in, never beyond the capacity, and
    reused afterwards. `on_drop` hears of every name that leaves.
    """

    def __init__(
        self,
        runner: Runner,
        capacity_bytes: int,
        weight: Callable[[int], float] = lambda depth: 1.0,
        on_drop: Callable[[bytes], None] = lambda name: None,
    ) -> None:
        self._copier = BlockCopier(runner)
        self._capacity = capacity_bytes // runner.layout.block_bytes
        # Pages are handed out by the system when they are first written.
        self._slots: Bytes = np.empty((self._capacity, runner.layout.block_bytes), dtype=np.uint8)
        self._unused = list(range(self._capacity - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._filling: dict[bytes, int] = {}
        self._held: Counter[bytes] = Counter()
        self.order = Retention(self._capacity, weight)
        self._on_drop = on_drop

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._slot_of)

    def __contains__(self, name: bytes) -> bool:
        return name in self._slot_of

    @property
    def capacity(self) -> int:
        """Blocks that can be kept."""
        return self._capacity

    def names(self) -> set[bytes]:
        """All that are kept."""
        return set(self._slot_of)

    def row(self, name: bytes) -> Bytes:
        """The bytes of a kept name; valid while it is held."""
        row: Bytes = self._slots[self._slot_of[name]]
        return row

    def save(self, name: bytes, block_id: int, parent: bytes = b"", depth: int = 0, uses: int = 1) -> bool:
        """Copies a block of the pool now, unless its name is here. False when every slot is busy."""
        if name in self._slot_of:
            return True
        slot = self._take_slot()
        if slot is None:
            return False
        self._copier.out(block_id, self._slots[slot])
        self._keep(name, slot, parent, depth, uses)
        return True

    def reserve(self, name: bytes) -> Bytes | None:
        """A row for somebody to fill on another thread; None when the name is here, on its way, or every slot is busy."""
        if name in self._slot_of or name in self._filling:
            return None
        slot = self._take_slot()
        if slot is None:
            return None
        self._filling[name] = slot
        row: Bytes = self._slots[slot]
        return row

    def filled(self, name: bytes, parent: bytes, depth: int, uses: int = 1) -> None:
        """The reserved row holds the block, which so many prompts used."""
        slot = self._filling.pop(name)
        if name in self._slot_of:
            self._unused.append(slot)
        else:
            self._keep(name, slot, parent, depth, uses)

    def unfilled(self, name: bytes) -> None:
        """The reserved row holds nothing of use, and nobody writes there any more."""
        self._unused.append(self._filling.pop(name))

    def is_filling(self, name: bytes) -> bool:
        """True between `reserve` and its end."""
        return name in self._filling

    def hold(self, name: bytes) -> None:
        """A kept name stays until `let_go`."""
        assert name in self._slot_of, f"{name.hex()} is not here"
        self._held[name] += 1

    def let_go(self, name: bytes) -> None:
        """Ends one `hold`."""
        self._held[name] -= 1
        if not self._held[name]:
            del self._held[name]

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
        self.order.touch(name)
        self._copier.back(self._slots[slot], block_id)
        return True

    def check_integrity(self) -> None:
        """Raises AssertionError when a slot is lost, used twice, or the order knows other names."""
        used = [*self._unused, *self._slot_of.values(), *self._filling.values()]
        assert sorted(used) == list(range(self._capacity)), "a slot of the host tier is lost or used twice"
        assert len(self.order) == len(self._slot_of), "the host tier and its order differ"
        assert self._held.keys() <= self._slot_of.keys(), "a held name is not here"
        self.order.check_integrity()

    def _keep(self, name: bytes, slot: int, parent: bytes, depth: int, uses: int) -> None:
        self._slot_of[name] = slot
        self.order.add(name, parent, depth, uses)

    def _take_slot(self) -> int | None:
        if self._unused:
            return self._unused.pop()
        name = self.order.victim(self._held.__contains__)
        if name is None:
            return None
        slot = self._slot_of.pop(name)
        self.order.remove(name)
        self._on_drop(name)
        return slot
