"""Cached blocks in whole clusters: the core places by them and has them moved. Real processes, real sockets."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.control.prefix_index import PrefixIndex
from orchestrator.domain.ids import InstanceId
from tests.support.cluster import (
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
from tests.support.worker_world import until

PROMPT_TOKENS, BLOCK_TOKENS = 700, 64
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK_TOKENS
SLOW = {"oracle": {"prefill_tokens_per_s": 5_000.0, "decode_step_s": 0.002}}


def index_of(cluster: LocalCluster) -> PrefixIndex:
    assert cluster.core._prefixes is not None
    return cluster.core._prefixes.index


def blocks_known(cluster: LocalCluster, instance: str) -> int:
    """How many blocks the index has of an instance."""
    index = index_of(cluster)
    source = index._sources.get(InstanceId(instance))
    if source is None or source.slot is None:
        return 0
    return sum(mask >> source.slot & 1 for mask in index._holders.values())


@pytest.mark.slow
def test_the_next_turn_hits_what_was_generated_on_the_decode_worker() -> None:
    config = oracle_config("turns", prefill=2, engine=SLOW)

    async def body() -> None:
        async with running(config) as (cluster, client):
            prompt = random_prompt(1, PROMPT_TOKENS)
            first = await watch(client, prompt, 6 * BLOCK_TOKENS)
            assert_right(first, expected_output(config, prompt, 6 * BLOCK_TOKENS))
            p = first.timeline.prefill_instance
            had = (PROMPT_TOKENS + 6 * BLOCK_TOKENS - 1) // BLOCK_TOKENS
            await until(
                lambda: (blocks_known(cluster, p), blocks_known(cluster, "decode-0")) == (PROMPT_BLOCKS, had), "the index knows"
            )
            following = [*prompt, *first.token_ids, *random_prompt(2, 30)]
            second = await watch(client, following, 5)
            assert_right(second, expected_output(config, following, 5))
            line = second.timeline
            assert line.prefill_instance == p, "where most of it is cached"
            assert line.cached_tokens == had * BLOCK_TOKENS
            assert (line.fetched_tokens, line.fetch_source) == ((had - PROMPT_BLOCKS) * BLOCK_TOKENS, "decode-0")
            await until(lambda: blocks_known(cluster, p) >= had, "the index knows what was moved")

            async def counted() -> bool:
                stats = (await instances_of(client))[p].stats
                return (stats.fetches, stats.fetched_blocks) == (1, had - PROMPT_BLOCKS)

            await until(counted, "the fetch is in the status")
            await no_block_left(client)

    run(body())


@pytest.mark.slow
def test_after_the_death_of_a_decode_worker_only_what_nobody_has_is_computed() -> None:
    """The prefill worker that has the prompt drains: it takes no work, but it lends."""
    config = oracle_config("restart", prefill=2, decode=2, engine={"oracle": {**SLOW["oracle"], "decode_step_s": 0.02}})

    async def body() -> None:
        async with running(config) as (cluster, client):
            prompt, max_tokens = random_prompt(3, PROMPT_TOKENS), 100
            task = asyncio.create_task(watch(client, prompt, max_tokens))
            holders: list[tuple[str, str]] = []

            async def decodes() -> bool:
                holders[:] = [
                    (o.prefill_instance, o.decode_instance) for o in await client.requests() if o.completion_tokens > 5
                ]
                return bool(holders)

            await until(decodes, "it decodes")
            p, d = holders[0]
            other = {"prefill-0": "prefill-1", "prefill-1": "prefill-0"}[p]
            await until(lambda: blocks_known(cluster, p) == PROMPT_BLOCKS, "the index knows")
            await client.drain(p, True)

            async def drains() -> bool:
                return (await instances_of(client))[p].state == 3

            await until(drains, "it drains")
            os.kill(await pid_of(cluster, d), signal.SIGKILL)
            seen = await task
            assert_right(seen, expected_output(config, prompt, max_tokens))
            line = seen.timeline
            assert (line.prefill_instance, line.fetch_source) == (other, p)
            assert line.fetched_tokens == line.cached_tokens == PROMPT_BLOCKS * BLOCK_TOKENS

            async def computed_the_rest() -> bool:
                stats = (await instances_of(client))[other].stats
                rest = PROMPT_TOKENS - PROMPT_BLOCKS * BLOCK_TOKENS
                return rest <= stats.prefill_tokens <= rest + max_tokens

            await until(computed_the_rest, "only what nobody had was computed")
            await no_block_left(client)

    run(body())
