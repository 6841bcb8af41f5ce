"""The engine's thread tells of stored layers before it tells of their step."""

from __future__ import annotations

import asyncio

from tests.contract.driver import a_prompt, a_request
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.engine_api.types import Phase
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.runner import OracleRunner
from workers.service.engine_thread import EngineThread, StepEvent
from workers.service.failpoints import Failpoints

DEADLINE_S = 20.0


async def events_of(hand_over: bool) -> list[StepEvent]:
    """All events of a prompt of three chunks, up to its first token."""
    events: list[StepEvent] = []
    over = asyncio.Event()

    def on_step(event: StepEvent) -> None:
        events.append(event)
        if event.result.tokens:
            over.set()

    runner = OracleRunner(OracleModel("m"), num_blocks=64, block_tokens=8)
    engine = PagedEngine(runner, EngineLimits(max_batch_tokens=16, max_running=4))
    thread = EngineThread(on_step, lambda error: None, Failpoints({}))
    await thread.start(lambda: engine)
    try:
        request = a_request("r", a_prompt(engine, 41), phase=Phase.PREFILL)
        await thread.add(request, hand_over=hand_over)
        async with asyncio.timeout(DEADLINE_S):
            await over.wait()
        await thread.let_go("r", 1)
    finally:
        await thread.stop(DEADLINE_S)
    return events


def test_stored_chunks_come_before_their_step() -> None:
    events = asyncio.run(events_of(hand_over=True))
    story = [
        ("stored", one.stored[0].computed_tokens) if one.stored else ("step", one.result.progress[0].computed_tokens)
        for one in events
    ]
    assert story == [(what, end) for end in (16, 32, 41) for what in ("stored", "step")]
    assert all(len(one.blocks["r", 1]) == 6 for one in events), "pinned when they are told of"


def test_what_stays_here_is_not_told_of() -> None:
    events = asyncio.run(events_of(hand_over=False))
    assert not any(one.stored or one.blocks for one in events)
