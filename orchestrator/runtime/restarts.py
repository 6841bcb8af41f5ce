"""When a process that died is started again: exponential back-off with jitter, and a circuit breaker."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartRules:
    """Times in seconds."""

    first_s: float = 0.2
    last_s: float = 10.0
    calm_s: float = 30.0  # a process that lived for this long starts with a clean record
    window_s: float = 60.0
    deaths: int = 6  # within the window: the breaker opens
    cool_down_s: float = 30.0  # then one try each


class RestartRecord:
    """The deaths of one process. A pure account: it neither waits nor starts."""

    def __init__(self, rules: RestartRules) -> None:
        self._rules = rules
        self._deaths: deque[float] = deque()
        self._in_a_row = 0
        self.total = 0
        self.is_open = False

    def died(self, now_s: float, lived_s: float, jitter: float) -> float:
        """Notes a death and returns the seconds to wait before the next start. `jitter` is uniform in [0, 1).

        The wait is between half of the back-off and all of it; with the breaker open it is the cool-down.
        """
        rules = self._rules
        if lived_s >= rules.calm_s:
            self._in_a_row = 0
            self._deaths.clear()
            self.is_open = False
        self.total += 1
        self._deaths.append(now_s)
        while self._deaths[0] < now_s - rules.window_s:
            self._deaths.popleft()
        if len(self._deaths) >= rules.deaths:
            self.is_open = True
        if self.is_open:
            return rules.cool_down_s * (1 + jitter) / 2 + rules.cool_down_s / 2
        backoff_s = min(rules.last_s, rules.first_s * 2.0 ** min(self._in_a_row, 32))
        self._in_a_row += 1
        return backoff_s * (1 + jitter) / 2
