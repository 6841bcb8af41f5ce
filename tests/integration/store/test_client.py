"""The typed client against a real server: values, batches, errors, lost replies, hints."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from redis._parsers.base import BaseParser

from orchestrator.store.client import Store
from orchestrator.store.connection import open_redis, translate
from orchestrator.store.embedded import EmbeddedValkey
from orchestrator.store.library import library_text, load_library
from orchestrator.store.replies import Emission, Placement
from protos.contract.errors import ConfigError, InternalError, NotLeader, StoreFull, StoreUnavailable
from protos.contract.redis_names import Code, Fn, core_channel, ingress_channel, pack_tokens
from tests.support.processes import process_state, wait_until
from tests.support.store import FreshStore

LONG_MS = 60_000


def run(work: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine with a deadline."""
    asyncio.run(asyncio.wait_for(work, 40))


async def submit(store: Store, id: str, **changes: Any) -> Code:
    """Submits with defaults."""
    values: dict[str, Any] = {
        "body_hash": b"\xff\x00", "spec": b"\xff" + id.encode(), "tenant": "acme", "model": "m", "prompt_tokens": 4,
        "max_tokens": 8, "prio": 0, "timeout_ms": LONG_MS, "ingress_id": "g", "ingress_epoch": 1,
        "ingress_addr": "127.0.0.1:1", "queue_limit": 1000,
    }  # fmt: skip
    return (await store.submit(request_id=id, **(values | changes))).code


async def ready_instance(store: Store, name: str) -> None:
    """Registers an instance, as a worker does."""
    await store._call(Fn.REGISTER, name, "combined", f"addr:{name}", b"\xffcard")
    await store._call(Fn.RENEW, name, 1, "READY", b"\xffstats", LONG_MS, 0)


def placement(id: str) -> Placement:
    """On instance `c`, for the first time."""
    return Placement(id, 0, "c", 1, "c", 1, 1, 2)


def test_a_request_from_submit_to_done(fresh_store: FreshStore) -> None:
    async def main() -> None:
        async with await fresh_store.connect() as store:
            assert (await store.ingress("g", "127.0.0.1:1", LONG_MS)).epoch == 1
            lead = await store.lead("core", LONG_MS)
            assert lead.leads and lead.epoch == 1
            assert not (await store.lead("rival", LONG_MS)).leads
            assert await submit(store, "r") is Code.OK
            assert await submit(store, "r") is Code.DUPLICATE
            assert await submit(store, "r", body_hash=b"other") is Code.CONFLICT
            assert await submit(store, "s", queue_limit=1) is Code.FULL
            await ready_instance(store, "c")
            view = await store.view()
            assert [record.request_id for record in view.queued] == ["r"] and view.queued_total == 1
            assert view.queued[0].deadline_ms - view.queued[0].submitted_ms == LONG_MS
            (instance,) = view.instances
            assert (instance.state, instance.card, instance.stats) == ("READY", b"\xffcard", b"\xffstats")
            (outcome,) = await store.assign("core", 1, LONG_MS, [placement("r")])
            assert (outcome.code, outcome.epoch) == (Code.OK, 1)
            await store._call(Fn.PICK, "c", 1, 0, 64, LONG_MS)
            (emitted,) = await store.emit("g", 1, [Emission("r", 1, 0, pack_tokens([1, 2]))])
            assert (emitted.code, emitted.next_index) == (Code.OK, 2)
            found = await store.resume("r", "acme", ingress_id="g", ingress_epoch=1, ingress_addr="a", from_index=1)
            assert (found.state, found.n, found.tokens, found.spec) == ("PREFILLING", 2, pack_tokens([2]), b"\xffr")
            live = (await store.requests()).requests[0]
            assert (live.request_id, live.state, live.n, live.p, live.d) == ("r", "PREFILLING", 2, "c", "c")
            ending = {"ingress_id": "g", "ingress_epoch": 1, "request_id": "r", "epoch": 1, "reason": "stop"}
            assert (await store.finish(**ending, n=3)).n == 2
            assert (await store.finish(**ending, n=2)).code is Code.OK
            look, unknown = await store.look(["r", "nobody"])
            assert look.has_ended and look.reason == "stop" and not unknown.is_known
            assert (await store.cancel("r", "", "why")).state == "DONE"
            stats = await store.stats()
            assert (stats.queued, stats.live, stats.leader, stats.totals["done"]) == (0, 0, "core", 1)
            assert await store.drain("c", True) is Code.OK and await store.drain("x", True) is Code.GONE

    run(main())


