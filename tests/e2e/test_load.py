"""Many requests at once on the oracle cluster: every answer right, nothing leaked, queue and buffers bounded."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from orchestrator.client import AsyncClient
from protos.contract.errors import PromptTooLong, QueueFull
from tests.support.cluster import (
    assert_right,
    expected_output,
    instances_of,
    no_block_left,
    oracle_config,
    random_prompt,
    run,
    running,
    watch,
)

REQUESTS, PROMPT_TOKENS, MAX_TOKENS = 200, 2000, 64


@pytest.mark.slow
def test_two_hundred_requests_at_once() -> None:
    config = oracle_config("load")

    async def body() -> None:
        prompts = [random_prompt(seed, PROMPT_TOKENS) for seed in range(REQUESTS)]
        async with running(config) as (_, client):
            peak = asyncio.create_task(_peaks(client))
            seen = await asyncio.gather(*(watch(client, prompt, MAX_TOKENS) for prompt in prompts))
            peak.cancel()
            with suppress(asyncio.CancelledError):
                await peak
            for prompt, one in zip(prompts, seen, strict=True):
                assert_right(one, expected_output(config, prompt, MAX_TOKENS))
                assert one.timeline.handoff_blocks > 0
            await no_block_left(client)
            status = await client.status()
            assert status.finished == REQUESTS
            assert status.counters["backlog_tokens"] == 0
            assert all(one.stats.unacked_tokens == 0 for one in status.instances)

    run(body(), 55.0)


def test_a_request_that_no_instance_could_ever_hold_is_refused_at_once() -> None:
    config = oracle_config("small", engine={"num_blocks": 8})

    async def body() -> None:
        async with running(config) as (_, client):
            prompt = random_prompt(1, 500)
            with pytest.raises(PromptTooLong, match="at most 12 are left"):
                await watch(client, prompt, 13)
            assert_right(await watch(client, prompt, 12), expected_output(config, prompt, 12))
            await no_block_left(client)

    run(body())


async def _peaks(client: AsyncClient) -> None:
    """Watches what must stay bounded while the load runs."""
    while True:
        for one in (await instances_of(client)).values():
            assert one.stats.used_blocks <= one.stats.total_blocks
            assert one.stats.unacked_tokens <= REQUESTS * MAX_TOKENS
        await asyncio.sleep(0.1)


def test_a_full_queue_refuses_at_once_with_a_time_to_come_back() -> None:
    config = oracle_config(
        "full",
        scheduling={"max_queued": 4},
        engine={"max_running": 1, "max_batch_tokens": 64, "oracle": {"prefill_tokens_per_s": 2000.0}},
    )

    async def body() -> None:
        async with running(config) as (cluster, _), AsyncClient(cluster.endpoint, retry_s=0.0) as client:
            prompts = [random_prompt(seed, 300) for seed in range(24)]
            outcomes = await asyncio.gather(*(watch(client, prompt, 2) for prompt in prompts), return_exceptions=True)
            refused = [one for one in outcomes if isinstance(one, QueueFull)]
            assert refused, "some were refused"
            assert all(one.retry_after_s > 0 for one in refused)
            for prompt, one in zip(prompts, outcomes, strict=True):
                if not isinstance(one, BaseException):
                    assert_right(one, expected_output(config, prompt, 2))
            assert all(isinstance(one, QueueFull) for one in outcomes if isinstance(one, BaseException))
            await no_block_left(client)

    run(body())
