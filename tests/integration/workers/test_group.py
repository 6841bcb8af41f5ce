"""Ranks of one instance: READY when all have joined, over when one is gone."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from protos.rpc import open_channel, worker_pb2_grpc
from protos.wire import worker
from tests.support.store import FreshStore
from tests.support.worker_world import prompt, until, worker_spec, worker_world
from workers.service.host import WorkerHost
from workers.service.lifecycle import ExitCode, InstanceState


def test_a_group_is_ready_together_and_ends_together(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            ranks = [WorkerHost(worker_spec(fresh_store, "combined-0", rank=rank, ranks=3)) for rank in range(3)]
            codes = [asyncio.create_task(ranks[1].run())]
            await asyncio.sleep(0.1)
            codes.append(asyncio.create_task(ranks[0].run()))
            await until(lambda: ranks[0].me.incarnation == 1, "rank 0 is registered")
            await asyncio.sleep(0.3)
            assert ranks[0].me.state is InstanceState.STARTING, "rank 2 is missing"
            codes.append(asyncio.create_task(ranks[2].run()))
            await world.ready("combined-0")
            request = await world.submit(prompt(40), 5)
            await world.assign(request, "combined-0", "combined-0")
            await world.answered(request)
            ranks[2].end(ExitCode.FAILED)
            assert sorted(await asyncio.gather(*codes)) == sorted(
                [ExitCode.FAILED, ExitCode.GROUP_BROKEN, ExitCode.GROUP_BROKEN]
            )
            states = {i.instance_id: i.state for i in (await world.store.view()).instances}
            assert states == {"combined-0": "STOPPED"}

    asyncio.run(scenario())


def test_the_end_of_rank_zero_is_the_end_of_all(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            ranks = [WorkerHost(worker_spec(fresh_store, "combined-0", rank=rank, ranks=2)) for rank in range(2)]
            codes = [asyncio.create_task(rank.run()) for rank in ranks]
            await world.ready("combined-0")
            ranks[0].end(ExitCode.ENGINE_LOST)
            assert await asyncio.gather(*codes) == [ExitCode.ENGINE_LOST, ExitCode.GROUP_BROKEN]

    asyncio.run(scenario())


@pytest.mark.parametrize(("group", "rank"), [("other", 1), ("combined-0", 0), ("combined-0", 2), ("combined-0", 1)])
def test_a_rank_that_is_not_of_the_group_is_refused(fresh_store: FreshStore, group: str, rank: int) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            ranks = [WorkerHost(worker_spec(fresh_store, "combined-0", rank=rank, ranks=2)) for rank in range(2)]
            codes = [asyncio.create_task(rank.run()) for rank in ranks]
            await world.ready("combined-0")
            async with open_channel(ranks[0].address) as channel:
                call = worker_pb2_grpc.WorkerStub(channel).JoinGroup()
                await call.write(worker.RankBeat(group=group, rank=rank))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
            assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ABORTED)
            assert not any(code.done() for code in codes), "the group lives on"
            for one in ranks:
                one.request_stop(0.0)
            assert ExitCode.FAILED not in await asyncio.gather(*codes)

    asyncio.run(scenario())
