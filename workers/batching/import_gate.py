"""Lets bytes from another worker into blocks of open imports, and into nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from protos.contract.errors import BadFrame
from workers.batching.runner import Runner


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
        layout = self._runner.layout
        if not 0 <= group < layout.num_groups:
            raise BadFrame(f"layer group {group} of {layout.num_groups}")
        size = layout.group_bytes(group)
        if offset_bytes < 0 or offset_bytes + data.nbytes > size:
            raise BadFrame(f"bytes {offset_bytes}..{offset_bytes + data.nbytes} of a layer group of {size}")
        with self._lock:
            if block_id not in self._open:
                raise BadFrame(f"block {block_id} belongs to no open import")
            return self._runner.write_block(block_id, group, offset_bytes, data)
