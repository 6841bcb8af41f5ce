"""Frames that change, vanish, repeat or trade places, and replies that get lost: right tokens or a clear end, no leak."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from configs.schema.network import NetworkConfig
from protos.contract.redis_names import pack_tokens, unpack_tokens
from protos.wire import kv
from tests.support.kv_wire import FaultyWire, Mutate, put_wire
from tests.support.push_frames import first_head, flip, message_of, parts_of, with_parts
from tests.support.store import FreshStore
from tests.support.worker_world import NETWORK, WorkerWorld, prompt, until, worker_world


def with_wire(
    fresh: FreshStore, scenario: Callable[[WorkerWorld, FaultyWire], Awaitable[None]], network: NetworkConfig = NETWORK
) -> None:
    """A prefill and a decode worker with a faulty wire between them."""

    async def run() -> None:
        async with worker_world(fresh) as world:
            await world.start_worker("prefill-0", "prefill", network=network)
            await world.start_worker("decode-0", "decode")
            wire = await put_wire(world, "decode-0")
            try:
                await scenario(world, wire)
            finally:
                await wire.stop()

    asyncio.run(run())


async def send(world: WorkerWorld, tokens: int = 200) -> str:
    request = await world.submit(prompt(tokens), 12)
    await world.assign(request, "prefill-0", "decode-0")
    return request


def once(nth: int, change: Callable[[kv.PushFrame], list[kv.PushFrame] | None]) -> Mutate:
    return lambda n, frame: change(frame) if n == nth else [frame]


@pytest.mark.parametrize("nth", [0, 5, 12])
def test_a_flipped_bit_is_sent_again_from_the_source(fresh_store: FreshStore, nth: int) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        wire.mutate = once(nth, lambda frame: [flip(frame)])
        got = await world.answered(await send(world))
        assert wire.opens == 2 and got.timelines[-1].attempts == 0
        await world.clean()

    with_wire(fresh_store, scenario)


def test_a_changed_first_token_is_sent_again_from_the_source(fresh_store: FreshStore) -> None:
    def other_token(frame: kv.PushFrame) -> list[kv.PushFrame]:
        changed = kv.PushFrame()
        changed.CopyFrom(frame)
        token = unpack_tokens(changed.end.next_token_ids)[0]
        changed.end.next_token_ids = pack_tokens([token ^ 1])
        return [changed]

    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        wire.mutate = once(13, other_token)  # behind 13 blocks
        got = await world.answered(await send(world))
        assert wire.opens == 2 and got.timelines[-1].attempts == 0
        assert not got.refused, "no ingress ever saw the changed token"
        await world.clean()

    with_wire(fresh_store, scenario)


def test_a_wire_that_always_flips_ends_in_another_prefill(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        wire.mutate = lambda n, frame: [flip(frame)] if frame.HasField("blocks") else [frame]
        request = await send(world)
        await world.ended(request, "QUEUED")
        assert wire.opens == 2, "one retry from the source, no more"
        await world.clean()
        assert world.hosts["prefill-0"].parts.counters.handoffs_failed == 1
        wire.mutate = lambda n, frame: [frame]
        await world.assign(request, "prefill-0", "decode-0")
        await world.answered(request)
        await world.clean()

    with_wire(fresh_store, scenario)


def test_blocks_that_trade_places_never_decode(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        held: list[kv.PushFrame] = []

        def swap(n: int, frame: kv.PushFrame) -> list[kv.PushFrame]:
            """Payload and digest of the second block travel as those of the third and the other way round."""
            if first_head(frame).block_index not in (1, 2) or len(held) > 1:
                return [frame]
            held.append(frame)
            if len(held) == 1:
                return []
            first, second = held
            (one,), (other,) = parts_of(first), parts_of(second)
            return [
                with_parts(first, [one.with_bytes(other.payload, digest=other.head.digest)]),
                with_parts(second, [other.with_bytes(one.payload, digest=one.head.digest)]),
            ]

        wire.mutate = swap
        await world.answered(await send(world))
        assert len(held) == 2 and wire.opens == 2
        await world.clean()

    with_wire(fresh_store, scenario)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda frame: [], id="lost"),
        pytest.param(lambda frame: [frame, frame], id="twice"),
        pytest.param(lambda frame: [kv.PushFrame(transfer_id=frame.transfer_id, epoch=frame.epoch + 1)], id="epoch"),
        pytest.param(lambda frame: [message_of("f" * 32, frame.epoch, parts_of(frame))], id="transfer"),
    ],
)
def test_a_frame_out_of_place_ends_the_hand_off(
    fresh_store: FreshStore, change: Callable[[kv.PushFrame], list[kv.PushFrame]]
) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        wire.mutate = once(4, change)
        request = await send(world)
        await world.ended(request, "QUEUED")
        await world.clean()
        await world.assign(request, "prefill-0", "decode-0")
        await world.answered(request)
        await world.clean()

    with_wire(fresh_store, scenario)


@pytest.mark.parametrize("nth", [0, 7, 13])
def test_a_cut_stream_goes_on_where_it_was(fresh_store: FreshStore, nth: int) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        received = world.hosts["decode-0"].parts.counters
        wire.mutate = once(nth, lambda frame: None)
        wire.before_cut = lambda: until(lambda: received.kv_blocks_received == min(nth, 13), "the rest is there")
        await world.answered(await send(world))
        assert (wire.cuts, wire.opens, wire.streams) == (1, 2, 2)
        # 13 blocks of one frame each and the end: what was verified before the cut did not travel again.
        assert wire.frames == 14 + 1
        await world.clean()

    with_wire(fresh_store, scenario)


def test_a_wire_that_cuts_twice_ends_the_hand_off(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        wire.mutate = lambda n, frame: None if n in (3, 6) else [frame]
        request = await send(world)
        await world.ended(request, "QUEUED")
        assert wire.cuts == 2
        await world.clean()

    with_wire(fresh_store, scenario)


def test_a_lost_commit_reply_is_looked_up(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        wire.drop_replies = 1
        got = await world.answered(await send(world))
        assert (wire.cuts, wire.opens) == (1, 1), "Redis knew the answer: nothing was sent again"
        assert got.timelines[-1].attempts == 0
        await world.clean()
        counters = world.hosts["prefill-0"].parts.counters
        assert (counters.handoffs_committed, counters.handoffs_failed) == (1, 0)

    with_wire(fresh_store, scenario)


def test_a_stream_that_ends_without_its_end_frame_is_not_committed(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        wire.mutate = lambda n, frame: [] if frame.HasField("end") else [frame]
        request = await send(world)
        await world.ended(request, "QUEUED")
        assert world.hosts["decode-0"].engine.stats().decode_tokens == 0
        await world.clean()

    with_wire(fresh_store, scenario)


FOUR_BLOCKS = NETWORK.model_copy(update={"frame_bytes": 4096})  # as many as a chunk computes


def test_a_flipped_bit_in_a_later_block_of_a_message_is_sent_again(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        wire.mutate = once(1, lambda frame: [flip(frame, at=2)])
        got = await world.answered(await send(world))
        assert wire.opens == 2 and got.timelines[-1].attempts == 0
        await world.clean()

    with_wire(fresh_store, scenario, FOUR_BLOCKS)


def test_a_cut_stream_of_several_blocks_a_message_goes_on_where_it_was(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        received = world.hosts["decode-0"].parts.counters
        wire.mutate = once(2, lambda frame: None)
        wire.before_cut = lambda: until(lambda: received.kv_blocks_received == 8, "two messages of four blocks are there")
        await world.answered(await send(world))
        assert (wire.cuts, wire.opens, wire.streams) == (1, 2, 2)
        # 13 blocks in four messages and the end; the one that was cut travels again.
        assert wire.frames == 5 + 1
        await world.clean()

    with_wire(fresh_store, scenario, FOUR_BLOCKS)
