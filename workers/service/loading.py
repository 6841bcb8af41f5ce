"""Tells how far loading is: as a number for whoever asks, and as log lines, at most one a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from protos.contract.loading import loading_line

logger = logging.getLogger(__name__)

_EVERY_S = 1.0

LoadWatch = Callable[[str, int, int], None]


class Loading:
    """Called by the engine's thread as (what, done, total)."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.percent: int | None = None  # None before the first call
        self._clock_s = clock_s
        self._said_s = clock_s()

    def __call__(self, what: str, done: int, total: int) -> None:
        """So much is done of this."""
        percent = 100 * done // max(total, 1)
        if percent == self.percent:
            return
        self.percent = percent
        now_s = self._clock_s()
        if percent == 100 or now_s - self._said_s >= _EVERY_S:
            self._said_s = now_s
            logger.info(loading_line(percent))
