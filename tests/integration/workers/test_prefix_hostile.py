"""Peers that push what they may not: refused with a reason, nothing reserved, nothing read, and the prompt is computed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from protos.contract.block_hash import HASH_BYTES
from protos.contract.capability import GRACE_MS, Grant, GrantKind, KeyFile, make_key_file
from protos.rpc import error_of, kv_pb2_grpc, open_channel
from protos.wire import fingerprint_key, kv
from tests.support.push_frames import message_of, part
from tests.support.store import FreshStore
from tests.support.worker_world import BLOCK_TOKENS, TIMING, WorkerWorld, prompt, until, worker_world
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.digest import DigestScope

TOKENS = 6 * BLOCK_TOKENS + 3
BLOCKS = 6


class Attack:
    """A request that waits at `prefill-0` for blocks of `decode-0`, which never come; whoever speaks for it does so by hand."""

    def __init__(self, world: WorkerWorld, path: Path) -> None:
        self.world = world
        self.target = world.hosts["prefill-0"]
        self.source = world.hosts["decode-0"]
        file = KeyFile(path)
        self.keys = file.keys
        self.request_id = ""
        self.epoch = 0
        self.now_ms = 0

    async def begin(self, wait_ms: int) -> None:
        self.source.parts.prefixes.lendings.start = lambda entry: None  # type: ignore[method-assign]
        self.request_id = await self.world.submit(prompt(TOKENS), 3)
        self.now_ms = (await self.world.store.view()).now_ms
        self.epoch = await self.world.assign(
            self.request_id, "prefill-0", "prefill-0", source="decode-0", blocks=BLOCKS, wait_ms=wait_ms
        )
        await until(lambda: len(self.target.parts.prefixes.fetches) == 1, "it waits")

    def grant(self, **changes: Any) -> Grant:
        layout = self.target.engine.layout
        grant = Grant(
            kind=GrantKind.PREFIX, request_id=self.request_id, epoch=self.epoch,
            source_instance="decode-0", source_incarnation=self.source.me.number,
            target_instance="prefill-0", target_incarnation=self.target.me.number,
            blocks=BLOCKS, kv_bytes=BLOCKS * layout.block_bytes, expires_at_ms=self.now_ms + 60_000,
        )  # fmt: skip
        return replace(grant, **changes)

    def open(self, grant: Grant | None = None, blocks: int = BLOCKS, **changes: Any) -> kv.OpenRequest:
        """The right Open, but for the changes."""
        grant = grant or self.grant()
        card = self.target.status().card
        whole = EngineRequest(
            request_id=self.request_id, epoch=self.epoch, prompt=tuple(prompt(TOKENS)), cache_salt=b"salt",
            sampling=SamplingParams(max_tokens=3),
        )  # fmt: skip
        values: dict[str, Any] = {
            "request_id": self.request_id, "epoch": self.epoch, "source_instance": "decode-0",
            "source_incarnation": self.source.me.number, "target_instance": "prefill-0",
            "target_incarnation": self.target.me.number, "fingerprint": card.fingerprint,
            "num_tokens": blocks * BLOCK_TOKENS, "num_blocks": blocks,
            "block_hashes": sequence_hashes(card.fingerprint, whole)[: blocks * HASH_BYTES],
            "layers_per_group": self.target.engine.layout.layers_per_group,
            "capability": kv.Capability(
                mac=self.keys.sign(grant), expires_at_ms=grant.expires_at_ms, most_blocks=grant.blocks
            ),
        }  # fmt: skip
        return kv.OpenRequest(**(values | changes))

    async def refused(self, request: kv.OpenRequest, reason: str, service: str = "PrefixTransfer") -> None:
        """Sends it; nothing may come of it."""
        opened = self.target.parts.ledger.opened
        async with open_channel(self.target.address) as channel:
            stub = getattr(kv_pb2_grpc, f"{service}Stub")(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Open(request, timeout=5)
        assert error_of(caught.value).reason == reason, error_of(caught.value).message
        assert self.target.parts.ledger.opened == opened
        assert self.target.engine.stats().used_blocks == 0

    async def answered(self, fetched: int = 0) -> None:
        """The request is right all the same. Whoever may, says first that nothing (more) comes."""
        if self.target.parts.prefixes.fetches.is_expected(self.request_id, self.epoch):
            async with open_channel(self.target.address) as channel:
                stub: Any = kv_pb2_grpc.PrefixTransferStub(channel)
                assert await stub.Open(self.open(blocks=0), timeout=5) == kv.OpenReply()
        got = await self.world.answered(self.request_id)
        assert got.timelines[-1].fetched_tokens == fetched * BLOCK_TOKENS


def run(fresh: FreshStore, tmp_path: Path, scenario: Callable[[Attack], Awaitable[None]], wait_ms: int = 30_000) -> None:
    async def whole() -> None:
        path = tmp_path / "handoff.keys"
        make_key_file(path)
        async with worker_world(fresh) as world:
            patient = TIMING.model_copy(update={"progress_timeout_s": 30.0})
            await world.start_worker("prefill-0", "combined", handoff_keys_file=str(path), timing=patient)
            await world.start_worker("decode-0", "decode", handoff_keys_file=str(path))
            attack = Attack(world, path)
            await attack.begin(wait_ms)
            await scenario(attack)
            await world.clean()

    asyncio.run(whole())


def test_what_is_not_signed_for_this_is_refused(
    fresh_store: FreshStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(attack: Attack) -> None:
        handoff = attack.grant(kind=GrantKind.HANDOFF)
        for request in (
            attack.open(capability=kv.Capability()),
            attack.open(handoff),
            attack.open(attack.grant(epoch=attack.epoch + 1)),
            attack.open(attack.grant(target_instance="decode-0")),
            attack.open(attack.grant(blocks=BLOCKS - 1, kv_bytes=(BLOCKS - 1) * 7)),
            attack.open(attack.grant(expires_at_ms=attack.now_ms - GRACE_MS - 1)),
        ):
            await attack.refused(request, "UNAUTHENTICATED")
        await attack.refused(attack.open(), "UNAUTHENTICATED", service="KvTransfer")
        assert sum("is refused" in record.getMessage() for record in caplog.records) == 7, "each with a line that says why"
        await attack.answered()

    run(fresh_store, tmp_path, scenario)


def test_what_is_signed_but_not_what_was_assigned_is_refused(fresh_store: FreshStore, tmp_path: Path) -> None:
    async def scenario(attack: Attack) -> None:
        names = attack.open().block_hashes
        swapped = names[16:32] + names[:16] + names[32:]
        foreign = attack.open().block_hashes[:-1] + bytes([names[-1] ^ 1])
        await attack.refused(attack.open(block_hashes=swapped), "BAD_FRAME")
        await attack.refused(attack.open(block_hashes=foreign), "BAD_FRAME")
        await attack.refused(attack.open(block_hashes=names[:-16]), "BAD_FRAME")
        await attack.refused(attack.open(num_tokens=BLOCKS * BLOCK_TOKENS - 1), "BAD_FRAME")
        more = attack.grant(blocks=BLOCKS + 1, kv_bytes=(BLOCKS + 1) * attack.target.engine.layout.block_bytes)
        await attack.refused(attack.open(more, blocks=BLOCKS + 1), "BAD_FRAME")
        stale = attack.grant(source_incarnation=attack.source.me.number + 1)
        await attack.refused(attack.open(stale, source_incarnation=attack.source.me.number + 1), "STALE_INCARNATION")
        old = attack.grant(epoch=attack.epoch + 1)
        await attack.refused(attack.open(old, epoch=attack.epoch + 1), "STALE_EPOCH")
        await attack.answered()

    run(fresh_store, tmp_path, scenario)


def test_a_used_capability_opens_nothing_again(fresh_store: FreshStore, tmp_path: Path) -> None:
    async def scenario(attack: Attack) -> None:
        async with open_channel(attack.target.address) as channel:
            stub: Any = kv_pb2_grpc.PrefixTransferStub(channel)
            reply = await stub.Open(attack.open(), timeout=5)
            assert reply.first_block == 0
            again = await stub.Open(attack.open(), timeout=5)
            assert again.transfer_id == reply.transfer_id, "the same use"
            close = kv.CloseRequest(transfer_id=reply.transfer_id, request_id=attack.request_id, epoch=attack.epoch)
            await stub.Close(close, timeout=5)
        await attack.answered()
        await attack.refused(attack.open(), "UNAUTHENTICATED")

    run(fresh_store, tmp_path, scenario)


@pytest.mark.parametrize("damage", ["flipped bit", "out of order", "early end", "tokens in the end"])
def test_damaged_blocks_never_enter_the_cache(fresh_store: FreshStore, tmp_path: Path, damage: str) -> None:
    """One good block comes first: it stays, and what is damaged behind it does not."""

    async def scenario(attack: Attack) -> None:
        world, source = attack.world, attack.source
        request = await world.submit(prompt(TOKENS), 1, request_id="warm")
        await world.assign(request, "decode-0", "decode-0")
        await world.answered(request)
        names = [attack.open().block_hashes[at : at + 16] for at in range(0, 16 * BLOCKS, 16)]
        lent = await source._thread.call(lambda engine: engine.export_prefix(names))
        assert len(lent.block_ids) == BLOCKS
        async with open_channel(attack.target.address) as channel:
            stub: Any = kv_pb2_grpc.PrefixTransferStub(channel)
            reply = await stub.Open(attack.open(), timeout=5)
            refused = await push_damaged(stub, reply, attack, lent.block_ids, damage)
        assert refused in ("BAD_FRAME", "DIGEST_MISMATCH")
        await source._thread.call(lambda engine: engine.export_prefix_end(lent.ticket_id))
        await attack.answered(fetched=1)
        assert dict(attack.target.parts.prefixes.fetches.failed) == {refused: 1}

    run(fresh_store, tmp_path, scenario)


async def push_damaged(stub: Any, reply: kv.OpenReply, attack: Attack, blocks: tuple[int, ...], damage: str) -> str:
    """Pushes one good block and a bad thing; the reason of the refusal."""
    scope = DigestScope(fingerprint_key(attack.target.status().card.fingerprint), attack.request_id, attack.epoch)

    def block(index: int, flip: bool = False) -> list[kv.PushFrame]:
        frames = []
        for group in range(attack.source.engine.layout.num_groups):
            data = bytes(attack.source.engine.export_kv(blocks[index], group))
            digest = scope.of(index, group, data)
            payload = bytes([data[0] ^ flip]) + data[1:]
            made = part(payload, block_index=index, layer_group=group, digest=digest)
            frames.append(message_of(reply.transfer_id, attack.epoch, [made]))
        return frames

    frames = block(0)
    end = kv.EndFrame(num_tokens=BLOCKS * BLOCK_TOKENS)
    if damage == "flipped bit":
        frames += block(1, flip=True)
    elif damage == "out of order":
        frames += block(2)
    else:
        if damage == "tokens in the end":
            end.next_token_ids = b"\x01\0\0\0"
        frames.append(kv.PushFrame(transfer_id=reply.transfer_id, epoch=attack.epoch, end=end))
    call = stub.Push(iter(frames))
    async for answer in call:
        if answer.HasField("refused"):
            return answer.refused.reason
    return ""


def test_a_source_that_dies_while_it_pushes_costs_time_only(fresh_store: FreshStore, tmp_path: Path) -> None:
    async def scenario(attack: Attack) -> None:
        async with open_channel(attack.target.address) as channel:
            stub: Any = kv_pb2_grpc.PrefixTransferStub(channel)
            await stub.Open(attack.open(), timeout=5)
        await attack.world.answered(attack.request_id)
        assert dict(attack.target.parts.prefixes.fetches.failed) == {"TOO_LATE": 1}

    run(fresh_store, tmp_path, scenario, wait_ms=900)
