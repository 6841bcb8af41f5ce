"""Child processes: restarts, ends, files, and that none outlives its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from configs.worker_spec import WorkerSpec
from orchestrator.runtime.launcher import InstanceGroup, RankState, RankStatus
from orchestrator.runtime.restarts import RestartRules
from orchestrator.runtime.subprocess_launcher import SubprocessLauncher
from protos.contract.loading import loading_line
from tests.support.processes import process_state, wait_until

CHILD = "tests.support.idle_child"
QUICK = RestartRules(first_s=0.02, last_s=0.1, deaths=4, cool_down_s=60.0)


def a_group(instance: str = "p-0", *, source: str = "calm", ranks: int = 1) -> InstanceGroup:
    return InstanceGroup(
        specs=tuple(
            WorkerSpec.model_validate(
                {
                    "cluster": "c",
                    "instance_id": instance,
                    "pool": "p",
                    "role": "prefill",
                    "rank": rank,
                    "ranks": ranks,
                    "model": {"name": "m", "source": source},
                    "engine": {"kind": "oracle"},
                    "store_url": "redis://localhost:1",
                }
            )
            for rank in range(ranks)
        )
    )


def run(directory: Path, body: Callable[[SubprocessLauncher], Coroutine[Any, Any, None]]) -> None:
    """Runs a test body and checks that no child of its launcher is left."""
    pids: set[int] = set()

    async def whole() -> None:
        launcher = SubprocessLauncher(directory, module=CHILD, rules=QUICK)
        try:
            await body(launcher)
            pids.update(rank.pid for ranks in (await launcher.alive()).values() for rank in ranks)
        finally:
            await launcher.close(grace_s=2.0)
        assert await launcher.alive() == {}

    asyncio.run(whole())
    assert {pid for pid in pids if pid and process_state(pid)} == set()


async def rank_when(
    launcher: SubprocessLauncher, holds: Callable[[RankStatus], bool], instance: str = "p-0", timeout_s: float = 15.0
) -> RankStatus:
    deadline = time.monotonic() + timeout_s
    while True:
        rank = (await launcher.alive())[instance][0]
        if holds(rank):
            return rank
        assert time.monotonic() < deadline, f"not in {timeout_s} s; last: {rank}"
        await asyncio.sleep(0.01)


async def started(launcher: SubprocessLauncher, instance: str = "p-0", times: int = 1) -> RankStatus:
    """The rank once its child has said so in the log for the n-th time."""
    rank = await rank_when(launcher, lambda rank: rank.pid > 0, instance)
    deadline = time.monotonic() + 15.0
    while (await launcher.log_tail(instance)).count(" says ") < times:
        assert time.monotonic() < deadline, "the child says nothing"
        await asyncio.sleep(0.01)
    return rank


def test_a_killed_child_comes_back_as_another_process(tmp_path: Path) -> None:
    async def body(launcher: SubprocessLauncher) -> None:
        await launcher.start(a_group())
        first = await started(launcher)
        assert first.state is RankState.RUNNING
        os.kill(first.pid, signal.SIGKILL)
        second = await rank_when(launcher, lambda rank: rank.pid not in {0, first.pid})
        assert (second.restarts, second.state) == (1, RankState.RUNNING)

    run(tmp_path, body)


def test_how_far_loading_is_comes_from_the_log_of_this_process(tmp_path: Path) -> None:
    async def body(launcher: SubprocessLauncher) -> None:
        (tmp_path / "logs" / "p-0.0.log").write_text(loading_line(88) + "\n")  # of an earlier process
        await launcher.start(a_group())
        await launcher.start(a_group("d-0", source=loading_line(43)))
        await rank_when(launcher, lambda rank: rank.loading_percent == 43, "d-0")
        await started(launcher)
        assert (await launcher.alive())["p-0"][0].loading_percent is None

    run(tmp_path, body)


def test_a_crash_loop_opens_the_breaker(tmp_path: Path) -> None:
    async def body(launcher: SubprocessLauncher) -> None:
        await launcher.start(a_group(source="exit:1"))
        broken = await rank_when(launcher, lambda rank: rank.state is RankState.BROKEN)
        assert "exit code 1; 4 deaths" in broken.detail
        assert (await launcher.log_tail("p-0")).count("says exit:1") == 4

    run(tmp_path, body)


def test_a_wrong_spec_is_not_tried_twice_and_a_good_end_is_an_end(tmp_path: Path) -> None:
    async def body(launcher: SubprocessLauncher) -> None:
        await launcher.start(a_group("bad-0", source="exit:2"))
        await launcher.start(a_group("done-0", source="exit:0"))
        bad = await rank_when(launcher, lambda rank: rank.state is RankState.BROKEN, "bad-0")
        assert "specification" in bad.detail
        await rank_when(launcher, lambda rank: rank.state is RankState.ENDED, "done-0")
        assert (await launcher.log_tail("bad-0")).count("says") == 1

    run(tmp_path, body)


def test_stop_is_gentle_first_and_then_not(tmp_path: Path) -> None:
    async def body(launcher: SubprocessLauncher) -> None:
        await launcher.start(a_group("calm-0"))
        await launcher.start(a_group("deaf-0", source="deaf"))
        calm, deaf = await started(launcher, "calm-0"), await started(launcher, "deaf-0")
        began_s = time.monotonic()
        await launcher.stop("calm-0", grace_s=30.0)
        assert time.monotonic() - began_s < 10
        await launcher.stop("deaf-0", grace_s=0.2)
        assert [process_state(rank.pid) for rank in (calm, deaf)] == ["", ""]
        assert await launcher.alive() == {}
        await launcher.stop("deaf-0", grace_s=0.2)
        await launcher.kill("nobody-0")

    run(tmp_path, body)


def test_a_frozen_child_is_killed(tmp_path: Path) -> None:
    async def body(launcher: SubprocessLauncher) -> None:
        await launcher.start(a_group())
        rank = await started(launcher)
        os.kill(rank.pid, signal.SIGSTOP)
        await launcher.kill("p-0")
        assert process_state(rank.pid) == ""

    run(tmp_path, body)


def test_the_same_group_is_kept_and_another_one_replaces_it(tmp_path: Path) -> None:
    async def body(launcher: SubprocessLauncher) -> None:
        assert await launcher.start(a_group(ranks=2)) is False
        before = await started(launcher, times=2)
        assert await launcher.start(a_group(ranks=2)) is True
        assert (await launcher.alive())["p-0"][0].pid == before.pid
        assert await launcher.start(a_group(source="other")) is False
        assert len((await launcher.alive())["p-0"]) == 1
        assert process_state(before.pid) == ""

    run(tmp_path, body)


def test_specs_and_directories_are_for_this_user_only(tmp_path: Path) -> None:
    async def body(launcher: SubprocessLauncher) -> None:
        await launcher.start(a_group())
        await started(launcher)
        spec = tmp_path / "run" / "specs" / "p-0.0.json"
        assert stat.S_IMODE(spec.stat().st_mode) == 0o600
        assert stat.S_IMODE(spec.parent.stat().st_mode) == 0o700
        assert WorkerSpec.model_validate_json(spec.read_text(encoding="utf-8")) == a_group().specs[0]
        await launcher.kill("p-0")
        assert not spec.exists()

    run(tmp_path / "run", body)


def test_children_die_with_their_parent_even_frozen_ones(tmp_path: Path) -> None:
    code = f"""
import asyncio
from pathlib import Path
from orchestrator.runtime.subprocess_launcher import SubprocessLauncher
from tests.integration.runtime.test_subprocess_launcher import CHILD, a_group, started

async def main():
    launcher = SubprocessLauncher(Path({str(tmp_path)!r}), module=CHILD)
    await launcher.start(a_group("p-0"))
    await launcher.start(a_group("p-1"))
    print((await started(launcher, "p-0")).pid, (await started(launcher, "p-1")).pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            pids = [int(word) for word in parent.stdout.readline().split()]
            assert len(pids) == 2
            os.kill(pids[1], signal.SIGSTOP)
            assert all(process_state(pid) for pid in pids)
        finally:
            parent.kill()
    wait_until(lambda: not any(process_state(pid) for pid in pids), "both children are gone")
