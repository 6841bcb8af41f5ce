"""Reading the ends of log files."""

from __future__ import annotations

import os
from pathlib import Path

_TAIL_BYTES = 65_536


def tail(path: Path, lines: int, since_byte: int = 0) -> str:
    """The last lines of a file from `since_byte` on, at most 64 KiB of it; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(since_byte, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
