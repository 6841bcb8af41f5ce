"""One request through a real ingress: answers, idempotency, resumption, ends of every kind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc.aio
import pytest

from orchestrator.ingress.tokenizer import ByteTokenizer
from protos.contract.errors import (
    AutanError,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    PoisonRequest,
    QueueFull,
    RequestConflict,
    ResumeGone,
    UnknownRequest,
)
from protos.contract.redis_names import pack_tokens
from protos.rpc import error_of
from protos.wire import admin, common, inference, tokens
from tests.support.ingress_worker import expected_token, expected_tokens
from tests.support.ingress_world import Answer, World, a_prompt, a_world, until
from tests.support.store import FreshStore


def run(store: FreshStore, scenario: Callable[[World], Awaitable[None]], **settings: object) -> None:
    """Runs a scenario in a world of its own, within a deadline."""

    async def body() -> None:
        async with asyncio.timeout(30), a_world(store.url, store.cluster, **settings) as world:
            await scenario(world)

    asyncio.run(body())


async def refused(work: Awaitable[object]) -> AutanError:
    """The error of the tree with which a call ends."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await work
    return error_of(failed.value)


def test_an_answer_is_the_workers_tokens_once_each(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        answer = await world.ask(a_prompt("r-1", max_tokens=40))
        assert answer.ids == expected_tokens(11, 40)
        assert answer.text == ByteTokenizer().decode(answer.ids)
        assert answer.accepted is not None and answer.finished is not None
        assert (answer.accepted.request_id, answer.accepted.prompt_tokens, answer.accepted.seed) == ("r-1", 5, 11)
        assert answer.finished.reason == common.FINISH_REASON_LENGTH
        assert (answer.finished.prompt_tokens, answer.finished.completion_tokens) == (5, 40)
        assert answer.finished.timeline.prefill_instance == "w-0" and answer.finished.timeline.ttft_s > 0
        assert await world.state("r-1") == "DONE"
        await until(lambda: not world.worker.jobs, "the worker forgets the request")
        assert len(world.ingress.parts.table) == 0

    run(fresh_store, scenario)


def test_many_at_once_and_a_seed_of_the_server(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        answers = await asyncio.gather(*(world.ask(inference.GenerateRequest(text=f"prompt {n}")) for n in range(40)))
        seeds = [answer.accepted.seed for answer in answers if answer.accepted]
        assert len(set(seeds)) == 40
        assert [answer.ids for answer in answers] == [expected_tokens(seed, 8) for seed in seeds]
        assert world.ingress.parts.metrics.value("group_commits") < 40 * 8

    run(fresh_store, scenario)


def test_the_same_request_ten_times_at_once_is_one_request(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.worker.allow(3)
        calls = [asyncio.create_task(world.ask(a_prompt("r-1"))) for _ in range(10)]
        await until(lambda: world.ingress.parts.service.open_streams == 10, "all are attached")
        await until(lambda: world.worker.jobs, "the worker has it")
        world.worker.allow(99)
        answers = await asyncio.gather(*calls)
        assert all(answer.ids == expected_tokens(11, 8) and answer.finished for answer in answers)
        again = await world.ask(a_prompt("r-1"))
        assert again.ids == expected_tokens(11, 8) and again.text == answers[0].text
        totals = (await world.store.stats()).totals
        assert (totals["submitted"], totals["assigned"]) == (1, 1)
        error = await refused(world.ask(a_prompt("r-1", text="another body")))
        assert type(error) is RequestConflict

    run(fresh_store, scenario)


def test_resume_of_a_live_and_of_a_finished_request(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.worker.allow(4)
        first = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=12)))
        await until(lambda: world.ingress.parts.metrics.value("tokens_journaled") == 4, "four tokens are journaled")
        second = asyncio.create_task(world.resume("r-1", 2))
        await until(lambda: world.ingress.parts.service.open_streams == 2, "both read along")
        world.worker.allow(99)
        whole = await first
        assert (await second).ids == whole.ids[2:] == expected_tokens(11, 12)[2:]
        for start in (0, 5, 11, 12):
            again = await world.resume("r-1", start)
            assert again.ids == whole.ids[start:] and again.finished is not None
            assert again.finished.completion_tokens == 12
            assert whole.text.endswith(again.text)
        assert type(await refused(world.resume("r-1", 13))) is ResumeGone
        assert type(await refused(world.resume("r-2"))) is UnknownRequest

    run(fresh_store, scenario)


def test_a_stop_string_ends_the_request_at_the_worker_too(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        word = [byte + 3 for byte in b"hello END of it"]
        world.worker.token = lambda seed, index: word[index] if index < len(word) else expected_token(seed, index)
        world.worker.allow(8)
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=100, stop=["END", "never"])))
        await until(lambda: world.ingress.parts.metrics.value("tokens_journaled") == 8, "the start of it is journaled")
        world.worker.allow(99)
        answer = await call
        assert answer.finished is not None
        assert (answer.text, answer.finished.stop, answer.finished.reason) == ("hello ", "END", common.FINISH_REASON_STOP)
        assert answer.ids == word[:9]
        assert await world.state("r-1") == "DONE"
        await until(lambda: not world.worker.jobs, "the worker is told")
        replay = await world.resume("r-1", 0)
        assert replay.finished is not None and (replay.text, replay.finished.stop) == ("hello ", "END")

    run(fresh_store, scenario)


