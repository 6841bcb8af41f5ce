"""Cached blocks go from worker to worker for a shared prefix: oracle engine, gRPC, store. Every token is compared."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from protos.contract.block_hash import block_hashes, root_hash
from tests.support.store import FreshStore
from tests.support.worker_world import BLOCK_TOKENS, MODEL, TIMING, Received, WorkerWorld, prompt, slow, until, worker_world
from workers.engines.oracle.build import oracle_model
from workers.service.host import WorkerHost

LENGTH = 8 * BLOCK_TOKENS + 5
OUTPUT = 3 * BLOCK_TOKENS
PATIENT = TIMING.model_copy(update={"progress_timeout_s": 20.0})  # a fetch may wait for half of it


def run(fresh: FreshStore, scenario: Callable[[WorkerWorld], Awaitable[None]], **engines: dict[str, Any]) -> None:
    async def whole() -> None:
        async with worker_world(fresh) as world:
            for name in ("prefill-0", "prefill-1", "decode-0"):
                await world.start_worker(
                    name, name.split("-")[0], engine=engines.get(name.replace("-", "_"), {}), timing=PATIENT
                )
            await scenario(world)
            await world.clean()

    asyncio.run(whole())


async def first_turn(world: WorkerWorld, p: str = "prefill-0", tokens: int = OUTPUT) -> list[int]:
    """A request that ran on p and decode-0; the tokens whose blocks decode-0 has afterwards."""
    request = await world.submit(prompt(LENGTH), tokens)
    await world.assign(request, p, "decode-0")
    got = await world.answered(request)
    return [*prompt(LENGTH), *got.output]


async def turn(
    world: WorkerWorld, tokens: list[int], p: str = "prefill-1", source: str = "decode-0", **options: Any
) -> Received:
    request = await world.submit(tokens, 4)
    options.setdefault("blocks", len(tokens) // BLOCK_TOKENS)
    await world.assign(request, p, "decode-0", source=source, **options)
    return await world.answered(request)


def failures(world: WorkerWorld, name: str = "prefill-1") -> dict[str, int]:
    return dict(world.hosts[name].parts.prefixes.fetches.failed)


@pytest.mark.parametrize("p", ["prefill-0", "prefill-1"])
def test_the_next_turn_computes_only_what_is_new(fresh_store: FreshStore, p: str) -> None:
    """The blocks that decode-0 generated come to whichever prefill worker the next turn is placed on."""

    async def scenario(world: WorkerWorld) -> None:
        before = await first_turn(world)
        following = [*before, *prompt(7, seed=9)]
        had = LENGTH // BLOCK_TOKENS if p == "prefill-0" else 0
        computed = world.hosts[p].engine.stats().prefill_tokens
        got = await turn(world, following, p)
        line = got.timelines[-1]
        full = (len(before) - 1) // BLOCK_TOKENS  # the last token of the first turn was never fed back
        assert line.cached_tokens == full * BLOCK_TOKENS
        assert line.fetched_tokens == (full - had) * BLOCK_TOKENS
        assert (line.fetch_source, line.fetch_s > 0) == ("decode-0", True)
        assert world.hosts[p].engine.stats().prefill_tokens - computed == len(following) - full * BLOCK_TOKENS
        stats, lent = world.hosts[p].status().stats, world.hosts["decode-0"].status().stats
        assert (stats.fetches, stats.fetched_blocks, lent.lent_blocks) == (1, full - had, full - had)
        assert stats.fetched_bytes == lent.lent_bytes > 0 and not stats.fetches_failed
        assert (stats.handoffs_committed, stats.kv_blocks_received) == (2 if p == "prefill-0" else 1, 0)

    run(fresh_store, scenario)


def test_a_prefill_worker_lends_too_and_decoding_here_needs_no_hand_off(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        await first_turn(world, tokens=2)
        await world.start_worker("combined-0")
        request = await world.submit([*prompt(LENGTH), 7, 8], 4)
        await world.assign(request, "combined-0", "combined-0", source="prefill-0", blocks=8)
        got = await world.answered(request)
        assert got.timelines[-1].fetched_tokens == 8 * BLOCK_TOKENS

    run(fresh_store, scenario)


def test_blocks_that_are_gone_are_said_to_be_gone(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        got = await turn(world, prompt(LENGTH), wait_ms=60_000)
        assert got.timelines[-1].fetched_tokens == 0
        assert got.timelines[-1].fetch_s < 8, "nobody waits for a source that has nothing"
        assert failures(world) == {"STALE_EPOCH": 1}

    run(fresh_store, scenario)


def test_a_source_that_has_fewer_blocks_sends_those(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        await first_turn(world, tokens=2)
        got = await turn(world, [*prompt(LENGTH), *prompt(64, seed=5)], blocks=11)
        assert got.timelines[-1].fetched_tokens == 8 * BLOCK_TOKENS
        assert failures(world) == {}

    run(fresh_store, scenario)


def test_blocks_that_only_host_memory_and_the_disk_have_are_lent(fresh_store: FreshStore, tmp_path: Path) -> None:
    """The second time some bits on the disk are flipped: fewer blocks come, the others are computed, every token is right."""
    tiers = {
        "num_blocks": 24,
        "host_cache_gb": 6 * block_bytes() / 1e9,
        "disk_cache": {"path": str(tmp_path), "gb": 0.01},
        **slow(prefill_tokens_per_s=5_000),
    }

    async def scenario(world: WorkerWorld) -> None:
        lender = world.hosts["prefill-0"]
        for seed in range(1, 7):
            request = await world.submit(prompt(LENGTH, seed), 1)
            await world.assign(request, "prefill-0", "prefill-0")
            await world.answered(request)
        names = [name for seed in (1, 2) for name in prompt_names(lender, prompt(LENGTH, seed))]
        assert lender.engine.match_prefix(names) == 0
        await until(lambda: set(names) <= disk_names(lender), "both are on the disk")
        got = await turn(world, prompt(LENGTH, 1), source="prefill-0")
        assert got.timelines[-1].fetched_tokens == 8 * BLOCK_TOKENS
        flip_bits(tmp_path)
        before = lender.engine.stats()
        got = await turn(world, prompt(LENGTH, 2), source="prefill-0")
        after = lender.engine.stats()
        assert got.timelines[-1].fetched_tokens < 8 * BLOCK_TOKENS
        assert after.corrupt_blocks - before.corrupt_blocks == 1
        stats = lender.status().stats
        assert stats.lent_blocks == world.hosts["prefill-1"].status().stats.fetched_blocks >= 8

    run(fresh_store, scenario, prefill_0=tiers)


def flip_bits(folder: Path) -> None:
    """One in the payload of every third slot."""
    for path in folder.rglob("segment-*.kv"):
        data = bytearray(path.read_bytes())
        for at in range(200, len(data), 3 * 4096):
            data[at] ^= 16
        path.write_bytes(data)


def block_bytes() -> int:
    return oracle_model(MODEL).layout(BLOCK_TOKENS).block_bytes


def prompt_names(host: WorkerHost, tokens: list[int]) -> list[bytes]:
    return block_hashes(root_hash(host.engine.identity.weights_digest, b"salt"), tokens, BLOCK_TOKENS)


def disk_names(host: WorkerHost) -> set[bytes]:
    tiers = host.engine._tiers  # type: ignore[attr-defined]
    names: set[bytes] = tiers.disk.names() - tiers.host.names()
    return names


def test_another_tenants_blocks_have_other_names(fresh_store: FreshStore) -> None:
    """Even a core that is mistaken about it cannot make one tenant hit the blocks of another."""

    async def scenario(world: WorkerWorld) -> None:
        await first_turn(world)
        request = await world.submit(prompt(LENGTH), 4, salt=b"another")
        await world.assign(request, "prefill-1", "decode-0", source="decode-0", blocks=8)
        got = await world.answered(request)
        assert got.timelines[-1].fetched_tokens == got.timelines[-1].cached_tokens == 0
        assert world.hosts["prefill-1"].status().stats.fetched_bytes == 0

    run(fresh_store, scenario)


def test_a_full_target_goes_on_without(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        await first_turn(world, tokens=2)
        holding = await world.submit(prompt(15 * BLOCK_TOKENS, seed=3), 60)
        await world.assign(holding, "prefill-1", "prefill-1")
        await until(lambda: len(world.ingress.of(holding).output) > 2, "it decodes on prefill-1")
        got = await turn(world, prompt(LENGTH))
        assert got.timelines[-1].fetched_tokens == 0
        assert failures(world) == {"OUT_OF_BLOCKS": 1}
        await world.answered(holding)

    run(fresh_store, scenario, prefill_1={"num_blocks": 22, **slow(decode_step_s=0.01)})


def test_a_source_that_is_slow_is_not_waited_for_beyond_the_deadline_and_what_came_counts(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        before = await first_turn(world)
        blocks = 0

        async def reach(point: str) -> None:
            nonlocal blocks
            blocks += point == "handoff.mid_push"
            if blocks > 4:
                await asyncio.sleep(30)

        object.__setattr__(world.hosts["decode-0"].parts.prefixes.lendings._context, "reach", reach)
        got = await turn(world, before, wait_ms=400)
        line = got.timelines[-1]
        assert line.fetched_tokens == line.cached_tokens
        assert line.cached_tokens < len(before) - BLOCK_TOKENS
        assert 0.3 < line.fetch_s < 5
        assert failures(world) == {"TOO_LATE": 1}

    run(fresh_store, scenario)


@pytest.mark.parametrize(
    ("where", "point"),
    [
        ("target", "handoff.before_open"),
        ("target", "handoff.mid_push"),
        ("target", "import.before_commit"),
        ("source", "handoff.mid_push"),
        ("source", "handoff.before_end"),
    ],
)
def test_cancel_at_every_stage_frees_everything(fresh_store: FreshStore, where: str, point: str) -> None:
    async def scenario(world: WorkerWorld) -> None:
        before = await first_turn(world)
        reached = asyncio.Event()

        async def reach(name: str) -> None:
            if name == point:
                reached.set()
                await asyncio.sleep(0.2)

        object.__setattr__(world.hosts["decode-0"].parts.prefixes.lendings._context, "reach", reach)
        world.hosts["prefill-1"].parts.prefixes.receiver._reach = reach
        request = await world.submit(before, 4)
        await world.assign(request, "prefill-1", "decode-0", source="decode-0", blocks=8)
        await reached.wait()
        if where == "target":
            await world.store.cancel(request, "", "operator")
            await world.ended(request, "CANCELLED")
        else:
            world.hosts["decode-0"].parts.prefixes.drop_all()
            await world.answered(request)

    run(fresh_store, scenario)
