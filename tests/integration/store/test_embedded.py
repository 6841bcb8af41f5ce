"""The embedded server and its supervisor: private, alone, durable, never an orphan."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.schema.cluster import StoreConfig
from orchestrator.store import embedded
from orchestrator.store.client import Store
from orchestrator.store.connection import open_redis
from orchestrator.store.embedded import EmbeddedValkey
from protos.contract.errors import ConfigError, StoreUnavailable
from tests.support.processes import process_state, wait_until

ROOT = Path(__file__).resolve().parents[3]


def run(work: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine with a deadline."""
    asyncio.run(asyncio.wait_for(work, 40))


async def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """As wait_until, while the loop goes on."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not in {timeout_s} s: {what}") from None


async def submit(store: Store, id: str) -> None:
    """Submits a small request."""
    reply = await store.submit(
        request_id=id, body_hash=b"h", spec=b"s" * 100, tenant="t", model="m", prompt_tokens=1, max_tokens=1, prio=0,
        timeout_ms=600_000, ingress_id="g", ingress_epoch=1, ingress_addr="a", queue_limit=1_000_000,
    )  # fmt: skip
    assert reply.code in ("OK", "DUPLICATE")


def test_it_is_private_and_configured(tmp_path: Path) -> None:
    async def main() -> None:
        directory = tmp_path / "store"
        async with EmbeddedValkey(directory, StoreConfig(fsync="always", max_memory_mb=32)) as server:
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
            assert server.socket.parent == directory
            redis = open_redis(server.url, 5.0)
            expected = {
                "port": "0", "appendonly": "yes", "appendfsync": "always", "maxmemory": str(32 << 20),
                "maxmemory-policy": "noeviction", "save": "",
            }  # fmt: skip
            for name, value in expected.items():
                assert await redis.config_get(name) == {name: value}
            await redis.aclose()
            assert psutil.Process(server.server_pid).net_connections("tcp") == []
            loose = [path for path in directory.rglob("*") if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077]
            assert loose == []
            pids = (server.server_pid, server.supervisor_pid)
        assert [process_state(pid) for pid in pids] == ["", ""]
        assert not server.socket.exists()

    run(main())


def test_data_and_library_are_there_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with EmbeddedValkey(tmp_path) as server, await Store.connect(server.url, "c", 5.0) as store:
            await submit(store, "r")
        async with EmbeddedValkey(tmp_path) as server, Store(server.url, "c", 5.0) as store:
            assert (await store.look(["r"]))[0].state == "QUEUED"
            assert await store.load() is False

    run(main())


@pytest.mark.parametrize("name", ["with space", "per%20cent", "é" * 20, "deep/" * 40 + "x"])
def test_any_directory_will_do(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        directory = tmp_path / name
        async with EmbeddedValkey(directory) as server, await Store.connect(server.url, "c", 5.0) as store:
            await store.ping()
            assert len(os.fsencode(server.socket)) <= embedded.MAX_SOCKET_PATH_BYTES
            assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
            assert (directory / "appendonlydir").is_dir()
        assert not server.socket.exists()
        assert server.socket.parent == directory or not server.socket.parent.exists()

    run(main())


def test_a_second_server_on_the_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOCK_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with EmbeddedValkey(tmp_path) as server, await Store.connect(server.url, "c", 5.0) as store:
            second = EmbeddedValkey(tmp_path)
            with pytest.raises(ConfigError, match=f"in use by the store of process {server.supervisor_pid}"):
                await second.start()
            assert process_state(second.supervisor_pid) == ""
            await store.ping()
            await submit(store, "r")
        async with EmbeddedValkey(tmp_path):
            pass

    run(main())


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="cannot run"):
            await EmbeddedValkey(tmp_path, binary=tmp_path / "missing").start()
        with pytest.raises(StoreUnavailable, match="ended with code 1"):
            await EmbeddedValkey(tmp_path, binary=Path("/bin/false")).start()
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="choose another run directory"):
            await EmbeddedValkey(tmp_path / "file").start()
        async with EmbeddedValkey(tmp_path):
            pass

    run(main())


def test_a_killed_server_comes_back_with_every_acknowledged_submit(tmp_path: Path) -> None:
    async def main() -> None:
        async with EmbeddedValkey(tmp_path) as server, await Store.connect(server.url, "c", 10.0) as store:
            acknowledged: list[str] = []
            killed = asyncio.Event()

            async def write(writer: int) -> None:
                for i in range(100_000):
                    try:
                        await submit(store, f"w{writer}-{i}")
                    except StoreUnavailable:
                        if killed.is_set():
                            return
                        raise
                    acknowledged.append(f"w{writer}-{i}")

            writers = [asyncio.create_task(write(writer)) for writer in range(4)]
            await eventually(lambda: len(acknowledged) > 400 or any(task.done() for task in writers), "submits are accepted")
            first = server.server_pid
            killed.set()
            os.kill(first, signal.SIGKILL)
            await asyncio.gather(*writers)
            await eventually(lambda: server.server_pid not in (0, first), "another server answers")
            assert process_state(first) == ""
            assert server.starts == 2
            found = await store.look(acknowledged)
            assert len(found) > 400 and {look.state for look in found} == {"QUEUED"}

    run(main())


def test_a_killed_supervisor_takes_its_server_along_and_both_come_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with EmbeddedValkey(tmp_path) as server, await Store.connect(server.url, "c", 10.0) as store:
            await submit(store, "r")
            old = (server.supervisor_pid, server.server_pid)
            os.kill(old[0], signal.SIGKILL)
            await eventually(lambda: process_state(old[0]) == process_state(old[1]) == "", "both are gone")
            await eventually(lambda: server.server_pid not in (0, old[1]), "another server answers")
            assert (await store.look(["r"]))[0].state == "QUEUED"

    run(main())


def test_servers_that_die_again_and_again_are_started_with_back_off(tmp_path: Path) -> None:
    async def main() -> None:
        async with EmbeddedValkey(tmp_path) as server:
            times = []
            for _ in range(3):
                victim = server.server_pid
                os.kill(victim, signal.SIGKILL)
                started_s = asyncio.get_running_loop().time()
                await eventually(lambda victim=victim: server.server_pid not in (0, victim), "another server")  # type: ignore[misc]
                times.append(asyncio.get_running_loop().time() - started_s)
            assert times[2] > 0.4, "0.1 s, 0.2 s, 0.4 s"
            assert server.starts == 4

    run(main())


PARENT = """
import asyncio, os, signal, sys
from orchestrator.store.embedded import EmbeddedValkey

