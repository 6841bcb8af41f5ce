"""Real workers around a real store, with a small ingress and a small core: for tests of the workers alone.

Everything lives on one event loop: the hosts with their gRPC servers and engine threads, a TokenSink that journals and checks,
and a core that assigns what it is told to assign.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio

from configs.schema.cluster import SchedulingConfig, TimingConfig
from configs.schema.network import NetworkConfig
from configs.schema.pools import EngineConfig, ModelConfig, OracleCosts
from configs.worker_spec import WorkerSpec
from orchestrator.ingress.records import merge_timeline
from orchestrator.store.client import Store
from orchestrator.store.replies import Emission, Placement
from protos.contract.redis_names import Code, pack_tokens, unpack_tokens
from protos.rpc import GuardInterceptor, server_options, tokens_pb2_grpc
from protos.wire import common, tokens
from tests.support.store import FreshStore
from workers.engine_api.types import SamplingParams
from workers.engines.oracle.build import oracle_model
from workers.engines.oracle.reference import expected_tokens_fast
from workers.service.host import WorkerHost
from workers.service.lifecycle import ExitCode

MODEL = ModelConfig(name="oracle", source="oracle", dtype="float32", context_tokens=8192)
TIMING = TimingConfig(heartbeat_s=0.1, lease_s=1.0, kv_lease_s=1.5, progress_timeout_s=2.0, drain_s=5.0)
# Frames carry their bytes, so that faulty wires and forgers can change them; tests of shared memory ask for it.
NETWORK = NetworkConfig(frame_bytes=1024, credit_bytes=64 * 1024, shared_memory=False)
INGRESS = "g0"
LEADER = "core0"
BLOCK_TOKENS = 16

_ids = itertools.count(1)


def worker_spec(store: FreshStore, instance_id: str, role: str = "combined", **changes: Any) -> WorkerSpec:
    """A worker of the oracle model; `engine` holds changes of the engine section."""
    engine = {"kind": "oracle", "block_tokens": BLOCK_TOKENS, "num_blocks": 128, "max_batch_tokens": 64}
    engine |= changes.pop("engine", {})
    values: dict[str, Any] = {
        "cluster": store.cluster,
        "instance_id": instance_id,
        "pool": instance_id.rsplit("-", 1)[0],
        "role": role,
        "model": MODEL,
        "engine": EngineConfig(**engine),
        "store_url": store.url,
        "network": NETWORK,
        "timing": TIMING,
        "scheduling": SchedulingConfig(),
    }
    return WorkerSpec(**(values | changes))


def slow(prefill_tokens_per_s: float = 0.0, decode_step_s: float = 0.0) -> dict[str, Any]:
    """Engine changes that make the oracle take its time."""
    return {"oracle": OracleCosts(prefill_tokens_per_s=prefill_tokens_per_s, decode_step_s=decode_step_s)}


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = 15.0) -> None:
    """Polls until the condition holds. Raises AssertionError naming `what` at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        held = condition()
        if held if isinstance(held, bool) else await held:
            return
        assert time.monotonic() < deadline_s, f"not in {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


@dataclass
class Received:
    """What the ingress got of one request."""

    output: list[int] = field(default_factory=list)
    finish: int = common.FINISH_REASON_UNSPECIFIED
    timelines: list[common.Timeline] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    senders: set[str] = field(default_factory=set)


