"""The work that io threads do for the tiers. Everything they touch is held for them, or guarded by the job itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from protos.contract.errors import AutanError
from workers.batching.host_tier import BlockCopier, Bytes
from workers.engine_api.block_files import BlockFiles, StoredBlock
from workers.engine_api.types import DiskAudit


@dataclass(slots=True)
class CopyOut:
    """Copies a cached block of the pool into host memory, ahead of its eviction.

    The block may be overwritten meanwhile: whoever does that sets `void`, and what was copied is thrown away.
    """

    block: StoredBlock
    block_id: int
    row: Bytes
    copier: BlockCopier
    void: bool = False
    ended: bool = False

    def run(self) -> None:
        if not self.void:
            self.copier.out(self.block_id, self.row)
            self.ended = True


@dataclass(slots=True)
class WriteOut:
    """Writes a held block of host memory to the disk."""

    block: StoredBlock
    frequency: int
    slot: int
    row: Bytes
    files: BlockFiles
    now_s: Callable[[], float]
    took_s: float = 0.0
    ended: bool = False
    error: BaseException | None = None

    def run(self) -> None:
        started_s = self.now_s()
        try:
            self.files.write(self.slot, self.block, self.row.data)
            self.ended = True
        except OSError as error:
            self.error = error
        self.took_s = self.now_s() - started_s


@dataclass(slots=True)
class OpenFiles:
    """Takes the folder and reads the index that is there."""

    files: BlockFiles
    found: list[tuple[int, StoredBlock]] = field(default_factory=list)
    ended: bool = False
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.files.open()
            for batch in self.files.recover():
                self.found += batch
            self.ended = True
        except (OSError, AutanError) as error:
            self.error = error


@dataclass(slots=True)
class CheckFiles:
    """Reads held blocks of the disk and verifies them; `told` hears of it when the tiers take it in."""

    blocks: tuple[tuple[int, StoredBlock], ...]
    files: BlockFiles
    block_bytes: int
    told: Callable[[DiskAudit], None]
    checked: int = 0
    corrupt: list[bytes] = field(default_factory=list)
    error: OSError | None = None

    def run(self) -> None:
        row: Bytes = np.empty(self.block_bytes, dtype=np.uint8)
        try:
            for slot, block in self.blocks:
                if not self.files.read(slot, block, row.data):
                    self.corrupt.append(block.name)
                self.checked += 1
        except OSError as error:
            self.error = error


@dataclass(frozen=True, slots=True)
class Source:
    """Where one block comes from, into which block of the pool: host memory, or a slot of the disk."""

    block: StoredBlock
    block_id: int
    row: Bytes | None = None
    slot: int = -1


@dataclass(slots=True)
class FetchIn:
    """Brings blocks back into the pool, in order; stops at the first that cannot be had.

    The first `done` blocks are whole and verified. After `cancel` nothing is written to the pool any more.
    """

    ticket_id: int
    sources: tuple[Source, ...]
    files: BlockFiles | None
    copier: BlockCopier
    now_s: Callable[[], float]
    done: int = 0
    corrupt: bool = False  # of the block behind the first `done`
    error: OSError | None = None
    predicted_s: float = 0.0
    host_s: float = 0.0
    disk_s: float = 0.0
    _cancelled: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        staging: Bytes | None = None
        for source in self.sources:
            if self._cancelled:
                return
            started_s = self.now_s()
            row = source.row
            if row is None:
                if staging is None:
                    staging = np.empty(self.copier.block_bytes, dtype=np.uint8)
                if not self._read(source, staging):
                    return
                row = staging
            with self._guard:
                if self._cancelled:
                    return
                self.copier.back(row, source.block_id)
                self.done += 1
            took_s = self.now_s() - started_s
            if source.row is None:
                self.disk_s += took_s
            else:
                self.host_s += took_s

    def cancel(self) -> int:
        """From now on nothing is written to the pool; returns how many leading blocks are whole."""
        with self._guard:
            self._cancelled = True
            return self.done

    def _read(self, source: Source, into: Bytes) -> bool:
        assert self.files is not None
        try:
            self.corrupt = not self.files.read(source.slot, source.block, into.data)
        except OSError as error:
            self.error = error
            return False
        return not self.corrupt
