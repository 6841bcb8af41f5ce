"""Engines over tiny tiers, and io threads that a test drives by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

from workers.batching.engine_limits import EngineLimits
from workers.batching.io_lanes import Job, Lane, Lanes
from workers.batching.paged_engine import PagedEngine
from workers.engine_api.clock import Clock, ManualClock
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.runner import OracleRunner
from workers.kv_tiers.disk_files import DiskFiles, slot_bytes_of


class HandLanes:
    """Jobs wait until the test runs them; jobs of one lane run in order."""

    def __init__(self) -> None:
        self.waiting: dict[Lane, deque[Job]] = {lane: deque() for lane in Lane}
        self._done: list[Job] = []
        self._wake: Callable[[], None] = lambda: None
        self.closed = False

    def submit(self, lane: Lane, job: Job) -> None:
        self.waiting[lane].append(job)

    def run(self, lane: Lane, count: int = 1_000_000) -> int:
        """Runs so many jobs; returns how many there were."""
        for done in range(count):
            if not self.waiting[lane]:
                return done
            job = self.waiting[lane].popleft()
            job.run()
            self._done.append(job)
            self._wake()
        return count

    def done(self) -> list[Job]:
        done, self._done = self._done, []
        return done

    def on_wake(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def close(self) -> None:
        self.closed = True


class InlineLanes(HandLanes):
    """Jobs run as they come, so that what an engine says does not depend on threads."""

    def submit(self, lane: Lane, job: Job) -> None:
        super().submit(lane, job)
        self.run(lane)


def tiered(
    model: OracleModel,
    *,
    num_blocks: int,
    block_tokens: int,
    host_blocks: int,
    folder: Path | None = None,
    disk_blocks: int = 0,
    lanes: Lanes | None = None,
    clock: Clock | None = None,
    max_batch_tokens: int = 16,
    max_running: int = 3,
) -> PagedEngine:
    """An oracle engine. Its clock stands still unless one is given, so that no prediction makes a block not worth while."""
    runner = OracleRunner(model, num_blocks=num_blocks, block_tokens=block_tokens)
    layout = runner.layout
    files = None
    if folder is not None:
        files = DiskFiles(folder, disk_blocks * slot_bytes_of(layout), runner.identity, layout)
    limits = EngineLimits(
        max_batch_tokens=max_batch_tokens, max_running=max_running, host_cache_bytes=host_blocks * layout.block_bytes
    )
    return PagedEngine(runner, limits, files=files, clock=clock or ManualClock(), lanes=lanes)