class TestIngress(tokens_pb2_grpc.TokenSinkServicer):
    """A TokenSink over the real `emit` and `finish`: what it delivered is what the journal took, in order, once."""

    __test__ = False

    def __init__(self, store: Store, name: str = INGRESS) -> None:
        self.store = store
        self.name = name
        self.address = ""
        self.epoch = 0
        self.got: dict[str, Received] = {}
        self.batches = 0
        self.silent = False  # takes tokens and acknowledges nothing
        self._server: Any = None

    async def start(self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> None:
        """Serves and registers; with TLS when there are credentials."""
        self._server = grpc.aio.server(interceptors=[GuardInterceptor()], options=server_options())
        tokens_pb2_grpc.add_TokenSinkServicer_to_server(self, self._server)
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        self.epoch = (await self.store.ingress(self.name, self.address, 600_000)).epoch

    async def stop(self) -> None:
        """Cuts every stream."""
        if self._server is not None:
            await self._server.stop(0)

    def of(self, request_id: str) -> Received:
        """What came of a request."""
        return self.got.setdefault(request_id, Received())

    async def Deliver(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[tokens.TokenAcks]:
        async for batch in request_iterator:
            self.batches += 1
            if not self.silent:
                yield tokens.TokenAcks(acks=[await self._take(item, batch.instance_id) for item in batch.requests])

    async def _take(self, item: tokens.RequestTokens, sender: str) -> tokens.TokenAck:
        got = self.of(item.request_id)
        ack = tokens.TokenAck(request_id=item.request_id, epoch=item.epoch)
        ids = unpack_tokens(item.token_ids)
        emission = Emission(item.request_id, item.epoch, item.first_index, item.token_ids)
        outcome = (await self.store.emit(self.name, self.epoch, [emission]))[0]
        if outcome.code not in (Code.OK, Code.DUPLICATE):
            got.refused.append(outcome.code.value)
            ended = (await self.store.look([item.request_id]))[0].has_ended
            ack.finished, ack.stale = ended, not ended
            return ack
        fresh = ids[max(0, len(got.output) - item.first_index) :]
        got.output += fresh
        got.senders.add(sender)
        if item.HasField("timeline"):
            # As the real ingress does: messages of two workers may pass each other, so each one adds to what is known.
            known = common.Timeline()
            if got.timelines:
                known.CopyFrom(got.timelines[-1])
            merge_timeline(known, item.timeline)
            got.timelines.append(known)
        ack.next_index = outcome.next_index
        if item.finish != common.FINISH_REASON_UNSPECIFIED and outcome.next_index == item.first_index + len(ids):
            got.finish = item.finish
            reply = await self.store.finish(
                ingress_id=self.name, ingress_epoch=self.epoch, request_id=item.request_id, epoch=item.epoch,
                reason="length" if item.finish == common.FINISH_REASON_LENGTH else "stop", n=outcome.next_index,
            )  # fmt: skip
            assert reply.code in (Code.OK, Code.DUPLICATE), reply
            ack.finished = True
        return ack


class WorkerWorld:
    """Hosts, an ingress and a core on one loop."""

    def __init__(self, fresh: FreshStore, store: Store) -> None:
        self.fresh = fresh
        self.store = store
        self.ingress = TestIngress(store)
        self.hosts: dict[str, WorkerHost] = {}
        self.codes: dict[str, asyncio.Task[ExitCode]] = {}
        self.leader_epoch = 0
        self.prompts: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}

    async def start_worker(self, instance_id: str, role: str = "combined", **changes: Any) -> WorkerHost:
        """A host in this process, READY when this returns."""
        host = WorkerHost(worker_spec(self.fresh, instance_id, role, **changes))
        self.hosts[instance_id] = host
        self.codes[instance_id] = asyncio.create_task(host.run())
        await self.ready(instance_id)
        return host

    async def ready(self, instance_id: str, above: int = 0) -> int:
        """Waits until an instance is READY in Redis in an incarnation above `above`, which is returned."""
        found: list[int] = []

        async def is_ready() -> bool:
            for record in (await self.store.view()).instances:
                if record.instance_id == instance_id and record.state == "READY" and record.incarnation > above:
                    found.append(record.incarnation)
                    return True
            return False

        await until(is_ready, f"{instance_id} is ready")
        return found[0]

    async def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int = 8,
        *,
        request_id: str = "",
        timeout_ms: int = 60_000,
        salt: bytes = b"salt",
        **sampling: Any,
    ) -> str:
        """Submits as the ingress and returns the id."""
        request_id = request_id or f"r{next(_ids)}"
        spec = common.RequestSpec(
            request_id=request_id, tenant="acme", model=MODEL.name, prompt_token_ids=pack_tokens(prompt),
            sampling=common.Sampling(max_tokens=max_tokens, top_p=1.0, **sampling), cache_salt=salt,
        )  # fmt: skip
        reply = await self.store.submit(
            request_id=request_id, body_hash=b"h", spec=spec.SerializeToString(), tenant="acme", model=MODEL.name,
            prompt_tokens=len(prompt), max_tokens=max_tokens, prio=0, timeout_ms=timeout_ms, ingress_id=self.ingress.name,
            ingress_epoch=self.ingress.epoch, ingress_addr=self.ingress.address, queue_limit=1000,
        )  # fmt: skip
        assert reply.code is Code.OK, reply
        stops = frozenset(sampling.get("stop_token_ids", ()))
        params = SamplingParams(
            max_tokens=max_tokens, temperature=sampling.get("temperature", 0.0), seed=sampling.get("seed", 0),
            stop_token_ids=stops,
        )  # fmt: skip
        self.prompts[request_id] = (tuple(prompt), params)
        return request_id

    async def assign(
        self, request_id: str, p: str, d: str, *, source: str = "", blocks: int = 0, wait_ms: int = 5_000, signed: bytes = b""
    ) -> int:
        """Places a queued request and returns its new epoch; `source` is to push its first `blocks` blocks to `p`."""
        view = await self.store.view()
        incarnations = {record.instance_id: record.incarnation for record in view.instances}
        epoch = (await self.store.look([request_id]))[0].epoch
        placement = Placement(request_id, epoch, p, incarnations[p], d, incarnations[d], 4, 4)
        if source:
            placement = replace(
                placement, s_inst=source, s_inc=incarnations[source], s_blocks=blocks, s_wait_ms=wait_ms, s_capability=signed
            )
        outcome = (await self.store.assign(LEADER, self.leader_epoch, 5_000, [placement]))[0]
        assert outcome.code is Code.OK, outcome
        return outcome.epoch

    async def reap(self, lost_ms: int = 1_500) -> None:
        """One reap, as the core does it."""
        await self.store.reap(LEADER, self.leader_epoch, limit=100, max_attempts=5, lost_ms=lost_ms, retain_ms=600_000)

    async def state(self, request_id: str) -> str:
        """The request's state in Redis."""
        return (await self.store.look([request_id]))[0].state

    async def ended(self, request_id: str, state: str = "DONE", timeout_s: float = 15.0) -> None:
        """Waits for a state."""

        async def is_there() -> bool:
            return await self.state(request_id) == state

        try:
            await until(is_there, f"{request_id} is {state}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {(await self.store.look([request_id]))[0]}") from error

    def expected(self, request_id: str) -> list[int]:
        """The right answer."""
        prompt, sampling = self.prompts[request_id]
        return expected_tokens_fast(oracle_model(MODEL), prompt, sampling)

    async def answered(self, request_id: str) -> Received:
        """Waits for DONE and checks every token."""
        await self.ended(request_id)
        got = self.ingress.of(request_id)
        assert got.output == self.expected(request_id)
        return got

    async def clean(self, *instance_ids: str) -> None:
        """Waits until these workers hold nothing, and checks that every hand-off was released once."""
        for instance_id in instance_ids or tuple(self.hosts):
            host = self.hosts[instance_id]
            await until(lambda host=host: is_idle(host), f"{instance_id} holds nothing: {describe(host)}")
            assert host.parts.ledger.opened == host.parts.ledger.released
            await host._thread.call(lambda engine: engine.check_integrity())

    async def stop(self) -> None:
        """Stops everything that still runs."""
        for name, host in self.hosts.items():
            if not self.codes[name].done():
                host.request_stop(0.0)
        await asyncio.gather(*self.codes.values(), return_exceptions=True)
        await self.ingress.stop()


