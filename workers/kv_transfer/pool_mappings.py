"""KV pools of other processes of this host, mapped to be read.

An offer is hostile input. What is mapped is a sealed file in memory that has the offered key in its name, so that a peer can
offer its own pool, or one that it was told of, and nothing else; a sealed file cannot shrink, so reading it never faults. Its
bytes may change at any moment: they are copied first and checked then.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import stat
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from protos.contract.errors import BadFrame
from protos.wire import kv
from workers.engine_api.pool_memory import KEY_BYTES, NEEDED_SEALS, Bytes, PoolSegment, segment_name
from workers.kv_transfer.host_identity import host_identity

logger = logging.getLogger(__name__)

MAX_MAPPINGS = 64
_MAX_POOL_BYTES = 1 << 44
_MAX_ID = 1 << 31


class NotMapped(Exception):
    """Why an offered pool cannot be read here. The transfer goes on with bytes in its frames."""


def offer_of(segment: PoolSegment | None) -> kv.SharedPool | None:
    """How a sender offers its pool, None when there is none to offer."""
    host = host_identity()
    if segment is None or not host:
        return None
    return kv.SharedPool(host=host, pid=os.getpid(), fd=segment.fd, key=segment.key, size_bytes=segment.size_bytes)


@dataclass(slots=True, eq=False)
class PoolMapping:
    """One mapped pool; unmapped when nobody refers to it any more."""

    path: Path
    name: str
    size_bytes: int
    used_s: float
    _bytes: Bytes = field(repr=False)

    def view(self, offset: int, size_bytes: int) -> memoryview:
        """Read-only bytes of the pool, which their owner may change meanwhile. Raises BadFrame outside of it."""
        if not 0 <= offset <= self.size_bytes - size_bytes or size_bytes < 0:
            raise BadFrame(f"{size_bytes} bytes at {offset} of a shared pool of {self.size_bytes}")
        return self._bytes[offset : offset + size_bytes].data

    def has_owner(self) -> bool:
        """False when the process that offered it is gone, or has closed it."""
        return _link(self.path) == self.name


Mapped = tuple[PoolMapping | None, kv.SharedPoolAnswer]


class PoolMappings:
    """What one receiver has mapped. One mapping serves all transfers from its pool."""

    def __init__(self, *, enabled: bool, idle_s: float) -> None:
        self._enabled = enabled
        self._idle_s = idle_s
        self._mapped: dict[tuple[int, int, bytes], PoolMapping] = {}
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self._mapped)

    def answer(self, offer: kv.SharedPool) -> Mapped:
        """The mapped pool, or the reason why the frames must carry their bytes. Never raises for what a peer says."""
        try:
            mapping = self._map(offer)
        except NotMapped as why_not:
            self._tell(str(why_not))
            return None, kv.SharedPoolAnswer(why_not=str(why_not))
        mapping.used_s = time.monotonic()
        return mapping, kv.SharedPoolAnswer(mapped=True)

    def forget_idle(self, now_s: float) -> None:
        """Lets go of pools whose owner is gone or that nobody opened for `idle_s`: mapped, they would keep their memory."""
        for key, mapping in tuple(self._mapped.items()):
            if now_s - mapping.used_s > self._idle_s or not mapping.has_owner():
                del self._mapped[key]

    def _map(self, offer: kv.SharedPool) -> PoolMapping:
        if not self._enabled:
            raise NotMapped("network.shared_memory is off at the receiver")
        here = host_identity()
        if not here or offer.host != here:
            raise NotMapped("the sender is on another host, in another pid namespace or of another user")
        if len(offer.key) != KEY_BYTES or not 0 < offer.pid < _MAX_ID or not 0 <= offer.fd < _MAX_ID:
            raise NotMapped("the offer is malformed")
        key = (offer.pid, offer.fd, offer.key)
        known = self._mapped.get(key)
        if known is not None and known.size_bytes == offer.size_bytes:
            return known
        mapping = _open(offer)
        while len(self._mapped) >= MAX_MAPPINGS:
            del self._mapped[min(self._mapped, key=lambda one: self._mapped[one].used_s)]
        self._mapped[key] = mapping
        logger.info("the KV pool of process %d is mapped: %d bytes", offer.pid, offer.size_bytes)
        return mapping

    def _tell(self, why_not: str) -> None:
        if why_not not in self._told and len(self._told) < MAX_MAPPINGS:
            self._told.add(why_not)
            logger.info("KV comes in frames, not through shared memory: %s", why_not)


def _open(offer: kv.SharedPool) -> PoolMapping:
    """Maps what is offered. Raises NotMapped unless it is a sealed file in memory of that key and size."""
    path, name = Path(f"/proc/{offer.pid}/fd/{offer.fd}"), f"/memfd:{segment_name(offer.key)} (deleted)"
    if not 0 < offer.size_bytes <= _MAX_POOL_BYTES:
        raise NotMapped(f"a pool of {offer.size_bytes} bytes")
    try:
        # A handle first: opening it for reading would already be an act, if it were a pipe or a device.
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            held = Path(f"/proc/self/fd/{handle}")
            if _link(held) != name:
                raise NotMapped(f"descriptor {offer.fd} of process {offer.pid} is not a pool of that key")
            fd = os.open(held, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(handle)
        try:
            _check(fd, offer.size_bytes)
            mapping = mmap.mmap(fd, offer.size_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, ValueError, OverflowError) as error:
        raise NotMapped(f"the pool of process {offer.pid} cannot be mapped: {error}") from error
    return PoolMapping(path, name, offer.size_bytes, time.monotonic(), np.frombuffer(mapping, dtype=np.uint8))


def _check(fd: int, size_bytes: int) -> None:
    found = os.fstat(fd)
    # Files with huge pages of their own lie on another device: reading those can fault.
    if not stat.S_ISREG(found.st_mode) or found.st_dev != _memory_device():
        raise NotMapped("what is offered is not a plain file in memory")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & NEEDED_SEALS != NEEDED_SEALS:
        raise NotMapped("the offered pool is not sealed: it could shrink")
    if found.st_size != size_bytes:
        raise NotMapped(f"the offered pool has {found.st_size} bytes, not {size_bytes}")


@cache
def _memory_device() -> int:
    """The device that all plain files in memory lie on."""
    fd = os.memfd_create("autan-kv-device", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
