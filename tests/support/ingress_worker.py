"""A worker and a core that are small enough to steer, for tests of the ingress.

The worker draws token n of a request from (seed, n), so every answer can be computed; it picks, hands over and sends tokens
through the same functions and messages as a real one, keeps what is not acknowledged and replays on request.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from orchestrator.ingress.tasks import end_tasks
from orchestrator.store.client import Store
from orchestrator.store.replies import Placement
from protos.contract.errors import AutanError
from protos.contract.redis_names import InboxKind, pack_tokens, unpack_tokens
from protos.rpc import open_channel, tokens_pb2_grpc
from protos.wire import common, tokens
from workers.service.store import Held, InboxEntry, WorkerStore

LEASE_S = 1.0


def expected_token(seed: int, index: int) -> int:
    """Token `index` of a request with this seed; never a special one."""
    return 3 + hashlib.sha256(f"{seed}/{index}".encode()).digest()[0]


def expected_tokens(seed: int, count: int) -> list[int]:
    """The first `count` of them."""
    return [expected_token(seed, index) for index in range(count)]


@dataclass
class Job:
    """One request at the worker. Tokens below `acked` are forgotten as far as the ingress is concerned."""

    request_id: str
    epoch: int
    seed: int
    max_tokens: int
    ingress_address: str
    first_index: int
    sent: int = 0
    acked: int = 0
    finished: bool = False


class FakeWorker:
    """A combined instance. `allow(n)` says up to which output index it may produce; at first nothing holds it back."""

    def __init__(self, url: str, cluster: str, instance_id: str = "w-0") -> None:
        self.instance_id = instance_id
        self.incarnation = 0
        self.jobs: dict[str, Job] = {}
        self.revoked: list[str] = []
        self.acks: list[tokens.TokenAck] = []
        self.limit = 1 << 30
        self.token = expected_token
        self.answers = True  # off: the worker lies dead, but its connection stays
        self._store = WorkerStore(url, cluster, 1.0)
        self._news = asyncio.Event()
        self._links: dict[str, tuple[asyncio.Task[None], asyncio.Queue[tokens.TokenBatch]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ack_seq = 0

    async def start(self) -> None:
        """Registers and is ready."""
        card = common.InstanceCard(instance_id=self.instance_id, role=common.ROLE_COMBINED, total_blocks=64, node="here")
        self.incarnation = await self._store.register(self.instance_id, "combined", "127.0.0.1:1", card.SerializeToString())
        await self._renew()
        self._tasks = [asyncio.create_task(self._pick_loop()), asyncio.create_task(self._renew_loop())]

    async def restart(self) -> None:
        """A new incarnation, which holds nothing."""
        self.jobs.clear()
        self._ack_seq = 0
        await end_tasks(self._tasks)
        await self.start()

    async def stop(self) -> None:
        """Ends everything at once; what it held stays held until its leases lapse."""
        tasks = [*self._tasks, *(task for task, _ in self._links.values())]
        await end_tasks(tasks)
        self._links.clear()
        await self._store.close()

    def allow(self, limit: int) -> None:
        """Tokens with an output index below `limit` may be produced."""
        self.limit = limit
        for job in list(self.jobs.values()):
            self._produce(job)

    async def fail(self, request_id: str, error: AutanError, *, poison: bool = False, max_attempts: int = 1) -> None:
        """Gives one request up for good."""
        job = self.jobs.pop(request_id)
        await self._store.fail(
            request_id, job.epoch, self.instance_id, self.incarnation,
            error=error, retryable=poison, poison=poison, max_attempts=max_attempts, retain_s=60.0,
        )  # fmt: skip

    def send(self, address: str, *requests: tokens.RequestTokens) -> None:
        """Puts one raw batch on the stream to an ingress."""
        self._link(address).put_nowait(
            tokens.TokenBatch(instance_id=self.instance_id, incarnation=self.incarnation, requests=requests)
        )

    def _produce(self, job: Job) -> None:
        end = min(job.max_tokens, self.limit)
        if not self.answers or (job.sent >= end and not (job.sent == job.max_tokens and not job.finished)):
            return
        ids = [self.token(job.seed, index) for index in range(job.sent, end)]
        last = end == job.max_tokens
        message = tokens.RequestTokens(
            request_id=job.request_id,
            epoch=job.epoch,
            first_index=job.sent,
            token_ids=pack_tokens(ids),
            finish=common.FINISH_REASON_LENGTH if last else common.FINISH_REASON_UNSPECIFIED,
            timeline=common.Timeline(prefill_s=0.25, prefill_instance=self.instance_id)
            if job.sent == job.first_index
            else None,
        )
        job.sent, job.finished = end, last
        self.send(job.ingress_address, message)

    def _link(self, address: str) -> asyncio.Queue[tokens.TokenBatch]:
        found = self._links.get(address)
        if found is None or found[0].done():
            queue: asyncio.Queue[tokens.TokenBatch] = asyncio.Queue()
            found = self._links[address] = (asyncio.create_task(self._serve(address, queue)), queue)
        return found[1]

    async def _serve(self, address: str, queue: asyncio.Queue[tokens.TokenBatch]) -> None:
        async def batches() -> AsyncIterator[tokens.TokenBatch]:
            while True:
                yield await queue.get()

        async with open_channel(address) as channel:
            stub: Any = tokens_pb2_grpc.TokenSinkStub(channel)
            with suppress(grpc.RpcError):
                async for message in stub.Deliver(batches()):
                    for ack in message.acks:
                        self._acknowledged(ack)

    def _acknowledged(self, ack: tokens.TokenAck) -> None:
        self.acks.append(ack)
        job = self.jobs.get(ack.request_id)
        if job is None or job.epoch != ack.epoch:
            return
        job.acked = max(job.acked, ack.next_index)
        if ack.finished or ack.stale:
            del self.jobs[ack.request_id]

    async def _pick_loop(self) -> None:
        while True:
            with suppress(AutanError):
                for entry in await self._store.pick(self.instance_id, self.incarnation, self._ack_seq, 64, LEASE_S):
                    self._ack_seq = entry.seq
                    await self._take(entry)
            await asyncio.sleep(0.005)

    async def _take(self, entry: InboxEntry) -> None:
        job = self.jobs.get(entry.request_id)
        if entry.kind is InboxKind.REVOKE:
            self.revoked.append(entry.request_id)
            if job is not None and job.epoch <= entry.epoch:
                del self.jobs[entry.request_id]
        elif entry.kind is InboxKind.OWNER and job is not None:
            job.ingress_address, job.sent, job.finished = entry.ingress_address, job.acked, False
            self._produce(job)
        elif entry.kind is InboxKind.PREFILL:
            spec = common.RequestSpec.FromString(entry.spec)
            known = len(unpack_tokens(entry.journal))
            await self._store.handoff(entry.request_id, entry.epoch, self.instance_id, self.incarnation, LEASE_S)
            self.jobs[entry.request_id] = job = Job(
                entry.request_id, entry.epoch, spec.sampling.seed, spec.sampling.max_tokens, entry.ingress_address,
                first_index=known, sent=known, acked=known,
            )  # fmt: skip
            self._produce(job)

    async def _renew_loop(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 5)
            if self.answers:
                with suppress(AutanError):
                    await self._renew()

    async def _renew(self) -> None:
        held = [Held(request_id=job.request_id, epoch=job.epoch, holding=True) for job in self.jobs.values()]
        stats = common.InstanceStats(total_blocks=64, free_blocks=64).SerializeToString()
        renewal = await self._store.renew(
            self.instance_id, self.incarnation, state="READY", stats=stats, lease_s=LEASE_S, held=held
        )
        for request_id in renewal.lost:
            self.jobs.pop(request_id, None)


class FakeCore:
    """Places every queued request on the one worker, and reaps. `paused` stops both."""

    def __init__(self, store: Store, worker: FakeWorker) -> None:
        self.paused = False
        self._store = store
        self._worker = worker
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Leads from now on."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stops."""
        if self._task is not None:
            await end_tasks([self._task])

    async def _run(self) -> None:
        epoch = 0
        while True:
            with suppress(AutanError):
                epoch = (await self._store.lead("core-test", 60_000, epoch)).epoch
                await self._turn(epoch)
            await asyncio.sleep(0.01)

    async def _turn(self, epoch: int) -> None:
        await self._store.reap("core-test", epoch, limit=64, max_attempts=9, lost_ms=int(3000 * LEASE_S), retain_ms=60_000)
        if self.paused:
            return
        at = (self._worker.instance_id, self._worker.incarnation)
        view = await self._store.view(64)
        placements = [Placement(request.request_id, request.epoch, *at, *at, 1, 1) for request in view.queued]
        if placements:
            await self._store.assign("core-test", epoch, int(1000 * LEASE_S), placements)
