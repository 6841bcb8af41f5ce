"""What a sequence gives to one step of the runner."""

from __future__ import annotations

from workers.batching.runner import Slice
from workers.batching.sequence import Sequence


def slice_of(sequence: Sequence, count: int) -> Slice:
    """The next `count` rows; the last known token among them means that the step samples the one behind it."""
    start = sequence.num_computed
    tokens = sequence.tokens
    sample = start + count == len(tokens)
    return Slice(
        sequence.request_id,
        tokens,
        sequence.num_prompt,
        start,
        count,
        sequence.table,
        sequence.sampling,
        sample,
        len(tokens) - sequence.num_prompt,
        sequence.request.cache_salt,
        allowed=sequence.foresee() if sample else None,
        counts=sequence.counts if sample else None,
    )
