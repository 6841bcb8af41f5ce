"""How an incoming transfer becomes a sequence that decodes here: the engine begins, Redis agrees."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from protos.contract.errors import AutanError, BadFrame, HandoffTimeout, InternalError
from protos.wire import kv
from workers.kv_transfer.attachment import Attachment
from workers.kv_transfer.authority import Authority
from workers.kv_transfer.claims import Addressee, check_end
from workers.kv_transfer.hooks import ReceiverHooks
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.returns import ReceiverTasks, Returns
from workers.kv_transfer.striping import leading_blocks
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
        progress_timeout_s: float,
        returns: Returns,
        tasks: ReceiverTasks,
    ) -> None:
        self._port = port
        self._hooks = hooks
        self._ledger = ledger
        self._authority = authority
        self._reach = reach
        self._progress_timeout_s = progress_timeout_s
        self._returns = returns
        self._tasks = tasks

    async def end(self, at: Attachment, end: kv.EndFrame) -> kv.Commit:
        """Takes the end frame, waits for what other streams still bring and commits.

        Told again of a transfer that commits or has committed, it gives the same commit. Raises BadFrame when the end cannot
        be right, HandoffTimeout when the others are not whole in time, and what ended the transfer meanwhile.
        """
        transfer = at.transfer
        if transfer.committing is None:
            here = self._hooks.here()
            transfer.scope.check_end(end)
            tokens = self._check(transfer, end, here)
            num_blocks = -(-end.num_tokens // here.layout.block_tokens)
            await self._until_whole(at, num_blocks)
            transfer.lifecycle.move(ReceiveState.VERIFYING)
            transfer.committing = self._tasks.spawn(self._commit(transfer, end, tokens))
            transfer.wake()
        return await self.of(transfer)

    async def of(self, transfer: Transfer) -> kv.Commit:
        """The commit of a transfer that commits or has committed. Raises what made it fail."""
        assert transfer.committing is not None, transfer.lifecycle.state
        return await asyncio.shield(transfer.committing)

    def _check(self, transfer: Transfer, end: kv.EndFrame, here: Addressee) -> tuple[int, ...]:
        """The tokens to go on with. Raises BadFrame."""
        return check_end(end, transfer.expected, here, transfer.room_tokens)

    def _enter_engine(self, transfer: Transfer, end: kv.EndFrame, tokens: tuple[int, ...]) -> asyncio.Future[Any]:
        """Tells the engine that everything is there."""
        request_id, epoch, rows, exact = transfer.request_id, transfer.epoch, end.num_tokens, transfer.is_exact
        return self._port.call(lambda engine: engine.import_commit(request_id, epoch, tokens, rows, exact))

    async def _until_whole(self, at: Attachment, num_blocks: int) -> None:
        """The stream of the end must be whole now; the others, which are not ordered with it, in time."""
        transfer = at.transfer
        if transfer.is_ending:
            raise BadFrame(f"{transfer.request_id}: a second end")
        transfer.is_ending = True
        try:
            async with asyncio.timeout(self._progress_timeout_s):
                while not all(stripe.reassembly.is_whole(num_blocks) for stripe in transfer.stripes):
                    beyond = any(stripe.reassembly.is_beyond(num_blocks) for stripe in transfer.stripes)
                    if beyond or not at.stripe.reassembly.is_whole(num_blocks):
                        there = leading_blocks(transfer.next_blocks)
                        raise BadFrame(f"{transfer.request_id}: ended with {there} of {num_blocks} blocks")
                    await transfer.news.wait()
                    at.check_current()
        except TimeoutError:
            there = leading_blocks(transfer.next_blocks)
            raise HandoffTimeout(
                f"{transfer.request_id}: {there} of {num_blocks} blocks {self._progress_timeout_s} s after the end"
            ) from None
        finally:
            transfer.is_ending = False

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
        transfer.pool = None
        self._authority.spend(request_id, epoch)
        self._ledger.release(transfer.key)
        transfer.touched_s = time.monotonic()
        return kv.Commit(epoch=epoch, blocks=transfer.num_blocks)
