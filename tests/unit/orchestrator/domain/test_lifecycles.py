"""Request and instance lifecycles: the tables, what they refuse, and that the Redis library has the same."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from orchestrator.domain.clock import ManualClock
from orchestrator.domain.instance import (
    ALIVE_STATES,
    GONE_STATES,
    INSTANCE_MOVES,
    InstanceMove,
    InstanceState,
    next_instance_state,
)
from orchestrator.domain.lifecycle import IllegalMove
from orchestrator.domain.request import (
    HELD_STATES,
    LIVE_STATES,
    REQUEST_MOVES,
    TERMINAL_STATES,
    RequestMove,
    RequestState,
    next_request_state,
)


def lua_table(name: str) -> dict[str, set[str]]:
    """A `FROM = {TO = true, ...}` table of the library's prelude."""
    text = files("orchestrator.store.lua").joinpath("00_prelude.lua").read_text(encoding="utf-8")
    body = re.search(rf"^local {name} = \{{\n(.*?)^\}}", text, re.MULTILINE | re.DOTALL)
    assert body is not None, f"the library has no table {name}"
    rows = re.findall(r"^\s*(\w+) = \{([^}]*)\}", body.group(1), re.MULTILINE)
    return {start: set(re.findall(r"(\w+) = true", ends)) for start, ends in rows}


def test_the_library_moves_requests_as_the_table_says() -> None:
    ours: dict[str, set[str]] = {}
    for (start, _), end in REQUEST_MOVES.items():
        ours.setdefault(start.value, set()).add(end.value)
    assert lua_table("MOVES") == ours


def test_the_library_moves_instances_as_the_table_says() -> None:
    workers_own = {InstanceMove.READY, InstanceMove.DRAIN, InstanceMove.UNDRAIN}
    ours: dict[str, set[str]] = {}
    for (start, move), end in INSTANCE_MOVES.items():
        if move in workers_own:
            ours.setdefault(start.value, {start.value}).add(end.value)
    assert lua_table("INSTANCE_MOVES") == ours


def test_the_states_fall_into_live_and_terminal() -> None:
    assert set(RequestState) == LIVE_STATES | TERMINAL_STATES
    assert not LIVE_STATES & TERMINAL_STATES
    assert LIVE_STATES - {RequestState.QUEUED} == HELD_STATES
    assert set(InstanceState) == ALIVE_STATES | GONE_STATES


def test_the_long_way_of_a_request() -> None:
    state = RequestState.QUEUED
    for move in ("assign", "pick", "requeue", "assign", "pick", "handoff", "requeue", "assign", "pick", "handoff", "finish"):
        state = next_request_state(state, RequestMove(move))
    assert state is RequestState.DONE


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
@pytest.mark.parametrize("move", list(RequestMove))
def test_nothing_follows_an_end(state: RequestState, move: RequestMove) -> None:
    with pytest.raises(IllegalMove, match=f"that is {state} cannot {move}"):
        next_request_state(state, move)


@pytest.mark.parametrize("state", sorted(LIVE_STATES))
def test_every_live_request_can_end_in_every_way_but_a_queued_one_cannot_be_poison(state: RequestState) -> None:
    ends = {next_request_state(state, move) for move in RequestMove if (state, move) in REQUEST_MOVES} & TERMINAL_STATES
    assert ends == TERMINAL_STATES - ({RequestState.DEAD} if state is RequestState.QUEUED else set())


@pytest.mark.parametrize("state", sorted(GONE_STATES))
def test_an_instance_that_is_gone_only_registers_again(state: InstanceState) -> None:
    moves = {move for move in InstanceMove if (state, move) in INSTANCE_MOVES}
    assert moves == {InstanceMove.REGISTER}
    assert next_instance_state(state, InstanceMove.REGISTER) is InstanceState.STARTING
    with pytest.raises(IllegalMove):
        next_instance_state(state, InstanceMove.READY)


def test_a_manual_clock_goes_forward_only() -> None:
    clock = ManualClock(5.0)
    assert clock.advance(1.5) == clock.now_s() == 6.5
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-0.1)