def is_idle(host: WorkerHost) -> bool:
    """True when a worker holds no block, no assignment, no ledger entry and no token."""
    stats, parts = host.engine.stats(), host.parts
    return not (
        stats.used_blocks or stats.leaked_blocks or len(parts.assignments) or len(parts.ledger) or len(parts.handoffs)
        or parts.outbox.unacked_tokens or len(parts.prefixes.fetches) or len(parts.prefixes.lendings)
    )  # fmt: skip


def describe(host: WorkerHost) -> str:
    """What a worker holds."""
    parts = host.parts
    held = [(a.request_id, a.epoch, a.part.value, a.stage.value) for a in parts.assignments.all()]
    return f"{host.engine.stats()} {held} {[entry.line() for entry in parts.ledger.entries()]}"


@asynccontextmanager
async def worker_world(fresh: FreshStore, sink_credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[WorkerWorld]:
    """A world without workers yet; everything is stopped at the end."""
    async with await fresh.connect() as store:
        world = WorkerWorld(fresh, store)
        try:
            await world.ingress.start(credentials=sink_credentials)
            world.leader_epoch = (await store.lead(LEADER, 600_000)).epoch
            yield world
        finally:
            await world.stop()


def prompt(length: int, seed: int = 1) -> list[int]:
    """A prompt of the oracle's vocabulary."""
    rng = random.Random(seed)
    return [rng.randrange(3, 259) for _ in range(length)]
