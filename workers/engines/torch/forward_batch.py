"""One step as tensors: all rows of all slices side by side, and where in the pool each sequence lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.batching.runner import Slice
from workers.engines.torch.kv_cache import KvCache, Rows


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """A slice of several rows: `[first, first + count)` of the batch, at positions from `start` on."""

    first: int
    count: int
    start: int
    block_table: Tensor  # [blocks], int32; blocks in logical order, enough for start + count tokens


@dataclass(frozen=True, slots=True)
class DecodePart:
    """The leading slices of one row each: rows `[0, B)` of the batch."""

    block_tables: Tensor  # [B, widest], int32; short tables end with the pool's block of zeros
    lengths: Tensor  # [B], int32; tokens that each row sees, its own included
    lengths_list: tuple[int, ...]

    @property
    def count(self) -> int:
        """B."""
        return len(self.lengths_list)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What a decoder computes in one pass."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # rows of the pool that the batch writes, [T]
    prefills: tuple[PrefillPart, ...]
    decodes: DecodePart | None
    sample_rows: Tensor | None  # rows of the batch whose logits are wanted, [S]; None when all are


def build_batch(slices: Sequence[Slice], cache: KvCache, device: torch.device) -> ForwardBatch:
    """Lays out the slices in order. The batcher puts decodes first; a chunk of one row behind a longer one is a prefill."""
    token_ids: list[int] = []
    positions: list[Rows] = []
    slots: list[Rows] = []
    prefills: list[PrefillPart] = []
    decodes: list[Slice] = []
    sample_rows: list[int] = []
    for piece in slices:
        first, end = len(token_ids), piece.start + piece.count
        token_ids.extend(piece.tokens[piece.start : end])
        rows = np.arange(piece.start, end, dtype=np.int64)
        positions.append(rows)
        slots.append(cache.slots_of(piece.block_table, rows))
        if piece.count == 1 and not prefills:
            decodes.append(piece)
        else:
            table = np.asarray(piece.block_table[: cache.blocks_for(end)], dtype=np.int32)
            prefills.append(PrefillPart(first, piece.count, piece.start, torch.from_numpy(table).to(device)))
        if piece.sample:
            sample_rows.append(len(token_ids) - 1)
    every = len(sample_rows) == len(token_ids)
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        slots=torch.from_numpy(np.concatenate(slots)).to(device),
        prefills=tuple(prefills),
        decodes=_decode_part(decodes, cache, device) if decodes else None,
        sample_rows=None if every else torch.tensor(sample_rows, dtype=torch.int64, device=device),
    )


def _decode_part(decodes: list[Slice], cache: KvCache, device: torch.device) -> DecodePart:
    lengths = np.array([piece.start + 1 for piece in decodes], dtype=np.int32)
    tables = np.full((len(decodes), cache.blocks_for(int(lengths.max()))), cache.num_blocks, dtype=np.int32)
    for row, piece in enumerate(decodes):
        used = cache.blocks_for(piece.start + 1)
        tables[row, :used] = piece.block_table[:used]
    return DecodePart(
        block_tables=torch.from_numpy(tables).to(device),
        lengths=torch.from_numpy(lengths).to(device),
        lengths_list=tuple(lengths.tolist()),
    )
