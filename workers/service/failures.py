"""Tells Redis which requests this worker gives up, and why."""

from __future__ import annotations

import logging

from protos.contract.errors import AutanError, FenceError, UnavailableError
from workers.service.membership import Membership
from workers.service.retrying import while_store_is_away
from workers.service.store import WorkerStore
from workers.service.task_set import TaskSet

logger = logging.getLogger(__name__)


class Failures:
    """Reports in the background. When Redis stays away for longer than a lease, the lapse of the lease says the same."""

    def __init__(self, *, me: Membership, store: WorkerStore, max_attempts: int, retain_s: float, patience_s: float) -> None:
        self._me = me
        self._store = store
        self._max_attempts = max_attempts
        self._retain_s = retain_s
        self._patience_s = patience_s
        self._tasks = TaskSet()

    def report(self, request_id: str, epoch: int, error: AutanError, *, poison: bool = False, retryable: bool = True) -> None:
        """Gives the request up in Redis at this epoch; a stale epoch means that nobody needs to know."""
        self._tasks.spawn(self._report(request_id, epoch, error, poison, retryable))

    async def close(self) -> None:
        """Ends what is under way."""
        await self._tasks.cancel()

    async def _report(self, request_id: str, epoch: int, error: AutanError, poison: bool, retryable: bool) -> None:
        me = self._me

        async def ask() -> str:
            return await self._store.fail(
                request_id,
                epoch,
                me.instance_id,
                me.number,
                error=error,
                retryable=retryable,
                poison=poison,
                max_attempts=self._max_attempts,
                retain_s=self._retain_s,
            )

        try:
            state = await while_store_is_away(ask, self._patience_s)
            logger.info("%s at epoch %d is %s now", request_id, epoch, state)
        except FenceError:
            logger.info("%s at epoch %d was over already", request_id, epoch)
        except UnavailableError:
            logger.warning("%s at epoch %d could not be given up: its lease will lapse", request_id, epoch)
