"""Asking Redis again while it is away, for a bounded time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from protos.contract.errors import StoreFull, StoreUnavailable

T = TypeVar("T")

_BACKOFF_S = (0.05, 1.0)


async def while_store_is_away(ask: Callable[[], Awaitable[T]], patience_s: float) -> T:
    """The answer of `ask`, an idempotent call; StoreUnavailable or StoreFull is raised only after `patience_s`."""
    give_up_s = time.monotonic() + patience_s
    delay_s, longest_s = _BACKOFF_S
    while True:
        try:
            return await ask()
        except (StoreUnavailable, StoreFull):
            if time.monotonic() + delay_s > give_up_s:
                raise
        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
        delay_s = min(2 * delay_s, longest_s)
