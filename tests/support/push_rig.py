"""A receiver behind a Push port, in front of a real engine, and senders that say to it what they want."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from protos.contract.errors import StaleEpoch
from protos.contract.redis_names import pack_tokens
from protos.wire import fingerprint_key, kv
from tests.support.h2_peer import HELLO, METHOD, data, headers
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
