"""The core's loop on a real store: decisions, leadership, absence of the store."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from configs.schema.cluster import ClusterConfig
from orchestrator.control import events as on
from orchestrator.control.core import Standing
from orchestrator.control.effects import WakeAt
from orchestrator.control.settings import CoreSettings
from orchestrator.domain.ids import RequestId
from orchestrator.domain.request import RequestState
from orchestrator.runtime.effects import carry_out
from orchestrator.runtime.loop import CoreLoop, settings_of
from orchestrator.store.client import Store
from orchestrator.store.embedded import EmbeddedValkey
from orchestrator.store.views import capabilities
from protos import wire
from protos.contract.redis_names import Fn
from tests.support.store import FreshStore, RawStore

SETTINGS = CoreSettings(leader_lease_s=0.6, lease_s=0.8, lost_s=0.8, suspect_s=0.4, lead_retry_s=0.1)


def a_card(name: str, blocks: int = 64) -> bytes:
    card = wire.common.InstanceCard(
        instance_id=name, total_blocks=blocks, context_tokens=4096, max_batch_tokens=512, max_running=16
    )
    card.fingerprint.model = "m"
    card.fingerprint.block_tokens = 16
    return card.SerializeToString()


class Workers:
    """Instances that pick, and beat while they are in `beating`, by the functions themselves."""

    def __init__(self, raw: RawStore) -> None:
        self.raw = raw
        self.incarnations: dict[str, int] = {}
        self.acked: dict[str, int] = {}
        self.beating: set[str] = set()

    def register(self, name: str) -> None:
        reply = self.raw.call(Fn.REGISTER, name, name.split("-", maxsplit=1)[0], "127.0.0.1:1", a_card(name))
        self.incarnations[name] = int(reply[1])
        self.acked[name] = 0
        self.beat(name)
        self.beating.add(name)

    def beat(self, *names: str) -> None:
        for name in names:
            self.raw.call(Fn.RENEW, name, self.incarnations[name], "READY", b"", 60_000, 0)

    async def keep_beating(self) -> None:
        while True:
            self.beat(*self.beating)
            await asyncio.sleep(0.1)

    def inbox(self, name: str, lease_ms: int = 60_000) -> list[tuple[str, str, int]]:
        """(kind, id, epoch) of what arrived since."""
        reply = self.raw.call(Fn.PICK, name, self.incarnations[name], self.acked[name], 64, lease_ms)
        found = []
        for at in range(int(reply[2])):
            entry = reply[3 + at * 15 : 3 + (at + 1) * 15]
            self.acked[name] = int(entry[0])
            found.append((str(entry[1]), str(entry[2]), int(entry[3])))
        return found


def with_loop(
    fresh: FreshStore, body: Callable[[CoreLoop, Store, Workers], Awaitable[None]], settings: CoreSettings = SETTINGS
) -> None:
    """Runs a body beside a loop, one prefill and one decode instance."""

    async def whole() -> None:
        raw = fresh.raw()
        store = await fresh.connect(1.0)
        loop = CoreLoop(store, settings, "core-a")
        task = asyncio.create_task(loop.run())
        workers = Workers(raw)
        beats = asyncio.create_task(workers.keep_beating())
        try:
            workers.register("prefill-0")
            workers.register("decode-0")
            await body(loop, store, workers)
            assert not task.done()
            assert not beats.done()
        finally:
            for each in (task, beats):
                each.cancel()
            await asyncio.gather(task, beats, return_exceptions=True)
            await store.close()
            raw.close()

    asyncio.run(whole())


async def until(holds: Callable[[], Any], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        await asyncio.sleep(0.005)


async def submit(store: Store, name: str, prompt: int = 100, max_tokens: int = 28, timeout_ms: int = 60_000) -> None:
    ingress = await store.ingress("g", "a", 60_000)
    reply = await store.submit(
        request_id=name, body_hash=b"h", spec=b"s", tenant="t", model="m", prompt_tokens=prompt, max_tokens=max_tokens,
        prio=0, timeout_ms=timeout_ms, ingress_id="g", ingress_epoch=ingress.epoch, ingress_addr="a", queue_limit=1000,
    )  # fmt: skip
    assert reply.code == "OK"


def test_a_hint_brings_a_request_to_both_inboxes_once(fresh_store: FreshStore) -> None:
    async def body(loop: CoreLoop, store: Store, workers: Workers) -> None:
        await submit(store, "r1")
        await until(lambda: loop.status.decisions == 1, "one decision")
        got: list[Any] = []
        await until(lambda: got.extend(workers.inbox("prefill-0")) or got, "it is in the inbox")
        assert got == [("prefill", "r1", 1)]
        assert workers.inbox("decode-0") == [("expect", "r1", 1)]
        await until(lambda: loop.status.under_way == 0, "a view has shown it")
        assert loop.status.decisions == 1
        story = "\n".join(loop.story("r1"))
        assert "prefill-0/1 prefills, decode-0/1 decodes, reserves 7+8 blocks" in story

    with_loop(fresh_store, body)


def test_what_does_not_fit_waits_in_the_store_until_it_does(fresh_store: FreshStore) -> None:
    async def body(loop: CoreLoop, store: Store, workers: Workers) -> None:
        for at in range(5):
            await submit(store, f"r{at}", prompt=240, max_tokens=16)
        await until(lambda: loop.status.decisions == 4 and loop.status.under_way == 0, "the pool is full")
        await store.cancel("r0", "", "test")
        await until(lambda: loop.status.decisions == 5, "the fifth follows as soon as there is room")

    with_loop(fresh_store, body, replace(SETTINGS, lease_s=30.0, lost_s=30.0, suspect_s=30.0))


def test_what_a_lost_instance_held_starts_again_elsewhere(fresh_store: FreshStore) -> None:
    async def body(loop: CoreLoop, store: Store, workers: Workers) -> None:
        await submit(store, "r1")
        await until(lambda: loop.status.decisions == 1, "it is placed")
        workers.inbox("prefill-0")
        workers.register("prefill-1")
        workers.beating.discard("prefill-0")
        await until(lambda: ("prefill", "r1", 2) in workers.inbox("prefill-1"), "it is placed again, one epoch later")
        assert "prefill-0 set LOST" in "\n".join(loop.story("prefill-0"))

    with_loop(fresh_store, body)


def test_a_deadline_ends_a_request_that_nobody_can_take(fresh_store: FreshStore) -> None:
    async def body(loop: CoreLoop, store: Store, workers: Workers) -> None:
        await submit(store, "r1", prompt=4000, timeout_ms=1000)
        ended = on.Ended(RequestId("r1"), RequestState.EXPIRED)
        log = loop.recorder
        await until(lambda: any(isinstance(e.what, on.Reaped) and ended in e.what.requests for e in log), "it expires")
        assert (await store.look(["r1"]))[0].state == "EXPIRED"
        assert "it needs more KV blocks" in "\n".join(loop.story("r1"))

    with_loop(fresh_store, body)


def test_of_two_candidates_one_leads_and_the_other_follows_within_a_lease(fresh_store: FreshStore) -> None:
    async def body(loop: CoreLoop, store: Store, workers: Workers) -> None:
        await until(lambda: loop.status.standing is Standing.LEADING, "the first leads")
        other_store = await fresh_store.connect(1.0)
        other = CoreLoop(other_store, SETTINGS, "core-b")
        task = asyncio.create_task(other.run())
        try:
            for at in range(3):
                await submit(store, f"r{at}")
            await until(lambda: loop.status.decisions == 3, "the first decides")
            assert (other.status.standing, other.status.decisions) == (Standing.STANDBY, 0)
            await store.lead("core-c", 60_000, 0)  # a third one tries and is refused
            assert loop.status.standing is Standing.LEADING
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await other_store.close()

    with_loop(fresh_store, body)


def test_a_standby_takes_over_when_the_leader_is_gone(fresh_store: FreshStore) -> None:
    async def body(loop: CoreLoop, store: Store, workers: Workers) -> None:
        await until(lambda: loop.status.standing is Standing.LEADING, "it took over")
        assert loop.status.epoch > 1
        await submit(store, "r1")
        await until(lambda: loop.status.decisions == 1, "it decides")

    async def first_leader() -> None:
        async with await fresh_store.connect() as store:
            reply = await store.lead("core-gone", 700, 0)
            assert reply.leads

    asyncio.run(first_leader())
    with_loop(fresh_store, body)


def test_a_frozen_store_is_waited_out_and_nothing_is_reaped_on_its_return(
    fresh_store: FreshStore, embedded_valkey: EmbeddedValkey
) -> None:
    async def body(loop: CoreLoop, store: Store, workers: Workers) -> None:
        await submit(store, "r1")
        await until(lambda: loop.status.decisions == 1, "it is placed")
        assert workers.inbox("prefill-0", lease_ms=1000) == [("prefill", "r1", 1)]
        workers.beating.clear()
        pid = embedded_valkey.server_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            await until(lambda: loop.status.standing is Standing.STORE_AWAY, "the loss is seen")
            await asyncio.sleep(1.5)  # every lease lapses in the meantime
        finally:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: loop.status.standing is Standing.LEADING, "it leads again")
        workers.raw.call(Fn.RENEW, "prefill-0", 1, "READY", b"", 60_000, 1, "r1", 1, "h")
        await asyncio.sleep(2 * SETTINGS.lease_s)
        assert (await store.look(["r1"]))[0].epoch == 1, "its holder had the time to renew"

    with_loop(fresh_store, body, replace(SETTINGS, lost_s=30.0))


def test_an_effect_without_an_answer_is_refused(fresh_store: FreshStore) -> None:
    async def body(loop: CoreLoop, store: Store, workers: Workers) -> None:
        with pytest.raises(TypeError, match="WakeAt"):
            await carry_out(WakeAt(1.0), store, "core-a")

    with_loop(fresh_store, body)


def test_settings_follow_the_cluster_file() -> None:
    engine = {"kind": "oracle"}
    config = ClusterConfig.model_validate(
        {
            "name": "c",
            "model": {"name": "m", "source": "oracle"},
            "pools": [{"name": "p", "role": "prefill", "engine": engine}, {"name": "d", "role": "decode", "engine": engine}],
            "timing": {"lease_s": 2.0, "heartbeat_s": 0.25, "leader_lease_s": 5.0},
            "scheduling": {"batch_requests": 7, "max_attempts": 9, "local_prefill_without_prefill_pool": False},
        }
    )
    settings = settings_of(config)
    assert (settings.lease_s, settings.lost_s, settings.suspect_s, settings.leader_lease_s) == (2.0, 2.0, 0.75, 5.0)
    assert (settings.batch_requests, settings.max_attempts, settings.rules.local_prefill) == (7, 9, False)


@pytest.mark.parametrize("card", [b"\xff\xff", b"", a_card("x", blocks=0)])
def test_a_card_that_is_none_gives_no_capabilities(card: bytes) -> None:
    assert capabilities(card) is None
