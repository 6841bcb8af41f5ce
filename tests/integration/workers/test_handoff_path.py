"""The way of a request through real workers: oracle engine, gRPC, store. Every token is compared with the reference."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.store import FreshStore
from tests.support.worker_world import BLOCK_TOKENS, TIMING, prompt, slow, until, worker_world
from workers.service.lifecycle import ExitCode, InstanceState


def test_a_request_crosses_from_prefill_to_decode(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            p = await world.start_worker("prefill-0", "prefill")
            d = await world.start_worker("decode-0", "decode")
            request = await world.submit(prompt(300), 24)
            await world.assign(request, "prefill-0", "decode-0")
            got = await world.answered(request)
            await world.clean()
            blocks = -(-300 // BLOCK_TOKENS)
            assert p.parts.counters.kv_blocks_sent == d.parts.counters.kv_blocks_received == blocks
            assert p.parts.counters.handoffs_committed == 1
            timeline = got.timelines[-1]
            assert (timeline.prefill_instance, timeline.decode_instance) == ("prefill-0", "decode-0")
            assert timeline.handoff_blocks == blocks and timeline.prefill_chunks == 5
            assert timeline.handoff_exposed_s > 0 and timeline.handoff_bytes == blocks * d.engine.layout.block_bytes
            assert got.senders == {"prefill-0", "decode-0"}

    asyncio.run(scenario())


def test_blocks_travel_while_later_chunks_compute(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            p = await world.start_worker("prefill-0", "prefill", engine=slow(prefill_tokens_per_s=400.0))
            d = await world.start_worker("decode-0", "decode")
            request = await world.submit(prompt(384), 4)
            await world.assign(request, "prefill-0", "decode-0")
            await until(lambda: d.parts.counters.kv_blocks_received >= 8, "blocks of the first chunks are there")
            assert p.engine.stats().prefill_tokens < 384, "the prefill is over already"
            assert d.engine.stats().running == 0
            got = await world.answered(request)
            timeline = got.timelines[-1]
            assert timeline.handoff_exposed_s < timeline.prefill_s / 2
            assert 0 < timeline.handoff_hidden_s <= timeline.handoff_s
            await world.clean()

    asyncio.run(scenario())


@pytest.mark.parametrize("length", [1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 4 * BLOCK_TOKENS])
def test_every_shape_of_the_last_block(fresh_store: FreshStore, length: int) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            await world.start_worker("decode-0", "decode")
            request = await world.submit(prompt(length, seed=length), 9)
            await world.assign(request, "prefill-0", "decode-0")
            await world.answered(request)
            await world.clean()

    asyncio.run(scenario())


def test_only_the_missing_suffix_travels(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            p = await world.start_worker("prefill-0", "prefill")
            await world.start_worker("decode-0", "decode")
            shared = prompt(8 * BLOCK_TOKENS)
            first = await world.submit(shared + prompt(20, seed=2), 6)
            await world.assign(first, "prefill-0", "decode-0")
            await world.answered(first)
            sent = p.parts.counters.kv_blocks_sent
            second = await world.submit(shared + prompt(40, seed=3), 6)
            await world.assign(second, "prefill-0", "decode-0")
            timeline = (await world.answered(second)).timelines[-1]
            assert timeline.handoff_reused_blocks == 8 and timeline.cached_tokens == 8 * BLOCK_TOKENS
            assert p.parts.counters.kv_blocks_sent - sent == timeline.handoff_blocks == 3
            await world.clean()

    asyncio.run(scenario())


def test_a_first_token_that_ends_the_request_needs_no_hand_off(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            p = await world.start_worker("prefill-0", "prefill")
            await world.start_worker("decode-0", "decode")
            by_length = await world.submit(prompt(50), 1)
            await world.assign(by_length, "prefill-0", "decode-0")
            first = (await world.answered(by_length)).output[0]
            by_stop = await world.submit(prompt(50), 20, stop_token_ids=[first])
            await world.assign(by_stop, "prefill-0", "decode-0")
            assert (await world.answered(by_stop)).output == [first]
            await world.clean()
            assert p.parts.counters.handoffs_committed == 0 and p.parts.counters.handoffs_failed == 0

    asyncio.run(scenario())


def test_prefill_and_decode_on_one_instance(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            host = await world.start_worker("combined-0")
            requests = [await world.submit(prompt(90, seed=i), 12) for i in range(4)]
            for request in requests:
                await world.assign(request, "combined-0", "combined-0")
            for request in requests:
                assert (await world.answered(request)).senders == {"combined-0"}
            await world.clean()
            assert host.parts.counters.kv_blocks_sent == 0 and host.parts.ledger.opened == 0

    asyncio.run(scenario())


def test_many_at_once_seeded_and_greedy(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill", engine={"num_blocks": 400})
            await world.start_worker("prefill-1", "prefill", engine={"num_blocks": 400})
            await world.start_worker("decode-0", "decode", engine={"num_blocks": 600})
            requests = []
            for i in range(40):
                sampling = {"temperature": 0.8, "seed": i} if i % 2 else {}
                requests.append(await world.submit(prompt(40 + 7 * i, seed=i), 16, **sampling))
                await world.assign(requests[-1], f"prefill-{i % 2}", "decode-0")
            for request in requests:
                await world.answered(request)
            await world.clean()
            # One message holds the tokens of a whole step: far fewer messages than tokens.
            assert world.ingress.batches < 40 * 16 / 2

    asyncio.run(scenario())


def test_a_full_decode_pool_is_waited_for(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            d = await world.start_worker("decode-0", "decode", engine={"num_blocks": 12} | slow(decode_step_s=0.01))
            requests = [await world.submit(prompt(100, seed=i), 20) for i in range(4)]
            for request in requests:
                await world.assign(request, "prefill-0", "decode-0")
            for request in requests:
                await world.answered(request)
            assert d.engine.stats().preemptions == 0
            await world.clean()

    asyncio.run(scenario())


def test_messages_told_again_have_no_second_effect(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            p = await world.start_worker("prefill-0", "prefill", engine=slow(prefill_tokens_per_s=400.0))
            d = await world.start_worker("decode-0", "decode")
            request = await world.submit(prompt(200), 10)
            await world.assign(request, "prefill-0", "decode-0")
            store = p._store
            for host in (p, d):
                entries = await store.pick(host.me.instance_id, host.me.number, 0, 64, 1.0)
                for entry in [*entries, *entries]:
                    host.parts.coordinator.on_entry(entry)
            await world.answered(request)
            await world.clean()
            assert p.parts.counters.handoffs_committed == 1 and p.engine.stats().prefill_tokens == 200

    asyncio.run(scenario())


def test_stop_drains_what_is_here_and_deregisters(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            host = await world.start_worker("combined-0", engine=slow(decode_step_s=0.02))
            request = await world.submit(prompt(40), 20)
            await world.assign(request, "combined-0", "combined-0")
            await until(lambda: len(world.ingress.of(request).output) > 2, "it decodes")
            host.request_stop(TIMING.drain_s)
            assert await world.codes["combined-0"] is ExitCode.STOPPED
            await world.answered(request)
            assert host.me.state is InstanceState.STOPPED
            states = {i.instance_id: i.state for i in (await world.store.view()).instances}
            assert states == {"combined-0": "STOPPED"}

    asyncio.run(scenario())


def test_an_operator_may_drain_and_undrain(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            host = await world.start_worker("combined-0")
            await world.store.drain("combined-0", True)
            await until(lambda: host.me.state is InstanceState.DRAINING, "it drains")
            await world.store.drain("combined-0", False)
            await until(lambda: host.me.state is InstanceState.READY, "it is ready again")

    asyncio.run(scenario())
