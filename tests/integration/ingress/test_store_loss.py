"""Redis frozen, killed and wiped under a running ingress; an ingress that is replaced."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from redis.asyncio import Redis

from orchestrator.store.embedded import EmbeddedValkey
from protos.contract.errors import StoreUnavailable, UnavailableError
from protos.contract.redis_names import unpack_tokens
from protos.rpc import error_of
from protos.wire import admin
from tests.support.ingress_worker import LEASE_S, expected_tokens
from tests.support.ingress_world import Answer, World, a_prompt, a_server, a_world, until
from tests.support.store import new_cluster


def run(directory: Path, scenario: Callable[[World, EmbeddedValkey], Awaitable[None]], **settings: object) -> None:
    """Runs a scenario on a store of its own, within a deadline."""

    async def body() -> None:
        async with (
            asyncio.timeout(40),
            EmbeddedValkey(directory) as server,
            a_world(server.url, new_cluster(), **settings) as world,
        ):
            await scenario(world, server)

    asyncio.run(body())


@asynccontextmanager
async def frozen(server: EmbeddedValkey) -> AsyncIterator[None]:
    """The server's process is stopped inside, and that was seen."""
    pid = server.server_pid
    stat = Path(f"/proc/{pid}/stat")
    os.kill(pid, signal.SIGSTOP)
    try:
        await until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", "the server is stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def journal_of(world: World, request_id: str) -> list[int]:
    """The tokens that Redis has."""
    reply = await world.store.resume(request_id, "", ingress_id="reader", ingress_epoch=0, ingress_addr="")
    return unpack_tokens(reply.tokens)


async def done(world: World, request_id: str) -> bool:
    """True when Redis says DONE."""
    return await world.state(request_id) == "DONE"


def test_tokens_go_on_while_redis_is_frozen_and_are_back_filled(tmp_path: Path) -> None:
    async def scenario(world: World, server: EmbeddedValkey) -> None:
        metrics = world.ingress.parts.metrics
        world.worker.allow(3)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=30), answer))
        await until(lambda: len(answer.ids) == 3, "three tokens came")
        async with frozen(server):
            world.worker.allow(12)
            await until(lambda: len(answer.ids) == 12, "tokens come from memory")
            world.worker.allow(14)
            await until(lambda: len(answer.ids) == 14, "and more, at once")
            assert metrics.value("tokens_shown_unjournaled") >= 11
            assert not any(ack.next_index > 3 for ack in world.worker.acks), "nothing is acknowledged that is not journaled"
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await world.ask(a_prompt("r-2"))
            error = error_of(failed.value)
            assert type(error) is StoreUnavailable and error.retry_after_s > 0
            status = await world.admin.Status(admin.StatusRequest())
            assert not status.store_reachable and status.counters["backlog_tokens"] == 11
        world.worker.allow(99)
        assert (await call).ids == expected_tokens(11, 30)
        await until(lambda: done(world, "r-1"), "it is done in Redis too")
        assert await journal_of(world, "r-1") == expected_tokens(11, 30)
        assert (await world.ask(a_prompt("r-3"))).ids == expected_tokens(11, 8)

    run(tmp_path, scenario)


def test_a_request_that_ends_while_redis_is_frozen_is_done_afterwards(tmp_path: Path) -> None:
    async def scenario(world: World, server: EmbeddedValkey) -> None:
        world.worker.allow(3)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1"), answer))
        await until(lambda: len(answer.ids) == 3, "three tokens came")
        async with frozen(server):
            world.worker.allow(99)
            assert (await call).ids == expected_tokens(11, 8)
            # Longer than the lease: the request is assigned anew when Redis is back, although nothing is left to do.
            await asyncio.sleep(LEASE_S + 0.2)
        await until(lambda: done(world, "r-1"), "it is done in Redis too")
        assert await journal_of(world, "r-1") == expected_tokens(11, 8)
        await until(lambda: not world.worker.jobs and not len(world.ingress.parts.table), "nothing of it is left")

    run(tmp_path, scenario)


def test_redis_killed_in_mid_stream(tmp_path: Path) -> None:
    async def scenario(world: World, server: EmbeddedValkey) -> None:
        world.worker.allow(3)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=30), answer))
        await until(lambda: len(answer.ids) == 3, "three tokens came")
        os.kill(server.server_pid, signal.SIGKILL)
        world.worker.allow(10)
        await until(lambda: len(answer.ids) == 10, "tokens go on")
        await until(lambda: server.starts == 2, "the server is started again")
        world.worker.allow(99)
        assert (await call).ids == expected_tokens(11, 30)
        await until(lambda: done(world, "r-1"), "it is done in Redis too")
        assert await journal_of(world, "r-1") == expected_tokens(11, 30)

    run(tmp_path, scenario)


