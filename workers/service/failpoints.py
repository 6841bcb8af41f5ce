"""Places where a test can end, stop, delay or hold a worker. Production specs name none, and every pass costs one look-up.

A failpoint is `point` or `point#n`, its action one of

    kill           SIGKILL of this process            in the instance's first incarnation only
    kill:always    SIGKILL of this process            in every incarnation: a crash loop
    stop           SIGSTOP of this process            in the instance's first incarnation only
    sleep:SECONDS  blocks the thread that passes      (event loop or engine: a hang)
    hold:SECONDS   holds this activity only           (on the engine's thread the same as sleep)

Without `#n` it fires at every pass. `#n` means the n-th pass, counted from 1; at points that have an index, such as
`decode.token#5`, it means every pass with that index.

    prefill.before_first_chunk   a picked request, before the engine hears of it
    prefill.chunk                engine thread, after a step, for each prompt that it advanced
    handoff.before_open          sender, before each Open
    handoff.mid_push             sender, before each layer group of each block
    handoff.before_end           sender, everything sent but the end frame
    handoff.after_commit         sender, after the commit, before the blocks are given back
    import.before_commit         receiver, everything verified, before the engine and Redis hear of it
    import.in_engine             receiver, the engine decodes, before Redis is asked whether it may
    lend.before_open, lend.mid_push, lend.before_end, fetch.before_commit, fetch.in_engine
                                 the same five of cached blocks that go from worker to worker
    decode.token                 engine thread, after a step, for each token that is no hand-off's first; index: output index
    emit.before_send             before a batch of tokens goes to an ingress
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping

from protos.contract.errors import ConfigError

POINTS = frozenset(
    {
        "prefill.before_first_chunk",
        "prefill.chunk",
        "handoff.before_open",
        "handoff.mid_push",
        "handoff.before_end",
        "handoff.after_commit",
        "import.before_commit",
        "import.in_engine",
        "lend.before_open",
        "lend.mid_push",
        "lend.before_end",
        "fetch.before_commit",
        "fetch.in_engine",
        "decode.token",
        "emit.before_send",
    }
)
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Failpoints:
    """The armed failpoints of one process. Thread-safe."""

    def __init__(self, spec: Mapping[str, str]) -> None:
        """Raises ConfigError for an unknown point or action."""
        self._actions: dict[tuple[str, int], tuple[str, float]] = {}
        for name, action in spec.items():
            point, _, nth = name.partition("#")
            if point not in POINTS or (nth and not nth.isdecimal()):
                raise ConfigError(f"failpoints: unknown point {name!r}")
            self._actions[point, int(nth or -1)] = _parse(action)
        self._passes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._incarnation = 1

    def now_incarnation(self, incarnation: int) -> None:
        """`kill` and `stop` fire in incarnation 1 only."""
        self._incarnation = incarnation

    async def reach(self, point: str, index: int | None = None) -> None:
        """Passes a point on the event loop."""
        found = self._find(point, index)
        if found is None:
            return
        kind, seconds = found
        if kind == "hold":
            await asyncio.sleep(seconds)
        else:
            self._act(kind, seconds)

    def reach_blocking(self, point: str, index: int | None = None) -> None:
        """Passes a point on the engine's thread."""
        found = self._find(point, index)
        if found is not None:
            self._act(*found)

    def _find(self, point: str, index: int | None) -> tuple[str, float] | None:
        if not self._actions:
            return None
        with self._lock:
            self._passes[point] += 1
            nth = self._passes[point] if index is None else index
        return self._actions.get((point, nth)) or self._actions.get((point, -1))

    def _act(self, kind: str, seconds: float) -> None:
        if kind in ("sleep", "hold"):
            time.sleep(seconds)
        elif kind == "kill:always" or self._incarnation == 1:
            os.kill(os.getpid(), _SIGNALS[kind.partition(":")[0]])


def _parse(action: str) -> tuple[str, float]:
    if action in ("kill", "kill:always", "stop"):
        return action, 0.0
    kind, _, seconds = action.partition(":")
    try:
        value = float(seconds)
    except ValueError:
        value = -1.0
    if kind not in ("sleep", "hold") or not 0 <= value <= 3600:
        raise ConfigError(f"failpoints: unknown action {action!r}")
    return kind, value
