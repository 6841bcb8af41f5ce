"""Hostile senders at the Push port, in front of a real engine: bytes go straight into its pool, and only while they may.

Each test looks at the pool itself: that the first part of a payload lies there shows that the attack took effect, that nothing
changes afterwards shows that it was held.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from protos.contract.errors import StaleEpoch
from protos.contract.redis_names import pack_tokens
from protos.wire import fingerprint_key, kv
from tests.support.h2_peer import HELLO, METHOD, data, headers, prefixed
from tests.support.kv_memory import BLOCK_TOKENS, FINGERPRINT, Hooks
from tests.support.worker_world import until
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.engine_api.types import EngineRequest, Phase, SamplingParams
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.runner import OracleRunner
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.encodings import Compression
from workers.kv_transfer.frames import split
from workers.kv_transfer.hooks import ReceiveLimits
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.push_codec import DataFrame, encode_data, encode_other
from workers.kv_transfer.receiver import Receiver
from workers.kv_wire.h2_frames import END_STREAM, Code, Kind, frame, reset
from workers.kv_wire.push_client import dial
from workers.kv_wire.push_server import PushServer, ServerLimits
from workers.service.engine_thread import EngineThread
from workers.service.failpoints import Failpoints
from workers.service.push_wire import push_handler

BLOCKS = 5
MODEL = OracleModel("m", num_layers=4, row_bytes=64)  # 16 KiB a block
LAYOUT = MODEL.layout(BLOCK_TOKENS)
TOKENS = tuple(1 + n % 200 for n in range(BLOCKS * BLOCK_TOKENS))


def request_of(epoch: int = 1) -> EngineRequest:
    return EngineRequest(request_id="r", epoch=epoch, prompt=TOKENS, sampling=SamplingParams(max_tokens=3))


class Expecting(Hooks):
    """Expects the request at whatever epoch is the current one."""

    epoch = 1

    async def expect(self, request_id: str, epoch: int) -> Any:
        if epoch != self.epoch:
            raise StaleEpoch(f"{request_id}: epoch {epoch}")
        self._requests[request_id] = request_of(epoch)
        return await super().expect(request_id, epoch)


@dataclass
class Rig:
    """A receiver over the Push port, the engine behind it, and the content that an honest sender has."""

    runner: OracleRunner
    thread: EngineThread
    receiver: Receiver
    hooks: Expecting
    server: PushServer
    counters: TransferCounters
    ledger: Ledger
    content: list[list[bytes]]
    dirt: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.dirt = self.pool

    @property
    def pool(self) -> bytes:
        """All of it."""
        return self.runner._bytes.tobytes()

    async def open(self, epoch: int = 1, offer: kv.KvOffer | None = None) -> kv.OpenReply:
        """As the honest sender opens it."""
        request = request_of(epoch)
        return await self.receiver.open(
            kv.OpenRequest(
                request_id="r", epoch=epoch, source_instance="p", source_incarnation=1, target_instance="d",
                target_incarnation=1, fingerprint=FINGERPRINT, num_tokens=len(TOKENS), num_blocks=BLOCKS, offer=offer,
                block_hashes=sequence_hashes(FINGERPRINT, request), layers_per_group=LAYOUT.layers_per_group, streams=1,
            )
        )  # fmt: skip

    def frames(self, first: int = 0, epoch: int = 1) -> list[DataFrame]:
        """The blocks from one on, in frames of 5000 bytes at most."""
        scope = DigestScope(fingerprint_key(FINGERPRINT), "r", epoch)
        found: list[DataFrame] = []
        for block in range(first, BLOCKS):
            for group, raw in enumerate(self.content[block]):
                found += split(block, group, memoryview(raw), scope.of(block, group, raw), 5000)
        return found

    def message(self, reply: kv.OpenReply, epoch: int = 1) -> bytes:
        """All that is missing, in one message."""
        return encode_data(reply.transfer_id, epoch, self.frames(reply.first_block, epoch))

    def end(self, reply: kv.OpenReply, epoch: int = 1) -> bytes:
        """The right end."""
        end = kv.EndFrame(num_tokens=len(TOKENS), next_token_ids=pack_tokens([5]), first_output_index=0)
        end.digest = DigestScope(fingerprint_key(FINGERPRINT), "r", epoch).of_end(end)
        return encode_other(reply.transfer_id, epoch, end)

    def written(self, reply: kv.OpenReply) -> bytes:
        """What lies in the blocks of the transfer."""
        transfer = self.receiver._table.of_id(reply.transfer_id)
        assert transfer is not None
        pool, size = self.pool, LAYOUT.block_bytes
        return b"".join(pool[block * size : (block + 1) * size] for block in transfer.ticket.block_ids)

    @property
    def bytes(self) -> bytes:
        """The content in the order in which it is sent."""
        return b"".join(raw for block in self.content for raw in block)

    async def arrive(self, reply: kv.OpenReply, count: int) -> None:
        """Waits until so many bytes of the payload are in the pool, and no more."""
        expected = self.bytes[:count]
        await until(lambda: self.written(reply)[:count] == expected, f"{count} bytes are in the pool")
        assert self.written(reply)[count : count + 64] != self.bytes[count : count + 64]

    async def nothing_kept(self) -> None:
        """No block is in use, and none is in the prefix cache."""
        await self.receiver.settle()
        stats = await self.thread.call(lambda engine: engine.stats())
        assert (stats.used_blocks, stats.cached_blocks, stats.importing) == (0, 0, 0)
        assert stats.free_blocks == stats.total_blocks and len(self.ledger) == 0
        await self.thread.call(lambda engine: engine.check_integrity())

    async def honest(self, epoch: int = 1) -> None:
        """The honest sender gets through, from wherever the receiver is."""
        self.hooks.epoch = epoch
        reply = await self.open(epoch)
        call = await dial("127.0.0.1", self.server.port, METHOD, kv.PushReply.FromString, 5.0)
        await call.write([self.message(reply, epoch)])
        await call.write([self.end(reply, epoch)])
        outcome = [answer async for answer in call if answer.WhichOneof("outcome")]
        call.cancel()
        assert outcome[-1].HasField("commit"), outcome
        assert self.hooks.arrivals[-1].epoch == epoch


@asynccontextmanager
async def rig(timeout_s: float = 5.0, compression: Compression = "none") -> AsyncIterator[Rig]:
    """The pool has 0xaa where nothing was written."""
    bounds = EngineLimits(max_batch_tokens=512, max_running=4)
    source = PagedEngine(OracleRunner(MODEL, num_blocks=8, block_tokens=BLOCK_TOKENS), bounds)
    source.add(
        EngineRequest(request_id="r", epoch=1, prompt=TOKENS, sampling=SamplingParams(max_tokens=1), phase=Phase.PREFILL)
    )
    while not source.step().tokens:
        pass
    groups = range(LAYOUT.num_groups)
    content = [[bytes(source.export_kv(block, group)) for group in groups] for block in source.pin("r", 1)]
    runner = OracleRunner(MODEL, num_blocks=12, block_tokens=BLOCK_TOKENS)
    runner._bytes[:] = 0xAA
    thread = EngineThread(lambda event: None, lambda error: None, Failpoints({}))
    await thread.start(lambda: PagedEngine(runner, bounds))
    hooks, ledger, counters = Expecting(LAYOUT, request_of()), Ledger(), TransferCounters()
    limits = ReceiveLimits(window_bytes=1 << 20, streams=1, progress_timeout_s=timeout_s, remember_s=60.0)
    receiver = Receiver(
        port=thread, hooks=hooks, ledger=ledger, counters=counters, limits=limits, compression=compression
    )  # fmt: skip
    server = PushServer({METHOD: push_handler(receiver, METHOD)}, ServerLimits(1 << 22, idle_s=5.0))
    server.listen("127.0.0.1")
    running = asyncio.create_task(receiver.run())
    try:
        async with asyncio.timeout(20):
            yield Rig(runner, thread, receiver, hooks, server, counters, ledger, content)
    finally:
        running.cancel()
        await server.close()
        await thread.stop(5.0)


class Sender:
    """One connection with one call, on which bytes of messages go out as they are told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def begin(self, message: bytes, sent: int) -> bytes:
        """Announces a message in one frame, sends its beginning; gives the rest."""
        whole = data(message)
        cut = len(whole) - len(message) + sent
        self.writer.write(whole[:cut])
        return whole[cut:]

    async def outcome(self) -> str:
        """All that the server says until it hangs up or ends the call, as text."""
        seen = b""
        while b"grpc-status" not in seen and b"\x88" not in seen:
            more = await self.reader.read(65_536)
            if not more:
                break
            seen += more
        return seen.decode("latin-1")


@asynccontextmanager
async def sender(port: int) -> AsyncIterator[Sender]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HELLO + headers())
    try:
        yield Sender(reader, writer)
    finally:
        writer.close()


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