def test_a_backlog_over_its_budget_makes_workers_wait(tmp_path: Path) -> None:
    async def scenario(world: World, server: EmbeddedValkey) -> None:
        world.worker.allow(1)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=60), answer))
        await until(lambda: len(answer.ids) == 1, "one token came")
        async with frozen(server):
            world.worker.allow(30)
            await until(lambda: len(answer.ids) == 30, "the batch that goes over the budget is still taken")
            world.worker.allow(60)
            await asyncio.sleep(0.3)
            assert len(answer.ids) == 30, "nothing more is read from the worker"
        assert (await call).ids == expected_tokens(11, 60)

    run(tmp_path, scenario, max_backlog_tokens=20)


def test_a_wiped_redis_ends_the_request_with_an_error_and_serves_on(tmp_path: Path) -> None:
    async def scenario(world: World, server: EmbeddedValkey) -> None:
        world.worker.allow(3)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1"), answer))
        await until(lambda: len(answer.ids) == 3, "three tokens came")
        redis = Redis.from_url(server.url)
        await redis.flushall()
        await redis.aclose()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call
        error = error_of(failed.value)
        assert type(error) is StoreUnavailable and "lost request r-1" in error.message
        await world.worker.restart()

        async def serves() -> bool:
            try:
                world.worker.allow(99)
                return (await world.ask(a_prompt("r-2"))).ids == expected_tokens(11, 8)
            except grpc.aio.AioRpcError as refused:
                assert isinstance(error_of(refused), UnavailableError)
                return False

        await until(serves, "new requests are served")

    run(tmp_path, scenario)


def test_an_ingress_that_is_replaced_leaves_its_request_to_the_next(tmp_path: Path) -> None:
    async def scenario(world: World, server: EmbeddedValkey) -> None:
        world.worker.allow(4)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=20, stop=["\0never\0"]), answer))
        await until(lambda: len(answer.ids) == 4, "four tokens came")
        await world.restart_ingress()
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert world.ingress.parts.metrics.value("requests_adopted") == 1
        world.worker.allow(10)
        again = Answer()
        resumed = asyncio.create_task(world.resume("r-1", 4, again))
        await until(lambda: len(again.ids) == 6, "the worker replays to the new ingress")
        repeated = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=20, stop=["\0never\0"])))
        world.worker.allow(99)
        assert answer.ids + (await resumed).ids == expected_tokens(11, 20)
        assert (await repeated).ids == expected_tokens(11, 20)
        assert (await world.store.stats()).totals["submitted"] == 1

    run(tmp_path, scenario)


def test_an_adopted_request_is_finished_without_any_client(tmp_path: Path) -> None:
    async def scenario(world: World, server: EmbeddedValkey) -> None:
        world.worker.allow(4)
        call = world.inference.Generate(a_prompt("r-1"))
        await call.read()
        await until(lambda: world.ingress.parts.metrics.value("tokens_journaled") == 4, "four tokens are journaled")
        await world.restart_ingress()
        world.worker.allow(99)
        await until(lambda: done(world, "r-1"), "the promise is kept")
        assert await journal_of(world, "r-1") == expected_tokens(11, 8)
        await until(lambda: not len(world.ingress.parts.table), "nothing of it stays in memory")

    run(tmp_path, scenario)


def test_a_second_ingress_under_the_same_name_fences_the_first(tmp_path: Path) -> None:
    async def scenario(world: World, server: EmbeddedValkey) -> None:
        world.worker.allow(4)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=20), answer))
        await until(lambda: len(answer.ids) == 4, "four tokens came")
        second = a_server(world)
        await second.start()
        try:
            world.worker.allow(12)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert isinstance(error_of(failed.value), UnavailableError)
            assert answer.ids == expected_tokens(11, 4), "the first one shows nothing that the second one did not get"
            await until(lambda: world.ingress.parts.owner.is_fenced, "the first one knows")
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await world.ask(a_prompt("r-2"))
            assert isinstance(error_of(failed.value), UnavailableError)
            world.worker.allow(99)
            await until(lambda: done(world, "r-1"), "the second one finishes it")
            assert await journal_of(world, "r-1") == expected_tokens(11, 20)
        finally:
            await second.stop(0.0)

    run(tmp_path, scenario)
