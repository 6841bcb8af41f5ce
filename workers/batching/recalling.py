"""Prefixes that are to be lent and wait while their blocks come back from lower tiers.

    asked ──lower tiers have what follows the pool's run──► WAITING ──came──► asked again, a few times
      │                                                        │
      └──────────── nothing (more) to bring ───────────────────┴──late, no room, given up──► the pool's run is pinned

Lending is a favour: it takes no room that preempted or running sequences need, a bounded number of blocks and a bounded time,
and whatever goes wrong on the way makes the lent run shorter and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from workers.batching.cache_tiers import CacheTiers
from workers.batching.ledger import BlockLedger
from workers.batching.tier_fetches import TierFetches
from workers.engine_api.types import PrefixTicket

MAX_WAIT_S = 10.0
MAX_ROUNDS = 3
"""Fetches that one recall waits for, one after the other: blocks of the pool may lie between those of lower tiers."""

MAX_RECALLED_BLOCKS = 256
"""Blocks on the way for all recalls together, and never more than half of the pool."""

Lent = Callable[[PrefixTicket], None]


@dataclass(slots=True, eq=False)
class Recall:
    """A prefix that is asked for; `wanted` blocks of it are on the way."""

    ticket_id: int
    names: tuple[bytes, ...]
    deadline_s: float
    lent: Lent
    rounds: int = 0
    wanted: int = 0


class Recalls:
    """The recalls of one engine. One thread at a time, under the engine's lock; `lent` is called under it as well."""

    def __init__(
        self,
        ledger: BlockLedger,
        tiers: CacheTiers,
        fetches: TierFetches,
        now_s: Callable[[], float],
        room: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._tiers = tiers
        self._fetches = fetches
        self._now_s = now_s
        self._room = room
        self._open: dict[int, Recall] = {}
        self._most_blocks = min(MAX_RECALLED_BLOCKS, ledger.pool.num_blocks // 2)

    def __len__(self) -> int:
        """Recalls that wait."""
        return len(self._open)

    def begin(self, names: Listing[bytes], wait_s: float, lent: Lent) -> int:
        """Pins the run of `names` once what lower tiers have of it is back, and tells `lent`; returns the ticket's id."""
        deadline_s = self._now_s() + min(max(wait_s, 0.0), MAX_WAIT_S)
        recall = Recall(self._ledger.new_ticket(), tuple(names), deadline_s, lent)
        self._open[recall.ticket_id] = recall
        if not self._waits(recall):
            self._lend(recall)
        return recall.ticket_id

    def settle(self, came: Iterable[object], late: Iterable[object]) -> bool:
        """Takes in whose fetches ended, and ends what is late or in the way of sequences; True when there was any of these."""
        ended = False
        for waiter in came:
            if isinstance(waiter, Recall) and not self._waits(waiter):
                self._lend(waiter)
        for waiter in late:
            if isinstance(waiter, Recall):
                self._lend(waiter)
        now_s = self._now_s()
        for recall in list(self._open.values()):
            if recall.deadline_s <= now_s or self._room() < 0:
                self._fetches.leave(recall)
                self._lend(recall)
                ended = True
        return ended

    def forget(self, ticket_id: int) -> bool:
        """Nobody waits for the prefix any more; False when nobody did."""
        recall = self._open.pop(ticket_id, None)
        if recall is not None:
            self._fetches.leave(recall)
        return recall is not None

    def idle_limit_s(self) -> float | None:
        """Seconds until the next deadline; None when nobody waits."""
        if not self._open:
            return None
        return max(0.0, min(recall.deadline_s for recall in self._open.values()) - self._now_s())

    def check_integrity(self) -> None:
        """Raises AssertionError when a recall waits for no fetch, or a fetch for a recall that is over."""
        waiting = {waiter.ticket_id for waiter in self._fetches.waiters() if isinstance(waiter, Recall)}
        assert waiting == self._open.keys(), f"recalls {sorted(self._open)} are open, {sorted(waiting)} wait for a fetch"
        assert sum(recall.wanted for recall in self._open.values()) <= self._most_blocks, "more is recalled than may be"

    def _waits(self, recall: Recall) -> bool:
        """Has the recall wait for the next fetch that brings it further, if there is one."""
        recall.wanted = 0
        left_s = recall.deadline_s - self._now_s()
        num_hits = len(self._ledger.match_names(recall.names))
        rest = recall.names[num_hits:]
        if not rest or left_s <= 0 or recall.rounds >= MAX_ROUNDS:
            return False
        recall.rounds += 1
        coming = self._fetches.coming(rest[0])
        if coming is not None:
            coming.waiters.append(recall)
            return True
        before = recall.names[num_hits - 1] if num_hits else self._tiers.parent_of(rest[0])
        if before is None:
            return False
        count = self._tiers.readable(before, rest, left_s)
        count = min(count, self._most_blocks - sum(other.wanted for other in self._open.values()))
        if not self._fetches.start(recall, before, recall.names, count, self._room(), recall.deadline_s):
            return False
        recall.wanted = count
        return True

    def _lend(self, recall: Recall) -> None:
        del self._open[recall.ticket_id]
        recall.lent(self._ledger.lend(recall.names, recall.ticket_id))
