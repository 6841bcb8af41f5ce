"""kill -9 of a worker at each point of a request's life: right tokens once each, no block left, back within lease + 2 s."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient
from protos.contract.errors import PoisonRequest
from tests.support.cluster import (
    Watched,
    assert_right,
    expected_output,
    instances_of,
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

PROMPT_TOKENS, MAX_TOKENS, REQUESTS = 700, 40, 4
SLOW = {"max_batch_tokens": 256, "oracle": {"prefill_tokens_per_s": 20_000.0, "decode_step_s": 0.005}}
RECOVERY_MARGIN_S = 2.0

DEATHS = [
    pytest.param("prefill-0", "prefill.before_first_chunk#1", id="prefill-before-the-first-chunk"),
    pytest.param("prefill-0", "prefill.chunk#2", id="prefill-between-chunks"),
    pytest.param("prefill-0", "handoff.before_open#1", id="prefill-before-the-hand-off"),
    pytest.param("prefill-0", "handoff.mid_push#5", id="prefill-during-the-hand-off"),
    pytest.param("prefill-0", "handoff.before_end#1", id="prefill-before-the-end-frame"),
    pytest.param("prefill-0", "handoff.after_commit#1", id="prefill-after-the-hand-off"),
    pytest.param("decode-0", "import.before_commit#1", id="decode-before-the-commit"),
    pytest.param("decode-0", "import.in_engine#1", id="decode-before-redis-agrees"),
    pytest.param("decode-0", "decode.token#1", id="decode-at-token-1"),
    pytest.param("decode-0", "decode.token#5", id="decode-at-token-5"),
    pytest.param("decode-0", "decode.token#20", id="decode-at-token-20"),
]


async def _several(client: AsyncClient) -> tuple[list[list[int]], list[Watched]]:
    prompts = [random_prompt(seed, PROMPT_TOKENS + 17 * seed) for seed in range(REQUESTS)]
    return prompts, await asyncio.gather(*(watch(client, prompt, MAX_TOKENS) for prompt in prompts))


@pytest.mark.slow
@pytest.mark.parametrize(("instance", "point"), DEATHS)
def test_a_killed_worker_costs_time_and_nothing_else(instance: str, point: str) -> None:
    config = oracle_config("death", engine=SLOW)

    async def body() -> None:
        async with running(config, {instance: {point: "kill"}}) as (cluster, client):
            first_pid = await pid_of(cluster, instance)
            prompts, seen = await _several(client)
            await _assert_fault_happened(cluster, client, instance, first_pid)
            for prompt, one in zip(prompts, seen, strict=True):
                assert_right(one, expected_output(config, prompt, MAX_TOKENS))
                assert one.longest_gap_s <= config.timing.lease_s + RECOVERY_MARGIN_S
            await no_block_left(client)

    run(body())


async def _assert_fault_happened(cluster: LocalCluster, client: AsyncClient, instance: str, first_pid: int) -> None:
    assert process_state(first_pid) in ("", "Z"), "the first process is dead"
    ranks = (await cluster.launcher.alive())[instance]
    assert ranks[0].restarts == 1
    await until(_has_epoch(client, instance, 2), "the instance is registered anew")


def _has_epoch(client: AsyncClient, instance: str, epoch: int):  # type: ignore[no-untyped-def]
    async def check() -> bool:
        return (await instances_of(client))[instance].epoch >= epoch

    return check


@pytest.mark.slow
def test_a_frozen_decode_worker_is_replaced_and_its_return_changes_nothing() -> None:
    config = oracle_config("frozen", decode=2, engine={**SLOW, "oracle": {"decode_step_s": 0.05}})

    async def body() -> None:
        async with running(config) as (cluster, client):
            prompt = random_prompt(1, PROMPT_TOKENS)
            task = asyncio.create_task(watch(client, prompt, MAX_TOKENS))
            holder = await _decoding_instance(client)
            pid = await pid_of(cluster, holder)
            os.kill(pid, signal.SIGSTOP)
            try:
                await until(lambda: process_state(pid) == "T", "the worker stands", 5.0)
                seen = await asyncio.wait_for(task, 20.0)
                standing = (await instances_of(client))[holder]
                assert standing.heartbeat_age_s > config.timing.lease_s / 2, "it stood meanwhile"
            finally:
                os.kill(pid, signal.SIGCONT)
            assert_right(seen, expected_output(config, prompt, MAX_TOKENS))
            assert seen.timeline.decode_instance != holder
            assert seen.longest_gap_s <= config.timing.lease_s + RECOVERY_MARGIN_S
            # Its epoch is read while it stands: it may be back under the next one before anybody looks again.
            await until(
                _has_epoch(client, holder, standing.epoch + 1), "the old incarnation is fenced and registers anew", 20.0
            )
            await no_block_left(client)

    run(body())


async def _decoding_instance(client: AsyncClient) -> str:
    found: list[str] = []

    async def has_tokens() -> bool:
        found[:] = [one.decode_instance for one in await client.requests() if one.completion_tokens >= 3]
        return bool(found)

    await until(has_tokens, "the request decodes")
    return found[0]


@pytest.mark.slow
def test_a_request_that_kills_every_worker_is_ended_and_its_neighbours_are_not() -> None:
    config = oracle_config("poison", engine=SLOW)

    async def body() -> None:
        async with running(config, {"decode-0": {"decode.token": "kill:always"}}) as (_, client):
            prompt = random_prompt(3, 100)
            with pytest.raises(PoisonRequest):
                await watch(client, prompt, MAX_TOKENS)
            short = await watch(client, prompt, 1)  # ends on the prefill worker
            assert_right(short, expected_output(config, prompt, 1))
            await no_block_left(client)

    run(body())
