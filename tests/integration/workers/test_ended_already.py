"""A request whose last token was journaled by a worker that is gone: the next one finishes it and computes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from orchestrator.store.replies import Emission
from protos.contract.redis_names import Code, pack_tokens
from protos.wire import common
from tests.support.store import FreshStore
from tests.support.worker_world import INGRESS, prompt, until, worker_world
from workers.engine_api.types import EngineRequest, FinishReason, SamplingParams
from workers.service.request_spec import ended_already


@pytest.mark.parametrize("pair", [("combined-1", "combined-1"), ("prefill-1", "decode-1")], ids=["full", "prefill"])
@pytest.mark.parametrize("stops", [False, True], ids=["length", "stop"])
def test_all_tokens_are_there_and_nobody_finished_it(fresh_store: FreshStore, pair: tuple[str, str], stops: bool) -> None:
    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            await world.start_worker("combined-0", failpoints={"prefill.before_first_chunk#1": "hold:30"})
            for name in set(pair):
                await world.start_worker(name, name.split("-")[0])
            request = await world.submit(prompt(40), 6)
            output = world.expected(request)
            if stops:
                await world.store.cancel(request, "acme", "client")
                request = await world.submit(prompt(40), 60, stop_token_ids=[output[2]])
                output = world.expected(request)
                assert len(output) < 60
            epoch = await world.assign(request, "combined-0", "combined-0")
            await world.ended(request, "PREFILLING")
            emission = Emission(request, epoch, 0, pack_tokens(output))
            assert (await world.store.emit(INGRESS, world.ingress.epoch, [emission]))[0].code is Code.OK
            world.hosts["combined-0"].request_stop(0.0)
            await world.codes["combined-0"]

            async def is_queued() -> bool:
                await world.reap(lost_ms=100)
                return await world.state(request) == "QUEUED"

            await until(is_queued, "it waits for another worker")
            await world.assign(request, *pair)
            await world.ended(request)
            assert world.ingress.of(request).finish == (
                common.FINISH_REASON_STOP if stops else common.FINISH_REASON_LENGTH
            )  # fmt: skip
            assert (await world.store.look([request]))[0].n == len(output), "no token came behind the last one"
            for name in set(pair):
                stats = world.hosts[name].engine.stats()
                assert stats.prefill_chunks == stats.decode_tokens == 0
            await world.clean(*set(pair))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("sampling", "output", "expected"),
    [
        ({"max_tokens": 3}, (7, 8, 9), FinishReason.LENGTH),
        ({"max_tokens": 4}, (7, 8, 9), None),
        ({"max_tokens": 9, "stop_token_ids": frozenset({9})}, (7, 8, 9), FinishReason.STOP),
        ({"max_tokens": 3, "stop_token_ids": frozenset({9})}, (7, 8, 9), FinishReason.STOP),
        ({"max_tokens": 9, "stop_token_ids": frozenset({9}), "min_tokens": 3}, (7, 8, 9), None),
        ({"max_tokens": 99}, (7,) * 10, FinishReason.LENGTH),
        ({"max_tokens": 1}, (), None),
    ],
)
def test_the_rule(sampling: dict[str, Any], output: tuple[int, ...], expected: FinishReason | None) -> None:
    request = EngineRequest(request_id="r", epoch=1, prompt=(1, 2), output=output, sampling=SamplingParams(**sampling))
    assert ended_already(request, context_tokens=12) is expected
