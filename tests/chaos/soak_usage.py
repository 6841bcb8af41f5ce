"""Memory and descriptors of the processes of a soak: bounds at any time, and slopes that tell a leak from noise.

A process that serves requests for long may not grow with them. The slope is that of the floors: the lowest value of each
short window, which garbage and bursts do not raise, and the median over all pairs of them (Theil-Sen), which a jump does not
move. It is held against the requests that were served, so that the bound means the same on a slow machine.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orchestrator.cli.local_cluster import LocalCluster

MAX_ORCHESTRATOR_GROWTH_MB = 120.0
MAX_WORKER_MB = 400.0
MAX_MORE_FDS = 64  # the pool of connections to Redis may take 32 of them
MAX_WORKER_FDS = 96
MAX_BYTES_PER_REQUEST = 512.0  # half of what a leak of 1 KiB for each request would show
MAX_FDS_PER_MINUTE = 1.0
WARM_UP_S = 210.0  # longer than ended requests are kept
WINDOW_S = 10.0
LEAST_WINDOWS = 12
ORCHESTRATOR, STORE = "orchestrator", "store"

Points = Sequence[tuple[float, float]]


def theil_sen(points: Points) -> float:
    """The median of the slopes between all pairs of points. Raises ValueError for fewer than two different times."""
    times, values = (np.array(column) for column in zip(*points, strict=True)) if points else (np.array([]), np.array([]))
    first, second = np.triu_indices(len(times), 1)
    apart = times[second] != times[first]
    if not apart.any():
        raise ValueError(f"{len(points)} points: a slope needs two times")
    first, second = first[apart], second[apart]
    return float(np.median((values[second] - values[first]) / (times[second] - times[first])))


def floors(points: Points, window_s: float) -> list[tuple[float, float]]:
    """The lowest value of each window, at the middle of the window."""
    lowest: dict[int, float] = {}
    for at_s, value in points:
        window = int(at_s // window_s)
        lowest[window] = min(value, lowest.get(window, value))
    return [((window + 0.5) * window_s, value) for window, value in sorted(lowest.items())]


@dataclass(slots=True)
class Series:
    """What one process used over time; of the store over all its processes, since each of them reads the same data."""

    name: str
    memory_mb: list[tuple[float, float]] = field(default_factory=list)
    descriptors: list[tuple[float, float]] = field(default_factory=list)

    def add(self, at_s: float, used: tuple[float, int]) -> None:
        """One look."""
        self.memory_mb.append((at_s, used[0]))
        self.descriptors.append((at_s, float(used[1])))


@dataclass(frozen=True, slots=True)
class Slope:
    """How one process grew after its warm-up."""

    name: str
    seconds: float
    mb_per_minute: float
    bytes_per_request: float
    fds_per_minute: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.mb_per_minute:+.3f} MB/min ({self.bytes_per_request:+.0f} B a request), "
            f"{self.fds_per_minute:+.2f} fds/min over {self.seconds:.0f} s"
        )

    @property
    def is_flat(self) -> bool:
        """True for a process that does not grow with what it serves. Shrinking is no leak."""
        return self.bytes_per_request <= MAX_BYTES_PER_REQUEST and self.fds_per_minute <= MAX_FDS_PER_MINUTE


def slope_of(series: Series, requests_per_s: float, warm_up_s: float = WARM_UP_S) -> Slope | None:
    """None for a process that did not live long enough after its warm-up to tell."""
    if not series.memory_mb:
        return None
    after_s = series.memory_mb[0][0] + warm_up_s
    memory = floors([one for one in series.memory_mb if one[0] >= after_s], WINDOW_S)
    descriptors = floors([one for one in series.descriptors if one[0] >= after_s], WINDOW_S)
    if len(memory) < LEAST_WINDOWS:
        return None
    mb_per_s = theil_sen(memory)
    return Slope(
        name=series.name,
        seconds=memory[-1][0] - memory[0][0],
        mb_per_minute=60 * mb_per_s,
        bytes_per_request=1e6 * mb_per_s / max(requests_per_s, 1e-9),
        fds_per_minute=60 * theil_sen(descriptors),
    )


class Usage:
    """Memory and descriptors of the orchestrator (this process), of the workers and of the store.

    `served` counts the requests so far. A worker is a new series with every process of it.
    """

    def __init__(self, cluster: LocalCluster, served: Callable[[], int], workers_of_a_role: int) -> None:
        self._cluster = cluster
        self._served = served
        self._share = workers_of_a_role
        self._started_s = time.monotonic()
        self._first = process_usage(os.getpid())
        self._last = self._first
        self._worst_worker_mb, self._worst_worker_fds = 0.0, 0
        self._told_kinds: dict[str, int] = {}
        self._series: dict[tuple[str, int], Series] = {}

    async def watch(self) -> None:
        """Looks every second until it is cancelled."""
        while True:
            await asyncio.sleep(1.0)
            await self._look()

    def slopes(self) -> list[Slope]:
        """Of every process that lived long enough; workers share the requests of their role."""
        seconds = time.monotonic() - self._started_s
        rate = self._served() / seconds
        central = (ORCHESTRATOR, STORE)
        found = (slope_of(one, rate if one.name in central else rate / self._share) for one in self._series.values())
        return [one for one in found if one is not None]

    async def check(self) -> None:
        """Raises AssertionError for growth beyond the bounds."""
        await self._look()
        mb, fds = self._last
        assert mb - self._first[0] <= MAX_ORCHESTRATOR_GROWTH_MB, f"from {self._first[0]:.0f} to {mb:.0f} MB"
        assert fds - self._first[1] <= MAX_MORE_FDS, f"from {self._first[1]} to {fds} descriptors: {self._told_kinds}"
        assert self._worst_worker_mb <= MAX_WORKER_MB, f"a worker had {self._worst_worker_mb:.0f} MB"
        assert self._worst_worker_fds <= MAX_WORKER_FDS, f"a worker had {self._worst_worker_fds} descriptors"
        assert [str(one) for one in self.slopes() if not one.is_flat] == []

    def check_lengths(self, *names: str) -> None:
        """Raises AssertionError unless a slope was found for each of these processes: nothing passes for want of data."""
        found = {one.name for one in self.slopes()}
        assert found >= set(names), f"slopes of {sorted(found)} only; wanted {sorted(names)}"

    def told(self) -> dict[str, object]:
        """For the report."""
        (mb, fds), (first_mb, first_fds) = self._last, self._first
        return {
            "orchestrator": f"{first_mb:.0f} to {mb:.0f} MB, {first_fds} to {fds} fds {self._told_kinds}",
            "workers": f"up to {self._worst_worker_mb:.0f} MB, {self._worst_worker_fds} fds",
            "slopes": [str(one) for one in self.slopes()],
        }

    async def _look(self) -> None:
        self._last = self._note(ORCHESTRATOR, os.getpid(), 0) or self._last
        self._told_kinds = descriptor_kinds(os.getpid())
        store = self._cluster.embedded
        if store is not None and store.server_pid:
            self._note(STORE, store.server_pid, 0)
        for name, ranks in (await self._cluster.launcher.alive()).items():
            for rank in ranks:
                used = self._note(name, rank.pid, rank.pid)
                if used is not None:
                    self._worst_worker_mb = max(self._worst_worker_mb, used[0])
                    self._worst_worker_fds = max(self._worst_worker_fds, used[1])

    def _note(self, name: str, pid: int, series: int) -> tuple[float, int] | None:
        try:
            used = process_usage(pid)
        except OSError:
            return None  # it has just ended
        self._series.setdefault((name, series), Series(name)).add(time.monotonic() - self._started_s, used)
        return used


def descriptor_kinds(pid: int) -> dict[str, int]:
    """Open descriptors by kind; sockets by their family and state."""
    names = {}
    for table in ("tcp", "tcp6", "unix"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii", errors="replace").splitlines()[1:]:
            fields = line.split()
            names[fields[6] if table == "unix" else fields[9]] = f"{table}:{fields[5] if table == 'unix' else fields[3]}"
    found: Counter[str] = Counter()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(one.readlink())
        except OSError:
            continue
        found[names.get(target[8:-1], "socket:?") if target.startswith("socket:[") else target.split(":", maxsplit=1)[0]] += 1
    return dict(found)


def process_usage(pid: int) -> tuple[float, int]:
    """Resident MB and open descriptors. Raises OSError when the process is gone."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(list(Path(f"/proc/{pid}/fd").iterdir()))
