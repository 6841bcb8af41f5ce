"""One attempt at a hand-off: all its streams at once, until the commit or the first error.

Every stream has a task of its own on the event loop. The end goes out on stream 0 when all blocks are sent on all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from protos.contract.errors import FenceError, HandoffTimeout, PeerUnavailable
from protos.wire import kv
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.handoff_job import SendContext
from workers.kv_transfer.measures import Measures
from workers.kv_transfer.stream_feed import Plan, StreamFeed, Supply

_REASON_S = 1.0  # for the reason to come on the stream that it is about


class Attempt:
    """`run` may be cancelled at any point: nothing is exported after that."""

    def __init__(
        self,
        plan: Plan,
        supply: Supply,
        scope: DigestScope,
        context: SendContext,
        measures: Measures,
        open_call: Callable[[int], Any],
    ) -> None:
        self._bell = supply.bell
        self._feeds = [
            StreamFeed(
                number=number,
                plan=plan,
                supply=supply,
                scope=scope,
                context=context,
                measures=measures,
                open_call=open_call,
            )
            for number in range(plan.streams)
        ]
        self._feeding = plan.streams

    @property
    def blocks_behind(self) -> int:
        """Blocks that may go and were not sent yet."""
        return sum(feed.blocks_behind for feed in self._feeds)

    async def run(self, make_end: Callable[[], Awaitable[kv.EndFrame]]) -> kv.Commit:
        """Sends all blocks, then the frame of `make_end`, and gives the commit.

        Raises the receiver's refusal if one of the streams heard it, otherwise the first error of any of them.
        """
        main = asyncio.create_task(self._main(make_end))
        tasks: list[asyncio.Task[Any]] = [main, *(asyncio.create_task(self._side(feed)) for feed in self._feeds[1:])]
        try:
            await until_settled(main, tasks, _REASON_S)
            error = first_reason(tasks)
            if error is not None:
                raise error
            return main.result()
        finally:
            # All of it before the first await: a second cancellation may end this at any of them.
            for task in tasks:
                task.cancel()
            for feed in self._feeds:
                feed.cut()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(feed.close() for feed in self._feeds))

    async def _main(self, make_end: Callable[[], Awaitable[kv.EndFrame]]) -> kv.Commit:
        first = self._feeds[0]
        first.open()
        await first.feed()
        self._feeding -= 1
        while self._feeding:
            await self._bell.wait()
        return await first.end(await make_end())

    async def _side(self, feed: StreamFeed) -> None:
        await feed.feed()
        self._feeding -= 1
        self._bell.ring()
        await feed.until_over()


async def until_settled(main: asyncio.Task[Any], tasks: list[asyncio.Task[Any]], reason_s: float) -> None:
    """Returns when `main` is done, or one of the tasks has failed.

    A stream that comes just after its transfer ended hears that the transfer is not there, as one that is overtaken does. Why
    it ended another stream hears, so that a fence alone is believed after `reason_s` only, or when no stream is left.
    """
    while not main.done() and all(_error_of(task) is None for task in tasks):
        await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + reason_s
    while isinstance(first_reason(tasks), FenceError) and loop.time() < give_up_s:
        running = [task for task in tasks if not task.done()]
        if not running:
            return
        await asyncio.wait(running, timeout=give_up_s - loop.time(), return_when=asyncio.FIRST_COMPLETED)


def first_reason(tasks: list[asyncio.Task[Any]]) -> BaseException | None:
    """What went wrong: a refusal explains the streams that broke with it, and any other refusal explains a fence."""
    errors = [error for task in tasks if (error := _error_of(task)) is not None]
    told = [error for error in errors if not isinstance(error, (PeerUnavailable, HandoffTimeout))]
    reasons = [error for error in told if not isinstance(error, FenceError)]
    return next(iter(reasons or told or errors), None)


def _error_of(task: asyncio.Task[Any]) -> BaseException | None:
    """What a task failed with; none when it runs or succeeded."""
    if not task.done():
        return None
    return PeerUnavailable("a stream was cancelled") if task.cancelled() else task.exception()
