"""The life of a request.

    QUEUED --assign--> ASSIGNED --pick--> PREFILLING --handoff--> DECODING --finish--> DONE
       ^                  |                   |                      |
       +-----requeue------+-------------------+----------------------+

A held request goes back to QUEUED when its lease lapses or its worker gives it up; with too many attempts it is DEAD instead.
Every live request can be cancelled, expire and fail, and it is DONE in whatever live state it is when its last token is
accepted: the first token may be the last one, and the worker may be gone by the time its last token is accepted.
The Redis library carries the moves out, this table says which there are; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from orchestrator.domain.lifecycle import IllegalMove


class RequestState(StrEnum):
    """The state as Redis keeps it."""

    QUEUED = "QUEUED"  # in Redis, on no instance
    ASSIGNED = "ASSIGNED"  # in the inbox of a prefill instance
    PREFILLING = "PREFILLING"  # a prefill instance computes the prompt and hands its KV over
    DECODING = "DECODING"  # the decode instance holds the KV and produces tokens
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"
    DEAD = "DEAD"  # ended every worker that held it


class RequestMove(StrEnum):
    """What can happen to a request."""

    ASSIGN = "assign"
    PICK = "pick"
    HANDOFF = "handoff"
    REQUEUE = "requeue"
    FINISH = "finish"
    CANCEL = "cancel"
    EXPIRE = "expire"
    FAIL = "fail"
    BURY = "bury"


TERMINAL_STATES = frozenset(
    {RequestState.DONE, RequestState.FAILED, RequestState.CANCELLED, RequestState.EXPIRED, RequestState.DEAD}
)
LIVE_STATES = frozenset(RequestState) - TERMINAL_STATES
HELD_STATES = LIVE_STATES - {RequestState.QUEUED}
"""States in which instances have blocks reserved for the request."""


def _table() -> dict[tuple[RequestState, RequestMove], RequestState]:
    table = {
        (RequestState.QUEUED, RequestMove.ASSIGN): RequestState.ASSIGNED,
        (RequestState.ASSIGNED, RequestMove.PICK): RequestState.PREFILLING,
        (RequestState.PREFILLING, RequestMove.HANDOFF): RequestState.DECODING,
    }
    for state in HELD_STATES:
        table[state, RequestMove.REQUEUE] = RequestState.QUEUED
        table[state, RequestMove.BURY] = RequestState.DEAD
    for state in LIVE_STATES:
        table[state, RequestMove.FINISH] = RequestState.DONE
        table[state, RequestMove.CANCEL] = RequestState.CANCELLED
        table[state, RequestMove.EXPIRE] = RequestState.EXPIRED
        table[state, RequestMove.FAIL] = RequestState.FAILED
    return table


REQUEST_MOVES: Mapping[tuple[RequestState, RequestMove], RequestState] = MappingProxyType(_table())


def next_request_state(state: RequestState, move: RequestMove) -> RequestState:
    """The state after the move. Raises IllegalMove when the table has none."""
    try:
        return REQUEST_MOVES[state, move]
    except KeyError:
        raise IllegalMove(f"a request that is {state} cannot {move}") from None
