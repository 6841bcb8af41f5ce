"""What an ingress counts. Read through Admin.Status; reset only by a restart."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Final

BOUNDS_MS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000, 600_000)


class Histogram:
    """Durations in buckets with upper bounds BOUNDS_MS; the last bucket takes the rest."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_MS) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Counts `times` durations of that length."""
        self._counts[bisect_left(BOUNDS_MS, seconds * 1000)] += times
        self._sum_s += seconds * times

    @property
    def count(self) -> int:
        """Number of durations."""
        return sum(self._counts)

    def quantile_ms(self, share: float) -> int:
        """Upper bound of the bucket that holds the quantile; 0 without durations."""
        wanted, seen = share * self.count, 0
        for count, bound_ms in zip(self._counts, (*BOUNDS_MS, BOUNDS_MS[-1]), strict=True):
            seen += count
            if count and seen >= wanted:
                return bound_ms
        return 0

    def snapshot(self, name: str) -> dict[str, int]:
        """Count, sum and quantiles under names that start with `name`."""
        return {
            f"{name}_count": self.count,
            f"{name}_sum_ms": round(self._sum_s * 1000),
            f"{name}_p50_ms": self.quantile_ms(0.5),
            f"{name}_p99_ms": self.quantile_ms(0.99),
        }


class Metrics:
    """Counters by name, and the two latencies that clients feel."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.ttft = Histogram()  # submit -> first token accepted
        self.itl = Histogram()  # between tokens as accepted

    def count(self, name: str, times: int = 1) -> None:
        """Adds to a counter."""
        self._counts[name] += times

    def value(self, name: str) -> int:
        """A counter's value; 0 before its first count."""
        return self._counts[name]

    def snapshot(self) -> dict[str, int]:
        """Everything, by name."""
        return {**self._counts, **self.ttft.snapshot("ttft"), **self.itl.snapshot("itl")}
