"""What comes back from lower tiers: for prompts that wait, and for prefixes that are to be lent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listing

from workers.batching.cache_tiers import CacheTiers
from workers.batching.ledger import BlockLedger
from workers.batching.recalling import Lent, Recalls
from workers.batching.restoring import Restoring
from workers.batching.sequence import Sequence
from workers.batching.tier_fetches import TierFetches


class TierReturns:
    """Restoring and Recalls over the same fetches; without tiers nothing ever waits. `room` says how many blocks of the pool
    may be taken. One thread at a time, under the engine's lock."""

    def __init__(
        self, ledger: BlockLedger, tiers: CacheTiers | None, now_s: Callable[[], float], room: Callable[[], int]
    ) -> None:
        self._ledger = ledger
        self._fetches: TierFetches | None = None
        if tiers is not None:
            self._fetches = TierFetches(ledger, tiers, now_s)
            self._restoring = Restoring(ledger, tiers, self._fetches, now_s, room)
            self._recalls = Recalls(ledger, tiers, self._fetches, now_s, room)

    @property
    def restoring(self) -> int:
        """Prompts that wait."""
        return 0 if self._fetches is None else len(self._restoring)

    @property
    def recalling(self) -> int:
        """Prefixes to be lent that wait."""
        return 0 if self._fetches is None else len(self._recalls)

    def begin(self, sequence: Sequence) -> bool:
        """See Restoring.begin."""
        return self._fetches is not None and self._restoring.begin(sequence)

    def recall(self, names: Listing[bytes], wait_s: float, lent: Lent) -> int:
        """See Recalls.begin."""
        if self._fetches is not None:
            return self._recalls.begin(names, wait_s, lent)
        ticket = self._ledger.lend(names, self._ledger.new_ticket())
        lent(ticket)
        return ticket.ticket_id

    def settle(self) -> tuple[list[Sequence], bool]:
        """Takes in what came, gives up what is late: prompts that wait for nothing any more, and whether blocks moved."""
        if self._fetches is None:
            return [], False
        came, late = self._fetches.settle()
        back = self._restoring.settle(came, late)
        ended = self._recalls.settle(came, late)
        return back, bool(came or late or ended)

    def forget(self, sequence: Sequence) -> None:
        """See Restoring.forget."""
        if self._fetches is not None:
            self._restoring.forget(sequence)

    def forget_recall(self, ticket_id: int) -> bool:
        """See Recalls.forget."""
        return self._fetches is not None and self._recalls.forget(ticket_id)

    def idle_limit_s(self) -> float | None:
        """Seconds until the next deadline; None when nothing is on its way."""
        if self._fetches is None:
            return None
        limits = (self._fetches.idle_limit_s(), self._recalls.idle_limit_s())
        return min((limit for limit in limits if limit is not None), default=None)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError when stages, recalls and fetches disagree."""
        if self._fetches is not None:
            self._fetches.check_integrity()
            self._restoring.check_integrity(sequences)
            self._recalls.check_integrity()
