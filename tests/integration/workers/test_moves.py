"""Running requests move between real workers: oracle engine, gRPC, store. Every token is compared with the reference."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.ingress.moving import Mover
from orchestrator.store.replies import Migration
from protos.contract.redis_names import Code
from tests.support.kv_wire import FaultyWire, put_wire
from tests.support.store import FreshStore
from tests.support.worker_world import WorkerWorld, prompt, slow, until, worker_world

STEP = slow(decode_step_s=0.01)


async def migrate(world: WorkerWorld, request_id: str, target: str) -> Code:
    """Asks for a move as an operator does."""
    incarnations = {record.instance_id: record.incarnation for record in (await world.store.view()).instances}
    (at,) = [one for one in (await world.store.requests()).requests if one.request_id == request_id]
    wanted = Migration(request_id, at.epoch, target, incarnations[target], 4, at.next_epoch)
    return (await world.store.migrate([wanted], max_migrations=3))[0].code


async def running(world: WorkerWorld, tokens: int = 3, max_tokens: int = 60, length: int = 100, **sampling: object) -> str:
    """A request that decodes on decode-0."""
    request = await world.submit(prompt(length), max_tokens, **sampling)
    await world.assign(request, "prefill-0", "decode-0")
    await until(lambda: len(world.ingress.of(request).output) >= tokens, "it decodes")
    return request


async def workers(world: WorkerWorld, *decode: str) -> None:
    await world.start_worker("prefill-0", "prefill")
    for name in ("decode-0", *decode):
        await world.start_worker(name, "decode", engine=STEP)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7}])
def test_a_running_request_moves_and_no_token_changes(fresh_store: FreshStore, sampling: dict[str, object]) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await workers(world, "decode-1")
            request = await running(world, **sampling)
            assert await migrate(world, request, "decode-1") is Code.OK
            got = await world.answered(request)
            assert {"decode-0", "decode-1"} <= got.senders
            assert got.timelines[-1].migrations == 1 and 0 < got.timelines[-1].migration_pause_s < 1
            assert world.hosts["decode-1"].engine.stats().prefill_tokens == 0, "nothing was computed twice"
            await world.clean()

    asyncio.run(scenario())


def test_two_moves_in_a_row_and_no_more_than_allowed(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await workers(world, "decode-1")
            request = await running(world, max_tokens=150)
            for epoch, target in ((2, "decode-1"), (3, "decode-0"), (4, "decode-1")):
                assert await migrate(world, request, target) is Code.OK

                async def is_there(epoch: int = epoch) -> bool:
                    return (await world.store.look([request]))[0].epoch == epoch

                await until(is_there, f"{target} took over")
            assert await migrate(world, request, "decode-0") is Code.FULL
            assert (await world.answered(request)).timelines[-1].migrations == 3
            await world.clean()

    asyncio.run(scenario())


def test_a_drain_moves_what_runs(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await workers(world, "decode-1")
            requests = [await running(world, max_tokens=120, length=40 + at) for at in range(3)]
            mover = Mover(world.store, 3)
            assert sorted(await mover.drain("decode-0", True)) == sorted(requests)
            await until(lambda: not len(world.hosts["decode-0"].parts.assignments), "decode-0 is empty")
            for request in requests:
                assert await world.state(request) == "DECODING", "it runs elsewhere, it was not waited for"
                assert "decode-1" in (await world.answered(request)).senders
            await world.clean()

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["closed", "cut", "lost reply"])
def test_a_broken_wire_costs_no_token(fresh_store: FreshStore, fault: str) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await workers(world, "decode-1")
            wire: FaultyWire = await put_wire(world, "decode-1")
            try:
                wire.closed = fault == "closed"
                wire.drop_replies = 2 if fault == "lost reply" else 0
                if fault == "cut":
                    wire.mutate = lambda n, frame: None
                request = await running(world, max_tokens=100)
                assert await migrate(world, request, "decode-1") is Code.OK
                got = await world.answered(request)
                assert ("decode-1" in got.senders) == (fault == "lost reply")
                await world.clean()
            finally:
                await wire.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "point", ["handoff.before_open", "handoff.mid_push", "handoff.before_end", "import.before_commit", "import.in_engine"]
)
def test_cancel_at_every_stage(fresh_store: FreshStore, point: str) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            await world.start_worker("decode-0", "decode", engine=STEP)
            await world.start_worker("decode-1", "decode", engine=STEP)
            request = await running(world, max_tokens=1500)
            host = world.hosts["decode-1" if point.startswith("import") else "decode-0"]
            reached = asyncio.Event()

            async def reach(name: str) -> None:
                if name == point:
                    reached.set()
                    await asyncio.sleep(0.3)

            if point.startswith("import"):
                host.parts.receiver._reach = reach
            else:
                object.__setattr__(host.parts.moves._context, "reach", reach)
            await migrate(world, request, "decode-1")
            await reached.wait()
            await world.store.cancel(request, "", "operator")
            await world.clean()
            whole = world.expected(request)
            output = world.ingress.of(request).output
            assert output == whole[: len(output)]

    asyncio.run(scenario())
