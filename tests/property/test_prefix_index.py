"""The prefix index against a slow twin, while events are lost, doubled and reordered and instances start again."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field

import pytest

from orchestrator.control.prefix_index import ENTRY_BYTES, Applied, PrefixIndex
from orchestrator.domain.ids import Incarnation, InstanceId

NAMES = [bytes([at]) * 16 for at in range(24)]
Change = tuple[int, tuple[bytes, ...], tuple[bytes, ...]]


@dataclass
class Cache:
    """One instance as it really is, with everything that it ever told in this incarnation."""

    incarnation: int = 1
    held: set[bytes] = field(default_factory=set)
    told: list[Change] = field(default_factory=list)
    states: list[set[bytes]] = field(default_factory=lambda: [set()])  # what was held after each event

    def change(self, rng: random.Random) -> None:
        """Stores or removes a few blocks, as one event."""
        absent, present = sorted(set(NAMES) - self.held), sorted(self.held)
        stores = bool(absent) and (not present or rng.random() < 0.6)
        some = tuple(rng.sample(absent if stores else present, k=min(3, len(absent if stores else present))))
        self.held = self.held | set(some) if stores else self.held - set(some)
        self.told.append((len(self.told) + 1, some if stores else (), () if stores else some))
        self.states.append(set(self.held))

    def restart(self) -> None:
        self.incarnation += 1
        self.held, self.told, self.states = set(), [], [set()]


class Wire:
    """Brings the events of one cache, badly, and snapshots when they are asked for."""

    def __init__(self, name: str, index: PrefixIndex) -> None:
        self.name, self.index, self.cache = InstanceId(name), index, Cache()
        self.sent = 0
        self.needs_snapshot = True
        self.gaps = 0

    def snapshot(self, rng: random.Random, event: int | None = None) -> None:
        at = len(self.cache.told) if event is None else event
        names = sorted(self.cache.states[at])
        cut = rng.randrange(len(names) + 1)
        incarnation = Incarnation(self.cache.incarnation)
        for part, first in ((names[:cut], True), (names[cut:], False)):
            outcome = self.index.snapshot(self.name, incarnation, at, part, first=first, last=not first)
            assert outcome is Applied.OK
        self.sent, self.needs_snapshot = at, False

    def bring(self, change: Change, incarnation: int | None = None) -> Applied:
        event, stored, removed = change
        return self.index.apply(
            self.name, Incarnation(incarnation or self.cache.incarnation), event, stored=stored, removed=removed
        )

    def step(self, rng: random.Random) -> None:
        """One thing that may happen on the way."""
        dice = rng.random()
        pending = self.cache.told[self.sent :]
        if self.needs_snapshot:
            if dice < 0.5:
                self.snapshot(rng)
            return
        if not pending:
            return
        if dice < 0.1 and self.sent:  # doubled
            assert self.bring(self.cache.told[rng.randrange(self.sent)]) is Applied.OK
        elif dice < 0.2 and len(pending) > 1:  # lost, or overtaken by a later one
            assert self.bring(rng.choice(pending[1:])) is Applied.GAP
            self.needs_snapshot, self.gaps = True, self.gaps + 1
        else:
            assert self.bring(pending[0]) is Applied.OK
            self.sent += 1


def slow_overlap(held: set[bytes], names: list[bytes]) -> int:
    """The obviously right count."""
    count = 0
    while count < len(names) and names[count] in held:
        count += 1
    return count


def compare(index: PrefixIndex, known: dict[str, set[bytes]], rng: random.Random) -> None:
    for _ in range(4):
        names = rng.sample(NAMES, k=rng.randrange(1, 6))
        wanted = {name: slow_overlap(held, names) for name, held in known.items()}
        for name, count in wanted.items():
            assert index.overlap(InstanceId(name), names) == count
        assert index.overlaps(names) == {name: count for name, count in wanted.items() if count}
        best = max(wanted.values(), default=0)
        first = min((name for name, count in wanted.items() if count == best), default="")
        assert index.longest(names) == ((first, best) if best else None)


@pytest.mark.parametrize("seed", range(24))
def test_what_is_claimed_is_what_was_told_and_never_more(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex()
    wires = {name: Wire(name, index) for name in ("a", "b", "c")}
    for _ in range(300):
        wire = rng.choice(list(wires.values()))
        dice = rng.random()
        if dice < 0.4:
            wire.cache.change(rng)
        elif dice < 0.42:
            wire.cache.restart()
            index.forget(wire.name)
            wire.sent, wire.needs_snapshot = 0, True
        elif dice < 0.44 and wire.cache.incarnation > 1:
            late = (rng.randrange(1, 9), (NAMES[0],), ())
            assert wire.bring(late, wire.cache.incarnation - 1) is Applied.GAP, "an earlier incarnation is not heard"
        else:
            wire.step(rng)
        # Of an instance that lost an event nothing is claimed; of the others exactly what they had when they told it.
        known = {n: set() if w.needs_snapshot else w.cache.states[w.sent] for n, w in wires.items()}
        compare(index, known, rng)
    for wire in wires.values():
        if wire.needs_snapshot or rng.random() < 0.5:
            wire.snapshot(rng)
        while wire.sent < len(wire.cache.told):
            assert wire.bring(wire.cache.told[wire.sent]) is Applied.OK
            wire.sent += 1
    compare(index, {name: wire.cache.held for name, wire in wires.items()}, rng)
    assert sum(wire.gaps for wire in wires.values()) > 0, "nothing was lost: the test shows nothing"


def test_a_snapshot_part_that_is_missing_is_a_gap() -> None:
    index, a, one = PrefixIndex(), InstanceId("a"), Incarnation(1)
    assert index.snapshot(a, one, 5, NAMES[:2], first=True, last=False) is Applied.OK
    assert index.position(a, one) == 0, "half a snapshot is no position to go on from"
    assert index.apply(a, one, 6, stored=NAMES[2:3]) is Applied.GAP
    assert index.snapshot(a, one, 5, NAMES[2:4], first=False, last=True) is Applied.GAP
    assert index.overlaps(NAMES) == {}
    assert index.snapshot(a, one, 7, NAMES[:3], first=True, last=True) is Applied.OK
    assert (index.position(a, one), index.overlap(a, NAMES)) == (7, 3)


def test_names_of_another_length_are_nobodys() -> None:
    index, a, one = PrefixIndex(), InstanceId("a"), Incarnation(1)
    index.snapshot(a, one, 1, [b"short", b"x" * 17, NAMES[0]], first=True, last=True)
    assert len(index) == 1


def test_the_budget_holds_and_what_was_forgotten_makes_room() -> None:
    index, one = PrefixIndex(budget_bytes=10 * ENTRY_BYTES), Incarnation(1)
    index.snapshot(InstanceId("a"), one, 1, NAMES[:12], first=True, last=True)
    assert (len(index), index.untaken, index.overlap(InstanceId("a"), NAMES)) == (10, 2, 10)
    index.snapshot(InstanceId("b"), one, 1, NAMES[12:], first=True, last=True)
    assert (len(index), index.overlap(InstanceId("b"), NAMES[12:])) == (10, 0)
    index.forget(InstanceId("a"))
    index.snapshot(InstanceId("b"), one, 1, NAMES[12:], first=True, last=True)
    assert (len(index), index.overlap(InstanceId("b"), NAMES[12:])) == (10, 10)


def test_slots_are_used_again() -> None:
    index = PrefixIndex()
    for number in range(1, 200):
        index.snapshot(InstanceId("a"), Incarnation(number), 1, NAMES, first=True, last=True)
        assert index.overlap(InstanceId("a"), NAMES) == len(NAMES)
    assert index._used.bit_length() <= 16, "masks do not grow with the number of restarts"


def test_an_entry_takes_what_the_budget_counts() -> None:
    """Two instances that share half of their blocks."""
    rng = random.Random(1)
    names = [rng.randbytes(16) for _ in range(60_000)]
    index = PrefixIndex()
    index.snapshot(InstanceId("a"), Incarnation(1), 1, names[:40_000], first=True, last=True)
    index.snapshot(InstanceId("b"), Incarnation(1), 1, names[20_000:], first=True, last=True)
    taken = sys.getsizeof(index._holders) + sum(sys.getsizeof(name) for name in index._holders)
    taken += sum(sys.getsizeof(mask) for mask in index._masks.values())
    assert taken / len(index) <= ENTRY_BYTES