def test_batches_larger_than_a_call_are_split(fresh_store: FreshStore) -> None:
    async def main() -> None:
        async with await fresh_store.connect() as store:
            await store.ingress("g", "a", LONG_MS)
            await store.lead("core", LONG_MS)
            await ready_instance(store, "c")
            ids = [f"r{i}" for i in range(300)]
            for id in ids:
                await submit(store, id)
            outcomes = await store.assign("core", 1, LONG_MS, [placement(id) for id in ids])
            assert [outcome.code for outcome in outcomes] == [Code.OK] * 300
            for _ in range(5):
                reply = await store._call(Fn.PICK, "c", 1, 0, 64, LONG_MS)
                acked = max(int(seq) for seq in reply.rest()[3::19])
                await store._call(Fn.PICK, "c", 1, acked, 1, LONG_MS)
            items = [Emission(id, 1, 0, pack_tokens([i])) for i, id in enumerate(ids)]
            assert {outcome.next_index for outcome in await store.emit("g", 1, items)} == {1}
            assert [look.n for look in await store.look(ids)] == [1] * 300
            assert len((await store.requests(10_000)).requests) == 300

    run(main())


def test_a_former_leader_hears_so(fresh_store: FreshStore) -> None:
    async def main() -> None:
        async with await fresh_store.connect() as store:
            await store.lead("core", 0)
            await store.lead("rival", LONG_MS)
            with pytest.raises(NotLeader):
                await store.assign("core", 1, LONG_MS, [placement("r")])
            with pytest.raises(NotLeader):
                await store.reap("core", 1, limit=9, max_attempts=3, lost_ms=LONG_MS, retain_ms=LONG_MS)
            reply = await store.reap("rival", 2, limit=9, max_attempts=3, lost_ms=LONG_MS, retain_ms=LONG_MS)
            assert reply.requests == () and reply.lost == ()

    run(main())


def test_the_library_is_loaded_only_when_it_differs(fresh_store: FreshStore) -> None:
    async def main() -> None:
        async with await fresh_store.connect() as store:
            assert await store.load() is False
            redis = open_redis(fresh_store.url, 5.0)
            await redis.function_load(library_text() + "-- another version\n", replace=True)
            assert await store.load() is True
            assert await load_library(redis) is False
            await redis.function_flush()
            assert await submit(store, "r") is Code.OK, "a flushed library is loaded again by the next call"
            await redis.aclose()

    run(main())


def test_wrong_arguments_are_a_bug_of_ours(fresh_store: FreshStore) -> None:
    async def main() -> None:
        async with await fresh_store.connect() as store:
            with pytest.raises(InternalError, match="autan_submit: prio"):
                await submit(store, "r", prio=5)

    run(main())
    with pytest.raises(ValueError, match="cluster name"):
        Store(fresh_store.url, "a}b")


def test_urls_that_lead_nowhere(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(StoreUnavailable):
            await Store.connect(f"unix://{tmp_path}/nobody.sock", "c", 0.5)
        with pytest.raises(StoreUnavailable):
            await Store.connect("redis://127.0.0.1:1/0", "c", 0.5)
        with pytest.raises(ConfigError, match=r"store\.url"):
            await Store.connect("http://127.0.0.1", "c", 0.5)

    run(main())


def test_a_store_that_cannot_write_says_which_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with EmbeddedValkey(tmp_path) as server, await Store.connect(server.url, "c", 5.0) as store:
            redis = open_redis(server.url, 5.0)
            await redis.config_set("maxmemory", 1)
            with pytest.raises(StoreFull):
                await submit(store, "r")
            await redis.config_set("maxmemory", "512mb")
            await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(StoreUnavailable, match="read only replica"):
                await submit(store, "r")
            await redis.execute_command("REPLICAOF", "NO", "ONE")
            await redis.config_set("requirepass", "secret")
            async with Store(server.url, "c") as stranger:
                with pytest.raises(ConfigError, match="password"):
                    await stranger.ping()
            await redis.config_set("requirepass", "")
            assert await submit(store, "r") is Code.OK
            await redis.aclose()

    run(main())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("MISCONF Errors writing to the AOF file: No space left on device", StoreUnavailable),
        ("BUSY Redis is busy running a script.", StoreUnavailable),
        ("LOADING Redis is loading the dataset in memory", StoreUnavailable),
        ("READONLY You can't write against a read only replica.", StoreUnavailable),
        ("MASTERDOWN Link with MASTER is down", StoreUnavailable),
        ("CLUSTERDOWN Hash slot not served", StoreUnavailable),
        ("NOREPLICAS Not enough good replicas to write.", StoreUnavailable),
        ("ERR Function not found", StoreUnavailable),
        ("OOM command not allowed when used memory > 'maxmemory'.", StoreFull),
        ("WRONGPASS invalid username-password pair", ConfigError),
        ("NOPERM this user has no permissions", ConfigError),
        ("WRONGTYPE Operation against a key", InternalError),
        ("ERR autan_emit: epoch is no integer", InternalError),
    ],
)
def test_answers_of_the_server_are_mapped(answer: str, expected: type[Exception]) -> None:
    error = BaseParser.parse_error(answer)
    assert type(translate(error, "call")) is expected
    assert type(translate(ConnectionResetError(104, "reset"), "call")) is StoreUnavailable


