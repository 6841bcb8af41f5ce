"""Lists of byte pieces that are written without being joined, or filled one after another."""

from __future__ import annotations

from collections.abc import Sequence

Piece = bytes | memoryview


def cut(pieces: Sequence[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `size` bytes and the rest. `size` is at most what there is."""
    first: list[memoryview] = []
    for number, piece in enumerate(pieces):
        if size < len(piece):
            rest = [piece[size:], *pieces[number + 1 :]]
            return ([*first, piece[:size]], rest) if size else (first, rest)
        first.append(piece)
        size -= len(piece)
    return first, []


def drop(pieces: Sequence[Piece], size: int) -> list[Piece]:
    """What is left after the first `size` bytes."""
    for number, piece in enumerate(pieces):
        if size < len(piece):
            return [memoryview(piece)[size:], *pieces[number + 1 :]]
        size -= len(piece)
    return []


def first_of(views: Sequence[memoryview], size: int) -> list[memoryview]:
    """The first `size` bytes, or all if there are not so many."""
    found: list[memoryview] = []
    for view in views:
        if size < view.nbytes:
            return [*found, view[:size]] if size else found
        found.append(view)
        size -= view.nbytes
    return found
