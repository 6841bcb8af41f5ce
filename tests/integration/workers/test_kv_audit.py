"""The books of workers: what they show of a hand-off under way, what they find, what they give back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from protos.contract.errors import StoreUnavailable
from protos.wire import audit, worker
from tests.support.store import FreshStore
from tests.support.worker_world import WorkerWorld, prompt, slow, until, worker_world
from workers.engine_api.types import EngineRequest, Phase, SamplingParams
from workers.kv_transfer.ledger import Entry, Key, Side
from workers.service.host import WorkerHost

pytestmark = pytest.mark.timeout(60)


def run(fresh: FreshStore, scenario: Callable[[WorkerWorld], Awaitable[None]]) -> None:
    async def body() -> None:
        async with asyncio.timeout(45), worker_world(fresh) as world:
            await scenario(world)

    asyncio.run(body())


def test_both_owners_show_while_bytes_are_in_flight_and_nothing_afterwards(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        source = await world.start_worker("p-0", "prefill", engine=slow(prefill_tokens_per_s=400))
        target = await world.start_worker("d-0", "decode")
        request = await world.submit(prompt(400), max_tokens=4)
        await world.assign(request, "p-0", "d-0")
        await until(lambda: len(target.parts.ledger) == 1, "the hand-off has begun")
        sent, received = await source.parts.audit.verify(), await target.parts.audit.verify()
        assert {e.owner for e in sent.books.entries} == {"request", "send"}
        assert {e.owner for e in received.books.entries} == {"request", "receive"}
        incoming = next(e for e in received.books.entries if e.owner == "receive")
        assert incoming.writer == "p-0/1" and incoming.lease_left_s > 0 and incoming.blocks == 25
        assert not sent.findings and not received.findings
        await world.answered(request)
        await world.clean()
        for host in world.hosts.values():
            books = (await host.parts.audit.verify()).books
            assert not books.entries and books.opened == books.released == 1 and books.leaked_blocks == 0

    run(fresh_store, scenario)


def test_a_busy_worker_has_no_findings(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        source = await world.start_worker("p-0", "prefill")
        target = await world.start_worker("d-0", "decode")
        requests = [await world.submit(prompt(20 + 7 * n, n), max_tokens=6) for n in range(24)]
        done = asyncio.gather(*(_placed(world, request) for request in requests))
        while not done.done():
            for host in (source, target):
                assert not (await host.parts.audit.verify()).findings
                assert not (await host.parts.audit.collect(apply=True)).returns
        await done
        await world.clean()

    async def _placed(world: WorkerWorld, request: str) -> None:
        await world.assign(request, "p-0", "d-0")
        await world.answered(request)

    run(fresh_store, scenario)


async def _orphan(host: WorkerHost, request_id: str, epoch: int = 1) -> None:
    """A sequence that the engine holds and nobody else knows of."""
    request = EngineRequest(
        request_id=request_id, epoch=epoch, prompt=tuple(prompt(40)), sampling=SamplingParams(max_tokens=4), phase=Phase.PREFILL
    )
    await host._thread.call(lambda engine: engine.add(request))
    await until(lambda: host.engine.stats().holding == 1, "it is held")


def test_gc_gives_back_what_redis_does_not_know(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        host = await world.start_worker("c-0")
        await _orphan(host, "ghost")
        await host._thread.call(lambda engine: engine.pin("ghost", 1))
        assert {f.kind for f in (await host.parts.audit.verify()).findings} == {"orphan"}
        dry = await host.parts.audit.collect(apply=False)
        assert [(r.request_id, r.done, r.kind) for r in dry.returns] == [("ghost", False, "orphan")] * 2
        assert host.engine.stats().used_blocks == 3
        wet = await host.parts.audit.collect(apply=True)
        assert "does not know" in wet.returns[0].why and wet.returns[0].done
        assert host.engine.stats().used_blocks == 0
        assert not (await host.parts.audit.verify()).findings

    run(fresh_store, scenario)


def test_gc_keeps_what_redis_has_alive_and_gives_nothing_back_without_redis(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        host = await world.start_worker("c-0")
        request = await world.submit(prompt(40))
        await _orphan(host, request)  # QUEUED at epoch 0: older than what the engine has
        kept = (await host.parts.audit.collect(apply=True)).returns
        assert [(r.done, bool(r.kept_because)) for r in kept] == [(False, True)]
        assert host.engine.stats().used_blocks == 3

        async def away(request_id: str) -> None:
            raise StoreUnavailable("Redis is away")

        host._store.holder_of = away  # type: ignore[assignment]
        with pytest.raises(StoreUnavailable):
            await host.parts.audit.collect(apply=True)
        assert host.engine.stats().used_blocks == 3
        await host._thread.let_go(request, 1)

    run(fresh_store, scenario)


def test_an_overdue_transfer_and_a_leaked_reference_are_found_and_given_back(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        host = await world.start_worker("c-0")
        entry = Entry(
            key=Key("gone", 3, Side.SEND), owner="c-0", writer="c-0", blocks=2, deadline_s=0.0, state=lambda: "streaming"
        )
        host.parts.ledger.open(replace(entry))
        await host._thread.call(lambda engine: engine._ledger.pool.allocate(2))  # type: ignore[attr-defined]
        found = await host.parts.audit.verify()
        assert {f.kind for f in found.findings} == {"overdue", "leaked", "unbalanced", "integrity"}
        assert found.books.leaked_blocks == 2 and found.books.overdue_blocks == 2
        await host.parts.audit.collect(apply=True)
        clean = await host.parts.audit.verify()
        assert not clean.findings and clean.books.used_blocks == 0

    run(fresh_store, scenario)


def test_every_worker_says_how_it_reaches_its_peers(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld) -> None:
        one = await world.start_worker("p-0", "prefill")
        two = await world.start_worker("d-0", "decode")
        peers = [
            worker.PeerAddress(instance_id="d-0", address=two.address, incarnation=1),
            worker.PeerAddress(instance_id="d-0", address=two.address, incarnation=7),
            worker.PeerAddress(instance_id="d-9", address="127.0.0.1:1", incarnation=1),
        ]
        request = worker.WorkerDiagnoseRequest(peers=peers, sink_address=world.ingress.address, timeout_s=1)
        report = await one.parts.diagnosis.report(request)
        good, renamed, dead, sink = report.peers
        assert good.reachable and good.is_expected and not good.differing and good.shared_memory and good.rtt_s > 0
        assert renamed.reachable and not renamed.is_expected and "incarnation 1" in renamed.error
        assert not dead.reachable and dead.error
        assert sink.reachable and report.store_reachable and abs(report.store_offset_s) < 1
        assert isinstance(report, audit.SelfReport) and report.fingerprint.weights_digest

    run(fresh_store, scenario)
