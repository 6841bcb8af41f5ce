"""The bytes of a message's payload: in memory already, or still on their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from workers.engine_api.memory_views import Write, copy_into


class Body(Protocol):
    """Each byte is given out once, in order."""

    def receive(self, views: Sequence[memoryview], write: Write) -> int:
        """Moves bytes that are here into the beginning of `views`, inside of `write`; gives their number, 0 when none are here.

        At least one byte must be to come, and `views` must have room for all of them at most. Raises PeerUnavailable when the
        stream broke, and what `write` raises.
        """
        ...

    async def more(self) -> None:
        """Returns when there may be bytes. May be cancelled. Raises PeerUnavailable when the stream broke."""
        ...

    async def whole(self) -> memoryview:
        """All that are to come, in memory of their own. Raises PeerUnavailable when the stream broke."""
        ...


class MemoryBody:
    """A payload that has come."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload

    def receive(self, views: Sequence[memoryview], write: Write) -> int:
        """See Body."""
        count = write(lambda: copy_into(views, self._payload))
        self._payload = self._payload[count:]
        return count

    async def more(self) -> None:
        """See Body; everything is here."""

    async def whole(self) -> memoryview:
        """See Body; this is the message's own memory."""
        payload, self._payload = self._payload, self._payload[:0]
        return payload
