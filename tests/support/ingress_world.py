"""A real ingress on a real store, with a core and a worker that are small enough to steer.

The worker draws token n of a request from (seed, n), so every answer can be computed; it picks, hands over and sends tokens
through the same functions and messages as a real one, keeps what is not acknowledged and replays on request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from configs.model_card import oracle_card
from configs.schema.network import IngressConfig, NetworkConfig
from orchestrator.ingress.model import ServedModel, load_served_model
from orchestrator.ingress.parts import IngressSettings
from orchestrator.ingress.server import IngressServer
from orchestrator.ingress.tasks import end_tasks
from orchestrator.store.client import Store
from orchestrator.store.replies import Placement
from protos.contract.errors import AutanError, StoreUnavailable
from protos.contract.redis_names import InboxKind, pack_tokens, unpack_tokens
from protos.rpc import admin_pb2_grpc, inference_pb2_grpc, open_channel, tokens_pb2_grpc
from protos.wire import common, inference, tokens
from workers.service.store import Held, InboxEntry, WorkerStore

CONTEXT_TOKENS = 512
LEASE_S = 1.0
STORE_TIMEOUT_S = 0.4


def oracle_model(name: str = "oracle") -> ServedModel:
    """The oracle with a short context."""
    return load_served_model(name, dataclasses.replace(oracle_card(), context_tokens=CONTEXT_TOKENS), None)


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


@dataclass
class Answer:
    """What one Generate or Resume stream brought."""

    accepted: inference.Accepted | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    first_index: int | None = None
    finished: inference.Finished | None = None

    def take(self, event: inference.GenerateEvent) -> None:
        """Adds an event; asserts that tokens come in order, each once."""
        match event.WhichOneof("event"):
            case "accepted":
                self.accepted = event.accepted
            case "tokens":
                assert self.finished is None, "tokens behind the end"
                if self.first_index is None:
                    self.first_index = event.tokens.first_index
                assert event.tokens.first_index == self.first_index + len(self.ids), "a gap or a repetition"
                self.ids += event.tokens.ids
                self.text += event.tokens.text
            case "finished":
                assert self.finished is None, "two ends"
                self.finished = event.finished
                self.text += event.finished.text


@dataclass
class World:
    """Everything that runs, and short words for it."""

    url: str
    cluster: str
    store: Store
    worker: FakeWorker
    core: FakeCore
    settings: IngressSettings
    network: NetworkConfig
    ingress: IngressServer
    channel: grpc.aio.Channel
    shutdowns: list[float]

    @property
    def inference(self) -> Any:
        """The client API."""
        return inference_pb2_grpc.InferenceStub(self.channel)  # type: ignore[no-untyped-call]

    @property
    def admin(self) -> Any:
        """The operators' API."""
        return admin_pb2_grpc.AdminStub(self.channel)  # type: ignore[no-untyped-call]

    async def ask(self, request: inference.GenerateRequest, answer: Answer | None = None, **call: Any) -> Answer:
        """One Generate stream to its end; raises grpc.aio.AioRpcError."""
        return await drain(self.inference.Generate(request, **call), answer)

    async def resume(self, request_id: str, from_index: int = 0, answer: Answer | None = None) -> Answer:
        """One Resume stream to its end."""
        return await drain(self.inference.Resume(inference.ResumeRequest(request_id=request_id, from_index=from_index)), answer)

    async def state(self, request_id: str) -> str:
        """The state in Redis."""
        return (await self.store.look([request_id]))[0].state

    async def restart_ingress(self, grace_s: float = 0.0) -> None:
        """Stops the ingress and starts another one under the same name, on another port."""
        await self.ingress.stop(grace_s)
        await self.channel.close()
        self.ingress = a_server(self)
        await self.ingress.start()
        self.channel = open_channel(self.ingress.address)


async def drain(call: Any, answer: Answer | None = None) -> Answer:
    """Reads a stream to its end."""
    answer = answer if answer is not None else Answer()
    async for event in call:
        answer.take(event)
    return answer


def a_server(world: World) -> IngressServer:
    """An ingress for this world."""
    return IngressServer(
        settings=world.settings,
        network=world.network,
        store=world.store,
        model=oracle_model(),
        on_shutdown=world.shutdowns.append,
    )


@asynccontextmanager
async def a_world(url: str, cluster: str, config: IngressConfig | None = None, **settings: Any) -> AsyncIterator[World]:
    """Starts store client, worker, core and ingress; stops them all."""
    config = config or IngressConfig(address="127.0.0.1:0", default_max_tokens=8)
    store = await Store.connect(url, cluster, timeout_s=STORE_TIMEOUT_S, retain_s=60.0)
    worker = FakeWorker(url, cluster)
    core = FakeCore(store, worker)
    values = {"version": "0-test", "lease_s": LEASE_S, "linger_s": 0.05} | settings
    world = World(
        url,
        cluster,
        store,
        worker,
        core,
        IngressSettings(config=config, **values),
        NetworkConfig(),
        None,
        None,
        [],  # type: ignore[arg-type]
    )
    try:
        await worker.start()
        await core.start()
        world.ingress = a_server(world)
        await world.ingress.start()
        world.channel = open_channel(world.ingress.address)
        yield world
    finally:
        if world.channel is not None:
            await world.channel.close()
        if world.ingress is not None:
            await world.ingress.stop(0.0)
        await core.stop()
        await worker.stop()
        await store.close()


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> None:
    """Polls until the condition (plain or awaitable) holds. Fails with `what` after the timeout."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        found = condition()
        with suppress(StoreUnavailable):
            if await found if asyncio.iscoroutine(found) else found:
                return
        assert asyncio.get_running_loop().time() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.005)


def a_prompt(request_id: str, text: str = "hello", seed: int = 11, **sampling: Any) -> inference.GenerateRequest:
    """A request with a seed, so that its tokens are known."""
    return inference.GenerateRequest(request_id=request_id, text=text, sampling=inference.SamplingParams(seed=seed, **sampling))
