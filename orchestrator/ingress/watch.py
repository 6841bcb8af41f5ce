"""Notices what happens to our requests elsewhere: ends, newer epochs, and requests that lost their ingress; drives recovery.

Hints only shorten the wait: everything is looked at once a second anyway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing

from orchestrator.domain.clock import Clock
from orchestrator.ingress.acks import AckBox
from orchestrator.ingress.adopt import Adopter
from orchestrator.ingress.journal import Journal
from orchestrator.ingress.live import LiveStream, StreamTable
from orchestrator.ingress.owner import Ownership
from orchestrator.ingress.recovery import Recovery
from orchestrator.ingress.verdicts import moved_error
from orchestrator.store.client import Store
from protos.contract.errors import AutanError, StoreUnavailable
from protos.contract.redis_names import ingress_channel, is_name

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_ADOPT_EVERY_S = 2.0
_ADOPT_BATCH = 64
_MAX_HINTED = 4096


class Watch:
    """One task that looks, one that listens to hints."""

    def __init__(
        self,
        *,
        store: Store,
        owner: Ownership,
        table: StreamTable,
        journal: Journal,
        adopter: Adopter,
        recovery: Recovery,
        clock: Clock,
    ) -> None:
        self._store = store
        self._owner = owner
        self._table = table
        self._journal = journal
        self._adopter = adopter
        self._recovery = recovery
        self._clock = clock
        self._hinted: set[str] = set()
        self._look_at_all = False
        self._wanted: dict[str, tuple[int, AckBox]] = {}  # not here, but a worker sent tokens of it under this epoch
        self._news = asyncio.Event()
        self._adopt_at_s = 0.0

    def wanted(self, request_id: str, epoch: int, box: AckBox) -> None:
        """A worker has tokens of a request that is not here: find out whose it is. Bounded; what is lost comes again."""
        if len(self._wanted) < _MAX_HINTED:
            self._wanted[request_id] = (epoch, box)
            self._news.set()

    def wake(self) -> None:
        """There is something to recover."""
        self._news.set()

    async def listen(self) -> None:
        """Turns hints into looks, until it is cancelled."""
        channel = ingress_channel(self._store.cluster, self._owner.ingress_id)
        async with aclosing(self._store.hints(channel)) as hints:  # type: ignore[type-var]
            async for payload in hints:
                request_id = payload.decode("utf-8", "replace")
                if is_name(request_id) and len(self._hinted) < _MAX_HINTED:
                    self._hinted.add(request_id)
                else:
                    self._look_at_all = True
                self._news.set()

    async def run(self) -> None:
        """Looks, adopts and enforces deadlines, until it is cancelled."""
        look_at_s = self._clock.now_s()
        while True:
            wait_s = max(0.0, look_at_s - self._clock.now_s())
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                self._look_at_all = True
            self._news.clear()
            everything, self._look_at_all = self._look_at_all, False
            if everything:
                look_at_s = self._clock.now_s() + _LOOK_EVERY_S
            try:
                await self.turn(everything)
            except StoreUnavailable:
                self._journal_again()
            except AutanError:
                logger.exception("the watch could not look")

    async def turn(self, everything: bool) -> None:
        """One round: deadlines first, because they hold without Redis too. Raises what the store raises."""
        hinted, self._hinted = self._hinted, set()
        if self._owner.is_fenced:
            for live in self._table:
                self._table.end(live, moved_error(live.request_id))
            return
        if everything:
            await self._recovery.expire_overdue()
            await self._adopter.retake()
            lives = list(self._table)
        else:
            lives = [found for request_id in hinted if (found := self._table.get(request_id))]
        await self._look(lives)
        await self._find_wanted()
        await self._recovery.close_gaps(again=everything)
        await self._recovery.pay_ends()
        if everything and self._clock.now_s() >= self._adopt_at_s:
            await self.adopt_orphans()

    async def adopt_orphans(self) -> int:
        """Takes over live requests whose ingress is gone, a bounded number at a time. Raises what the store raises."""
        orphans = await self._store.orphans(self._owner.ingress_id, _ADOPT_BATCH)
        adopted = await self._adopter.adopt_all(orphans)
        again_at_once = len(orphans) == _ADOPT_BATCH and adopted > 0
        self._adopt_at_s = self._clock.now_s() + (0.0 if again_at_once else _ADOPT_EVERY_S)
        return adopted

    async def _look(self, lives: Sequence[LiveStream]) -> None:
        lives = [live for live in lives if live.needs_owner]
        if not lives:
            return
        for live, look in zip(lives, await self._store.look([live.request_id for live in lives]), strict=True):
            if live.is_accepted:
                self._journal.take_look(live, look)
                self._journal.mark(live)

    async def _find_wanted(self) -> None:
        wanted, self._wanted = self._wanted, {}
        if not wanted:
            return
        try:
            looks = await self._store.look(list(wanted))
        except AutanError:
            self._wanted = wanted | self._wanted
            raise
        adoptable = []
        for (request_id, (epoch, box)), look in zip(wanted.items(), looks, strict=True):
            live = self._table.get(request_id)
            if live is not None:
                # Adopted meanwhile: what was sent before has not been taken, and is not sent again unless it is asked for.
                self._table.lacks_tokens(live)
            elif look.has_ended:
                box.put(request_id, epoch, look.n, finished=True)
            elif not look.is_known or look.epoch > epoch:
                box.put(request_id, epoch, 0, stale=True)
            else:
                adoptable.append(request_id)
        # The worker of an adopted request finds OWNER in its inbox and replays.
        await self._adopter.adopt_all(adoptable)

    def _journal_again(self) -> None:
        for live in self._table:
            self._journal.mark(live)
