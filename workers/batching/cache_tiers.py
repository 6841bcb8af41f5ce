"""The tiers below the pool: what they hold, what goes where, and the jobs on the way. See `tier_policy` for the decisions.

Everything here runs under the engine's lock and never waits: bytes move on io threads (`tier_jobs`), and `settle` takes in
what they did. The one copy that the engine's thread makes itself is that of a block which is evicted before `copy_ahead`
had it copied, and of those only so many in one go.

A name is held while host memory or the disk has it whole. When the last of them loses it, `on_gone` hears of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from workers.batching.block_pool import BlockPool
from workers.batching.disk_tier import DiskTier, chains_of
from workers.batching.host_tier import BlockCopier, HostTier
from workers.batching.io_lanes import Lane, Lanes
from workers.batching.runner import Runner
from workers.batching.tier_jobs import CheckFiles, CopyOut, FetchIn, OpenFiles, Source, WriteOut
from workers.batching.tier_policy import Pace, PrefillCost, worth_reading, worth_writing
from workers.engine_api.block_files import BlockFiles, StoredBlock
from workers.engine_api.clock import Clock
from workers.engine_api.types import DiskAudit

MAX_STORE_BYTES = 64 * 1024 * 1024
"""What may be on its way to host memory and disk at one time."""

AHEAD_BLOCKS = 256
"""So many of the blocks that are evicted next are copied ahead, once no more than that are free."""

MAX_SYNC_BYTES = 16 * 1024 * 1024
"""What the engine's thread copies itself in one go; blocks beyond that are lost rather than that everybody waits."""

_HOST_GUESS_S_PER_BYTE, _HOST_GUESS_S = 1 / 4e9, 20e-6
_DISK_GUESS_S_PER_BYTE, _DISK_GUESS_S = 1 / 0.5e9, 100e-6


@dataclass(slots=True)
class TierCounters:
    """What the tiers did since the start of the engine."""

    host_restored_blocks: int = 0
    disk_restored_blocks: int = 0
    sync_copies: int = 0  # blocks that the engine's thread had to copy when it evicted them


