"""How many threads torch has in tests: one, and two where it is about them.

Two processes run the tests, and threads that wait for one which has no core cost several times what they compute. The processes
that tests start have one as well, unless their configuration says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


def use_one_thread() -> None:
    """For this process and those that it starts; a number that the caller set is kept."""
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many within, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Kernels of our own share their work among threads: for what runs them."""
    with threads(2):
        yield
