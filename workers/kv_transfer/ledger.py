"""Who owns which blocks while they are on their way: one entry for each side of each hand-off.

An entry is opened once and released exactly once, on every exit. A set that outlives its deadline is a leak and is counted;
the deadline moves with every sign of progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum


class LedgerError(AssertionError):
    """An entry was opened twice or released twice. A bug of the caller; nothing changed."""


class Side(StrEnum):
    """Which end of the hand-off this process is."""

    SEND = "send"
    RECEIVE = "receive"
    LEND = "lend"  # cached blocks go to another instance
    BORROW = "borrow"  # and come here


@dataclass(frozen=True, slots=True)
class Key:
    """What names an entry in one process."""

    request_id: str
    epoch: int
    side: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One set of blocks. `owner` answers for them, `writer` may change their bytes, `deadline_s` is monotonic time."""

    key: Key
    owner: str
    writer: str
    blocks: int
    deadline_s: float
    state: Callable[[], str]
    opened_s: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """`request_id epoch side state blocks`."""
        return f"{self.key.request_id} {self.key.epoch} {self.key.side.value} {self.state()} {self.blocks}"


class Ledger:
    """The open entries of one process. Not thread-safe: used on the event loop only."""

    def __init__(self) -> None:
        self._open: dict[Key, Entry] = {}
        self._opened = 0
        self._released = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def opened(self) -> int:
        """Entries ever opened; `opened - released` is `len(self)`."""
        return self._opened

    @property
    def released(self) -> int:
        """Entries ever released."""
        return self._released

    def open(self, entry: Entry) -> None:
        """Takes an entry on. Raises LedgerError when its key is open."""
        if entry.key in self._open:
            raise LedgerError(f"{entry.line()}: opened twice")
        self._open[entry.key] = entry
        self._opened += 1

    def touch(self, key: Key, deadline_s: float, blocks: int | None = None) -> None:
        """Moves the deadline, and the number of blocks when given. Raises LedgerError when the key is not open."""
        entry = self._get(key)
        self._open[key] = replace(entry, deadline_s=deadline_s, blocks=entry.blocks if blocks is None else blocks)

    def release(self, key: Key) -> Entry:
        """Ends an entry and returns it. Raises LedgerError when it is not open: released before, or never opened."""
        entry = self._get(key)
        del self._open[key]
        self._released += 1
        return entry

    def is_open(self, key: Key) -> bool:
        """True between open and release."""
        return key in self._open

    def entries(self) -> tuple[Entry, ...]:
        """What is open, oldest first."""
        return tuple(self._open.values())

    def leaked_blocks(self, now_s: float) -> int:
        """Blocks of entries whose deadline has passed."""
        return sum(entry.blocks for entry in self._open.values() if entry.deadline_s < now_s)

    def _get(self, key: Key) -> Entry:
        entry = self._open.get(key)
        if entry is None:
            raise LedgerError(f"{key.request_id} {key.epoch} {key.side.value}: not open")
        return entry
