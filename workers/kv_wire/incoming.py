"""A gRPC message that has begun to come: its bytes are received where whoever reads it wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from workers.engine_api.memory_views import Write, unguarded


class Source(Protocol):
    """The connection, as the reader of a message uses it. All raise what its loss means to that reader."""

    @property
    def left_bytes(self) -> int:
        """Bytes of the message that were not given out yet."""
        ...

    def peek(self) -> memoryview:
        """Bytes of the message that are here, without giving them out; none may be. Valid until the next call."""
        ...

    def consume(self, count: int) -> None:
        """Gives so many of the bytes that were seen out."""
        ...

    def receive(self, views: Sequence[memoryview], write: Write) -> int:
        """See Incoming.receive."""
        ...

    async def more(self) -> None:
        """Returns when the socket has something to say."""
        ...


class Incoming:
    """Valid until the next message is asked for; what was not read by then is passed over.

    Every method raises what the loss of the connection, or the end of the call in the middle of the message, means to its side.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size_bytes = source.left_bytes  # of the whole message

    async def head(self, measure: Callable[[memoryview], int | None]) -> memoryview:
        """The first bytes of the message: as many as `measure` says when it is shown the beginning, which may be asked again
        with more; None asks for more. It must know once it is shown `size_bytes`."""
        seen = bytearray()
        while True:
            here = self._source.peek()
            before = len(seen)
            seen += here
            size = measure(memoryview(seen)) if here or not self._source.left_bytes else None
            if size is not None:
                self._source.consume(size - before)
                return memoryview(bytes(seen[:size]))
            self._source.consume(len(here))
            if not here:
                await self._source.more()

    def receive(self, views: Sequence[memoryview], write: Write) -> int:
        """Moves bytes that are here into the beginning of `views`, inside of `write`; gives their number, 0 when none are here.

        At least one byte must be to come, and `views` must have room for no more than are. Raises what `write` raises.
        """
        return self._source.receive(views, write)

    async def more(self) -> None:
        """Returns when there may be bytes. May be cancelled."""
        await self._source.more()

    async def whole(self) -> memoryview:
        """All bytes that are to come, in memory of their own."""
        memory = memoryview(bytearray(self._source.left_bytes))
        rest = memory
        while rest:
            count = self._source.receive([rest], unguarded)
            if not count:
                await self._source.more()
            rest = rest[count:]
        return memory.toreadonly()
