"""The index follows the caches of real workers, through evictions, gaps, broken streams and restarts."""

from __future__ import annotations

import asyncio

from orchestrator.control.prefix_index import PrefixIndex
from orchestrator.domain.ids import InstanceId
from orchestrator.domain.view import ClusterView
from orchestrator.runtime.cache_watch import CacheWatch
from orchestrator.runtime.prefix_facts import PrefixFacts
from orchestrator.store.views import cluster_view
from tests.support.store import FreshStore
from tests.support.worker_world import BLOCK_TOKENS, WorkerWorld, prompt, until, worker_world
from workers.engine_api.types import CacheEvent

A, B = InstanceId("combined-0"), InstanceId("combined-1")


async def view_of(world: WorkerWorld) -> ClusterView:
    return cluster_view(await world.store.view())


async def serve(world: WorkerWorld, name: str, length: int, seed: int) -> None:
    request = await world.submit(prompt(length, seed), 2)
    await world.assign(request, name, name)
    await world.answered(request)


def claimed(index: PrefixIndex, name: InstanceId) -> set[bytes]:
    source = index._sources.get(name)
    if source is None or source.slot is None:
        return set()
    return {held for held, mask in index._holders.items() if mask >> source.slot & 1}


async def is_true(world: WorkerWorld, index: PrefixIndex, name: InstanceId) -> bool:
    """The index has exactly what the engine has."""
    names = claimed(index, name)
    host = world.hosts[name]
    has = await host._thread.call(lambda engine: sum(engine.match_prefix((one,)) for one in names))
    return has == len(names) == host.engine.stats().cached_blocks > 0


def test_the_index_is_true_after_evictions_gaps_and_restarts(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            index = PrefixIndex()
            watch = CacheWatch(index)
            try:
                await world.start_worker(A, engine={"num_blocks": 24})
                await world.start_worker(B)
                watch.follow((await view_of(world)).instances)
                for seed in range(5):
                    await serve(world, A, 8 * BLOCK_TOKENS + seed, seed)
                await serve(world, B, 5 * BLOCK_TOKENS, 1)
                for name in (A, B):
                    await until(lambda name=name: is_true(world, index, name), f"the index is true of {name}")
                assert len(claimed(index, A)) <= 24, "what was evicted is not claimed"

                feed = world.hosts[A].parts.prefixes.feed
                feed.take((CacheEvent(feed._last_event + 3),))  # as if the engine had dropped two events
                world.hosts[A]._thread.engine._ledger._cache._last_event += 3  # type: ignore[attr-defined]
                await serve(world, A, 8 * BLOCK_TOKENS, 77)
                await until(lambda: is_true(world, index, A), "the index is true again")

                before = world.hosts[A].me.number
                world.hosts[A].request_stop(0.0)
                await world.codes[A]
                watch.follow((await view_of(world)).instances)
                assert claimed(index, A) == set(), "an instance that is gone has nothing"
                await world.start_worker(A)
                assert world.hosts[A].me.number > before
                watch.follow((await view_of(world)).instances)
                await serve(world, A, 4 * BLOCK_TOKENS, 3)
                await until(lambda: is_true(world, index, A), "its next incarnation is followed")
                assert await is_true(world, index, B)
            finally:
                await watch.close()

    asyncio.run(scenario())


def test_a_view_says_who_has_the_blocks_of_its_requests(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            facts = PrefixFacts(world.store)
            try:
                await world.start_worker(A)
                await world.start_worker(B)
                await facts.complete(await view_of(world))
                await serve(world, A, 6 * BLOCK_TOKENS, 1)
                await until(lambda: is_true(world, facts.index, A), "the index is true")
                same = await world.submit([*prompt(6 * BLOCK_TOKENS, 1), 9], 2)
                shorter = await world.submit([*prompt(6 * BLOCK_TOKENS, 1)[: 3 * BLOCK_TOKENS], 9, 9], 2)
                foreign = await world.submit(prompt(6 * BLOCK_TOKENS, 1), 2, salt=b"another tenant")
                found = {one.request_id: one.cached for one in (await facts.complete(await view_of(world))).queued}
                assert found == {same: ((A, 6),), shorter: ((A, 3),), foreign: ()}
            finally:
                await facts.close()

    asyncio.run(scenario())
