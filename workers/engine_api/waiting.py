"""Waits for an engine on the thread that steps it, where nobody else gives it commands meanwhile."""

from __future__ import annotations

import threading

from workers.engine_api.protocol import Engine


class WorkWaiter:
    """Takes the engine's `on_wake` for itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._woken = threading.Event()
        engine.on_wake(self._woken.set)

    def wait(self) -> bool:
        """True as soon as a step would run something; False when only another call could change that."""
        while True:
            self._woken.clear()
            if self._engine.has_work():
                return True
            limit_s = self._engine.idle_limit_s()
            if limit_s is None:
                return False
            self._woken.wait(limit_s)
