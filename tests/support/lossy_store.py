"""A store client between which and the store a test stands: it holds calls and replies back, and loses them."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from orchestrator.store.client import Argument, Store
from orchestrator.store.decode import Cursor
from protos.contract.errors import StoreUnavailable
from protos.contract.redis_names import Fn


class LossyStore(Store):
    """What is held is held until `release`; a lost reply is one of a call that took effect, told as StoreUnavailable."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.sent: Counter[Fn] = Counter()  # calls that the ingress has begun
        self.applied: Counter[Fn] = Counter()  # calls that took effect
        self._calls: dict[Fn, asyncio.Event] = {}
        self._replies: dict[Fn, asyncio.Event] = {}
        self._lost: Counter[Fn] = Counter()
        self._lost_calls: Counter[Fn] = Counter()

    def hold_calls(self, function: Fn) -> None:
        """Calls of this function do not reach the store."""
        self._calls[function] = asyncio.Event()

    def hold_replies(self, function: Fn) -> None:
        """Calls of this function take effect, and nobody hears of it."""
        self._replies[function] = asyncio.Event()

    def lose_replies(self, function: Fn, count: int) -> None:
        """The next replies of this function, or those that are held, are lost."""
        self._lost[function] += count

    def lose_calls(self, function: Fn, count: int) -> None:
        """The next calls of this function do not reach the store."""
        self._lost_calls[function] += count

    def release(self, function: Fn) -> None:
        """What is held goes on."""
        for held in (self._calls, self._replies):
            if (gate := held.pop(function, None)) is not None:
                gate.set()

    async def _call(self, function: Fn, *arguments: Argument) -> Cursor:
        self.sent[function] += 1
        if (gate := self._calls.get(function)) is not None:
            await gate.wait()
        if self._lost_calls[function] > 0:
            self._lost_calls[function] -= 1
            raise StoreUnavailable(f"{function}: the call is lost", 0.05)
        cursor = await super()._call(function, *arguments)
        self.applied[function] += 1
        if (gate := self._replies.get(function)) is not None:
            await gate.wait()
        if self._lost[function] > 0:
            self._lost[function] -= 1
            raise StoreUnavailable(f"{function}: the reply is lost", 0.05)
        return cursor
