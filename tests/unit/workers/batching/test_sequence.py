"""The stages of a sequence and its incremental names."""

from __future__ import annotations

from itertools import product

import pytest

from protos.contract.block_hash import block_hashes
from workers.batching.sequence import TRANSITIONS, IllegalMove, Sequence, SequenceState
from workers.engine_api.types import EngineRequest, FinishReason, SamplingParams

ROOT = b"r" * 16


def a_sequence(state: SequenceState = SequenceState.WAITING, tokens: int = 10, **sampling: object) -> Sequence:
    params = SamplingParams(**{"max_tokens": 4, **sampling})  # type: ignore[arg-type]
    request = EngineRequest(request_id="r", epoch=1, prompt=tuple(range(tokens)), sampling=params)
    return Sequence(request, 0, 4, ROOT, state)


@pytest.mark.parametrize(("state", "to"), list(product(SequenceState, SequenceState)), ids=lambda s: s.name)
def test_every_move_is_in_the_table_or_changes_nothing(state: SequenceState, to: SequenceState) -> None:
    sequence = a_sequence(state)
    if to in TRANSITIONS[state]:
        sequence.move(to)
        assert sequence.state is to
    else:
        with pytest.raises(IllegalMove):
            sequence.move(to)
        assert sequence.state is state


def test_every_stage_has_an_end() -> None:
    assert TRANSITIONS.keys() == set(SequenceState)
    for state in set(SequenceState) - {SequenceState.ENDED}:
        assert SequenceState.ENDED in TRANSITIONS[state]


def test_names_are_the_contract_names() -> None:
    sequence = a_sequence(tokens=11)
    names = block_hashes(ROOT, range(11), 4)
    assert sequence.names_of(1) == names[:1]
    assert sequence.names_of(2) == names
    sequence.tokens.append(11)
    assert sequence.names_of(3) == block_hashes(ROOT, range(12), 4)
    with pytest.raises(AssertionError):
        sequence.names_of(4)


def test_the_table_follows_the_blocks() -> None:
    sequence = a_sequence()
    sequence.blocks = [3, 1]
    assert list(sequence.table) == [3, 1]
    assert sequence.table is sequence.table, "rebuilt only when blocks were added"
    sequence.blocks.append(2)
    assert list(sequence.table) == [3, 1, 2]
    assert sequence.take_blocks() == [3, 1, 2]
    sequence.blocks = [9, 8, 7]
    assert list(sequence.table) == [9, 8, 7], "as long as the old one, but another"
    sequence.take_blocks()
    assert not sequence.table


def test_ends() -> None:
    sequence = a_sequence()
    assert [sequence.append(5, 1000) for _ in range(4)] == [None, None, None, FinishReason.LENGTH]
    sequence = a_sequence()
    assert [sequence.append(5, 12) for _ in range(2)] == [None, FinishReason.LENGTH]
    sequence = a_sequence(stop_token_ids=frozenset({5}))
    assert [sequence.append(token, 1000) for token in (4, 5)] == [None, FinishReason.STOP]
    sequence = a_sequence(stop_token_ids=frozenset({5}), min_tokens=1)
    assert [sequence.append(5, 1000) for _ in range(2)] == [None, FinishReason.STOP]
