"""Where a cluster lives on this machine: `<AUTAN_HOME>/run/<cluster>/` and the run file `<AUTAN_HOME>/run/<cluster>.json`.

The folder (0700) holds the embedded store, the logs and the lock; the run file (0600) tells commands where the ingress is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.env import home_dir
from protos.contract.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RunFile:
    """A running cluster, as its orchestrator wrote it down. `endpoint` is what clients dial."""

    cluster: str
    pid: int
    endpoint: str
    version: str


class RunDir:
    """The run directory of one cluster. `acquire` makes this process its only orchestrator."""

    def __init__(self, cluster: str, home: Path | None = None) -> None:
        self.cluster = cluster
        root = (home or home_dir()) / "run"
        self.path = root / cluster
        self.run_file = root / f"{cluster}.json"
        self._lock: int | None = None

    @property
    def store(self) -> Path:
        """Folder of the embedded store."""
        return self.path / "store"

    @property
    def logs(self) -> Path:
        """Folder of the processes' logs."""
        return self.path / "logs"

    @property
    def handoff_keys(self) -> Path:
        """Keys of the capabilities of hand-offs, see protos.contract.capability."""
        return self.path / "handoff.keys"

    @property
    def cache(self) -> Path:
        """Folder of the disk caches of workers on this machine."""
        return self.path / "kv"

    def acquire(self) -> None:
        """Makes the folders and takes the lock; the lock goes with the process, however it ends.

        Raises ConfigError, naming the process, when another orchestrator of this cluster runs.
        """
        for folder in (self.path.parent, self.path, self.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigError(
                f"cluster {self.cluster} runs already (process {holder or 'unknown'}); stop it with `autan down`, "
                "or give this one another name"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._lock = descriptor

    def prepare(self) -> None:
        """Makes the folders, for logs that begin before the lock is held. Raises ConfigError like `acquire`; takes nothing."""
        self.acquire()
        self.release()

    def publish(self, endpoint: str, version: str) -> None:
        """Writes the run file whole or not at all."""
        temporary = self.run_file.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as out:
            json.dump(asdict(RunFile(self.cluster, os.getpid(), endpoint, version)), out)
        temporary.replace(self.run_file)

    def release(self) -> None:
        """Removes the run file and gives the lock back. Idempotent."""
        if self._lock is None:
            return
        with contextlib.suppress(FileNotFoundError):
            self.run_file.unlink()
        os.close(self._lock)
        self._lock = None


def read_run_files(home: Path | None = None) -> list[RunFile]:
    """The clusters whose orchestrator runs on this machine, by name. Files of dead processes are passed over."""
    found = []
    for path in sorted(((home or home_dir()) / "run").glob("*.json")):
        try:
            entry = RunFile(**json.loads(path.read_text()))
        except (ValueError, TypeError, OSError):
            continue
        if _is_alive(entry.pid):
            found.append(entry)
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
