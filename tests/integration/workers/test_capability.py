"""Capabilities on real workers: what the orchestrator signs goes through, the rest is refused and the log says why."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from orchestrator.control.effects import Assignment
from orchestrator.domain.ids import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.ingress.moving import Mover
from orchestrator.runtime.capabilities import move_signer, signer
from orchestrator.store.replies import Placement
from protos.contract.capability import GRACE_MS, Grant, KeyFile, make_key_file, rotate_key_file
from protos.contract.redis_names import Code
from protos.rpc import error_of, kv_pb2_grpc, open_channel
from protos.wire import kv
from tests.support.store import FreshStore
from tests.support.worker_world import BLOCK_TOKENS, LEADER, WorkerWorld, prompt, slow, until, worker_world

TOKENS = 4 * BLOCK_TOKENS - 3
LONG_MS = 60_000


class SignedWorld:
    """A prefill and a decode worker that ask for capabilities, and a core's edge that signs them."""

    def __init__(self, world: WorkerWorld, path: Path) -> None:
        self.world = world
        self.path = path
        file = KeyFile(path)
        self.sign = signer(lambda: file.keys)

    async def assign(self, request_id: str, *, valid_ms: int = LONG_MS, change: Callable[[bytes], bytes] = bytes) -> Assignment:
        """Places a queued request with its capability; `change` forges it."""
        view = await self.world.store.view()
        of = {record.instance_id: Incarnation(record.incarnation) for record in view.instances}
        epoch = (await self.world.store.look([request_id]))[0].epoch
        item = Assignment(
            RequestId(request_id), Epoch(epoch), InstanceId("prefill-0"), of["prefill-0"],
            InstanceId("decode-0"), of["decode-0"],
            4, 5, self.world.hosts["decode-0"].engine.layout.block_bytes, view.now_ms + valid_ms,
        )  # fmt: skip
        at = Placement(
            request_id, epoch, item.prefill, item.prefill_incarnation, item.decode, item.decode_incarnation, 4, 5,
            change(self.sign(item)),
        )  # fmt: skip
        outcome = (await self.world.store.assign(LEADER, self.world.leader_epoch, 5_000, [at]))[0]
        assert outcome.code is Code.OK, outcome
        return item

    def refused(self) -> bool:
        """Nothing was reserved for anybody."""
        d = self.world.hosts["decode-0"]
        return not (d.engine.stats().used_blocks or d.parts.ledger.opened or d.parts.counters.kv_bytes_received)


def run(fresh: FreshStore, tmp_path: Path, scenario: Callable[[SignedWorld], Awaitable[None]], **engine: Any) -> None:
    async def whole() -> None:
        path = tmp_path / "handoff.keys"
        make_key_file(path)
        async with worker_world(fresh) as world:
            await world.start_worker("prefill-0", "prefill", handoff_keys_file=str(path))
            await world.start_worker("decode-0", "decode", engine=engine, handoff_keys_file=str(path))
            await scenario(SignedWorld(world, path))

    asyncio.run(whole())


def test_signed_hand_offs_go_through_while_the_keys_rotate(fresh_store: FreshStore, tmp_path: Path) -> None:
    async def scenario(signed: SignedWorld) -> None:
        world = signed.world
        for at in range(3):
            request = await world.submit(prompt(TOKENS, at), 6)
            await signed.assign(request)
            rotate_key_file(signed.path)
            await world.answered(request)
        assert world.hosts["decode-0"].parts.counters.stale_refused == 0
        assert world.hosts["prefill-0"].parts.counters.handoffs_failed == 0
        await world.clean()

    run(fresh_store, tmp_path, scenario)


def corrupted(capability: bytes) -> bytes:
    message = kv.Capability.FromString(capability)
    message.mac = bytes([message.mac[0]]) + message.mac[1:-1] + bytes([message.mac[-1] ^ 1])
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"change": corrupted}, "is not for this request"),
        ({"change": lambda capability: b""}, "no capability came along"),
        ({"valid_ms": -1 - GRACE_MS}, "the capability expired"),
    ],
)
def test_a_hand_off_without_a_valid_capability_moves_nothing(
    fresh_store: FreshStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], why: str
) -> None:
    async def scenario(signed: SignedWorld) -> None:
        world = signed.world
        request = await world.submit(prompt(TOKENS), 6)
        await signed.assign(request, **options)
        await world.ended(request, "QUEUED")
        assert signed.refused()
        assert any("is refused" in record.getMessage() and why in record.getMessage() for record in caplog.records)
        await signed.assign(request)
        await world.answered(request)
        await world.clean()

    run(fresh_store, tmp_path, scenario)


def test_a_capability_that_was_used_opens_nothing_again(
    fresh_store: FreshStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(signed: SignedWorld) -> None:
        world = signed.world
        request = await world.submit(prompt(TOKENS), 6)
        item = await signed.assign(request)
        p, d = world.hosts["prefill-0"], world.hosts["decode-0"]
        fingerprint = d.status().card.fingerprint
        replay = kv.OpenRequest(
            request_id=request, epoch=item.expected_epoch + 1, source_instance="prefill-0",
            source_incarnation=p.me.number, target_instance="decode-0", target_incarnation=d.me.number,
            fingerprint=fingerprint, num_tokens=TOKENS, num_blocks=4,
            layers_per_group=d.engine.layout.layers_per_group, capability=kv.Capability.FromString(signed.sign(item)),
        )  # fmt: skip
        await world.answered(request)
        await world.clean()
        for transfer in d.parts.receiver._table.all():
            d.parts.receiver._table.remove(transfer)  # as after `remember_s`
        opened = d.parts.ledger.opened
        async with open_channel(d.address) as channel:
            stub: Any = kv_pb2_grpc.KvTransferStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Open(replay, timeout=5)
        assert error_of(caught.value).reason == "UNAUTHENTICATED"
        assert d.parts.ledger.opened == opened
        assert any("was used already" in record.getMessage() for record in caplog.records)

    run(fresh_store, tmp_path, scenario)


@pytest.mark.parametrize("least", [0, 1], ids=["signed", "one block too few"])
def test_a_move_is_signed_for_the_room_that_it_may_need(
    fresh_store: FreshStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, least: int
) -> None:
    async def scenario(signed: SignedWorld) -> None:
        world = signed.world
        await world.start_worker("decode-1", "decode", handoff_keys_file=str(signed.path))
        request = await world.submit(prompt(TOKENS), 80)
        await signed.assign(request)
        await until(lambda: len(world.ingress.of(request).output) >= 3, "it decodes")
        file = KeyFile(signed.path)
        sign = move_signer(lambda: file.keys)
        most = -(-(TOKENS + 79) // BLOCK_TOKENS)

        def smaller(grant: Grant) -> bytes:
            assert grant.blocks == most
            block_bytes = grant.kv_bytes // grant.blocks
            return sign(replace(grant, blocks=most - least, kv_bytes=(most - least) * block_bytes))

        await Mover(world.store, 3, smaller).migrate(request, "decode-1")
        got = await world.answered(request)
        assert ("decode-1" in got.senders) == (least == 0)
        if least:
            assert any(f"the capability allows {most - 1}" in record.getMessage() for record in caplog.records)
        await world.clean()

    run(fresh_store, tmp_path, scenario, **slow(decode_step_s=0.01))
