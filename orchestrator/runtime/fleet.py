"""From the cluster file to running instances: which there are, starting them side by side, waiting until they serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from configs.schema.cluster import ClusterConfig
from configs.schema.pools import PoolConfig
from configs.worker_spec import WorkerSpec
from orchestrator.domain.clock import Clock, SystemClock
from orchestrator.domain.instance import InstanceState
from orchestrator.runtime.launcher import InstanceGroup, Launcher, RankState, RankStatus
from orchestrator.store.client import Store
from orchestrator.store.replies import InstanceRecord
from protos.contract.errors import NoInstance

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_WATCH_S = 2.0
_LOG_LINES = 20

Progress = Callable[[str], None]


def groups_of(
    config: ClusterConfig,
    *,
    store_url: str,
    model_dir: Path | None = None,
    failpoints: Mapping[str, Mapping[str, str]] | None = None,
    handoff_keys_file: Path | None = None,
    cache_dir: Path | None = None,
) -> list[InstanceGroup]:
    """Every instance of every pool, named `<pool>-<index>`, in the order of the file. `failpoints` by instance, for tests."""
    return [
        InstanceGroup(
            specs=tuple(
                WorkerSpec(
                    cluster=config.name,
                    instance_id=instance_id,
                    pool=pool.name,
                    role=pool.role,
                    rank=rank,
                    ranks=pool.ranks,
                    model=config.model,
                    model_dir=str(model_dir) if model_dir is not None else None,
                    engine=pool.engine,
                    store_url=store_url,
                    network=config.network,
                    timing=config.timing,
                    scheduling=config.scheduling,
                    store_timeout_s=config.store.timeout_s,
                    handoff_keys_file=str(handoff_keys_file) if handoff_keys_file is not None else None,
                    cache_dir=str(cache_dir) if cache_dir is not None else None,
                    failpoints=dict((failpoints or {}).get(instance_id, {})),
                )
                for rank in range(pool.ranks)
            ),
            cpus_per_rank=pool.cpus_per_rank,
            gpus_per_rank=pool.gpus_per_rank,
            resources_per_rank=pool.resources,
        )
        for pool in config.pools
        for instance_id in instance_ids(pool)
    ]


def instance_ids(pool: PoolConfig) -> list[str]:
    """The names of a pool's instances."""
    return [f"{pool.name}-{index}" for index in range(pool.instances)]


class Fleet:
    """All instances of one cluster file, started through one launcher."""

    def __init__(
        self,
        config: ClusterConfig,
        launcher: Launcher,
        store: Store,
        *,
        store_url: str,
        model_dir: Path | None = None,
        failpoints: Mapping[str, Mapping[str, str]] | None = None,
        handoff_keys_file: Path | None = None,
        cache_dir: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.groups = {
            group.instance_id: group
            for group in groups_of(
                config,
                store_url=store_url,
                model_dir=model_dir,
                failpoints=failpoints,
                handoff_keys_file=handoff_keys_file,
                cache_dir=cache_dir,
            )
        }
        self._launcher = launcher
        self._store = store
        self._timeout_s = config.launcher.start_timeout_s
        self._clock = clock or SystemClock()

    async def start(self, progress: Progress = lambda text: None) -> None:
        """Starts every instance side by side and returns when all are READY in the store.

        Raises NoInstance, naming the instance and the end of its log, when one breaks or `launcher.start_timeout_s` is over;
        what was started goes on running and is the launcher's to close.
        """
        deadline_s = self._clock.now_s() + self._timeout_s
        before = {name: record.incarnation for name, record in (await self._records()).items()}
        for name, group in self.groups.items():
            progress(f"{name}: starting {_size(group)}")
        adopted = await asyncio.gather(*(self._launcher.start(group) for group in self.groups.values()))
        waiting = {
            # A record of an earlier process counts only where that process was adopted.
            name: before.get(name, 0) if is_adopted else before.get(name, 0) + 1
            for name, is_adopted in zip(self.groups, adopted, strict=True)
        }
        told: dict[str, int] = {}
        while waiting:
            records = await self._records()
            for name, least in list(waiting.items()):
                record = records.get(name)
                if record is not None and record.state == InstanceState.READY and record.incarnation >= least:
                    del waiting[name]
                    progress(f"{name}: ready at {record.addr} ({len(self.groups) - len(waiting)} of {len(self.groups)})")
            if waiting:
                ranks = await self._must_go_on(waiting, records, deadline_s)
                _tell_loading(waiting, ranks, told, progress)
                await asyncio.sleep(_POLL_S)

    async def keep_watch(self) -> None:
        """Looks after the instances until it is cancelled: logs what changes, and shows the launcher's breaker the deaths."""
        known: dict[tuple[str, int], RankState] = {}
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                ranks = [rank for group in (await self._launcher.alive()).values() for rank in group]
            except Exception:  # placement may be away (Ray's head is gone); requests go on without it
                logger.warning("the launcher does not tell how the workers are", exc_info=True)
                continue
            for rank in ranks:
                key = (rank.instance_id, rank.rank)
                if known.get(key, RankState.RUNNING) is not rank.state:
                    logger.warning("%s rank %d is %s: %s", *key, rank.state, rank.detail or f"{rank.restarts} restarts")
                known[key] = rank.state

    async def _must_go_on(
        self, waiting: Mapping[str, int], records: Mapping[str, InstanceRecord], deadline_s: float
    ) -> Mapping[str, Sequence[RankStatus]]:
        """How the ranks are, while there is hope. Raises NoInstance, naming the instance, when there is none."""
        ranks = await self._launcher.alive()
        for name in waiting:
            for rank in ranks.get(name, ()):
                if rank.state in {RankState.BROKEN, RankState.ENDED}:
                    raise NoInstance(await self._story(name, f"rank {rank.rank} is {rank.state}: {rank.detail}"))
        if self._clock.now_s() < deadline_s:
            return ranks
        name = min(waiting)
        record = records.get(name)
        state = record.state if record is not None and record.incarnation >= waiting[name] else "not registered"
        details = "; ".join(rank.detail for rank in ranks.get(name, ()) if rank.detail)
        why = f"{state} after {self._timeout_s:g} s (launcher.start_timeout_s)" + (f"; {details}" if details else "")
        others = f"; not ready either: {', '.join(sorted(set(waiting) - {name}))}" if len(waiting) > 1 else ""
        raise NoInstance(await self._story(name, why + others))

    async def _story(self, name: str, why: str) -> str:
        log = await self._launcher.log_tail(name, _LOG_LINES)
        return f"instance {name} does not serve: {why}" + (f"\nits log ends with:\n{log}" if log.strip() else "")

    async def _records(self) -> dict[str, InstanceRecord]:
        view = await self._store.view(0)
        return {record.instance_id: record for record in view.instances}


def _tell_loading(
    waiting: Iterable[str], ranks: Mapping[str, Sequence[RankStatus]], told: dict[str, int], progress: Progress
) -> None:
    """Says how far the slowest rank of each instance is, when that is another tenth; `told` remembers the tenths."""
    for name in waiting:
        percents = [rank.loading_percent for rank in ranks.get(name, ())]
        known = [percent for percent in percents if percent is not None]
        if known and len(known) == len(percents) and min(known) // 10 > told.get(name, -1):
            told[name] = min(known) // 10
            progress(f"{name}: loading {min(known)} %")


def _size(group: InstanceGroup) -> str:
    spec = group.specs[0]
    return f"{spec.role}, {spec.engine.kind}" + (f", {spec.ranks} ranks" if spec.ranks > 1 else "")
