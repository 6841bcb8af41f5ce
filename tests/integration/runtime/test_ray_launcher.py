"""The Ray launcher on real Ray nodes, each with an address of its own, with a worker that does nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.schema.cluster import ClusterConfig
from configs.worker_spec import WorkerSpec
from orchestrator.runtime.launcher import InstanceGroup, RankState, RankStatus
from orchestrator.runtime.ray_launcher import RayLauncher
from orchestrator.runtime.restarts import RestartRules
from protos.contract.errors import ClusterUnreachable
from tests.support.ray_cluster import RayNodes, ray_nodes
from tests.support.ray_stand_in import StandInWorker

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(90)]

CLASSES = {"prefill": StandInWorker, "decode": StandInWorker}
ENGINE = {"kind": "oracle"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes() as cluster:
        cluster.add(cpus=2, gpus=2, resources={"left": 4})
        cluster.add(cpus=2, gpus=2, resources={"right": 4})
        yield cluster


def config_for(address: str | None, name: str = "ray-test") -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "name": name,
            "model": {"name": "m", "source": "oracle"},
            "pools": [{"name": "p", "role": "prefill", "engine": ENGINE}, {"name": "d", "role": "decode", "engine": ENGINE}],
            "launcher": {"kind": "ray", "address": address},
        }
    )


def a_group(
    instance: str,
    *,
    role: str = "prefill",
    ranks: int = 1,
    gpus: float = 0,
    resources: dict[str, float] | None = None,
    source: str = "oracle",
    model_dir: Path | None = None,
) -> InstanceGroup:
    specs = tuple(
        WorkerSpec.model_validate(
            {
                "cluster": "ray-test",
                "instance_id": instance,
                "pool": "p",
                "role": role,
                "rank": rank,
                "ranks": ranks,
                "model": {"name": "m", "source": source},
                "model_dir": str(model_dir) if model_dir else None,
                "engine": ENGINE,
                "store_url": "redis://localhost:1",
            }
        )
        for rank in range(ranks)
    )
    return InstanceGroup(specs=specs, cpus_per_rank=0.25, gpus_per_rank=gpus, resources_per_rank=resources or {})


def run(nodes: RayNodes, body: Callable[[RayLauncher], Coroutine[Any, Any, None]], rules: RestartRules | None = None) -> None:
    """Runs a test body with a connected launcher and checks that nothing of the launcher is left."""

    async def whole() -> None:
        launcher = RayLauncher(config_for(nodes.address), CLASSES, rules=rules)
        await launcher.connect()
        nodes.wait_alive()
        try:
            await body(launcher)
            for instance in await launcher.alive():
                await launcher.kill(instance)
            await until(nothing_is_left, "no actor and no placement group is left")
        finally:
            await launcher.close()

    asyncio.run(whole())


async def until(holds: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        await asyncio.sleep(0.05)


def nothing_is_left() -> bool:
    import ray
    from ray.util.placement_group import placement_group_table

    groups = {entry["state"] for entry in placement_group_table().values()}
    return not ray.util.list_named_actors(all_namespaces=True) and groups <= {"REMOVED"}


async def ranks_when(
    launcher: RayLauncher, instance: str, holds: Callable[[tuple[RankStatus, ...]], bool], timeout_s: float = 25.0
) -> tuple[RankStatus, ...]:
    deadline = time.monotonic() + timeout_s
    while True:
        ranks = (await launcher.alive())[instance]
        if holds(ranks):
            return ranks
        assert time.monotonic() < deadline, f"not in {timeout_s} s; last: {ranks}"
        await asyncio.sleep(0.05)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def all_running(ranks: tuple[RankStatus, ...]) -> bool:
    return all(rank.state is RankState.RUNNING for rank in ranks)


def test_instances_land_where_their_resources_are_and_ranks_together(nodes: RayNodes, tmp_path: Path) -> None:
    async def body(launcher: RayLauncher) -> None:
        left = a_group("p-0", ranks=2, gpus=1, resources={"left": 1}, model_dir=tmp_path)
        right = a_group("d-0", role="decode", gpus=1, resources={"right": 1})
        assert await asyncio.gather(launcher.start(left), launcher.start(right)) == [False, False]
        prefill = await ranks_when(launcher, "p-0", all_running)
        decode = await ranks_when(launcher, "d-0", all_running)
        assert {rank.node for rank in prefill} == {"127.0.0.2"}
        assert {rank.node for rank in decode} == {"127.0.0.3"}
        assert len({rank.pid for rank in (*prefill, *decode)}) == 3
        assert await launcher.start(left) is True
        await launcher.stop("p-0", grace_s=1.0)
        assert names_in(tmp_path) == ["stopped-p-0-0", "stopped-p-0-1"]
        assert set(await launcher.alive()) == {"d-0"}

    run(nodes, body)


def test_a_launcher_that_comes_back_adopts_what_runs_and_replaces_what_differs(nodes: RayNodes) -> None:
    pids: list[int] = []

    async def first() -> None:
        import ray

        launcher = RayLauncher(config_for(nodes.address), CLASSES)
        await launcher.start(a_group("p-0"))
        await launcher.start(a_group("p-1"))
        for instance in ("p-0", "p-1"):
            pids.append((await ranks_when(launcher, instance, all_running))[0].pid)
        ray.shutdown()  # the driver is gone, its actors are detached

    async def second(launcher: RayLauncher) -> None:
        assert await launcher.start(a_group("p-0")) is True
        assert await launcher.start(a_group("p-1", resources={"left": 0.5})) is False
        same, other = [(await ranks_when(launcher, name, all_running))[0] for name in ("p-0", "p-1")]
        assert same.pid == pids[0]
        assert other.pid != pids[1]

    asyncio.run(first())
    run(nodes, second)


def test_a_killed_worker_comes_back_until_it_dies_too_often(nodes: RayNodes) -> None:
    async def body(launcher: RayLauncher) -> None:
        await launcher.start(a_group("p-0"))
        (rank,) = await ranks_when(launcher, "p-0", all_running)
        os.kill(rank.pid, signal.SIGKILL)
        (again,) = await ranks_when(launcher, "p-0", lambda ranks: all_running(ranks) and ranks[0].pid != rank.pid)
        assert again.restarts == 1
        os.kill(again.pid, signal.SIGKILL)
        (broken,) = await ranks_when(launcher, "p-0", lambda ranks: ranks[0].state is RankState.BROKEN)
        assert "2 restarts" in broken.detail

    run(nodes, body, RestartRules(deaths=2))


def test_a_worker_that_cannot_be_made_says_why(nodes: RayNodes) -> None:
    async def body(launcher: RayLauncher) -> None:
        await launcher.start(a_group("p-0", source="broken"))
        await ranks_when(launcher, "p-0", lambda ranks: ranks[0].state is RankState.BROKEN)
        assert "this model is broken" in await launcher.log_tail("p-0")

    run(nodes, body)


def test_what_fits_no_node_waits_and_says_what_it_needs(nodes: RayNodes) -> None:
    async def body(launcher: RayLauncher) -> None:
        await launcher.start(a_group("p-0", ranks=2, gpus=2))  # four GPUs, but not on one node
        ranks = await ranks_when(launcher, "p-0", lambda ranks: "no node" in ranks[0].detail)
        assert {rank.state for rank in ranks} == {RankState.STARTING}
        assert "2 x (CPU 0.25, GPU 2) on one node" in ranks[0].detail

    run(nodes, body)


def test_a_group_moves_as_one_when_its_raylet_is_killed(nodes: RayNodes) -> None:
    async def body(launcher: RayLauncher) -> None:
        await launcher.start(a_group("p-0", ranks=2, gpus=1))
        before = await ranks_when(launcher, "p-0", all_running)
        (home,) = {rank.node for rank in before}
        nodes.kill_raylet(home)
        after = await ranks_when(launcher, "p-0", lambda ranks: all_running(ranks) and all(r.node != home for r in ranks))
        assert len({rank.node for rank in after}) == 1
        assert {rank.pid for rank in after}.isdisjoint({rank.pid for rank in before})
        assert nodes.alive() == {"127.0.0.2", "127.0.0.3"} - {home}

    run(nodes, body)


def test_nothing_at_the_address_is_told_at_once() -> None:
    started_s = time.monotonic()
    launcher = RayLauncher(config_for("127.0.0.1:9"), CLASSES)
    with pytest.raises(ClusterUnreachable, match=r"no Ray at 127\.0\.0\.1:9"):
        asyncio.run(launcher.connect())
    assert time.monotonic() - started_s < 5


def test_a_wrong_token_is_told_at_once(nodes: RayNodes) -> None:
    code = f"""
import asyncio
from orchestrator.runtime.ray_launcher import RayLauncher
from tests.integration.runtime.test_ray_launcher import config_for
asyncio.run(RayLauncher(config_for({nodes.address!r}), {{}}).connect())
"""
    environment = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    started_s = time.monotonic()
    driver = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert driver.returncode != 0
    assert "ConfigError" in driver.stderr
    assert "RAY_AUTH_TOKEN" in driver.stderr
    assert time.monotonic() - started_s < 15  # two of them waiting, the rest starting Python on a busy machine
