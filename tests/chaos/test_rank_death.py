"""A rank that dies or stands still during a generation: its group ends, the requests go elsewhere, no token is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("torch")

from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient
from protos.wire import common
from tests.e2e.test_ranks import alone, config_of, model_of
from tests.support.cluster import Watched, assert_right, instances_of, no_block_left, run, running, watch
from tests.support.processes import process_state
from tests.support.torch_models import random_tokens
from tests.support.worker_world import until

STREAMS, MAX_TOKENS = 4, 500
LEASE_S = 1.5
RECOVERY_MARGIN_S = 2.0


async def ranks_of(cluster: LocalCluster, instance: str) -> list[int]:
    return [rank.pid for rank in (await cluster.launcher.alive())[instance]]


async def decoding_instance(client: AsyncClient) -> str:
    found: list[str] = []

    async def has_tokens() -> bool:
        found[:] = [one.decode_instance for one in await client.requests() if one.completion_tokens >= 3]
        return len(found) == STREAMS

    await until(has_tokens, "all streams decode")
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "fault"), [("grouped", signal.SIGKILL), ("latent", signal.SIGSTOP)], ids=["killed", "frozen"]
)
def test_a_lost_rank_costs_time_and_nothing_else(tmp_path: Path, shape: str, fault: signal.Signals) -> None:
    model_dir = model_of(tmp_path, shape)
    prompts = [list(random_tokens(seed, 30 + 40 * seed)) for seed in range(STREAMS)]
    expected = alone(model_dir, prompts, MAX_TOKENS)
    config = config_of(
        "lost-rank",
        model_dir,
        {"name": "prefill", "role": "prefill"},
        {"name": "decode", "role": "decode", "instances": 2, "ranks": 2},
        timing={"heartbeat_s": 0.25, "lease_s": LEASE_S, "progress_timeout_s": 5.0},
    )

    async def body() -> None:
        async with running(config) as (cluster, client):
            streams = [asyncio.create_task(watch(client, prompt, MAX_TOKENS, ignore_eos=True)) for prompt in prompts]
            instance = await decoding_instance(client)
            first, second = await ranks_of(cluster, instance)
            os.kill(second, fault)
            await until(lambda: process_state(first) == "", "rank 0 ended itself", LEASE_S + RECOVERY_MARGIN_S)
            seen: list[Watched] = await asyncio.gather(*streams)
            for one, output in zip(seen, expected, strict=True):
                assert_right(one, output)
                assert one.longest_gap_s <= LEASE_S + RECOVERY_MARGIN_S
            await until(lambda: process_state(second) == "", "the other rank is gone as well", 15.0)
            await until(_is_ready_again(client, instance), "the group is back, all ranks of it", 30.0)
            again = await watch(client, prompts[0], 8, ignore_eos=True)
            assert_right(again, expected[0][:8])
            await no_block_left(client)

    run(body(), 80.0)


def _is_ready_again(client: AsyncClient, instance: str):  # type: ignore[no-untyped-def]
    async def check() -> bool:
        one = (await instances_of(client))[instance]
        return one.epoch >= 2 and one.state == common.INSTANCE_STATE_READY

    return check
