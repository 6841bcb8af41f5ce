"""What an ingress does not know and has to ask Redis for: ends that its own clock calls for, and tokens that a stream lacks.

Ends. The end that Redis has is the end that is told. A deadline is asked for as a cancel: its reply says whether the request
expires or had ended before. Only while Redis is away is the end told first (a complete stream is left to the journal, which
tells its own end from memory); it is owed to Redis from then on, and paid before the stream is forgotten.

Gaps. Redis can have tokens that are not here: an emit that was given up may take effect later. A worker can be beyond what is
here: it sent while nobody took the tokens in. Neither comes again by itself.

    KNOWN --ours: the journal is read, the workers replay--> ASKED --tokens without a gap--> closed
      |                                                        |
      +--another owner or epoch: see verdicts                  +--still beyond after `patience_s`: lost, an error ends it
"""

from __future__ import annotations

import asyncio
import logging

from orchestrator.domain.clock import Clock
from orchestrator.ingress.adopt import Adopter
from orchestrator.ingress.journal import Journal
from orchestrator.ingress.live import Gap, LiveStream, StreamTable
from orchestrator.ingress.records import lost_tokens_error
from orchestrator.ingress.streams import StreamState
from orchestrator.store.client import Store
from orchestrator.store.decode import chunks
from protos.contract.errors import AutanError, DeadlineExceeded, StoreUnavailable
from protos.contract.redis_names import Code

logger = logging.getLogger(__name__)

DEADLINE_GRACE_S = 1.0
_AT_ONCE = 16  # calls; half of the connections of the store's client
_EPOCHS_AT_ONCE = 3


class Recovery:
    """The owner of these waits: `watch` calls it in every turn. Whatever raises is tried again in the next one."""

    def __init__(
        self, *, store: Store, table: StreamTable, journal: Journal, adopter: Adopter, clock: Clock, patience_s: float
    ) -> None:
        self._store = store
        self._table = table
        self._journal = journal
        self._adopter = adopter
        self._clock = clock
        self._patience_s = patience_s

    async def expire_overdue(self) -> None:
        """Ends every request that is beyond its deadline; returns in bounded time with and without Redis."""
        end_s = self._clock.now_s() - DEADLINE_GRACE_S
        overdue = [live for live in self._table if live.needs_owner and live.is_accepted and live.deadline_at_s < end_s]
        is_away = False
        for part in chunks(overdue, _AT_ONCE):
            if not is_away:
                is_away = not all(await asyncio.gather(*(self._expire(live) for live in part)))
            if is_away:
                for live in part:
                    self._expire_from_memory(live)

    async def pay_ends(self) -> None:
        """Gives Redis the ends that were told without it. Raises what the store raises."""
        owed = [(live, reason) for request_id, reason in self._table.owed.items() if (live := self._table.get(request_id))]
        for part in chunks(owed, _AT_ONCE):
            await asyncio.gather(*(self._pay(live, reason) for live, reason in part))

    async def close_gaps(self, *, again: bool) -> None:
        """Asks for what is missing; for what was asked before only with `again`. Raises what the store raises."""
        for request_id, gap in list(self._table.gaps.items()):
            live = self._table.get(request_id)
            if live is None or not live.needs_owner:
                self._table.gaps.pop(request_id, None)
            elif gap.asked_s is not None and gap.seen_s - gap.asked_s >= self._patience_s:
                error = lost_tokens_error(request_id, live.stream.accepted)
                logger.error("%s", error)
                self._table.give_up(live, error, "tokens lost")
            elif again or gap.asked_s is None:
                await self._ask(live, gap)

    async def _expire(self, live: LiveStream) -> bool:
        """False when the store did not answer."""
        try:
            reply = await self._store.cancel(live.request_id, live.spec.tenant, "deadline")
            if reply.code is Code.OK:
                self._table.end(live, _overdue_error(live))
            else:
                [look] = await self._store.look([live.request_id])
                self._journal.take_look(live, look)
        except StoreUnavailable:
            return False
        except AutanError:
            logger.exception("request %s is overdue and could not be ended", live.request_id)
        return True

    def _expire_from_memory(self, live: LiveStream) -> None:
        if live.stream.state is StreamState.OPEN:
            self._table.give_up(live, _overdue_error(live), "deadline")

    async def _pay(self, live: LiveStream, reason: str) -> None:
        reply = await self._store.cancel(live.request_id, live.spec.tenant, reason)
        if reply.code is Code.DUPLICATE:
            logger.info("request %s was given up here (%s) and had ended as %s", live.request_id, reason, reply.state)
        self._table.paid(live)

    async def _ask(self, live: LiveStream, gap: Gap) -> None:
        for _ in range(_EPOCHS_AT_ONCE):
            if not live.needs_owner:
                return
            epoch = live.stream.epoch
            if await self._journal.is_ours(live):
                break
            if live.stream.epoch == epoch:
                return
        else:
            return
        before = live.stream.accepted
        if await self._adopter.catch_up(live):
            logger.warning("request %s: tokens %d to %d were only in Redis", live.request_id, before, live.stream.accepted - 1)
            self._table.gaps.pop(live.request_id, None)
        elif gap.asked_s is None:
            gap.asked_s = self._clock.now_s()


def _overdue_error(live: LiveStream) -> DeadlineExceeded:
    return DeadlineExceeded(f"request {live.request_id} did not end within its timeout")
