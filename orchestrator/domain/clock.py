"""Time as a dependency. Seconds on a clock that never goes back; only differences mean anything."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start; never smaller than before."""
        ...


class SystemClock:
    """The clock of this process."""

    def now_s(self) -> float:
        """The monotonic clock of the operating system."""
        return time.monotonic()


class ManualClock:
    """A clock that moves when it is told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """The time that was set."""
        return self._now_s

    def advance(self, seconds: float) -> float:
        """Moves the clock forward and returns the new time. Raises ValueError for a step back."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot go back by {-seconds} s")
        self._now_s += seconds
        return self._now_s
