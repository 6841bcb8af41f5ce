"""A whole cluster under random load and random faults; see test_soak.py. One seed gives the schedule of both."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from configs.schema.cluster import ClusterConfig
from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient
from protos.contract import errors
from protos.rpc import open_channel, worker_pb2_grpc
from protos.wire import admin, common, worker
from tests.chaos.soak_faults import (
    CENTRAL_WEIGHTS,
    DISRUPTIVE,
    OPERATOR_WEIGHTS,
    STOP_WEIGHTS,
    STORE_FAULTS,
    WORKER_WEIGHTS,
    Fault,
    Faults,
    Struck,
)
from tests.chaos.soak_requests import FINAL_WAIT_S, Kind, Plan, Requester, Seen, draw_plan
from tests.chaos.soak_usage import ORCHESTRATOR, STORE, Usage
from tests.support.cluster import instances_of, no_block_left, oracle_config, running
from tests.support.store import FreshStore
from tests.support.store_invariants import check_store
from tests.support.worker_world import until

CLIENTS = 10
BURST_REQUESTS = 10
WAIT_S = 60.0  # for the end of any stream
SETTLE_S = 30.0
AROUND_STORE_KILL_S = 12.0
END_IS_CHECKED_S = 20.0  # after its client was told
END_IS_KEPT_S = 180.0
CHECKS_AT_ONCE = 16
MOST_UNASKED = 0.01  # of all requests: the store was away for too long
LOG_LINES = 60  # of each worker, shown when something is wrong
TIMING = {
    "heartbeat_s": 0.4,
    "lease_s": 2.0,
    "kv_lease_s": 3.0,
    "progress_timeout_s": 4.0,
    "request_timeout_s": 45.0,
    "retain_s": END_IS_KEPT_S,
}
ENGINE = {
    "block_tokens": 16, "num_blocks": 224, "max_batch_tokens": 256, "max_running": 8,
    "oracle": {"prefill_tokens_per_s": 20_000.0, "decode_step_s": 0.01},
}  # fmt: skip
ALWAYS = (errors.QueueFull,)


def soak_config(seed: int, workers: int) -> ClusterConfig:
    """So many prefill and so many decode workers, with pools for two or three long requests each."""
    return oracle_config(
        f"soak{seed}", prefill=workers, decode=workers, engine=ENGINE, timing=TIMING, scheduling={"max_queued": 24}
    )


@dataclass
class Soak:
    """One run. `report` says afterwards what happened.

    With `slopes` there is a third worker of each role that is stopped but never killed, and no process that lives long may
    grow with the requests that it serves.
    """

    seed: int
    duration_s: float
    slopes: bool = False
    pause_s: tuple[float, float] = (1.0, 6.0)
    rare_pause_s: tuple[float, float] = (6.0, 20.0)
    operator_pause_s: tuple[float, float] = (0.5, 3.0)
    report: dict[str, Any] = field(default_factory=dict)
    _ended: list[tuple[float, Plan]] = field(default_factory=list)  # when their clients were told; checked later
    _counts: dict[str, Counter[str]] = field(default_factory=lambda: {"kinds": Counter(), "ends": Counter()})
    _slowest_s: float = 0.0
    requests: int = 0  # that clients have seen through

    @property
    def streams(self) -> int:
        """Streams that clients have read so far."""
        return self._counts["ends"].total()

    async def run(self) -> None:
        """Raises AssertionError naming the first thing that is not as it must be."""
        workers = 3 if self.slopes else 2
        config = soak_config(self.seed, workers)
        async with running(config) as (cluster, client), AsyncClient(cluster.endpoint) as second:
            requester = Requester(config, client, second, WAIT_S, lambda: cluster.ingress.parts.journal.is_degraded)
            struck: list[Struck] = []
            faults = self._faults(cluster, client, struck)
            usage = Usage(cluster, lambda: self.requests, workers)
            try:
                await self._load(requester, faults, struck, usage)
                await self._check_ends(requester, struck, everything=True)
                self._tell(struck, await client.status())
                assert self._counts["ends"]["not asked in time"] <= MOST_UNASKED * self.requests, self._counts
                await check_quiet(cluster, client)
                self.report["usage"] = usage.told()
                if self.slopes:
                    usage.check_lengths(ORCHESTRATOR, STORE, "prefill-2", "decode-2")
                await usage.check()
            except BaseException:
                self.report["usage"] = usage.told()
                for name in await cluster.launcher.alive():
                    print(f"--- {name}\n{await cluster.launcher.log_tail(name, LOG_LINES)}")
                print("--- faults\n" + "\n".join(str(one) for one in struck))
                raise

    def _faults(self, cluster: LocalCluster, client: AsyncClient, struck: list[Struck]) -> list[Faults]:
        sequences = [
            ("0", WORKER_WEIGHTS, ["prefill-0", "decode-0"], self.pause_s),
            ("1", WORKER_WEIGHTS, ["prefill-1", "decode-1"], self.pause_s),
            ("central", CENTRAL_WEIGHTS, ["the centre"], self.rare_pause_s),
            ("operator", OPERATOR_WEIGHTS, list(instance_names(cluster.config)), self.operator_pause_s),
        ]
        if self.slopes:
            sequences.append(("2", STOP_WEIGHTS, ["prefill-2", "decode-2"], self.rare_pause_s))
        return [
            Faults(cluster, client, random.Random(f"{self.seed}/{who}"), weights, victims, pause_s, struck)
            for who, weights, victims, pause_s in sequences
        ]

    async def _load(self, requester: Requester, faults: list[Faults], struck: list[Struck], usage: Usage) -> None:
        end_s = time.monotonic() + self.duration_s
        async with asyncio.TaskGroup() as group:
            for one in faults:
                group.create_task(one.run(end_s))
            watching = [group.create_task(usage.watch()), group.create_task(self._check_ends_in_time(requester, struck))]
            clients = [group.create_task(self._client(requester, struck, index, end_s)) for index in range(CLIENTS)]
            await asyncio.gather(*clients)
            for task in watching:
                task.cancel()

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
            self.requests += burst
            self._ended += [(time.monotonic(), plan) for plan in plans]
            await asyncio.sleep(pause_s)

    async def _check_ends_in_time(self, requester: Requester, struck: list[Struck]) -> None:
        """As `_check_ends`, again and again, until it is cancelled: so nothing of a request is kept for the whole run."""
        while True:
            await asyncio.sleep(1.0)
            await self._check_ends(requester, struck)

    async def _check_ends(self, requester: Requester, struck: list[Struck], *, everything: bool = False) -> None:
        """Every request has one end, the one that its clients were told. What has not settled yet waits for the next time."""
        now_s = time.monotonic()
        settled = [everything or told_s + END_IS_CHECKED_S < now_s for told_s, _ in self._ended]
        due = [one for one, is_due in zip(self._ended, settled, strict=True) if is_due]
        self._ended = [one for one, is_due in zip(self._ended, settled, strict=True) if not is_due]
        turns = asyncio.Semaphore(CHECKS_AT_ONCE)

        async def check(told_s: float, plan: Plan) -> None:
            has_ended = False
            try:
                async with turns:
                    has_ended = await self._check_end(requester, struck, told_s, plan, everything)
            finally:  # also when the load is over in the middle of it
                if not has_ended:
                    requester.forget_final(plan)
                    self._ended.append((told_s, plan))

        await asyncio.gather(*(check(*one) for one in due))

    async def _check_end(
        self, requester: Requester, struck: list[Struck], told_s: float, plan: Plan, everything: bool
    ) -> bool:  # fmt: skip
        """False when nobody can tell yet: the request still runs, or the store is away."""
        if time.monotonic() > told_s + END_IS_KEPT_S - FINAL_WAIT_S:
            self._counts["ends"]["not asked in time"] += 1
            requester.forget(plan)
            return True
        try:
            final = await requester.final(plan)
        except TimeoutError:
            assert not everything, f"{plan.request_id} ({plan.kind}): it does not end"
            return False
        if isinstance(final.error, errors.UnavailableError) and not everything:
            return False
        check_final(plan, final, requester.of(plan)[:-1], struck)
        self._count(requester.of(plan))
        requester.forget(plan)
        return True

    def _count(self, seen: list[Seen]) -> None:
        for one in seen:
            self._counts["kinds"][one.plan.kind.value] += 1
            self._counts["ends"][one.reason or ("left" if one.left else type(one.error).__name__)] += 1
            self._slowest_s = max(self._slowest_s, one.ended_s - one.started_s)

    def _tell(self, struck: list[Struck], status: admin.StatusReply) -> None:
        self.report |= {
            "requests": self.requests,
            "streams": self.streams,
            "kinds": dict(self._counts["kinds"]),
            "ends": dict(self._counts["ends"]),
            "faults": dict(Counter(one.fault.value for one in struck)),
            "moves": {"begun": status.moves_begun, "done": status.moves_done, "stayed": status.moves_stayed},
            "slowest_s": round(self._slowest_s, 1),
        }


def instance_names(config: ClusterConfig) -> Iterator[str]:
    """All instances of the cluster file."""
    for pool in config.pools:
        yield from (f"{pool.name}-{index}" for index in range(pool.instances))


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
    return (away or told.from_memory) and isinstance(final.error, errors.Cancelled | errors.DeadlineExceeded)


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
    reply = await client.verify_kv()
    assert not reply.unanswered and len(reply.audits) == len(list(instance_names(cluster.config))), reply
    for one in reply.audits:
        assert not one.findings and one.books.opened == one.books.released, one
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
