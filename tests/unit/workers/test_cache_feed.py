"""The feed of cache changes: snapshot, exact events, slow and too many subscribers, another incarnation, missing numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from protos.contract.block_hash import unpack_names
from protos.contract.errors import QueueFull, StaleIncarnation
from protos.wire import worker
from workers.engine_api.types import CacheEvent
from workers.service import cache_feed
from workers.service.cache_feed import MAX_SUBSCRIBERS, MESSAGE_NAMES, RING_EVENTS, CacheFeed

NAMES = [number.to_bytes(16, "big") for number in range(3 * MESSAGE_NAMES)]


class Engine:
    """What the feed asks of an engine: which names it has."""

    def __init__(self) -> None:
        self.has: set[bytes] = set()

    def known_names(self) -> set[bytes]:
        return set(self.has)


class Port:
    """Answers at once, in the order of the calls."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def call(self, fn: Callable[[Any], Any]) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        future.set_result(fn(self.engine))
        return future


class World:
    def __init__(self) -> None:
        self.engine = Engine()
        self.incarnation: int | None = 1
        self.feed = CacheFeed(Port(self.engine), lambda: self.incarnation)  # type: ignore[arg-type]
        self.number = 0

    def happen(self, stored: list[bytes] | None = None, removed: list[bytes] | None = None, skip: int = 0) -> None:
        self.number += 1 + skip
        self.feed.take((CacheEvent(self.number, stored=tuple(stored or ()), removed=tuple(removed or ())),))

    def watch(self, after: int = 0, incarnation: int = 1) -> AsyncIterator[worker.CacheNews]:
        return self.feed.watch(incarnation, after)


def run(scenario: Callable[[World], Awaitable[None]]) -> None:
    async def whole() -> None:
        world = World()
        await asyncio.wait_for(scenario(world), 20)
        await world.feed.close()

    asyncio.run(whole())


async def snapshot(stream: AsyncIterator[worker.CacheNews]) -> tuple[int, list[bytes], int]:
    """Event, names and parts of the snapshot that comes next."""
    names: list[bytes] = []
    parts = 0
    async for news in stream:
        assert news.HasField("snapshot") and news.snapshot.first == (parts == 0)
        parts += 1
        names += unpack_names(news.snapshot.names)
        assert len(news.snapshot.names) <= 16 * MESSAGE_NAMES
        if news.snapshot.last:
            return news.snapshot.event, names, parts
    raise AssertionError("the stream ended")


def test_a_snapshot_and_then_every_change() -> None:
    async def scenario(world: World) -> None:
        world.happen(NAMES[:3])
        world.happen(removed=NAMES[:1])
        stream = world.watch()
        assert await snapshot(stream) == (2, NAMES[1:3], 1)
        world.happen(NAMES[5:6])
        world.happen(removed=NAMES[1:2])
        news = await anext(stream)
        assert (news.incarnation, news.events.first_event) == (1, 3)
        assert [(c.stored, c.removed) for c in news.events.changes] == [(NAMES[5], b""), (b"", NAMES[1])]
        again = world.watch(after=3)
        news = await anext(again)
        assert (news.events.first_event, len(news.events.changes)) == (4, 1), "what is known is not told again"

    run(scenario)


def test_a_large_snapshot_comes_in_parts() -> None:
    async def scenario(world: World) -> None:
        world.happen(NAMES[: 2 * MESSAGE_NAMES + 5])
        event, names, parts = await snapshot(world.watch())
        assert (event, sorted(names), parts) == (1, NAMES[: 2 * MESSAGE_NAMES + 5], 3)

    run(scenario)


@pytest.mark.parametrize("after", [0, 9])
def test_an_empty_cache_and_a_position_of_another_life_begin_with_a_snapshot(after: int) -> None:
    async def scenario(world: World) -> None:
        assert await snapshot(world.watch(after)) == (0, [], 1)

    run(scenario)


def test_who_falls_behind_gets_a_snapshot_and_nothing_is_kept_for_it() -> None:
    async def scenario(world: World) -> None:
        stream = world.watch()
        await snapshot(stream)
        for at in range(RING_EVENTS + 2):
            world.happen([NAMES[at % 7]], [NAMES[(at + 1) % 7]])
        event, names, _ = await snapshot(stream)
        assert event == RING_EVENTS + 2
        assert set(names) == set(world.feed._names)
        assert len(world.feed._ring) == RING_EVENTS

    run(scenario)


def test_one_event_that_is_larger_than_the_ring_leads_to_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_feed, "RING_NAMES", 8)

    async def scenario(world: World) -> None:
        stream = world.watch()
        await snapshot(stream)
        world.happen(NAMES[:9])
        assert (await snapshot(stream))[1] == NAMES[:9]

    run(scenario)


def test_streams_are_bounded_and_closed_ones_count_no_more() -> None:
    async def scenario(world: World) -> None:
        streams = [world.watch() for _ in range(MAX_SUBSCRIBERS)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(QueueFull, match="watch the cache already"):
            await anext(world.watch())
        await streams[0].aclose()  # type: ignore[attr-defined]
        await anext(world.watch())

    run(scenario)


def test_a_stream_is_of_one_incarnation() -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(StaleIncarnation):
            await anext(world.watch(incarnation=2))
        stream = world.watch()
        await snapshot(stream)
        world.incarnation = None
        world.happen(NAMES[:1])
        with pytest.raises(StaleIncarnation):
            await anext(stream)

    run(scenario)


def test_missing_numbers_never_leave_a_name_that_is_gone() -> None:
    """The engine drops events that nobody drains in time: what it does not have is asked for, and everybody starts anew."""

    async def scenario(world: World) -> None:
        world.happen(NAMES[:4])
        stream = world.watch()
        await snapshot(stream)
        world.engine.has = {NAMES[1], NAMES[3], NAMES[7], NAMES[9]}  # 0 and 2 went, 7 came, and nobody heard of it
        world.happen(NAMES[9:10], skip=2)
        event, names, _ = await snapshot(stream)
        assert (event, sorted(names)) == (4, [NAMES[1], NAMES[3], NAMES[9]])

    run(scenario)
