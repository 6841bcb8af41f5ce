"""Processes in tests: proof that one is gone, stopped or there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def process_state(pid: int) -> str:
    """The state letter of /proc/<pid>/stat; empty when the process is gone or only waits to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else state


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
    """Polls until the condition holds. Raises AssertionError naming `what` at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not in {timeout_s} s: {what}"
        time.sleep(0.01)
