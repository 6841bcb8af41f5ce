"""What starts, watches and ends the processes of instances. Two implementations: Ray actors and plain child processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from configs.worker_spec import WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceGroup:
    """All ranks of one instance, rank 0 first, and what each of them needs of a node."""

    specs: tuple[WorkerSpec, ...]
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    resources_per_rank: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {spec.instance_id for spec in self.specs}
        assert len(names) == 1, f"one group, one instance: {sorted(names)}"
        assert [spec.rank for spec in self.specs] == list(range(self.specs[0].ranks)), "ranks are complete and in order"

    @property
    def instance_id(self) -> str:
        """The instance."""
        return self.specs[0].instance_id

    @property
    def digest(self) -> str:
        """Equal for groups that would run the same: 8 hex digits."""
        whole = "\n".join(spec.model_dump_json() for spec in self.specs)
        needs = f"{self.cpus_per_rank} {self.gpus_per_rank} {sorted(self.resources_per_rank.items())}"
        return hashlib.sha256(f"{whole}\n{needs}".encode()).hexdigest()[:8]


CLOSE_GRACE_S = 5.0


class RankState(StrEnum):
    """How the process of one rank is."""

    STARTING = "starting"  # asked for, does not run or answer yet
    RUNNING = "running"
    WAITING = "waiting"  # died; its restart waits for the back-off
    BROKEN = "broken"  # died too often in a row, or in a way that a restart does not mend
    ENDED = "ended"  # stopped in good order


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """One rank as the launcher sees it. Whether the worker in it works is said by its heartbeat in the store, not here."""

    instance_id: str
    rank: int
    state: RankState
    pid: int = 0  # 0: no process
    node: str = ""  # address of its node; empty while it has none
    restarts: int = 0
    detail: str = ""  # why it is BROKEN or WAITING
    loading_percent: int | None = None  # how far it is with loading the model; None: it has not said


class Launcher(Protocol):
    """Every rank that was started and not stopped is kept running: one that dies is started again, with back-off.

    Ranks die alone here; that a rank's death ends its group is the workers' own affair. Everything that was started is
    gone after `close`, unless the launcher was told to leave it. Methods may run side by side for different instances.
    """

    async def start(self, group: InstanceGroup) -> bool:
        """Starts all ranks and returns when their processes are asked for, before they are ready.

        A group of the same digest that runs already is adopted as it is: True. Another group under the same id is ended first.
        Raises AutanError when the instance can be started neither now nor later.
        """
        ...

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """Asks all ranks to drain, ends them after `grace_s`, gives their resources back. Unknown instance: nothing."""
        ...

    async def kill(self, instance_id: str) -> None:
        """Ends all ranks now, without a restart. Unknown instance: nothing."""
        ...

    async def alive(self) -> dict[str, tuple[RankStatus, ...]]:
        """The ranks of every instance that was started or adopted, by instance."""
        ...

    async def log_tail(self, instance_id: str, lines: int = 20) -> str:
        """The end of the instance's log, as far as it can be read from here; for error messages."""
        ...

    async def node_address(self) -> str:
        """The address at which workers that this launcher places reach this process."""
        ...

    async def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """Stops everything, side by side, each as `stop`. Idempotent."""
        ...
