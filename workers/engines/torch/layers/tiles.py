"""How a long context is cut: tiles of keys, and which rows of a chunk see which tile how. Pure arithmetic.

Rows and keys are named by their position. A row at p sees keys `(p - window, p]`, or all up to p without a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Sight = Literal["full", "causal", "masked"]


@dataclass(frozen=True, slots=True)
class TileSizes:
    """Bounds of what attention holds at a time.

    context_tokens: keys and values gathered (and, for latents, rebuilt) at once. 4,096 of 32 heads of 128 + 128 bf16
    values are 67 MB; the fixed cost of a kernel call and of a merge is below 2 % of the work on such a tile.
    query_rows: rows of one mask, where a window needs one: 1,024 x 4,096 values.
    fixed: the tiles of decode rows lie at multiples of context_tokens, whatever shares the batch; then block tables
    must be a whole number of tiles wide.
    """

    context_tokens: int = 4096
    query_rows: int = 1024
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.context_tokens < 1 or self.query_rows < 1:
            raise ValueError("a tile has at least one token and one row")


FIXED_SIZES = TileSizes(context_tokens=256, fixed=True)  # of deterministic steps: a short context should not pay for 4,096


@dataclass(frozen=True, slots=True)
class KeyTile:
    """Keys at positions [first, end)."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows at positions [first, end) that see a tile: all of its keys, the keys up to themselves, or as a mask says.

    `causal` rows stand at the tile's own positions; every row of a run sees at least one key.
    """

    first: int
    end: int
    sight: Sight


def key_tiles(start: int, count: int, window: int | None, sizes: TileSizes) -> Iterator[KeyTile]:
    """All keys that rows [start, start + count) see, in order; a border lies at `start`."""
    lowest = 0 if window is None else max(0, start - window + 1)
    for low, high in ((lowest, start), (start, start + count)):
        for first in range(low, high, sizes.context_tokens):
            yield KeyTile(first, min(first + sizes.context_tokens, high))


def row_runs(tile: KeyTile, start: int, count: int, window: int | None, sizes: TileSizes) -> Iterator[RowRun]:
    """The rows of [start, start + count) that see a key of the tile."""
    end = start + count
    if window is None:
        if tile.first >= start:
            yield RowRun(tile.first, tile.end, "causal")
        if max(tile.end, start) < end:
            yield RowRun(max(tile.end, start), end, "full")
        return
    last_seen = min(end, tile.end - 1 + window)
    for first in range(max(tile.first, start), last_seen, sizes.query_rows):
        stop = min(first + sizes.query_rows, last_seen)
        whole = first >= tile.end - 1 and stop - 1 < tile.first + window
        yield RowRun(first, stop, "full" if whole else "masked")
