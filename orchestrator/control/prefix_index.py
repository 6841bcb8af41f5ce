"""Which instance has which KV blocks cached, by name. Pure; fed by the caches' own numbered events.

Theory of operation. Each instance numbers the changes of its cache without gaps, within one incarnation. What it tells is
applied in order, or not at all: a number that is missing means that something is not known, so everything that was known of
this instance is void until it has told all of it again (a snapshot). The index therefore never claims a block that an
instance dropped, but for drops whose events are still on their way.

Compactness. A name has one entry: the holders as a bit mask over slots, equal masks being one object. A slot belongs to one
incarnation of one instance. What an instance had is forgotten by retiring its slot, at once; the bits of retired slots are
swept out of the entries when there are several of them, or when room is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.domain.ids import Incarnation, InstanceId
from protos.contract.block_hash import HASH_BYTES

ENTRY_BYTES = 120  # of one name, measured: key, mask, share of the table
DEFAULT_BUDGET_BYTES = 256 * 1024 * 1024
_MAX_RETIRED = 8
_MAX_MASKS = 4096


class Applied(StrEnum):
    """What became of an event."""

    OK = "ok"
    GAP = "gap"  # nothing is known of the instance until its next snapshot


@dataclass(slots=True)
class _Source:
    """One incarnation of an instance. `slot` is none while nothing may be claimed of it."""

    incarnation: Incarnation
    slot: int | None = None
    last_event: int = 0
    is_whole: bool = False  # its snapshot is complete


class PrefixIndex:
    """name -> holders, within `budget_bytes`: names beyond it are not taken in, which only hides blocks that are there."""

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self._limit = max(1, budget_bytes // ENTRY_BYTES)
        self._holders: dict[bytes, int] = {}
        self._masks: dict[int, int] = {}
        self._sources: dict[InstanceId, _Source] = {}
        self._retired = 0  # a bit mask
        self._used = 0  # a bit mask of the slots that some entry may carry
        self.untaken = 0  # names that the budget had no room for, since the start

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def size_bytes(self) -> int:
        """What the entries take, about."""
        return len(self._holders) * ENTRY_BYTES

    def position(self, instance: InstanceId, incarnation: Incarnation) -> int:
        """The last event that was applied; 0 when the next thing to ask for is a snapshot."""
        source = self._sources.get(instance)
        if source is None or source.incarnation != incarnation or not source.is_whole:
            return 0
        return source.last_event

    def snapshot(
        self, instance: InstanceId, incarnation: Incarnation, event: int, names: Sequence[bytes], *, first: bool, last: bool
    ) -> Applied:
        """A part of everything that the instance has cached after `event`; the first part voids what was known."""
        source = self._sources.get(instance)
        if first:
            self._retire(source)
            source = self._sources[instance] = _Source(incarnation, self._new_slot(), event)
        elif source is None or source.incarnation != incarnation or source.is_whole or source.last_event != event:
            return self._lose(instance, incarnation)
        if source.slot is None:
            return Applied.GAP
        self._add(source.slot, names)
        source.is_whole = last
        return Applied.OK

    def apply(
        self,
        instance: InstanceId,
        incarnation: Incarnation,
        event: int,
        stored: Sequence[bytes] = (),
        removed: Sequence[bytes] = (),
    ) -> Applied:
        """One change. An event that was applied before changes nothing; one that leaves a gap voids what was known."""
        source = self._sources.get(instance)
        if source is None or source.incarnation != incarnation or source.slot is None or not source.is_whole:
            return self._lose(instance, incarnation)
        if event <= source.last_event:
            return Applied.OK
        if event != source.last_event + 1:
            return self._lose(instance, incarnation)
        source.last_event = event
        self._remove(source.slot, removed)
        self._add(source.slot, stored)
        return Applied.OK

    def forget(self, instance: InstanceId) -> None:
        """The instance is gone, or cannot be heard any more. Idempotent."""
        self._retire(self._sources.pop(instance, None))

    def instances(self) -> dict[InstanceId, Incarnation]:
        """Of whom something may be claimed."""
        return {name: source.incarnation for name, source in self._sources.items() if source.slot is not None}

    def overlap(self, instance: InstanceId, names: Sequence[bytes]) -> int:
        """How many of these consecutive names, from the first on, the instance has."""
        source = self._sources.get(instance)
        if source is None or source.slot is None:
            return 0
        bit = 1 << source.slot
        for count, name in enumerate(names):
            if not self._holders.get(name, 0) & bit:
                return count
        return len(names)

    def overlaps(self, names: Sequence[bytes]) -> dict[InstanceId, int]:
        """As `overlap`, of every instance that has the first name, in one pass over the names."""
        of_bit = {1 << s.slot: name for name, s in self._sources.items() if s.slot is not None}
        found: dict[InstanceId, int] = {}
        alive = sum(of_bit)
        for count, name in enumerate(names):
            still = alive & self._holders.get(name, 0)
            _note_lost(alive & ~still, of_bit, count, found)
            alive = still
            if not alive:
                break
        _note_lost(alive, of_bit, len(names), found)
        return found

    def longest(self, names: Sequence[bytes]) -> tuple[InstanceId, int] | None:
        """The instance that has the longest run, and its length; of several the smallest name. None when nobody has any."""
        found = self.overlaps(names)
        return min(found.items(), key=lambda item: (-item[1], item[0]), default=None)

    def _lose(self, instance: InstanceId, incarnation: Incarnation) -> Applied:
        source = self._sources.get(instance)
        if source is None or source.incarnation <= incarnation:
            self._retire(source)
            self._sources[instance] = _Source(incarnation)
        return Applied.GAP

    def _add(self, slot: int, names: Sequence[bytes]) -> None:
        bit = 1 << slot
        for name in names:
            if len(name) != HASH_BYTES:
                continue  # no block has such a name
            before = self._holders.get(name)
            if before is None and len(self._holders) >= self._limit and not self._made_room():
                self.untaken += 1
                continue
            self._holders[name] = self._shared((before or 0) & ~self._retired | bit)

    def _remove(self, slot: int, names: Sequence[bytes]) -> None:
        bit = 1 << slot
        for name in names:
            before = self._holders.get(name)
            if before is None or not before & bit:
                continue
            after = before & ~self._retired & ~bit
            if after:
                self._holders[name] = self._shared(after)
            else:
                del self._holders[name]

    def _shared(self, mask: int) -> int:
        if len(self._masks) >= _MAX_MASKS:
            self._masks.clear()
        return self._masks.setdefault(mask, mask)

    def _made_room(self) -> bool:
        if self._retired:
            self._sweep()
        return len(self._holders) < self._limit

    def _new_slot(self) -> int:
        free = ~self._used
        slot = (free & -free).bit_length() - 1
        self._used |= 1 << slot
        return slot

    def _retire(self, source: _Source | None) -> None:
        if source is None or source.slot is None:
            return
        self._retired |= 1 << source.slot
        source.slot = None
        if self._retired.bit_count() >= _MAX_RETIRED:
            self._sweep()

    def _sweep(self) -> None:
        """Takes the bits of retired slots out of every entry; the slots are free again."""
        retired = self._retired
        kept = {name: self._shared(mask & ~retired) for name, mask in self._holders.items() if mask & ~retired}
        self._holders, self._retired = kept, 0
        self._used &= ~retired


def _note_lost(bits: int, of_bit: dict[int, InstanceId], count: int, found: dict[InstanceId, int]) -> None:
    while bits and count:
        bit = bits & -bits
        found[of_bit[bit]] = count
        bits ^= bit
