"""Steps whose bits depend on nothing but a row's own tokens: what `deterministic: true` runs.

A matrix product may round a row differently when its other dimension changes. So every operator of a pass sees one
shape: the rows of a step go ROWS at a time, short passes are filled up with rows of padding, each row attends to its
own sequence over tiles of FIXED_SIZES with borders at fixed positions, and every expert is asked for all ROWS rows.
A tile behind a row's end adds exactly nothing. Prompt rows and decoded rows take the same path, so chunks, batch
mates, prefix hits and recomputation leave no trace; the price is speed (each pass reads all weights for ROWS rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from workers.batching.runner import Slice
from workers.engines.torch.forward_batch import DecodeGroup, DecodePart, ForwardBatch, Upload
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.tiles import FIXED_SIZES
from workers.engines.torch.models.decoder import Decoder

ROWS = 16  # of one pass: enough to share the reading of weights, few enough that a lone decode wastes little


class FixedRowSteps:
    """Implements Steps: passes of ROWS rows, in order. The decoder must be loaded for them, see `load_decoder`."""

    is_one_pass = False

    def logits(self, decoder: Decoder, slices: Sequence[Slice], cache: KvCache, device: torch.device) -> Tensor:
        """See Steps. Rows of one sequence come in order, so a pass finds the KV rows of those before it."""
        found = []
        for pieces in row_passes(slices):
            logits = decoder.forward(fixed_batch(pieces, cache, device), cache)
            ends = np.cumsum([piece.count for piece in pieces])
            found += [logits[end - 1 : end] for end, piece in zip(ends, pieces, strict=True) if piece.sample]
        return torch.cat(found) if found else torch.empty(0)


def row_passes(slices: Sequence[Slice]) -> list[list[Slice]]:
    """The slices cut so that each pass has at most ROWS rows; only the last piece of a slice samples."""
    passes: list[list[Slice]] = [[]]
    room = ROWS
    for whole in slices:
        start, end = whole.start, whole.start + whole.count
        while start < end:
            if not room:
                passes.append([])
                room = ROWS
            count = min(room, end - start)
            last = start + count == end
            passes[-1].append(replace(whole, start=start, count=count, sample=whole.sample and last))
            start, room = start + count, room - count
    return passes


def fixed_batch(pieces: Sequence[Slice], cache: KvCache, device: torch.device) -> ForwardBatch:
    """ROWS rows, each with its own table and length. Padding reads zeros and writes to the scratch block."""
    token_ids, positions = np.zeros(ROWS, dtype=np.int64), np.zeros(ROWS, dtype=np.int64)
    slots = np.repeat(cache.slots_of((cache.scratch_block,), np.zeros(1, dtype=np.int64)), ROWS)
    lengths = np.ones(ROWS, dtype=np.int32)
    widest = max(cache.blocks_for(piece.start + piece.count) for piece in pieces)
    # Tables end at a border of a split, so that the last split has the shape of the others.
    split = max(1, FIXED_SIZES.context_tokens // cache.layout.block_tokens)
    tables = np.full((ROWS, -(-widest // split) * split), cache.num_blocks, dtype=np.int32)
    row = 0
    for piece in pieces:
        end = piece.start + piece.count
        mine = slice(row, row + piece.count)
        token_ids[mine] = piece.tokens[piece.start : end]
        positions[mine] = np.arange(piece.start, end)
        slots[mine] = cache.slots_of(piece.block_table, positions[mine])
        lengths[mine] = positions[mine] + 1
        used = cache.blocks_for(end)
        tables[mine, :used] = piece.block_table[:used]
        row += piece.count
    upload = Upload(device)
    for array in (token_ids, positions, slots, tables, lengths):
        upload.add(array)
    ids, at, written, table, seen = upload.send()
    known = tuple(lengths.tolist())
    group = DecodeGroup(None, table, seen, min(known[:row]) if row == ROWS else 0)
    return ForwardBatch(ids, at, written, (), DecodePart(table, seen, known, (group,)), None)
