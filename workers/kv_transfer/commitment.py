"""How an incoming transfer becomes a sequence that decodes here: the engine begins, Redis agrees."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from protos.contract.errors import AutanError, BadFrame, InternalError
from protos.wire import kv
from workers.kv_transfer.authority import Authority
from workers.kv_transfer.claims import Addressee, check_end
from workers.kv_transfer.hooks import ReceiverHooks
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.returns import ReceiverTasks, Returns
from workers.kv_transfer.transfer import Transfer

logger = logging.getLogger(__name__)


class Commitments:
    """Commits transfers; one that cannot be committed is given back."""

    def __init__(
        self,
        *,
        port: EnginePort,
        hooks: ReceiverHooks,
        ledger: Ledger,
        authority: Authority,
        reach: Callable[[str], Awaitable[None]],
        returns: Returns,
        tasks: ReceiverTasks,
    ) -> None:
        self._port = port
        self._hooks = hooks
        self._ledger = ledger
        self._authority = authority
        self._reach = reach
        self._returns = returns
        self._tasks = tasks

    async def end(self, transfer: Transfer, end: kv.EndFrame) -> kv.Commit:
        """Takes the end frame. Told again of a transfer that commits or has committed, it gives the same commit."""
        if transfer.committing is None:
            here = self._hooks.here()
            tokens = self._check(transfer, end, here)
            num_blocks = -(-end.num_tokens // here.layout.block_tokens)
            if not transfer.reassembly.is_whole(num_blocks):
                verified = transfer.reassembly.verified_blocks
                raise BadFrame(f"{transfer.request_id}: ended with {verified} of {num_blocks} blocks")
            transfer.lifecycle.move(ReceiveState.VERIFYING)
            transfer.committing = self._tasks.spawn(self._commit(transfer, end, tokens))
        return await asyncio.shield(transfer.committing)

    def _check(self, transfer: Transfer, end: kv.EndFrame, here: Addressee) -> tuple[int, ...]:
        """The tokens to go on with. Raises BadFrame."""
        return check_end(end, transfer.expected, here, transfer.room_tokens)

    def _enter_engine(self, transfer: Transfer, end: kv.EndFrame, tokens: tuple[int, ...]) -> asyncio.Future[Any]:
        """Tells the engine that everything is there."""
        request_id, epoch, num_tokens = transfer.request_id, transfer.epoch, end.num_tokens
        return self._port.call(lambda engine: engine.import_commit(request_id, epoch, tokens, num_tokens))

    async def _commit(self, transfer: Transfer, end: kv.EndFrame, tokens: tuple[int, ...]) -> kv.Commit:
        request_id, epoch = transfer.request_id, transfer.epoch
        started_s = time.monotonic()
        try:
            await self._reach("import.before_commit")
            # The engine computes while Redis is asked; what it samples waits for the answer and is dropped with a refusal.
            transfer.in_engine = True
            await self._enter_engine(transfer, end, tokens)
            await self._reach("import.in_engine")
            await self._hooks.commit(request_id, epoch)
            if transfer.ended_by is not None:
                raise transfer.ended_by
            self._hooks.arrived(transfer.arrival(end, tokens, time.monotonic() - started_s))
        except AutanError as error:
            await self._returns.abort(transfer, error)
            raise
        except Exception as error:
            logger.exception("the commit of %s failed", request_id)
            failure = InternalError(f"{request_id}: the commit failed, see the log of {self._hooks.here().instance_id}")
            await self._returns.abort(transfer, failure)
            raise failure from error
        transfer.lifecycle.move(ReceiveState.COMMITTED)
        self._authority.spend(request_id, epoch)
        self._ledger.release(transfer.key)
        transfer.touched_s = time.monotonic()
        return kv.Commit(epoch=epoch, blocks=transfer.num_blocks)
