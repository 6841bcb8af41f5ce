"""Which host this process is on, as far as reaching another process's memory goes."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


@cache
def host_identity() -> str:
    """Equal in two processes if and only if they share a kernel, its pid namespace and a user; empty when that is unknown.

    Not a secret: it says who need not try, the operating system says who may.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}/{os.getuid()}"
    except OSError:
        return ""
