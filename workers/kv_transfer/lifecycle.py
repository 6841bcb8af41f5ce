"""The two lifecycles of a hand-off, one on each side.

    sender                                            receiver

    OPENING ──► STREAMING ──► ENDING ──► COMMITTED    OPEN ──► RECEIVING ──► VERIFYING ──► COMMITTED
       ▲            │            │           │          ▲          │
       └────────────┴────────────┘           ▼          └──────────┘
       (broken stream, bad digest)       RELEASED     (the sender opens again after a broken stream)

    every state but COMMITTED and RELEASED ──► ABORTED; on the sender ABORTED ──► RELEASED.

The sender's blocks are given back on the one way into RELEASED. The receiver's blocks go to the engine's sequence with
COMMITTED and back to the pool with ABORTED. An illegal move raises IllegalMove and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Generic, TypeVar


class IllegalMove(AssertionError):
    """A lifecycle table has no such move. A bug of the caller; nothing changed."""


class SendState(StrEnum):
    """Where the sending side of one hand-off is."""

    OPENING = "opening"  # asks the receiver for room and credits
    STREAMING = "streaming"  # pushes blocks as the engine finishes them
    ENDING = "ending"  # sent everything, waits for the commit
    COMMITTED = "committed"  # the receiver is the holder
    ABORTED = "aborted"  # given up; the receiver is not the holder through this hand-off
    RELEASED = "released"  # the blocks are given back


class ReceiveState(StrEnum):
    """Where the receiving side of one hand-off is."""

    OPEN = "open"  # blocks are reserved, no stream is attached
    RECEIVING = "receiving"  # one stream or several are attached
    VERIFYING = "verifying"  # all blocks are verified, the commit is on its way
    COMMITTED = "committed"  # the engine has the sequence
    ABORTED = "aborted"  # the blocks are given back


SEND_MOVES: Mapping[SendState, frozenset[SendState]] = {
    SendState.OPENING: frozenset({SendState.STREAMING, SendState.COMMITTED, SendState.ABORTED}),
    SendState.STREAMING: frozenset({SendState.ENDING, SendState.OPENING, SendState.ABORTED}),
    SendState.ENDING: frozenset({SendState.COMMITTED, SendState.OPENING, SendState.ABORTED}),
    SendState.COMMITTED: frozenset({SendState.RELEASED}),
    SendState.ABORTED: frozenset({SendState.RELEASED}),
    SendState.RELEASED: frozenset(),
}

RECEIVE_MOVES: Mapping[ReceiveState, frozenset[ReceiveState]] = {
    ReceiveState.OPEN: frozenset({ReceiveState.RECEIVING, ReceiveState.ABORTED}),
    ReceiveState.RECEIVING: frozenset({ReceiveState.OPEN, ReceiveState.VERIFYING, ReceiveState.ABORTED}),
    ReceiveState.VERIFYING: frozenset({ReceiveState.COMMITTED, ReceiveState.ABORTED}),
    ReceiveState.COMMITTED: frozenset(),
    ReceiveState.ABORTED: frozenset(),
}

S = TypeVar("S", bound=StrEnum)


class Lifecycle(Generic[S]):
    """One state and the table of its moves."""

    def __init__(self, moves: Mapping[S, frozenset[S]], start: S, on_move: Callable[[S, S], None] | None = None) -> None:
        self._moves = moves
        self._state = start
        self._on_move = on_move

    @property
    def state(self) -> S:
        """The state now."""
        return self._state

    @property
    def ended(self) -> bool:
        """True when no move leads out."""
        return not self._moves[self._state]

    def may(self, to: S) -> bool:
        """True when `move(to)` is legal now."""
        return to in self._moves[self._state]

    def move(self, to: S) -> None:
        """Goes to `to`. Raises IllegalMove, and stays, when the table has no such move."""
        if not self.may(to):
            raise IllegalMove(f"{type(to).__name__}: no move from {self._state.value} to {to.value}")
        before, self._state = self._state, to
        if self._on_move is not None:
            self._on_move(before, to)


def sending() -> Lifecycle[SendState]:
    """A hand-off about to open."""
    return Lifecycle(SEND_MOVES, SendState.OPENING)


def receiving() -> Lifecycle[ReceiveState]:
    """A hand-off whose blocks have just been reserved."""
    return Lifecycle(RECEIVE_MOVES, ReceiveState.OPEN)
