"""What must be true of the sequences of an engine between two calls."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Listing

from workers.batching.sequence import Sequence, SequenceState


def check_stages(sequences: Collection[Sequence], waiting: Listing[Sequence], running: Listing[Sequence]) -> None:
    """Raises AssertionError when stages, queues and block tables disagree."""
    for queue in (waiting, running):
        ages = [sequence.order for sequence in queue]
        assert ages == sorted(set(ages)), f"a queue is not in order of age: {ages}"
    for sequence in sequences:
        _check_one(sequence, waiting=sequence in waiting, running=sequence in running)
    apart = (SequenceState.HELD, SequenceState.IMPORTING, SequenceState.RESTORING)
    queued = sum(s.state not in apart for s in sequences)
    assert queued == len(waiting) + len(running), "a queue has a sequence that ended"


def _check_one(sequence: Sequence, *, waiting: bool, running: bool) -> None:
    name = f"{sequence.request_id} epoch {sequence.epoch} ({sequence.state.name})"
    known, computed, blocks = len(sequence.tokens), sequence.num_computed, len(sequence.blocks)
    assert list(sequence.table) == sequence.blocks, f"{name}: stale block table"
    assert computed <= blocks * sequence.block_tokens, f"{name}: {computed} rows in {blocks} blocks"
    assert len(set(sequence.blocks)) == blocks, f"{name}: a block is in the table twice"
    match sequence.state:
        case SequenceState.WAITING:
            assert waiting and not running, f"{name}: not in the right queue"
            assert not blocks, f"{name}: has blocks while it waits"
        case SequenceState.RESTORING:
            assert not running and not waiting, f"{name}: queued"
            assert not blocks, f"{name}: has blocks while it waits"
        case SequenceState.PREFILLING:
            assert running and not waiting, f"{name}: not in the right queue"
            assert blocks == sequence.blocks_for_known, f"{name}: {blocks} blocks for {known} tokens"
            assert computed < known, f"{name}: nothing is left to compute"
        case SequenceState.DECODING:
            assert running and not waiting, f"{name}: not in the right queue"
            assert computed == known - 1, f"{name}: {computed} rows of {known} tokens"
        case SequenceState.HELD:
            assert not running and not waiting, f"{name}: queued"
            assert computed == known - 1, f"{name}: {computed} rows of {known} tokens"
        case SequenceState.IMPORTING:
            assert not running and not waiting, f"{name}: queued"
            assert blocks >= -(-computed // sequence.block_tokens), f"{name}: {blocks} blocks for {computed} rows"
        case SequenceState.ENDED:
            raise AssertionError(f"{name}: ended, but still known")
