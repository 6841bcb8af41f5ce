"""What hand-offs did in this process, since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TransferCounters:
    """Written on the event loop by both sides; they only grow."""

    kv_blocks_sent: int = 0
    kv_bytes_sent: int = 0
    kv_blocks_received: int = 0
    kv_bytes_received: int = 0
    kv_bytes_mapped: int = 0  # sent or received by reference into shared memory; counted in the bytes above too
    handoffs_committed: int = 0  # on the sending side
    handoffs_failed: int = 0  # on the sending side
    stale_refused: int = 0  # of a stale epoch or incarnation, on either side
