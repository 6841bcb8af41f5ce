"""A peer that speaks KvTransfer but is not the assigned sender, or not an honest one. The worker refuses, and keeps serving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from configs.schema.network import NetworkConfig
from protos.contract.errors import AutanError
from protos.contract.redis_names import pack_tokens
from protos.rpc import error_of, kv_pb2_grpc, open_channel
from protos.wire import common, fingerprint_key, kv
from tests.support.kv_wire import FaultyWire, put_wire
from tests.support.push_frames import message_of, part
from tests.support.store import FreshStore
from tests.support.worker_world import BLOCK_TOKENS, NETWORK, TIMING, WorkerWorld, prompt, until, worker_world
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.digest import DigestScope
from workers.service.host import WorkerHost

BLOCKS = 4
TOKENS = BLOCKS * BLOCK_TOKENS - 3


class Forger:
    """Says what a sender says, with any field changed."""

    def __init__(self, world: WorkerWorld, stub: Any, request_id: str, epoch: int) -> None:
        self.world = world
        self.d: WorkerHost = world.hosts["decode-0"]
        self.stub = stub
        self.request_id = request_id
        self.epoch = epoch

    def claim(self, **changes: Any) -> kv.OpenRequest:
        """A true claim but for the changes."""
        p = self.world.hosts["prefill-0"]
        fingerprint = common.Fingerprint()
        fingerprint.CopyFrom(self.d.status().card.fingerprint)
        assignment = self.d.parts.assignments.get(self.request_id) or p.parts.assignments.get(self.request_id)
        assert assignment is not None
        values: dict[str, Any] = {
            "request_id": self.request_id, "epoch": self.epoch, "source_instance": "prefill-0",
            "source_incarnation": p.me.number, "target_instance": "decode-0", "target_incarnation": self.d.me.number,
            "fingerprint": fingerprint, "num_tokens": TOKENS, "num_blocks": BLOCKS,
            "block_hashes": sequence_hashes(fingerprint, assignment.request),
            "layers_per_group": self.d.engine.layout.layers_per_group,
        }  # fmt: skip
        return kv.OpenRequest(**(values | changes))

    async def open(self, **changes: Any) -> kv.OpenReply:
        """The reply, or the refusal raised."""
        try:
            reply: kv.OpenReply = await self.stub.Open(self.claim(**changes), timeout=5)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return reply

    async def push(self, frames: list[kv.PushFrame]) -> str:
        """The reason of the refusal, `COMMIT`, or empty when there is no outcome."""
        call = self.stub.Push(timeout=5)

        async def feed() -> None:
            for frame in frames:
                await call.write(frame)
            await call.done_writing()

        feeding = asyncio.create_task(feed())
        outcome = ""
        try:
            async for reply in call:
                if reply.WhichOneof("outcome"):
                    outcome = "COMMIT" if reply.HasField("commit") else reply.refused.reason
        finally:
            await asyncio.gather(feeding, return_exceptions=True)
        return outcome


@asynccontextmanager
async def forger(fresh: FreshStore, network: NetworkConfig = NETWORK) -> AsyncIterator[tuple[Forger, FaultyWire]]:
    async with worker_world(fresh) as world:
        await world.start_worker("prefill-0", "prefill", timing=TIMING.model_copy(update={"kv_lease_s": 10.0}))
        quick = TIMING.model_copy(update={"progress_timeout_s": 0.8})
        d = await world.start_worker("decode-0", "decode", timing=quick, network=network)
        wire = await put_wire(world, "decode-0")
        wire.closed = True
        try:
            request = await world.submit(prompt(TOKENS), 6)
            epoch = await world.assign(request, "prefill-0", "decode-0")
            await until(lambda: d.parts.assignments.get(request) is not None, "it is expected")
            async with open_channel(d.address) as channel:
                yield Forger(world, kv_pb2_grpc.KvTransferStub(channel), request, epoch), wire
        finally:
            await wire.stop()


def run(fresh: FreshStore, scenario: Callable[[Forger], Awaitable[None]]) -> None:
    """The forgery while the honest sender cannot get through, and then the honest sender: the answer is right all the same."""

    async def whole() -> None:
        async with forger(fresh) as (forge, wire):
            await scenario(forge)
            wire.closed = False
            await forge.world.answered(forge.request_id)
            await forge.world.clean()

    asyncio.run(whole())


def test_forged_opens_reserve_nothing(fresh_store: FreshStore) -> None:
    async def scenario(forge: Forger) -> None:
        other = common.Fingerprint()
        other.CopyFrom(forge.d.status().card.fingerprint)
        other.dtype = "bfloat16"
        refusals: list[tuple[dict[str, Any], str]] = [
            ({"fingerprint": other}, "FINGERPRINT_MISMATCH"),
            ({"epoch": forge.epoch + 1}, "STALE_EPOCH"),
            ({"epoch": 0}, "STALE_EPOCH"),
            ({"source_incarnation": 77}, "STALE_INCARNATION"),
            ({"source_instance": "prefill-9"}, "STALE_INCARNATION"),
            ({"target_incarnation": 77}, "STALE_INCARNATION"),
            ({"request_id": "nobody"}, "STALE_EPOCH"),
            ({"request_id": "x" * 65}, "BAD_FRAME"),
            ({"num_tokens": 4_000_000_000, "num_blocks": 4_000_000_000}, "BAD_FRAME"),
            ({"num_tokens": 1, "num_blocks": 1, "block_hashes": b""}, "BAD_FRAME"),
            ({"block_hashes": b"\0" * 48}, "BAD_FRAME"),
        ]

        async def reason(changes: dict[str, Any]) -> str:
            with pytest.raises(AutanError) as caught:
                await forge.open(**changes)
            return caught.value.reason

        answers = await asyncio.gather(*(reason(changes) for changes, _ in refusals))
        assert answers == [expected for _, expected in refusals]
        assert forge.d.engine.stats().importing == 0 and len(forge.d.parts.ledger) == 0
        assert forge.d.parts.counters.stale_refused >= 6

    run(fresh_store, scenario)


def data(forge: Forger, transfer_id: str, block: int, **changes: Any) -> kv.PushFrame:
    values: dict[str, Any] = {
        "payload": b"\0" * forge.d.engine.layout.group_bytes(0), "block_index": block, "layer_group": 0, "offset_bytes": 0,
        "digest": b"\0" * 16,
    }  # fmt: skip
    return message_of(transfer_id, forge.epoch, [part(**(values | changes))])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "DIGEST_MISMATCH"),
        ({"block_index": 1}, "BAD_FRAME"),
        ({"block_index": 2**32 - 1}, "BAD_FRAME"),
        ({"layer_group": 9}, "BAD_FRAME"),
        ({"offset_bytes": 64}, "BAD_FRAME"),
        ({"payload": b""}, "BAD_FRAME"),
        ({"payload": b"\0" * 5000}, "BAD_FRAME"),
        ({"payload": b"\0" * 100_000}, "BAD_FRAME"),
        ({"digest": b"\0" * 15}, "BAD_FRAME"),
        ({"payload": b"\0", "digest": b"\0" * 16}, "BAD_FRAME"),
    ],
)
def test_forged_frames_end_the_transfer_and_free_its_blocks(
    fresh_store: FreshStore, changes: dict[str, Any], reason: str
) -> None:
    async def scenario(forge: Forger) -> None:
        reply = await forge.open()
        assert forge.d.engine.stats().importing == 1
        assert await forge.push([data(forge, reply.transfer_id, 0, **changes)]) == reason
        await until(lambda: forge.d.engine.stats().used_blocks == 0, "the blocks are free")
        assert len(forge.d.parts.ledger) == 0

    run(fresh_store, scenario)


def test_forged_further_parts_end_the_transfer_and_free_its_blocks(fresh_store: FreshStore) -> None:
    async def scenario(forge: Forger) -> None:
        reply = await forge.open()
        gap = [part(b"\0" * 8), part(b"\0" * 8, offset_bytes=16)]
        assert await forge.push([message_of(reply.transfer_id, forge.epoch, gap)]) == "BAD_FRAME"
        await until(lambda: forge.d.engine.stats().used_blocks == 0, "the blocks are free")
        reply = await forge.open()
        crowd = message_of(reply.transfer_id, forge.epoch, [part()] * 5000)
        assert await forge.push([crowd]) == "INVALID_REQUEST", "more parts than a message may have"
        await until(lambda: forge.d.engine.stats().used_blocks == 0, "the blocks are free again")

    run(fresh_store, scenario)


def test_an_end_without_its_blocks_is_no_end(fresh_store: FreshStore) -> None:
    async def scenario(forge: Forger) -> None:
        reply = await forge.open()
        end = kv.EndFrame(num_tokens=TOKENS, next_token_ids=pack_tokens([5]), first_output_index=0)
        fingerprint = forge.d.status().card.fingerprint
        end.digest = DigestScope(fingerprint_key(fingerprint), forge.request_id, forge.epoch).of_end(end)
        frame = kv.PushFrame(transfer_id=reply.transfer_id, epoch=forge.epoch, end=end)
        assert await forge.push([frame]) == "BAD_FRAME"
        assert await forge.push([frame]) == "STALE_EPOCH", "the transfer is gone"
        assert await forge.world.state(forge.request_id) == "PREFILLING"

    run(fresh_store, scenario)


def test_streams_without_a_transfer_are_refused(fresh_store: FreshStore) -> None:
    async def scenario(forge: Forger) -> None:
        assert await forge.push([]) == "BAD_FRAME"
        assert await forge.push([kv.PushFrame(transfer_id="0" * 32, epoch=forge.epoch)]) == "STALE_EPOCH"
        reply = await forge.open()
        assert await forge.push([kv.PushFrame(transfer_id=reply.transfer_id, epoch=forge.epoch - 1)]) == "STALE_EPOCH"
        assert (await forge.open()).transfer_id == reply.transfer_id, "a repeated open is the same transfer"
        await forge.stub.Close(kv.CloseRequest(transfer_id="0" * 32, request_id="nobody", epoch=9))
        assert forge.d.engine.stats().importing == 1, "closing something unknown closes nothing"
        await forge.stub.Close(kv.CloseRequest(transfer_id=reply.transfer_id, request_id=forge.request_id, epoch=forge.epoch))
        await until(lambda: forge.d.engine.stats().importing == 0, "it is closed")

    run(fresh_store, scenario)


def test_a_transfer_without_progress_is_given_back(fresh_store: FreshStore) -> None:
    async def scenario(forge: Forger) -> None:
        await forge.open()
        assert forge.d.engine.stats().importing == 1
        await until(lambda: forge.d.engine.stats().importing == 0, "the import timed out", 6.0)
        assert len(forge.d.parts.ledger) == 0

    run(fresh_store, scenario)


def test_garbage_is_an_invalid_argument(fresh_store: FreshStore) -> None:
    async def scenario(forge: Forger) -> None:
        async with open_channel(forge.d.address) as channel:
            for method in ("KvTransfer/Open", "KvTransfer/Close", "Worker/Status"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(f"/autan.v1.{method}")(b"\xff\xff\xff\xff", timeout=5)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(fresh_store, scenario)
