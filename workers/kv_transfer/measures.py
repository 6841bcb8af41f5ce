"""What one outgoing hand-off took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Measures:
    """Blocks and bytes that were sent, and when. `busy_s` is the time spent on it, waiting for credit included; while
    several streams send, it passes once."""

    blocks: int = 0
    reused: int = 0
    bytes: int = 0
    busy_s: float = 0.0
    spans_s: list[tuple[float, float]] = field(default_factory=list)  # monotonic; in which at least one stream sent
    seen: set[int] = field(default_factory=set)
    _sending: int = 0
    _since_s: float = 0.0

    def spent(self, started_s: float, ended_s: float) -> None:
        """A span of transfer time; spans do not overlap."""
        self.busy_s += ended_s - started_s
        self.spans_s.append((started_s, ended_s))

    @contextmanager
    def busy(self, clock_s: Callable[[], float]) -> Iterator[None]:
        """A stream sends inside; spans of several streams that overlap are one."""
        if self._sending == 0:
            self._since_s = clock_s()
        self._sending += 1
        try:
            yield
        finally:
            self._sending -= 1
            if self._sending == 0:
                self.spent(self._since_s, clock_s())

    def sent(self, indexes: Iterable[int]) -> None:
        """Blocks that went out; one that goes out again counts once."""
        for index in indexes:
            if index not in self.seen:
                self.seen.add(index)
                self.blocks += 1

    def busy_before_s(self, moment_s: float) -> float:
        """The transfer time before a moment."""
        return sum(max(0.0, min(ended_s, moment_s) - started_s) for started_s, ended_s in self.spans_s)
