"""Copies between a device's pool and the host, on a CPU: what goes in comes out, and no buffer is shared by accident."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import torch

from workers.engines.torch.device_copies import DeviceCopies

CPU = torch.device("cpu")


def test_random_runs_go_in_and_come_out() -> None:
    rng = random.Random(4)
    copies, pool, twin = DeviceCopies(CPU, 300), torch.zeros(4096, dtype=torch.uint8), bytearray(4096)
    for _ in range(200):
        start, size = rng.randrange(3796), rng.randint(1, 300)
        data = bytearray(rng.randbytes(size))
        copies.write(pool[start : start + size], memoryview(data))
        twin[start : start + size] = data
        data[:] = bytes(size)  # the caller may use its buffer again at once
        at, length = rng.randrange(3796), rng.randint(1, 300)
        assert bytes(copies.read(pool[at : at + length])) == twin[at : at + length]
    assert bytes(pool.numpy().data) == twin


def test_what_was_read_is_a_copy() -> None:
    copies, pool = DeviceCopies(CPU, 8), torch.arange(8, dtype=torch.uint8)
    first = copies.read(pool)
    pool.fill_(9)
    second = copies.read(pool)
    assert first.readonly and bytes(first) == bytes(range(8)) and bytes(second) == b"\x09" * 8


def test_writers_on_several_threads_do_not_mix() -> None:
    copies, pool = DeviceCopies(CPU, 4096), torch.zeros(64 * 4096, dtype=torch.uint8)

    def write(number: int) -> None:
        copies.write(pool[number * 4096 : (number + 1) * 4096], memoryview(bytes([number]) * 4096))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(64)))
    assert bytes(pool.numpy().data) == b"".join(bytes([number]) * 4096 for number in range(64))
