"""Workers as Ray actors. Ray places and restarts processes; it is not asked whether they work, and never on a request's path.

An instance is one placement group (detached, named, one bundle for each rank, all on one node when there are several) with one
detached actor in each bundle. Names are `<instance>.<rank>.<digest>` in the namespace of the cluster, so a launcher that comes
back finds what it had started. Ray neither fences nor sees frozen actors: the leases and incarnations in the store do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from configs.schema.cluster import ClusterConfig
from orchestrator.domain.clock import Clock, SystemClock
from orchestrator.runtime.launcher import CLOSE_GRACE_S, InstanceGroup, RankState, RankStatus
from orchestrator.runtime.log_files import tail
from orchestrator.runtime.ray_cluster import connect_ray, namespace_of
from orchestrator.runtime.restarts import RestartRecord, RestartRules
from protos.contract.errors import NoInstance

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PING_TIMEOUT_S = 2.0
_SILENT_LOOKS = 2
_STOP_MARGIN_S = 12.0
_THREADS = 8


@dataclass(slots=True)
class _Rank:
    """An actor and what was seen of it."""

    name: str
    handle: Any
    status: RankStatus
    record: RestartRecord
    seen_s: float
    seen_pid: int = 0
    silent_looks: int = 0  # how often in a row its process, seen before, did not answer
    killed_pid: int = 0


@dataclass(slots=True)
class _Group:
    digest: str
    needs: str
    placement: Any
    ranks: tuple[_Rank, ...]


class RayLauncher:
    """See `Launcher`. One per process; it connects to Ray when it starts the first instance.

    `actor_classes` by role come from the composition root: plain classes whose constructor takes the JSON of a WorkerSpec,
    with `info()` (a dict with at least `pid` and `address`) and `stop(grace_s)`.
    """

    def __init__(
        self,
        config: ClusterConfig,
        actor_classes: Mapping[str, type],
        *,
        rules: RestartRules | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config = config
        self._namespace = namespace_of(config.name)
        self._actor_classes = dict(actor_classes)
        self._rules = rules or RestartRules()
        self._clock = clock or SystemClock()
        self._groups: dict[str, _Group] = {}
        self._connecting = asyncio.Lock()
        self._is_connected = False
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="autan-ray")

    async def connect(self) -> None:
        """Starts a local Ray, or connects to the one at `launcher.address`. Idempotent; raises what `connect_ray` raises."""
        async with self._connecting:
            if not self._is_connected:
                await self._call(connect_ray, self._config)
                self._is_connected = True

    async def start(self, group: InstanceGroup) -> bool:
        """See `Launcher.start`. Actors wait for their placement group inside Ray; a later node may bring it what it needs."""
        await self.connect()
        running = self._groups.get(group.instance_id)
        if running is not None and running.digest == group.digest:
            return True
        await self._call(self._end_others, group.instance_id, group.digest)
        self._groups[group.instance_id], is_adopted = await self._call(self._adopt_or_create, group)
        return is_adopted

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """See `Launcher.stop`."""
        group = self._groups.pop(instance_id, None)
        if group is None:
            return
        if grace_s > 0:
            await self._call(self._ask_to_stop, group, grace_s)
        await self._call(self._remove, group)

    async def kill(self, instance_id: str) -> None:
        """See `Launcher.kill`."""
        await self.stop(instance_id, 0.0)

    async def alive(self) -> dict[str, tuple[RankStatus, ...]]:
        """See `Launcher.alive`. Asks every actor, for at most two seconds: one that does not answer is STARTING.

        Ray restarts actors at once and for ever; a rank that dies too often is taken from it here, as BROKEN.
        """
        groups = dict(self._groups)
        await asyncio.gather(*(self._call(self._look_at, group) for group in groups.values()))
        return {name: tuple(rank.status for rank in group.ranks) for name, group in groups.items()}

    async def log_tail(self, instance_id: str, lines: int = 20) -> str:
        """See `Launcher.log_tail`: of ranks on this machine, and why Ray could not start a rank."""
        group = self._groups.get(instance_id)
        if group is None:
            return ""
        return await self._call(self._logs_of, group, lines)

    async def node_address(self) -> str:
        """See `Launcher.node_address`: the address of the Ray node that this driver is on."""
        await self.connect()
        return await self._call(_own_address)

    async def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """See `Launcher.close`. Ends a local Ray, leaves another one."""
        await asyncio.gather(*(self.stop(name, grace_s) for name in list(self._groups)))
        async with self._connecting:
            if self._is_connected:
                await self._call(_disconnect)
                self._is_connected = False

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))

    # Below: blocking calls into Ray, on the launcher's threads.

    def _adopt_or_create(self, group: InstanceGroup) -> tuple[_Group, bool]:
        import ray
        from ray.exceptions import RayError
        from ray.util.placement_group import get_placement_group

        names = [_name(group, rank) for rank in range(len(group.specs))]
        try:
            placement = get_placement_group(self._group_name(group.instance_id, group.digest))
            handles = [ray.get_actor(name, namespace=self._namespace) for name in names]
            is_adopted = True
            logger.info("%s runs already: adopted", group.instance_id)
        except ValueError:
            is_adopted = False
            try:
                placement, handles = self._create(group, names)
            except RayError as error:
                raise NoInstance(f"{group.instance_id}: Ray cannot start it: {error}") from error
        ranks = tuple(
            _Rank(
                name,
                handle,
                RankStatus(instance_id=group.instance_id, rank=at, state=RankState.STARTING),
                RestartRecord(self._rules),
                self._clock.now_s(),
            )
            for at, (name, handle) in enumerate(zip(names, handles, strict=True))
        )
        return _Group(group.digest, _needs(group), placement, ranks), is_adopted

    def _create(self, group: InstanceGroup, names: list[str]) -> tuple[Any, list[Any]]:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = "STRICT_PACK" if len(group.specs) > 1 else "PACK"
        placement = placement_group(
            [_bundle(group) for _ in group.specs],
            strategy=strategy,
            name=self._group_name(group.instance_id, group.digest),
            lifetime="detached",
        )
        actor: Any = ray.remote(self._actor_classes[group.specs[0].role])
        handles = [
            actor.options(
                name=name,
                namespace=self._namespace,
                lifetime="detached",
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=4,
                num_cpus=group.cpus_per_rank,
                num_gpus=group.gpus_per_rank,
                resources=dict(group.resources_per_rank),
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=at),
            ).remote(spec.model_dump_json())
            for at, (name, spec) in enumerate(zip(names, group.specs, strict=True))
        ]
        return placement, handles

    def _end_others(self, instance_id: str, digest: str) -> None:
        """Ends what runs under the instance's name with another digest, ours or of a launcher before us."""
        import ray
        from ray.util.placement_group import get_placement_group, remove_placement_group

        known = self._groups.pop(instance_id, None)
        digests = {known.digest} if known is not None else set()
        for entry in ray.util.list_named_actors(all_namespaces=True):
            parts = entry["name"].rsplit(".", 2)
            if entry["namespace"] == self._namespace and len(parts) == 3 and parts[0] == instance_id and parts[2] != digest:
                _kill_named(entry["name"], self._namespace)
                digests.add(parts[2])
        for other in digests - {digest}:
            try:
                remove_placement_group(get_placement_group(self._group_name(instance_id, other)))
            except ValueError:
                logger.debug("the placement group of %s is gone already", instance_id)

    def _ask_to_stop(self, group: _Group, grace_s: float) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        calls = [rank.handle.stop.remote(grace_s) for rank in group.ranks]
        try:
            ray.get(calls, timeout=grace_s + _STOP_MARGIN_S)
        except (RayError, GetTimeoutError) as error:
            logger.warning("%s did not stop in good order: %s", group.ranks[0].status.instance_id, _first_line(error))

    def _remove(self, group: _Group) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for rank in group.ranks:
            ray.kill(rank.handle, no_restart=True)
        remove_placement_group(group.placement)

    def _look_at(self, group: _Group) -> None:
        from ray.util.placement_group import placement_group_table

        state = placement_group_table(group.placement).get("state")
        for rank in group.ranks:
            if state == "CREATED":
                self._look_at_rank(rank)
            elif rank.status.state is not RankState.BROKEN:
                needs = f"no node has room for {group.needs}" if state == "PENDING" else f"its placement group is {state}"
                rank.status = replace(rank.status, state=RankState.STARTING, pid=0, detail=needs)
        self._end_standing(group)

    def _end_standing(self, group: _Group) -> None:
        """Ranks end with their group by themselves; one that stands still would hold up the new group, so it is killed."""
        import ray

        newest = max(rank.record.total for rank in group.ranks)
        for rank in group.ranks:
            is_old = rank.record.total < newest and rank.killed_pid != rank.seen_pid
            if is_old and rank.silent_looks >= _SILENT_LOOKS:
                logger.error("%s outlived its group: pid %d is killed", rank.name, rank.seen_pid)
                rank.killed_pid = rank.seen_pid
                ray.kill(rank.handle, no_restart=False)

    def _look_at_rank(self, rank: _Rank) -> None:
        import ray
        from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

        before = rank.status
        if before.state is RankState.BROKEN:
            return
        try:
            info = ray.get(rank.handle.info.remote(), timeout=_PING_TIMEOUT_S)
        except ActorDiedError as error:
            rank.status = replace(before, state=RankState.BROKEN, pid=0, detail=str(error))
            return
        except (GetTimeoutError, RayError) as error:
            rank.silent_looks += isinstance(error, GetTimeoutError) and rank.seen_pid != 0
            rank.status = replace(before, state=RankState.STARTING, detail=_first_line(error))
            return
        rank.silent_looks = 0
        now_s = self._clock.now_s()
        if rank.seen_pid not in {0, info["pid"]}:
            rank.record.died(now_s, now_s - rank.seen_s, 0.0)
        if rank.seen_pid != info["pid"]:
            rank.seen_pid, rank.seen_s = info["pid"], now_s
        rank.status = replace(
            before,
            state=RankState.RUNNING,
            pid=info["pid"],
            node=info["address"].rpartition(":")[0],
            restarts=rank.record.total,
            detail="",
            loading_percent=info.get("loading_percent"),
        )
        if rank.record.is_open:
            ray.kill(rank.handle, no_restart=True)
            rank.status = replace(rank.status, state=RankState.BROKEN, pid=0, detail=f"{rank.record.total} restarts in a row")
            logger.error("%s is taken down: %s", rank.name, rank.status.detail)

    def _logs_of(self, group: _Group, lines: int) -> str:
        import ray

        found = [rank.status.detail for rank in group.ranks if rank.status.detail]
        node = ray._private.worker.global_worker.node
        if node is not None:
            directory = Path(node.get_logs_dir_path())
            pids = [rank.seen_pid for rank in group.ranks if rank.seen_pid]
            found += [tail(path, lines) for pid in pids for path in sorted(directory.glob(f"worker-*-{pid}.err"))]
        return "\n".join(found)

    def _group_name(self, instance_id: str, digest: str) -> str:
        return f"{self._namespace}.{instance_id}.{digest}"


def _name(group: InstanceGroup, rank: int) -> str:
    return f"{group.instance_id}.{rank}.{group.digest}"


def _bundle(group: InstanceGroup) -> dict[str, float]:
    """What one rank needs of a node. A bundle must not be empty: one that asks for nothing gets a sliver of a CPU."""
    bundle = {"CPU": group.cpus_per_rank, "GPU": group.gpus_per_rank, **group.resources_per_rank}
    return {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001}


def _needs(group: InstanceGroup) -> str:
    bundle = ", ".join(f"{name} {amount:g}" for name, amount in _bundle(group).items())
    return f"{len(group.specs)} x ({bundle})" + (" on one node" if len(group.specs) > 1 else "")


def _kill_named(name: str, namespace: str) -> None:
    import ray

    try:
        ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
    except ValueError:
        logger.debug("%s is gone already", name)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _own_address() -> str:
    import ray

    address: Any = ray.util.get_node_ip_address
    return str(address())
