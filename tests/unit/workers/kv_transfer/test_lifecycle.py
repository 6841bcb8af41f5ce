"""The tables of the two lifecycles, and what the ledger counts."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.kv_transfer.ledger import Entry, Key, Ledger, LedgerError, Side
from workers.kv_transfer.lifecycle import (
    RECEIVE_MOVES,
    SEND_MOVES,
    IllegalMove,
    Lifecycle,
    ReceiveState,
    SendState,
    receiving,
    sending,
)
from workers.service.assignments import FIRST_STAGE, STAGE_MOVES, Part, Stage
from workers.service.lifecycle import INSTANCE_MOVES, InstanceState

TABLES = [(SEND_MOVES, SendState), (RECEIVE_MOVES, ReceiveState), (STAGE_MOVES, Stage), (INSTANCE_MOVES, InstanceState)]


@pytest.mark.parametrize(("table", "states"), TABLES)
def test_every_move_that_is_not_listed_raises_and_changes_nothing(
    table: Mapping[StrEnum, frozenset[StrEnum]], states: type[StrEnum]
) -> None:
    assert set(table) == set(states)
    refused = 0
    for start in states:
        for target in states:
            machine = Lifecycle(table, start)
            if target in table[start]:
                machine.move(target)
                assert machine.state is target
            else:
                refused += 1
                with pytest.raises(IllegalMove):
                    machine.move(target)
                assert machine.state is start
    assert refused > len(states)


@pytest.mark.parametrize(("table", "states"), TABLES)
def test_every_state_can_end(table: Mapping[StrEnum, frozenset[StrEnum]], states: type[StrEnum]) -> None:
    ends = {state for state in states if not table[state]}
    assert ends
    for start in states:
        seen, todo = {start}, [start]
        while todo:
            new = table[todo.pop()] - seen
            seen |= new
            todo += new
        assert seen & ends, f"no way out of {start}"


def test_blocks_are_released_on_one_way_only() -> None:
    ways = [state for state, moves in SEND_MOVES.items() if SendState.RELEASED in moves]
    assert set(ways) == {SendState.COMMITTED, SendState.ABORTED}
    assert not SEND_MOVES[SendState.RELEASED]
    assert sending().state is SendState.OPENING
    assert receiving().state is ReceiveState.OPEN


def test_only_a_verified_import_is_committed() -> None:
    assert [s for s, moves in RECEIVE_MOVES.items() if ReceiveState.COMMITTED in moves] == [ReceiveState.VERIFYING]


def test_every_part_starts_in_a_stage_that_can_end() -> None:
    assert all(Stage.ENDED in STAGE_MOVES[FIRST_STAGE[part]] for part in Part)


def entry(key: Key, blocks: int = 3, deadline_s: float = 10.0) -> Entry:
    return Entry(key=key, owner="d", writer="p/1", blocks=blocks, deadline_s=deadline_s, state=lambda: "open")


def test_an_entry_is_released_exactly_once() -> None:
    ledger, key = Ledger(), Key("r", 1, Side.SEND)
    ledger.open(entry(key))
    with pytest.raises(LedgerError):
        ledger.open(entry(key))
    assert [one.line() for one in ledger.entries()] == ["r 1 send open 3"]
    ledger.release(key)
    with pytest.raises(LedgerError):
        ledger.release(key)
    with pytest.raises(LedgerError):
        ledger.touch(key, 1.0)
    assert (len(ledger), ledger.opened, ledger.released) == (0, 1, 1)


def test_blocks_beyond_their_deadline_are_leaks_until_they_are_touched_or_released() -> None:
    ledger, one, two = Ledger(), Key("r", 1, Side.SEND), Key("r", 1, Side.RECEIVE)
    ledger.open(entry(one, blocks=3, deadline_s=10.0))
    ledger.open(entry(two, blocks=4, deadline_s=20.0))
    assert [ledger.leaked_blocks(now) for now in (9.0, 11.0, 21.0)] == [0, 3, 7]
    ledger.touch(one, 30.0, blocks=5)
    assert ledger.leaked_blocks(21.0) == 4
    ledger.release(two)
    assert [ledger.leaked_blocks(now) for now in (21.0, 31.0)] == [0, 5]


keys = st.builds(Key, st.sampled_from("ab"), st.integers(1, 2), st.sampled_from(Side))


@given(st.lists(st.tuples(st.booleans(), keys), max_size=30))
def test_the_ledger_counts_what_is_open(steps: list[tuple[bool, Key]]) -> None:
    ledger, model = Ledger(), set[Key]()
    for opens, key in steps:
        legal = (key not in model) if opens else (key in model)
        try:
            if opens:
                ledger.open(entry(key))
            else:
                ledger.release(key)
            assert legal
            model ^= {key}
        except LedgerError:
            assert not legal
        assert {one.key for one in ledger.entries()} == model
        assert ledger.opened - ledger.released == len(ledger) == len(model)
