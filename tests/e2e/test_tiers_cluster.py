"""Host memory and disk below the pool of a worker process, through its death and damaged files. Every token is compared."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.cli.status import status_json
from orchestrator.client import AsyncClient
from tests.support.cluster import (
    ORACLE_ENGINE,
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
from tests.support.worker_world import until
from workers.engines.oracle.build import oracle_model

pytestmark = pytest.mark.timeout(60)

BLOCK_TOKENS, PROMPT_TOKENS, PROMPTS = 64, 700, 8
POOL_BLOCKS, HOST_BLOCKS = 32, 20
NAME = "only-0"


class Served:
    """A cluster of one instance over tiers, and what its operator sees."""

    def __init__(self, cluster: LocalCluster, client: AsyncClient) -> None:
        self.cluster, self.client = cluster, client
        self.folder: Path = cluster.run_dir.cache / cluster.config.name / NAME

    async def serve(self, *seeds: int) -> int:
        """Serves these prompts; how many of their tokens were cached."""
        cached = 0
        for seed in seeds:
            prompt = random_prompt(seed, PROMPT_TOKENS)
            seen = await watch(self.client, prompt, 3)
            assert_right(seen, expected_output(self.cluster.config, prompt, 3))
            cached += seen.timeline.cached_tokens
        return cached

    async def status(self) -> dict[str, Any]:
        """The instance in `autan status --json`."""
        (one,) = status_json(await self.client.status())["instances"]
        return dict(one)

    async def tells(self, what: str, **least: int) -> dict[str, Any]:
        """Waits until its counters are at least these."""
        found: dict[str, Any] = {}

        async def is_there() -> bool:
            found.update(await self.status())
            return all(found["counters"][name] >= value for name, value in least.items())

        await until(is_there, f"{what}: {least}")
        return found

    def damage(self, rng: random.Random) -> None:
        """Flips one bit in every slot of every file, under the worker's hands."""
        for path in self.folder.glob("segment-*.kv"):
            with path.open("r+b") as file:
                data = bytearray(file.read())
                for at in range(0, len(data), 4096):
                    data[at + rng.randrange(4096)] ^= 1 << rng.randrange(8)
                file.seek(0)
                file.write(data)


async def look_after_the_disk(served: Served) -> None:
    """What `autan kv` says and does: totals of tiers, a sound sample, and a cache whose instance is gone."""
    client = served.client
    (audit,) = (await client.verify_kv()).audits
    books = audit.books
    assert not audit.findings and 0 < audit.disk_checked <= 64
    assert books.disk_blocks > 0 and books.disk_bytes > books.disk_blocks
    gone = served.folder.with_name("only-7")
    shutil.copytree(served.folder, gone)
    for apply in (False, True):
        (collection,) = (await client.collect_kv(apply=apply)).collections
        assert [(one.kind, one.path, one.done, one.kept_because) for one in collection.returns] == [
            ("disk", str(gone), apply, "")
        ]
    assert not gone.exists() and served.folder.exists()
    served.damage(random.Random(4))
    (audit,) = (await client.verify_kv()).audits
    assert {one.kind for one in audit.findings} == {"disk"} and "does not verify" in audit.findings[0].detail


def test_tiers_of_a_worker_process_survive_its_death_and_damaged_files() -> None:
    size = oracle_model(oracle_config("sizes").model).layout(BLOCK_TOKENS).block_bytes
    engine = {
        **ORACLE_ENGINE,
        "num_blocks": POOL_BLOCKS,
        "host_cache_gb": HOST_BLOCKS * size / 1e9,
        "disk_cache": {"gb": 0.02},
        "oracle": {"prefill_tokens_per_s": 20_000.0},
    }
    pool = {"name": "only", "role": "combined", "instances": 1, "engine": engine}
    config = oracle_config("tiers", pools=[pool], timing={"heartbeat_s": 0.1, "lease_s": 1.0})

    async def body() -> None:
        async with running(config) as (cluster, client):
            served = Served(cluster, client)
            assert await served.serve(*range(PROMPTS)) == 0
            full = PROMPT_TOKENS // BLOCK_TOKENS
            # What the last prompts left in the pool and in host memory need not be on the disk yet.
            await served.tells("evicted blocks are kept", disk_blocks=(PROMPTS - 3) * full - HOST_BLOCKS)
            assert await served.serve(*range(PROMPTS)) > 0
            one = await served.tells("hits are counted", host_restored_tokens=1, disk_restored_tokens=1)
            hits = one["tiers"]["hit_tokens"]
            assert hits["host"] > 0 and hits["disk"] > 0 and hits["host"] % BLOCK_TOKENS == hits["disk"] % BLOCK_TOKENS == 0
            assert one["kv_blocks"]["host"] <= HOST_BLOCKS and one["tiers"]["disk_bytes"] > 0

            (books,) = (await client.list_kv()).books
            assert books.host_blocks > 0 and books.host_bytes == books.host_blocks * size and books.disk_blocks > 0

            os.kill(await pid_of(cluster, NAME), signal.SIGKILL)

            async def is_back() -> bool:
                found = await served.status()
                return found["epoch"] > one["epoch"] and found["state"] == "READY" and found["kv_blocks"]["disk"] > 0

            await until(is_back, "the next incarnation has what is on the disk")
            cached = await served.serve(0, 1, 2)
            back = await served.tells("the heir reads it", disk_restored_tokens=cached)
            assert 0 < cached == back["tiers"]["hit_tokens"]["disk"]

            await look_after_the_disk(served)
            served.damage(random.Random(5))
            await served.serve(*range(PROMPTS))
            hurt = await served.tells("corrupt blocks are counted", corrupt_blocks=1)
            assert hurt["tiers"]["errors"] == 0
            await no_block_left(client)

    run(body())
