"""Which of the errors of several streams ends an attempt."""

from __future__ import annotations

import asyncio

import pytest

from protos.contract.errors import AutanError, DigestMismatch, PeerUnavailable, StaleEpoch
from workers.kv_transfer.attempt import first_reason, until_settled

PATIENCE_S = 20.0


async def fails(error: AutanError, after: asyncio.Event | None = None) -> None:
    if after is not None:
        await after.wait()
    raise error


async def never() -> None:
    await asyncio.Event().wait()


async def reason_of(*streams: object, reason_s: float = PATIENCE_S) -> BaseException | None:
    tasks = [asyncio.ensure_future(stream) for stream in streams]  # type: ignore[call-overload]
    try:
        await until_settled(tasks[0], tasks, reason_s)
        return first_reason(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("first", [StaleEpoch("no transfer of that id"), PeerUnavailable("broke")])
@pytest.mark.parametrize("main_is_first", [True, False])
def test_a_late_digest_mismatch_explains_what_other_streams_heard(first: AutanError, main_is_first: bool) -> None:
    async def scenario() -> None:
        told = asyncio.Event()
        early, late = fails(first), fails(DigestMismatch("block 3"), told)
        if isinstance(first, PeerUnavailable):
            told.set()
        else:
            asyncio.get_running_loop().call_later(0.02, told.set)
        streams = (early, late, never()) if main_is_first else (late, early, never())
        assert isinstance(await reason_of(*streams), DigestMismatch)

    asyncio.run(scenario())


def test_a_fence_that_nothing_explains_is_believed() -> None:
    async def scenario() -> None:
        assert isinstance(await reason_of(never(), fails(StaleEpoch("over")), reason_s=0.05), StaleEpoch)
        everybody = (fails(StaleEpoch("over")), fails(StaleEpoch("over")), fails(PeerUnavailable("broke")))
        assert isinstance(await reason_of(*everybody), StaleEpoch)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S / 2))


def test_an_attempt_without_errors_is_over_with_its_end() -> None:
    async def scenario() -> None:
        assert await reason_of(asyncio.sleep(0), never()) is None

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S / 2))
