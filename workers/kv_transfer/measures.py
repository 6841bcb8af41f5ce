"""What one outgoing hand-off took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Measures:
    """Blocks and bytes that were sent, and when. `busy_s` is the time spent on it, waiting for credit included."""

    blocks: int = 0
    reused: int = 0
    bytes: int = 0
    busy_s: float = 0.0
    spans_s: list[tuple[float, float]] = field(default_factory=list)  # monotonic; of each block
    seen: set[int] = field(default_factory=set)

    def spent(self, started_s: float, ended_s: float) -> None:
        """A span of transfer time; spans do not overlap."""
        self.busy_s += ended_s - started_s
        self.spans_s.append((started_s, ended_s))

    def busy_before_s(self, moment_s: float) -> float:
        """The transfer time before a moment."""
        return sum(max(0.0, min(ended_s, moment_s) - started_s) for started_s, ended_s in self.spans_s)
