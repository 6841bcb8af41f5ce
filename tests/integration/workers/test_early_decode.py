"""The decode worker computes while Redis is asked whether it may, and the last block leaves before the first token is there:
neither changes a token, and what was computed without permission never leaves the worker."""

from __future__ import annotations

import asyncio

import pytest

from protos.contract.errors import StaleEpoch
from tests.support.store import FreshStore
from tests.support.worker_world import BLOCK_TOKENS, WorkerWorld, prompt, slow, until, worker_world
from workers.service.assignments import Stage

HELD = {"failpoints": {"import.in_engine#1": "hold:1.0"}}


def sampled_early(world: WorkerWorld, request_id: str) -> int:
    assignment = world.hosts["decode-0"].parts.assignments.get(request_id)
    return 0 if assignment is None else len(assignment.early)


@pytest.mark.parametrize("max_tokens", [3, 200], ids=["it ends meanwhile", "it goes on"])
def test_nothing_is_told_before_redis_agrees_and_every_token_afterwards(fresh_store: FreshStore, max_tokens: int) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            await world.start_worker("decode-0", "decode", engine=slow(decode_step_s=0.005), **HELD)
            request = await world.submit(prompt(100), max_tokens, temperature=0.7, seed=5)
            await world.assign(request, "prefill-0", "decode-0")
            await until(lambda: sampled_early(world, request) >= 2, "the engine decodes before Redis was asked")
            assert await world.state(request) == "PREFILLING"
            assert world.ingress.of(request).senders <= {"prefill-0"}, "only the first token was told"
            got = await world.answered(request)
            assert got.senders == {"prefill-0", "decode-0"} and len(got.output) == max_tokens
            await world.clean()

    asyncio.run(scenario())


def test_a_refused_commit_takes_back_what_was_computed(fresh_store: FreshStore) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("prefill-0", "prefill")
            d = await world.start_worker("decode-0", "decode", engine=slow(decode_step_s=0.005))
            request = await world.submit(prompt(100), 20)
            commit, computed = d.parts.receiver._hooks.commit, 0

            async def refuse(request_id: str, epoch: int) -> None:
                nonlocal computed
                await until(lambda: sampled_early(world, request) >= 2, "the engine decodes")
                computed = sampled_early(world, request)
                raise StaleEpoch(f"{request_id}: epoch {epoch} is over")

            d.parts.receiver._hooks.commit = refuse  # type: ignore[method-assign]
            await world.assign(request, "prefill-0", "decode-0")
            await until(lambda: computed > 0, "the commit is refused")
            await until(lambda: d.engine.stats().used_blocks == 0, "its blocks are free")
            d.parts.receiver._hooks.commit = commit  # type: ignore[method-assign]

            async def queued() -> bool:
                await world.reap()
                return await world.state(request) == "QUEUED"

            await until(queued, "it is queued again")
            assert world.ingress.of(request).senders == {"prefill-0"}, "nothing of the refused attempt was told"
            await world.assign(request, "prefill-0", "decode-0")
            await world.answered(request)
            await world.clean()

    asyncio.run(scenario())


@pytest.mark.parametrize("length", [BLOCK_TOKENS + 5, 7])
def test_the_partial_block_leaves_before_the_first_token_is_there(fresh_store: FreshStore, length: int) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            p = await world.start_worker("prefill-0", "prefill", engine=slow(prefill_tokens_per_s=length / 2))
            d = await world.start_worker("decode-0", "decode")
            request = await world.submit(prompt(length), 12)
            await world.assign(request, "prefill-0", "decode-0")
            blocks = -(-length // BLOCK_TOKENS)
            await until(lambda: d.parts.counters.kv_blocks_received == blocks, "every block is there")
            assignment = p.parts.assignments.get(request)
            assert assignment is not None and assignment.stage is Stage.PREFILLING, "the step is not over yet"
            await world.answered(request)
            assert p.parts.counters.kv_blocks_sent == blocks, "no block went twice"
            await world.clean()

    asyncio.run(scenario())
