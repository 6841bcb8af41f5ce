"""A cancelled request leaves nothing behind, whatever stage it was in, and its batch mates do not notice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.store import FreshStore
from tests.support.worker_world import WorkerWorld, prompt, slow, until, worker_world
from workers.service.assignments import Stage


@dataclass(frozen=True)
class Where:
    """A stage: how the workers are made to stay in it, and how it is recognised."""

    reached: Callable[[WorkerWorld, str], bool]
    p: dict[str, Any]
    d: dict[str, Any]


def stage(worker: str, *wanted: Stage) -> Callable[[WorkerWorld, str], bool]:
    def reached(world: WorkerWorld, request_id: str) -> bool:
        assignment = world.hosts[worker].parts.assignments.get(request_id)
        return assignment is not None and assignment.stage in wanted

    return reached


def hold(point: str) -> dict[str, Any]:
    return {"failpoints": {f"{point}#1": "hold:1.5"}}


def sent(count: int) -> Callable[[WorkerWorld, str], bool]:
    return lambda world, request_id: world.hosts["decode-0"].parts.counters.kv_blocks_received >= count


def got(count: int) -> Callable[[WorkerWorld, str], bool]:
    return lambda world, request_id: len(world.ingress.of(request_id).output) >= count


def early(count: int) -> Callable[[WorkerWorld, str], bool]:
    def reached(world: WorkerWorld, request_id: str) -> bool:
        assignment = world.hosts["decode-0"].parts.assignments.get(request_id)
        return assignment is not None and len(assignment.early) >= count

    return reached


STAGES = {
    "before_the_engine": Where(stage("prefill-0", Stage.PREFILLING), hold("prefill.before_first_chunk"), {}),
    "prefilling": Where(stage("prefill-0", Stage.PREFILLING), {"engine": slow(prefill_tokens_per_s=200)}, {}),
    "some_blocks_are_there": Where(sent(4), {"engine": slow(prefill_tokens_per_s=200)}, {}),
    "before_the_open": Where(stage("prefill-0", Stage.HANDING_OVER), hold("handoff.before_open"), {}),
    "while_pushing": Where(
        stage("decode-0", Stage.IMPORTING), {"failpoints": {"handoff.mid_push#5": "hold:1.5"}}, {}
    ),
    "before_the_end": Where(sent(13), hold("handoff.before_end"), {}),
    "before_the_commit": Where(sent(13), {}, hold("import.before_commit")),
    "decoding_before_the_commit": Where(early(2), {}, hold("import.in_engine") | {"engine": slow(0, 0.03)}),
    "after_the_commit": Where(stage("decode-0", Stage.DECODING), hold("handoff.after_commit"), {"engine": slow(0, 0.05)}),
    "decoding": Where(got(4), {}, {"engine": slow(decode_step_s=0.03)}),
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_cancel(fresh_store: FreshStore, name: str) -> None:
    where = STAGES[name]

    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill", **where.p)
            await world.start_worker("decode-0", "decode", **where.d)
            victim = await world.submit(prompt(200), 30)
            await world.assign(victim, "prefill-0", "decode-0")
            await until(lambda: where.reached(world, victim), f"the request is {name}")
            mate = await world.submit(prompt(60, seed=9), 6)
            await world.assign(mate, "prefill-0", "decode-0")
            assert (await world.store.cancel(victim, "acme", "client")).state == "CANCELLED"
            await until(lambda: not any(stage(w, *Stage)(world, victim) for w in world.hosts), "both have dropped it", 2.0)
            await world.answered(mate)
            await world.clean()
            output = world.ingress.of(victim).output
            assert output == world.expected(victim)[: len(output)] and len(output) < 30
            assert await world.state(victim) == "CANCELLED"

    asyncio.run(scenario())


def test_a_cancel_burst_does_not_delay_the_next_request(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill", engine={"num_blocks": 600} | slow(prefill_tokens_per_s=3000))
            await world.start_worker("decode-0", "decode", engine={"num_blocks": 600})
            burst = [await world.submit(prompt(120, seed=i), 8) for i in range(30)]
            for request in burst:
                await world.assign(request, "prefill-0", "decode-0")
            await asyncio.gather(*(world.store.cancel(request, "acme", "client") for request in burst))
            request = await world.submit(prompt(60, seed=99), 4)
            await world.assign(request, "prefill-0", "decode-0")
            await world.ended(request, timeout_s=2.0)  # thirty prompts would take 1.2 s more
            await world.answered(request)
            await world.clean()

    asyncio.run(scenario())


def test_an_expired_request_is_dropped(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("combined-0", engine=slow(decode_step_s=0.03))
            request = await world.submit(prompt(40), 200, timeout_ms=400)
            await world.assign(request, "combined-0", "combined-0")
            await until(lambda: got(2)(world, request), "it decodes")

            async def expired() -> bool:
                await world.reap()
                return await world.state(request) == "EXPIRED"

            await until(expired, "its time is up")
            await world.clean()

    asyncio.run(scenario())