def test_a_frozen_store_costs_one_timeout_and_no_second_execution(
    embedded_valkey: EmbeddedValkey, fresh_store: FreshStore
) -> None:
    async def main() -> None:
        async with await fresh_store.connect() as steady, Store(fresh_store.url, fresh_store.cluster, 1.0) as hasty:
            await hasty.ping()
            os.kill(embedded_valkey.server_pid, signal.SIGSTOP)
            try:
                wait_until(lambda: process_state(embedded_valkey.server_pid) == "T", "the server is stopped")
                started_s = asyncio.get_running_loop().time()
                with pytest.raises(StoreUnavailable):
                    await submit(hasty, "r")
                assert asyncio.get_running_loop().time() - started_s < 8
            finally:
                os.kill(embedded_valkey.server_pid, signal.SIGCONT)
            async with asyncio.timeout(10):
                while not (await steady.look(["r"]))[0].is_known:  # noqa: ASYNC110 - another process decides
                    await asyncio.sleep(0.01)
            assert (await steady.stats()).totals["submitted"] == 1
            assert await submit(hasty, "r") is Code.DUPLICATE

    run(main())


def test_a_cancelled_call_ends_and_never_leaves_its_reply_to_the_next_one(fresh_store: FreshStore) -> None:
    """CVE-2023-28858 and -28859 of redis-py: the answer of request A was given to B. And it may swallow a cancellation."""

    async def main() -> None:
        chance = random.Random(7)
        async with await fresh_store.connect() as store:
            ids = [f"r{i}" for i in range(8)]
            for id in ids:
                await submit(store, id)

            async def read(id: str) -> None:
                found = await store.resume(id, "acme", ingress_id="g", ingress_epoch=1, ingress_addr="a")
                assert found.spec == b"\xff" + id.encode()

            cancelled = finished = 0
            for _ in range(150):
                tasks = [asyncio.create_task(read(chance.choice(ids))) for _ in range(4)]
                for _ in range(chance.randrange(12)):
                    await asyncio.sleep(0)
                stopped = {task for task in chance.sample(tasks, 2) if task.cancel()}
                results = await asyncio.gather(*tasks, return_exceptions=True)
                for task, result in zip(tasks, results, strict=True):
                    assert isinstance(result, asyncio.CancelledError) if task in stopped else result is None, result
                cancelled += len(stopped)
                finished += len(tasks) - len(stopped)
            assert cancelled > 50 and finished > 50

    run(main())


async def next_where(stream: Any, accept: Callable[[bytes], bool]) -> bytes:
    """The next accepted hint."""
    async with asyncio.timeout(10):
        async for payload in stream:
            if accept(payload):
                return bytes(payload)
    raise AssertionError("the hints ended")


def test_hints_come_and_survive_a_lost_connection(fresh_store: FreshStore) -> None:
    async def main() -> None:
        async with await fresh_store.connect() as store:
            hints = store.hints(ingress_channel(fresh_store.cluster, "g"))
            assert await next_where(hints, lambda _: True) == b"", "connected"
            for id in ("a", "b"):
                await submit(store, id)
            await store.cancel("a", "", "why")
            assert await next_where(hints, lambda payload: payload != b"") == b"a"
            redis = open_redis(fresh_store.url, 5.0)
            assert await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
            assert await next_where(hints, lambda _: True) == b"", "connected again: re-poll"
            await store.cancel("b", "", "why")
            assert await next_where(hints, lambda payload: payload != b"") == b"b"
            await hints.aclose()  # type: ignore[attr-defined]
            await redis.aclose()

    run(main())


def test_the_core_is_hinted_by_what_it_decides_on(fresh_store: FreshStore) -> None:
    async def main() -> None:
        async with await fresh_store.connect() as store:
            hints = store.hints(core_channel(fresh_store.cluster))
            assert await anext(hints) == b""

            async def hinted(call: Awaitable[object]) -> None:
                await call
                async with asyncio.timeout(5):
                    await anext(hints)

            await hinted(submit(store, "r"))
            await hinted(store._call(Fn.REGISTER, "c", "combined", "addr", b""))
            await hinted(store._call(Fn.RENEW, "c", 1, "READY", b"", LONG_MS, 0))
            await hinted(store.drain("c", True))
            await hinted(store.cancel("r", "", "why"))
            await hinted(store._call(Fn.DEREGISTER, "c", 1))
            await hints.aclose()  # type: ignore[attr-defined]

    run(main())