async def main():
    async with EmbeddedValkey(sys.argv[1]) as server:
        fork = 0
        if sys.argv[2] == "fork":
            fork = os.fork()
            if fork == 0:
                signal.pause()
        print(server.supervisor_pid, server.server_pid, fork, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["plain", "fork"])
def test_no_server_outlives_a_killed_parent(tmp_path: Path, mode: str) -> None:
    """`fork`: a child of the parent lives on and holds the parent's end of the pipe."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "store"), mode], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    fork = 0
    try:
        assert parent.stdout is not None
        supervisor, server, fork = map(int, parent.stdout.readline().split())
        assert process_state(supervisor) and process_state(server)
        parent.kill()
        parent.wait(10)
        wait_until(lambda: process_state(server) == "" and process_state(supervisor) == "", "server and supervisor are gone")
        assert fork == 0 or process_state(fork), "the fork lives"
    finally:
        parent.kill()
        if fork:
            os.kill(fork, signal.SIGKILL)


def test_the_next_parent_takes_over_at_once_after_a_kill(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "store"), "plain"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None and parent.stdout.readline()
    parent.kill()
    parent.wait(10)

    async def main() -> None:
        async with EmbeddedValkey(tmp_path / "store") as server:
            assert process_state(server.server_pid)

    run(main())


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(tmp_path: Path) -> None:
    async def main() -> None:
        async with EmbeddedValkey(tmp_path) as server:
            ours = os.getpgid(0)
            assert os.getpgid(server.supervisor_pid) != ours and os.getpgid(server.server_pid) != ours

    run(main())
