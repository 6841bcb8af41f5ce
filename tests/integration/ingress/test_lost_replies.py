"""Calls to the store that took effect although nobody heard of it: every token comes once, and one end is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from orchestrator.store.replies import Emission
from protos.contract.errors import DeadlineExceeded, StoreUnavailable
from protos.contract.redis_names import Fn, base_key, pack_tokens
from protos.rpc import error_of
from tests.support.ingress_worker import expected_tokens
from tests.support.ingress_world import Answer, World, a_prompt, a_world, until
from tests.support.lossy_store import LossyStore
from tests.support.store import FreshStore


def run(fresh: FreshStore, scenario: Callable[[World, LossyStore], Awaitable[None]], **settings: Any) -> None:
    """Runs a scenario within a deadline."""

    async def body() -> None:
        async with (
            asyncio.timeout(20),
            a_world(fresh.url, fresh.cluster, store_type=LossyStore, **settings) as world,
        ):
            assert isinstance(world.store, LossyStore)
            await scenario(world, world.store)

    asyncio.run(body())


async def refused(call: Awaitable[Answer]) -> Exception:
    """The error of our tree with which a stream ends."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return error_of(failed.value)


def overdue(world: World, request_id: str) -> None:
    """The deadline of a live request has passed by the clock of its ingress, and not by that of Redis."""
    live = world.ingress.parts.table.get(request_id)
    assert live is not None
    live.deadline_at_s = 0.0


async def lost_submit(world: World, store: LossyStore, tokens: int) -> None:
    """Submits a request that is accepted, and whose client is told otherwise when so many of its tokens are here."""
    world.worker.allow(tokens)
    store.hold_replies(Fn.SUBMIT)
    call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=8)))
    metrics = world.ingress.parts.metrics
    await until(lambda: metrics.value("tokens_accepted") == tokens, "the first tokens are here before the reply")
    store.lose_replies(Fn.SUBMIT, 1)
    store.release(Fn.SUBMIT)
    assert isinstance(await refused(call), StoreUnavailable)


def test_a_submit_without_a_reply_leaves_nobody_behind_who_writes(fresh_store: FreshStore) -> None:
    async def scenario(world: World, store: LossyStore) -> None:
        store.hold_calls(Fn.EMIT)
        store.hold_replies(Fn.RESUME)
        await lost_submit(world, store, 3)
        # The id gets another stream. What the first one would still write comes between what this one reads and its reply.
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=8), answer))
        await until(lambda: store.applied[Fn.RESUME] >= 1, "the client that comes again finds it")
        store.release(Fn.EMIT)
        await world.ingress.parts.journal.commit()
        assert store.applied[Fn.EMIT] == 0, "nothing was written"
        assert not any(ack.next_index for ack in world.worker.acks), "so nothing is forgotten"
        store.release(Fn.RESUME)
        world.worker.allow(99)
        assert (await call).ids == expected_tokens(11, 8)

    run(fresh_store, scenario)


def test_tokens_that_were_sent_while_nobody_took_them_come_again(fresh_store: FreshStore) -> None:
    async def scenario(world: World, store: LossyStore) -> None:
        store.hold_replies(Fn.RESUME)
        await lost_submit(world, store, 3)
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=8)))
        await until(lambda: store.applied[Fn.RESUME] >= 1, "the request is looked up")
        store.release(Fn.RESUME)
        store.hold_replies(Fn.RESUME)
        await until(lambda: store.applied[Fn.RESUME] >= 2, "it is this ingress's again, which does not know yet")
        batches = world.ingress.parts.metrics.value("token_batches")
        world.worker.allow(99)
        await until(lambda: world.worker.jobs["r-1"].finished, "the worker has sent everything")
        await until(lambda: world.ingress.parts.metrics.value("token_batches") > batches, "and it has come")
        store.release(Fn.RESUME)
        assert (await call).ids == expected_tokens(11, 8)
        assert await world.state("r-1") == "DONE"

    run(fresh_store, scenario)


def test_a_request_whose_client_was_told_otherwise_and_never_comes_again_is_finished(fresh_store: FreshStore) -> None:
    async def scenario(world: World, store: LossyStore) -> None:
        await lost_submit(world, store, 8)
        await until(lambda: _is(world, "r-1", "DONE"), "its worker has sent everything before the stream was discarded")
        await until(lambda: not world.worker.jobs, "and is free")
        assert (await world.resume("r-1")).ids == expected_tokens(11, 8)

    run(fresh_store, scenario)


def test_a_smaller_body_under_the_same_id_does_not_end_a_request(fresh_store: FreshStore) -> None:
    """Tokens of the first body reach the stream of the second one before the store has refused it."""

    async def scenario(world: World, store: LossyStore) -> None:
        await lost_submit(world, store, 0)
        store.hold_replies(Fn.SUBMIT)
        other = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=2)))
        await until(lambda: store.applied[Fn.SUBMIT] == 2, "the other body is refused")
        world.worker.allow(4)
        await until(lambda: world.ingress.parts.metrics.value("tokens_accepted") >= 2, "it is complete, if it were one")
        await world.ingress.parts.journal.commit()
        assert store.sent[Fn.EMIT] == 0 and store.sent[Fn.FINISH] == 0
        store.release(Fn.SUBMIT)
        await refused(other)
        world.worker.allow(99)
        assert (await world.ask(a_prompt("r-1", max_tokens=8))).ids == expected_tokens(11, 8)

    run(fresh_store, scenario)


