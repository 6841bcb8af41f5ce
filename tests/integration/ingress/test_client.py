"""The Python client against a real ingress: the same answers, over broken connections too."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from configs import env
from orchestrator.client import Accepted, AsyncClient, Client, Delta, Event, Finished, find_endpoint
from protos.contract.errors import (
    Cancelled,
    ClusterUnreachable,
    ConfigError,
    InvalidRequest,
    PromptTooLong,
    RequestConflict,
    StoreUnavailable,
    UnknownRequest,
)
from tests.support.ingress_worker import expected_tokens
from tests.support.ingress_world import World, a_world, until
from tests.support.store import FreshStore


def run(store: FreshStore, scenario: Callable[[World, AsyncClient], Awaitable[None]]) -> None:
    """Runs a scenario with a client on the ingress of a world."""

    async def body() -> None:
        async with (
            asyncio.timeout(40),
            a_world(store.url, store.cluster) as world,
            AsyncClient(world.ingress.address) as client,
        ):
            await scenario(world, client)

    asyncio.run(body())


def token_ids(events: list[Event]) -> list[int]:
    """The tokens of a stream; asserts its shape."""
    assert isinstance(events[0], Accepted) and isinstance(events[-1], Finished)
    assert all(isinstance(event, Delta) for event in events[1:-1])
    return [token_id for event in events if isinstance(event, Delta) for token_id in event.token_ids]


def test_a_whole_answer_from_text_messages_and_token_ids(fresh_store: FreshStore) -> None:
    async def scenario(world: World, client: AsyncClient) -> None:
        whole = await client.complete("hello", seed=5, max_tokens=6)
        assert list(whole.token_ids) == expected_tokens(5, 6)
        assert (whole.finish_reason, whole.prompt_tokens, whole.seed, whole.model) == ("length", 5, 5, "oracle")
        events = [event async for event in client.generate(messages=[("user", "hi")], seed=5)]
        assert token_ids(events) == expected_tokens(5, 8)
        assert "".join(event.text for event in events).startswith(whole.text[:-1])
        by_mapping = await client.complete(messages=[{"role": "user", "content": "hi"}], seed=5)
        by_ids = await client.complete(token_ids=await client.tokenize(messages=[("user", "hi")]), seed=5)
        assert by_mapping.prompt_tokens == by_ids.prompt_tokens == events[0].prompt_tokens  # type: ignore[union-attr]
        again = [event async for event in client.resume(by_ids.request_id, 3)]
        assert token_ids(again) == expected_tokens(5, 8)[3:]
        assert [model.name for model in await client.models()] == ["oracle"]
        assert (await client.status()).finished == 4

    run(fresh_store, scenario)


def test_errors_are_those_of_the_tree(fresh_store: FreshStore) -> None:
    async def scenario(world: World, client: AsyncClient) -> None:
        with pytest.raises(PromptTooLong):
            await client.complete("x" * 5000)
        for wrong in ({}, {"text": "a", "token_ids": [1]}, {"token_ids": [-1]}, {"text": "a", "colour": 1}, {"messages": [{}]}):
            with pytest.raises(InvalidRequest):
                await client.complete(**wrong)  # type: ignore[arg-type]
        await client.complete("a", request_id="r-1")
        with pytest.raises(RequestConflict):
            await client.complete("b", request_id="r-1")
        with pytest.raises(UnknownRequest):
            await client.cancel("r-2")
        await client.shutdown(2.5)
        assert world.shutdowns == [2.5]

    run(fresh_store, scenario)


def test_a_stream_goes_on_over_a_new_ingress(fresh_store: FreshStore) -> None:
    async def scenario(world: World, client: AsyncClient) -> None:
        # The same address again: what a restarted orchestrator has.
        host, port = world.ingress.address.rsplit(":", 1)
        world.settings = type(world.settings)(
            config=world.settings.config.model_copy(update={"address": f"{host}:{port}"}), version="1", lease_s=1.0
        )
        world.worker.allow(3)
        events: list[Event] = []

        async def read() -> None:
            async for event in client.generate("hello", seed=5, max_tokens=20):
                events.append(event)

        reading = asyncio.create_task(read())
        await until(lambda: len([event for event in events if isinstance(event, Delta)]) >= 1, "tokens came")
        await world.restart_ingress()
        world.worker.allow(99)
        await reading
        assert token_ids(events) == expected_tokens(5, 20)
        assert world.ingress.parts.metrics.value("requests_adopted") == 1

    run(fresh_store, scenario)


def test_a_request_that_redis_lost_ends_with_the_reason(fresh_store: FreshStore) -> None:
    async def scenario(world: World, client: AsyncClient) -> None:
        world.worker.allow(3)
        raw = fresh_store.raw()
        try:
            with pytest.raises(StoreUnavailable, match="has lost request"):
                async for event in client.generate("hello", max_tokens=20):
                    if isinstance(event, Delta):
                        raw.redis.flushdb()
        finally:
            raw.close()

    run(fresh_store, scenario)


def test_closing_the_stream_early_cancels_the_request(fresh_store: FreshStore) -> None:
    async def scenario(world: World, client: AsyncClient) -> None:
        world.worker.allow(3)
        async with aclosing(client.generate("hello", request_id="r-1")) as events:
            async for event in events:
                if isinstance(event, Delta):
                    break
        assert await world.state("r-1") == "CANCELLED"
        world.core.paused = True
        waiting = asyncio.create_task(client.complete("hello", request_id="r-2"))

        async def listed() -> bool:
            return [request.request_id for request in await client.requests()] == ["r-2"]

        await until(listed, "it waits")
        assert await client.cancel_any("r-2") == "CANCELLED"
        with pytest.raises(Cancelled):
            await waiting

    run(fresh_store, scenario)


def test_nobody_there_is_said_within_the_retry_budget() -> None:
    async def body() -> None:
        async with AsyncClient("127.0.0.1:1", retry_s=0.3, timeout_s=1.0) as client:
            with pytest.raises(ClusterUnreachable, match=r"127\.0\.0\.1:1"):
                await client.status()
            with pytest.raises(ClusterUnreachable):
                await client.complete("hello")

    asyncio.run(asyncio.wait_for(body(), 10))


SCRIPT = """
import sys
from orchestrator.client import Client, Delta
with Client() as client:
    print(client.complete("hello", seed=5, max_tokens=4).token_ids)
    print([t for event in client.generate("hello", seed=5) if isinstance(event, Delta) for t in event.token_ids])
    for event in client.generate("hello", request_id="r-early"):
        break
    print(client.cancel("r-early"), [model.name for model in client.models()])
