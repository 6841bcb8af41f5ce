"""Two Ray nodes on one machine: placement, addresses, a group on one node, and nodes that die or freeze."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from configs.schema.cluster import ClusterConfig
from orchestrator.client import AsyncClient
from protos.wire import common
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
from tests.support.ray_cluster import RayNodes, ray_nodes
from tests.support.worker_world import until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

MAX_TOKENS, PROMPT_TOKENS, STREAMS = 200, 300, 4
STEP = {"oracle": {"decode_step_s": 0.02}}


def config_for(nodes: RayNodes, name: str) -> ClusterConfig:
    """A prefill group of two ranks and a decode instance, each wanting GPUs that only one node has left."""
    config = oracle_config(name, engine=STEP)
    values = config.model_dump()
    prefill, decode = values["pools"]
    prefill |= {"ranks": 2, "cpus_per_rank": 0.1, "gpus_per_rank": 1}
    decode |= {"cpus_per_rank": 0.1, "gpus_per_rank": 2}
    values |= {
        "launcher": {"kind": "ray", "address": nodes.address},
        "network": {"bind": "node", "advertise_host": "127.0.0.1"},
    }
    return ClusterConfig.model_validate(values)


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    with ray_nodes() as cluster:
        cluster.add(cpus=1, gpus=2)
        cluster.add(cpus=1, gpus=2)
        yield cluster


def test_nodes_that_die_and_freeze_lose_no_request(nodes: RayNodes) -> None:
    config = config_for(nodes, "raynodes")

    async def body() -> None:
        async with running(config) as (cluster, client):
            first = await instances_of(client)
            homes = {name: one.address.rpartition(":")[0] for name, one in first.items()}
            assert set(homes.values()) == {"127.0.0.2", "127.0.0.3"}, "one instance per node, at the node's own address"
            ranks = (await cluster.launcher.alive())["prefill-0"]
            assert [rank.node for rank in ranks] == [homes["prefill-0"]] * 2, "both ranks are on one node"
            spare = nodes.add(cpus=1, gpus=2)
            await _requests_survive(client, config, lambda: nodes.kill_raylet(homes["decode-0"]), "decode-0")
            second = await instances_of(client)
            assert second["decode-0"].address.startswith(spare), "it moved to the node that was free"
            assert second["decode-0"].epoch > first["decode-0"].epoch
            nodes.add(cpus=1, gpus=2)
            pid, old_worker = nodes.raylet_pid(spare), await pid_of(cluster, "decode-0")
            assert process_state(old_worker) in ("S", "R"), "the old incarnation runs"
            await _requests_survive(client, config, lambda: nodes.freeze_raylet(spare), "decode-0")
            assert process_state(pid) == "T", "the raylet stood all the while"
            third = await instances_of(client)
            assert third["decode-0"].epoch > second["decode-0"].epoch
            assert not third["decode-0"].address.startswith(spare)
            await until(
                lambda: process_state(old_worker) in ("", "Z"), "the old incarnation was refused and ended itself", 10.0
            )
            await no_block_left(client)

    run(body(), 200.0)


async def _requests_survive(client: AsyncClient, config: ClusterConfig, fault: Callable[[], None], instance: str) -> None:
    """Streams go on while the fault happens and until the instance has a new incarnation; all answers are right."""
    epoch = (await instances_of(client))[instance].epoch
    done: list[tuple[list[int], Watched]] = []
    stop = asyncio.Event()
    tasks = [asyncio.create_task(_one_after_another(client, seed * 1000, done, stop)) for seed in range(STREAMS)]
    await until(lambda: len(done) >= 1, "requests run", 60.0)
    fault()

    async def is_new() -> bool:
        one = (await instances_of(client))[instance]
        return one.epoch > epoch and one.state == common.INSTANCE_STATE_READY

    await until(is_new, f"{instance} has a new incarnation that is READY", 60.0)
    stop.set()
    await asyncio.gather(*tasks)
    for prompt, seen in done:
        assert_right(seen, expected_output(config, prompt, MAX_TOKENS))


async def _one_after_another(
    client: AsyncClient, seed: int, done: list[tuple[list[int], Watched]], stop: asyncio.Event
) -> None:
    while not stop.is_set():
        seed += 1
        prompt = random_prompt(seed, PROMPT_TOKENS)
        done.append((prompt, await watch(client, prompt, MAX_TOKENS)))
