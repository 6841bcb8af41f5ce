"""One step as tensors: all rows of all slices side by side, and who attends to which rows of the pool."""

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
    context: Tensor  # rows of the pool, [start + count]


@dataclass(frozen=True, slots=True)
class DecodePart:
    """Slices of one row each and similar length, padded to the longest."""

    rows: Tensor  # rows of the batch, [B]
    context: Tensor  # rows of the pool, [B * L]
    mask: Tensor | None  # [B, L], true where a key is real; None when all are


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What a decoder computes in one pass."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # rows of the pool that the batch writes, [T]
    prefills: tuple[PrefillPart, ...]
    decodes: tuple[DecodePart, ...]
    sample_rows: Tensor  # rows of the batch whose logits are wanted, [S]


def build_batch(slices: Sequence[Slice], cache: KvCache, device: torch.device) -> ForwardBatch:
    """Lays out the slices in order; padding only occurs among decodes of similar length."""
    token_ids: list[int] = []
    positions: list[Rows] = []
    slots: list[Rows] = []
    prefills: list[PrefillPart] = []
    decodes: list[tuple[int, Rows]] = []
    sample_rows: list[int] = []
    for piece in slices:
        first, end = len(token_ids), piece.start + piece.count
        context = cache.row_index(piece.block_table, end)
        token_ids.extend(piece.tokens[piece.start : end])
        positions.append(np.arange(piece.start, end, dtype=np.int64))
        slots.append(context[piece.start :])
        if piece.count == 1:
            decodes.append((first, context))
        else:
            prefills.append(PrefillPart(first, piece.count, piece.start, torch.from_numpy(context).to(device)))
        if piece.sample:
            sample_rows.append(len(token_ids) - 1)
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        slots=torch.from_numpy(np.concatenate(slots)).to(device),
        prefills=tuple(prefills),
        decodes=tuple(_decode_part(group, cache.padding_row, device) for group in _similar_lengths(decodes)),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
    )


def _similar_lengths(decodes: list[tuple[int, Rows]]) -> list[list[tuple[int, Rows]]]:
    """Groups by length so that no group wastes more than a third of its reads on padding."""
    groups: list[list[tuple[int, Rows]]] = []
    for entry in sorted(decodes, key=lambda entry: -len(entry[1])):
        if groups and 3 * len(entry[1]) >= 2 * len(groups[-1][0][1]):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def _decode_part(group: list[tuple[int, Rows]], padding_row: int, device: torch.device) -> DecodePart:
    longest = len(group[0][1])
    lengths = np.array([len(context) for _, context in group])
    context = np.full((len(group), longest), padding_row, dtype=np.int64)
    for row, (_, real) in enumerate(group):
        context[row, : len(real)] = real
    mask = None
    if lengths.min() != longest:
        mask = torch.from_numpy(np.arange(longest) < lengths[:, None]).to(device)
    return DecodePart(
        rows=torch.tensor([row for row, _ in group], dtype=torch.int64, device=device),
        context=torch.from_numpy(context.reshape(-1)).to(device),
        mask=mask,
    )