@pytest.mark.parametrize("how", ["client", "operator"])
@pytest.mark.parametrize("running", [False, True], ids=["queued", "running"])
def test_cancel_reaches_every_stage(fresh_store: FreshStore, running: bool, how: str) -> None:
    async def scenario(world: World) -> None:
        world.core.paused = not running
        world.worker.allow(3)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1"), answer))
        if running:
            await until(lambda: len(answer.ids) == 3, "three tokens came")
        else:
            await until(lambda: answer.accepted, "it is accepted")
        if how == "client":
            reply = await world.inference.Cancel(inference.CancelRequest(request_id="r-1"))
        else:
            reply = await world.admin.CancelRequest(admin.AdminCancelRequest(request_id="r-1"))
        assert reply.state == "CANCELLED"
        assert type(await refused(call)) is Cancelled
        assert answer.ids == expected_tokens(11, 3 if running else 0)
        assert await world.state("r-1") == "CANCELLED"
        if running:
            await until(lambda: world.worker.revoked == ["r-1"], "the worker is told")
        again = await world.inference.Cancel(inference.CancelRequest(request_id="r-1"))
        assert again.state == "CANCELLED"
        assert type(await refused(world.inference.Cancel(inference.CancelRequest(request_id="r-9")))) is UnknownRequest

    run(fresh_store, scenario)


@pytest.mark.parametrize("running", [False, True], ids=["queued", "running"])
def test_a_client_that_leaves_cancels_its_request(fresh_store: FreshStore, running: bool) -> None:
    async def scenario(world: World) -> None:
        world.core.paused = not running
        world.worker.allow(3)
        call = world.inference.Generate(a_prompt("r-1"))
        assert (await call.read()).accepted.request_id == "r-1"
        if running:
            assert (await call.read()).WhichOneof("event") == "tokens"
        call.cancel()

        async def is_cancelled() -> bool:
            return await world.state("r-1") == "CANCELLED"

        await until(is_cancelled, "the request is cancelled")
        await until(lambda: not len(world.ingress.parts.table), "nothing of it is left")
        world.core.paused = False
        world.worker.allow(99)
        assert (await world.ask(a_prompt("r-2"))).ids == expected_tokens(11, 8)

    run(fresh_store, scenario)


