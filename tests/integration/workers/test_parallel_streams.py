"""Hand-offs over several connections at once between real workers: right tokens, faults on any stream, no leak."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from configs.schema.network import NetworkConfig
from protos.wire import kv
from tests.support.kv_wire import FaultyWire, put_wire
from tests.support.push_frames import first_head, flip, message_of, parts_of
from tests.support.store import FreshStore
from tests.support.worker_world import NETWORK, WorkerWorld, prompt, slow, until, worker_world

STREAMS = 3
SEVERAL = NETWORK.model_copy(update={"streams": STREAMS, "stream_bytes": 1024})
TOKENS, BLOCKS = 200, 13


def with_wire(
    fresh: FreshStore,
    scenario: Callable[[WorkerWorld, FaultyWire], Awaitable[None]],
    *,
    sender: NetworkConfig = SEVERAL,
    receiver: NetworkConfig = SEVERAL,
    **changes: Any,
) -> None:
    """A prefill and a decode worker with a faulty wire between them."""

    async def run() -> None:
        async with worker_world(fresh) as world:
            await world.start_worker("prefill-0", "prefill", network=sender, **changes)
            await world.start_worker("decode-0", "decode", network=receiver)
            wire = await put_wire(world, "decode-0")
            try:
                await scenario(world, wire)
            finally:
                await wire.stop()

    asyncio.run(run())


async def send(world: WorkerWorld, tokens: int = TOKENS) -> str:
    request = await world.submit(prompt(tokens), 12)
    await world.assign(request, "prefill-0", "decode-0")
    return request


def stripes_of(seen: list[kv.PushFrame]) -> dict[int, list[int]]:
    """The blocks that travelled, by stream."""
    found: dict[int, list[int]] = {}
    for frame in seen:
        if frame.HasField("blocks"):
            found.setdefault(frame.stream, []).append(first_head(frame).block_index)
    return found


def test_blocks_are_striped_over_the_streams(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        seen: list[kv.PushFrame] = []
        wire.mutate = lambda n, frame: seen.append(frame) or [frame]  # type: ignore[func-returns-value]
        got = await world.answered(await send(world))
        assert (wire.opens, wire.streams) == (1, STREAMS)
        assert stripes_of(seen) == {n: list(range(n, BLOCKS, STREAMS)) for n in range(STREAMS)}
        assert got.timelines[-1].handoff_blocks == BLOCKS
        await world.clean()

    with_wire(fresh_store, scenario)


@pytest.mark.parametrize(
    ("sender", "receiver", "streams"),
    [
        pytest.param(NETWORK, SEVERAL, 1, id="a small one asks for one"),
        pytest.param(SEVERAL, NETWORK.model_copy(update={"streams": 1}), 1, id="one is granted"),
        pytest.param(SEVERAL, NETWORK.model_copy(update={"streams": 2}), 2, id="fewer are granted"),
    ],
)
def test_no_more_streams_than_both_sides_want(
    fresh_store: FreshStore, sender: NetworkConfig, receiver: NetworkConfig, streams: int
) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        await world.answered(await send(world))
        assert wire.streams == streams
        await world.clean()

    with_wire(fresh_store, scenario, sender=sender, receiver=receiver)


@pytest.mark.parametrize("nth", [1, 6, 12])
def test_a_flipped_bit_on_any_stream_is_sent_again_from_the_source(fresh_store: FreshStore, nth: int) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        data = 0

        def once(n: int, frame: kv.PushFrame) -> list[kv.PushFrame]:
            nonlocal data
            data += frame.HasField("blocks")
            return [flip(frame)] if data == nth and frame.HasField("blocks") else [frame]

        wire.mutate = once
        got = await world.answered(await send(world))
        assert wire.opens == 2 and got.timelines[-1].attempts == 0
        await world.clean()

    with_wire(fresh_store, scenario)


@pytest.mark.parametrize("stream", range(STREAMS))
def test_a_cut_stream_goes_on_where_each_of_them_was(fresh_store: FreshStore, stream: int) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        received = world.hosts["decode-0"].parts.counters
        passed: list[kv.PushFrame] = []

        def cut(n: int, frame: kv.PushFrame) -> list[kv.PushFrame] | None:
            if not wire.cuts and frame.stream == stream and first_head(frame).block_index == stream + STREAMS:
                return None
            if frame.HasField("blocks"):
                passed.append(frame)
            return [frame]

        wire.mutate = cut
        wire.before_cut = lambda: until(lambda: len(passed) and received.kv_blocks_received == len(passed) > 3, "all passed")
        await world.answered(await send(world))
        assert (wire.cuts, wire.opens) == (1, 2)
        travelled = sorted(block for blocks in stripes_of(passed).values() for block in blocks)
        assert set(travelled) == set(range(BLOCKS)) and received.kv_blocks_received == BLOCKS, "none was verified twice"
        await world.clean()

    with_wire(fresh_store, scenario)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda frame: [], id="lost"),
        pytest.param(lambda frame: [frame, frame], id="twice"),
        pytest.param(
            lambda frame: [message_of(frame.transfer_id, frame.epoch, parts_of(frame), 9)],
            id="foreign stream",
        ),
        pytest.param(
            lambda frame: [message_of(frame.transfer_id, frame.epoch, parts_of(frame), 0)],
            id="number of another stream",
        ),
    ],
)
def test_a_frame_out_of_place_on_a_side_stream_ends_the_hand_off(
    fresh_store: FreshStore, change: Callable[[kv.PushFrame], list[kv.PushFrame]]
) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        changed = 0

        def once(n: int, frame: kv.PushFrame) -> list[kv.PushFrame]:
            nonlocal changed
            if changed or first_head(frame).block_index != 1 + STREAMS:
                return [frame]
            changed += 1
            return change(frame)

        wire.mutate = once
        request = await send(world)
        await world.ended(request, "QUEUED")
        await world.clean()
        await world.assign(request, "prefill-0", "decode-0")
        await world.answered(request)
        await world.clean()

    with_wire(fresh_store, scenario)


def test_an_end_that_overtakes_the_other_streams_waits_for_them(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        d = world.hosts["decode-0"]
        await world.answered(await send(world, 20))
        transfers = d.parts.receiver._table
        gate = wire.gate_of(lambda frame: first_head(frame).block_index == 2 + STREAMS)
        request = await send(world)

        def is_waiting() -> bool:
            transfer = transfers.of_request(request)
            return transfer is not None and transfer.is_ending

        await until(is_waiting, "the end is there, a block of stream 2 is not")
        waited = d.engine.stats().importing == 1
        gate.set()
        await world.answered(request)
        assert waited
        await world.clean()

    with_wire(fresh_store, scenario)


def test_cancelled_in_the_middle_every_stream_stops(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        d = world.hosts["decode-0"]
        request = await send(world, 384)
        await until(lambda: d.parts.counters.kv_blocks_received >= 4, "blocks are there")
        assert (await world.store.cancel(request, "acme", "client")).state == "CANCELLED"
        await world.clean()
        assert d.engine.stats().importing == 0

    with_wire(fresh_store, scenario, engine=slow(prefill_tokens_per_s=400.0))
