"""Workers that lose their lease, their instance, their ingress or Redis: a stale one changes nothing, and all goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.contract.redis_names import InboxKind
from protos.rpc import open_channel
from tests.support.store import FreshStore
from tests.support.worker_world import TestIngress, WorkerWorld, prompt, slow, until, worker_spec, worker_world
from workers.service.host import WorkerHost
from workers.service.lifecycle import ExitCode
from workers.service.store import InboxEntry


async def reap_until_queued(world: WorkerWorld, request: str) -> None:
    async def queued() -> bool:
        await world.reap()
        return await world.state(request) == "QUEUED"

    await until(queued, "it is queued again")


async def health(host: WorkerHost) -> int:
    async with open_channel(host.address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return int(reply.status)


def test_a_superseded_process_drops_everything_and_ends(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            old = await world.start_worker("combined-0", engine=slow(decode_step_s=0.03))
            request = await world.submit(prompt(40), 60)
            await world.assign(request, "combined-0", "combined-0")
            await until(lambda: len(world.ingress.of(request).output) > 2, "it decodes")
            new = WorkerHost(worker_spec(fresh_store, "combined-0"))
            world.hosts["new"], world.codes["new"] = new, asyncio.create_task(new.run())
            assert await world.codes["combined-0"] is ExitCode.SUPERSEDED
            assert old.engine.stats().used_blocks == 0
            await world.ready("combined-0", above=1)
            await reap_until_queued(world, request)
            await world.assign(request, "combined-0", "combined-0")
            await world.answered(request)
            await world.clean("new")

    asyncio.run(scenario())


def test_a_fenced_process_does_not_push_its_successor_aside(fresh_store: FreshStore) -> None:
    """It fenced itself because Redis was silent for too long, and by then another process of the instance was there."""

    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            old = await world.start_worker("combined-0")
            assert old._renewals is not None
            newer = await old._store.register("combined-0", "combined", "elsewhere:1", b"")
            if old.me.incarnation is not None:
                old._renewals._fence("no renewal for too long")
            assert await world.codes["combined-0"] is ExitCode.SUPERSEDED
            (record,) = (await world.store.view()).instances
            assert (record.incarnation, record.addr) == (newer, "elsewhere:1")

    asyncio.run(scenario())


def test_an_instance_that_is_declared_lost_registers_anew(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            d = await world.start_worker("decode-0", "decode", engine=slow(decode_step_s=0.03))
            request = await world.submit(prompt(100), 40)
            await world.assign(request, "prefill-0", "decode-0")
            await until(lambda: len(world.ingress.of(request).output) > 3, "it decodes")
            await world.reap(lost_ms=0)
            assert await world.ready("decode-0", above=1) >= 2
            await world.ready("prefill-0", above=1)
            await until(lambda: d.engine.stats().used_blocks == 0, "everything was dropped")
            await reap_until_queued(world, request)
            await world.assign(request, "prefill-0", "decode-0")
            await world.answered(request)
            await world.clean()

    asyncio.run(scenario())


def test_the_store_freezes_for_longer_than_a_lease(fresh_store: FreshStore, embedded_pid: int) -> None:
    """Nothing is emitted while nobody knows who holds what; what is still this worker's goes on afterwards."""

    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            host = await world.start_worker("combined-0", engine=slow(decode_step_s=0.02))
            request = await world.submit(prompt(40), 150)
            await world.assign(request, "combined-0", "combined-0")
            await until(lambda: len(world.ingress.of(request).output) > 2, "it decodes")
            os.kill(embedded_pid, signal.SIGSTOP)
            try:
                await until(lambda: host.parts.outbox._paused, "it has fallen silent", 3.0)
                assert host.me.incarnation == 1
            finally:
                os.kill(embedded_pid, signal.SIGCONT)
            await until(lambda: not host.parts.outbox._paused, "it speaks again", 3.0)
            await world.answered(request)
            assert host.me.incarnation == 1, "the pause was shorter than the KV lease"
            await world.clean()

    asyncio.run(scenario())


def test_the_store_is_away_for_longer_than_the_kv_lease(fresh_store: FreshStore, embedded_pid: int) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            host = await world.start_worker("combined-0", engine=slow(decode_step_s=0.02))
            request = await world.submit(prompt(40), 100)
            await world.assign(request, "combined-0", "combined-0")
            await until(lambda: len(world.ingress.of(request).output) > 2, "it decodes")
            os.kill(embedded_pid, signal.SIGSTOP)
            try:
                await until(lambda: host.me.incarnation is None, "it has fenced itself", 6.0)
                await until(lambda: host.engine.stats().used_blocks == 0, "it has dropped everything", 1.0)
            finally:
                os.kill(embedded_pid, signal.SIGCONT)
            await world.ready("combined-0", above=1)
            await reap_until_queued(world, request)
            await world.assign(request, "combined-0", "combined-0")
            await world.answered(request)
            await world.clean()

    asyncio.run(scenario())


