"""Where a tier keeps blocks beyond memory: what the batcher asks of it. Calls block; they are made on io threads only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block by content: its name, that of the block before it, and how many blocks come before it in the prompt."""

    name: bytes
    parent: bytes
    depth: int


class BlockFiles(Protocol):
    """Numbered slots of one block each. One thread writes, another may read at the same time."""

    @property
    def num_slots(self) -> int:
        """Slots in all; constant."""
        ...

    @property
    def slot_bytes(self) -> int:
        """What one slot takes; constant."""
        ...

    def open(self) -> None:
        """Takes the place for this process alone. Raises AutanError or OSError; may be called again later. Idempotent."""
        ...

    def recover(self) -> Iterator[list[tuple[int, StoredBlock]]]:
        """What an earlier process left, slot by slot in small batches, each name once. Payloads are not verified yet."""
        ...

    def write(self, slot: int, block: StoredBlock, payload: memoryview) -> None:
        """Replaces the content of a slot. Raises OSError; the slot then holds nothing that would verify."""
        ...

    def read(self, slot: int, block: StoredBlock, into: memoryview) -> bool:
        """Fills `into` with the payload; False when the slot does not hold exactly what was written. Raises OSError."""
        ...

    def close(self) -> None:
        """Gives the place back. Idempotent."""
        ...
