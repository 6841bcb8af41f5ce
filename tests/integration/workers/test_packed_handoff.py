"""Hand-offs whose KV travels packed, between real workers: what must not change does not, what may is never shared."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema.pools import ModelConfig
from protos.wire import kv
from tests.integration.workers.test_hostile_sender import BLOCKS, TOKENS, Forger, data, forger
from tests.integration.workers.test_moves import migrate
from tests.integration.workers.test_torch_handoff import submit
from tests.support.kv_wire import put_wire
from tests.support.push_frames import flip
from tests.support.store import FreshStore
from tests.support.worker_world import BLOCK_TOKENS, NETWORK, WorkerWorld, prompt, until, worker_world
from workers.kv_transfer.encodings import Encoding

torch_models = pytest.importorskip("tests.support.torch_models")

LOSSLESS = NETWORK.model_copy(update={"kv_compression": "lossless"})
FP8 = NETWORK.model_copy(update={"kv_compression": "fp8"})
TORCH = {"kind": "torch", "num_blocks": 96, "block_tokens": 16, "max_batch_tokens": 64}


@pytest.mark.parametrize(("sampling", "streams"), [({}, 1), ({"temperature": 0.9, "seed": 5}, 3)])
def test_lossless_hand_offs_give_the_tokens_of_the_oracle(
    fresh_store: FreshStore, sampling: dict[str, Any], streams: int
) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            network = LOSSLESS.model_copy(update={"streams": streams, "stream_bytes": 1024})
            p = await world.start_worker("prefill-0", "prefill", network=network)
            d = await world.start_worker("decode-0", "decode", network=network)
            requests = [await world.submit(prompt(60 + 50 * i, seed=i), 12, **sampling) for i in range(4)]
            for request in requests:
                await world.assign(request, "prefill-0", "decode-0")
            for request in requests:
                await world.answered(request)
            await world.clean()
            assert p.parts.counters.kv_bytes_sent == d.parts.counters.kv_bytes_received
            # The oracle's rows are noise: they travel as they are, behind a head; what is empty in the last block packs.
            blocks, layout = d.parts.counters.kv_blocks_received, d.engine.layout
            assert d.parts.counters.kv_bytes_received != blocks * layout.block_bytes
            assert d.parts.counters.kv_bytes_received <= blocks * (layout.block_bytes + 4 * layout.num_groups)
            again = await world.submit(prompt(60, seed=0), 12, **sampling)
            await world.assign(again, "prefill-0", "decode-0")
            assert (await world.answered(again)).timelines[-1].handoff_reused_blocks == 3, "lossless blocks are cached"

    asyncio.run(scenario())


def test_a_flipped_bit_in_a_packed_group_is_sent_again(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            await world.start_worker("decode-0", "decode", network=LOSSLESS)
            wire = await put_wire(world, "decode-0")
            try:
                wire.mutate = lambda n, frame: [flip(frame)] if n == 3 else [frame]
                request = await world.submit(prompt(200), 12)
                await world.assign(request, "prefill-0", "decode-0")
                await world.answered(request)
                assert wire.opens == 2
                await world.clean()
            finally:
                await wire.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("network", [LOSSLESS, FP8])
def test_a_sender_that_cannot_pack_is_understood(fresh_store: FreshStore, network: Any) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            d = await world.start_worker("decode-0", "decode", network=network)
            wire = await put_wire(world, "decode-0")
            wire.change_open = lambda request: request.ClearField("offer")  # as a version that knows of no packing
            try:
                request = await world.submit(prompt(100), 12)
                await world.assign(request, "prefill-0", "decode-0")
                await world.answered(request)
            finally:
                await wire.stop()
            assert wire.opens == 1
            assert d.parts.counters.kv_bytes_received == 7 * d.engine.layout.block_bytes
            await world.clean()

    asyncio.run(scenario())


async def torch_worker(world: WorkerWorld, name: str, model_dir: Path, dtype: str, network: Any) -> None:
    model = ModelConfig(name="tiny", source=str(model_dir), dtype=dtype)
    role = name.partition("-")[0]
    await world.start_worker(name, role, model=model, model_dir=str(model_dir), engine=TORCH, network=network)


async def ask(world: WorkerWorld, request_id: str, tokens: tuple[int, ...], max_tokens: int = 12) -> list[int]:
    await submit(world, request_id, tokens, max_tokens)
    await world.assign(request_id, "prefill-0", "decode-0")
    await world.ended(request_id)
    return world.ingress.of(request_id).output


@pytest.mark.parametrize(("kind", "dtype"), [("mistral-small-4", "float32"), ("llama", "bfloat16")])
def test_lossless_hand_offs_of_real_weights_change_no_token_and_save_bytes(
    fresh_store: FreshStore, tmp_path: Path, kind: str, dtype: str
) -> None:
    from workers.engines.torch.tiny import write_tiny

    model_dir = write_tiny(kind, tmp_path / "model", 7)
    prompts = [torch_models.random_tokens(seed, 40 + 60 * seed) for seed in range(2)]

    async def tokens(network: Any, suffix: str) -> tuple[list[list[int]], int]:
        async with worker_world(fresh_store) as world:
            for name in ("prefill-0", "decode-0"):
                await torch_worker(world, name, model_dir, dtype, network)
            outputs = [await ask(world, f"q{i}{suffix}", prompt) for i, prompt in enumerate(prompts)]
            await world.clean()
            return outputs, world.hosts["decode-0"].parts.counters.kv_bytes_received

    async def scenario() -> None:
        plain, plain_bytes = await tokens(NETWORK, "n")
        packed, packed_bytes = await tokens(LOSSLESS, "l")
        assert packed == plain
        assert packed_bytes < 0.95 * plain_bytes

    asyncio.run(scenario())


def test_fp8_halves_the_bytes_and_its_blocks_are_never_shared(fresh_store: FreshStore, tmp_path: Path) -> None:
    """Neither where they came, nor where a move took them afterwards."""
    from workers.engines.torch.tiny import write_tiny

    model_dir = write_tiny("llama", tmp_path / "model", 7)
    prompt_ids = torch_models.random_tokens(3, 100)

    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            for name, network in (("prefill-0", FP8), ("decode-0", FP8), ("decode-1", NETWORK)):
                await torch_worker(world, name, model_dir, "bfloat16", network)
            hosts = world.hosts
            layout = hosts["decode-0"].engine.layout
            await submit(world, "a", prompt_ids, 400)
            await world.assign("a", "prefill-0", "decode-0")
            await until(lambda: len(world.ingress.of("a").output) > 2, "it decodes")
            at_source = hosts["decode-0"].parts.assignments.get("a")
            assert at_source is not None and not at_source.is_exact
            rows = layout.num_layers * layout.block_tokens
            assert hosts["decode-0"].parts.counters.kv_bytes_received == 7 * (layout.block_bytes // 2 + rows)
            # The move itself changes nothing; what it moves was changed before.
            assert (await migrate(world, "a", "decode-1")).value == "OK"
            await world.ended("a")
            assert "decode-1" in world.ingress.of("a").senders and len(world.ingress.of("a").output) == 400
            for name in ("decode-0", "decode-1"):
                assert hosts[name].engine.stats().cached_blocks == 0, name
            assert hosts["prefill-0"].engine.stats().cached_blocks == 6, "what was computed there is exact"
            await ask(world, "b", prompt_ids)
            assert world.ingress.of("b").timelines[-1].handoff_reused_blocks == 0
            await world.clean()

    asyncio.run(scenario())


def with_forger(fresh: FreshStore, encoding: Encoding, scenario: Callable[[Forger, str], Any]) -> None:
    async def whole() -> None:
        async with forger(fresh, network=LOSSLESS) as (forge, wire):
            offer = kv.KvOffer(encodings=[Encoding.LOSSLESS.value])
            reply = await forge.open(offer=offer if encoding is Encoding.LOSSLESS else None)
            assert reply.encoding == encoding.value
            await scenario(forge, reply.transfer_id)
            await until(lambda: forge.d.engine.stats().used_blocks == 0, "the blocks are free")
            wire.closed = False
            await forge.world.answered(forge.request_id)
            await forge.world.clean()

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("encoding", "changes", "reason"),
    [
        (Encoding.LOSSLESS, {}, "BAD_FRAME"),
        (Encoding.LOSSLESS, {"encoding": 2}, "BAD_FRAME"),
        (Encoding.LOSSLESS, {"encoding": 77}, "BAD_FRAME"),
        (Encoding.NONE, {"encoding": 1}, "BAD_FRAME"),
        (Encoding.LOSSLESS, {"encoding": 1}, "DIGEST_MISMATCH"),
        (Encoding.LOSSLESS, {"encoding": 1, "payload": b"\x28\xb5\x2f\xfd" * 40}, "DIGEST_MISMATCH"),
        (Encoding.LOSSLESS, {"encoding": 1, "payload": b""}, "BAD_FRAME"),
        (Encoding.LOSSLESS, {"encoding": 1, "payload": b"\0" * 100_000}, "BAD_FRAME"),
        (Encoding.LOSSLESS, {"encoding": 1, "offset_bytes": 8}, "BAD_FRAME"),
        (Encoding.LOSSLESS, {"encoding": 1, "layer_group": 9}, "BAD_FRAME"),
        (Encoding.LOSSLESS, {"encoding": 1, "digest": b"\0" * 15}, "BAD_FRAME"),
    ],
)
def test_forged_packed_frames_end_the_transfer(
    fresh_store: FreshStore, encoding: Encoding, changes: dict[str, Any], reason: str
) -> None:
    async def scenario(forge: Forger, transfer_id: str) -> None:
        assert await forge.push([data(forge, transfer_id, 0, **changes)]) == reason

    with_forger(fresh_store, encoding, scenario)


def test_random_packed_bytes_under_any_digest_never_decode(fresh_store: FreshStore) -> None:
    """Every try ends its transfer; the last honest hand-off still gives the right answer."""
    rng = random.Random(11)

    async def scenario(forge: Forger, transfer_id: str) -> None:
        for _ in range(20):
            payload = rng.randbytes(rng.randrange(1, forge.d.engine.layout.group_bytes(0)))
            frame = data(forge, transfer_id, 0, encoding=1, payload=payload, digest=rng.randbytes(16))
            assert await forge.push([frame]) in ("BAD_FRAME", "DIGEST_MISMATCH")
            transfer_id = (await forge.open(offer=kv.KvOffer(encodings=[1]))).transfer_id
        await forge.push([data(forge, transfer_id, 0, encoding=1)])

    assert BLOCKS * BLOCK_TOKENS >= TOKENS
    with_forger(fresh_store, Encoding.LOSSLESS, scenario)


def test_an_offer_has_a_bound_and_does_not_change(fresh_store: FreshStore) -> None:
    async def scenario(forge: Forger, transfer_id: str) -> None:
        from protos.contract.errors import BadFrame

        for offer in (kv.KvOffer(), kv.KvOffer(encodings=[1], inexact=True), kv.KvOffer(encodings=[1] * 17)):
            with pytest.raises(BadFrame):
                await forge.open(offer=offer)
        assert (await forge.open(offer=kv.KvOffer(encodings=[1, 9]))).transfer_id == transfer_id
        await forge.push([data(forge, transfer_id, 0)])

    with_forger(fresh_store, Encoding.LOSSLESS, scenario)