def test_a_hung_engine_renews_nothing(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            hung = await world.start_worker("combined-0", failpoints={"decode.token#5": "sleep:4"})
            await world.start_worker("combined-1")
            request = await world.submit(prompt(40), 20)
            await world.assign(request, "combined-0", "combined-0")
            assert await health(hung) == health_pb2.HealthCheckResponse.SERVING
            await until(lambda: hung._thread.stalled_s() > hung.spec.timing.progress_timeout_s + 0.2, "it hangs")
            assert await health(hung) == health_pb2.HealthCheckResponse.NOT_SERVING
            await reap_until_queued(world, request)
            await world.assign(request, "combined-1", "combined-1")
            await world.answered(request)
            await until(lambda: hung._thread.stalled_s() == 0, "it is back")
            await world.clean()
            assert len(world.ingress.of(request).output) == 20

    asyncio.run(scenario())


def test_an_ingress_that_restarts_gets_everything_again(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("combined-0", engine=slow(decode_step_s=0.02))
            request = await world.submit(prompt(40), 60)
            await world.assign(request, "combined-0", "combined-0")
            await until(lambda: len(world.ingress.of(request).output) > 5, "it decodes")
            address = world.ingress.address
            await world.ingress.stop()
            journaled = len(world.ingress.of(request).output)
            await asyncio.sleep(0.1)
            again = TestIngress(world.store)
            again.got = world.ingress.got
            world.ingress = again
            await again.start(address)
            again.epoch = 1  # the same registration: requests stay its own
            await world.answered(request)
            assert len(world.ingress.of(request).output) == 60 > journaled
            await world.clean()

    asyncio.run(scenario())


def test_a_new_owner_gets_what_the_old_one_never_acknowledged(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            host = await world.start_worker("combined-0", engine=slow(decode_step_s=0.01))
            world.ingress.silent = True
            request = await world.submit(prompt(40), 30)
            await world.assign(request, "combined-0", "combined-0")
            await until(lambda: host.parts.outbox.unacked_tokens == 30, "all is made, nothing acknowledged")
            other = TestIngress(world.store, "g1")
            await other.start()
            await world.store.resume(
                request, "acme", ingress_id="g1", ingress_epoch=other.epoch, ingress_addr=other.address, take=True
            )
            await world.ended(request)
            assert other.of(request).output == world.expected(request)
            assert world.ingress.of(request).output == []
            await world.clean()
            await other.stop()

    asyncio.run(scenario())


def test_messages_of_old_epochs_change_nothing(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            d = await world.start_worker("decode-0", "decode", engine=slow(decode_step_s=0.02))
            request = await world.submit(prompt(100), 30)
            first = await world.assign(request, "prefill-0", "decode-0")
            await until(lambda: len(world.ingress.of(request).output) > 3, "it decodes")
            await world.reap(lost_ms=0)
            await world.ready("decode-0", above=1)
            await world.ready("prefill-0", above=1)
            await reap_until_queued(world, request)
            second = await world.assign(request, "prefill-0", "decode-0")
            assert second > first
            before = len(world.ingress.of(request).output)
            await until(lambda: len(world.ingress.of(request).output) > before + 2, "it decodes again")
            for kind in (InboxKind.REVOKE, InboxKind.EXPECT, InboxKind.PREFILL, InboxKind.OWNER):
                d.parts.coordinator.on_entry(
                    InboxEntry(seq=1, kind=kind, request_id=request, epoch=first, ingress_address="127.0.0.1:1")
                )
            await world.answered(request)
            await world.clean()

    asyncio.run(scenario())


def test_a_damaged_spec_fails_the_request_and_nothing_else(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("combined-0")
            bad = await world.submit(prompt(20), 4)
            raw = fresh_store.raw()
            raw.redis.hset(f"{raw.base}:r:{bad}", "spec", b"\xff\xff\xff")
            raw.close()
            await world.assign(bad, "combined-0", "combined-0")
            good = await world.submit(prompt(30), 4)
            await world.assign(good, "combined-0", "combined-0")
            await world.ended(bad, "FAILED")
            await world.answered(good)
            await world.clean()

    asyncio.run(scenario())


def test_a_token_outside_the_vocabulary_fails_the_request(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            await world.start_worker("decode-0", "decode")
            bad = await world.submit([5, 70_000], 4)
            await world.assign(bad, "prefill-0", "decode-0")
            await world.ended(bad, "FAILED")
            await world.clean()

    asyncio.run(scenario())


@pytest.fixture
def embedded_pid(fresh_store: FreshStore) -> int:
    """The pid of the module's store."""
    raw = fresh_store.raw()
    try:
        pid = int(raw.redis.info("server")["process_id"])
    finally:
        raw.close()
    assert Path(f"/proc/{pid}").exists()
    return pid
