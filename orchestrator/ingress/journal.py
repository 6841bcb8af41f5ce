"""Tokens into Redis before they are shown: one group commit per tick for all requests.

Order of things for every token: accepted, journaled, shown, acknowledged to the worker. While Redis is away tokens are
shown from memory, their streams are marked unjournaled, nothing is acknowledged, and everything is back-filled on return.
What is kept for that is bounded: beyond the budget no more is read from the workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from orchestrator.ingress.live import LiveStream, StreamTable
from orchestrator.ingress.metrics import Metrics
from orchestrator.ingress.owner import Ownership
from orchestrator.ingress.streams import Pending, StreamState
from orchestrator.ingress.verdicts import Behind, Ended, NotOurs, Superseded, diverged_error, judge, moved_error
from orchestrator.store.client import EMIT_BATCH, Store
from orchestrator.store.replies import Emission, EmitOutcome, Look
from protos.contract.errors import AutanError
from protos.contract.redis_names import Code, pack_tokens

logger = logging.getLogger(__name__)

_TOKENS_PER_EMISSION = 4096
_FINISHES_AT_ONCE = 32
_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 1.0


class Journal:
    """The only writer of `emit` and `finish`."""

    def __init__(
        self,
        store: Store,
        owner: Ownership,
        table: StreamTable,
        metrics: Metrics,
        *,
        tick_s: float,
        max_backlog_tokens: int = 1_000_000,
    ) -> None:
        self._store = store
        self._owner = owner
        self._table = table
        self._metrics = metrics
        self._tick_s = tick_s
        self._max_backlog_tokens = max_backlog_tokens
        self._dirty: dict[str, LiveStream] = {}
        self._work = asyncio.Event()
        self._relief = asyncio.Event()
        self.is_degraded = False

    def mark(self, live: LiveStream) -> None:
        """The stream has news for the journal."""
        if not live.needs_journal:
            return
        self._dirty[live.request_id] = live
        self._work.set()
        if self.is_degraded:
            self._show_from_memory(live)

    async def room(self) -> None:
        """Returns at once unless Redis is away and the backlog is over its budget; then when it is not any more."""
        while self.is_degraded and self.backlog_tokens > self._max_backlog_tokens:
            self._relief.clear()
            await self._relief.wait()

    @property
    def backlog_tokens(self) -> int:
        """Accepted tokens that Redis does not have."""
        return sum(live.stream.accepted - live.stream.journaled for live in self._dirty.values())

    async def run(self) -> None:
        """Commits, tick by tick, until it is cancelled."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            await self._work.wait()
            try:
                await self.commit()
                backoff_s = _FIRST_BACKOFF_S
                await asyncio.sleep(self._tick_s)
            except AutanError as error:
                self._degrade(error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(_LAST_BACKOFF_S, backoff_s * 2)

    async def commit(self) -> None:
        """One group commit: tokens, then the finishes that they allow. Raises what the store raises."""
        batch = [(live, pending) for live in self._dirty.values() if (pending := live.stream.pending(_TOKENS_PER_EMISSION))]
        batch = batch[:EMIT_BATCH]
        if batch:
            items = [Emission(live.request_id, p.epoch, p.first_index, pack_tokens(p.token_ids)) for live, p in batch]
            outcomes = await self._store.emit(self._owner.ingress_id, self._owner.epoch, items)
            self._recovered()
            self._metrics.count("group_commits")
            doubtful = [
                (live, pending.epoch if outcome.code is Code.STALE else None)
                for (live, pending), outcome in zip(batch, outcomes, strict=True)
                if not self._settle(live, pending, outcome)
            ]
            await self._examine(doubtful)
        await self._finish_complete()
        for request_id, live in list(self._dirty.items()):
            if not live.needs_journal:
                del self._dirty[request_id]
        if not self._dirty:
            self._work.clear()

    def _settle(self, live: LiveStream, pending: Pending, outcome: EmitOutcome) -> bool:
        """Takes in the outcome of one emission; False when only a look at the request explains it."""
        match outcome.code:
            case Code.OK | Code.DUPLICATE:
                live.stream.journaled_to(outcome.next_index)
                self._metrics.count("tokens_journaled", max(0, outcome.next_index - pending.first_index))
                live.acknowledge()
                live.wake()
                return True
            case Code.GAP:
                logger.warning("request %s: the journal went back to %d tokens", live.request_id, outcome.next_index)
                live.stream.journaled_to(outcome.next_index)
                return True
            case Code.DIVERGED:
                self._table.give_up(live, diverged_error(live.request_id), "diverged")
                return True
            case _:
                return False

    async def _finish_complete(self) -> None:
        ready = [
            live
            for live in self._dirty.values()
            if live.stream.state is StreamState.COMPLETE and live.stream.journaled == live.stream.accepted
        ]
        for start in range(0, len(ready), _FINISHES_AT_ONCE):
            part = ready[start : start + _FINISHES_AT_ONCE]
            refused = await asyncio.gather(*(self._finish(live) for live in part))
            self._recovered()
            await self._examine([found for found in refused if found is not None])

    async def _finish(self, live: LiveStream) -> tuple[LiveStream, int | None] | None:
        """Ends one request in Redis; returns it, with the epoch that was refused, when a look has to explain."""
        ending, epoch = live.stream.ending, live.stream.epoch
        if ending is None:
            return None
        reply = await self._store.finish(
            ingress_id=self._owner.ingress_id,
            ingress_epoch=self._owner.epoch,
            request_id=live.request_id,
            epoch=epoch,
            reason=ending.reason.value,
            n=ending.num_tokens,
        )
        match reply.code:
            case Code.OK | Code.DUPLICATE:
                self._table.end(live, ending)
            case Code.GAP if reply.n <= ending.num_tokens:
                live.stream.journaled_to(reply.n)
            case Code.STALE:
                return live, epoch
            case _:
                return live, None
        return None

    async def is_ours(self, live: LiveStream) -> bool:
        """True when Redis lets this registration write the request at the stream's epoch. Otherwise what it says is applied."""
        epoch = live.stream.epoch
        nothing = Emission(live.request_id, epoch, 0, b"")
        [outcome] = await self._store.emit(self._owner.ingress_id, self._owner.epoch, [nothing])
        if outcome.code in (Code.OK, Code.DUPLICATE, Code.STATE):
            return True
        await self._examine([(live, epoch if outcome.code is Code.STALE else None)])
        return False

    async def _examine(self, doubtful: Sequence[tuple[LiveStream, int | None]]) -> None:
        if not doubtful:
            return
        looks = await self._store.look([live.request_id for live, _ in doubtful])
        for (live, refused_epoch), look in zip(doubtful, looks, strict=True):
            # Parked until the worker of the next epoch sends, or the watch comes by.
            self._dirty.pop(live.request_id, None)
            self.take_look(live, look, refused_epoch)

    def take_look(self, live: LiveStream, look: Look, refused_epoch: int | None = None) -> None:
        """Applies what Redis says of a request. `refused_epoch`: see judge."""
        if live.stream.state is StreamState.ENDED:
            return
        match judge(live.stream, look, refused_epoch):
            case Ended(outcome):
                self._table.end(live, outcome)
            case Superseded(epoch, journaled):
                live.stream.supersede(epoch, journaled)
                self.mark(live)
            case NotOurs():
                # A registration that is newer than the ownership means that the watch takes the request again.
                if live.owner_epoch == self._owner.epoch:
                    self._table.end(live, moved_error(live.request_id))
            case Behind():
                self._table.lacks_tokens(live)
            case _:
                pass

    def _degrade(self, error: AutanError) -> None:
        if not self.is_degraded:
            logger.warning("tokens are shown from memory: %s", error)
            self._metrics.count("store_losses")
        self.is_degraded = True
        for live in self._dirty.values():
            self._show_from_memory(live)

    def _recovered(self) -> None:
        if self.is_degraded:
            logger.info("Redis is back: %d tokens to back-fill", self.backlog_tokens)
        self.is_degraded = False
        self._relief.set()

    def _show_from_memory(self, live: LiveStream) -> None:
        before = live.stream.visible
        live.stream.release()
        self._metrics.count("tokens_shown_unjournaled", live.stream.visible - before)
        live.wake()
