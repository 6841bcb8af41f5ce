"""The process between Autan and its embedded Valkey: `python -I -S supervisor.py JSON`. Standard library only.

Theory of operation. The parent (EmbeddedValkey) starts this process with a pipe on its standard input and never writes to
it. The end of that pipe, a changed parent pid, or SIGTERM all mean: stop the server in good order and leave. The kernel
kills the server when this process dies in whatever way (PR_SET_PDEATHSIG; this process has one thread, so the death of
"the parent thread" is the death of the process). So no server outlives its owner. Where the kernel cannot do that (outside
Linux) a killed supervisor leaves its server behind; the lock below then still keeps the next one from touching the data.

A lock on a file in the data directory keeps a second server out. The server inherits the locked descriptor: the lock lasts
as long as any process that may write the data. A server that dies by itself is started again, with back-off.

Events for the parent go to standard output, one JSON object a line:
{"event": "ready", "pid": n, "starts": n}, {"event": "died", "code": n}, {"event": "refused", "kind": ..., "message": ...}
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.05
PING_EVERY_S = 0.02
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0
STABLE_S = 10.0  # a server that ran this long starts the back-off anew
STOP_S = 10.0
LOCK_NAME = "autan.lock"
LOG_NAME = "server.log"
_PR_SET_PDEATHSIG = 1


class Refused(Exception):
    """The server cannot be started; `kind` is `in_use`, `binary` or `start`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Supervisor:
    """Runs one server for as long as the parent lives."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._directory = Path(options["directory"])
        self._socket = str(options["socket"])
        self._command = [str(part) for part in options["command"]]
        self._start_timeout_s = float(options["start_timeout_s"])
        self._lock_timeout_s = float(options["lock_timeout_s"])
        self._parent = os.getppid()
        self._stopping = False
        self._lock = -1
        self._starts = 0

    def run(self) -> int:
        """The exit code: 0 after an ordered stop, 1 when the server could not be started the first time."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._on_signal)
        try:
            self._take_lock()
            self._keep_running()
        except Refused as error:
            _tell({"event": "refused", "kind": error.kind, "message": str(error)})
            return 1
        return 0

    def _on_signal(self, *_: object) -> None:
        self._stopping = True

    def _should_stop(self, wait_s: float) -> bool:
        """Waits up to `wait_s`; True as soon as the parent is gone or asked to stop."""
        readable, _, _ = select.select([sys.stdin], [], [], wait_s)
        if readable and not os.read(sys.stdin.fileno(), 4096):
            self._stopping = True
        if os.getppid() != self._parent:
            self._stopping = True
        return self._stopping

    def _take_lock(self) -> None:
        path = self._directory / LOCK_NAME
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline_s = time.monotonic() + self._lock_timeout_s
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s or self._should_stop(POLL_S):
                    holder = path.read_text(encoding="utf-8").strip() or "unknown"
                    raise Refused("in_use", f"{self._directory} is in use by the store of process {holder}") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _keep_running(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._stopping:
            started_s = time.monotonic()
            server = self._start()
            try:
                self._await_ready(server)
                while server.poll() is None and not self._should_stop(POLL_S):
                    pass
            except Refused:
                if self._starts == 1:
                    raise
            finally:
                code = _stop(server)
            if self._stopping:
                return
            _tell({"event": "died", "code": code})
            if time.monotonic() - started_s > STABLE_S:
                backoff_s = FIRST_BACKOFF_S
            self._should_stop(backoff_s)
            backoff_s = min(LAST_BACKOFF_S, backoff_s * 2)

    def _start(self) -> subprocess.Popen[bytes]:
        self._starts += 1
        supervisor = os.getpid()

        def die_with_supervisor() -> None:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != supervisor:
                    os._exit(1)

        log = os.open(self._directory / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(
                self._command,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(self._lock,),
                preexec_fn=die_with_supervisor,  # noqa: PLW1509 - this process has one thread
            )
        except OSError as error:
            raise Refused("binary", f"cannot run {self._command[0]}: {error}") from error
        finally:
            os.close(log)

    def _await_ready(self, server: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + self._start_timeout_s
        while not _answers(self._socket):
            if server.poll() is not None:
                raise Refused("start", f"the store ended with code {server.returncode} at start: {self._log_tail()}")
            if time.monotonic() >= deadline_s:
                raise Refused("start", f"the store did not answer in {self._start_timeout_s:g} s: {self._log_tail()}")
            if self._should_stop(PING_EVERY_S):
                return
        _tell({"event": "ready", "pid": server.pid, "starts": self._starts})

    def _log_tail(self) -> str:
        lines = (self._directory / LOG_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-3:]) or "its log is empty"


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(path)
            probe.sendall(b"PING\r\n")
            return probe.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _stop(server: subprocess.Popen[bytes]) -> int:
    """SIGTERM (the server syncs its append-only file), SIGKILL after 10 s. Returns the exit code."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
    return server.wait()


def _tell(event: dict[str, object]) -> None:
    try:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    except OSError:
        pass  # the parent is gone: the end of standard input will say so


if __name__ == "__main__":
    os.umask(0o077)
    raise SystemExit(Supervisor(json.loads(sys.argv[1])).run())
