"""The wall clock, for what people date: the expiry of keys, the day that a chat template may print, the doctor's offsets."""

from __future__ import annotations

import time
from datetime import datetime


def wall_clock_s() -> float:
    """Seconds since 1970, as the operating system believes."""
    return time.time()


def local_time() -> datetime:
    """Now, in the zone of this machine."""
    return datetime.now().astimezone()
