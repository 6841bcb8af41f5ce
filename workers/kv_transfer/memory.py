"""How this process gets and keeps memory for messages.

A message of a hand-off is copied several times on its way through gRPC and Python, each time into a fresh piece of memory of
its size. By default the C library takes such pieces from the kernel one by one and gives them back at once, so that every page
is cleared and faulted in again for every message: about as much as the copying itself costs.
"""

from __future__ import annotations

import ctypes

# mallopt(3) of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_REUSED_BYTES = 32 * 1024 * 1024  # the most that glibc allows; larger pieces go back to the kernel as before
_KEPT_BYTES = 128 * 1024 * 1024  # of freed memory at the end of the heap
_GROWTH_BYTES = 16 * 1024 * 1024


def keep_freed_memory() -> bool:
    """From now on freed memory of messages is used again. False, and nothing changes, with a C library that is not glibc.

    The process keeps at most about as much as it ever had in use at once, pieces over 32 MiB apart.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_REUSED_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _GROWTH_BYTES))
    answers = [mallopt(name, value) for name, value in settings]
    return answers == [1] * len(settings)
