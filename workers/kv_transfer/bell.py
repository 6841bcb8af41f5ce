"""Tells all who wait on the event loop that something changed; each of them looks again at what it waits for."""

from __future__ import annotations

import asyncio


class Bell:
    """Who looks and then waits, with no other await in between, misses nothing. Used on the event loop only."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def ring(self) -> None:
        """Wakes all who wait now."""
        rung, self._next = self._next, asyncio.Event()
        rung.set()

    async def wait(self) -> None:
        """Until the next ring."""
        await self._next.wait()
