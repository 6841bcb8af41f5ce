"""From a cluster file to instances that are READY, and the sentences when they do not get there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from configs.schema.cluster import ClusterConfig
from orchestrator.runtime.fleet import Fleet, _tell_loading, groups_of
from orchestrator.runtime.launcher import RankState, RankStatus
from orchestrator.runtime.restarts import RestartRules
from orchestrator.runtime.subprocess_launcher import WORKER_MODULE, SubprocessLauncher
from protos.contract.errors import NoInstance
from tests.support.store import FreshStore

QUICK = RestartRules(first_s=0.02, last_s=0.1, deaths=3)


def a_config(name: str, *, source: str = "oracle", timeout_s: float = 45.0) -> ClusterConfig:
    engine = {"kind": "oracle" if source == "oracle" else "torch", "num_blocks": 64}
    return ClusterConfig.model_validate(
        {
            "name": name,
            "model": {"name": "m", "source": source},
            "pools": [
                {"name": "left", "role": "prefill", "instances": 2, "engine": engine},
                {
                    "name": "right",
                    "role": "decode",
                    "ranks": 2,
                    "cpus_per_rank": 0.5,
                    "resources": {"near": 1.0},
                    "engine": engine,
                },
            ],
            "launcher": {"kind": "subprocess", "start_timeout_s": timeout_s},
            "store": {"timeout_s": 2.0},
        }
    )


async def start(
    fresh: FreshStore, directory: Path, config: ClusterConfig, module: str = WORKER_MODULE, times: int = 1
) -> list[str]:
    """Starts the fleet, so often, and ends it; what it said on the way."""
    said: list[str] = []
    store = await fresh.connect()
    try:
        for _ in range(times):
            launcher = SubprocessLauncher(directory, module=module, rules=QUICK)
            try:
                await Fleet(config, launcher, store, store_url=fresh.url).start(said.append)
            finally:
                await launcher.close()
    finally:
        await store.close()
    return said


def test_groups_follow_the_file() -> None:
    groups = groups_of(
        a_config("c"), store_url="redis://localhost", model_dir=Path("/models/m"), failpoints={"left-1": {"point": "kill"}}
    )
    assert [group.instance_id for group in groups] == ["left-0", "left-1", "right-0"]
    assert [len(group.specs) for group in groups] == [1, 1, 2]
    left, other, right = groups
    assert (left.specs[0].role, left.specs[0].model_dir, left.specs[0].store_timeout_s) == ("prefill", "/models/m", 2.0)
    assert [spec.rank for spec in right.specs] == [0, 1]
    assert (right.cpus_per_rank, right.gpus_per_rank, dict(right.resources_per_rank)) == (0.5, 0.0, {"near": 1.0})
    assert [group.specs[0].failpoints for group in groups] == [{}, {"point": "kill"}, {}]
    assert left.digest != other.digest
    assert left.digest == groups_of(a_config("c"), store_url="redis://localhost", model_dir=Path("/models/m"))[0].digest


def test_every_instance_is_ready_again_and_again(fresh_store: FreshStore, tmp_path: Path) -> None:
    said = asyncio.run(start(fresh_store, tmp_path, a_config(fresh_store.cluster), times=2))
    assert sum(": ready at 127.0.0.1:" in line for line in said) == 6
    assert said[0] == "left-0: starting prefill, oracle"
    assert "right-0: starting decode, oracle, 2 ranks" in said
    assert said[-1].endswith("(3 of 3)")


def test_a_worker_that_breaks_is_named_with_the_end_of_its_log(fresh_store: FreshStore, tmp_path: Path) -> None:
    config = a_config(fresh_store.cluster, source="exit:2")
    # All of them break; which one is seen first is up to the system.
    with pytest.raises(NoInstance, match=r"instance (left|right)-\d does not serve: rank \d is broken: exit code 2") as told:
        asyncio.run(start(fresh_store, tmp_path, config, "tests.support.idle_child"))
    assert "says exit:2" in told.value.message


def test_workers_that_never_register_end_in_a_timeout(fresh_store: FreshStore, tmp_path: Path) -> None:
    config = a_config(fresh_store.cluster, source="calm", timeout_s=2.0)
    with pytest.raises(NoInstance, match=r"not registered after 2 s .*not ready either: left-1, right-0"):
        asyncio.run(start(fresh_store, tmp_path, config, "tests.support.idle_child"))


def test_loading_is_told_by_the_slowest_rank_and_by_tenths() -> None:
    said: list[str] = []
    told: dict[str, int] = {}

    def ranks(*percents: int | None) -> dict[str, tuple[RankStatus, ...]]:
        state = RankState.RUNNING
        return {
            "d-0": tuple(
                RankStatus(instance_id="d-0", rank=rank, state=state, loading_percent=percent)
                for rank, percent in enumerate(percents)
            )
        }

    for percents in ((None, None), (5, None), (5, 3), (50, 9), (50, 43), (100, 48), (100, 100), (100, 100)):
        _tell_loading(["d-0", "p-0"], ranks(*percents), told, said.append)
    assert said == ["d-0: loading 3 %", "d-0: loading 43 %", "d-0: loading 100 %"]
