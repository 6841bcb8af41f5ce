"""A client cancels, or its connection breaks, at each stage of its request: compute stops and the blocks are free at once.

The books are asked of the worker processes themselves, so what is measured is the truth and not the last heartbeat.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest

from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient
from protos.contract.errors import Cancelled
from protos.rpc import inference_pb2_grpc, open_channel, worker_pb2_grpc
from protos.wire import audit, common, inference, worker
from tests.support.cluster import (
    Watched,
    expected_output,
    no_block_left,
    oracle_config,
    pid_of,
    random_prompt,
    run,
    running,
    watch,
)
from tests.support.processes import process_state
from tests.support.worker_world import until

STEP_S = 0.2  # of a chunk, and of a decoded token: far longer than a message takes to get around
CHUNK_TOKENS, BLOCK_TOKENS = 64, 16
LONG, SHORT, MAX_TOKENS = 8 * CHUNK_TOKENS, CHUNK_TOKENS, 60
LINGER_S = 0.5  # a client whose connection broke may come back for so long
FREE_WITHIN_S = 1.0
ENGINE = {
    "block_tokens": BLOCK_TOKENS, "num_blocks": 96, "max_batch_tokens": CHUNK_TOKENS, "max_running": 8,
    "oracle": {"prefill_tokens_per_s": CHUNK_TOKENS / STEP_S, "decode_step_s": STEP_S},
}  # fmt: skip
HELD = {"decode-0": {"import.before_commit#1": "hold:3", "import.in_engine#1": "hold:3"}}


@dataclass(frozen=True, slots=True)
class Freed:
    """What one cancel took: until no worker held a block of the request, and what was computed for it meanwhile."""

    stage: str
    seconds: float
    chunks: int
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.stage:<36} free after {self.seconds * 1000:>5.0f} ms, {self.chunks} chunks and {self.steps} steps computed"
        )


class Bench:
    """One cluster, its workers asked directly, and what the cancels took."""

    def __init__(self, cluster: LocalCluster, client: AsyncClient, stubs: dict[str, Any]) -> None:
        self.cluster = cluster
        self.client = client
        self._stubs = stubs
        self.freed: list[Freed] = []

    async def entries(self, request_id: str) -> list[audit.KvEntry]:
        """What the request holds, on either worker: blocks, pins and transfers."""
        books = await asyncio.gather(*(stub.ListKv(worker.WorkerListKvRequest()) for stub in self._stubs.values()))
        return [entry for one in books for entry in one.entries if entry.request_id == request_id]

    async def stats(self, instance_id: str) -> common.InstanceStats:
        """The counters of a worker now."""
        reply: worker.WorkerStatusReply = await self._stubs[instance_id].Status(worker.WorkerStatusRequest())
        return reply.stats

    async def state(self, request_id: str) -> str:
        """The request's state in Redis."""
        return (await self.cluster.store.look([request_id]))[0].state

    async def stage_of(self, request_id: str) -> set[tuple[str, str]]:
        """Owner and stage of everything it holds."""
        return {(entry.owner, entry.stage) for entry in await self.entries(request_id)}

    async def free(self, stage: str, request_id: str, leave: Callable[[], Awaitable[Any]]) -> Freed:
        """Has the client leave and waits until nothing of the request is held; the computation is looked at a while longer."""
        before = await self.stats("prefill-0"), await self.stats("decode-0")
        started_s = time.monotonic()
        await leave()
        while await self.entries(request_id):
            assert time.monotonic() < started_s + 10.0, f"{stage}: {await self.stage_of(request_id)}"
        seconds = time.monotonic() - started_s
        await until(lambda: _is(self, request_id, "CANCELLED"), f"{stage}: it is cancelled", 2.0)
        await asyncio.sleep(2 * STEP_S)  # another chunk would show up meanwhile
        after = await self.stats("prefill-0"), await self.stats("decode-0")
        chunks = after[0].prefill_chunks - before[0].prefill_chunks
        freed = Freed(stage, seconds, chunks, after[1].decode_tokens - before[1].decode_tokens)
        self.freed.append(freed)
        return freed

    async def next_chunk(self) -> None:
        """Returns when the prefill worker has just finished a chunk."""
        chunks = (await self.stats("prefill-0")).prefill_chunks

        async def another() -> bool:
            return (await self.stats("prefill-0")).prefill_chunks > chunks

        await until(another, "another chunk")


async def _is(bench: Bench, request_id: str, state: str) -> bool:
    return await bench.state(request_id) == state


def begin(bench: Bench, name: str, prompt_tokens: int, max_tokens: int = MAX_TOKENS) -> asyncio.Task[Watched]:
    """A client of its own for one request."""
    prompt = random_prompt(sum(name.encode()), prompt_tokens)
    return asyncio.create_task(watch(bench.client, prompt, max_tokens, request_id=name))


async def cancelled(bench: Bench, stage: str, name: str, task: asyncio.Task[Watched]) -> Freed:
    """The client's cancel, and the end that its stream tells."""
    freed = await bench.free(stage, name, lambda: bench.client.cancel(name))
    with pytest.raises(Cancelled):
        await asyncio.wait_for(task, 5.0)
    return freed


