"""Clusters whose instances have several ranks, started as `autan up` does: one process for each rank."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from configs.schema.cluster import ClusterConfig
from orchestrator.client import AsyncClient
from protos.wire import common
from tests.support.cluster import assert_right, instances_of, no_block_left, run, running, watch
from tests.support.processes import process_state
from tests.support.torch_models import an_engine, random_tokens
from tests.support.worker_world import until
from workers.engines.torch.tiny import write_tiny
from workers.service.solo import SoloRequest, run_alone

MODELS = {
    "latent": ("mistral-small-4", {}),
    "grouped": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
}


def model_of(directory: Path, shape: str) -> Path:
    kind, changes = MODELS[shape]
    return write_tiny(kind, directory / "model", 7, **changes)


def config_of(name: str, model_dir: Path, *pools: dict[str, Any], **sections: Any) -> ClusterConfig:
    engine = {"kind": "torch", "threads": 1, "num_blocks": 512, "block_tokens": 16, "max_batch_tokens": 64}
    values: dict[str, Any] = {
        "name": name,
        "model": {"name": "tiny", "source": str(model_dir), "dtype": "float32"},
        "pools": [{"cpus_per_rank": 0.25, "engine": engine, **pool} for pool in pools],
        "launcher": {"kind": "subprocess"},
        "ingress": {"address": "127.0.0.1:0"},
    }
    return ClusterConfig.model_validate({**values, **sections})


def alone(model_dir: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    engine = an_engine(model_dir)
    try:
        return run_alone(engine, [SoloRequest(prompt=prompt, max_tokens=max_tokens) for prompt in prompts])
    finally:
        engine.close()


def prompts_of(count: int) -> list[list[int]]:
    return [list(random_tokens(seed, 40 + 50 * seed)) for seed in range(count)]


async def answers(client: AsyncClient, prompts: list[list[int]], max_tokens: int, expected: list[list[int]]) -> None:
    seen = await asyncio.gather(*(watch(client, prompt, max_tokens, ignore_eos=True) for prompt in prompts))
    for one, output in zip(seen, expected, strict=True):
        assert_right(one, output)


@pytest.mark.parametrize(("shape", "prefill", "decode"), [("latent", 2, 1), ("latent", 1, 4), ("grouped", 4, 2)])
def test_ranks_of_prefill_and_decode_may_differ(tmp_path: Path, shape: str, prefill: int, decode: int) -> None:
    model_dir = model_of(tmp_path, shape)
    prompts = prompts_of(3)
    expected = alone(model_dir, prompts, 64)
    config = config_of(
        "ranks",
        model_dir,
        {"name": "prefill", "role": "prefill", "ranks": prefill},
        {"name": "decode", "role": "decode", "ranks": decode},
    )

    async def body() -> None:
        async with running(config) as (_, client):
            assert {one.card.ranks for one in (await instances_of(client)).values()} == {prefill, decode}
            await answers(client, prompts, 64, expected)
            await no_block_left(client)

    run(body(), 60.0)


def test_a_group_that_is_told_to_stop_finishes_what_it_has(tmp_path: Path) -> None:
    model_dir = model_of(tmp_path, "grouped")
    (prompt,) = prompts_of(1)
    (expected,) = alone(model_dir, [prompt], 600)
    config = config_of("stopping", model_dir, {"name": "both", "role": "combined", "ranks": 2})

    async def body() -> None:
        async with running(config) as (cluster, client):
            stream = asyncio.create_task(watch(client, prompt, 600, ignore_eos=True))

            async def decodes() -> bool:
                return any(one.completion_tokens >= 3 for one in await client.requests())

            await until(decodes, "the request decodes")
            stopping = asyncio.create_task(cluster.launcher.stop("both-0", 30.0))
            seen = await stream
            assert_right(seen, expected)
            assert seen.timeline.attempts == 0, "nobody else had to take it over"
            await stopping

    run(body(), 60.0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_are_actors_of_one_placement_group(tmp_path: Path) -> None:
    model_dir = model_of(tmp_path, "grouped")
    prompts = prompts_of(2)
    expected = alone(model_dir, prompts, 32)
    config = config_of(
        "ranks-on-ray",
        model_dir,
        {"name": "both", "role": "combined", "ranks": 2},
        launcher={"kind": "ray", "num_cpus": 2},
        timing={"heartbeat_s": 0.25, "lease_s": 1.5},
    )

    async def body() -> None:
        async with running(config) as (cluster, client):
            ranks = (await cluster.launcher.alive())["both-0"]
            assert len({rank.pid for rank in ranks} - {0}) == 2
            await answers(client, prompts, 32, expected)
            os.kill(ranks[1].pid, signal.SIGSTOP)

            async def is_back() -> bool:
                one = (await instances_of(client))["both-0"]
                return one.epoch >= 2 and one.state == common.INSTANCE_STATE_READY

            await until(is_back, "the group is back, without the rank that stood", 60.0)
            assert process_state(ranks[1].pid) == ""
            await answers(client, prompts, 32, expected)
            await no_block_left(client)

    run(body(), 110.0)
