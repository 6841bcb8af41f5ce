"""Bytes that arrive in pieces, and the views of memory that they go into."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Write = Callable[[Callable[[], int]], int]  # runs what fills memory, while that may be written; see KvRoom.write


def copy_into(views: Sequence[memoryview], data: memoryview) -> int:
    """Copies as much as there is room for, in order; gives how much that was."""
    at = 0
    for view in views:
        part = data[at : at + view.nbytes]
        view[: part.nbytes] = part
        at += part.nbytes
    return at


def unguarded(fill: Callable[[], int]) -> int:
    """A Write into memory that nobody else knows of."""
    return fill()
