"""Workers as child processes of this one: no Ray, one machine.

Every rank has one supervising task, from `start` to `stop`. A child reads its spec from a file that only this user can
read, logs to a file of its own, and is killed by the kernel when this process dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from configs.env import child_environment
from configs.worker_spec import WorkerSpec
from orchestrator.domain.clock import Clock, SystemClock
from orchestrator.runtime.launcher import CLOSE_GRACE_S, InstanceGroup, RankState, RankStatus
from orchestrator.runtime.log_files import tail
from orchestrator.runtime.restarts import RestartRecord, RestartRules
from protos.contract.loading import loading_percent

logger = logging.getLogger(__name__)

WORKER_MODULE = "workers.service.process"
_CODE_ROOT = Path(__file__).resolve().parents[2]

# Exits after which a restart would not help (workers.service.lifecycle.ExitCode): stopped, bad spec, superseded.
ENDED_CODES = frozenset({0})
HOPELESS_CODES = {2: "its specification or model cannot be used", 10: "a newer incarnation of the instance is registered"}

_NOT_STARTED = 127
_LOADED = 100
_LOG_LINES = 50
_KILL_WAIT_S = 10.0
_SURVIVAL_LEASES = 2.0  # of a rank whose group has lost another one, in leases


class SubprocessLauncher:
    """See `Launcher`. Use it from one event loop, in a thread that outlives the workers.

    `run_dir` is made 0700; specs go to `run_dir/specs`, logs to `run_dir/logs/<instance>.<rank>.log`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        module: str = WORKER_MODULE,
        rules: RestartRules | None = None,
        environment: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._specs, self._logs = run_dir / "specs", run_dir / "logs"
        for directory in (run_dir, self._specs, self._logs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._module = module
        self._rules = rules or RestartRules()
        path = os.pathsep.join([str(_CODE_ROOT), *filter(None, [child_environment().get("PYTHONPATH")])])
        self._environment = child_environment({"PYTHONPATH": path, **(environment or {})})
        self._clock = clock or SystemClock()
        self._ranks: dict[str, tuple[_Rank, ...]] = {}
        self._digests: dict[str, str] = {}
        self._executions: set[asyncio.Task[None]] = set()

    async def start(self, group: InstanceGroup) -> bool:
        """See `Launcher.start`. Specs are written before this returns."""
        name = group.instance_id
        if self._digests.get(name) == group.digest and all(rank.is_kept for rank in self._ranks[name]):
            return True
        await self.kill(name)
        self._digests[name] = group.digest
        self._ranks[name] = tuple(
            _Rank(
                spec,
                command=self._command(spec),
                environment=self._environment,
                log=self._log(spec.instance_id, spec.rank),
                rules=self._rules,
                clock=self._clock,
                on_death=self._on_death,
            )
            for spec in group.specs
        )
        return False

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """See `Launcher.stop`: SIGTERM, then SIGKILL."""
        ranks = self._ranks.pop(instance_id, ())
        self._digests.pop(instance_id, None)
        await asyncio.gather(*(rank.end(grace_s) for rank in ranks))
        for rank in ranks:
            self._spec_file(rank.spec).unlink(missing_ok=True)

    async def kill(self, instance_id: str) -> None:
        """See `Launcher.kill`."""
        await self.stop(instance_id, 0.0)

    async def alive(self) -> dict[str, tuple[RankStatus, ...]]:
        """See `Launcher.alive`."""
        for ranks in self._ranks.values():
            for rank in ranks:
                rank.read_loading()
        return {name: tuple(rank.status for rank in ranks) for name, ranks in self._ranks.items()}

    async def log_tail(self, instance_id: str, lines: int = 20) -> str:
        """See `Launcher.log_tail`: the end of every rank's log."""
        logs = sorted(self._logs.glob(f"{instance_id}.*.log"))
        return "\n".join(await asyncio.gather(*(asyncio.to_thread(tail, log, lines) for log in logs)))

    async def node_address(self) -> str:
        """See `Launcher.node_address`: children are on this machine."""
        return "127.0.0.1"

    async def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """See `Launcher.close`."""
        await asyncio.gather(*(self.stop(name, grace_s) for name in list(self._ranks)))
        for task in self._executions:
            task.cancel()

    def _on_death(self, dead: _Rank) -> None:
        """The others of its group end by themselves within their lease; one that stands still would hold up the new group."""
        ranks = self._ranks.get(dead.spec.instance_id, ())
        # One that has died as often is of the new group already.
        pids = {rank: rank.status.pid for rank in ranks if rank.status.pid and rank.deaths < dead.deaths}
        if pids:
            task = asyncio.create_task(_kill_survivors(pids, _SURVIVAL_LEASES * dead.spec.timing.lease_s))
            self._executions.add(task)
            task.add_done_callback(self._executions.discard)

    def _command(self, spec: WorkerSpec) -> list[str]:
        path = self._spec_file(spec)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(spec.model_dump_json())
        shim = ["-m", "orchestrator.runtime.child", str(os.getpid())]
        return [sys.executable, *shim, self._module, str(path)]

    def _spec_file(self, spec: WorkerSpec) -> Path:
        return self._specs / f"{spec.instance_id}.{spec.rank}.json"

    def _log(self, instance_id: str, rank: int) -> Path:
        return self._logs / f"{instance_id}.{rank}.log"


class _Rank:
    """One rank: its process, and the task that keeps it running until `end`."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        rules: RestartRules,
        clock: Clock,
        on_death: Callable[[_Rank], None],
    ) -> None:
        self.spec = spec
        self._on_death = on_death
        self.status = RankStatus(
            instance_id=spec.instance_id, rank=spec.rank, state=RankState.STARTING, node=spec.node_address or "127.0.0.1"
        )
        self._command = command
        self._environment = environment
        self._log = log
        self._clock = clock
        self._record = RestartRecord(rules)
        self._process: asyncio.subprocess.Process | None = None
        self._is_ending = False
        self._log_begins = 0
        self._task = asyncio.create_task(self._keep(), name=f"launcher-{spec.instance_id}.{spec.rank}")

    @property
    def is_kept(self) -> bool:
        """True while the process runs or will be started again."""
        return not self._task.done()

    async def end(self, grace_s: float) -> None:
        """Returns when the process is gone and will not come back."""
        self._is_ending = True
        process = self._process
        if process is None or process.returncode is not None:
            self._task.cancel()
        elif grace_s > 0:
            _signal(process, signal.SIGTERM)
            await asyncio.wait([self._task], timeout=grace_s)
        if self._process is not None and self._process.returncode is None:
            _signal(self._process, signal.SIGKILL)
        _, pending = await asyncio.wait([self._task], timeout=_KILL_WAIT_S)
        if pending:
            logger.error("%s rank %d: pid %d does not die", self.spec.instance_id, self.spec.rank, self.status.pid)
            self._task.cancel()

    @property
    def deaths(self) -> int:
        """How often its process died by itself."""
        return self._record.total

    def kill_process(self, pid: int) -> None:
        """SIGKILL to the process of that id, if it still is this rank's."""
        if self.status.pid == pid and self._process is not None and self._process.returncode is None:
            logger.error("%s rank %d outlived its group: pid %d is killed", self.spec.instance_id, self.spec.rank, pid)
            _signal(self._process, signal.SIGKILL)

    def read_loading(self) -> None:
        """Looks into the log for how far this process is with loading, until it is done."""
        if self.status.state is not RankState.RUNNING or self.status.loading_percent == _LOADED:
            return
        percent = loading_percent(tail(self._log, _LOG_LINES, since_byte=self._log_begins))
        if percent is not None:
            self.status = replace(self.status, loading_percent=percent)

    async def _keep(self) -> None:
        while not self._is_ending:
            started_s = self._clock.now_s()
            try:
                code = await self._run_once()
            except OSError as error:
                logger.error("%s rank %d cannot be started: %s", self.spec.instance_id, self.spec.rank, error)
                code = _NOT_STARTED
            if self._is_ending or code in ENDED_CODES:
                self._set(RankState.ENDED, f"exit code {code}")
                return
            if code in HOPELESS_CODES:
                self._set(RankState.BROKEN, f"exit code {code}: {HOPELESS_CODES[code]}")
                logger.error("%s rank %d ended: %s", self.spec.instance_id, self.spec.rank, self.status.detail)
                return
            now_s = self._clock.now_s()
            wait_s = self._record.died(now_s, now_s - started_s, random.random())
            state = RankState.BROKEN if self._record.is_open else RankState.WAITING
            self._set(state, f"{_how(code)}; {self._record.total} deaths, next start in {wait_s:.1f} s")
            logger.warning("%s rank %d ended: %s", self.spec.instance_id, self.spec.rank, self.status.detail)
            self._on_death(self)
            await asyncio.sleep(wait_s)

    async def _run_once(self) -> int:
        with self._log.open("ab") as log:
            self._log_begins = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self._environment),
                start_new_session=True,
            )
        self.status = replace(
            self.status,
            state=RankState.RUNNING,
            pid=self._process.pid,
            restarts=self._record.total,
            detail="",
            loading_percent=None,
        )
        if self._is_ending:
            _signal(self._process, signal.SIGKILL)
        return await self._process.wait()

    def _set(self, state: RankState, detail: str) -> None:
        self.status = replace(self.status, state=state, pid=0, restarts=self._record.total, detail=detail)


async def _kill_survivors(pids: Mapping[_Rank, int], patience_s: float) -> None:
    await asyncio.sleep(patience_s)
    for rank, pid in pids.items():
        rank.kill_process(pid)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        process.send_signal(number)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
