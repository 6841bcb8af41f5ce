"""Hand-offs between workers of one host through shared memory: the same tokens, the same refusals, nothing left behind."""

from __future__ import annotations

import asyncio
import random
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from configs.schema.pools import ModelConfig
from protos.wire import kv
from tests.integration.workers.test_process import launched
from tests.integration.workers.test_torch_handoff import alone
from tests.integration.workers.test_torch_handoff import submit as submit_tiny
from tests.support.kv_wire import FaultyWire, put_wire
from tests.support.push_frames import first_head
from tests.support.store import FreshStore
from tests.support.worker_world import BLOCK_TOKENS, NETWORK, WorkerWorld, prompt, slow, until, worker_world

SHARED = NETWORK.model_copy(update={"shared_memory": True})
BLOCKS = 13
TOKENS = BLOCKS * BLOCK_TOKENS - 8


def with_workers(
    fresh: FreshStore,
    scenario: Callable[[WorkerWorld, FaultyWire], Awaitable[None]],
    *,
    prefill_shares: bool = True,
    decode_shares: bool = True,
) -> None:
    """A prefill and a decode worker, and a wire between them that may be told to be faulty."""

    async def run() -> None:
        async with worker_world(fresh) as world:
            await world.start_worker("prefill-0", "prefill", network=SHARED if prefill_shares else NETWORK)
            await world.start_worker("decode-0", "decode", network=SHARED if decode_shares else NETWORK)
            wire = await put_wire(world, "decode-0")
            try:
                await scenario(world, wire)
            finally:
                await wire.stop()

    asyncio.run(run())


async def send(world: WorkerWorld, seed: int = 1) -> str:
    request = await world.submit(prompt(TOKENS, seed), 12)
    await world.assign(request, "prefill-0", "decode-0")
    return request


def mapped_bytes(world: WorkerWorld, instance_id: str) -> tuple[int, int]:
    """Through shared memory, and in all."""
    counters = world.hosts[instance_id].parts.counters
    return counters.kv_bytes_mapped, counters.kv_bytes_sent + counters.kv_bytes_received


