"""What rank 0 tells the others of a step: the rows to compute, without anything that only sampling needs.

A plan is int32: the number of slices; for each slice `start, count, sample, previous, kept, added`; then all fed tokens, then
all added blocks. A block table is the first `kept` blocks of slice `previous` of the last plan, and the added ones, so a
sequence that decodes costs six numbers and its token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import overload

import numpy as np

from workers.batching.runner import Slice
from workers.engine_api.types import SamplingParams

_FIELDS = 6
_GREEDY = SamplingParams(max_tokens=1)


class FedTokens(Sequence[int]):
    """The tokens of a sequence from `first` on: all that a rank above 0 knows of it."""

    def __init__(self, tokens: list[int], first: int) -> None:
        self._tokens = tokens
        self._first = first

    def __len__(self) -> int:
        return self._first + len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, int):
            index += len(self) if index < 0 else 0
            if index < self._first:
                raise IndexError(f"token {index} is not known here, {self._first} is the first")
            return self._tokens[index - self._first]
        start, stop, step = index.indices(len(self))
        if start < self._first and start < stop:
            raise IndexError(f"token {start} is not known here, {self._first} is the first")
        return self._tokens[start - self._first : stop - self._first : step]


class PlanWriter:
    """Rank 0's side; remembers the tables of the last plan."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, tuple[int, ...]]] = {}

    def encode(self, batch: Sequence[Slice]) -> bytes:
        """The plan of a batch. Every plan must be decoded, in order."""
        fields: list[int] = [len(batch)]
        added: list[tuple[int, ...]] = []
        for piece in batch:
            previous, kept = -1, 0
            table = piece.block_table
            if piece.request_id in self._last:
                index, known = self._last[piece.request_id]
                if table is known or table[: len(known)] == known:
                    previous, kept = index, len(known)
            fields += (piece.start, piece.count, piece.sample, previous, kept, len(table) - kept)
            added.append(table[kept:])
        tokens = (piece.tokens[piece.start : piece.start + piece.count] for piece in batch)
        self._last = {piece.request_id: (index, piece.block_table) for index, piece in enumerate(batch)}
        return np.fromiter(chain(fields, *tokens, *added), dtype="<i4").tobytes()


class PlanReader:
    """The other ranks' side."""

    def __init__(self) -> None:
        self._tables: list[tuple[int, ...]] = []

    def decode(self, payload: memoryview) -> list[Slice]:
        """The slices of the next plan; each knows no token before `start`."""
        numbers: list[int] = np.frombuffer(payload, dtype="<i4").tolist()
        count = numbers[0]
        rows = [numbers[at : at + _FIELDS] for at in range(1, 1 + count * _FIELDS, _FIELDS)]
        token_at = 1 + count * _FIELDS
        block_at = token_at + sum(row[1] for row in rows)
        slices, tables = [], []
        for index, (start, fed, sample, previous, kept, added) in enumerate(rows):
            table = tuple(numbers[block_at : block_at + added])
            if previous >= 0:
                known = self._tables[previous]
                table = known[:kept] + table if added or kept < len(known) else known
            tokens = FedTokens(numbers[token_at : token_at + fed], start)
            slices.append(Slice(str(index), tokens, 0, start, fed, table, _GREEDY, bool(sample), 0))
            tables.append(table)
            token_at, block_at = token_at + fed, block_at + added
        self._tables = tables
        return slices
