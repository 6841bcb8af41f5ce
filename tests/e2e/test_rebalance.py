"""Requests that move because a worker ends or because room is scattered: real processes, every token checked."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from configs.schema.cluster import ClusterConfig
from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient
from protos.wire import common
from tests.support.cluster import expected_output, no_block_left, oracle_config, pid_of, random_prompt, run, running, watch
from tests.support.worker_world import until

pytestmark = pytest.mark.timeout(90)


def config(name: str, **sections: Any) -> ClusterConfig:
    """Two decode instances of 32 blocks of 64 tokens, 20 ms for a token."""
    return oracle_config(name, decode=2, engine={"num_blocks": 32, "oracle": {"decode_step_s": 0.02}}, **sections)


async def decoding(client: AsyncClient, tokens: int = 2) -> dict[str, str]:
    """Request -> decode instance, of those that have so many tokens."""
    return {one.request_id: one.decode_instance for one in await client.requests() if one.completion_tokens >= tokens}


async def start(client: AsyncClient, name: str, prompt: list[int], max_tokens: int) -> asyncio.Task[Any]:
    """A request that decodes when this returns."""
    task = asyncio.create_task(watch(client, prompt, max_tokens, request_id=name))

    async def decodes() -> bool:
        return name in await decoding(client)

    await until(decodes, f"{name} decodes", 20.0)
    return task


async def ends(cluster: LocalCluster, instance: str, pid: int) -> None:
    """Waits until the process is gone; the launcher has reaped it."""

    def is_gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    await until(is_gone, f"{instance} has ended", 40.0)


@pytest.mark.parametrize("full", ["roomy", "full for a while", "full beyond the grace"])
def test_a_worker_that_is_told_to_end_loses_nothing(full: str) -> None:
    grace_s = 0.6 if full == "full beyond the grace" else 20.0
    cluster_config = config("term", timing={"drain_s": grace_s})

    async def body() -> None:
        async with running(cluster_config) as (cluster, client):
            # Twenty blocks each: no instance has room for both.
            prompts = {"a": random_prompt(1, 1000), "b": random_prompt(2, 1000)}
            tokens = {"a": 180, "b": 80 if full != "full beyond the grace" else 100}
            tasks = {"a": await start(client, "a", prompts["a"], tokens["a"])}
            if full != "roomy":
                tasks["b"] = await start(client, "b", prompts["b"], tokens["b"])
            places = await decoding(client)
            assert len(set(places.values())) == len(places)
            source = places["a"]
            pid = await pid_of(cluster, source)
            os.kill(pid, signal.SIGTERM)
            await ends(cluster, source, pid)
            for name, task in tasks.items():
                done = await task
                assert done.token_ids == expected_output(cluster_config, prompts[name], tokens[name])
                moved = name == "a" and full != "full beyond the grace"
                assert done.timeline.migrations == int(moved), (name, done.timeline)
            log = [(one.request_id, one.event, one.why) for one in reversed((await client.status()).moves)]
            assert log == ([] if grace_s < 1 else [("a", "begun", "drain"), ("a", "moved", "drain")])

    run(body())


def test_room_that_is_scattered_is_put_together() -> None:
    cluster_config = config("room", scheduling={"rebalance": {"settle_s": 0.2, "gap": 1.0}})

    async def body() -> None:
        async with running(cluster_config) as (_, client):
            prompts = {f"r{at}": random_prompt(at, 84) for at in range(8)}
            tasks = {name: asyncio.create_task(watch(client, ids, 300, request_id=name)) for name, ids in prompts.items()}

            async def all_decode() -> bool:
                return len(await decoding(client)) == 8

            await until(all_decode, "all decode", 20.0)
            places = await decoding(client)
            crowded = max(("decode-0", "decode-1"), key=list(places.values()).count)
            for name in [name for name, at in places.items() if at == crowded][4:]:
                await client.migrate(name, "decode-1" if crowded == "decode-0" else "decode-0")

            async def is_even() -> bool:
                return [one.reserved_blocks for one in (await client.status()).instances if one.role == common.ROLE_DECODE] == [
                    24,
                    24,
                ]

            await until(is_even, "four on each", 20.0)
            # Six blocks each, eight are free on either instance, and this one needs fourteen.
            big = await start(client, "big", random_prompt(9, 800), 64)
            assert not any(task.done() for task in tasks.values()), "it did not wait for them"
            assert (await big).token_ids == expected_output(cluster_config, random_prompt(9, 800), 64)
            for name, task in tasks.items():
                assert (await task).token_ids == expected_output(cluster_config, prompts[name], 300)
            await no_block_left(client)
            status = await client.status()
            (begun,) = [one for one in status.moves if one.event == "begun" and one.why != "operator"]
            assert begun.why == "room" and "big waits for 14 blocks" in begun.note
            assert status.moves_begun == status.moves_done and status.moves_stayed == 0
            assert not any(one.moves_in or one.moves_out for one in status.instances)

    run(body())
