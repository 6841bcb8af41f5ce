"""kill -9 of the source or the target at each stage of a move: right tokens once each, no block left, back in time."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.client import AsyncClient
from tests.support.cluster import (
    assert_right,
    expected_output,
    no_block_left,
    oracle_config,
    pid_of,
    random_prompt,
    run,
    running,
    watch,
)
from tests.support.processes import process_state
from tests.support.worker_world import until

TOKENS = 250
SLOW = {"oracle": {"decode_step_s": 0.01}}
RECOVERY_MARGIN_S = 2.0

DEATHS = [
    pytest.param("decode-0", "handoff.before_open#1", id="source-before-the-open"),
    pytest.param("decode-0", "handoff.mid_push#3", id="source-while-it-copies"),
    pytest.param("decode-0", "handoff.before_end#1", id="source-paused"),
    pytest.param("decode-1", "import.before_commit#1", id="target-before-the-commit"),
    pytest.param("decode-1", "import.in_engine#1", id="target-before-redis-agrees"),
    pytest.param("decode-1", "decode.token#200", id="target-after-it-took-over"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("instance", "point"), DEATHS)
def test_a_death_during_a_move_costs_time_and_nothing_else(instance: str, point: str) -> None:
    config = oracle_config("moving", decode=2, engine=SLOW)

    async def body() -> None:
        async with running(config, {instance: {point: "kill"}}) as (cluster, client):
            pid = await pid_of(cluster, instance)
            prompt = random_prompt(5, 300)
            task = asyncio.create_task(watch(client, prompt, TOKENS))
            request_id, source = await _decoding(client)
            assert source == "decode-0", "of two idle instances the first one is taken"
            await client.migrate(request_id, "decode-1")
            seen = await asyncio.wait_for(task, 40.0)
            assert process_state(pid) in ("", "Z"), "the first process is dead"
            assert_right(seen, expected_output(config, prompt, TOKENS))
            assert seen.longest_gap_s <= config.timing.lease_s + RECOVERY_MARGIN_S
            await no_block_left(client)

    run(body())


async def _decoding(client: AsyncClient) -> tuple[str, str]:
    """The one request that decodes, and where."""
    found: list[tuple[str, str]] = []

    async def has_tokens() -> bool:
        found[:] = [(one.request_id, one.decode_instance) for one in await client.requests() if one.completion_tokens >= 3]
        return bool(found)

    await until(has_tokens, "it decodes")
    return found[0]