"""


def test_the_blocking_client_in_a_process_of_its_own(fresh_store: FreshStore, tmp_path: Path) -> None:
    async def scenario(world: World, client: AsyncClient) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "c.json").write_text(json.dumps({"endpoint": world.ingress.address}))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SCRIPT, stdout=subprocess.PIPE, env=env.child_environment({"AUTAN_HOME": str(tmp_path)}),
            cwd=Path(__file__).parents[3],
        )  # fmt: skip
        out, _ = await process.communicate()
        assert process.returncode == 0
        first, second, third = out.decode().splitlines()
        assert first == str(tuple(expected_tokens(5, 4))) and second == str(expected_tokens(5, 8))
        assert third.split()[0] in ("CANCELLED", "DONE") and third.endswith("['oracle']")

    run(fresh_store, scenario)


def test_finding_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"AUTAN_HOME": str(tmp_path)})
    with pytest.raises(ClusterUnreachable, match="autan up"):
        find_endpoint()
    runs = tmp_path / "run"
    runs.mkdir()
    (runs / "a.json").write_text(json.dumps({"endpoint": "127.0.0.1:1", "pid": 5}))
    assert find_endpoint() == find_endpoint("a") == "127.0.0.1:1"
    with pytest.raises(ClusterUnreachable, match="cluster b"):
        find_endpoint("b")
    (runs / "b.json").write_text("[")
    with pytest.raises(ConfigError, match="a, b"):
        find_endpoint()
    with pytest.raises(ConfigError, match=r"b\.json"):
        find_endpoint("b")
    os.environ["AUTAN_ENDPOINT"] = "127.0.0.1:2"
    assert find_endpoint() == "127.0.0.1:2"
    with pytest.raises(ClusterUnreachable), Client("127.0.0.1:1", timeout_s=0.5) as client:
        client.status()
