"""Lets bytes from another worker into blocks of open imports, and into nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from protos.contract.errors import BadFrame
from workers.batching.runner import Runner
from workers.engine_api.types import KvPlace


class ImportGate:
    """A write and the closing of its block exclude each other: once `close` returns, nothing writes there any more."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._open: set[int] = set()
        self._lock = threading.Lock()

    def open(self, block_ids: Iterable[int]) -> None:
        with self._lock:
            self._open.update(block_ids)

    def close(self, block_ids: Iterable[int]) -> None:
        """Idempotent."""
        with self._lock:
            self._open.difference_update(block_ids)

    def write(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        """Writes bytes into one layer group of an open block, from any thread; returns what Engine.import_kv returns.

        Raises BadFrame when the block is not open, the group does not exist or the bytes do not fit.
        """
        self._check(group, offset_bytes, data.nbytes)
        with self._lock:
            self._check_open((block_id,))
            return self._runner.write_block(block_id, group, offset_bytes, data)

    def room(self, places: tuple[KvPlace, ...]) -> ImportRoom | None:
        """See Engine.import_room."""
        block_ids = frozenset(place.block_id for place in places)
        self.while_open(block_ids, lambda: 0)
        views: list[memoryview] = []
        for block_id, group, offset_bytes, size_bytes in places:
            self._check(group, offset_bytes, size_bytes)
            whole = self._runner.writable_group(block_id, group)
            if whole is None:
                return None
            views.append(whole[offset_bytes : offset_bytes + size_bytes])
        return ImportRoom(self, block_ids, views)

    def while_open(self, block_ids: frozenset[int], fill: Callable[[], int]) -> int:
        """Runs `fill` while all these blocks are open. Raises BadFrame, and runs nothing, when one is not."""
        with self._lock:
            self._check_open(block_ids)
            return fill()

    def _check(self, group: int, offset_bytes: int, size_bytes: int) -> None:
        layout = self._runner.layout
        if not 0 <= group < layout.num_groups:
            raise BadFrame(f"layer group {group} of {layout.num_groups}")
        size = layout.group_bytes(group)
        if offset_bytes < 0 or offset_bytes + size_bytes > size:
            raise BadFrame(f"bytes {offset_bytes}..{offset_bytes + size_bytes} of a layer group of {size}")

    def _check_open(self, block_ids: Iterable[int]) -> None:
        if not self._open.issuperset(block_ids):
            closed = min(set(block_ids) - self._open)
            raise BadFrame(f"block {closed} belongs to no open import")


class ImportRoom:
    """See KvRoom."""

    def __init__(self, gate: ImportGate, block_ids: frozenset[int], views: list[memoryview]) -> None:
        self._gate = gate
        self._block_ids = block_ids
        self.views = views

    def write(self, fill: Callable[[], int]) -> int:
        """See KvRoom.write."""
        return self._gate.while_open(self._block_ids, fill)
