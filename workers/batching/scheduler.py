"""What the next step computes. A pure function: reads sequences and counts, returns a plan, changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.batching.sequence import Sequence as Seq
from workers.batching.sequence import SequenceState

RUNNING_PER_SPARE_BLOCK = 8


class PoolView(Protocol):
    """What a plan needs to know of the block pool."""

    @property
    def available(self) -> int: ...

    def ref_count(self, block_id: int) -> int: ...


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Bounds of one step: rows computed, and sequences that take part."""

    max_batch_tokens: int
    max_running: int


@dataclass(frozen=True, slots=True)
class Admission:
    """A waiting sequence that starts; `hits` are cached blocks with its first rows."""

    sequence: Seq
    hits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` rows of a prompt."""

    sequence: Seq
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Carried out in this order: preempt, admit, grow; then decodes and chunks run as one batch."""

    preempt: tuple[Seq, ...] = ()
    admit: tuple[Admission, ...] = ()
    grow: tuple[Seq, ...] = ()  # decoding sequences whose next row opens a block
    decodes: tuple[Seq, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @property
    def empty(self) -> bool:
        """True when there is nothing to run."""
        return not (self.decodes or self.chunks)


def plan(
    waiting: Sequence[Seq],
    running: Sequence[Seq],
    pool: PoolView,
    limits: StepLimits,
    match: Callable[[Seq], Sequence[int]],
) -> Plan:
    """Decodes first, one row each, oldest first; then prompt chunks, oldest first, until the token budget is used.

    `waiting` and `running` are sorted by age. A decode that finds no block preempts the youngest sequences, which are
    recomputed later; if even all younger ones could not give a block, it sits out the step and keeps what it has.
    An older sequence is never preempted for a younger one, so the oldest always advances once blocks outside of the
    batch (held, pinned, importing) come back. Waiting sequences start strictly in order, with room for all their known
    tokens, so that two half-computed prompts can never block each other.
    """
    draft = _Draft(pool, limits, len(running))
    draft.plan_decodes(running)
    chunks = draft.plan_chunks(running)
    admit: list[Admission] = []
    if draft.tail == len(running):
        admit = draft.plan_admissions(waiting, len(running), match, chunks)
    return Plan(tuple(running[draft.tail :]), tuple(admit), tuple(draft.grow), tuple(draft.decodes), tuple(chunks))


class _Draft:
    """Counters of one planning pass. `running[tail:]` are preempted."""

    def __init__(self, pool: PoolView, limits: StepLimits, num_running: int) -> None:
        self.pool = pool
        self.max_running = limits.max_running
        self.budget = limits.max_batch_tokens
        self.slots = limits.max_running
        self.free = pool.available
        self.tail = num_running
        self.dropped: dict[int, int] = {}
        self.decodes: list[Seq] = []
        self.grow: list[Seq] = []

    def plan_decodes(self, running: Sequence[Seq]) -> None:
        room = min(self.budget, self.slots)
        for index, sequence in enumerate(running):
            if index >= self.tail or len(self.decodes) == room:
                break
            if sequence.state is not SequenceState.DECODING:
                continue
            if sequence.num_computed == len(sequence.blocks) * sequence.block_tokens:
                if not self.free and not self._preempt(running, index + 1):
                    continue
                self.free -= 1
                self.grow.append(sequence)
            self.decodes.append(sequence)
        self.budget -= len(self.decodes)
        self.slots -= len(self.decodes)

    def _preempt(self, running: Sequence[Seq], first: int) -> bool:
        """Preempts from the young end, not beyond `first`, until a block comes free; none at all if none would."""
        dropped, tail, gained = dict(self.dropped), self.tail, 0
        while tail > first and not gained:
            tail -= 1
            for block_id in running[tail].blocks:
                dropped[block_id] = dropped.get(block_id, 0) + 1
                gained += self.pool.ref_count(block_id) == dropped[block_id]
        if not gained:
            return False
        self.dropped, self.tail, self.free = dropped, tail, self.free + gained
        return True

    def plan_chunks(self, running: Sequence[Seq]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in running[: self.tail]:
            if not self.budget or not self.slots:
                break
            if sequence.state is SequenceState.PREFILLING:
                chunks.append(self._chunk(sequence, sequence.num_computed))
        return chunks

    def plan_admissions(
        self, waiting: Sequence[Seq], num_running: int, match: Callable[[Seq], Sequence[int]], chunks: list[Chunk]
    ) -> list[Admission]:
        """Appends the first chunk of each admitted sequence to `chunks`."""
        admit: list[Admission] = []
        revived: set[int] = set()
        for sequence in waiting:
            if not self.budget or not self.slots or num_running + len(admit) >= self.max_running:
                break
            hits = tuple(match(sequence))
            idle = [b for b in hits if b not in revived and not self.pool.ref_count(b)]
            cost = sequence.blocks_for_known - len(hits) + len(idle)
            spare = -(-(num_running + len(admit)) // RUNNING_PER_SPARE_BLOCK)
            if cost + spare > self.free:
                break
            self.free -= cost
            revived.update(idle)
            admit.append(Admission(sequence, hits))
            chunks.append(self._chunk(sequence, len(hits) * sequence.block_tokens))
        return admit

    def _chunk(self, sequence: Seq, start: int) -> Chunk:
        count = min(len(sequence.tokens) - start, self.budget)
        self.budget -= count
        self.slots -= 1
        return Chunk(sequence, count)