class CacheTiers:
    """Host memory and, when there are `files`, the disk. `on_gone` and `on_found` are told of names: see `connect`."""

    def __init__(self, runner: Runner, host_bytes: int, files: BlockFiles | None, lanes: Lanes, clock: Clock) -> None:
        self._lanes = lanes
        self._now_s = clock.now_s
        self._block_tokens = runner.layout.block_tokens
        self._block_bytes = size = runner.layout.block_bytes
        self._copier = BlockCopier(runner)
        self.cost = PrefillCost()
        self._host_pace = Pace(size * _HOST_GUESS_S_PER_BYTE + _HOST_GUESS_S)
        self._read_pace = Pace(size * _DISK_GUESS_S_PER_BYTE + _DISK_GUESS_S)
        self._write_pace = Pace(size * _DISK_GUESS_S_PER_BYTE + _DISK_GUESS_S)
        self.host = HostTier(runner, host_bytes, self._weight, self._left_host)
        self.disk = DiskTier(files, self._weight, self._left_disk) if files is not None else None
        self._in_pool: dict[bytes, StoredBlock] = {}
        self._uses: dict[bytes, int] = {}  # of blocks in the pool, by prompts
        self._copying: dict[bytes, CopyOut] = {}
        self._store_bytes = 0
        self._sync_bytes = 0  # copied by the engine's thread since `settle`
        self._queued_s = 0.0  # what the fetches on their way are predicted to take
        self._opening = False
        self._checking = False
        self._on_gone: Callable[[bytes], None] = lambda name: None
        self._on_found: Callable[[bytes, Sequence[bytes]], None] = lambda parent, names: None
        self.counters = TierCounters()

    def connect(self, on_gone: Callable[[bytes], None], on_found: Callable[[bytes, Sequence[bytes]], None]) -> None:
        """Who hears of a name that no tier here holds any more, and of chains behind a parent that an earlier process left."""
        self._on_gone, self._on_found = on_gone, on_found
        self._open_disk()

    def holds(self, name: bytes) -> bool:
        """Whether a tier here has the block."""
        return name in self.host or (self.disk is not None and name in self.disk)

    def names(self) -> set[bytes]:
        """All names that are held."""
        return self.host.names() | (self.disk.names() if self.disk is not None else set())

    # -- the pool tells -------------------------------------------------------------------------------------------------

    def filed(self, parent: bytes, names: Sequence[bytes], first_depth: int) -> None:
        """The pool files these consecutive names; it tells of `evicting` each of them."""
        for depth, name in enumerate(names, first_depth):
            if name not in self._in_pool:
                self._in_pool[name] = StoredBlock(name, parent, depth)
                self._uses[name] = 1
            parent = name

    def used(self, names: Iterable[bytes]) -> None:
        """A prompt starts with these blocks of the pool."""
        for name in names:
            self._uses[name] += 1
            if self.disk is not None and name in self.disk:
                self.disk.order.touch(name)
            if name in self.host:
                self.host.order.touch(name)
                self._offer_to_disk(self._in_pool[name])

    def evicting(self, name: bytes, block_id: int) -> None:
        """The pool is about to overwrite the block."""
        block = self._in_pool.pop(name)
        copy = self._copying.pop(name, None)
        if copy is not None:
            copy.void = True
        may_copy = not self._sync_bytes or self._sync_bytes + self._block_bytes <= MAX_SYNC_BYTES
        wanted = may_copy and not self.holds(name)
        if wanted and self.host.save(name, block_id, block.parent, block.depth, self._uses[name]):
            self._sync_bytes += self._block_bytes
            self.counters.sync_copies += 1
            self._offer_to_disk(block)
        del self._uses[name]

    def copy_ahead(self, pool: BlockPool, name_of: Callable[[int], bytes]) -> None:
        """Copies what the pool evicts next while it is still there, so that the eviction itself costs nothing."""
        if pool.free > AHEAD_BLOCKS:
            return
        for block_id in pool.next_out(min(AHEAD_BLOCKS, max(1, self.host.capacity // 2))):
            name = name_of(block_id)
            if self.holds(name) or not self._may_store():
                continue
            row = self.host.reserve(name)
            if row is None:
                continue
            job = CopyOut(self._in_pool[name], block_id, row, self._copier)
            self._copying[name] = job
            self._submit_store(job)

    # -- on the way back ------------------------------------------------------------------------------------------------

    def worth_fetching(self, names: Sequence[bytes], first_depth: int) -> tuple[int, float]:
        """How many leading names to bring back rather than to compute, and what computing those would take."""
        reads = self._reads(names)
        computes = [self.cost.block_s(first_depth + index, self._block_tokens) for index in range(len(reads))]
        count = worth_reading(computes, reads, self._queued_s)
        return count, sum(computes[:count])

    def readable(self, before: bytes, names: Sequence[bytes], within_s: float) -> int:
        """How many leading names, each behind the one before it, can be brought back in that time as far as it can be told.

        One at least if there is one: only reading shows how fast reading is.
        """
        count, left_s = 0, within_s - self._queued_s
        for name, read_s in zip(names, self._reads(names), strict=False):
            left_s -= read_s
            if (count and left_s < 0) or self.parent_of(name) != before:
                break
            count, before = count + 1, name
        return count

    def parent_of(self, name: bytes) -> bytes | None:
        """The name before one that a tier here has."""
        if name in self.host:
            return self.host.order.place(name)[0]
        return self.disk.order.place(name)[0] if self.disk is not None and name in self.disk else None

    def hold(self, names: Sequence[bytes]) -> None:
        """Keeps these names where they are, until `settle` hands out the fetch of them, or `let_go`."""
        for name in names:
            if name in self.host:
                self.host.hold(name)
            else:
                assert self.disk is not None
                self.disk.hold(name)

    def let_go(self, names: Sequence[bytes]) -> None:
        """Ends `hold` when no fetch came of it; the tiers have not changed since."""
        for name in names:
            if name in self.host:
                self.host.let_go(name)
            elif self.disk is not None:
                self.disk.let_go(name)

    def fetch(self, ticket_id: int, names: Sequence[bytes], block_ids: Sequence[int]) -> FetchIn:
        """Begins to copy held names into blocks of the pool."""
        sources: list[Source] = []
        for name, block_id in zip(names, block_ids, strict=True):
            if name in self.host:
                block = StoredBlock(name, *self.host.order.place(name))
                sources.append(Source(block, block_id, row=self.host.row(name)))
            else:
                assert self.disk is not None
                block = StoredBlock(name, *self.disk.order.place(name))
                sources.append(Source(block, block_id, slot=self.disk.slot_of(name)))
        files = self.disk.files if self.disk is not None else None
        job = FetchIn(ticket_id, tuple(sources), files, self._copier, self._now_s)
        job.predicted_s = self._predicted_s(job)
        self._queued_s += job.predicted_s
        self._lanes.submit(Lane.FETCH, job)
        return job

    def settle(self) -> list[FetchIn]:
        """Takes in what the io threads did since the last call; returns the fetches among it."""
        self._sync_bytes = 0
        self._open_disk()
        fetches: list[FetchIn] = []
        while jobs := self._lanes.done():
            for job in jobs:
                match job:
                    case CopyOut():
                        self._copied(job)
                    case WriteOut():
                        self._written(job)
                    case OpenFiles():
                        self._opened(job)
                    case CheckFiles():
                        self._checked(job)
                    case FetchIn():
                        self._fetched(job)
                        fetches.append(job)
                    case _:
                        raise AssertionError(f"no outcome is known for {job!r}")
        return fetches

    def audit_disk(self, max_blocks: int, seed: int, told: Callable[[DiskAudit], None]) -> None:
        """See Engine.audit_disk. One at a time, a second one reads nothing. Reading queues behind writing: no prompt waits."""
        disk = self.disk
        if disk is None or not disk.is_open or self._checking:
            told(DiskAudit())
            return
        names = list(disk.names())
        names = random.Random(seed).sample(names, min(max_blocks, len(names)))
        for name in names:
            disk.hold(name)
        blocks = tuple((disk.slot_of(name), StoredBlock(name, *disk.order.place(name))) for name in names)
        self._checking = True
        self._lanes.submit(Lane.STORE, CheckFiles(blocks, disk.files, self._block_bytes, told))

    def check_integrity(self, in_pool: set[bytes]) -> None:
        """Raises AssertionError when the books of a tier, or those about the pool, do not agree."""
        assert self._in_pool.keys() == in_pool == self._uses.keys(), "the tiers and the pool differ about filed names"
        assert self._copying.keys() <= in_pool, "a block that is not filed is being copied"
        self.host.check_integrity()
        if self.disk is not None:
            self.disk.check_integrity()

    def close(self) -> None:
        """Ends the io threads and gives the folder back. Idempotent."""
        self._lanes.close()
        if self.disk is not None:
            self.disk.files.close()

    # -- outcomes -------------------------------------------------------------------------------------------------------

    def _copied(self, job: CopyOut) -> None:
        name = job.block.name
        self._store_bytes -= self._block_bytes
        if not job.void:
            del self._copying[name]
        if job.ended and not job.void:
            self.host.filled(name, job.block.parent, job.block.depth, self._uses[name])
            self._offer_to_disk(job.block)
        else:
            self.host.unfilled(name)

    def _written(self, job: WriteOut) -> None:
        assert self.disk is not None
        self._store_bytes -= self._block_bytes
        self.host.let_go(job.block.name)
        if job.ended:
            self.disk.written(job.block, job.frequency)
            self._write_pace.observe(1, job.took_s)
        else:
            self.disk.unwritten(job.block.name)
            self.disk.failed(job.error or RuntimeError("a write ended without an outcome"), self._now_s())

    def _opened(self, job: OpenFiles) -> None:
        assert self.disk is not None
        self._opening = False
        if not job.ended:
            self.disk.failed(job.error or RuntimeError("the folder could not be opened"), self._now_s())
            return
        self.disk.opened()
        new = self.disk.recovered(job.found)
        for parent, names in chains_of([block for block in new if block.name not in self.host]):
            self._on_found(parent, names)

    def _checked(self, job: CheckFiles) -> None:
        assert self.disk is not None
        self._checking = False
        for name in job.corrupt:
            self.disk.is_corrupt(name)
        for _, block in job.blocks:
            self.disk.let_go(block.name)
        if job.error is not None:
            self.disk.failed(job.error, self._now_s(), reading=True)
        job.told(DiskAudit(checked=job.checked, corrupt=tuple(job.corrupt), error=str(job.error or "")))

    def _fetched(self, job: FetchIn) -> None:
        self._queued_s = max(0.0, self._queued_s - job.predicted_s)
        from_disk = 0
        for index, source in enumerate(job.sources):
            name = source.block.name
            if source.row is not None:
                self.host.let_go(name)
                continue
            assert self.disk is not None
            if index < job.done:
                from_disk += 1
                self.disk.was_read(name)
            elif index == job.done and job.corrupt:
                self.disk.is_corrupt(name)
            self.disk.let_go(name)
        self._read_pace.observe(from_disk, job.disk_s)
        self._host_pace.observe(job.done - from_disk, job.host_s)
        self.counters.disk_restored_blocks += from_disk
        self.counters.host_restored_blocks += job.done - from_disk
        if job.error is not None:
            assert self.disk is not None
            self.disk.drop(job.sources[job.done].block.name)
            self.disk.failed(job.error, self._now_s(), reading=True)

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _reads(self, names: Sequence[bytes]) -> list[float]:
        """What each of the leading names takes that lower tiers have and the pool has not."""
        reads: list[float] = []
        for name in names:
            if name in self._in_pool:
                break
            if name in self.host:
                reads.append(self._host_pace.block_s)
            elif self.disk is not None and name in self.disk:
                reads.append(self._read_pace.block_s)
            else:
                break
        return reads

    def _offer_to_disk(self, block: StoredBlock) -> None:
        """Writes a block of host memory to the disk if it should be there and the io thread is not behind."""
        disk, name = self.disk, block.name
        if disk is None or disk.knows(name) or not self._may_store() or not disk.takes_writes(self._now_s()):
            return
        frequency = self.host.order.frequency(name)
        compute_s = self.cost.block_s(block.depth, self._block_tokens)
        if not worth_writing(disk.reuse.of(frequency), compute_s, self._read_pace.block_s, self._write_pace.block_s):
            return
        slot = disk.reserve(name)
        if slot is not None:
            self.host.hold(name)
            self._submit_store(WriteOut(block, frequency, slot, self.host.row(name), disk.files, self._now_s))

    def _open_disk(self) -> None:
        if self.disk is not None and not self._opening and self.disk.wants_to_open(self._now_s()):
            self._opening = True
            self._lanes.submit(Lane.STORE, OpenFiles(self.disk.files))

    def _may_store(self) -> bool:
        return not self._store_bytes or self._store_bytes + self._block_bytes <= MAX_STORE_BYTES

    def _submit_store(self, job: CopyOut | WriteOut) -> None:
        self._store_bytes += self._block_bytes
        self._lanes.submit(Lane.STORE, job)

    def _predicted_s(self, job: FetchIn) -> float:
        from_disk = sum(source.row is None for source in job.sources)
        return from_disk * self._read_pace.block_s + (len(job.sources) - from_disk) * self._host_pace.block_s

    def _weight(self, depth: int) -> float:
        return self.cost.relative(depth, self._block_tokens)

    def _left_host(self, name: bytes) -> None:
        if self.disk is None or name not in self.disk:
            self._on_gone(name)

    def _left_disk(self, name: bytes) -> None:
        if name not in self.host:
            self._on_gone(name)
