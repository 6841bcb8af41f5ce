"""Clients that leave: a request that nobody listens to is cancelled, unless it was promised to run alone.

A Generate stream that breaks off leaves its request without a listener. It gets a short time in which a client may come back
by Resume (a connection that broke looks like a client that left); then it is cancelled in every stage. A client that came
by Resume knows the id and can come again, so from then on the request runs alone; and so do requests that were adopted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from orchestrator.ingress.live import LiveStream, StreamTable
from orchestrator.ingress.metrics import Metrics
from orchestrator.ingress.streams import StreamState
from orchestrator.ingress.tasks import end_tasks
from orchestrator.store.client import Store
from protos.contract.errors import AutanError, Cancelled
from protos.contract.redis_names import Code

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 2.0
_MAX_TRIES = 100


class Departures:
    """Owns the tasks that outlive a client's call. `close` when the server stops: its clients did not leave."""

    def __init__(self, store: Store, table: StreamTable, metrics: Metrics, linger_s: float) -> None:
        self._store = store
        self._table = table
        self._metrics = metrics
        self._linger_s = linger_s
        self._tasks: set[asyncio.Task[object]] = set()
        self._closed = False

    def left(self, live: LiveStream) -> None:
        """A client's Generate stream ended before its request did."""
        if not self._closed and _is_left_alone(live):
            self._start(self._cancel_if_alone(live))

    def cancel_later(self, request_id: str, tenant: str, reason: str) -> None:
        """Cancels as soon as the store answers. Gives up after some minutes: the request's deadline ends it then."""
        if not self._closed:
            self._start(self._cancel(request_id, tenant, reason))

    async def close(self) -> None:
        """From now on nobody leaves. Idempotent."""
        self._closed = True
        await end_tasks(list(self._tasks))

    def _start(self, work: Coroutine[None, None, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel_if_alone(self, live: LiveStream) -> None:
        await asyncio.sleep(self._linger_s)
        if not _is_left_alone(live):
            return
        self._metrics.count("clients_left")
        if await self._cancel(live.request_id, live.spec.tenant, "client left"):
            self._table.end(live, Cancelled(f"request {live.request_id} was cancelled (client left)"))

    async def _cancel(self, request_id: str, tenant: str, reason: str) -> bool:
        """True when this call ended it; an end that it had before is found by the watch."""
        backoff_s = _FIRST_BACKOFF_S
        for _ in range(_MAX_TRIES):
            try:
                reply = await self._store.cancel(request_id, tenant, reason)
                return reply.code is Code.OK
            except AutanError as error:
                logger.info("request %s cannot be cancelled yet: %s", request_id, error)
            await asyncio.sleep(backoff_s)
            backoff_s = min(_LAST_BACKOFF_S, backoff_s * 2)
        return False


def _is_left_alone(live: LiveStream) -> bool:
    # A stream whose last token is here only waits for Redis; there is nothing left to cancel.
    return live.stream.state is StreamState.OPEN and not live.listeners and not live.runs_alone