def test_a_request_that_somebody_else_reads_survives_a_client_that_leaves(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.worker.allow(3)
        leaving = world.inference.Generate(a_prompt("r-1"))
        await leaving.read()
        staying = asyncio.create_task(world.resume("r-1"))
        await until(lambda: world.ingress.parts.service.open_streams == 2, "both read")
        leaving.cancel()
        await until(lambda: world.ingress.parts.service.open_streams == 1, "one has left")
        await asyncio.sleep(3 * world.settings.linger_s)
        world.worker.allow(99)
        assert (await staying).ids == expected_tokens(11, 8)

    run(fresh_store, scenario)


def test_a_deadline_in_the_queue_and_while_running(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.core.paused = True
        queued = a_prompt("r-1")
        queued.timeout_s = 0.2
        error = await refused(world.ask(queued))
        assert type(error) is DeadlineExceeded
        assert await world.state("r-1") == "EXPIRED"
        world.core.paused = False
        world.worker.allow(3)
        running, answer = a_prompt("r-2"), Answer()
        running.timeout_s = 0.4
        assert type(await refused(world.ask(running, answer))) is DeadlineExceeded
        assert answer.ids == expected_tokens(11, 3)
        await until(lambda: "r-2" in world.worker.revoked, "the worker is told")
        replay = Answer()
        assert type(await refused(world.resume("r-2", 1, replay))) is DeadlineExceeded
        assert replay.ids == expected_tokens(11, 3)[1:]

    run(fresh_store, scenario)


def test_the_callers_own_deadline_counts_too(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.core.paused = True
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await world.ask(a_prompt("r-1"), timeout=0.3)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        async def is_over() -> bool:
            return await world.state("r-1") in ("EXPIRED", "CANCELLED")

        await until(is_over, "the queue is free of it")

    run(fresh_store, scenario)


def test_a_failure_at_the_worker_is_the_clients_error(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.worker.allow(2)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1"), answer))
        await until(lambda: len(answer.ids) == 2, "two tokens came")
        await world.worker.fail("r-1", EngineFailure("the engine broke on r-1"))
        error = await refused(call)
        assert type(error) is EngineFailure and error.message == "the engine broke on r-1"
        call = asyncio.create_task(world.ask(a_prompt("r-2")))
        await until(lambda: "r-2" in world.worker.jobs, "the worker has it")
        await world.worker.fail("r-2", EngineFailure("again"), poison=True)
        assert type(await refused(call)) is PoisonRequest

    run(fresh_store, scenario)


def test_a_full_queue_refuses_with_a_retry_after(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.core.paused = True
        calls = [asyncio.create_task(world.ask(a_prompt(f"r-{n}"))) for n in range(3)]

        async def queued() -> bool:
            return (await world.store.stats()).queued == 3

        await until(queued, "three wait")
        error = await refused(world.ask(a_prompt("r-9")))
        assert type(error) is QueueFull and error.retry_after_s > 0
        world.core.paused = False
        assert [len(answer.ids) for answer in await asyncio.gather(*calls)] == [8, 8, 8]

    run(fresh_store, scenario, max_queued=3)


def test_a_request_of_a_lost_worker_goes_on_with_the_next_epoch(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.worker.allow(5)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=20), answer))
        await until(lambda: len(answer.ids) == 5, "five tokens came")
        stale = world.worker.jobs["r-1"]
        world.worker.answers = False

        def is_again_assigned() -> bool:
            job = world.worker.jobs.get("r-1")
            return job is not None and job.epoch > stale.epoch

        await until(is_again_assigned, "the lease lapsed and it is assigned again")
        world.worker.answers = True
        # The old holder comes back with a token of its own: it is refused, and told so.
        world.worker.allow(7)
        await until(lambda: len(answer.ids) == 7, "the new epoch goes on")
        world.worker.send(
            world.ingress.sink_address,
            tokens.RequestTokens(request_id="r-1", epoch=stale.epoch, first_index=7, token_ids=pack_tokens([5])),
        )
        await until(lambda: any(ack.stale and ack.epoch == stale.epoch for ack in world.worker.acks), "it is told")
        world.worker.allow(99)
        assert (await call).ids == expected_tokens(11, 20)
        assert world.ingress.parts.metrics.value("stale_refused") == 1

    run(fresh_store, scenario)
