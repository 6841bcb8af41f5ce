"""Prompts that wait while their first blocks come back from lower tiers; everything else goes on stepping.

A prompt waits until computing would be done: what is there by then is used, the rest computed. See `tier_fetches` for the way
of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from workers.batching.cache_tiers import CacheTiers
from workers.batching.ledger import BlockLedger
from workers.batching.sequence import Sequence, SequenceState
from workers.batching.tier_fetches import TierFetches

LEAST_PATIENCE_S = 0.5
MOST_PATIENCE_S = 10.0
MAX_ROUNDS = 3
"""Fetches that one prompt waits for, one after the other: its own, and those of others that begin alike."""


class Restoring:
    """The stage RESTORING. One thread at a time, under the engine's lock."""

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
        self._rounds: dict[tuple[str, int], int] = {}

    def __len__(self) -> int:
        """Prompts that wait."""
        return len(self._waiting())

    def begin(self, sequence: Sequence) -> bool:
        """Moves a waiting prompt to RESTORING when lower tiers have blocks that are worth waiting for."""
        assert sequence.state is SequenceState.WAITING, f"{sequence.request_id} does not wait"
        names = sequence.names_of((len(sequence.tokens) - 1) // sequence.block_tokens)
        num_hits = len(self._ledger.match_names(names))
        rest = names[num_hits:]
        if not rest or self._rounds.get(sequence.key, 0) >= MAX_ROUNDS:
            return False
        if not self._waits(sequence, names, num_hits):
            return False
        self._rounds[sequence.key] = self._rounds.get(sequence.key, 0) + 1
        sequence.move(SequenceState.RESTORING)
        return True

    def settle(self, came: Iterable[object], late: Iterable[object]) -> list[Sequence]:
        """Takes in whose fetches ended; returns prompts that wait for nothing any more, in stage WAITING."""
        back: list[Sequence] = []
        for waiter in came:
            if isinstance(waiter, Sequence):
                waiter.move(SequenceState.WAITING)
                if not self.begin(waiter):
                    back.append(waiter)
        for waiter in late:
            if isinstance(waiter, Sequence):
                waiter.move(SequenceState.WAITING)
                back.append(waiter)
        for sequence in back:
            self._rounds.pop(sequence.key, None)
        return back

    def forget(self, sequence: Sequence) -> None:
        """The prompt does not wait any more, whatever stage it goes to."""
        self._rounds.pop(sequence.key, None)
        self._fetches.leave(sequence)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError when stages and fetches disagree."""
        waiting = [sequence.key for sequence in self._waiting()]
        restoring = [s.key for s in sequences if s.state is SequenceState.RESTORING]
        assert sorted(waiting) == sorted(restoring), f"{waiting} wait for a fetch, {restoring} are in that stage"

    def _waits(self, sequence: Sequence, names: list[bytes], num_hits: int) -> bool:
        count, compute_s = self._tiers.worth_fetching(names[num_hits:], num_hits)
        deadline_s = self._now_s() + min(max(compute_s, LEAST_PATIENCE_S), MOST_PATIENCE_S)
        coming = self._fetches.coming(names[num_hits])
        if coming is None:
            return self._fetches.start(sequence, sequence.root, names, count, self._room(), deadline_s)
        if not any(isinstance(waiter, Sequence) for waiter in coming.waiters):
            # Another worker's prompt has more patience than this one has.
            coming.deadline_s = min(coming.deadline_s, deadline_s)
        coming.waiters.append(sequence)
        return True

    def _waiting(self) -> list[Sequence]:
        return [waiter for waiter in self._fetches.waiters() if isinstance(waiter, Sequence)]
