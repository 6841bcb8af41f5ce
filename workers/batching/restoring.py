"""Prompts that wait while their first blocks come back from lower tiers; everything else goes on stepping.

A fetch is an import of a prefix from this worker's own tiers: blocks of the pool are reserved, filled on an io thread, and
enter the prefix cache without an owner. It has a deadline, by which computing would be done: what is there by then is used,
the rest computed. Prompts that need the same blocks wait for one fetch. When the last prompt that waits goes, so does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from protos.contract.errors import OutOfBlocks
from workers.batching.cache_tiers import CacheTiers
from workers.batching.ledger import BlockLedger
from workers.batching.sequence import Sequence, SequenceState
from workers.batching.tier_jobs import FetchIn

LEAST_PATIENCE_S = 0.5
MOST_PATIENCE_S = 10.0
MAX_ROUNDS = 3
"""Fetches that one prompt waits for, one after the other: its own, and those of prompts that begin alike."""


@dataclass(slots=True)
class Fetch:
    """Blocks on their way into the pool."""

    job: FetchIn
    deadline_s: float
    names: tuple[bytes, ...]
    waiters: list[Sequence] = field(default_factory=list)


class Restoring:
    """The stage RESTORING; without tiers nothing is ever in it. One thread at a time, under the engine's lock."""

    def __init__(
        self, ledger: BlockLedger, tiers: CacheTiers | None, now_s: Callable[[], float], room: Callable[[], int]
    ) -> None:
        self._ledger = ledger
        self._tiers = tiers
        self._now_s = now_s
        self._room = room
        self._fetches: dict[int, Fetch] = {}
        self._on_way: dict[bytes, Fetch] = {}
        self._late: set[int] = set()  # given up, but still with the io thread: nothing new is asked of it
        self._rounds: dict[tuple[str, int], int] = {}

    def __len__(self) -> int:
        """Prompts that wait."""
        return sum(len(fetch.waiters) for fetch in self._fetches.values())

    def begin(self, sequence: Sequence) -> bool:
        """Moves a waiting prompt to RESTORING when lower tiers have blocks that are worth waiting for."""
        if self._tiers is None:
            return False
        assert sequence.state is SequenceState.WAITING, f"{sequence.request_id} does not wait"
        names = sequence.names_of((len(sequence.tokens) - 1) // sequence.block_tokens)
        num_hits = len(self._ledger.match_names(names))
        rest = names[num_hits:]
        if not rest or self._rounds.get(sequence.key, 0) >= MAX_ROUNDS:
            return False
        fetch = self._on_way.get(rest[0]) or self._start(self._tiers, sequence, names, num_hits)
        if fetch is None:
            return False
        fetch.waiters.append(sequence)
        self._rounds[sequence.key] = self._rounds.get(sequence.key, 0) + 1
        sequence.move(SequenceState.RESTORING)
        return True

    def settle(self) -> list[Sequence]:
        """Takes in what came and gives up what is late; returns prompts that wait for nothing any more, in stage WAITING."""
        if self._tiers is None:
            return []
        back: list[Sequence] = []
        for job in self._tiers.settle():
            self._late.discard(job.ticket_id)
            if job.ticket_id in self._fetches:
                back += self._end(job.ticket_id, job.done)
        back = [sequence for sequence in back if not self.begin(sequence)]
        now_s = self._now_s()
        for ticket_id in [t for t, fetch in self._fetches.items() if fetch.deadline_s <= now_s]:
            self._late.add(ticket_id)
            back += self._end(ticket_id, self._fetches[ticket_id].job.cancel())
        for sequence in back:
            self._rounds.pop(sequence.key, None)
        return back

    def forget(self, sequence: Sequence) -> None:
        """The prompt does not wait any more, whatever stage it goes to."""
        self._rounds.pop(sequence.key, None)
        for ticket_id, fetch in list(self._fetches.items()):
            if sequence in fetch.waiters:
                fetch.waiters.remove(sequence)
                if not fetch.waiters:
                    self._end(ticket_id, fetch.job.cancel())

    def idle_limit_s(self) -> float | None:
        """Seconds until the next deadline; None when nothing is on its way."""
        if not self._fetches:
            return None
        return max(0.0, min(fetch.deadline_s for fetch in self._fetches.values()) - self._now_s())

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError when stages and fetches disagree."""
        waiting = [sequence.key for fetch in self._fetches.values() for sequence in fetch.waiters]
        restoring = [s.key for s in sequences if s.state is SequenceState.RESTORING]
        assert sorted(waiting) == sorted(restoring), f"{waiting} wait for a fetch, {restoring} are in that stage"
        for fetch in self._fetches.values():
            assert fetch.waiters, "a fetch that nobody waits for"

    def _start(self, tiers: CacheTiers, sequence: Sequence, names: list[bytes], num_hits: int) -> Fetch | None:
        if self._late:
            return None
        count, compute_s = tiers.worth_fetching(names[num_hits:], num_hits)
        count = min(count, self._room())
        if count <= 0:
            return None
        wanted = names[num_hits : num_hits + count]
        tiers.hold(wanted)
        try:
            ticket = self._ledger.borrow(sequence.root, names[: num_hits + count])
        except OutOfBlocks:
            tiers.let_go(wanted)
            return None
        job = tiers.fetch(ticket.ticket_id, wanted, ticket.block_ids)
        patience_s = min(max(compute_s, LEAST_PATIENCE_S), MOST_PATIENCE_S)
        fetch = Fetch(job, self._now_s() + patience_s, tuple(wanted))
        self._fetches[ticket.ticket_id] = fetch
        self._on_way.update(dict.fromkeys(wanted, fetch))
        return fetch

    def _end(self, ticket_id: int, num_blocks: int) -> list[Sequence]:
        fetch = self._fetches.pop(ticket_id)
        for name in fetch.names:
            if self._on_way.get(name) is fetch:
                del self._on_way[name]
        self._ledger.end_borrowing(ticket_id, num_blocks)
        for sequence in fetch.waiters:
            sequence.move(SequenceState.WAITING)
        return fetch.waiters
