"""Prompts that wait for cached blocks of another instance before they are computed here.

    EXPECTED ──open──► COMING ──commit──► HERE          (the blocks are in the prefix cache)
        │                 │
        └─────────────────┴──► OVER                     (refused, broken, too late, cancelled: computed from what is there)

A fetch is an optimisation with a deadline: whatever happens to it, the prompt is computed when it has ended, from whatever is
cached by then. So it can cost time and nothing else. Implements ReceiverHooks for the receiver of prefixes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from protos.contract.errors import AutanError, StaleEpoch
from workers.engine_api.types import EngineRequest
from workers.kv_transfer.claims import Addressee
from workers.kv_transfer.hooks import Arrived
from workers.kv_transfer.lifecycle import Lifecycle
from workers.kv_transfer.prefix_receiver import PrefixExpectation, PrefixReceiver
from workers.service.assignments import Assignment
from workers.service.store import InboxEntry

_INBOX_PATIENCE_S = 1.0
_RequestKey = tuple[str, int]


class FetchState(StrEnum):
    """Where one fetch is."""

    EXPECTED = "expected"
    COMING = "coming"
    HERE = "here"
    OVER = "over"


FETCH_MOVES: Mapping[FetchState, frozenset[FetchState]] = {
    FetchState.EXPECTED: frozenset({FetchState.COMING, FetchState.OVER}),
    FetchState.COMING: frozenset({FetchState.HERE, FetchState.OVER}),
    FetchState.HERE: frozenset(),
    FetchState.OVER: frozenset(),
}


@dataclass(slots=True, eq=False)
class _Fetch:
    request: EngineRequest
    source: str
    source_incarnation: int
    most_blocks: int
    wait_s: float
    lifecycle: Lifecycle[FetchState] = field(default_factory=lambda: Lifecycle(FETCH_MOVES, FetchState.EXPECTED))
    done: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""

    def finish(self, state: FetchState, why: str = "") -> None:
        """The first end counts."""
        if self.lifecycle.may(state):
            self.lifecycle.move(state)
            self.why = why
            self.done.set()


class PrefixFetches:
    """The fetches of one worker, by request and epoch. Everything runs on the event loop."""

    def __init__(
        self,
        *,
        here: Callable[[], Addressee],
        poll_inbox: Callable[[], None],
        longest_wait_s: float,
    ) -> None:
        self._here = here
        self._poll_inbox = poll_inbox
        self._longest_wait_s = longest_wait_s
        self._fetches: dict[_RequestKey, _Fetch] = {}
        self._news = asyncio.Event()
        self.fetched = 0  # prompts that began with blocks from elsewhere
        self.failed: Counter[str] = Counter()  # by reason

    def __len__(self) -> int:
        return len(self._fetches)

    def begin(self, assignment: Assignment, entry: InboxEntry) -> None:
        """An assignment says that blocks will come."""
        if not entry.source_instance or not entry.source_blocks:
            return
        self._fetches[assignment.request_id, assignment.epoch] = _Fetch(
            assignment.request,
            entry.source_instance,
            entry.source_incarnation,
            entry.source_blocks,
            min(entry.source_wait_s, self._longest_wait_s),
        )
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def settle(self, assignment: Assignment, receiver: PrefixReceiver) -> None:
        """Returns when nothing more comes for the assignment, at its deadline at the latest."""
        key = (assignment.request_id, assignment.epoch)
        fetch = self._fetches.get(key)
        if fetch is None:
            return
        started_s = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(fetch.wait_s):
                await fetch.done.wait()
        fetch.finish(FetchState.OVER, "TOO_LATE")
        blocks = receiver.came(*key)
        await receiver.end(*key, StaleEpoch(f"{key[0]}: nothing more is awaited at epoch {key[1]}"))
        del self._fetches[key]
        if fetch.why:
            self.failed[fetch.why] += 1
        assignment.fetch_s = time.monotonic() - started_s
        assignment.fetch_source = fetch.source
        if blocks:
            self.fetched += 1
            assignment.fetched_tokens = blocks * self._here().layout.block_tokens

    def cancel(self, assignment: Assignment) -> None:
        """The request is dropped here: nobody waits for its blocks any more. Idempotent."""
        fetch = self._fetches.get((assignment.request_id, assignment.epoch))
        if fetch is not None:
            fetch.finish(FetchState.OVER, "CANCELLED")

    # -- ReceiverHooks --------------------------------------------------------------------------------------------------

    def here(self) -> Addressee:
        """Who this process is now."""
        return self._here()

    async def expect(self, request_id: str, epoch: int) -> PrefixExpectation:
        """What the assignment says; the source may be faster than this worker's inbox, so it is waited for a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_INBOX_PATIENCE_S):
                while (request_id, epoch) not in self._fetches:
                    news = self._news
                    self._poll_inbox()
                    await news.wait()
        if not self.is_expected(request_id, epoch):
            raise StaleEpoch(f"{request_id}: no blocks are awaited at epoch {epoch}")
        fetch = self._fetches[request_id, epoch]
        return PrefixExpectation(
            request=fetch.request,
            source_instance=fetch.source,
            source_incarnation=fetch.source_incarnation,
            most_blocks=fetch.most_blocks,
        )

    def is_expected(self, request_id: str, epoch: int) -> bool:
        """True while blocks may still come."""
        fetch = self._fetches.get((request_id, epoch))
        return fetch is not None and not fetch.lifecycle.ended

    async def commit(self, request_id: str, epoch: int) -> None:
        """Nobody becomes the holder of the request by this."""

    def opened(self, request_id: str, epoch: int) -> None:
        """Blocks are reserved."""
        fetch = self._fetches.get((request_id, epoch))
        if fetch is not None and fetch.lifecycle.may(FetchState.COMING):
            fetch.lifecycle.move(FetchState.COMING)

    def arrived(self, sequence: Arrived) -> None:
        """All blocks are in the cache."""
        fetch = self._fetches.get((sequence.request_id, sequence.epoch))
        if fetch is not None:
            fetch.finish(FetchState.HERE)

    def ended(self, request_id: str, epoch: int, error: AutanError) -> None:
        """No more blocks come."""
        fetch = self._fetches.get((request_id, epoch))
        if fetch is not None:
            fetch.finish(FetchState.OVER, error.reason)
