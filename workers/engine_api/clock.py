"""Time as engines see it, so that costs can be charged to a clock that a test moves by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock that can also let time pass. Seconds; the zero is arbitrary."""

    def now_s(self) -> float:
        """Never goes back."""
        ...

    def wait_s(self, duration_s: float) -> None:
        """Returns when `duration_s` have passed on this clock; at once when it is not positive."""
        ...


class SystemClock:
    """The machine's monotonic clock; waiting blocks the calling thread."""

    def now_s(self) -> float:
        return time.monotonic()

    def wait_s(self, duration_s: float) -> None:
        if duration_s > 0:
            time.sleep(duration_s)


class ManualClock:
    """Stands still until somebody waits on it or moves it."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def wait_s(self, duration_s: float) -> None:
        self._now_s += max(0.0, duration_s)
