"""The wall clock, which only operators are told of: no decision of a worker depends on it."""

from __future__ import annotations

import time


def wall_clock_s() -> float:
    """Seconds since 1970, as the operating system believes."""
    return time.time()
