"""Blocks on their way from lower tiers into the pool, and who waits for them.

A fetch is an import of a prefix from this worker's own tiers: blocks of the pool are reserved, filled on an io thread, and
enter the prefix cache without an owner. It has a deadline: what is there by then is kept, the rest is given up. Who needs the
same blocks waits for one fetch. When the last one that waits goes, so does the fetch. Who waits is a prompt (`restoring`) or
a prefix that is to be lent (`recalling`).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

from protos.contract.errors import OutOfBlocks
from workers.batching.cache_tiers import CacheTiers
from workers.batching.ledger import BlockLedger
from workers.batching.tier_jobs import FetchIn


@dataclass(slots=True, eq=False)
class Fetch:
    """Blocks on their way into the pool."""

    job: FetchIn
    deadline_s: float
    names: tuple[bytes, ...]
    waiters: list[object] = field(default_factory=list)


class TierFetches:
    """All fetches of one engine. One thread at a time, under the engine's lock."""

    def __init__(self, ledger: BlockLedger, tiers: CacheTiers, now_s: Callable[[], float]) -> None:
        self._ledger = ledger
        self._tiers = tiers
        self._now_s = now_s
        self._fetches: dict[int, Fetch] = {}
        self._on_way: dict[bytes, Fetch] = {}
        self._late: set[int] = set()  # given up, but still with the io thread: nothing new is asked of it

    def waiters(self) -> list[object]:
        """Everybody who waits for a fetch, in no particular order."""
        return [waiter for fetch in self._fetches.values() for waiter in fetch.waiters]

    def coming(self, name: bytes) -> Fetch | None:
        """The fetch that brings this name."""
        return self._on_way.get(name)

    def start(
        self, waiter: object, root: bytes, names: Listing[bytes], count: int, room_blocks: int, deadline_s: float
    ) -> bool:
        """Brings back the `count` names behind the cached run of `names`, or as many of them as fit into `room_blocks` once
        that run is kept; `waiter` waits for them.

        False, and nothing changes, when that is none, or an io thread still hangs in an earlier fetch.
        """
        if self._late:
            return False
        hits = self._ledger.match_names(names)
        count = min(count, room_blocks - self._ledger.num_idle(hits))
        if count <= 0:
            return False
        wanted = names[len(hits) : len(hits) + count]
        self._tiers.hold(wanted)
        try:
            ticket = self._ledger.borrow(root, names[: len(hits) + count])
        except OutOfBlocks:
            self._tiers.let_go(wanted)
            return False
        job = self._tiers.fetch(ticket.ticket_id, wanted, ticket.block_ids)
        fetch = Fetch(job, deadline_s, tuple(wanted), [waiter])
        self._fetches[ticket.ticket_id] = fetch
        self._on_way.update(dict.fromkeys(wanted, fetch))
        return True

    def leave(self, waiter: object) -> None:
        """Somebody does not wait any more; what is alone then keeps what came and ends. Idempotent."""
        for ticket_id, fetch in list(self._fetches.items()):
            if waiter in fetch.waiters:
                fetch.waiters.remove(waiter)
                if not fetch.waiters:
                    self._give_up(ticket_id)

    def settle(self) -> tuple[list[object], list[object]]:
        """Takes in what came and gives up what is late; returns who waited for the one, and who for the other."""
        came: list[object] = []
        for job in self._tiers.settle():
            self._late.discard(job.ticket_id)
            if job.ticket_id in self._fetches:
                came += self._end(job.ticket_id, job.done)
        late: list[object] = []
        now_s = self._now_s()
        for ticket_id in [t for t, fetch in self._fetches.items() if fetch.deadline_s <= now_s]:
            self._late.add(ticket_id)
            late += self._give_up(ticket_id)
        return came, late

    def idle_limit_s(self) -> float | None:
        """Seconds until the next deadline; None when nothing is on its way."""
        if not self._fetches:
            return None
        return max(0.0, min(fetch.deadline_s for fetch in self._fetches.values()) - self._now_s())

    def check_integrity(self) -> None:
        """Raises AssertionError when a fetch runs for nobody."""
        for fetch in self._fetches.values():
            assert fetch.waiters, "a fetch that nobody waits for"

    def _give_up(self, ticket_id: int) -> list[object]:
        return self._end(ticket_id, self._fetches[ticket_id].job.cancel())

    def _end(self, ticket_id: int, num_blocks: int) -> list[object]:
        fetch = self._fetches.pop(ticket_id)
        for name in fetch.names:
            if self._on_way.get(name) is fetch:
                del self._on_way[name]
        self._ledger.end_borrowing(ticket_id, num_blocks)
        return fetch.waiters
