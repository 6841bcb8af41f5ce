"""A whole cluster under random load and random faults; see test_soak.py. One seed gives the schedule of both."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.schema.cluster import ClusterConfig
from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient
from protos.contract import errors
from protos.rpc import open_channel, worker_pb2_grpc
from protos.wire import common, worker
from tests.chaos.soak_faults import CENTRAL_WEIGHTS, DISRUPTIVE, STORE_FAULTS, WORKER_WEIGHTS, Fault, Faults, Struck
from tests.chaos.soak_requests import Kind, Plan, Requester, Seen, draw_plan
from tests.support.cluster import instances_of, no_block_left, oracle_config, running
from tests.support.store import FreshStore
from tests.support.store_invariants import check_store
from tests.support.worker_world import until

CLIENTS = 10
BURST_REQUESTS = 10
WAIT_S = 60.0  # for the end of any stream
SETTLE_S = 30.0
AROUND_STORE_KILL_S = 12.0
MAX_ORCHESTRATOR_GROWTH_MB = 120.0
MAX_WORKER_MB = 400.0
MAX_MORE_FDS = 64  # the pool of connections to Redis may take 32 of them
MAX_WORKER_FDS = 96
LOG_LINES = 60  # of each worker, shown when something is wrong
TIMING = {"heartbeat_s": 0.4, "lease_s": 2.0, "kv_lease_s": 3.0, "progress_timeout_s": 4.0, "request_timeout_s": 45.0}
ENGINE = {
    "block_tokens": 16, "num_blocks": 224, "max_batch_tokens": 256, "max_running": 8,
    "oracle": {"prefill_tokens_per_s": 20_000.0, "decode_step_s": 0.01},
}  # fmt: skip
ALWAYS = (errors.QueueFull,)


def soak_config(seed: int) -> ClusterConfig:
    """Two prefill and two decode workers with pools for two or three long requests each."""
    return oracle_config(f"soak{seed}", prefill=2, decode=2, engine=ENGINE, timing=TIMING, scheduling={"max_queued": 24})


@dataclass
class Soak:
    """One run. `report` says afterwards what happened."""

    seed: int
    duration_s: float
    pause_s: tuple[float, float] = (1.0, 6.0)
    rare_pause_s: tuple[float, float] = (6.0, 20.0)
    report: dict[str, Any] = field(default_factory=dict)

    async def run(self) -> None:
        """Raises AssertionError naming the first thing that is not as it must be."""
        config = soak_config(self.seed)
        async with running(config) as (cluster, client), AsyncClient(cluster.endpoint) as second:
            requester = Requester(config, client, second, WAIT_S)
            struck: list[Struck] = []
            faults = [
                Faults(cluster, random.Random(f"{self.seed}/{who}"), weights, victims, pause_s, struck)
                for who, weights, victims, pause_s in (
                    ("0", WORKER_WEIGHTS, ["prefill-0", "decode-0"], self.pause_s),
                    ("1", WORKER_WEIGHTS, ["prefill-1", "decode-1"], self.pause_s),
                    ("central", CENTRAL_WEIGHTS, ["the centre"], self.rare_pause_s),
                )
            ]
            usage = Usage(cluster)
            try:
                await self._load(requester, faults, struck, usage)
                self._tell(requester, struck)
                await self._check_ends(requester, struck)
                await check_quiet(cluster, client)
                await usage.check()
            except BaseException:
                for name in await cluster.launcher.alive():
                    print(f"--- {name}\n{await cluster.launcher.log_tail(name, LOG_LINES)}")
                print("--- faults\n" + "\n".join(str(one) for one in struck))
                raise
            self.report["usage"] = usage.told()

    async def _load(self, requester: Requester, faults: list[Faults], struck: list[Struck], usage: Usage) -> None:
        end_s = time.monotonic() + self.duration_s
        async with asyncio.TaskGroup() as group:
            for one in faults:
                group.create_task(one.run(end_s))
            watching = group.create_task(usage.watch())
            clients = [group.create_task(self._client(requester, struck, index, end_s)) for index in range(CLIENTS)]
            await asyncio.gather(*clients)
            watching.cancel()

    async def _client(self, requester: Requester, struck: list[Struck], index: int, end_s: float) -> None:
        rng, serial = random.Random(f"{self.seed}/client/{index}"), 0
        while time.monotonic() < end_s:
            burst = BURST_REQUESTS if rng.random() < 0.03 else 1
            plans = [draw_plan(rng, f"s{self.seed}-{index}-{serial + at}") for at in range(burst)]
            serial += burst
            pause_s = rng.expovariate(10.0)
            for seen in await asyncio.gather(*(requester.run(plan) for plan in plans)):
                for one in seen:
                    check_error(one, struck)
            await asyncio.sleep(pause_s)

    async def _check_ends(self, requester: Requester, struck: list[Struck]) -> None:
        """Every request has one end, the one that its clients were told."""
        plans = {one.plan.request_id: one.plan for one in requester.seen}
        told: dict[str, list[Seen]] = {request_id: [] for request_id in plans}
        for one in requester.seen:
            told[one.plan.request_id].append(one)
        for plan in plans.values():
            final = await requester.final(plan)
            check_final(plan, final, told[plan.request_id], struck)

    def _tell(self, requester: Requester, struck: list[Struck]) -> None:
        ends = Counter(one.reason or ("left" if one.left else type(one.error).__name__) for one in requester.seen)
        self.report |= {
            "streams": len(requester.seen),
            "kinds": dict(Counter(one.plan.kind.value for one in requester.seen)),
            "ends": dict(ends),
            "faults": dict(Counter(one.fault.value for one in struck)),
            "slowest_s": round(max(one.ended_s - one.started_s for one in requester.seen), 1),
        }


def check_error(seen: Seen, struck: list[Struck]) -> None:
    """The error is one that its client asked for or that a fault explains."""
    error, kind = seen.error, seen.plan.kind
    if error is None or isinstance(error, ALWAYS):
        return
    around = [one for one in struck if one.started_s <= seen.ended_s]
    match error:
        case errors.Cancelled():
            assert kind in (Kind.CANCEL, Kind.LEAVE, Kind.DROP, Kind.DROP_RESUME), f"{seen}: nobody cancelled it"
        case errors.DeadlineExceeded():
            assert kind is Kind.DEADLINE, f"{seen}: its deadline was {TIMING['request_timeout_s']} s"
        case errors.PoisonRequest():
            deaths = [one for one in around if one.fault in DISRUPTIVE and one.ended_s > seen.started_s - TIMING["lease_s"]]
            assert len(deaths) >= 3, f"{seen}: only {len(deaths)} faults explain it"
        case errors.UnavailableError():
            store = [one for one in around if one.fault in STORE_FAULTS]
            assert any(one.ended_s + AROUND_STORE_KILL_S > seen.started_s for one in store), f"{seen}: the store was there"
        case errors.UnknownRequest() | errors.ResumeGone() if seen.what == "resume":
            pass  # it came before the submit, or was refused
        case errors.RequestConflict():
            assert kind is Kind.CONFLICT, f"{seen}: there was one body"
        case _:
            raise AssertionError(f"{seen}: no error that may happen")


def check_final(plan: Plan, final: Seen, told: list[Seen], struck: list[Struck]) -> None:
    """The end that the store keeps is the end that the clients saw."""
    check_error(final, struck) if not isinstance(final.error, errors.UnknownRequest) else None
    firsts = [one for one in told if one.what in ("generate", "again", "resume") and plan.kind is not Kind.CONFLICT]
    for one in firsts:
        if one.reason and not _overtaken(one, final, struck):
            assert final.reason == one.reason, f"{one}, but in the end {final}"
        elif isinstance(one.error, errors.EndedError):
            assert type(final.error) is type(one.error), f"{one}, but in the end {final}"
        if isinstance(final.error, errors.UnknownRequest):
            assert not one.tokens or _lost(one, struck), f"{one}, but in the end {final}"


def _overtaken(told: Seen, final: Seen, struck: list[Struck]) -> bool:
    """True when a cancel or deadline overtook in the store an end that was told from memory while the store was away."""
    away = any(one.fault in STORE_FAULTS and one.started_s <= told.ended_s <= one.ended_s + 3.0 for one in struck)
    return away and isinstance(final.error, errors.Cancelled | errors.DeadlineExceeded)


def _lost(told: Seen, struck: list[Struck]) -> bool:
    """True when a store that was killed may have lost the last second of its file, and the client was told."""
    killed = any(one.fault is Fault.STORE_KILL and one.started_s >= told.started_s - 2.0 for one in struck)
    return killed and (told.left or isinstance(told.error, errors.StoreUnavailable))


async def check_quiet(cluster: LocalCluster, client: AsyncClient) -> None:
    """Nothing is used, kept, charged, queued or live any more, in the workers as in the store."""
    await _all_ready(client)
    await no_block_left(client, SETTLE_S)

    async def nothing_kept() -> bool:
        replies = [await worker_status(one.address) for one in (await instances_of(client)).values()]
        return all(not reply.ledger and reply.stats.unacked_tokens == 0 for reply in replies)

    await until(nothing_kept, "no ledger entry and no unacknowledged token is left", SETTLE_S)
    assert await client.requests() == []
    raw = FreshStore(cluster.store_url, cluster.config.name).raw()
    try:
        picture = check_store(raw)
    finally:
        raw.close()
    assert not picture.keys.get("live"), picture.keys.get("live")
    assert not picture.keys.get("sweep"), picture.keys.get("sweep")


async def _all_ready(client: AsyncClient) -> None:
    async def ready() -> bool:
        return all(one.state == common.INSTANCE_STATE_READY for one in (await instances_of(client)).values())

    await until(ready, "every instance is ready again", 90.0)


async def worker_status(address: str) -> worker.WorkerStatusReply:
    """What a worker says of itself."""
    channel = open_channel(address)
    try:
        stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
        reply: worker.WorkerStatusReply = await stub.Status(worker.WorkerStatusRequest(), timeout=5.0)
        return reply
    finally:
        await channel.close()


class Usage:
    """Memory and descriptors of the orchestrator (this process) and of the workers."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._first = process_usage(os.getpid())
        self._worst_worker_mb, self._worst_worker_fds = 0.0, 0
        self._last = self._first
        self._told_kinds: dict[str, int] = {}

    async def watch(self) -> None:
        """Looks every second until it is cancelled."""
        while True:
            await asyncio.sleep(1.0)
            await self._look()

    async def check(self) -> None:
        """Raises AssertionError for growth beyond the bounds."""
        await self._look()
        mb, fds = self._last
        assert mb - self._first[0] <= MAX_ORCHESTRATOR_GROWTH_MB, f"from {self._first[0]:.0f} to {mb:.0f} MB"
        assert fds - self._first[1] <= MAX_MORE_FDS, f"from {self._first[1]} to {fds} descriptors: {self._told_kinds}"
        assert self._worst_worker_mb <= MAX_WORKER_MB, f"a worker had {self._worst_worker_mb:.0f} MB"
        assert self._worst_worker_fds <= MAX_WORKER_FDS, f"a worker had {self._worst_worker_fds} descriptors"

    def told(self) -> str:
        """For the report."""
        (mb, fds), (first_mb, first_fds) = self._last, self._first
        workers = f"workers up to {self._worst_worker_mb:.0f} MB, {self._worst_worker_fds} fds"
        return f"orchestrator {first_mb:.0f} to {mb:.0f} MB, {first_fds} to {fds} fds {self._told_kinds}; {workers}"

    async def _look(self) -> None:
        self._last = process_usage(os.getpid())
        self._told_kinds = descriptor_kinds(os.getpid())
        for ranks in (await self._cluster.launcher.alive()).values():
            for rank in ranks:
                try:
                    mb, fds = process_usage(rank.pid)
                except OSError:
                    continue
                self._worst_worker_mb = max(self._worst_worker_mb, mb)
                self._worst_worker_fds = max(self._worst_worker_fds, fds)


def descriptor_kinds(pid: int) -> dict[str, int]:
    """Open descriptors by kind; sockets by their family and state."""
    names = {}
    for table in ("tcp", "tcp6", "unix"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii", errors="replace").splitlines()[1:]:
            fields = line.split()
            names[fields[6] if table == "unix" else fields[9]] = f"{table}:{fields[5] if table == 'unix' else fields[3]}"
    found: Counter[str] = Counter()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(one.readlink())
        except OSError:
            continue
        found[names.get(target[8:-1], "socket:?") if target.startswith("socket:[") else target.split(":", maxsplit=1)[0]] += 1
    return dict(found)


def process_usage(pid: int) -> tuple[float, int]:
    """Resident MB and open descriptors. Raises OSError when the process is gone."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(list(Path(f"/proc/{pid}/fd").iterdir()))
