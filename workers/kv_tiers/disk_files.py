"""Blocks in preallocated segment files of one folder: `lock`, and `segment-00000.kv` and so on.

A slot is a header and a payload, written with one call, aligned to pages. Nothing is synced: a slot that a crash tore does
not verify, and what does not verify is not there. Segments are allocated when they are first written, so a full disk is
noticed by `write` and never by a step.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from protos.contract.errors import ConfigError
from workers.engine_api.block_files import StoredBlock
from workers.engine_api.types import KvLayout, ModelIdentity
from workers.kv_tiers.slot_format import HEADER_BYTES, fingerprint_key, pack_header, parse_header, payload_digest

_PAGE_BYTES = 4096
_SEGMENT_BYTES = 64 * 1024 * 1024
_RECOVER_BATCH = 256


def slot_bytes_of(layout: KvLayout) -> int:
    """What one block takes in a file."""
    return -(-(HEADER_BYTES + layout.block_bytes) // _PAGE_BYTES) * _PAGE_BYTES


class DiskFiles:
    """Implements `workers.engine_api.block_files.BlockFiles`; files never take more than `capacity_bytes` together."""

    def __init__(self, folder: Path, capacity_bytes: int, identity: ModelIdentity, layout: KvLayout) -> None:
        self._folder = folder
        self._payload_bytes = layout.block_bytes
        self._slot_bytes = slot_bytes_of(layout)
        self._num_slots = capacity_bytes // self._slot_bytes
        self._slots_per_segment = max(1, min(self._num_slots, _SEGMENT_BYTES // self._slot_bytes))
        self._fingerprint = fingerprint_key(identity, layout)
        self._segments: dict[int, int] = {}  # index -> descriptor
        self._lock: int | None = None

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def slot_bytes(self) -> int:
        return self._slot_bytes

    def open(self) -> None:
        """Raises ConfigError when another process has the folder, OSError when it cannot be used."""
        if self._lock is not None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigError(
                f"engine.disk_cache.path: {self._folder} is in use by process {holder or 'unknown'}; "
                "two workers never share a folder: give this one another path"
            ) from None
        self._lock = descriptor
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            self._adopt_segments()
        except BaseException:
            self.close()
            raise

    def recover(self) -> Iterator[list[tuple[int, StoredBlock]]]:
        seen: set[bytes] = set()
        batch: list[tuple[int, StoredBlock]] = []
        for segment in sorted(self._segments):
            for index in range(self._slots_in(segment)):
                raw = os.pread(self._segments[segment], HEADER_BYTES, index * self._slot_bytes)
                header = parse_header(raw, self._fingerprint, self._payload_bytes)
                if header is not None and header[0].name not in seen:
                    seen.add(header[0].name)
                    batch.append((segment * self._slots_per_segment + index, header[0]))
                if len(batch) == _RECOVER_BATCH:
                    yield batch
                    batch = []
        yield batch

    def write(self, slot: int, block: StoredBlock, payload: memoryview) -> None:
        segment, offset = self._at(slot)
        descriptor = self._segments.get(segment)
        if descriptor is None:
            descriptor = self._make_segment(segment)
        parts = [memoryview(pack_header(self._fingerprint, block, payload)), payload.cast("B")]
        while parts:
            done = os.pwritev(descriptor, parts, offset)
            offset += done
            while parts and done >= parts[0].nbytes:
                done -= parts.pop(0).nbytes
            if parts:
                parts[0] = parts[0][done:]

    def read(self, slot: int, block: StoredBlock, into: memoryview) -> bool:
        segment, offset = self._at(slot)
        descriptor = self._segments.get(segment)
        if descriptor is None:
            return False
        header = bytearray(HEADER_BYTES)
        view = into.cast("B")
        done = os.preadv(descriptor, [header, view], offset)
        while HEADER_BYTES <= done < HEADER_BYTES + view.nbytes:
            more = os.preadv(descriptor, [view[done - HEADER_BYTES :]], offset + done)
            if not more:
                return False
            done += more
        parsed = parse_header(memoryview(header), self._fingerprint, self._payload_bytes)
        return (
            done == HEADER_BYTES + view.nbytes
            and parsed is not None
            and parsed[0] == block
            and parsed[1] == payload_digest(self._fingerprint, block, view)
        )

    def close(self) -> None:
        for descriptor in self._segments.values():
            os.close(descriptor)
        self._segments.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _at(self, slot: int) -> tuple[int, int]:
        assert 0 <= slot < self._num_slots, f"slot {slot} of {self._num_slots}"
        segment, index = divmod(slot, self._slots_per_segment)
        return segment, index * self._slot_bytes

    def _slots_in(self, segment: int) -> int:
        return max(0, min(self._slots_per_segment, self._num_slots - segment * self._slots_per_segment))

    def _path(self, segment: int) -> Path:
        return self._folder / f"segment-{segment:05}.kv"

    def _adopt_segments(self) -> None:
        """Opens the segments that have the right size; those of another size, or beyond the capacity, go."""
        for path in sorted(self._folder.glob("segment-*.kv")):
            digits = path.stem.removeprefix("segment-")
            segment = int(digits) if digits.isascii() and digits.isdigit() else -1
            size = self._slots_in(segment) * self._slot_bytes if segment >= 0 else 0
            usable = path == self._path(max(segment, 0)) and size > 0 and path.lstat().st_size == size
            if usable and path.is_file() and not path.is_symlink():
                self._segments[segment] = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            else:
                path.unlink()

    def _make_segment(self, segment: int) -> int:
        path = self._path(segment)
        with suppress(FileNotFoundError):
            path.unlink()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._slots_in(segment) * self._slot_bytes)
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            raise
        self._segments[segment] = descriptor
        return descriptor
