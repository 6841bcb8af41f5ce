"""Between real workers Push goes to the port that is for it; where it cannot be reached, it goes where Open went."""

from __future__ import annotations

import asyncio

import pytest

from configs.schema.network import NetworkConfig
from tests.support.store import FreshStore
from tests.support.worker_world import NETWORK, prompt, worker_world

STREAMED = NETWORK.model_copy(update={"streams": 3, "stream_bytes": 512})


@pytest.mark.parametrize(("network", "streams"), [(NETWORK, 1), (STREAMED, 3)])
def test_every_stream_takes_the_port_for_push(fresh_store: FreshStore, network: NetworkConfig, streams: int) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            p = await world.start_worker("prefill-0", "prefill", network=network)
            d = await world.start_worker("decode-0", "decode", network=network)
            request = await world.submit(prompt(300), 8)
            await world.assign(request, "prefill-0", "decode-0")
            await world.answered(request)
            await world.clean()
            assert d.push is not None and d.push.calls_begun == streams
            assert p.push is not None and p.push.calls_begun == 0

    asyncio.run(scenario())


def test_a_port_that_nobody_serves_costs_nothing_but_a_try(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            d = await world.start_worker("decode-0", "decode")
            assert d.push is not None
            await d.push.close()
            for _ in range(2):
                request = await world.submit(prompt(200), 8)
                await world.assign(request, "prefill-0", "decode-0")
                await world.answered(request)
            await world.clean()
            assert d.push.calls_begun == 0 and d.parts.counters.kv_blocks_received > 0

    asyncio.run(scenario())
