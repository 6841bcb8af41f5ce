"""Whole clusters for tests: the real composition of `autan up`, real processes, real sockets."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from configs.schema.cluster import ClusterConfig
from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.cli.up import make_launcher
from orchestrator.client import Accepted, AsyncClient, Delta, Finished
from protos.wire import admin, common
from tests.support.worker_world import until
from workers.engine_api.types import SamplingParams
from workers.engines.oracle.build import oracle_model
from workers.engines.oracle.reference import expected_tokens_fast

ORACLE_ENGINE = {"kind": "oracle", "block_tokens": 64, "num_blocks": 8192, "max_batch_tokens": 2048, "max_running": 256}


def oracle_config(
    name: str, *, prefill: int = 1, decode: int = 1, engine: Mapping[str, Any] | None = None, **sections: Any
) -> ClusterConfig:
    """An oracle cluster of plain processes; `engine` changes every pool's engine, `sections` whole sections of the file."""
    settings = {**ORACLE_ENGINE, **(engine or {})}
    values: dict[str, Any] = {
        "name": name,
        "model": {"name": "oracle", "source": "oracle", "dtype": "float32"},
        "pools": [
            {"name": "prefill", "role": "prefill", "instances": prefill, "engine": settings},
            {"name": "decode", "role": "decode", "instances": decode, "engine": settings},
        ],
        "launcher": {"kind": "subprocess"},
        "ingress": {"address": "127.0.0.1:0"},
    }
    return ClusterConfig.model_validate({**values, **sections})


@asynccontextmanager
async def running(
    config: ClusterConfig, failpoints: dict[str, dict[str, str]] | None = None, api_key: str | None = None
) -> AsyncIterator[tuple[LocalCluster, AsyncClient]]:
    """A started cluster and a client of it; both are gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="autan-"))  # short: the store's socket lives below it
    try:
        async with (
            LocalCluster(config, make_launcher, home=home, failpoints=failpoints) as cluster,
            AsyncClient(cluster.endpoint, api_key=api_key) as client,
        ):
            yield cluster, client
    finally:
        shutil.rmtree(home, ignore_errors=True)


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    """Token ids that the oracle takes, the same for the same seed."""
    rng = random.Random(seed)
    return [rng.randrange(3, 259) for _ in range(num_tokens)]


def expected_output(config: ClusterConfig, prompt: list[int], max_tokens: int) -> list[int]:
    """The greedy answer of the oracle model, from first principles."""
    return expected_tokens_fast(oracle_model(config.model), prompt, SamplingParams(max_tokens=max_tokens))


class Watched:
    """One request as its client sees it. `arrivals_s` has a monotonic time for the submit and for each event with tokens."""

    def __init__(self) -> None:
        self.request_id = ""
        self.token_ids: list[int] = []
        self.indices: list[int] = []
        self.arrivals_s: list[float] = []
        self.timeline = common.Timeline()
        self.reason = ""

    @property
    def longest_gap_s(self) -> float:
        """The longest time without a token, the wait for the first one included."""
        return max(b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False))


async def watch(client: AsyncClient, prompt: list[int], max_tokens: int, **options: Any) -> Watched:
    """Runs a greedy request to its end. Raises what it ended with."""
    seen = Watched()
    seen.arrivals_s.append(time.monotonic())
    async for event in client.generate(token_ids=prompt, max_tokens=max_tokens, temperature=0.0, **options):
        match event:
            case Accepted():
                seen.request_id = event.request_id
            case Delta():
                seen.indices += range(event.first_index, event.first_index + len(event.token_ids))
                seen.token_ids += event.token_ids
                seen.arrivals_s.append(time.monotonic())
            case Finished():
                seen.reason = event.reason
                seen.timeline.CopyFrom(event.timeline)
    return seen


def assert_right(seen: Watched, expected: list[int]) -> None:
    """Every token is the right one and came once, in order."""
    assert seen.indices == list(range(len(expected))), "each index once, in order"
    assert seen.token_ids == expected


async def instances_of(client: AsyncClient) -> dict[str, admin.InstanceStatus]:
    """The instances by name."""
    return {one.instance_id: one for one in (await client.status()).instances}


async def no_block_left(client: AsyncClient, timeout_s: float = 15.0) -> None:
    """Returns when no instance has a block in use, none is leaked, and nothing is charged to any of them."""

    async def is_clean() -> bool:
        status = await client.status()
        return (
            status.queued == 0
            and status.running == 0
            and all(
                one.stats.used_blocks == one.stats.leaked_blocks == one.assigned_requests == one.reserved_blocks == 0
                for one in status.instances
            )
        )

    await until(is_clean, "no block is left in use", timeout_s)


async def pid_of(cluster: LocalCluster, instance_id: str) -> int:
    """The process of rank 0."""
    return (await cluster.launcher.alive())[instance_id][0].pid


def run(body: Any, timeout_s: float = 45.0) -> None:
    """Runs an async test body with a deadline of its own, below pytest's."""
    asyncio.run(asyncio.wait_for(body, timeout_s))
