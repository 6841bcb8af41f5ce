"""The end of incoming transfers without a commit: their blocks go back to the pool, exactly once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from protos.contract.errors import AutanError
from workers.kv_transfer.hooks import ReceiverHooks
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.transfer import Transfer, TransferTable

logger = logging.getLogger(__name__)


class ReceiverTasks:
    """What is under way inside a receiver and must be over before the process may go on without it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts work that nobody need await."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    async def settle(self) -> None:
        """Waits until everything is over."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()


class Returns:
    """Gives blocks back. The ledger's entry lives until the engine has dropped them."""

    def __init__(
        self, port: EnginePort, hooks: ReceiverHooks, ledger: Ledger, table: TransferTable, tasks: ReceiverTasks
    ) -> None:
        self._port = port
        self._hooks = hooks
        self._ledger = ledger
        self._table = table
        self._tasks = tasks
        self._returning: dict[str, asyncio.Task[None]] = {}

    async def abort(self, transfer: Transfer, error: AutanError) -> None:
        """As `give_back`, and waits until the blocks are back."""
        self.give_back(transfer, error)
        await self.over(transfer.request_id)

    async def over(self, request_id: str) -> None:
        """Waits until no blocks of the request are on their way back."""
        returning = self._returning.get(request_id)
        if returning is not None:
            await asyncio.shield(returning)

    def give_back(self, transfer: Transfer, error: AutanError) -> None:
        """Ends a transfer, whatever its stage; its streams are refused with `error`. Idempotent; of a committed one it is
        only forgotten."""
        self._table.remove(transfer)
        if transfer.lifecycle.ended:
            return
        transfer.lifecycle.move(ReceiveState.ABORTED)
        transfer.pool = None  # errors that refer to the transfer would keep the mapping
        transfer.ended_by = error
        transfer.wake()
        self._returning[transfer.request_id] = self._tasks.spawn(self._returned(transfer, self._drop(transfer)))
        self._hooks.ended(transfer.request_id, transfer.epoch, error)

    def _drop(self, transfer: Transfer) -> asyncio.Future[Any]:
        """Has the engine forget what was reserved."""
        request_id, epoch, decodes = transfer.request_id, transfer.epoch, transfer.in_engine
        return self._port.call(
            lambda engine: engine.import_abort(request_id, epoch) or (decodes and engine.abort(request_id, epoch))
        )

    async def _returned(self, transfer: Transfer, dropped: asyncio.Future[Any]) -> None:
        try:
            await dropped
        except AutanError:
            logger.warning("the engine was gone when %s was given back", transfer.request_id)
        finally:
            self._ledger.release(transfer.key)
            if self._returning.get(transfer.request_id) is asyncio.current_task():
                del self._returning[transfer.request_id]
