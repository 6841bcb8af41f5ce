"""Full blocks by content: names chained per model and tenant -> block. Partial blocks are never shared."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from workers.engine_api.types import CacheEvent

MAX_PENDING_EVENTS = 4096


class PrefixCache:
    """Which block holds the content of a name (`protos.contract.block_hash`).

    A name is stored once: the first block to hold the content stays its block. Events are numbered without gaps; when
    nobody drains them the oldest are dropped beyond `MAX_PENDING_EVENTS`, which the numbers show.

    Lower tiers may hold names besides (`elsewhere`): events tell of a name when the first place gets it and when the last one
    loses it. `known_names` counts the names that are somewhere.
    """

    def __init__(self, elsewhere: Callable[[bytes], bool] = lambda name: False) -> None:
        self._elsewhere = elsewhere
        self.known_names = 0
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._events: deque[CacheEvent] = deque(maxlen=MAX_PENDING_EVENTS)
        self._removed: list[bytes] = []
        self._last_event = 0

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, name: bytes) -> bool:
        return name in self._block_of

    def match(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known run of `names` from its start. Changes nothing."""
        blocks: list[int] = []
        for name in names:
            block_id = self._block_of.get(name)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def store(self, parent: bytes, names: Sequence[bytes], block_ids: Sequence[int]) -> list[int]:
        """Files blocks under consecutive names behind `parent`; returns those that were new and must be kept.

        A block whose name is filed already under another block stays unfiled.
        """
        new: list[int] = []
        run: list[bytes] = []
        for name, block_id in zip(names, block_ids, strict=True):
            if name in self._block_of:
                self._announce(parent, run)
                run, parent = [], name
                continue
            assert block_id not in self._name_of, f"block {block_id} is filed under another name"
            self._block_of[name] = block_id
            self._name_of[block_id] = name
            new.append(block_id)
            if self._elsewhere(name):
                self._announce(parent, run)
                run, parent = [], name
            else:
                run.append(name)
        self._announce(parent, run)
        return new

    def name_of(self, block_id: int) -> bytes:
        """The name that a filed block is under."""
        return self._name_of[block_id]

    def drop(self, block_id: int) -> None:
        """The block is about to hold something else."""
        name = self._name_of.pop(block_id)
        del self._block_of[name]
        self.gone(name)

    def gone(self, name: bytes) -> None:
        """A place lost the name; unless there is another one, nobody has it any more."""
        if name not in self._block_of and not self._elsewhere(name):
            self.known_names -= 1
            self._removed.append(name)

    def found(self, parent: bytes, names: Sequence[bytes]) -> None:
        """A lower tier turns out to have these consecutive names, which no other one has."""
        run: list[bytes] = []
        for name in names:
            if name in self._block_of:
                self._announce(parent, run)
                run, parent = [], name
            else:
                run.append(name)
        self._announce(parent, run)

    def drain_events(self) -> tuple[CacheEvent, ...]:
        """The changes since the last call, in order."""
        self._flush_removed()
        events = tuple(self._events)
        self._events.clear()
        return events

    def names(self) -> set[bytes]:
        """All names that are filed."""
        return set(self._block_of)

    def blocks(self) -> set[int]:
        """All blocks that are filed."""
        return set(self._name_of)

    def check_integrity(self) -> None:
        """Raises AssertionError when the two directions disagree."""
        assert len(self._block_of) == len(self._name_of), "names and blocks differ in number"
        for name, block_id in self._block_of.items():
            assert self._name_of.get(block_id) == name, f"block {block_id} is filed under {name.hex()} and another name"

    def _announce(self, parent: bytes, stored: list[bytes]) -> None:
        if stored:
            self._flush_removed()
            self.known_names += len(stored)
            self._last_event += 1
            self._events.append(CacheEvent(self._last_event, stored=tuple(stored), parent=parent))

    def _flush_removed(self) -> None:
        if self._removed:
            self._last_event += 1
            self._events.append(CacheEvent(self._last_event, removed=tuple(self._removed)))
            self._removed.clear()