async def queued(bench: Bench) -> None:
    blocker = begin(bench, "blocker", SHORT, 96 * BLOCK_TOKENS - SHORT - CHUNK_TOKENS)
    await until(lambda: _is(bench, "blocker", "DECODING"), "the pool is taken")
    task = begin(bench, "queued", LONG)
    await until(lambda: _is(bench, "queued", "QUEUED"), "it waits")
    await asyncio.sleep(STEP_S)
    assert await bench.state("queued") == "QUEUED", "there is no room for it"
    freed = await cancelled(bench, "queued", "queued", task)
    assert freed.chunks == 0
    await bench.client.cancel("blocker")
    with pytest.raises(Cancelled):
        await blocker
    await no_block_left(bench.client)


async def assigned(bench: Bench) -> None:
    pid = await pid_of(bench.cluster, "prefill-0")
    os.kill(pid, signal.SIGSTOP)
    try:
        await until(lambda: process_state(pid) == "T", "the prefill worker stands")
        task = begin(bench, "assigned", LONG)
        await until(lambda: _is(bench, "assigned", "ASSIGNED"), "it is assigned and not picked")
        await bench.client.cancel("assigned")
    finally:
        os.kill(pid, signal.SIGCONT)
    freed = await cancelled(bench, "assigned, before the pick", "assigned", task)
    assert freed.chunks == 0


async def first_chunk(bench: Bench) -> None:
    task = begin(bench, "first", LONG)
    await until(lambda: _holds(bench, "first", ("request", "prefilling")), "it is prefilled")
    freed = await cancelled(bench, "prefilling the first chunk", "first", task)
    assert freed.chunks <= 1


async def later_chunk(bench: Bench) -> None:
    task = begin(bench, "later", LONG)
    await until(lambda: _holds(bench, "later", ("receive", "receiving")), "blocks are on their way")
    await bench.next_chunk()
    freed = await cancelled(bench, "prefilling a later chunk, pushing", "later", task)
    assert freed.chunks <= 1


async def commit(bench: Bench) -> None:
    for at in ("before the engine has it", "before Redis agrees"):
        name = f"commit-{at.split()[1]}"
        task = begin(bench, name, SHORT)
        await until(lambda name=name: _holds(bench, name, ("receive", "verifying")), "it is verified")
        freed = await cancelled(bench, f"commit, {at}", name, task)
        assert freed.steps <= 2, "the step under way, and the one that the engine began before it heard"


async def decoding(bench: Bench) -> None:
    task = begin(bench, "decoding", SHORT)
    await until(lambda: _has_tokens(bench, "decoding", 3), "it decodes")
    freed = await cancelled(bench, "decoding", "decoding", task)
    assert freed.steps <= 1


async def _holds(bench: Bench, request_id: str, what: tuple[str, str]) -> bool:
    return what in await bench.stage_of(request_id)


async def _has_tokens(bench: Bench, request_id: str, count: int) -> bool:
    return any(one.request_id == request_id and one.completion_tokens >= count for one in await bench.client.requests())


STAGES = (commit, queued, assigned, first_chunk, later_chunk, decoding)


async def broken_connections(bench: Bench) -> None:
    """As a client that is killed: the stream ends without a word."""
    for name, tokens, reached in (
        ("broken-prefilling", LONG, lambda: _holds(bench, "broken-prefilling", ("receive", "receiving"))),
        ("broken-decoding", SHORT, lambda: _has_tokens(bench, "broken-decoding", 2)),
    ):
        channel = grpc.aio.insecure_channel(bench.client.endpoint)
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        ids = inference.TokenIds(ids=random_prompt(len(name), tokens))
        sampling = inference.SamplingParams(max_tokens=MAX_TOKENS)
        call = stub.Generate(inference.GenerateRequest(token_ids=ids, sampling=sampling, request_id=name))
        reading = asyncio.create_task(_read(call))
        await until(reached, f"{name} is there")
        await bench.free(f"connection breaks, {name.split('-')[1]}", name, channel.close)
        await reading


async def _read(call: Any) -> None:
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        async for _ in call:
            pass


@pytest.mark.slow
def test_a_cancel_frees_the_blocks_and_stops_the_computation_at_every_stage() -> None:
    config = oracle_config("cancels", engine=ENGINE, timing={"heartbeat_s": 0.2, "lease_s": 3.0})

    async def body() -> None:
        async with running(config, HELD) as (cluster, client):
            addresses = {one.instance_id: one.addr for one in (await cluster.store.view()).instances}
            channels = {name: open_channel(address) for name, address in addresses.items()}
            make: Any = worker_pb2_grpc.WorkerStub
            bench = Bench(cluster, client, {name: make(channel) for name, channel in channels.items()})
            try:
                for stage in STAGES:
                    await stage(bench)
                await broken_connections(bench)
                await no_block_left(client)
                audits = (await client.verify_kv()).audits
                assert len(audits) == 2 and all(not one.findings for one in audits), audits
                prompt = random_prompt(1, SHORT)
                seen = await watch(client, prompt, 3)
                assert seen.token_ids == expected_output(config, prompt, 3), "the cluster goes on"
            finally:
                await asyncio.gather(*(channel.close() for channel in channels.values()))
                print("\n".join(map(str, bench.freed)))
            assert [one for one in bench.freed if one.seconds > FREE_WITHIN_S + LINGER_S * one.stage.startswith("conn")] == []

    run(body())
