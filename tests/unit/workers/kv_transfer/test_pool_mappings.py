"""Pools in sealed files: what an honest peer offers is mapped, everything else is refused with a reason, nothing is left."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from protos.contract.errors import BadFrame
from protos.wire import kv
from workers.engine_api.pool_memory import PoolMemory, segment_name
from workers.kv_transfer.pool_mappings import MAX_MAPPINGS, PoolMappings, offer_of

SIZE = 1 << 20
OTHER_PROCESS = """
import sys
from workers.engine_api.pool_memory import PoolMemory
from workers.kv_transfer.pool_mappings import offer_of
memory = PoolMemory(shared=True)
memory.allocate(1 << 20)[:] = 7
print(offer_of(memory.segment).SerializeToString().hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memory() -> Iterator[PoolMemory]:
    one = PoolMemory(shared=True)
    yield one
    one.close()


@pytest.fixture
def offer(memory: PoolMemory) -> kv.SharedPool:
    memory.allocate(SIZE)[:] = 7
    found = offer_of(memory.segment)
    assert found is not None
    return found


def mappings(*, enabled: bool = True, idle_s: float = 10.0) -> PoolMappings:
    return PoolMappings(enabled=enabled, idle_s=idle_s)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_pool_is_zeros_that_cost_nothing_until_they_are_written(memory: PoolMemory) -> None:
    pool = memory.allocate(64 * SIZE)
    assert memory.segment is not None and os.fstat(memory.segment.fd).st_blocks == 0
    assert not pool[::4096].any()
    pool[5] = 9
    assert pool[5] == 9 and os.pread(memory.segment.fd, 1, 5) == b"\x09"


def test_nobody_can_cut_the_pool_or_map_it_for_writing(memory: PoolMemory) -> None:
    memory.allocate(SIZE)
    assert memory.segment is not None
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.segment.fd, size)
    other = os.open(f"/proc/self/fd/{memory.segment.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(other, SIZE)
        with pytest.raises(PermissionError):
            os.write(other, b"x")
        with pytest.raises(PermissionError):
            fcntl.fcntl(other, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(other)


def test_bytes_of_the_pool_have_an_offset_and_others_have_none(memory: PoolMemory) -> None:
    pool = memory.allocate(SIZE)
    segment = memory.segment
    assert segment is not None
    for start, stop in ((0, 1), (17, 400), (SIZE - 5, SIZE), (0, SIZE)):
        assert segment.offset_of(pool[start:stop].data.toreadonly()) == start
    for other in (memoryview(b"abc"), np.zeros(2 * SIZE, dtype=np.uint8).data, pool[:0].data):
        assert segment.offset_of(other) is None


def test_plain_memory_is_never_offered() -> None:
    memory = PoolMemory()
    assert not memory.allocate(SIZE).any()
    assert memory.segment is None and offer_of(memory.segment) is None
    memory.close()


def test_an_offered_pool_is_read_in_place(memory: PoolMemory, offer: kv.SharedPool) -> None:
    table = mappings()
    mapping, answer = table.answer(offer)
    assert mapping is not None and answer.mapped and not answer.why_not
    view = mapping.view(100, 50)
    assert view.readonly and bytes(view) == b"\x07" * 50
    again, _ = table.answer(offer)
    assert again is mapping and len(table) == 1
    for offset, size in ((SIZE, 1), (SIZE - 3, 4), (2**64 - 1, 2**32 - 1), (-1, 4), (0, SIZE + 1), (8, -4)):
        with pytest.raises(BadFrame, match="shared pool"):
            mapping.view(offset, size)


def _pipe(offer: kv.SharedPool) -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def _file(offer: kv.SharedPool) -> int:
    return os.open(__file__, os.O_RDONLY)


def _unsealed(offer: kv.SharedPool) -> int:
    fd = os.memfd_create(segment_name(offer.key), os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    return fd


def _only_grow_sealed(offer: kv.SharedPool) -> int:
    fd = _unsealed(offer)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return fd


def _other_pool(offer: kv.SharedPool) -> int:
    fd = os.memfd_create(segment_name(b"\0" * 16), os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize("forge", [_pipe, _file, _unsealed, _only_grow_sealed, _other_pool])
def test_a_descriptor_that_is_not_a_sealed_pool_of_that_key_is_refused(
    offer: kv.SharedPool, forge: Callable[[kv.SharedPool], int]
) -> None:
    offer.fd = forge(offer)
    try:
        before = descriptors()
        mapping, answer = mappings().answer(offer)
        assert mapping is None and not answer.mapped and answer.why_not
        assert descriptors() == before
    finally:
        os.close(offer.fd)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "elsewhere"}, "another host"),
        ({"host": ""}, "another host"),
        ({"key": b""}, "malformed"),
        ({"key": b"k" * 16}, "not a pool of that key"),
        ({"pid": 0}, "malformed"),
        ({"pid": 2**32 - 1}, "malformed"),
        ({"pid": 2**31 - 1}, "cannot be mapped"),
        ({"fd": 2**31 - 1}, "cannot be mapped"),
        ({"size_bytes": 0}, "0 bytes"),
        ({"size_bytes": 2**64 - 1}, "bytes"),
        ({"size_bytes": SIZE - 1}, "not"),
        ({"size_bytes": 1 << 43}, "not"),
    ],
)
def test_a_false_offer_is_refused(offer: kv.SharedPool, changes: dict[str, object], words: str) -> None:
    for name, value in changes.items():
        setattr(offer, name, value)
    before = descriptors()
    mapping, answer = mappings().answer(offer)
    assert mapping is None and words in answer.why_not
    assert descriptors() == before


def test_a_receiver_that_shall_not_share_says_so(offer: kv.SharedPool) -> None:
    mapping, answer = mappings(enabled=False).answer(offer)
    assert mapping is None and "network.shared_memory" in answer.why_not


def test_mappings_are_bounded_and_forgotten_when_idle_or_closed(offer: kv.SharedPool, memory: PoolMemory) -> None:
    table = mappings()
    others = [PoolMemory(shared=True) for _ in range(MAX_MAPPINGS + 3)]
    try:
        for other in others:
            other.allocate(4096)
            found = offer_of(other.segment)
            assert found is not None and table.answer(found)[1].mapped
        assert len(table) == MAX_MAPPINGS
        table.forget_idle(time.monotonic())
        assert len(table) == MAX_MAPPINGS
        others[-1].close()
        table.forget_idle(time.monotonic())
        assert len(table) == MAX_MAPPINGS - 1, "its owner closed it"
        table.forget_idle(time.monotonic() + 11)
        assert len(table) == 0
    finally:
        for other in others:
            other.close()


def test_a_killed_owner_leaves_no_segment_and_no_fault() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[4]
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        offer = kv.SharedPool.FromString(bytes.fromhex(child.stdout.readline().decode()))
        table = mappings()
        mapping, answer = table.answer(offer)
        assert mapping is not None, answer.why_not
        assert mapping.has_owner()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert bytes(mapping.view(SIZE - 100, 100)) == b"\x07" * 100, "what is mapped stays readable"
        assert not mapping.has_owner() and segment_name(offer.key) in Path("/proc/self/maps").read_text()
        table.forget_idle(time.monotonic())
        del mapping
        assert len(table) == 0 and segment_name(offer.key) not in Path("/proc/self/maps").read_text()
        assert table.answer(offer)[0] is None
    finally:
        child.kill()
        child.stdin.close()
        child.stdout.close()
        child.wait()
