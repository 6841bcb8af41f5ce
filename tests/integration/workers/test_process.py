"""Workers as processes of their own: killed at a failpoint, told to stop, orphaned, given nonsense."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import process_state, wait_until
from tests.support.store import FreshStore
from tests.support.worker_world import WorkerWorld, prompt, slow, until, worker_spec, worker_world
from workers.service.lifecycle import ExitCode

ROOT = Path(__file__).parents[3]


def command(spec_file: Path) -> list[str]:
    return [sys.executable, "-m", "workers.service.process", str(spec_file)]


class Launched:
    """Worker processes of a test, restarted like a launcher does."""

    def __init__(self, fresh: FreshStore, directory: Path) -> None:
        self.fresh = fresh
        self.directory = directory
        self.running: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, instance_id: str, role: str, **changes: Any) -> asyncio.subprocess.Process:
        spec_file = self.directory / f"{instance_id}.json"
        spec_file.write_text(worker_spec(self.fresh, instance_id, role, **changes).model_dump_json())
        with (self.directory / f"{instance_id}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(*command(spec_file), cwd=ROOT, stderr=log)
        self.running[instance_id] = process
        return process

    async def stop(self) -> None:
        for process in self.running.values():
            if process.returncode is None:
                process.kill()
            await process.wait()


@asynccontextmanager
async def launched(fresh: FreshStore, directory: Path) -> AsyncIterator[tuple[WorkerWorld, Launched]]:
    async with worker_world(fresh) as world:
        processes = Launched(fresh, directory)
        try:
            yield world, processes
        finally:
            await processes.stop()


async def used_blocks(world: WorkerWorld) -> int:
    from protos.wire import common

    instances = (await world.store.view()).instances
    return sum(common.InstanceStats.FromString(i.stats).used_blocks for i in instances if i.state == "READY")


@pytest.mark.parametrize(
    ("victim", "failpoint"),
    [
        ("prefill-0", "handoff.mid_push#4"),
        ("prefill-0", "handoff.after_commit"),
        ("decode-0", "import.before_commit"),
        ("decode-0", "decode.token#5"),
    ],
)
def test_a_killed_worker_costs_time_and_nothing_else(
    fresh_store: FreshStore, tmp_path: Path, victim: str, failpoint: str
) -> None:
    async def scenario() -> None:
        async with launched(fresh_store, tmp_path) as (world, processes):
            for name, role in (("prefill-0", "prefill"), ("decode-0", "decode")):
                points = {failpoint: "kill"} if name == victim else {}
                await processes.start(name, role, failpoints=points, engine=slow(decode_step_s=0.005))
            await asyncio.gather(world.ready("prefill-0"), world.ready("decode-0"))
            request = await world.submit(prompt(150), 20)
            await world.assign(request, "prefill-0", "decode-0")
            process = processes.running[victim]
            assert await process.wait() == -signal.SIGKILL
            await processes.start(victim, victim.partition("-")[0])
            await world.ready(victim, above=1)

            async def placed_again_or_done() -> bool:
                await world.reap()
                if await world.state(request) == "QUEUED":
                    await world.assign(request, "prefill-0", "decode-0")
                return await world.state(request) == "DONE"

            await until(placed_again_or_done, "it is answered")
            await world.answered(request)

            async def nothing_held() -> bool:
                return await used_blocks(world) == 0

            await until(nothing_held, "no block is left")

    asyncio.run(scenario())


def test_sigterm_drains(fresh_store: FreshStore, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with launched(fresh_store, tmp_path) as (world, processes):
            process = await processes.start("combined-0", "combined", engine=slow(decode_step_s=0.02))
            await world.ready("combined-0")
            request = await world.submit(prompt(40), 25)
            await world.assign(request, "combined-0", "combined-0")
            await until(lambda: len(world.ingress.of(request).output) > 2, "it decodes")
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == ExitCode.STOPPED
            await world.answered(request)
        lines = (tmp_path / "combined-0.log").read_text().splitlines()
        logs = [json.loads(line) for line in lines if line.startswith("{")]
        assert any(log["instance"] == "combined-0" and "incarnation" in log["event"] for log in logs)

    asyncio.run(scenario())


def test_a_worker_does_not_outlive_its_parent(fresh_store: FreshStore, tmp_path: Path) -> None:
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(worker_spec(fresh_store, "combined-0").model_dump_json())
    script = f"""
import os, subprocess, sys
child = subprocess.Popen({command(spec_file)!r} + [str(os.getpid())])
print(child.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None and parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        assert process_state(pid)
        parent.kill()
        parent.wait()
        wait_until(lambda: process_state(pid) == "", "the worker is gone")
    finally:
        parent.stdin.close()
        parent.stdout.close()
        if process_state(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("text", ["", "{", '{"cluster": "c"}', '{"surprise": 1}'])
def test_a_bad_spec_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(text)
    done = subprocess.run(command(spec_file), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == ExitCode.BAD_SPEC
    assert "spec.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node_address": "10.1.2.3", "network": {"bind": "node"}}, "insecure"),
        ({"network": {"bind": "node"}}, "address of the node"),
        ({"engine": {"kind": "torch"}, "model_dir": None}, "torch"),
        ({"failpoints": {"nowhere": "kill"}}, "nowhere"),
    ],
)
def test_a_spec_that_cannot_be_served_ends_with_its_reason(
    fresh_store: FreshStore, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    values = json.loads(worker_spec(fresh_store, "combined-0").model_dump_json())
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) and key in values else value
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(json.dumps(values))
    done = subprocess.run(command(spec_file), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == ExitCode.BAD_SPEC
    assert words in done.stderr and "Traceback" not in done.stderr


ACTOR = """
import sys, time
from workers.service.ray_actor import PrefillWorker
assert "ray" not in sys.modules
actor = PrefillWorker(open(sys.argv[1]).read())
deadline = time.monotonic() + 20
while actor.info()["state"] != "READY" and time.monotonic() < deadline:
    time.sleep(0.01)
print(actor.info()["state"], actor.info()["incarnation"], actor.ping() == actor.info()["pid"], flush=True)
if sys.stdin.readline().strip() == "stop":
    print(actor.stop(1.0), flush=True)
    sys.stdin.readline()
time.sleep(30)
"""


def test_the_actor_class_runs_stops_and_dies_with_its_worker(fresh_store: FreshStore, tmp_path: Path) -> None:
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(worker_spec(fresh_store, "prefill-0", "prefill").model_dump_json())

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-c", ACTOR, str(spec_file)], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    actors = [start()]
    try:
        assert actors[0].stdout is not None
        assert actors[0].stdout.readline() == "READY 1 True\n"
        actors.append(start())
        assert actors[1].stdin is not None and actors[1].stdout is not None
        assert actors[1].stdout.readline() == "READY 2 True\n"
        assert actors[0].wait(10) == ExitCode.SUPERSEDED
        actors[1].stdin.write("stop\n")
        actors[1].stdin.flush()
        assert actors[1].stdout.readline() == "0\n"
        assert actors[1].poll() is None, "a stopped actor stays, or Ray would restart it"
    finally:
        for actor in actors:
            actor.kill()
            actor.communicate()
