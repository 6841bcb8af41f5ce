"""Seeded traffic through pool, host memory and disk: right tokens, exact books, whatever happens to the files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tier_world import HandLanes, tiered
from workers.batching.io_lanes import Lane
from workers.batching.paged_engine import PagedEngine
from workers.engine_api.block_files import StoredBlock
from workers.engine_api.clock import ManualClock
from workers.engine_api.types import DiskAudit, EngineRequest, EngineStats, SamplingParams
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.reference import expected_tokens

MODEL = OracleModel("traffic", num_layers=2, context_tokens=256)
SIZE = 4
SAMPLING = SamplingParams(max_tokens=2)
PROMPTS = [tuple(random.Random(seed).choices(range(3, 200), k=25)) for seed in range(8)]
RIGHT = [expected_tokens(MODEL, prompt, SAMPLING) for prompt in PROMPTS]


class World:
    """One engine whose io the test drives; `serve` runs prompts to their end and checks every token."""

    def __init__(self, folder: Path, *, host_blocks: int = 8, disk_blocks: int = 64, num_blocks: int = 10) -> None:
        self.lanes, self.clock = HandLanes(), ManualClock()
        self.engine: PagedEngine = tiered(
            MODEL,
            num_blocks=num_blocks,
            block_tokens=SIZE,
            host_blocks=host_blocks,
            folder=folder,
            disk_blocks=disk_blocks,
            lanes=self.lanes,
            clock=self.clock,
        )
        self.names: set[bytes] = set()
        self.turn = 0

    def io(self) -> None:
        while True:
            self.engine.has_work()  # takes in what was done, which may lead to more
            if not sum(self.lanes.run(lane) for lane in Lane):
                return

    def serve(self, *which: int) -> EngineStats:
        for index in which:
            self.add(index)
            self.finish(index)
        return self.engine.stats()

    def add(self, index: int) -> None:
        self.turn += 1
        request = EngineRequest(request_id=f"r{self.turn}", epoch=1, prompt=PROMPTS[index], sampling=SAMPLING)
        self.engine.add(request)

    def finish(self, index: int) -> None:
        tokens: list[int] = []
        self.io()
        while self.engine.has_work():
            tokens += [token.token_id for token in self.engine.step().tokens]
            self.check()
            self.io()
        assert tokens == RIGHT[index], "a wrong block was read"
        self.check()

    def check(self) -> None:
        self.engine.check_integrity()
        for event in self.engine.drain_cache_events():
            assert not self.names & set(event.stored)
            assert self.names >= set(event.removed)
            self.names = (self.names | set(event.stored)) - set(event.removed)
        assert self.names == self.engine.known_names()

    def to_disk(self) -> EngineStats:
        """Serves every prompt twice: all of them are on the disk then, the first ones nowhere else."""
        self.serve(*range(8), *range(8))
        stats = self.engine.stats()
        assert stats.disk_blocks == 48, stats
        return stats


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "kv")
    yield world
    world.engine.close()


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "kv").glob("segment-*.kv"))


def test_what_memory_gave_up_comes_back_from_the_disk(world: World) -> None:
    before = world.to_disk()
    after = world.serve(0, 1)
    assert after.disk_restored_tokens - before.disk_restored_tokens > 0
    assert after.prefill_tokens - before.prefill_tokens == 2, "one token of each prompt is left to compute"
    assert (after.corrupt_blocks, after.tier_errors, after.tier_off_reason) == (0, 0, "")


def test_a_new_process_finds_what_the_last_one_wrote(world: World, tmp_path: Path) -> None:
    world.to_disk()
    names = world.engine.known_names()
    world.engine.close()
    heir = World(tmp_path / "kv")
    heir.io()
    heir.check()
    assert (len(heir.names), heir.names <= names) == (48, True)
    after = heir.serve(3, 5)
    assert (after.prefill_tokens, after.disk_restored_tokens) == (2, 48)
    heir.engine.close()


def test_others_go_on_while_a_prompt_waits_for_the_disk(world: World) -> None:
    world.to_disk()
    world.add(0)
    assert world.engine.stats().restoring == 1
    assert not world.engine.has_work(), "nothing else is there to run"
    world.add(0)
    assert (world.engine.stats().restoring, len(world.lanes.waiting[Lane.FETCH])) == (2, 1), "one fetch for both"
    fresh = tuple(range(100, 110))
    world.engine.add(EngineRequest(request_id="other", epoch=1, prompt=fresh, sampling=SAMPLING))
    tokens = [token for _ in range(5) if world.engine.has_work() for token in world.engine.step().tokens]
    assert [token.request_id for token in tokens] == ["other", "other"]
    assert world.engine.abort(f"r{world.turn}", 1)
    assert world.engine.stats().restoring == 1
    world.finish(0)


def test_a_disk_that_hangs_is_not_waited_for(world: World) -> None:
    world.to_disk()
    world.add(0)
    limit_s = world.engine.idle_limit_s()
    assert limit_s is not None
    assert 0 < limit_s <= 10
    world.clock.wait_s(limit_s)
    assert world.engine.has_work(), "the deadline is over: the prompt is computed"
    tokens: list[int] = []
    while world.engine.has_work():
        tokens += [token.token_id for token in world.engine.step().tokens]
        world.check()
    assert tokens == RIGHT[0]
    world.io()  # the late fetch writes into no block of anybody
    world.check()
    world.serve(*range(8))


def test_the_last_waiter_takes_its_fetch_along(world: World) -> None:
    world.to_disk()
    world.add(0)
    assert world.engine.stats().used_blocks == 6
    assert world.engine.abort(f"r{world.turn}", 1)
    assert world.engine.stats().used_blocks == 0
    world.io()
    world.check()
    world.serve(0, 4)


def test_a_block_that_was_read_too_late_is_written_nowhere(world: World) -> None:
    """Its prompt is aborted while the io thread reads, and what was reserved for it belongs to another one by then."""
    world.to_disk()
    assert world.engine._tiers is not None and world.engine._tiers.disk is not None
    files = world.engine._tiers.disk.files
    read, prompt, tokens = files.read, tuple(range(100, 137)), list[int]()

    def read_slowly(slot: int, block: StoredBlock, into: memoryview) -> bool:
        right = read(slot, block, into)
        assert world.engine.abort(f"r{world.turn}", 1)
        world.engine.add(EngineRequest(request_id="other", epoch=1, prompt=prompt, sampling=SAMPLING))
        for _ in range(2):
            tokens.extend(token.token_id for token in world.engine.step().tokens)
        assert world.engine.stats().used_blocks == 10, "all blocks of the pool"
        return right

    files.read = read_slowly  # type: ignore[method-assign]
    world.add(0)
    world.lanes.run(Lane.FETCH)
    while world.engine.has_work():
        tokens.extend(token.token_id for token in world.engine.step().tokens)
        world.check()
    assert tokens == expected_tokens(MODEL, prompt, SAMPLING), "a block of another prompt was overwritten"


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 40, 56, 72, 88, 104, 150, 231])
def test_one_flipped_bit_anywhere_costs_one_block_and_no_token(world: World, tmp_path: Path, offset: int) -> None:
    before = world.to_disk()
    for path in segments(tmp_path):
        data = bytearray(path.read_bytes())
        for slot in range(0, len(data), 4096):
            data[slot + offset] ^= 1 << (slot // 4096 % 8)
        path.write_bytes(data)
    after = world.serve(0, 1)
    assert after.corrupt_blocks == before.corrupt_blocks + 2, "the first bad block ends the fetch of each prompt"
    assert after.prefill_tokens - before.prefill_tokens >= 2 * 24 - 8 * SIZE
    assert after.disk_restored_tokens == before.disk_restored_tokens


@pytest.mark.parametrize("damage", ["truncated", "swapped", "zeroed", "of another model"])
def test_files_that_are_not_what_was_written(world: World, tmp_path: Path, damage: str) -> None:
    before = world.to_disk()
    for path in segments(tmp_path):
        data = path.read_bytes()
        match damage:
            case "truncated":
                data = data[: 4096 + 50]
            case "swapped":
                slots = [data[at : at + 4096] for at in range(0, len(data), 4096)]
                data = b"".join(slots[1:] + slots[:1])
            case "zeroed":
                data = bytes(len(data))
            case _:
                other = World(tmp_path / "other" / "kv")
                other.to_disk()
                foreign = OracleModel("foreign", num_layers=2, context_tokens=256)
                assert foreign.identity.weights_digest != MODEL.identity.weights_digest
                data = foreign_segment(tmp_path, foreign, data)
        path.write_bytes(data)
    after = world.serve(*range(8))
    assert after.corrupt_blocks > before.corrupt_blocks
    assert after.disk_restored_tokens - before.disk_restored_tokens <= SIZE, "only a first slot that is whole may count"


def foreign_segment(tmp_path: Path, model: OracleModel, like: bytes) -> bytes:
    """The same prompts, written by an engine of another model."""
    from workers.kv_tiers.slot_format import HEADER_BYTES, fingerprint_key, pack_header, parse_header

    ours = fingerprint_key(MODEL.identity, MODEL.layout(SIZE))
    theirs = fingerprint_key(model.identity, model.layout(SIZE))
    size = MODEL.layout(SIZE).block_bytes
    out = bytearray(like)
    for at in range(0, len(like), 4096):
        header = parse_header(like[at : at + HEADER_BYTES], ours, size)
        if header is not None:
            payload = memoryview(like)[at + HEADER_BYTES : at + HEADER_BYTES + size]
            block: StoredBlock = header[0]
            out[at : at + HEADER_BYTES] = pack_header(theirs, block, payload)
    return bytes(out)


def test_an_audit_of_the_disk_finds_what_is_corrupt_and_nothing_else(world: World, tmp_path: Path) -> None:
    before, told = world.to_disk(), list[DiskAudit]()
    world.engine.audit_disk(20, 1, told.append)
    assert told == [] and not world.engine.has_work(), "nobody waits for it"
    world.serve(*range(8))  # blocks that are looked at are not written over meanwhile
    assert told.pop() == DiskAudit(checked=20)
    flipped = 0
    for path in segments(tmp_path):
        data = bytearray(path.read_bytes())
        for slot in range(0, len(data), 4096 * 5):
            flipped += any(data[slot : slot + 8])
            data[slot + 120] ^= 4
        path.write_bytes(data)
    world.engine.audit_disk(1000, 2, told.append)
    world.engine.audit_disk(1000, 2, told.append)
    assert told.pop() == DiskAudit(), "one at a time"
    world.io()
    (found,) = told
    assert (found.checked, len(found.corrupt), found.error) == (before.disk_blocks, flipped, "")
    after = world.engine.stats()
    assert after.corrupt_blocks == before.corrupt_blocks + flipped
    assert after.disk_blocks == before.disk_blocks - flipped
    world.check()
    world.serve(*range(8))


def test_a_full_disk_turns_the_tier_off_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    world = World(tmp_path / "kv")
    stats = world.serve(*range(8), *range(8))
    assert (stats.disk_blocks, "No space" in stats.tier_off_reason, stats.tier_errors > 0) == (0, True, True)
    assert segments(tmp_path) == []
    monkeypatch.undo()
    world.clock.wait_s(31)
    stats = world.serve(*range(8))
    assert stats.disk_blocks > 0
    assert stats.tier_off_reason == ""
    world.engine.close()


def test_a_folder_that_goes_away_and_one_that_cannot_be_used(tmp_path: Path) -> None:
    import shutil

    world = World(tmp_path / "kv")
    world.to_disk()
    shutil.rmtree(tmp_path / "kv")
    world.serve(*range(8))
    world.engine.close()
    (tmp_path / "file").write_text("no folder")
    blocked = World(tmp_path / "file")
    stats = blocked.serve(0, 1, 0)
    assert stats.tier_off_reason != ""
    assert stats.disk_blocks == 0
    blocked.engine.close()


def test_two_engines_never_share_a_folder(world: World, tmp_path: Path) -> None:
    world.to_disk()
    second = World(tmp_path / "kv")
    stats = second.serve(0, 1)
    assert "in use by process" in stats.tier_off_reason
    assert (stats.disk_blocks, stats.disk_restored_tokens) == (0, 0)
    world.engine.close()
    second.clock.wait_s(31)
    second.io()
    assert second.serve(2).disk_restored_tokens == 24, "the folder is taken over when its owner is gone"
    second.engine.close()


def test_the_budget_and_the_modes_of_the_files(world: World, tmp_path: Path) -> None:
    world.to_disk()
    folder = tmp_path / "kv"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 64 * 4096
    world.engine.close()
    smaller = World(tmp_path / "kv", disk_blocks=10)
    smaller.serve(*range(8))
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 10 * 4096
    assert smaller.engine.stats().disk_blocks <= 10
    smaller.engine.close()


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_with_late_io_and_damaged_files(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    world = World(tmp_path / "kv", host_blocks=rng.randrange(4, 12), disk_blocks=rng.randrange(30, 60))
    for turn in range(120):
        world.serve(rng.randrange(8))
        if turn % 5 == 4:
            for path in segments(tmp_path):
                data = bytearray(path.read_bytes())
                data[rng.randrange(0, len(data), 4096) + rng.randrange(232)] ^= 1 << rng.randrange(8)
                path.write_bytes(data)
    stats = world.engine.stats()
    assert stats.host_restored_tokens + stats.disk_restored_tokens > 0
    assert stats.corrupt_blocks > 0
    world.engine.close()
