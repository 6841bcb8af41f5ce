"""How hand-offs reach the engine, which lives on a thread of its own."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable
from typing import Protocol, TypeVar

from workers.engine_api.protocol import Engine, KvRoom
from workers.engine_api.types import KvLayout, KvPlace

T = TypeVar("T")


class EnginePort(Protocol):
    """The engine as the event loop sees it."""

    @property
    def layout(self) -> KvLayout:
        """How KV bytes lie in a block; constant."""
        ...

    def call(self, fn: Callable[[Engine], T]) -> Future[T]:
        """Runs `fn` on the engine's thread between two steps, in the order of the calls, and gives its result.

        The call is queued when this returns, awaited or not; cancelling the future does not take it back.
        Raises EngineFailure through the future when the engine is gone.
        """
        ...

    def export_kv(self, block_id: int, group: int) -> memoryview:
        """See Engine.export_kv; from the event loop."""
        ...

    def import_kv(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        """See Engine.import_kv; from the event loop."""
        ...

    def import_room(self, places: tuple[KvPlace, ...]) -> KvRoom | None:
        """See Engine.import_room; from the event loop."""
        ...
