"""A real ingress on a real store, with the core and the worker of ingress_worker, and short words for what clients do."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from configs.model_card import oracle_card
from configs.schema.network import IngressConfig, NetworkConfig
from orchestrator.ingress.model import ServedModel, load_served_model
from orchestrator.ingress.parts import IngressSettings
from orchestrator.ingress.server import IngressServer
from orchestrator.store.client import Store
from protos.contract.errors import StoreUnavailable
from protos.rpc import admin_pb2_grpc, inference_pb2_grpc, open_channel
from protos.wire import inference
from tests.support.ingress_worker import LEASE_S, FakeCore, FakeWorker

CONTEXT_TOKENS = 512
STORE_TIMEOUT_S = 0.4


def oracle_model(context_tokens: int = CONTEXT_TOKENS) -> ServedModel:
    """The oracle with a short context."""
    return load_served_model("oracle", dataclasses.replace(oracle_card(), context_tokens=context_tokens), None)


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
    context_tokens: int

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
        model=oracle_model(world.context_tokens),
        on_shutdown=world.shutdowns.append,
    )


@asynccontextmanager
async def a_world(
    url: str,
    cluster: str,
    config: IngressConfig | None = None,
    context_tokens: int = CONTEXT_TOKENS,
    store_type: type[Store] = Store,
    **settings: Any,
) -> AsyncIterator[World]:
    """Starts store client, worker, core and ingress; stops them all. The core and the ingress share the store's client."""
    config = config or IngressConfig(address="127.0.0.1:0", default_max_tokens=8)
    store = await store_type.connect(url, cluster, timeout_s=STORE_TIMEOUT_S, retain_s=60.0)
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
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        [],
        context_tokens,
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