def test_tokens_that_only_redis_has_are_read_back(fresh_store: FreshStore) -> None:
    """An emit that was given up takes effect later; the next worker begins behind it."""

    async def scenario(world: World, store: LossyStore) -> None:
        world.worker.allow(3)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=8), answer))
        await until(lambda: len(answer.ids) == 3, "three tokens came")
        owner = world.ingress.parts.owner
        late = Emission("r-1", world.worker.jobs["r-1"].epoch, 3, pack_tokens(expected_tokens(11, 5)[3:]))
        await store.emit(owner.ingress_id, owner.epoch, [late])
        await world.worker.restart()
        world.worker.allow(99)
        assert (await call).ids == expected_tokens(11, 8)
        assert await world.state("r-1") == "DONE"

    run(fresh_store, scenario)


def test_tokens_that_nobody_has_any_more_end_the_request_with_an_error(fresh_store: FreshStore) -> None:
    async def scenario(world: World, store: LossyStore) -> None:
        world.worker.allow(4)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=20), answer))
        await until(lambda: any(ack.next_index == 4 for ack in world.worker.acks), "the worker has forgotten four tokens")
        raw = fresh_store.raw()
        raw.redis.set(f"{base_key(fresh_store.cluster)}:t:r-1", pack_tokens(expected_tokens(11, 2)))
        raw.close()
        await world.restart_ingress()
        assert isinstance(await refused(call), Exception)
        world.worker.allow(6)
        resumed = asyncio.create_task(world.resume("r-1", 2))
        await until(lambda: world.ingress.parts.metrics.value("gaps_seen") > 0, "its tokens begin too late")
        error = await refused(resumed)
        assert type(error) is StoreUnavailable and "from token 2 on" in str(error)
        await until(lambda: _is(world, "r-1", "CANCELLED"), "Redis knows, and its worker is free")
        await until(lambda: not len(world.ingress.parts.table), "nothing of it is left")

    run(fresh_store, scenario, gap_patience_s=0.3)


async def _is(world: World, request_id: str, state: str) -> bool:
    return await world.state(request_id) == state


@pytest.mark.parametrize("emits", [1, 3])
def test_an_emit_whose_reply_is_lost_is_repeated_without_a_trace(fresh_store: FreshStore, emits: int) -> None:
    async def scenario(world: World, store: LossyStore) -> None:
        world.worker.allow(3)
        store.lose_replies(Fn.EMIT, emits)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=8), answer))
        await until(lambda: store.applied[Fn.EMIT] > 0, "they are journaled, which nobody here knows")
        await world.worker.restart()
        world.worker.allow(99)
        assert (await call).ids == expected_tokens(11, 8)
        await until(lambda: _is(world, "r-1", "DONE"), "it is done in Redis too")

    run(fresh_store, scenario)


def test_a_finish_that_took_effect_is_the_end_although_the_deadline_passes(fresh_store: FreshStore) -> None:
    async def scenario(world: World, store: LossyStore) -> None:
        store.hold_replies(Fn.FINISH)
        call = asyncio.create_task(world.ask(a_prompt("r-1", max_tokens=8)))
        await until(lambda: store.applied[Fn.FINISH] == 1, "it is DONE, which nobody here knows")
        overdue(world, "r-1")
        store.lose_replies(Fn.FINISH, 1)
        answer = await call
        assert answer.ids == expected_tokens(11, 8) and answer.finished is not None
        store.release(Fn.FINISH)
        assert await world.state("r-1") == "DONE"
        assert (await world.resume("r-1")).finished.reason == answer.finished.reason  # type: ignore[union-attr]

    run(fresh_store, scenario)


def test_a_finish_that_comes_behind_the_deadline_is_not_the_end(fresh_store: FreshStore) -> None:
    async def scenario(world: World, store: LossyStore) -> None:
        store.hold_calls(Fn.FINISH)
        request = a_prompt("r-1", max_tokens=8)
        request.timeout_s = 0.3
        answer = Answer()
        call = asyncio.create_task(world.ask(request, answer))
        assert isinstance(await refused(call), DeadlineExceeded)
        store.release(Fn.FINISH)
        await until(lambda: store.applied[Fn.FINISH] == 1, "the finish is refused")
        assert await world.state("r-1") == "EXPIRED" and answer.ids == expected_tokens(11, 8)
        assert isinstance(await refused(world.resume("r-1")), DeadlineExceeded)

    run(fresh_store, scenario)


def test_an_end_that_is_told_without_redis_is_the_end_afterwards(fresh_store: FreshStore) -> None:
    """The store stays away for this ingress alone, so that nobody else ends the request."""

    async def scenario(world: World, store: LossyStore) -> None:
        world.worker.allow(3)
        request = a_prompt("r-1", max_tokens=20)
        request.timeout_s = 60.0
        answer = Answer()
        call = asyncio.create_task(world.ask(request, answer))
        await until(lambda: len(answer.ids) == 3, "three tokens came")
        store.lose_calls(Fn.CANCEL, 3)
        overdue(world, "r-1")
        assert isinstance(await refused(call), DeadlineExceeded)
        assert await world.state("r-1") == "DECODING", "Redis has not heard of it"
        world.worker.allow(99)
        assert isinstance(await refused(world.resume("r-1")), DeadlineExceeded), "whoever asks again is told the same"
        await until(lambda: _is(world, "r-1", "EXPIRED"), "Redis is told")
        assert isinstance(await refused(world.resume("r-1")), DeadlineExceeded)
        await until(lambda: not len(world.ingress.parts.table), "nothing of it is left")

    run(fresh_store, scenario)
