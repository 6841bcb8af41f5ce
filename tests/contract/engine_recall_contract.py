"""The contract of engines over lower tiers: what is lent comes back first, beside everything else, and is right or is not lent.

Subclass `RecallContract`, or `RecalledBytesContract` where time and room are not the engine's own, and give it `make_tiered` (a
`TieredFactory`) and `expected`, as for `EngineContract`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import pytest

from tests.contract.driver import Expected, a_prompt, a_request, assert_empty
from tests.contract.engine_prefix_contract import SAMPLING, copy, names_of, root_of
from tests.support.tier_world import HandLanes
from workers.batching.io_lanes import Lane
from workers.batching.paged_engine import PagedEngine
from workers.engine_api.clock import ManualClock
from workers.engine_api.types import EngineStats, PrefixTicket
from workers.kv_tiers.slot_format import HEADER_BYTES

SIZE = 8
LOWER_HOST_BLOCKS, LOWER_DISK_BLOCKS, POOL_BLOCKS = 6, 48, 16
PROMPTS = 8
BLOCKS = 5  # full ones of each prompt
WAIT_S = 4.0


class TieredFactory(Protocol):
    """Makes engines over tiers of LOWER_HOST_BLOCKS and LOWER_DISK_BLOCKS, with blocks of SIZE tokens; io is driven by hand."""

    def __call__(self, folder: Path, lanes: HandLanes, clock: ManualClock, num_blocks: int) -> PagedEngine: ...


class TierWorld:
    """One engine, its io and its clock."""

    def __init__(self, make: TieredFactory, folder: Path, num_blocks: int = POOL_BLOCKS) -> None:
        self.folder, self.lanes, self.clock = folder, HandLanes(), ManualClock()
        self.engine = make(folder, self.lanes, self.clock, num_blocks)
        self.prompts = [a_prompt(self.engine, BLOCKS * SIZE + 3, seed) for seed in range(PROMPTS)]
        self.tickets: list[PrefixTicket] = []
        self.turn = 0

    def io(self) -> None:
        """Lets everything come that is on its way."""
        while True:
            self.engine.has_work()  # takes in what was done, which may lead to more
            self.engine.check_integrity()
            if not sum(self.lanes.run(lane) for lane in Lane):
                return

    def serve(self, which: Iterable[int], expected: Expected | None = None) -> int:
        """Serves these prompts one after the other; how many tokens of the last one were cached."""
        cached = 0
        for index in which:
            self.turn += 1
            self.engine.add(a_request(f"r{self.turn}", self.prompts[index], sampling=SAMPLING))
            cached = self.finish(index, expected)
        return cached

    def finish(self, index: int, expected: Expected | None = None) -> int:
        """Steps until nothing is left to do."""
        tokens, cached = [], 0
        self.io()
        while self.engine.has_work():
            result = self.engine.step()
            tokens += [token.token_id for token in result.tokens]
            cached = result.progress[0].cached_tokens if result.progress else cached
            self.io()
        assert expected is None or tokens == expected(self.prompts[index], SAMPLING)
        return cached

    def fill(self) -> EngineStats:
        """Serves every prompt twice: all are on the disk then, the first ones not in the pool."""
        self.serve([*range(PROMPTS), *range(PROMPTS)])
        stats = self.engine.stats()
        assert stats.disk_blocks >= PROMPTS * BLOCKS
        return stats

    def recall(self, index: int, wait_s: float = WAIT_S) -> int:
        return self.engine.recall_prefix(names_of(self.engine, self.prompts[index]), wait_s, self.tickets.append)

    def in_pool(self, index: int) -> int:
        return self.engine.match_prefix(names_of(self.engine, self.prompts[index]))

    def flip(self, rng: random.Random, slots: int) -> None:
        """Flips one bit of the payload in so many slots that hold something."""
        for path in sorted(self.folder.glob("segment-*.kv")):
            data = bytearray(path.read_bytes())
            used = [at for at in range(0, len(data), self.slot_bytes) if any(data[at : at + 8])]
            for at in rng.sample(used, min(slots, len(used))):
                data[at + HEADER_BYTES + rng.randrange(self.engine.layout.block_bytes)] ^= 1 << rng.randrange(8)
            path.write_bytes(data)

    @property
    def slot_bytes(self) -> int:
        assert self.engine._tiers is not None and self.engine._tiers.disk is not None
        return self.engine._tiers.disk.files.slot_bytes

    def lend_to(self, target: TierWorld, ticket: PrefixTicket, index: int) -> int:
        """Moves what was lent to another engine and gives it back; how many blocks."""
        names = names_of(self.engine, self.prompts[index])[: len(ticket.block_ids)]
        asked = target.engine.import_prefix_begin(root_of(target.engine), names)
        done = copy(self.engine, ticket, target.engine, asked)
        assert target.engine.import_prefix_commit(asked.ticket_id, done) == done
        assert self.engine.export_prefix_end(ticket.ticket_id)
        assert not self.engine.export_prefix_end(ticket.ticket_id)
        return done


class RecalledBytesContract:
    """What every engine over tiers lends of a prefix that somebody else needs."""

    @pytest.fixture
    def world(self, make_tiered: TieredFactory, tmp_path: Path) -> TierWorld:
        return TierWorld(make_tiered, tmp_path / "source")

    def test_what_only_lower_tiers_have_is_lent_and_right(
        self, world: TierWorld, make_tiered: TieredFactory, tmp_path: Path, expected: Expected
    ) -> None:
        before = world.fill()
        target = TierWorld(make_tiered, tmp_path / "target")
        assert world.in_pool(0) == 0
        ticket_id = world.recall(0)
        assert world.tickets == [], "nobody waits for the disk"
        assert world.engine.stats().used_blocks == BLOCKS
        assert world.serve([PROMPTS - 1], expected) > 0, "others go on meanwhile"
        world.io()
        (ticket,) = world.tickets
        assert (ticket.ticket_id, len(ticket.block_ids)) == (ticket_id, BLOCKS)
        after = world.engine.stats()
        back = after.disk_restored_tokens + after.host_restored_tokens
        assert back - before.disk_restored_tokens - before.host_restored_tokens >= BLOCKS * SIZE
        assert world.lend_to(target, ticket, 0) == BLOCKS
        assert target.serve([0], expected) == BLOCKS * SIZE
        assert_empty(world.engine)

    def test_corrupt_blocks_make_the_run_shorter_and_nothing_else(
        self, world: TierWorld, make_tiered: TieredFactory, tmp_path: Path, expected: Expected
    ) -> None:
        assert lend_from_damaged_files(world, make_tiered, tmp_path, expected, seed=3, prompts=2) > 0


class RecallContract(RecalledBytesContract):
    """And what it does with time, room and those who change their minds."""

    def test_a_run_that_lies_in_several_tiers_is_lent_whole(self, world: TierWorld, expected: Expected) -> None:
        world.fill()
        world.recall(0)
        world.io()
        assert world.engine.export_prefix_end(world.tickets.pop().ticket_id)
        world.serve([1, 6])  # pushes some of it out again
        assert world.in_pool(0) < BLOCKS
        world.recall(0)
        world.io()
        assert len(world.tickets.pop().block_ids) == BLOCKS

    @pytest.mark.parametrize("seed", range(4))
    def test_damage_anywhere_makes_runs_shorter_and_nothing_else(
        self, world: TierWorld, make_tiered: TieredFactory, tmp_path: Path, expected: Expected, seed: int
    ) -> None:
        lend_from_damaged_files(world, make_tiered, tmp_path, expected, seed=seed, prompts=4)

    def test_a_disk_that_hangs_is_waited_for_no_longer_than_was_said(self, world: TierWorld, expected: Expected) -> None:
        world.fill()
        world.recall(0)
        limit_s = world.engine.idle_limit_s()
        assert limit_s is not None and 0 < limit_s <= WAIT_S
        world.clock.wait_s(WAIT_S)
        world.engine.has_work()
        assert world.tickets.pop().block_ids == ()
        world.recall(1)
        assert world.tickets.pop().block_ids == (), "nothing new is asked of a disk that hangs"
        assert world.engine.stats().used_blocks == 0
        world.serve([0], expected)

    def test_what_came_in_time_is_lent(self, world: TierWorld) -> None:
        world.fill()
        world.recall(0)
        (job,) = world.lanes.waiting[Lane.FETCH]
        job.sources = job.sources[:2]  # type: ignore[attr-defined] # the others take too long
        job.run()
        world.clock.wait_s(WAIT_S)
        world.engine.has_work()
        assert len(world.tickets.pop().block_ids) == 2

    def test_who_cannot_wait_gets_what_is_in_the_pool(self, world: TierWorld) -> None:
        world.fill()
        for index in (0, PROMPTS - 1):
            world.recall(index, wait_s=0.0)
            assert len(world.tickets.pop().block_ids) == world.in_pool(index) == (BLOCKS if index else 0)

    def test_who_does_not_wait_any_more_is_not_told(self, world: TierWorld, expected: Expected) -> None:
        world.fill()
        ticket_id = world.recall(0)
        assert world.engine.export_prefix_end(ticket_id)
        assert not world.engine.export_prefix_end(ticket_id)
        assert world.engine.stats().used_blocks == 0
        world.io()
        assert world.tickets == []
        world.serve(range(PROMPTS), expected)

    @pytest.mark.parametrize("first", ["peer", "prompt"])
    def test_a_prompt_and_a_peer_wait_for_one_fetch(self, world: TierWorld, expected: Expected, first: str) -> None:
        world.fill()
        if first == "peer":
            world.recall(0)
        world.engine.add(a_request("own", world.prompts[0], sampling=SAMPLING))
        if first == "prompt":
            world.recall(0)
        assert world.engine.stats().restoring == 1
        assert len(world.lanes.waiting[Lane.FETCH]) == 1
        assert world.finish(0, expected) == BLOCKS * SIZE
        assert len(world.tickets.pop().block_ids) == BLOCKS

    def test_running_sequences_keep_their_room(self, make_tiered: TieredFactory, tmp_path: Path) -> None:
        """Whatever is recalled, no sequence is preempted for it: room is left, and given up as sequences grow."""
        world = TierWorld(make_tiered, tmp_path / "small", num_blocks=12)
        world.fill()
        preempted, recalled = world.engine.stats().preemptions, 0
        world.engine.add(a_request("long", a_prompt(world.engine, 30, 99), max_tokens=12 * SIZE - 30))
        while world.engine.has_work():
            world.engine.step()
            world.recall(world.turn % PROMPTS)
            world.turn += 1
            if not world.tickets:
                stats = world.engine.stats()
                assert stats.free_blocks + stats.cached_blocks >= stats.running, "every running sequence has room for one block"
                recalled += 1
            for ticket in world.tickets:
                world.engine.export_prefix_end(ticket.ticket_id)
            world.tickets.clear()
            assert world.engine.stats().preemptions == preempted
            world.engine.check_integrity()
        assert recalled > 0, "the case is not the one that is meant"
        world.io()
        for ticket in world.tickets:
            world.engine.export_prefix_end(ticket.ticket_id)
        assert_empty(world.engine)


def lend_from_damaged_files(
    world: TierWorld, make: TieredFactory, tmp_path: Path, expected: Expected, *, seed: int, prompts: int
) -> int:
    """Lends some prompts' blocks while files are damaged; whatever arrives is right. How many blocks were found corrupt."""
    before, rng = world.fill(), random.Random(seed)
    world.flip(rng, 3 + 12 * seed)
    lent = 0
    for index in rng.sample(range(PROMPTS // 2), prompts):  # the later ones are in the pool
        world.recall(index)
        world.io()
        ticket = world.tickets.pop()
        target = TierWorld(make, tmp_path / f"target-{index}")
        lent += world.lend_to(target, ticket, index)
        assert target.serve([index], expected) == len(ticket.block_ids) * SIZE
    corrupt = world.engine.stats().corrupt_blocks - before.corrupt_blocks
    assert (corrupt > 0) == (lent < prompts * BLOCKS), "what was not lent was corrupt"
    assert_empty(world.engine)
    return corrupt
