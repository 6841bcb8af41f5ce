"""How far a worker is with loading its model, as a line of its log that its launcher reads."""

from __future__ import annotations

import re

_LINE = re.compile(r"loads the model: (\d{1,3}) %")


def loading_line(percent: int) -> str:
    """The line that says so."""
    return f"loads the model: {percent} %"


def loading_percent(log: str) -> int | None:
    """What the last such line of a log says; None without one."""
    found = _LINE.findall(log)
    return int(found[-1]) if found else None