def test_every_block_travels_by_reference(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        carried = 0

        def watch(n: int, frame: kv.PushFrame) -> list[kv.PushFrame]:
            nonlocal carried
            carried += len(frame.payload) + sum(one.payload_bytes for one in frame.blocks.parts)
            return [frame]

        wire.mutate = watch
        for seed in range(3):
            got = await world.answered(await send(world, seed))
            assert got.timelines[-1].handoff_blocks == BLOCKS
        size = 3 * BLOCKS * world.hosts["decode-0"].engine.layout.block_bytes
        assert carried == 0
        assert mapped_bytes(world, "prefill-0") == mapped_bytes(world, "decode-0") == (size, size)
        await world.clean()

    with_workers(fresh_store, scenario)


@pytest.mark.parametrize("shares", [(True, False), (False, True)])
def test_one_side_without_shared_memory_gets_frames_with_bytes(fresh_store: FreshStore, shares: tuple[bool, bool]) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        await world.answered(await send(world))
        assert mapped_bytes(world, "decode-0")[0] == 0 < mapped_bytes(world, "decode-0")[1]
        await world.clean()

    with_workers(fresh_store, scenario, prefill_shares=shares[0], decode_shares=shares[1])


@pytest.mark.parametrize(
    ("change", "opens"),
    [
        ({"pool_offset": 2**64 - 1}, 1),
        ({"pool_offset": 1 << 33}, 1),
        ({"pool_bytes": 2**32 - 1}, 1),
        ({"pool_bytes": 1}, 1),
        ({"pool_offset": 0}, 2),  # there, but another block's: as bytes that changed, they are asked for again
    ],
)
def test_a_hostile_reference_ends_the_transfer_and_not_the_worker(
    fresh_store: FreshStore, change: dict[str, int], opens: int
) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        await world.answered(await send(world, 5))  # block 0 of the pool has been written: it is not that of the next request
        wire.opens, first = 0, True

        def forge(n: int, frame: kv.PushFrame) -> list[kv.PushFrame]:
            nonlocal first
            if first and first_head(frame).block_index > 1:
                first = False
                for name, value in change.items():
                    setattr(frame.blocks.parts[0], name, value)
            return [frame]

        wire.mutate = forge
        request = await send(world)
        if opens == 1:
            await world.ended(request, "QUEUED")
            await world.clean()
            await world.assign(request, "prefill-0", "decode-0")
        await world.answered(request)
        assert not first and wire.opens == 2
        await world.clean()

    with_workers(fresh_store, scenario)


def test_bytes_that_change_after_their_digest_are_sent_again_once(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        changed = False

        def change(n: int, frame: kv.PushFrame) -> list[kv.PushFrame]:
            """A bit of the sender's own pool changes while the reference is on its way, and changes back afterwards."""
            nonlocal changed
            if not changed and frame.HasField("blocks"):
                changed = True
                pool = world.hosts["prefill-0"].engine._runner._bytes  # type: ignore[attr-defined]
                at = frame.blocks.parts[0].pool_offset + 5
                pool[at] ^= 1
                land = world.hosts["decode-0"].parts.receiver._placement._references._copy
                references = world.hosts["decode-0"].parts.receiver._placement._references

                def once(*args: object) -> memoryview:
                    references._copy = land  # type: ignore[method-assign]
                    try:
                        return land(*args)  # type: ignore[arg-type]
                    finally:
                        pool[at] ^= 1

                references._copy = once  # type: ignore[method-assign]
            return [frame]

        wire.mutate = change
        got = await world.answered(await send(world))
        assert changed and wire.opens == 2 and got.timelines[-1].attempts == 0
        await world.clean()

    with_workers(fresh_store, scenario)


def test_a_broken_stream_goes_on_by_block(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        wire.mutate = lambda n, frame: None if n == 2 else [frame]
        await world.answered(await send(world))
        assert wire.cuts == 1 and wire.opens == 2
        assert mapped_bytes(world, "decode-0")[0] == mapped_bytes(world, "decode-0")[1]
        await world.clean()

    with_workers(fresh_store, scenario)


@pytest.mark.parametrize("kind", ["mistral-small-4"])
def test_real_weights_give_the_tokens_of_one_engine_alone(fresh_store: FreshStore, tmp_path: Path, kind: str) -> None:
    torch_models = pytest.importorskip("tests.support.torch_models")
    from workers.engines.torch.tiny import write_tiny

    model_dir = write_tiny(kind, tmp_path / "model", 7)
    prompts = [torch_models.random_tokens(seed, 30 + 60 * seed) for seed in range(3)]
    expected = alone(model_dir, prompts, 10)
    engine = {"kind": "torch", "num_blocks": 96, "block_tokens": 16, "max_batch_tokens": 64}
    model = ModelConfig(name="tiny", source=str(model_dir), dtype="float32")
    network = SHARED.model_copy(update={"frame_bytes": 512 * 1024, "credit_bytes": 32 * 1024 * 1024})

    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            for name, role in (("prefill-0", "prefill"), ("decode-0", "decode")):
                await world.start_worker(
                    name, role, model=model, model_dir=str(model_dir), engine=engine, network=network
                )  # fmt: skip
            for number, tokens in enumerate(prompts):
                await world.assign(await submit_tiny(world, f"q{number}", tokens, 10), "prefill-0", "decode-0")
            for number, output in enumerate(expected):
                await world.ended(f"q{number}")
                assert world.ingress.of(f"q{number}").output == output
            taken, received = mapped_bytes(world, "decode-0")
            assert taken == received > 0
            await world.clean()

    asyncio.run(scenario())


def segments(pid: int) -> set[str]:
    """The pools that a process has mapped."""
    return set(re.findall(r"memfd:(autan-kv-[0-9a-f]{32})", Path(f"/proc/{pid}/maps").read_text()))


@pytest.mark.parametrize(("victim", "failpoint"), [("prefill-0", "handoff.mid_push#4"), ("decode-0", "import.before_commit")])
def test_a_killed_worker_leaves_no_segment(fresh_store: FreshStore, tmp_path: Path, victim: str, failpoint: str) -> None:
    async def scenario() -> None:
        async with launched(fresh_store, tmp_path) as (world, processes):
            for name, role in (("prefill-0", "prefill"), ("decode-0", "decode")):
                points = {failpoint: "kill"} if name == victim else {}
                await processes.start(
                    name, role, failpoints=points, network=SHARED, engine=slow(decode_step_s=0.005)
                )  # fmt: skip
            await asyncio.gather(world.ready("prefill-0"), world.ready("decode-0"))
            request = await world.submit(prompt(TOKENS), 20)
            await world.assign(request, "prefill-0", "decode-0")
            assert await processes.running[victim].wait() == -signal.SIGKILL
            await processes.start(victim, victim.partition("-")[0], network=SHARED)
            await world.ready(victim, above=1)

            async def placed_again_or_done() -> bool:
                await world.reap()
                if await world.state(request) == "QUEUED":
                    await world.assign(request, "prefill-0", "decode-0")
                return await world.state(request) == "DONE"

            await until(placed_again_or_done, "it is answered")
            await world.answered(request)
            pids = [process.pid for process in processes.running.values()]
            # Mapped pools of peers go once they are idle; each process keeps its own.
            await until(lambda: all(len(segments(pid)) == 1 for pid in pids), "only own pools are mapped")
            assert segments(pids[0]) != segments(pids[1])

    asyncio.run(scenario())


@pytest.mark.soak
def test_random_damage_never_gives_a_wrong_token(fresh_store: FreshStore) -> None:
    async def scenario(world: WorkerWorld, wire: FaultyWire) -> None:
        rng = random.Random(11)

        def damage(n: int, frame: kv.PushFrame) -> list[kv.PushFrame] | None:
            if not frame.HasField("blocks") or rng.random() > 0.02:
                return [frame]
            kind, part = rng.randrange(5), frame.blocks.parts[0]
            if kind == 0:
                part.pool_offset = rng.getrandbits(rng.randint(1, 64))
            elif kind == 1:
                part.pool_bytes = rng.getrandbits(32)
            elif kind == 2:
                part.digest = rng.randbytes(16)
            elif kind == 3:
                return [frame, frame]
            else:
                return None
            return [frame]

        wire.mutate = damage
        for seed in range(1000):
            request = await send(world, seed)

            async def placed_again_or_done(request: str = request) -> bool:
                if await world.state(request) == "QUEUED":
                    await world.assign(request, "prefill-0", "decode-0")
                return await world.state(request) in ("DONE", "DEAD")

            await until(placed_again_or_done, "it ends", 60.0)
            if await world.state(request) == "DONE":
                await world.answered(request)
        await world.clean()

    with_workers(fresh_store, scenario)
