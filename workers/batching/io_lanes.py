"""Threads that do the blocking work of tiers. The engine's thread never waits for them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 2.0


class Lane(IntEnum):
    """Reading for a prompt that waits never queues behind writing for later."""

    FETCH = 0
    STORE = 1


class Job(Protocol):
    """Something to do on an io thread. `run` keeps its outcome, errors of the system included, in the job."""

    def run(self) -> None: ...


class Lanes(Protocol):
    """Where jobs go, and come back from when they are done. `submit` and `done` are called by one thread."""

    def submit(self, lane: Lane, job: Job) -> None: ...

    def done(self) -> list[Job]: ...

    def on_wake(self, wake: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


class ThreadLanes:
    """One thread for each lane, started with the first job. The bounds of the queues are their users': see CacheTiers."""

    def __init__(self) -> None:
        self._queues: tuple[queue.SimpleQueue[Job | None], ...] = tuple(queue.SimpleQueue() for _ in Lane)
        self._threads: list[threading.Thread | None] = [None] * len(Lane)
        self._done: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None
        self._closed = False

    def submit(self, lane: Lane, job: Job) -> None:
        self._queues[lane].put(job)
        if self._threads[lane] is None:
            thread = threading.Thread(target=self._run, args=(self._queues[lane],), name=f"autan-{lane.name}", daemon=True)
            self._threads[lane] = thread
            thread.start()

    def done(self) -> list[Job]:
        """Jobs that ended since the last call, in the order in which they ended."""
        jobs: list[Job] = []
        while not self._done.empty():
            jobs.append(self._done.get())
        return jobs

    def on_wake(self, wake: Callable[[], None]) -> None:
        """`wake` is called on an io thread whenever a job is done."""
        self._wake = wake

    def close(self) -> None:
        """Ends both threads after the job in hand; a job that hangs is left behind. Idempotent."""
        self._closed = True
        for jobs in self._queues:
            jobs.put(None)
        for thread in self._threads:
            if thread is not None:
                thread.join(_CLOSE_TIMEOUT_S)

    def _run(self, jobs: queue.SimpleQueue[Job | None]) -> None:
        while (job := jobs.get()) is not None and not self._closed:
            try:
                job.run()
            except Exception:
                logger.exception("a job of a cache tier failed")
            self._done.put(job)
            self._wake()
