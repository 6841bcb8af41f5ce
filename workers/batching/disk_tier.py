"""Which block lies in which slot of the disk. Bookkeeping only: bytes move on io threads, as `tier_jobs` says.

A slot is unused, being written (`reserve` until `written` or `unwritten`), or holds a name. After an error of the disk
nothing is written for a while, longer after each error in a row; what is there can still be read, until reading fails too.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable

from workers.batching.tier_policy import Retention, ReuseRate
from workers.engine_api.block_files import BlockFiles, StoredBlock

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 30.0
LONGEST_PAUSE_S = 600.0
MAX_READ_ERRORS = 3


class DiskTier:
    """At most `files.num_slots` blocks. One thread at a time. `on_drop` hears of every name that leaves."""

    def __init__(self, files: BlockFiles, weight: Callable[[int], float], on_drop: Callable[[bytes], None]) -> None:
        self.files = files
        self._on_drop = on_drop
        self._unused = list(range(files.num_slots - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._writing: dict[bytes, int] = {}
        self._held: Counter[bytes] = Counter()
        self._doomed: set[bytes] = set()  # leave when nobody holds them
        self._written_as: dict[bytes, int] = {}  # frequency when it was written, until it is read
        self.order = Retention(files.num_slots, weight)
        self.reuse = ReuseRate()
        self.is_open = False  # the folder is taken and its index was read
        self.off_reason = ""
        self._off_until_s = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._read_errors = 0
        self.errors = 0
        self.corrupt_blocks = 0

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, name: bytes) -> bool:
        return name in self._slot_of and name not in self._doomed

    def names(self) -> set[bytes]:
        """All that are kept."""
        return self._slot_of.keys() - self._doomed

    def knows(self, name: bytes) -> bool:
        """It is here, leaves, or is being written."""
        return name in self._slot_of or name in self._writing

    def slot_of(self, name: bytes) -> int:
        """Where a kept name lies."""
        return self._slot_of[name]

    def takes_writes(self, now_s: float) -> bool:
        """False while the tier is off."""
        return self.is_open and now_s >= self._off_until_s

    def wants_to_open(self, now_s: float) -> bool:
        """The folder is not open and may be tried (again)."""
        return not self.is_open and now_s >= self._off_until_s

    def opened(self) -> None:
        """The folder belongs to this process."""
        self.is_open = True
        self.off_reason, self._pause_s = "", FIRST_PAUSE_S

    def reserve(self, name: bytes) -> int | None:
        """A slot to write this name to; None when all are busy."""
        slot = self._unused.pop() if self._unused else self._take_victim()
        if slot is not None:
            self._writing[name] = slot
        return slot

    def written(self, block: StoredBlock, frequency: int) -> None:
        """The slot holds the block."""
        self._slot_of[block.name] = self._writing.pop(block.name)
        self.order.add(block.name, block.parent, block.depth, frequency)
        self._written_as[block.name] = frequency
        self.off_reason, self._pause_s = "", FIRST_PAUSE_S

    def unwritten(self, name: bytes) -> None:
        """The slot holds nothing, and nobody writes there any more."""
        self._unused.append(self._writing.pop(name))

    def recovered(self, blocks: Iterable[tuple[int, StoredBlock]]) -> list[StoredBlock]:
        """Takes over what an earlier process left; returns what is new."""
        unused = set(self._unused)
        new: list[StoredBlock] = []
        for slot, block in blocks:
            if slot in unused and not self.knows(block.name):
                unused.discard(slot)
                self._slot_of[block.name] = slot
                self.order.add(block.name, block.parent, block.depth)
                new.append(block)
        self._unused = sorted(unused, reverse=True)
        return new

    def hold(self, name: bytes) -> None:
        """A kept name stays until `let_go`."""
        assert name in self, f"{name.hex()} is not here"
        self._held[name] += 1

    def let_go(self, name: bytes) -> None:
        """Ends one `hold`."""
        self._held[name] -= 1
        if not self._held[name]:
            del self._held[name]
            if name in self._doomed:
                self._doomed.remove(name)
                self._remove(name)

    def was_read(self, name: bytes) -> None:
        """The block came back and was right."""
        self._read_errors = 0
        frequency = self._written_as.pop(name, None)
        if frequency is not None:
            self.reuse.ended(frequency, read=True)

    def is_corrupt(self, name: bytes) -> None:
        """What is in the slot is not the block: it leaves."""
        self.corrupt_blocks += 1
        logger.warning("disk tier: the block %s does not verify; it is dropped and computed again", name.hex())
        self.drop(name)

    def failed(self, error: BaseException, now_s: float, *, reading: bool = False) -> None:
        """The disk does not work: off for a while, and without a single block when reading fails again and again."""
        self.errors += 1
        if now_s >= self._off_until_s:
            self._off_until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            logger.warning("disk tier: off for %.0f s: %s", self._off_until_s - now_s, error)
        self.off_reason = str(error) or type(error).__name__
        if reading:
            self._read_errors += 1
            if self._read_errors >= MAX_READ_ERRORS:
                for name in list(self.names()):
                    self.drop(name)

    def drop(self, name: bytes) -> None:
        """The name leaves now; its slot is used again when nobody holds it."""
        if name not in self:
            return
        self._doomed.add(name)
        self._on_drop(name)
        if name not in self._held:
            self._doomed.remove(name)
            self._remove(name)

    def check_integrity(self) -> None:
        """Raises AssertionError when a slot is lost, used twice, or the order knows other names."""
        used = [*self._unused, *self._slot_of.values(), *self._writing.values()]
        assert sorted(used) == list(range(self.files.num_slots)), "a slot of the disk tier is lost or used twice"
        assert len(self.order) == len(self._slot_of), "the disk tier and its order differ"
        assert self._held.keys() <= self._slot_of.keys(), "a held name is not here"
        assert self._doomed <= self._held.keys(), "a name that leaves is held by nobody"
        self.order.check_integrity()

    def _remove(self, name: bytes) -> None:
        self._unused.append(self._slot_of.pop(name))
        self.order.remove(name)
        frequency = self._written_as.pop(name, None)
        if frequency is not None:
            self.reuse.ended(frequency, read=False)

    def _take_victim(self) -> int | None:
        name = self.order.victim(self._held.__contains__)
        if name is None:
            return None
        self.drop(name)
        return self._unused.pop()


def chains_of(blocks: Iterable[StoredBlock]) -> list[tuple[bytes, list[bytes]]]:
    """The blocks as runs that follow each other behind a parent; ancestors come before what builds on them."""
    ordered = sorted(blocks, key=lambda block: (block.depth, block.name))
    behind: dict[bytes, StoredBlock] = {}  # parent -> the first block that builds on it
    for one in ordered:
        behind.setdefault(one.parent, one)
    chains: list[tuple[bytes, list[bytes]]] = []
    done: set[bytes] = set()
    for start in ordered:
        if start.name in done:
            continue
        run: list[bytes] = []
        block: StoredBlock | None = start
        while block is not None and block.name not in done:
            run.append(block.name)
            done.add(block.name)
            block = behind.get(block.name)
        chains.append((start.parent, run))
    return chains
