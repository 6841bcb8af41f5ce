"""Hostile senders at the Push port, in front of a real engine: bytes go straight into its pool, and only while they may.

Each test looks at the pool itself: that the first part of a payload lies there shows that the attack took effect, that nothing
changes afterwards shows that it was held.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from protos.contract.errors import StaleEpoch
from protos.wire import kv
from tests.support.h2_peer import METHOD, data, prefixed
from tests.support.push_rig import BLOCKS, LAYOUT, Rig, rig, sender
from tests.support.worker_world import until
from workers.kv_transfer.push_codec import encode_data, encode_other
from workers.kv_wire.h2_frames import END_STREAM, Code, Kind, frame, reset
from workers.kv_wire.push_client import dial


def run(scenario: Callable[[Rig], Awaitable[None]], **options: Any) -> None:
    async def whole() -> None:
        async with rig(**options) as one:
            await scenario(one)

    asyncio.run(whole())


def payload_at(message: bytes, reply: kv.OpenReply, one: Rig) -> int:
    """Where the payload begins."""
    return len(message) - len(one.bytes)


BREAKS = {
    "hangs up": b"",
    "resets the stream": reset(1, Code.CANCEL),
    "breaks the protocol": frame(Kind.DATA, b"x", 0, 0),
}


@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("how", BREAKS)
def test_a_payload_that_breaks_off_leaves_whole_blocks_and_the_transfer_goes_on(how: str, blocks: int) -> None:
    """The reset comes behind the frame, so of a payload that is in two of them only the first comes."""

    async def scenario(one: Rig) -> None:
        reply = await one.open()
        message = one.message(reply)
        count = blocks * LAYOUT.block_bytes + 700
        cut = payload_at(message, reply, one) + count
        async with sender(one.server.port) as peer:
            peer.writer.write(frame(Kind.DATA, prefixed(message)[: cut + 5], stream=1))
            await one.arrive(reply, count)
            peer.writer.write(BREAKS[how])
            if how == "hangs up":
                peer.writer.close()
            transfer = one.receiver._table.of_id(reply.transfer_id)
            assert transfer is not None
            await until(lambda: not transfer.is_attached, "the stream is gone")
        again = await one.open()
        assert (again.transfer_id, again.first_block) == (reply.transfer_id, blocks), "what is verified does not come again"
        assert one.counters.kv_blocks_received == blocks
        await one.honest()
        assert one.counters.kv_blocks_received == BLOCKS and not one.hooks.errors

    run(scenario)


async def close(one: Rig, reply: kv.OpenReply) -> None:
    await one.receiver.close(kv.CloseRequest(transfer_id=reply.transfer_id, request_id="r", epoch=1))


async def abort(one: Rig, reply: kv.OpenReply) -> None:
    one.receiver.abort_request("r", 1, StaleEpoch("r: it is over"))


async def newer(one: Rig, reply: kv.OpenReply) -> None:
    one.hooks.epoch = 2
    assert (await one.open(2)).transfer_id != reply.transfer_id


async def fenced(one: Rig, reply: kv.OpenReply) -> None:
    one.receiver.abort_all(StaleEpoch("this process was fenced"))


async def too_slow(one: Rig, reply: kv.OpenReply) -> None:
    await until(lambda: bool(one.hooks.errors), "it timed out")


@pytest.mark.parametrize("sent", [1, 20_000, 60_000])
@pytest.mark.parametrize("end", [close, abort, newer, fenced])
def test_nothing_is_written_into_blocks_that_were_given_back(
    end: Callable[[Rig, kv.OpenReply], Awaitable[None]], sent: int
) -> None:
    async def scenario(one: Rig) -> None:
        reply = await one.open()
        message = one.message(reply)
        async with sender(one.server.port) as peer:
            rest = peer.begin(message, payload_at(message, reply, one) + sent)
            await one.arrive(reply, sent)
            await end(one, reply)
            await one.receiver.settle()
            before = one.pool
            peer.writer.write(rest + data(message))
            assert "STALE_EPOCH" in (said := await peer.outcome()) or "HANDOFF_TIMEOUT" in said
            assert one.pool == before, "not a byte after the blocks were given back"
        if end is newer:
            reply = await one.open(2)
            await close_epoch(one, reply, 2)
        await one.nothing_kept()

    run(scenario)


async def close_epoch(one: Rig, reply: kv.OpenReply, epoch: int) -> None:
    await one.receiver.close(kv.CloseRequest(transfer_id=reply.transfer_id, request_id="r", epoch=epoch))


def test_blocks_that_another_epoch_got_are_not_written_by_the_payload_of_the_first() -> None:
    """The blocks are given to the next import while the old payload still comes: the new content is whole."""

    async def scenario(one: Rig) -> None:
        reply = await one.open()
        ids = one.receiver._table.of_id(reply.transfer_id).ticket.block_ids  # type: ignore[union-attr]
        foreign = encode_data(
            reply.transfer_id, 1, [part._replace(payload=memoryview(bytes(part.payload.nbytes))) for part in one.frames()]
        )
        async with sender(one.server.port) as peer:
            rest = peer.begin(foreign, len(foreign) - len(one.bytes) + 1000)
            await until(lambda: one.written(reply)[:1000] == bytes(1000), "the lie is in the pool")
            one.hooks.epoch = 2
            again = await one.open(2)
            transfer = one.receiver._table.of_id(again.transfer_id)
            assert transfer is not None and set(transfer.ticket.block_ids) & set(ids), "the same blocks"
            honest = asyncio.create_task(one.honest(2))
            peer.writer.write(rest)
            assert "STALE_EPOCH" in await peer.outcome()
            await honest
            pool, size = one.pool, LAYOUT.block_bytes
            assert b"".join(pool[block * size : (block + 1) * size] for block in transfer.ticket.block_ids) == one.bytes

    run(scenario)


@pytest.mark.parametrize("encoding", [kv.KV_ENCODING_NONE, kv.KV_ENCODING_LOSSLESS])
@pytest.mark.parametrize("end", [too_slow, abort])
def test_a_sender_that_stalls_in_a_payload_is_told_of_the_end_at_once(
    end: Callable[[Rig, kv.OpenReply], Awaitable[None]], encoding: kv.KvEncoding
) -> None:
    """Straight into the pool or packed: the stream does not wait for bytes that never come."""

    async def scenario(one: Rig) -> None:
        reply = await one.open(offer=kv.KvOffer(encodings=[encoding]))
        assert reply.encoding == encoding
        parts = [part._replace(encoding=encoding) for part in one.frames()]
        message = encode_data(reply.transfer_id, 1, parts)
        async with sender(one.server.port) as peer:
            peer.begin(message, len(message) - 100)
            await until(lambda: bool(one.server.calls_begun), "the call has begun")
            transfer = one.receiver._table.of_id(reply.transfer_id)
            assert transfer is not None
            await until(lambda: transfer.is_attached, "the stream is attached")
            await end(one, reply)
            async with asyncio.timeout(2):
                said = await peer.outcome()
            assert "HANDOFF_TIMEOUT" in said or "STALE_EPOCH" in said
        await one.nothing_kept()

    run(scenario, timeout_s=0.3 if end is too_slow else 10.0, compression="lossless")


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_that_went_straight_into_the_pool_is_found_and_kept_from_everybody(seed: int) -> None:
    async def scenario(one: Rig) -> None:
        rng = random.Random(seed)
        reply = await one.open()
        message = bytearray(one.message(reply))
        at = rng.randrange(payload_at(bytes(message), reply, one), len(message))
        message[at] ^= 1 << rng.randrange(8)
        where = at - payload_at(bytes(message), reply, one)
        async with sender(one.server.port) as peer:
            rest = peer.begin(bytes(message), len(message) - len(one.bytes))
            blocks = one.receiver._table.of_id(reply.transfer_id).ticket.block_ids  # type: ignore[union-attr]
            peer.writer.write(rest)
            assert "DIGEST_MISMATCH" in await peer.outcome()
        wrong = one.pool[blocks[where // LAYOUT.block_bytes] * LAYOUT.block_bytes + where % LAYOUT.block_bytes]
        assert wrong == message[at], "it was in the pool"
        await one.nothing_kept()
        await one.honest()

    run(scenario)


LIES: dict[str, Callable[[bytes], bytes]] = {
    "too long": lambda message: message + b"more",
    "too short": lambda message: message[:-1],
    "head only": lambda message: message[: len(message) // 50],
    "twice": lambda message: message + b"\x42\x03abc",
    "not last": lambda message: message + b"\x30\x00",
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_payload_that_is_not_what_was_said_is_refused_before_a_byte_of_it_is_written(lie: str, is_first: bool) -> None:
    async def scenario(one: Rig) -> None:
        reply = await one.open()
        async with sender(one.server.port) as peer:
            if not is_first:
                peer.writer.write(data(encode_other(reply.transfer_id, 1)))
                await until(lambda: bool(one.receiver._table.of_id(reply.transfer_id).is_attached), "attached")  # type: ignore
            peer.writer.write(data(LIES[lie](one.message(reply))))
            said = await peer.outcome()
            assert "INVALID_REQUEST" in said or "no valid protobuf" in said
        assert one.pool == one.dirt, "nothing was written"
        if not is_first:
            await one.nothing_kept()
        await one.honest()

    run(scenario)


def test_an_end_of_the_call_in_the_middle_of_a_payload_is_no_end() -> None:
    async def scenario(one: Rig) -> None:
        reply = await one.open()
        message = one.message(reply)
        count = LAYOUT.block_bytes + 5
        cut = payload_at(message, reply, one) + count
        async with sender(one.server.port) as peer:
            peer.writer.write(frame(Kind.DATA, prefixed(message)[: cut + 5], END_STREAM, 1))
            assert "PEER_UNAVAILABLE" in await peer.outcome()
        assert (await one.open()).first_block == 1
        await one.honest()

    run(scenario)


def test_the_client_sees_the_refusal_of_a_payload_that_it_still_sends() -> None:
    """It is told why, not only that the call has ended."""

    async def scenario(one: Rig) -> None:
        reply = await one.open()
        message = one.message(reply)
        call = await dial("127.0.0.1", one.server.port, METHOD, kv.PushReply.FromString, 5.0)
        damaged = bytearray(message)
        damaged[payload_at(message, reply, one) + 3] ^= 1
        await call.write([bytes(damaged)])
        answers = [answer async for answer in call]
        assert answers[-1].refused.reason == "DIGEST_MISMATCH"
        with pytest.raises(grpc.RpcError):
            await call.write([message])
        call.cancel()
        await one.nothing_kept()

    run(scenario)
