"""Where an engine's KV pool lies on a CPU: in memory of its own, or in a file in memory that other processes may read.

The file is a memfd: it has no name in any folder and is gone with the last process that has it open or mapped, however that
process ends. It is sealed: it never shrinks, so a reader never faults, and no other process can map it for writing.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

KEY_BYTES = 16
_ALIGNMENT_BYTES = 4096  # rows that straddle cache lines make attention a fifth slower
F_SEAL_FUTURE_WRITE = 0x10  # the one seal that Python has no name for: mappings made after it cannot write
NEEDED_SEALS = 0 if sys.platform != "linux" else fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def segment_name(key: bytes) -> str:
    """The name of the file with this key, as /proc shows it behind `/memfd:`."""
    return f"autan-kv-{key.hex()}"


@dataclass(frozen=True, slots=True, eq=False)
class PoolSegment:
    """A pool in a sealed file. `fd` stays open as long as others shall be able to map it; `base` is its address here."""

    fd: int
    key: bytes
    size_bytes: int
    base: int

    def offset_of(self, data: memoryview) -> int | None:
        """Where in the file these bytes lie, None when they lie elsewhere."""
        if not data.nbytes:
            return None
        # The array interface is the one way to a read-only view's address.
        offset: int = np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0] - self.base
        return offset if 0 <= offset <= self.size_bytes - data.nbytes else None


class PoolMemory:
    """Gives one engine the memory of its pool. Pages that are never touched cost nothing, either way."""

    def __init__(self, *, shared: bool = False) -> None:
        self._shared = shared
        self._segment: PoolSegment | None = None

    @property
    def segment(self) -> PoolSegment | None:
        """The file that holds the pool, None when others cannot read it: not asked for, not on a CPU, or not possible here."""
        return self._segment

    def allocate(self, size_bytes: int) -> Bytes:
        """Zeros that begin at a page. At most once for each object; falls back to memory of its own, and logs why, when there
        can be no file."""
        assert self._segment is None, "the pool has its memory already"
        if self._shared and size_bytes:
            try:
                return self._in_file(size_bytes)
            except (OSError, AttributeError) as error:  # AttributeError: not on Linux
                logger.warning("the KV pool cannot be shared with other processes of this host: %s", error)
        spare = np.zeros(size_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
        begin = -spare.__array_interface__["data"][0] % _ALIGNMENT_BYTES
        return spare[begin : begin + size_bytes]

    def close(self) -> None:
        """From now on nobody can map the file any more; the memory lives on while somebody uses it. Idempotent."""
        segment, self._segment = self._segment, None
        if segment is not None:
            os.close(segment.fd)

    def _in_file(self, size_bytes: int) -> Bytes:
        key = secrets.token_bytes(KEY_BYTES)
        fd = os.memfd_create(segment_name(key), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            mapping = mmap.mmap(fd, size_bytes)
            mapping.madvise(mmap.MADV_HUGEPAGE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, NEEDED_SEALS | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
            pool: Bytes = np.frombuffer(mapping, dtype=np.uint8)
        except BaseException:
            os.close(fd)
            raise
        self._segment = PoolSegment(fd, key, size_bytes, pool.__array_interface__["data"][0])
        return pool
